"""Ahead-of-time builds, in processes of their own: instructions, spills, loads, shared memory.

The short set builds with the installed Triton. SLIMGEMM_BUILD_ALL=1 builds every shipped
configuration (about 4 minutes), and SLIMGEMM_TRITONS the tiles with each further version it names
(folders made by `pip install --no-deps --target FOLDER triton==VERSION`, separated by colons).
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from slimgemm.kernels.configs import SMEM_BYTES
from slimgemm.kernels.gluon.mma_conv import mma_conv_tile
from slimgemm.kernels.gluon.mma_packed import MMA_PACKED_TILES, mma_packed_tile
from slimgemm.kernels.gluon.mma_tiles import ARCHITECTURES, MMA_SP_TILES, mma_sp_tile
from slimgemm.kernels.gluon.wgmma_tiles import WGMMA_SP_TILES

BUILD = pathlib.Path(__file__).with_name("build.py")
EPILOGUES = ("relu", "gelu", "gelu_tanh", "silu", "relu2")

build_all = pytest.mark.skipif(
    not os.environ.get("SLIMGEMM_BUILD_ALL"),
    reason="SLIMGEMM_BUILD_ALL=1 builds every configuration",
)
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or sys.platform != "linux",
    reason="needs a Triton wheel with ptxas",
)


def build(cases, cache, path=None):
    """The records of build.py for `cases`, by name."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(cache)
    if path:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, str(BUILD), *cases], env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) >= len(cases), f"nothing was built for some of {cases}"
    return {row["name"]: row for row in rows}


def total(row, prefix):
    return sum(count for name, count in row["counts"].items() if name.startswith(prefix))


def check_mma_sp(row, arch, dtype="BF16", tile=None, copies=True):
    """What must hold of each build of mma_sp; counts are those of the tile's unrolled loop."""
    assert total(row, "STL") == total(row, "LDL") == 0, row
    assert row["smem"] <= SMEM_BYTES[arch], row
    if tile is None:
        assert total(row, "HMMA.SP.16832.F32") > 0
        return
    steps = 8 * tile.mt * tile.nt
    name = "HMMA.SP.16832.F32" + (".BF16" if dtype == "BF16" else "")
    assert row["counts"].get(name) == steps, row
    # Per 256-column block: mt x (8 steps + 1 metadata), and once more `ahead` + 1 before the loop.
    assert row["counts"].get("LDG.E.128") == tile.mt * (9 + tile.ahead + 1), row
    assert (total(row, "LDGSTS.E.BYPASS.128") > 0) == copies, row


def check_general(row, most):
    check_mma_sp(row, "sm_90", tile=mma_sp_tile(most, aligned=False), copies=False)
    assert total(row, "LDG.E.U16") > 0, row


def check_tiles(rows):
    for name, row in rows.items():
        _, arch, most = name.split("/")
        if arch == "general":
            check_general(row, int(most))
        elif arch == "gelu":
            check_mma_sp(row, "sm_90", "F16", MMA_SP_TILES[int(most)])
        else:
            check_mma_sp(row, arch, tile=MMA_SP_TILES[int(most)])


