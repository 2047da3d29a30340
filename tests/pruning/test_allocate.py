import pytest
import torch

from slimgemm.pruning import ERK, LAMP, Global, PerLayer, Uniform
from slimgemm.pruning.allocate import Units, count


def layers(*sizes):
    return [Units(f"l{i}", torch.arange(float(n)), (n, 1), n) for i, n in enumerate(sizes)]


def test_uniform_rounds():
    assert Uniform(0.75).drops(layers(25, 4)) == [19, 3]
    assert Uniform(0.0).drops(layers(25)) == [0]


def test_one_unit_always_stays():
    assert count(3, 0.99) == 2
    assert count(1, 0.9) == 0


def test_per_layer_and_default():
    assert PerLayer({"l1": 0.5}, default=0.25).drops(layers(8, 8)) == [2, 4]


def test_per_layer_finds_one_of_coupled_names():
    both = [Units("a + b", torch.zeros(4), (4, 1), 8)]
    assert PerLayer({"b": 0.5}).drops(both) == [2]
    with pytest.raises(ValueError, match=r"a \+ b are coupled and drop one share"):
        PerLayer({"a": 0.25, "b": 0.5}).drops(both)


def test_refusals():
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1.0"):
        Uniform(1.0)
    with pytest.raises(ValueError, match="PerLayer share of a"):
        PerLayer({"a": -0.1})
    with pytest.raises(ValueError, match="names l7, which cannot be pruned here; layers are l0"):
        PerLayer({"l7": 0.1}).drops(layers(3))
    with pytest.raises(ValueError, match=r"needs a share for this pattern"):
        Uniform().drops(layers(3))


@pytest.mark.parametrize("share", ["0.5", True, None, float("nan"), 1, -0.1], ids=repr)
@pytest.mark.parametrize("make", [Global, LAMP, ERK, lambda s: PerLayer({"a": s})])
def test_shares_are_numbers_below_one(make, share):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got .*; it is the dropped share"):
        make(share)


def test_per_layer_takes_a_mapping():
    with pytest.raises(ValueError, match=r"PerLayer needs a share for each layer as .* Uniform"):
        PerLayer(0.5)


def test_global_has_one_threshold():
    first = Units("a", torch.tensor([5.0, 1, 6, 2]), (4, 1), 4)
    second = Units("b", torch.tensor([0.5, 9, 8, 7]), (4, 1), 4)
    assert Global(0.375).drops([first, second]) == [2, 1]
    assert Global(0.25).drops([first, second]) == [1, 1]
    assert Global(0.0).drops([first, second]) == [0, 0]


def test_global_keeps_floors_and_one_unit():
    low, high = Units("a", torch.zeros(10), (10, 1), 10), Units("b", torch.ones(10), (10, 1), 10)
    assert Global(0.4, floor=0.3).drops([low, high]) == [7, 1]
    assert Global(0.4, floor=0.0).drops([low, high]) == [8, 0]
    assert Global(0.45, floor=0.0).drops([low, high]) == [9, 0]
    with pytest.raises(ValueError, match=r"Global\(0.9\) cannot be reached: a floor of 0.5"):
        Global(0.9, floor=0.5).drops([low, high])


def test_global_compares_per_weight():
    # units of 10 weights with a score of 10 are as good as single weights of 1
    big = Units("a", torch.tensor([10.0, 30.0]), (2, 10), 20)
    small = Units("b", torch.tensor([0.5, 2.0, 2.0]), (3, 1), 3)
    assert Global(0.5, floor=0).drops([big, small]) == [1, 1]
    assert Global(0.09, floor=0, mean=False).drops([big, small]) == [0, 2]


def test_lamp_is_the_formula_and_keeps_the_largest_of_each_layer():
    weight = torch.tensor([3.0, 1.0, 2.0])
    units = Units("a", weight**2, (3, 1), 3)
    want = torch.tensor([9 / 9, 1 / 14, 4 / 13], dtype=torch.float64)
    torch.testing.assert_close(LAMP(0.5).normalised(units), want)
    # the scale of a layer does not matter to LAMP, it does to Global
    scaled = Units("b", weight**2 * 1e-8, (3, 1), 3)
    assert LAMP(0.34).drops([units, scaled]) == [1, 1]
    assert Global(0.34, floor=0).drops([units, scaled]) == [0, 2]


def test_erk_follows_the_shape_and_reaches_the_share():
    shapes = [(20, 5), (300, 200), (64, 64, 3, 3), (10, 300)]
    sizes = [int(torch.Size(s).numel()) for s in shapes]
    units = [Units(str(s), torch.zeros(n), s, n) for s, n in zip(shapes, sizes, strict=True)]
    density = ERK(0.9).densities(units)
    total = sum(d * n for d, n in zip(density, sizes, strict=True))
    assert total == pytest.approx(0.1 * sum(sizes))
    assert density[0] == 1.0  # would be more than dense
    raw = [sum(s) / n for s, n in zip(shapes, sizes, strict=True)]
    assert density[1] / density[2] == pytest.approx(raw[1] / raw[2])
    drops = ERK(0.9).drops(units)
    assert drops[0] == 0 and sum(drops) == pytest.approx(0.9 * sum(sizes), abs=2)
