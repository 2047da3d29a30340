"""Ahead-of-time builds: no spills, shared memory within the limit, tensor cores used, wide loads.

The quick tests build each op once or twice for sm_80 and sm_90 and one product for every other
architecture. The slow ones build every shipped configuration for sm_80 and sm_90 in fp16 and fp32;
the whole matrix is `slimgemm kernels`.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from slimgemm.kernels.build import Build, builds, compile_build, kernels_command, run
from slimgemm.kernels.build_compile import PARKED_BYTES, Report, _in_loops
from slimgemm.kernels.build_kernels import OPS, UNSUPPORTED
from slimgemm.kernels.build_operands import NO_TENSOR_CORES
from slimgemm.kernels.configs import SMEM_BYTES

PRODUCTS = [name for name, op in OPS.items() if op.product]
# A pair of cases of each op; the last case of a convolution is one of few channels.
QUICK = {
    "sm_80": {"fp16": 0, "fp32": -1, "int8": 0},  # dtype -> which of the op's cases
    "sm_90": {"bf16": 2, "tf32": 0, "fp8": 0},
}

# What runs out of registers first, on the architectures where it does: ragged sizes, 4-byte
# operands, and for AMD a tile of few rows. Wider or deeper tiles of these spill.
TIGHT = [
    Build("spmm_24", "32x64x32 w4 s3 ragged", "tf32", "sm_90"),
    Build("spmm_24", "64x64x32 w8 s3 ragged", "tf32", "sm_120"),
    Build("spmm_24_dgrad", "64x64x32 w8 s3 ragged", "tf32", "sm_120"),
    Build("spmm_24_dgrad", "64x64x64 w8 s3 ragged", "fp16", "sm_120"),
    Build("spmm_24_dgrad", "64x64x64 w8 s3 ragged", "fp16", "sm_100"),
    Build("spmm_24_dgrad", "128x64x32 w8 s3 ragged", "tf32", "gfx942"),
    Build("spmm_24_dgrad", "32x64x64 w4 s3", "fp16", "gfx950"),
    Build("spmm_24", "16x64x32 w4 s4 1:8", "tf32", "sm_86"),
    Build("spmm_24_wgrad", "ragged", "tf32", "sm_100"),
    Build("spmm_24_wgrad", "ragged", "fp16", "sm_120"),
    Build("gemm_channels", "m 31 ragged", "fp16", "sm_80"),
    Build("gemm_channels", "m 31 ragged", "bf16", "sm_90"),
    Build("gemm_channels", "m 63 ragged", "tf32", "sm_120"),
    Build("gemm_channels", "m 128 runs", "fp16", "gfx950"),
    Build("gemm_channels", "m 128 all", "tf32", "gfx942"),
    Build("gemm_channels_wgrad", "ragged", "tf32", "sm_80"),
    Build("conv2d_channels", "m 63 ragged", "fp16", "sm_90"),
    Build("conv2d_channels", "m 63 odd", "tf32", "sm_120"),
    Build("conv2d_channels_dgrad", "m 64", "tf32", "sm_100"),
]

# Other paths of the kernels that read the canonical format: rows of x at any address, one tap.
PATHS = [
    Build("spmm_24_mma_packed", "m 16 odd", "fp16", "sm_90"),
    Build("spmm_24_mma_packed", "m 128 masked", "bf16", "sm_80"),
    Build("conv2d_24_mma", "m 128 1x1", "bf16", "sm_80"),
]


def check(reports):
    unsound = [r for r in reports if not r.sound]
    assert not unsound, unsound
    for report in reports:
        if report.unsupported:
            assert (report.arch, report.dtype) in UNSUPPORTED
            continue
        assert not report.error and 0 < report.registers <= 512, report
        assert 0 <= report.smem_bytes <= SMEM_BYTES[report.arch], report
        # Sums of parts and full fp32 on CUDA are multiply-adds, and so is all of Turing.
        scalar = report.dtype == "fp32" and report.arch.startswith("sm_")
        main = OPS[report.op].product and not re.search("_(add|few)_", report.kernel)
        if main and not scalar and report.arch not in NO_TENSOR_CORES:
            assert report.tensor_core, report
        else:
            assert not report.tensor_core or not scalar, report


def quick_builds():
    for arch, dtypes in QUICK.items():
        for name in OPS:
            for dtype, place in dtypes.items():
                found = list(builds([name], [arch], [dtype]))
                if found and not (dtype in ("fp32", "tf32") and name not in PRODUCTS):
                    yield found[min(place, len(found) - 1)]
    for arch in SMEM_BYTES.keys() - QUICK.keys():
        yield next(builds(["conv2d_24"], [arch], ["fp16"]))
    yield from PATHS


@pytest.fixture(scope="module")
def quick():
    return run(quick_builds(), jobs=2)


def test_every_op_is_built_for_both_main_architectures(quick):
    check(quick)
    built = {(r.op, r.arch) for r in quick}
    wanted = {(op, arch) for op in OPS for arch in OPS[op].archs or QUICK if arch in QUICK}
    assert wanted <= built
    assert {r.arch for r in quick} == set(SMEM_BYTES)


def test_what_runs_out_of_registers_first_does_not_spill():
    assert set(TIGHT) <= set(builds()), "a shipped configuration has another name"
    reports = run(TIGHT, jobs=2)
    check(reports)
    assert all(r.spill_bytes == 0 for r in reports)


def test_groups_of_few_channels_are_built_without_tensor_cores(quick):
    few = [r for r in quick if "_few_" in r.kernel]
    portable = {name for name, op in OPS.items() if name.startswith("conv2d_") and not op.kernel}
    assert {r.op for r in few} == portable
    assert not any(r.tensor_core or r.spill_bytes for r in few)


@pytest.mark.parametrize(
    "arch, pattern",
    [("sm_80", "HMMA.16816.F32"), ("sm_90", "HGMMA."), ("gfx942", "v_mfma"), ("gfx950", "v_mfma")],
)
def test_the_tensor_cores_of_each_generation_are_found(arch, pattern, quick):
    assert any(name.startswith(pattern) for r in quick if r.arch == arch for name in r.tensor_core)


@pytest.mark.parametrize(
    "op, mnemonic",
    [
        ("spmm_24_mma_sp", "HMMA.SP.16832.F32"),
        ("spmm_24_mma_packed", "HMMA.SP.16832.F32"),
        ("conv2d_24_mma", "HMMA.SP.16832.F32"),
        ("spmm_24_wgmma_sp", "HGMMA.SP."),
        ("spmm_24_wgmma_packed", "HGMMA.SP."),
        ("conv2d_24_wgmma", "HGMMA.SP."),
    ],
)
def test_the_sparse_tensor_cores_are_used(quick, op, mnemonic):
    found = [r for r in quick if r.op == op]
    assert found and all(r.tensor_core for r in found)
    assert all(mnemonic in name for r in found for name in r.tensor_core)


def test_packed_values_are_read_16_bytes_at_a_time():
    """16 rows, 4 warps: a thread reads dy in 1 load, the values in 2, and 4 bytes of metadata in 1.

    The loop and the three steps that run ahead of it make that four times. On ragged sizes the 4
    values of a byte of metadata stay 8 bytes together.
    """
    aligned, ragged = run(
        [
            Build("spmm_24_dgrad", "16x64x64 w4 s4", "fp16", "sm_80"),
            Build("spmm_24_dgrad", "16x64x64 w4 s4 ragged", "fp16", "sm_80"),
        ],
        jobs=1,
    )
    assert aligned.loads == {"16": 12, "4": 4}
    assert ragged.loads["8"] > 0 and "16" not in ragged.loads


def test_what_an_architecture_cannot_do_is_a_row_with_the_reason():
    for (arch, dtype), reason in UNSUPPORTED.items():
        build = next(builds(["spmm_24"], [arch], [dtype]))
        (report,) = compile_build(build)
        assert report.unsupported == reason and report.sound and not report.error


def test_every_op_with_a_launcher_is_built():
    from slimgemm.kernels import dispatch

    packs = {"pack_conv", "unpack_conv"}  # run the kernels of pack_24 and unpack_24
    assert set(getattr(dispatch, "OPS", ())) - packs <= set(OPS)


@pytest.mark.parametrize(
    "names, text",
    [
        (dict(ops=["spmm"]), "op must be one of pack_24, .*, got 'spmm'"),
        (dict(archs=["sm_70"]), "arch must be one of sm_75, .*, got 'sm_70'"),
        (dict(dtypes=["fp64"]), "dtype must be one of fp16, .*, got 'fp64'"),
    ],
    ids=["op", "arch", "dtype"],
)
def test_unknown_names_are_refused(names, text):
    with pytest.raises(ValueError, match=text):
        list(builds(**names))


def test_jobs_and_the_interpreter_are_refused():
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        kernels_command(jobs=0)
    from slimgemm.kernels.device import INTERPRETED

    if INTERPRETED.value:
        with pytest.raises(ValueError, match="TRITON_INTERPRET must be unset to compile"):
            compile_build(next(builds(["unpack_24"], ["sm_80"])))


def test_spills_in_loops_are_told_from_parked_registers():
    sass = """
        /*0010*/ STL [R1], R2 ;            /* 0x0 */
        /*0020*/ @!P4 BRA 0x60 ;           /* 0x0 */
        /*0030*/ LDL.LU R2, [R1+0x4] ;     /* 0x0 */
        /*0040*/ @P0 STL.64 [R1+0x4], R2 ; /* 0x0 */
        /*0050*/ @P1 BRA 0x30 ;            /* 0x0 */
        /*0060*/ LDL R2, [R1] ;            /* 0x0 */
        /*0070*/ BRA 0x70;                 /* 0x0 */
    """
    assert _in_loops(sass) == 2
    names = ("op", "kernel", "case", "fp16", "sm_80")
    assert Report(*names, 64, PARKED_BYTES, 0).sound
    assert not Report(*names, 64, PARKED_BYTES + 1, 0).sound
    assert not Report(*names, 64, 8, 1).sound
    assert not Report(*names, 64, smem_bytes=SMEM_BYTES["sm_80"] + 1).sound
    assert not Report(*names, error="no").sound


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    out = tmp_path / "builds.json"
    command = ["--op", "unpack_24", "--arch", "sm_86", "--dtype", "bf16", "--jobs", "1"]
    ran = subprocess.run(
        [sys.executable, "-m", "slimgemm.kernels.build", *command, "--out", str(out)],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "unpack_24_kernel" in ran.stdout and "6 kernels built with triton" in ran.stdout
    reports = json.loads(out.read_text())["reports"]
    assert [Report(**r).sound for r in reports] == [True] * 6
    assert reports[0]["loads"]["16"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("arch", QUICK)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_every_shipped_configuration(arch, dtype):
    check(run(builds(archs=[arch], dtypes=[dtype]), jobs=2))
