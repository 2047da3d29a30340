"""Implementations, a clock and tables that tests of tuning and dispatch put in place of a GPU's."""

import torch

from slimgemm.kernels.reference import spmm_24_ref
from slimgemm.kernels.reference_conv import conv2d_24_ref
from slimgemm.kernels.timing import Times
from slimgemm.kernels.tune import Tuner
from slimgemm.kernels.tune_table import OK, Choice, Result, Row, Table

HEAD = {
    "gpu": "NVIDIA Test 9000", "compute_capability": "9.0", "driver": "1.2", "torch": "2.99",
    "triton": "3.99", "slimgemm": "0.1", "commit": "c0ffee", "date": "2026-01-01",
    "command": "slimgemm tune",
}  # fmt: skip
US = {"portable": 20.0, "mma_sp": 5.0, "wgmma_sp": 1.0, "dense": 9.0, "linear": 7.0}


class Fake:
    """An implementation that computes `run` and keeps what it was asked."""

    def __init__(self, run=spmm_24_ref, takes=True):
        self.run, self.answer = run, takes
        self.asked, self.bound, self.calls = 0, [], 0

    def takes(self, x, w, *conv):
        self.asked += 1
        return self.answer(x, w, *conv) if callable(self.answer) else self.answer

    def bind(self, tile, splits):
        self.bound.append((tile, splits))

        def call(*args):
            self.calls += 1
            return self.run(*args)

        return call


def wrong(x, w, bias, scale, act):
    """Right but for one element, and only with a bias."""
    y = spmm_24_ref(x, w, bias, scale, act)
    if bias is not None:
        y[-1, -1] += 1
    return y


def raising(*_):
    raise RuntimeError("no such instruction\nand more")


def fakes():
    """dense is right, mma_sp right and faster, wgmma_sp wrong and fastest, portable raises."""
    return {
        "dense": Fake(), "mma_sp": Fake(), "wgmma_sp": Fake(wrong), "portable": Fake(raising),
    }  # fmt: skip


def clock(calls):
    """Runs each call once; microseconds by name, and by its splits."""
    times = {}
    for name, several in calls.items():
        for call in several:
            call()
        us = US[name.split()[0]] + (1.0 if "splits=2" in name else 0.0)
        times[name] = Times(us, us, us)
    return times


def fake_choices(m, n, k, dtype):
    mma = (Choice("mma_sp", (("mt", 1),)), Choice("mma_sp", (("mt", 1),), 2))
    return [Choice("dense"), *mma, Choice("wgmma_sp"), Choice("portable")]


def wrong_conv(*args):
    """Right but for one element, and only with an activation."""
    y = conv2d_24_ref(*args)
    if args[-1] != "none":
        y[-1, -1, -1, -1] += 1
    return y


def conv_fakes():
    """dense is right, mma_sp wrong and faster, portable raises."""
    return {"dense": Fake(conv2d_24_ref), "mma_sp": Fake(wrong_conv), "portable": Fake(raising)}


def fake_conv_choices(job):
    mma = (Choice("mma_sp", (("mt", 1),)), Choice("mma_sp", (("mt", 1),), 2))
    return [Choice("dense"), *mma, Choice("portable"), Choice("linear")]


def tuner(candidates=None, convolutions=None, **more):
    options = {
        "clock": clock, "choices": fake_choices, "conv_choices": fake_conv_choices,
        "candidates": candidates or fakes(), "convolutions": convolutions or conv_fakes(), **more,
    }  # fmt: skip
    return Tuner(torch.device("cpu"), **options)


def ok(choice, us):
    return Result(choice, OK, us, 0.001, 0.002)


def table_of(*rows):
    """A table with rows (n, k, m, {implementation or Choice: microseconds}) in bf16."""
    made = []
    for n, k, m, times in rows:
        results = [ok(Choice(c) if isinstance(c, str) else c, us) for c, us in times.items()]
        made.append(Row("spmm_24", "bf16", n, k, m, tuple(sorted(results, key=lambda r: r.us_p50))))
    return Table(HEAD, tuple(made))
