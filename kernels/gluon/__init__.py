"""Sparse tensor cores from a stock Triton wheel: 2:4 matmul as inline PTX in Gluon kernels.

`orders` (torch only) turns a Packed24 into what each instruction reads; `mma_sp` runs on sm_80 and
later, `wgmma_sp` on sm_90a, and `scaled_spmm` is both on int8 and e4m3. Importing this package
imports neither Triton nor a GPU library: import the submodule that is wanted. Design, bytes and
limits: NOTES.md.
"""
