import pytest

from slimgemm.pruning import Channels, NofM, Pareto, Search, count_macs
from slimgemm.pruning.space import Allocation, Choices, Space
from slimgemm.pruning.task import Infeasible


@pytest.fixture
def run(blobs):
    pytest.importorskip("optuna", reason="optuna is not installed")

    def search(trials=14, **options):
        return Search(
            blobs.accuracy, method=Pareto(trials, population=4), finetune=blobs.tune, short=2,
            patterns=(Channels(multiple_of=4), NofM(2, 4)), show=False, exchange=0, **options,
        ).run(blobs.model, blobs.example)  # fmt: skip

    return search


def test_evenly_cut_models_are_tried_first_and_others_after(blobs, run):
    macs = count_macs(blobs.model, blobs.example).macs
    found = run(max_macs=0.6 * macs)
    tried = [
        Allocation.from_dict(r["allocation"]) for r in found.records if r["kind"] == "candidate"
    ]
    space = Space(blobs.model, blobs.example, Choices((Channels(multiple_of=4),)))
    assert tried[:3] == [Allocation(), space.uniform(0.125), space.uniform(0.25)]
    assert any(a.patterns for a in tried) and len({a.key for a in tried}) == len(tried)
    within = [
        r["value"]
        for r in found.records
        if r["kind"] == "candidate" and r["costs"]["macs"] <= 0.6 * macs
    ]
    assert found.value == max(within)


def test_under_a_drop_the_cheapest_within_it_is_taken(blobs, run):
    found = run(max_drop=4.0, minimise="params")
    assert found.drop <= 4.0
    finished = [r["allocation"] for r in found.records if r["kind"] == "finished"]
    cheaper = [
        r
        for r in found.records
        if r["kind"] == "candidate"
        and r["costs"]["params"] < found.measured.params
        and found.dense_value - r["value"] <= 1.5 * 4.0
    ]
    assert all(r["allocation"] in finished for r in cheaper)


def test_too_few_trials_say_what_they_reached(blobs, run):
    macs = count_macs(blobs.model, blobs.example).macs
    text = r"pareto found nothing within .* among 2 allocations; let it try more .*: drop .*, macs"
    with pytest.raises(Infeasible, match=text) as error:
        run(trials=2, max_macs=0.2 * macs)  # the dense model, and an eighth of it cut
    assert 0.6 * macs < error.value.best["macs"] < macs


def test_refusals(blobs, run, monkeypatch):
    with pytest.raises(ValueError, match="a population of 2 or more"):
        Pareto(population=1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="method pareto needs optuna; pip install"):
        run(max_macs=1e6)
