import pytest
import torch

from slimgemm.pruning import Channels, NetAdapt, NofM, Search, count_macs
from slimgemm.pruning.netadapt import _price
from slimgemm.pruning.task import Infeasible


def records(blobs, tune=None, **options):
    macs = count_macs(blobs.model, blobs.example).macs
    search = Search(
        blobs.accuracy, max_macs=0.5 * macs, finetune=tune or blobs.tune, short=2, show=False,
        method=NetAdapt(step=0.15, decay=0.9), patterns=(Channels(), NofM(2, 4)),
        **{"exchange": 0, **options},
    )  # fmt: skip
    return macs, search.run(blobs.model, blobs.example)


def test_each_step_takes_the_candidate_that_loses_least_per_saving(blobs):
    macs, found = records(blobs)
    steps = [r for r in found.records if r["kind"] == "step"]
    assert len(steps) >= 2
    spent = macs
    for place, step in enumerate(steps):
        tried = [
            r
            for r in found.records
            if r["kind"] == "candidate" and r["key"].startswith(f"step {place} ")
        ]
        assert len(tried) >= 2
        (uncut,) = [r["value"] for r in found.records if r["key"] == f"step {place} uncut"]
        best = min(tried, key=lambda r: _price(uncut - r["value"], r["saving"]))
        assert step["allocation"] == best["allocation"] and step["value"] == best["value"]
        # every channel candidate saves what the step asks, or is the most that its group can
        goal = 2 * 0.15 * 0.9**place  # in units of the limit, which is half of dense
        limited = min(goal, spent / (0.5 * macs) - 1)
        assert any(r["saving"] >= limited - 1e-9 for r in tried)
        spent = step["costs"]["macs"]
    assert steps[-1]["costs"]["macs"] <= 0.5 * macs < min(s["costs"]["macs"] for s in steps[:-1])


def test_candidates_of_a_step_and_its_uncut_model_meet_the_same_random_numbers(blobs):
    seeds = []

    def tune(model, steps):
        seeds.append(torch.initial_seed())
        blobs.tune(model, steps)

    _, found = records(blobs, tune)
    kinds = [r["kind"] for r in found.records if r["kind"] in ("candidate", "uncut", "step")]
    assert kinds.count("uncut") == kinds.count("step") >= 2
    expected, place = [], 0
    for kind in kinds:
        if kind == "step":
            place += 1
        else:
            expected.append(place)
    steps, end = seeds[: len(expected)], seeds[len(expected) :]
    by_step = list(dict.fromkeys(steps))
    assert [by_step[place] for place in expected] == steps and len(by_step) == place
    finalists = sum(r["kind"] == "finalist" for r in found.records)
    assert finalists == 4
    assert len(end) == finalists and len({*end} - {*steps}) == 1  # theirs are the same too


def removed(blobs):
    """A metric that loses a point a channel cut from the first layer, and 50 from the second."""

    def metric(model):
        widths = model[0].out_features, model[2].out_features
        return 100.0 - (32 - widths[0]) - 50 * (16 - widths[1])

    return metric


def halving(blobs, metric, max_drop, **options):
    return Search(
        metric, max_drop=max_drop, method=NetAdapt(step=0.5, decay=1.0), show=False, **options
    ).run(blobs.model, blobs.example)


def test_where_the_first_step_loses_too_much_half_of_it_is_tried(blobs, tmp_path):
    metric, calls = removed(blobs), []

    def counted(model):
        calls.append(1)
        return metric(model)

    found = halving(blobs, counted, 5.0, folder=tmp_path / "whole")
    steps = {r["key"]: r["drop"] for r in found.records if r["kind"] == "step"}
    # Half of the model's MACs, a quarter, an eighth: too much each; 1/16 and 1/32 are within.
    first = {key: drop for key, drop in steps.items() if key.startswith("step 0")}
    assert list(first)[:2] == ["step 0", "step 0 at 1/2"]
    assert [drop > 7.5 for drop in first.values()] == [True] * (len(first) - 1) + [False]
    assert found.drop <= 5.0 and found.measured.macs < found.dense.macs
    assert len(steps) > len(first)  # from there it went on

    # Stopped at any evaluation it goes on to the same end.
    for stop in range(2, len(calls), 3):
        left = [stop]

        def stopping(model, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return metric(model)

        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            halving(blobs, stopping, 5.0, folder=folder)
        again = halving(blobs, metric, 5.0, folder=folder)
        assert again.as_dict() == found.as_dict()
        assert again.records == found.records


def test_where_no_step_is_small_enough_it_says_what_it_reached(blobs):
    def metric(model):
        return 100.0 - 10 * (32 - model[0].out_features) - 30 * (16 - model[2].out_features)

    dense = count_macs(blobs.model, blobs.example).macs
    said = "meet a drop of 2; the least of each that it reached, .* steps: drop 20, macs 2176"
    with pytest.raises(Infeasible, match=f"NetAdapt cannot {said}") as error:
        halving(blobs, metric, 2.0)
    # half of the model at the first step; two channels, at 128 MACs each, at the last
    assert 2 / 32 * dense > 2 * 128 > dense / 32 and dense == 2 * 2176
    assert error.value.best == {"drop": 20.0, "macs": 2176}


def test_price():
    assert _price(1.0, 0.5) > _price(1.0, 1.0) > 0 > _price(-1.0, 0.5) > _price(-1.0, 1.0)


def test_bad_options():
    with pytest.raises(ValueError, match="0 < step < 1"):
        NetAdapt(step=1.0)
    with pytest.raises(ValueError, match="0 < decay <= 1"):
        NetAdapt(decay=0.0)
