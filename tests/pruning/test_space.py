import pytest
import torch
from torch import nn

from slimgemm.pruning import Channels, Magnitude, NofM, SparseGPT, Unstructured, Wanda, count_macs
from slimgemm.pruning.coupling import without
from slimgemm.pruning.masks import mask_of
from slimgemm.pruning.space import MOST_OPTIONS, Allocation, Choices, Space, group_of


@pytest.fixture
def image(normal):
    return normal(2, 3, 8, 8)


def check_prediction(space, allocation):
    """What the space predicts is what the pruned copy counts."""
    model, _ = space.apply(allocation)
    predicted, counted = space.costs(allocation), count_macs(model, space.example_inputs)
    density = {
        n: float(mask_of(model.get_submodule(n)).float().mean()) for n in allocation.patterns
    }
    macs = sum(c.macs * density.get(n, 1.0) for n, c in counted.layers.items())
    assert predicted.macs == pytest.approx(macs, rel=1e-6)
    if not density:
        assert predicted.params == counted.params and predicted.bytes == counted.bytes
        biases = sum(
            m.bias.nbytes
            for n, m in model.named_modules()
            if n in counted.layers and m.bias is not None
        )
        assert predicted.moved_bytes == pytest.approx(counted.moved_bytes - biases)
    shapes = {n: tuple(model.get_submodule(n).weight.shape) for n in counted.layers}
    assert space.geometry.shapes(space.gone(allocation.channels)) == shapes
    return model


def test_predicted_costs_are_those_of_the_cut_model(residual, image):
    space = Space(residual, image, Choices())
    check_prediction(space, Allocation())
    for share in (0.25, 0.5, 0.75):
        check_prediction(space, space.uniform(share))
    check_prediction(space, space.least({}))
    for name, options in space.options.items():
        check_prediction(space, Allocation({name: options[len(options) // 2]}))


def test_patterns_and_channels_mix(residual, image):
    space = Space(residual, image, Choices((Channels(multiple_of=4), NofM(2, 4))))
    group = group_of(space.groups, "a")
    allocation = Allocation({group: 8}, {"b": "2:4", "f": "2:4"})
    model = check_prediction(space, allocation)
    assert model.a.out_channels == 8 and model.b.weight.shape == (16, 8, 1, 1)
    kept = (model.b.weight.flatten(1).unflatten(1, (-1, 4)) != 0).sum(2)
    assert int(kept.max()) == 2 and int(kept.min()) == 2
    assert residual.a.out_channels == 24 and mask_of(residual.b) is None


@pytest.mark.parametrize(
    "pattern", [NofM(2, 4), NofM(2, 4, transposable=True), NofM(4, 8)], ids=str
)
@pytest.mark.parametrize("width, out", [(18, 8), (13, 8), (19, 7), (13, 5)])
def test_a_last_group_that_is_cut_short_counts_what_it_keeps(pattern, width, out, normal):
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, out))
    space = Space(model, normal(3, 16), Choices((Channels(), pattern)))
    allocation = Allocation({"0": width}, {"2": str(pattern)})
    cut = check_prediction(space, allocation)
    kept = sum(int(p.count_nonzero()) for p in cut.parameters())
    assert space.costs(allocation).params == kept < cut[0].weight.numel() + width * (out + 1)


def test_heads_go_whole(attention, normal):
    space = Space(attention(), normal(1, 6, 16), Choices())
    for name, options in space.options.items():
        check_prediction(space, Allocation({name: options[-1]}))


def test_the_units_of_the_lowest_score_go(mlp, normal):
    space = Space(mlp, normal(3, 16), Choices())
    norms = mlp[0].weight.detach().square().sum(1)
    model, _ = space.apply(Allocation({"0": 12}))
    assert model[0].kept_out.index.tolist() == sorted(norms.topk(12).indices.tolist())


def test_options_are_multiples_few_and_falling(normal):
    model = nn.Sequential(nn.Linear(4, 200), nn.ReLU(), nn.Linear(200, 3))
    space = Space(model, normal(2, 4), Choices((Channels(multiple_of=8, floor=16),)))
    options = space.options["0"]
    assert options[0] == 192 and options[-1] == 16 and all(o % 8 == 0 for o in options)
    assert options == sorted(options, reverse=True)
    fine = Space(model, normal(2, 4), Choices()).options["0"]
    assert len(fine) <= MOST_OPTIONS and fine[0] == 199 and fine[-1] == 1


def test_allocations_survive_json():
    one = Allocation({"b": 3, "a": 4}, {"c": "2:4"})
    assert Allocation.from_dict(one.as_dict()) == one
    assert one.key == Allocation({"a": 4, "b": 3}, {"c": "2:4"}).key


def test_what_cannot_be_searched_is_refused(mlp, normal):
    with pytest.raises(ValueError, match="chooses among Channels and NofM"):
        Choices((Unstructured(),))
    with pytest.raises(ValueError, match="one Channels pattern, got several"):
        Choices((Channels(), Channels(multiple_of=8)))
    with pytest.raises(ValueError, match="ranks no channels"):
        Choices(score=SparseGPT())
    with pytest.raises(ValueError, match="needs calibration data"):
        Choices(score=Wanda())
    with pytest.raises(ValueError, match="nothing can be pruned"):
        Space(nn.Sequential(nn.ReLU()), normal(2, 4), Choices())
    with pytest.raises(ValueError, match=r"9 is no group .* groups are 0, 2"):
        Space(mlp, normal(3, 16), Choices()).gone({"2": 3, "9": 1})


def test_scores_that_need_data(mlp, normal):
    choices = Choices(score=Wanda(), calibration=[normal(32, 16)])
    space = Space(mlp, normal(3, 16), choices)
    assert not torch.equal(
        space.values["0"], Space(mlp, normal(3, 16), Choices(score=Magnitude())).values["0"]
    )
    check_prediction(space, Allocation({"0": 8}))


def test_the_coupling_of_a_cut_model_is_the_traced_one(residual, image):
    space = Space(residual, image, Choices())
    model, surgery = space.apply(space.uniform(0.4))
    traced = Space(model, image, Choices())
    derived = Space(model, image, Choices(), coupling=without(space.coupling, surgery.slices))
    assert derived.options == traced.options
    for name, options in traced.options.items():
        allocation = Allocation({name: options[len(options) // 2]})
        assert derived.costs(allocation) == traced.costs(allocation)
        mine, theirs = (s.apply(allocation)[0].state_dict() for s in (derived, traced))
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
