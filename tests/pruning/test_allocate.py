import pytest
import torch

from slimgemm.pruning import PerLayer, Uniform
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
