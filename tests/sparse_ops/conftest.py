"""What several tests of sparse_ops start from."""

import pytest
from checkpoint_cases import packed_net

from slimgemm.sparse_ops import save


@pytest.fixture
def saved(tmp_path):
    """(folder, the model that was saved into it)"""
    model = packed_net()
    save(model, tmp_path / "out")
    return tmp_path / "out", model
