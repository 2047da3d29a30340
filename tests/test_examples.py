"""Each example runs on its real data with a small budget, and keeps its promise."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from slimgemm.sparse_ops import SparseConv2d24, SparseLinear24

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name, *packages):
    for package, distribution in packages:
        pytest.importorskip(package, reason=f"{distribution} is not installed")
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


DIGITS = ("sklearn", "scikit-learn")


def is_24(weight, axis=1):
    groups = weight.movedim(axis, -1).unflatten(-1, (-1, 4))
    return bool(((groups != 0).sum(-1) <= 2).all())


def test_each_example_is_short_and_run_here():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    source = Path(__file__).read_text()
    assert names and all(f'example("{name}"' in source for name in names)
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path.name


def test_cnn_magnitude(capsys):
    results, model, report = example("cnn_magnitude", DIGITS)(epochs=3, finetune_epochs=2)
    assert report.ok
    assert isinstance(model[2], SparseConv2d24) and isinstance(model[6], SparseLinear24)
    assert is_24(model[6].to_dense().weight) and is_24(model[2].to_dense().weight)
    assert results["fine-tuned"] > max(results["pruned"], 0.8)
    assert results["loaded again"] == results["fine-tuned"]
    assert "fine-tuned" in capsys.readouterr().out


def test_network_slimming():
    rows, model = example("network_slimming", DIGITS)(epochs=3, finetune_epochs=2)
    (_, _, dense, dense_macs), (_, pruned, fewer, fewer_macs), (_, tuned, *_) = rows
    assert fewer < dense and fewer_macs < dense_macs
    assert tuned > max(pruned, 0.7)
    widths = [m.out_channels for m in model if isinstance(m, nn.Conv2d)]
    assert all(width % 8 == 0 for width in widths) and sum(widths) < 96


def test_residual_channels():
    main = example("residual_channels", DIGITS)
    results, model, again = main(epochs=2, finetune_epochs=2)
    assert model[1].conv2.weight.shape == (16, 16, 3, 3)
    assert results["fine-tuned"] > max(results["halved"], 0.7)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(x), model(x))


def test_search_limits(capsys):
    main = example("search_limits", DIGITS)
    scan, found, dense = main(steps=120, short=2, long=40, step=0.3)
    assert found.measured.macs <= 0.4 * dense.macs and found.drop < 15
    assert {point.pattern for point in scan.points} == {"channels, multiple of 4", "2:4"}
    printed = capsys.readouterr().out
    assert "MACs with outputs of normalisations" in printed and "µs measured" in printed


def test_lottery_ticket():
    results, ticket, kept = example("lottery_ticket", DIGITS)(epochs=3, rounds=3)
    assert kept == pytest.approx(0.1, abs=1e-3)
    assert results["ticket"] > results["random mask"]
    assert all(
        bool((m.weight == 0).float().mean() > 0.89) for m in ticket if isinstance(m, nn.Linear)
    )


def test_transformer_sparsegpt():
    main = example("transformer_sparsegpt")
    results, model, report = main(steps=80, width=64, length=32, calibration=32)
    assert report.ok
    linears = [m for m in model[:4].modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 8 and all(is_24(m.weight) for m in linears)
    assert results["dense"] <= results["SparseGPT"] < results["Magnitude"]
