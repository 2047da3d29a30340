"""Compiles one launch for one architecture and reads the machine code back.

The compilers are those in the Triton wheel: ptxas, and LLVM for AMD. A spill is a thread's local
memory: the cubin's stack frame and local bytes (`cuobjdump -res-usage`), or the scratch bytes of
the AMD kernel descriptor (`.private_segment_fixed_size`). Shared memory is what Triton allocates;
the 1 KiB that CUDA keeps of each program from sm_80 on is already out of configs.SMEM_BYTES.
"""

from __future__ import annotations

import collections
import contextlib
import json
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from slimgemm.kernels.build_kernels import DTYPES, OPS, UNSUPPORTED
from slimgemm.kernels.configs import SMEM_BYTES

# Bytes per thread that ptxas may park in local memory before a loop and fetch after it. It does
# so (8 bytes seen) to stay under a register count that lets more programs run at once.
PARKED_BYTES = 16

# Mnemonics of tensor-core products: SASS of Ampere, Hopper and Blackwell; CDNA.
TENSOR_CORE = re.compile(r"\b(?:[HIDQ]MMA|[HIQ]GMMA|UTC\w*MMA|v_s?mfmac?_\w+)[.\w]*")
GLOBAL_LOAD = re.compile(r"\b(?:LDG(?!DEPBAR)|LDGSTS|UTMALDG)[.\w]*|\b(?:global|buffer)_load_\w+")
# SASS: an address, a predicate if any, and what is done there.
LOCAL_ACCESS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@\S+\s+)?(?:STL|LDL)\b")
BRANCH = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@\S+\s+)?BRA\S*\s[^;]*?0x([0-9a-f]+)\s*;")
LOAD_BYTES = (
    (re.compile(r"\.128|dwordx4|b128"), 16),
    (re.compile(r"dwordx3|b96"), 12),
    (re.compile(r"\.64|dwordx2|b64"), 8),
    (re.compile(r"\.[US]16|short|[iu]16|b16"), 2),
    (re.compile(r"\.[US]8|byte|[iu]8|b8"), 1),
)


class Build(NamedTuple):
    """One launch of one shipped configuration, for one architecture; names only, so it travels."""

    op: str
    case: str
    dtype: str
    arch: str


@dataclass(frozen=True)
class Report:
    """What one kernel of a build came to.

    `error` says why it could not be built, `unsupported` why that was not tried.
    """

    op: str
    kernel: str
    case: str
    dtype: str
    arch: str
    registers: int = 0
    spill_bytes: int = 0  # local memory, per thread
    loop_spills: int = 0  # places inside a loop that read or write it
    smem_bytes: int = 0  # per program
    # Counts of places in the code, not of executions.
    tensor_core: dict[str, int] = field(default_factory=dict)  # by mnemonic
    loads: dict[str, int] = field(default_factory=dict)  # from global memory, by bytes per thread
    error: str = ""
    unsupported: str = ""

    @property
    def sound(self) -> bool:
        """Built, no spills but for PARKED_BYTES, and shared memory within the limit."""
        if self.unsupported or self.error:
            return bool(self.unsupported)
        spills = self.loop_spills or self.spill_bytes > PARKED_BYTES
        return not spills and self.smem_bytes <= SMEM_BYTES[self.arch]


