"""Ahead-of-time builds of the 8-bit products: instructions, spills, 16-byte loads."""

import pytest

from slimgemm.kernels.build import Build, run
from slimgemm.kernels.build_compile import PARKED_BYTES

MMA, WGMMA = "scaled_spmm_24_mma_sp", "scaled_spmm_24_wgmma_sp"
SHORT = [
    Build(MMA, "m 8", "int8", "sm_80"),
    Build(MMA, "m 128", "fp8", "sm_89"),
    Build(MMA, "m 32", "fp8", "sm_90"),
    Build(MMA, "m 16 ragged", "int8", "sm_90"),
    Build(WGMMA, "m 256 gelu", "int8", "sm_90"),
    Build(WGMMA, "m 64", "fp8", "sm_90"),
    Build("pack_dense_mma_sp", "16-byte rows", "int8", "sm_90"),
    Build("pack_dense_wgmma_sp", "16-byte rows", "fp8", "sm_90"),
]
INSTRUCTIONS = {
    (MMA, "int8"): "IMMA.SP.16864.S8.S8",
    (MMA, "fp8"): "QMMA.SP.16864.F32.E4M3.E4M3",
    (WGMMA, "int8"): "IGMMA.SP.64x256x64.S8.S8",
    (WGMMA, "fp8"): "QGMMA.SP.64x64x64.F32.E4M3.E4M3",
}


@pytest.fixture(scope="module")
def short():
    return run(SHORT, jobs=1)


def test_sound_and_with_the_instruction_of_the_type(short):
    for report in short:
        assert report.sound and report.spill_bytes <= PARKED_BYTES, report
        found = set(report.tensor_core)
        if "pack" in report.op:
            assert not found and report.loads == {"16": 4}
        elif (report.op, report.dtype, report.arch) == (MMA, "fp8", "sm_90"):
            # No 8-bit floats in the mma.sp of sm_90: widened to fp16 by the assembler.
            assert found == {"HMMA.SP.16832.F32"}
        else:
            assert found == {INSTRUCTIONS[report.op, report.dtype]}, report


def test_weights_and_metadata_are_read_16_bytes_at_a_time(short):
    for report in short:
        if report.op == MMA:
            # Per block of K: 8 steps and 2 of metadata, and `ahead` + 2 before the loop; X beside.
            assert report.loads["16"] >= 10 + 1 + 2, report
        elif report.op == WGMMA:
            # The four words of a block in two 8-byte loads, ahead of the loop and in it, twice;
            # of 4 bytes are the two scales of each consumer's rows, and the two of a bias.
            assert report.loads["8"] >= 8 and report.loads["4"] <= 8, report


@pytest.mark.slow
def test_every_shipped_configuration():
    from slimgemm.kernels.build import builds

    reports = run(builds([MMA, WGMMA]), jobs=2)
    assert len(reports) > 90 and all(report.sound for report in reports)
