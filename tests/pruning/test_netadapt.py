import pytest
import torch

from slimgemm.pruning import Channels, NetAdapt, NofM, Search, count_macs
from slimgemm.pruning.netadapt import _price


def records(blobs, tune=None, **options):
    macs = count_macs(blobs.model, blobs.example).macs
    search = Search(
        blobs.accuracy, max_macs=0.5 * macs, finetune=tune or blobs.tune, short=2, show=False,
        method=NetAdapt(step=0.15, decay=0.9), patterns=(Channels(), NofM(2, 4)), **options,
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
    assert finalists == 4  # the method's own is not trained again, as long=0
    assert len(end) == finalists - 1 and len({*end} - {*steps}) == 1  # theirs are the same too


def test_price():
    assert _price(1.0, 0.5) > _price(1.0, 1.0) > 0 > _price(-1.0, 0.5) > _price(-1.0, 1.0)


def test_bad_options():
    with pytest.raises(ValueError, match="0 < step < 1"):
        NetAdapt(step=1.0)
    with pytest.raises(ValueError, match="0 < decay <= 1"):
        NetAdapt(decay=0.0)
