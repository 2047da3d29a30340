"""What tests share: makers of 2:4 inputs and the one tolerance rule."""

import torch

from slimgemm.kernels.reference import allowed_error, output_error


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_24(n, k, dtype=torch.float32, keep=2, group=4, seed=0, device="cpu"):
    """Random dense [n, k] that is keep:group along k, at random positions."""
    g = seeded(seed)
    padded = -(-k // group) * group
    w = torch.randn(n, padded // group, group, generator=g)
    order = torch.rand(n, padded // group, group, generator=g).argsort(-1)
    kept = torch.zeros_like(w, dtype=torch.bool).scatter_(-1, order[..., :keep], True)
    return (w * kept).view(n, padded)[:, :k].to(dtype).to(device).contiguous()


def randn(*shape, dtype=torch.float32, seed=0, device="cpu"):
    return torch.randn(*shape, generator=seeded(seed)).to(dtype).to(device)


def assert_no_worse_than_dense(got, dense, exact, name, slack=2.0):
    """The tolerance rule (slimgemm.kernels.reference.allowed_error).

    got:   under test, low precision
    dense: the same maths by torch in the same dtype
    exact: the same maths in float64
    """
    assert got.shape == exact.shape and got.dtype == dense.dtype, (name, got.shape, got.dtype)
    mine, allowed = output_error(got, exact), allowed_error(dense, exact, slack)
    assert mine <= allowed, f"{name}: error {mine:.2e} > {allowed:.2e}"
