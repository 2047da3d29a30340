import pytest
import torch
from torch import nn

from slimgemm.pruning.journal import Journal, run_key


def test_records_are_there_again(tmp_path):
    path = tmp_path / "deep" / "j.jsonl"
    journal = Journal(path, "k")
    made = journal.add("a", {"value": 1.5, "pair": (1, 2)})
    assert made == {"key": "a", "value": 1.5, "pair": [1, 2]}
    again = Journal(path, "k")
    assert "a" in again and again["a"] == made and list(again) == [made]
    assert "b" not in again


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_last_line_that_was_cut_off_is_dropped(tmp_path, cut):
    path = tmp_path / "j.jsonl"
    journal = Journal(path, "k")
    journal.add("a", {"value": 1})
    journal.add("b", {"value": 2})
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path, "k")
    assert "a" in again and "b" not in again
    again.add("c", {"value": 3})
    assert [r["key"] for r in Journal(path, "k")] == ["a", "c"]


def test_a_kill_before_the_first_line_starts_anew(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"run": "k')
    Journal(path, "k").add("a", {})
    assert "a" in Journal(path, "k")


def test_another_run_and_damage_are_refused(tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path, "k").add("a", {})
    with pytest.raises(ValueError, match="is of another run"):
        Journal(path, "other")
    path.write_text('{"run": "k"}\nnonsense\n')
    with pytest.raises(ValueError, match="is damaged"):
        Journal(path, "k")


def test_without_a_path_it_is_kept_in_memory():
    journal = Journal(None, "k")
    journal.add("a", {"value": 1})
    assert journal["a"]["value"] == 1


def test_the_key_depends_on_options_weights_and_inputs():
    model, x = nn.Linear(2, 2), torch.zeros(1, 2)
    base = run_key(["a"], model, x)
    assert base == run_key(["a"], model, x)
    assert run_key(["b"], model, x) != base and run_key(["a"], model, x + 1) != base
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert run_key(["a"], model, x) != base
