"""What `slimgemm inspect` shows of modules that are no layers but lost channels."""

import torch

from slimgemm import pruning, sparse_ops
from slimgemm.benchmarks import saved
from slimgemm.sparse_ops.report import as_table
from tests.pruning.norm_models import vit


def test_embeddings_and_position_parameters_are_shown_at_their_width(tmp_path):
    model, x = vit(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    half = pruning.Uniform(0.5)
    pruning.plan(model, x, pattern=pruning.Channels(), amount=half).apply(model)
    sparse_ops.save(model, tmp_path / "out")
    found = saved.contents(tmp_path / "out")
    rows = {row["layer"]: row for row in found["layers"]}
    assert rows[""]["dense_shape"] == [1, 1, 16]
    assert rows[""]["kept"] == "8 of 16 of token, 8 of 16 of position"
    assert (rows[""]["stored_bytes"], rows[""]["dense_bytes"]) == (6 * 8 * 4, 6 * 16 * 4)
    assert rows["blocks.1.norm1"]["kept"] == "8 of 16 of weight"  # of the RMS kind
    assert rows["blocks.1.norm1"]["stored_over_dense"] == rows["norm"]["stored_over_dense"] == 0.5


def test_no_cell_of_a_table_is_cut_short():
    names = [
        "encoder.layers.11.attention.output.projection",
        "SparseConv2d24",
        "2:4, 96 of 128 out",
    ]
    text = as_table("saved", ["layer", "class", "kept", *"abcde"], [[*names, *["1,234,567"] * 5]])
    cells = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    whole = ["".join(cell.strip() for cell in column) for column in zip(*cells, strict=True)]
    assert whole[0] == names[0] and whole[1] == names[1] and whole[3] == "1,234,567"