def _checked(name: str, wanted: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    known = list(known)
    for one in wanted or ():
        if one not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {one!r}")
    return list(wanted or known)


def builds(
    ops: Sequence[str] | None = None,
    archs: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
) -> Iterator[Build]:
    """Every shipped configuration of `ops` for `archs` in `dtypes`; all of them unless given.

    Raises:
        ValueError: a name that is not known, before the first build.
    """
    wanted = _checked("dtype", dtypes, DTYPES)
    pairs = [(o, a) for o in _checked("op", ops, OPS) for a in _checked("arch", archs, SMEM_BYTES)]
    for name, arch in pairs:
        op = OPS[name]
        if op.archs and arch not in op.archs:
            continue
        for dtype in (d for d in op.dtypes if d in wanted):
            with _tf32(dtype == "tf32"):  # tiles depend on it
                cases = [case for case, _ in op.cases(DTYPES[dtype], arch)]
            yield from (Build(name, case, dtype, arch) for case in cases)


def target(arch: str) -> Any:
    """Triton's GPUTarget of `arch`."""
    from triton.backends.compiler import GPUTarget

    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


class _NoDevice:
    """A Triton driver whose current device is an architecture: enough to specialise a launch."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return list(SMEM_BYTES).index(self.arch)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return target(self.arch)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """torch.backends allows tf32 in products and convolutions, or not."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [b.fp32_precision for b in backends]
    for b in backends:
        b.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        for b, precision in zip(backends, before, strict=True):
            b.fp32_precision = precision


def launches(build: Build) -> list[tuple[Any, dict[str, Any]]]:
    """(JITFunction, what Triton would compile) of each kernel that the launcher launches."""
    from triton import knobs
    from triton.runtime import driver

    found: list[tuple[Any, dict[str, Any]]] = []

    def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found.append((fn.jit_function, compile))
        return True  # do not compile, do not launch

    driver.set_active(_NoDevice(build.arch))
    with knobs.runtime.scope(), _tf32(build.dtype == "tf32"):
        knobs.runtime.jit_cache_hook = record
        dict(OPS[build.op].cases(DTYPES[build.dtype], build.arch))[build.case]()
    return found


def _in_loops(sass: str) -> int:
    """Local loads and stores that lie between a backward branch and its target."""
    branches = [(int(at, 16), int(to, 16)) for at, to in BRANCH.findall(sass)]
    loops = [(to, at) for at, to in branches if to < at]
    places = [int(at, 16) for at in LOCAL_ACCESS.findall(sass)]
    return sum(any(first <= place <= last for first, last in loops) for place in places)


def _cubin_facts(cubin: bytes) -> tuple[int, int, int, str]:
    """(registers, local bytes, local accesses in loops, SASS) by the wheel's cuobjdump."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    facts = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return facts["REG"], facts["STACK"] + facts["LOCAL"], _in_loops(text), text


def _amdgcn_facts(text: str) -> tuple[int, int, int, str]:
    """(vector registers, scratch bytes, scratch accesses anywhere, assembly)."""
    names = "vgpr_count|private_segment_fixed_size"
    facts = {name: int(count) for name, count in re.findall(rf"\.({names}):\s+(\d+)", text)}
    scratch = len(re.findall(r"\bscratch_(?:load|store)", text))
    return facts["vgpr_count"], facts["private_segment_fixed_size"], scratch, text


def _load_bytes(mnemonic: str) -> str:
    if mnemonic.startswith("UTMALDG"):
        return "TMA"
    return str(next((size for pattern, size in LOAD_BYTES if pattern.search(mnemonic)), 4))


def _report(build: Build, name: str, compiled: Callable[[], Any]) -> Report:
    """What the kernel `name` came to; `compiled` gives Triton's CompiledKernel."""
    head = (build.op, name, build.case, build.dtype, build.arch)
    try:
        built = compiled()
    except Exception as error:  # any stage of the compiler may refuse, with any type
        return Report(*head, error=f"{type(error).__name__}: {str(error).strip()[:400]}")
    if "cubin" in built.asm:
        registers, spilled, in_loops, code = _cubin_facts(built.asm["cubin"])
    else:
        registers, spilled, in_loops, code = _amdgcn_facts(built.asm["amdgcn"])
    tensor_core = dict(collections.Counter(TENSOR_CORE.findall(code)))
    loads = dict(collections.Counter(_load_bytes(m) for m in GLOBAL_LOAD.findall(code)))
    shared = built.metadata.shared
    return Report(*head, registers, spilled, in_loops, shared, tensor_core, loads)


def _compile(build: Build, fn: Any, compile: dict[str, Any]) -> Report:
    import triton

    options = json.loads(compile["specialization_data"])["options"]
    options = {k: v for k, v in options.items() if isinstance(v, int | str)}
    source = fn.ASTSource(fn, compile["signature"], compile["constants"], compile["configs"][0])
    to = target(build.arch)
    return _report(build, fn.__name__, lambda: triton.compile(source, target=to, options=options))


def compile_build(build: Build) -> list[Report]:
    """Compile what `build` launches, in this process; one Report per kernel.

    Raises:
        ValueError: TRITON_INTERPRET is set here, so that there is nothing to compile; use `run`.
    """
    from triton import knobs

    reason = UNSUPPORTED.get((build.arch, build.dtype), "")
    if reason:
        return [Report(build.op, "", *build[1:], unsupported=reason)]
    if knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET must be unset to compile a kernel; unset it, or use run")
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    op = OPS[build.op]
    if op.kernel:
        from triton.runtime import driver

        driver.set_active(_NoDevice(build.arch))
        cases = dict(op.cases(DTYPES[build.dtype], build.arch))
        return [_report(build, op.kernel, cases[build.case])]
    return [_compile(build, fn, compile) for fn, compile in launches(build)]
