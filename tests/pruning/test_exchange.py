"""Exchange of widths between groups at the same cost."""

import itertools

import pytest

from slimgemm.pruning import Channels, NetAdapt, Search, count_macs
from slimgemm.pruning.exchange import exchanged, stepped
from slimgemm.pruning.journal import Journal
from slimgemm.pruning.space import Allocation, Choices, Space
from slimgemm.pruning.task import Limits, Task

CHOICES = Choices((Channels(multiple_of=2),))


def balance(model):
    """Best where the first layer has 20 of its channels, whatever the second has: a known optimum
    that no even cut is at."""
    return 100.0 - abs(model[0].out_features - 20) + 0.1 * model[2].out_features


@pytest.fixture
def task(blobs, tmp_path):
    return Task(
        blobs.model, blobs.example, CHOICES, balance, True, None, 0, 0, Limits({"macs": 1.0}), 0,
        Journal(tmp_path / "j.jsonl", "test"), tmp_path, False, dense_value=100.0,
    )  # fmt: skip


def brute_force(task, fits):
    space = task.dense_space
    widths = [[len(space.groups[g].units), *options] for g, options in space.options.items()]
    every = (
        Allocation({g: k for g, k in zip(space.options, kept, strict=True)
                    if k < len(space.groups[g].units)})
        for kept in itertools.product(*widths)
    )  # fmt: skip
    return max(task.value(space.apply(a)[0]) for a in every if fits(a))


def test_from_an_even_cut_to_the_best_at_the_same_cost(task):
    space = task.dense_space
    even = space.uniform(0.5)
    limit = space.costs(even).macs

    def fits(allocation):
        return space.costs(allocation).macs <= limit

    found = exchanged(task, even, fits, set(), rounds=20)
    best = task.value(space.apply(found)[0])
    assert fits(found) and found != even
    assert best > task.value(space.apply(even)[0]) and best == brute_force(task, fits)
    once = exchanged(task, even, fits, set(), rounds=1)
    assert task.value(space.apply(once)[0]) <= best and once != even
    assert exchanged(task, found, fits, set(), rounds=3) == found  # where nothing gains it stays
    assert exchanged(task, even, fits, set(), rounds=0) == even
    avoided = exchanged(task, even, fits, {once.key}, rounds=1)
    assert avoided != once


def test_a_step_is_an_option_of_one_group(blobs):
    space = Space(blobs.model, blobs.example, CHOICES)
    group, options = next(iter(space.options.items()))
    dense = Allocation({}, {"4": "2:4"})
    narrower = stepped(space, dense, group, 1)
    assert narrower == Allocation({group: options[0]}, {"4": "2:4"})
    assert stepped(space, narrower, group, -1) == dense
    assert stepped(space, dense, group, -1) is None
    assert stepped(space, dense, group, len(options) + 1) is None
    odd = Allocation({group: options[2] - 1})  # no option: a step goes to the next that is
    assert stepped(space, odd, group, -1) == Allocation({group: options[2]})
    assert stepped(space, odd, group, 1) == Allocation({group: options[3]})


def test_a_search_ends_with_what_was_exchanged_where_that_is_best(blobs):
    limit = 0.5 * count_macs(blobs.model, blobs.example).macs
    options = {
        "max_macs": limit, "method": NetAdapt(step=0.5), "patterns": CHOICES.patterns,
        "show": False,
    }  # fmt: skip
    found = Search(balance, **options).run(blobs.model, blobs.example)
    without = Search(balance, exchange=0, **options).run(blobs.model, blobs.example)
    assert found.value > without.value and found.measured.macs <= limit
    assert "but widths exchanged between groups, of no more cost" in found.notes[0]
    rows = {r["key"].split(" ", 2)[2]: r for r in found.records if r["kind"] == "finalist"}
    assert rows["exchanged"]["allocation"] == found.allocation.as_dict()
    assert found.value == rows["exchanged"]["value"] == max(r["value"] for r in rows.values())
    with pytest.raises(ValueError, match="exchange must be"):
        Search(balance, **options, **{"exchange": -1})
