import pytest
import torch

from slimgemm import pruning
from slimgemm.pruning import Block, Channels, Magnitude, NofM, Unstructured, Wanda
from slimgemm.pruning.sensitivity import Point, Scan, Sensitivity, scan
from slimgemm.pruning.space import Choices, Space


class Stop(Exception):
    pass


class Output:
    """Metric: 100 less the distance of the outputs to the dense ones; counts its calls."""

    def __init__(self, model, x, stop_after=None):
        self.x, self.calls, self.stop_after = x, 0, stop_after
        model.eval()
        with torch.no_grad():
            self.want = model(x)

    def __call__(self, model):
        assert not model.training and not torch.is_grad_enabled()
        if self.calls == self.stop_after:
            raise Stop
        self.calls += 1
        return 100 - float((model(self.x) - self.want).norm())


@pytest.fixture
def image(normal):
    return normal(2, 3, 8, 8)


def test_groups_are_scanned_whole_and_layers_alone(residual, image):
    before = {k: v.clone() for k, v in residual.state_dict().items()}
    patterns = (Channels(), NofM(2, 4), Unstructured())
    found = scan(
        residual, image, Output(residual, image), patterns=patterns, ratios=(0.25, 0.5), show=False
    )
    assert found.dense == 100
    curves = found.curves()
    tied = next(name for name, word in curves if " + " in name)
    assert {"stem", "b", "dw"} <= set(tied.split(" + "))
    # a residual-coupled group cut as a whole does move the output
    assert all(found.drop(p) > 0 for p in curves[tied, "channels"])
    assert [p.ratio for p in curves["a", "channels"]] == [0.25, 0.5]
    assert [p.ratio for p in curves["a", "2:4"]] == [0.5]
    drops = [found.drop(p) for p in curves["f", "unstructured"]]
    assert 0 < drops[0] < drops[1]
    assert ("g", "channels") not in curves and ("g", "2:4") in curves
    assert all(torch.equal(v, before[k]) for k, v in residual.state_dict().items())


def test_a_layer_of_which_a_pattern_drops_nothing_has_no_point(normal):
    model, x = (
        torch.nn.Sequential(torch.nn.Conv2d(2, 8, 3), torch.nn.Conv2d(8, 3, 1)),
        normal(2, 2, 4, 4),
    )
    found = scan(
        model, x, Output(model, x), patterns=(NofM(2, 4), Unstructured()), ratios=(0.5,), show=False
    )
    assert set(found.curves()) == {("1", "2:4"), ("0", "unstructured"), ("1", "unstructured")}
    few = scan(model, x, Output(model, x), patterns=(NofM(1, 4),), show=False)
    assert set(few.curves()) == {("0", "1:4"), ("1", "1:4")}


def test_a_killed_scan_goes_on_where_it_was(mlp, normal, tmp_path):
    x, log = normal(5, 16), tmp_path / "scan.jsonl"
    options = {"patterns": (Channels(), NofM(2, 4)), "ratios": (0.3, 0.6), "show": False}
    said = []
    whole = scan(mlp, x, Output(mlp, x), **options, say=said.append)
    first = whole.points[0]
    assert len(said) == len(whole.points) and said[0].startswith("0, channels, 0.3")
    assert f" dropped: {first.value:.6g}" in said[0]
    calls = 0
    for stop in (1, 3, 2):
        metric = Output(mlp, x, stop)
        with pytest.raises(Stop) as stopped:
            scan(mlp, x, metric, log=log, **options)
        calls += metric.calls
        (note,) = stopped.value.__notes__
        place = [f"{p.pattern} {p.ratio:.6f} {p.name}" for p in whole.points][calls - 1]
        assert note == f"while trying {place}"
    metric, said = Output(mlp, x), []
    assert scan(mlp, x, metric, log=log, **options, say=said.append) == whole
    assert len(said) == metric.calls  # what was logged is not said again
    assert metric.calls + calls == len(whole.points) + 1
    with pytest.raises(ValueError, match="is of another run"):
        scan(mlp, x, metric, log=log, **(options | {"ratios": (0.4,)}))
    with pytest.raises(ValueError, match="is of another run"):
        scan(mlp, x, metric, log=log, **options, tag="another metric")


