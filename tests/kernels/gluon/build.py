"""Builds Gluon kernels ahead of time and prints what came out, one JSON line a build.

    python build.py NAME...        names of CASES; a name may end in * to take all that begin so

Run in a process of its own without TRITON_INTERPRET, with the wanted Triton first on PYTHONPATH.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections import Counter

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from slimgemm.kernels.conv_layout import convolution
from slimgemm.kernels.gluon import (
    mma_conv,
    mma_packed,
    mma_sp,
    orders,
    pack,
    pack_dense,
    unpack,
    wgmma_conv,
    wgmma_sp,
)
from slimgemm.kernels.gluon.compat import arena_at_zero
from slimgemm.kernels.gluon.mma_tiles import ARCHITECTURES, MMA_SP_TILES, mma_sp_tile
from slimgemm.kernels.gluon.wgmma_tiles import WGMMA_SP_TILES
from slimgemm.kernels.reference import prune_24_ref

POINTERS = {
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}
COUNTED = (
    r"\b([HIQ]MMA[.\w]*|[HIQ]GMMA[.\w]*|LDGSTS[.\w]*|LDG[.\w]*|LDSM|STG[.\w]*|STL|LDL|UTMALDG)"
)


def mma_sp_launch(most, dtype=torch.bfloat16, k=4096, splits=1, m=None, n=16, **epilogue):
    """The launch of a shipped tile on an aligned (k % 8 == 0) or general shape."""
    packed = prune_24_ref(torch.zeros(n, k, dtype=dtype))
    x = torch.zeros(m or most, k, dtype=dtype)
    tile = mma_sp_tile(most, k % 8 == 0)
    return mma_sp._mma_sp_kernel, mma_sp.prepare(
        x, orders.to_mma_sp(packed), tile=tile, splits=splits, **epilogue
    )


def mma_packed_launch(most, dtype=torch.bfloat16, k=4096, splits=1, odd_x=False, n=16, **epilogue):
    """The launch of a shipped tile; with `odd_x` the rows of x are not 16-byte aligned."""
    packed = prune_24_ref(torch.zeros(n, k, dtype=dtype))
    x = torch.zeros(most, k + odd_x, dtype=dtype)[:, :k]
    tile = mma_packed.mma_packed_tile(most, not odd_x)
    return mma_packed._mma_packed_kernel, mma_packed.prepare(
        x, packed, tile=tile, splits=splits, **epilogue
    )


def mma_conv_launch(most, dtype=torch.bfloat16, kernel=3, channels=64, **epilogue):
    """The launch of a shipped tile on a convolution of as many pixels."""
    conv = convolution((128, channels, kernel, kernel), padding=kernel // 2)
    packed = prune_24_ref(torch.zeros(128, conv.k, dtype=dtype))
    x = torch.zeros(1, channels, 1, most, dtype=dtype).contiguous(memory_format=torch.channels_last)
    tile = mma_conv.mma_conv_tile(most)
    return mma_conv._mma_packed_kernel, mma_conv.prepare(x, packed, conv, tile=tile, **epilogue)


def wgmma_sp_launch(tokens, dtype=torch.bfloat16, m=None, n=128, ordered=True, **epilogue):
    """The launch of a shipped tile, from the hardware order or from the canonical format."""
    packed = prune_24_ref(torch.zeros(n, 4096, dtype=dtype))
    x = torch.zeros(m or tokens, 4096, dtype=dtype)
    return wgmma_sp._wgmma_sp_kernel, wgmma_sp.prepare(
        x, orders.to_wgmma_sp(packed) if ordered else packed,
        tile=WGMMA_SP_TILES[tokens], **epilogue,
    )  # fmt: skip


def wgmma_conv_launch(kernel=3, channels=64, size=14, dtype=torch.bfloat16, **epilogue):
    conv = convolution((128, channels, kernel, kernel), padding=kernel // 2)
    packed = prune_24_ref(torch.zeros(128, conv.k, dtype=dtype))
    x = torch.zeros(2, channels, size, size, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    return wgmma_sp._wgmma_sp_kernel, wgmma_conv.prepare(x, packed, conv, **epilogue)


def cases():
    """name -> (architecture, function that gives kernel and launch)."""
    table = {}
    for arch in ARCHITECTURES:
        for most in MMA_SP_TILES:
            table[f"mma_sp/{arch}/{most}"] = (arch, lambda m=most: mma_sp_launch(m))
        for most in mma_packed.MMA_PACKED_TILES:
            table[f"mma_packed/{arch}/{most}"] = (arch, lambda m=most: mma_packed_launch(m))
            table[f"mma_conv/{arch}/{most}"] = (arch, lambda m=most: mma_conv_launch(m))
    for most in mma_packed.MMA_PACKED_TILES:
        table[f"mma_conv/gelu/{most}"] = (
            "sm_90",
            lambda m=most: mma_conv_launch(m, torch.float16, act="gelu", bias=torch.zeros(128)),
        )
        table[f"mma_conv/1x1/{most}"] = (
            "sm_90",
            lambda m=most: mma_conv_launch(m, kernel=1, channels=1024),
        )
    table["wgmma_conv/3x3/128"] = ("sm_90", wgmma_conv_launch)
    table["wgmma_conv/1x1/128"] = ("sm_90", lambda: wgmma_conv_launch(1, 256, 7))
    table["wgmma_conv/epilogue/128"] = (
        "sm_90",
        lambda: wgmma_conv_launch(
            dtype=torch.float16, channels=256, size=56, act="gelu", bias=torch.zeros(128)
        ),
    )
    full_128 = dict(bias=torch.zeros(128), scale=torch.zeros(128))
    full = dict(bias=torch.zeros(16), scale=torch.zeros(16))
    for act in ("relu", "gelu", "gelu_tanh", "silu", "relu2"):
        table[f"mma_sp/epilogue/{act}"] = (
            "sm_90",
            lambda a=act: mma_sp_launch(8, torch.float16, act=a, **full),
        )
    # One token, one feature, one column: the JIT makes constants of them.
    table["mma_sp/one"] = ("sm_90", lambda: mma_sp_launch(8, m=1, n=1, k=1))
    table["mma_sp/one_token"] = ("sm_90", lambda: mma_sp_launch(8, m=1, splits=2))
    table["wgmma_one_token"] = ("sm_90", lambda: wgmma_sp_launch(64, m=1, n=1))
    table["mma_sp/scalar_scale"] = ("sm_90", lambda: mma_sp_launch(8, scale=torch.zeros(1)))
    table["mma_sp/splits"] = ("sm_90", lambda: mma_sp_launch(8, splits=4))
    for most in MMA_SP_TILES:
        # gelu has the longest epilogue; with bias and scale it is the worst for registers.
        table[f"mma_sp/gelu/{most}"] = (
            "sm_90",
            lambda m=most: mma_sp_launch(m, torch.float16, act="gelu", **full),
        )
        table[f"mma_packed/gelu/{most}"] = (
            "sm_90",
            lambda m=most: mma_packed_launch(m, torch.float16, act="gelu", **full),
        )
        table[f"mma_packed/masked/{most}"] = ("sm_90", lambda m=most: mma_packed_launch(m, k=3968))
        table[f"mma_packed/odd_x/{most}"] = (
            "sm_90",
            lambda m=most: mma_packed_launch(m, odd_x=True),
        )
        table[f"mma_sp/general/{most}"] = ("sm_90", lambda m=most: mma_sp_launch(m, k=4099))
    for tokens in WGMMA_SP_TILES:
        table[f"wgmma_sp/sm_90/{tokens}"] = ("sm_90", lambda t=tokens: wgmma_sp_launch(t))
        table[f"wgmma_packed/sm_90/{tokens}"] = (
            "sm_90",
            lambda t=tokens: wgmma_sp_launch(t, ordered=False),
        )
        table[f"wgmma_packed/epilogue/{tokens}"] = (
            "sm_90",
            lambda t=tokens: wgmma_sp_launch(
                t, torch.float16, ordered=False, act="gelu", **full_128
            ),
        )
        table[f"wgmma_sp/epilogue/{tokens}"] = (
            "sm_90",
            lambda t=tokens: wgmma_sp_launch(t, torch.float16, act="gelu", **full_128),
        )
    packed = prune_24_ref(torch.zeros(128, 4096, dtype=torch.float16))
    for arch in ("sm_80", "sm_90"):
        table[f"pack/{arch}/values"] = (
            arch,
            lambda: (pack._pack_values_kernel, pack.prepare_values(packed)),
        )
        for rows, block_bytes in ((16, 512), (128, 256)):
            table[f"pack/{arch}/words_{rows}"] = (
                arch,
                lambda r=rows, b=block_bytes: (
                    pack._pack_words_kernel,
                    pack.prepare_words(packed, r, b),
                ),
            )
        for order in ("mma_sp", "wgmma_sp"):
            for k in (4096, 4099):
                label = f"pack_dense/{arch}/{order}" + ("" if k == 4096 else "/ragged")
                table[label] = (arch, lambda o=order, k=k: pack_dense_launch(o, k))
                table["un" + label] = (arch, lambda o=order, k=k: unpack_dense_launch(o, k))
    return table


def pack_dense_launch(order, k, dtype=torch.bfloat16):
    w = torch.zeros(128, k, dtype=dtype)
    return pack_dense._pack_dense_kernel, pack_dense.prepare_pack(w, order == "mma_sp")


def unpack_dense_launch(order, k, dtype=torch.bfloat16):
    packed = prune_24_ref(torch.zeros(128, k, dtype=dtype))
    weight = orders.to_mma_sp(packed) if order == "mma_sp" else orders.to_wgmma_sp(packed)
    return unpack._unpack_dense_kernel, unpack.prepare_unpack(weight)


def source(kernel, launch):
    """The source of `kernel` for the types and alignments of `launch`, as the JIT sees them."""
    names = list(kernel.arg_names)
    signature, attrs, constants = {}, {}, dict(launch.constants)
    for i, (name, value) in enumerate(zip(names, launch.args, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            constants[name] = value  # the JIT makes a constant of 1
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[value.tensor.dtype]
            layout = gl.NVMMASharedLayout.get_default_for(list(value.box), dtype)
            box = ",".join(map(str, value.box))
            signature[name] = f"tensordesc<{POINTERS[value.tensor.dtype][1:]}[{box}],{layout!r}>"
    signature = {n: signature.get(n, "constexpr") for n in names}
    return GluonASTSource(kernel, signature, constants, attrs)


def tool(name, *args):
    folder = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    return subprocess.run(
        [os.path.join(folder, name), *args], capture_output=True, text=True
    ).stdout


def build(name, arch, make):
    kernel, launch = make()
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    built = triton.compile(
        source(kernel, launch), target=target, options={"num_warps": launch.warps}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        sass = tool("cuobjdump", "-sass", file.name) or tool("nvdisasm", "-c", file.name)
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
    if os.environ.get("SLIMGEMM_KEEP"):
        pathlib.Path(os.environ["SLIMGEMM_KEEP"]).write_text(built.asm["ptx"])
    counts = Counter(re.findall(COUNTED, sass))
    arena = getattr(launch.constants.get("TILE"), "arena_bytes", 0)
    registers = re.findall(r"REG:(\d+)", usage)
    return {
        "name": name,
        "triton": triton.__version__,
        "smem": built.metadata.shared,
        "registers": int(registers[-1]) if registers else None,
        "counts": dict(counts),
        "arena_at_zero": arena_at_zero(built.asm["ptx"], arena),
    }


if __name__ == "__main__":
    table = cases()
    for wanted in sys.argv[1:]:
        for name in table:
            if name == wanted or (wanted.endswith("*") and name.startswith(wanted[:-1])):
                print(json.dumps(build(name, *table[name])), flush=True)