def check_wgmma_sp(rows):
    for name, row in rows.items():
        tokens = int(name.split("/")[-1])
        kind = "F32" if "epilogue" in name else "F32.BF16"
        assert total(row, "STL") == total(row, "LDL") == 0, row
        assert row["smem"] <= SMEM_BYTES["sm_90"] and row["arena_at_zero"], row
        # Two consumers of four steps; the metadata of a block, and once early: one 8-byte load, or
        # four 2-byte ones of the canonical format.
        assert row["counts"][f"HGMMA.SP.64x{tokens}x32.{kind}"] == 8, row
        canonical = name.startswith(("wgmma_packed", "wgmma_conv"))
        width, loads = ("U16", 16) if canonical else ("64", 4)
        assert row["counts"][f"LDG.E.{width}"] == loads, row
        assert row["counts"]["UTMALDG"] == 1 + max(2, 2 * tokens // 128), row
        # All of Y in 16-byte stores: 64 x tokens values of 2 bytes over 128 lanes, two consumers.
        assert row["counts"]["STG.E.128"] == 2 * 64 * tokens // 8 // 128, row


def check_pack(rows):
    for row in rows.values():
        assert total(row, "STL") == total(row, "LDL") == 0, row
        # 1024 int32 over 128 lanes in 16-byte stores.
        assert row["counts"]["STG.E.128"] == 2, row


def check_pack_dense(rows):
    for name, row in rows.items():
        assert total(row, "STL") == total(row, "LDL") == 0, row
        aligned = "ragged" not in name
        if name.startswith("un"):
            stores = row["counts"].get("STG.E.128", 0)
            assert stores == (4 if aligned else 0), row
            continue
        # Of 128 lanes: 8 KiB of the dense weight, 4 KiB of values, the words of 128 or 256 lanes.
        assert row["counts"]["STG.E.128"] == 3, row
        assert total(row, "STG") == 3, row
        assert row["counts"].get("LDG.E.128", 0) == (4 if aligned else 0), row


def test_short_set(tmp_path):
    """Decode and prefill tiles where shared memory is smallest, and the other variants."""
    table = ["mma_sp/sm_80/8", "mma_sp/sm_86/128", "mma_sp/sm_120/64"]
    others = ["mma_sp/epilogue/gelu", "mma_sp/general/64", "mma_sp/one_token"]
    wide = ["wgmma_sp/sm_90/64", "wgmma_sp/epilogue/128", "wgmma_packed/epilogue/256"]
    wide.append("wgmma_conv/epilogue/128")
    packs = ["pack/sm_80/values", "pack/sm_90/words_128"]
    dense = ["pack_dense/sm_80/mma_sp", "pack_dense/sm_90/wgmma_sp", "unpack_dense/sm_90/mma_sp"]
    rows = build([*table, *others, *wide, *packs, *dense], tmp_path)
    check_pack_dense({name: rows.pop(name) for name in dense})
    check_pack({name: rows.pop(name) for name in packs})
    check_wgmma_sp({name: rows.pop(name) for name in wide})
    check_tiles({name: rows.pop(name) for name in table})
    check_general(rows.pop("mma_sp/general/64"), 64)
    check_mma_sp(rows["mma_sp/epilogue/gelu"], "sm_90", "F16", MMA_SP_TILES[8])
    check_mma_sp(rows["mma_sp/one_token"], "sm_90", tile=MMA_SP_TILES[8])


@build_all
@pytest.mark.parametrize("arch", [*ARCHITECTURES, "general", "gelu"])
def test_every_tile_on_every_architecture(arch, tmp_path):
    rows = build([f"mma_sp/{arch}/*"], tmp_path)
    assert len(rows) == len(MMA_SP_TILES)
    check_tiles(rows)


@build_all
def test_pack(tmp_path):
    rows = build(["pack/*", "pack_dense/*", "unpack_dense/*"], tmp_path)
    dense = {name: rows.pop(name) for name in list(rows) if "dense" in name}
    assert len(rows) == 6 and len(dense) == 16
    check_pack(rows)
    check_pack_dense(dense)


@build_all
def test_integers_that_the_jit_makes_constants_of(tmp_path):
    rows = build(["mma_sp/one", "mma_sp/splits", "wgmma_one_token"], tmp_path)
    for row in rows.values():
        assert total(row, "STL") == total(row, "LDL") == 0, row
        assert total(row, "HMMA.SP") + total(row, "HGMMA.SP") == 8, row
    assert rows["wgmma_one_token"]["arena_at_zero"]


@build_all
def test_every_wgmma_tile(tmp_path):
    rows = build(["wgmma_sp/*", "wgmma_packed/*", "wgmma_conv/*"], tmp_path)
    assert len(rows) == 4 * len(WGMMA_SP_TILES) + 3
    check_wgmma_sp(rows)


@build_all
def test_every_epilogue(tmp_path):
    rows = build(["mma_sp/epilogue/*", "mma_sp/scalar_scale"], tmp_path)
    assert len(rows) == len(EPILOGUES) + 1
    for name, row in rows.items():
        check_mma_sp(row, "sm_90", "BF16" if "scalar" in name else "F16", MMA_SP_TILES[8])


OTHERS = [path for path in os.environ.get("SLIMGEMM_TRITONS", "").split(":") if path]


@pytest.mark.skipif(not OTHERS, reason="SLIMGEMM_TRITONS names no further Triton")
@pytest.mark.parametrize("path", OTHERS or [None], ids=lambda p: pathlib.Path(p or "none").name)
def test_other_versions_of_triton(path, tmp_path):
    cases = ["mma_sp/sm_90/*", "mma_sp/sm_80/128", "mma_sp/general/64", "wgmma_*"]
    rows = build([*cases, "mma_packed/sm_90/*", "mma_packed/masked/*"], tmp_path, path)
    assert {row["triton"] for row in rows.values()} == {pathlib.Path(path).name}
    assert rows.pop("wgmma_one_token")["arena_at_zero"]
    for name in [name for name in rows if name.startswith("mma_packed")]:
        check_mma_packed(name, rows.pop(name))
    check_wgmma_sp({n: row for n, row in rows.items() if n.startswith("wgmma")})
    check_tiles({n: row for n, row in rows.items() if n.startswith("mma")})


def check_mma_packed(name, row):
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
        assert total(row, "LDG.E") == row["counts"]["LDG.E.128"] + epilogue_loads(kind, tile), row


def epilogue_loads(kind, tile):
    """4-byte loads of bias and scale: two rows of each row tile, each once or twice."""
    return 8 * tile.mt if kind == "gelu" else 0


def test_mma_packed_small_set(tmp_path):
    names = ["mma_packed/sm_90/16", "mma_packed/sm_90/32", "mma_packed/sm_80/64"]
    names.append("mma_packed/masked/32")
    for name, row in build(names, tmp_path).items():
        check_mma_packed(name, row)


@build_all
def test_mma_packed_every_build(tmp_path):
    rows = build(["mma_packed/*"], tmp_path)
    assert len(rows) == (len(ARCHITECTURES) + 3) * len(MMA_PACKED_TILES)
    for name, row in rows.items():
        check_mma_packed(name, row)


def check_mma_conv(name, row):
    _, kind, most = name.split("/")
    tile = mma_conv_tile(int(most))
    assert total(row, "STL") == total(row, "LDL") == 0, row
    assert row["smem"] <= SMEM_BYTES[kind if kind.startswith("sm_") else "sm_90"], row
    assert total(row, "HMMA.SP.16832.F32") == 8 * tile.mt * tile.nt, row
    # Values in 16-byte loads, metadata in 8-byte ones; X straight to shared memory, 8 bytes each.
    assert row["counts"]["LDG.E.128"] == tile.mt * (8 + tile.ahead), row
    assert row["counts"]["LDG.E.64"] == tile.mt * 16, row
    assert row["counts"]["LDGSTS.E.64"] > 0 and total(row, "LDGSTS") == row["counts"]["LDGSTS.E.64"]


def test_mma_conv_small_set(tmp_path):
    names = ["mma_conv/sm_90/128", "mma_conv/1x1/32"]
    for name, row in build(names, tmp_path).items():
        check_mma_conv(name, row)


@build_all
def test_mma_conv_every_build(tmp_path):
    rows = build(["mma_conv/*"], tmp_path)
    assert len(rows) == (len(ARCHITECTURES) + 2) * len(MMA_PACKED_TILES)
    for name, row in rows.items():
        check_mma_conv(name, row)
