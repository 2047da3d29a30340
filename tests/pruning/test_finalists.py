"""The end of a search: the method's model beside plainer ones of no more cost, trained as long."""

import pytest

from slimgemm.pruning import Channels, NetAdapt, Search, count_macs
from slimgemm.pruning.finalists import between
from slimgemm.pruning.space import Allocation, Choices, Space

NAMES = ["searched", "at once", "half way", "even"]


@pytest.fixture
def space(blobs):
    return Space(blobs.model, blobs.example, Choices())


@pytest.fixture
def searching(blobs):
    def make(**options):
        defaults = {
            "method": NetAdapt(step=0.2), "patterns": (Channels(),),
            "finetune": blobs.tune, "short": 2, "long": 5, "show": False,
        }  # fmt: skip
        return Search(options.pop("evaluate", blobs.accuracy), **(defaults | options))

    return make


def finalists(found):
    return {r["key"].split(" ", 2)[2]: r for r in found.records if r["kind"] == "finalist"}


def test_all_are_within_the_limit_and_trained_as_long_and_the_best_is_the_result(
    searching, blobs, space
):
    trained = []

    def tune(model, steps):
        trained.append(steps)
        blobs.tune(model, steps)

    limit = 0.5 * count_macs(blobs.model, blobs.example).macs
    found = searching(max_macs=limit, finetune=tune).run(blobs.model, blobs.example)
    rows, steps = finalists(found), sum(r["kind"] == "step" for r in found.records)
    assert [*rows] == [name for name in NAMES if name in rows] and {"at once", "even"} <= {*rows}
    for row in rows.values():
        assert space.costs(Allocation.from_dict(row["allocation"])).macs <= limit
        assert row["steps"] == 2 * steps + 5
    assert trained[-len(rows) :] == [5, *[2 * steps + 5] * (len(rows) - 1)]
    assert rows["at once"]["allocation"] == rows["searched"]["allocation"]
    (last,) = [r for r in found.records if r["kind"] == "finished"]
    assert found.value == last["value"] == max(r["value"] for r in rows.values())
    assert found.value == blobs.accuracy(found.model.eval())
    assert found.allocation.as_dict() == rows[last["finalist"]]["allocation"]
    assert bool(found.notes) == (last["finalist"] != "searched")


def test_where_an_even_cut_is_better_it_is_the_result_and_the_notes_say_so(searching, blobs, space):
    limit = 0.5 * count_macs(blobs.model, blobs.example).macs

    def metric(model):  # only where both layers lost as much as the other
        first, second = model[0].weight.shape[0], model[2].weight.shape[0]
        return 90.0 if abs(first - 2 * second) <= 1 else 10.0

    found = searching(evaluate=metric, max_macs=limit, short=0, long=0, finetune=None).run(
        blobs.model, blobs.example
    )
    rows = finalists(found)
    assert "at once" not in rows, "without training it is what the method made"
    assert rows["searched"]["value"] == 10.0, "the metric must set the method's own model apart"
    assert found.value == 90.0 and found.allocation.as_dict() == rows["even"]["allocation"]
    (note,) = found.notes
    assert note.startswith("The result is not the model that the method made but an even cut")
    assert note.endswith("a drop of 0 against 80")


def test_without_a_limit_of_cost_none_is_dearer(searching, blobs, space):
    found = searching(max_drop=5.0).run(blobs.model, blobs.example)
    rows = finalists(found)
    own = space.costs(Allocation.from_dict(rows["searched"]["allocation"])).macs
    for row in rows.values():
        assert space.costs(Allocation.from_dict(row["allocation"])).macs <= own


def test_between_an_allocation_and_an_even_cut(space):
    first = next(iter(space.options))
    chosen = Allocation({first: min(space.options[first])}, {"0": "2:4"})
    assert between(space, chosen, 1.0, 0.5) == chosen
    assert between(space, chosen, 0.0, 0.5) == space.uniform(0.5)
    half = between(space, chosen, 0.5, 0.5)
    assert half.patterns == chosen.patterns
    for name in space.options:
        total = len(space.groups[name].units)
        wanted = 0.5 * chosen.channels.get(name, total) + 0.25 * total
        assert abs(half.channels.get(name, total) - wanted) <= 0.5