def test_shares_stop_where_the_curve_first_crosses():
    values = [(0.2, 89.8), (0.4, 88.0), (0.6, 89.9)]
    found = Scan(90.0, tuple(Point("a", "channels", r, v) for r, v in values))
    assert found.shares("channels", 1.0) == {"a": 0.2}
    assert found.shares("channels", 3.0) == {"a": 0.6}
    loss = Scan(0.5, (Point("a", "channels", 0.2, 0.6),), higher_is_better=False)
    assert loss.drop(loss.points[0]) == pytest.approx(0.1)
    assert loss.shares("channels", 0.05) == {"a": 0.0} and loss.shares("2:4", 1) == {}
    broken = Scan(90.0, (Point("a", "channels", 0.2, float("nan")),))
    assert broken.shares("channels", 50.0) == {"a": 0.0}


def test_as_an_amount_it_prunes_what_costs_little(residual, image):
    metric = Output(residual, image)
    options = {"ratios": (0.25, 0.5), "show": False}
    scanned = scan(residual, image, metric, score=Magnitude(p=1), **options)
    middle = sorted(map(scanned.drop, scanned.points))[len(scanned.points) // 2]
    amount = Sensitivity(metric, max_drop=middle, **options)
    shares = scanned.shares("channels", middle)
    assert len(set(shares.values())) > 1
    plan = pruning.plan(residual, image, pattern=Channels(), amount=amount)
    space = Space(residual, image, Choices(score=Magnitude(p=1)))
    units = {name: len(group.units) for name, group in space.groups.items()}
    gone = space.gone({name: units[name] - round(units[name] * s) for name, s in shares.items()})
    for name, shape in space.geometry.shapes(gone).items():
        assert plan[name].kept_shape == shape


def test_with_24_it_leaves_sensitive_layers_dense(mlp, normal):
    x = normal(5, 16)
    metric = Output(mlp, x)
    drops = {
        p.name: 100 - p.value
        for p in scan(mlp, x, metric, patterns=(NofM(2, 4),), score=Magnitude(), show=False).points
    }
    middle = sorted(drops.values())[1]
    amount = Sensitivity(metric, max_drop=middle, show=False)
    plan = pruning.plan(mlp, x, pattern=NofM(2, 4), amount=amount)
    assert {e.name for e in plan.pruned} == {n for n, d in drops.items() if d <= middle}
    assert [e.refusal for e in plan.refused] == ["the amount leaves it dense"]


def test_table_and_picture(mlp, normal, tmp_path):
    x = normal(5, 16)
    found = scan(mlp, x, Output(mlp, x), patterns=(Channels(), Block(4, 4)), show=False)
    text = str(found)
    assert "dense 100, higher is better" in text and "block 4x4" in text and "0.90: " in text
    assert "within" not in text
    shares = found.shares("channels", 2.0)
    for name in ("0", "2"):
        (row,) = [r for r in found.table(2.0).splitlines() if f"│ {name} " in r and "chan" in r]
        assert f"{shares[name]:.2f}" == row.split("│")[3].strip()
    pytest.importorskip("matplotlib")
    found.draw(tmp_path / "scan.png", max_drop=1.0)
    assert (tmp_path / "scan.png").read_bytes()[:4] == b"\x89PNG"


def test_refusals(mlp, normal):
    x = normal(5, 16)
    with pytest.raises(ValueError, match=r"ratios must be in \[0, 1\)"):
        scan(mlp, x, Output(mlp, x), ratios=(1.0,), show=False)
    with pytest.raises(ValueError, match="of the dense model is nan, which nothing can be comp"):
        scan(mlp, x, lambda model: float("nan"), show=False)
    with pytest.raises(ValueError, match="gave a tuple, it must give one number"):
        scan(mlp, x, lambda model: (1, 2), show=False)
    with pytest.raises(ValueError, match="a scan has none; use another score"):
        scan(mlp, x, Output(mlp, x), score=Wanda(), show=False)
    with pytest.raises(ValueError, match=r"pass it to plan\(amount=\)"):
        Sensitivity(Output(mlp, x), 1.0).drops([])


def test_per_layer_chooses_where_24_goes(mlp, normal):
    x, two_of_four = normal(5, 16), NofM(2, 4)
    plan = pruning.plan(mlp, x, pattern=two_of_four, amount=pruning.PerLayer({"2": 0.5}))
    assert [e.name for e in plan.pruned] == ["2"]
    with pytest.raises(ValueError, match=r"drops 0\.5 of a layer or nothing, .* 0\.3"):
        pruning.plan(mlp, x, pattern=two_of_four, amount=pruning.PerLayer({"2": 0.3}))
    with pytest.raises(ValueError, match="names 1, which cannot be pruned here; layers are 0, 2"):
        pruning.plan(mlp, x, pattern=two_of_four, amount=pruning.PerLayer({"1": 0.5}))
