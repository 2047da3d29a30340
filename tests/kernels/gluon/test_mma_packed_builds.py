"""Ahead-of-time builds of mma_packed: instructions, spills, width of every load and copy."""

from test_builds import build, build_all, total

from slimgemm.kernels.configs import SMEM_BYTES
from slimgemm.kernels.gluon.mma_packed import MMA_PACKED_TILES, mma_packed_tile
from slimgemm.kernels.gluon.mma_tiles import ARCHITECTURES


def check(name, row):
    _, kind, most = name.split("/")
    arch = kind if kind.startswith("sm_") else "sm_90"
    tile = mma_packed_tile(int(most), kind != "odd_x")
    assert total(row, "STL") == total(row, "LDL") == 0, row
    assert row["smem"] <= SMEM_BYTES[arch], row
    steps = 8 * tile.mt * tile.nt
    assert total(row, "HMMA.SP.16832.F32") == steps, row
    # Per 256 columns and row tile: two rows' four loads of values and two of metadata; once more
    # before the loop, values only of the columns ahead. All are 16 bytes wide.
    assert row["counts"].get("LDG.E.128") == tile.mt * (12 + tile.ahead + 4), row
    if kind == "odd_x":
        assert total(row, "LDG.E.U16") > 0 and total(row, "LDGSTS") == 0, row
    else:
        assert row["counts"].get("LDGSTS.E.64", 0) > 0, row
        assert total(row, "LDG.E") == row["counts"]["LDG.E.128"] + epilogue(kind, tile), row


def epilogue(kind, tile):
    """4-byte loads of bias and scale: two rows of each row tile, each once or twice."""
    return 8 * tile.mt if kind == "gelu" else 0


def test_small_set(tmp_path):
    names = ["mma_packed/sm_90/16", "mma_packed/sm_80/64", "mma_packed/masked/32"]
    for name, row in build(names, tmp_path).items():
        check(name, row)


@build_all
def test_every_build(tmp_path):
    rows = build(["mma_packed/*"], tmp_path)
    assert len(rows) == (len(ARCHITECTURES) + 3) * len(MMA_PACKED_TILES)
    for name, row in rows.items():
        check(name, row)
