"""Set-up of every test: the Triton interpreter where there is no GPU, NaN in new memory."""

import os

import hypothesis
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Before any slimgemm kernel is imported: triton.jit reads it when a kernel is decorated.
    os.environ["TRITON_INTERPRET"] = "1"
# Models of transformers are made from their configurations; no test may ask a hub for one.
os.environ["HF_HUB_OFFLINE"] = "1"


# The same examples in every run: a landing must not fail by the luck of a draw.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def nan_filled_empty(monkeypatch):
    """Uninitialised memory reads as NaN, so that a kernel that skips a place is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def device():
    return torch.device("cuda" if HAS_GPU else "cpu")


def pytest_collection_modifyitems(items):
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
