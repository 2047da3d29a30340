import pytest
import torch

from slimgemm.pruning import Channels, NofM
from slimgemm.pruning.masks import mask_of
from slimgemm.pruning.snapshot import Snapshot, compose, load_snapshot, save_snapshot
from slimgemm.pruning.space import Allocation, Choices, Space

BOTH = Choices((Channels(), NofM(2, 4)))


@pytest.fixture
def twice(residual, normal):
    """Cut, then cut and masked: (snapshot, example inputs)."""
    image = normal(2, 3, 8, 8)
    space = Space(residual, image, BOTH)
    model, first = space.apply(space.uniform(0.25))
    again = Space(model, image, BOTH)
    layers = {name: "2:4" for name in ("b", "f")}
    model, second = again.apply(Allocation(again.uniform(0.3).channels, layers))
    both = compose(first, second)
    return Snapshot(model, both, Allocation({"a": 9}, layers), 1.25), image


def test_two_cuts_are_one_and_survive_a_file(residual, twice, tmp_path):
    snapshot, image = twice
    save_snapshot(tmp_path / "deep" / "s.safetensors", snapshot)
    again = load_snapshot(tmp_path / "deep" / "s.safetensors", residual)
    assert again.allocation == snapshot.allocation and again.value == 1.25
    assert torch.equal(again.model.eval()(image), snapshot.model.eval()(image))
    for name in ("b", "f"):
        mine, theirs = (mask_of(m.get_submodule(name)) for m in (again.model, snapshot.model))
        assert torch.equal(mine, theirs) and not bool(mine.all())
    kept = snapshot.surgery.slices
    assert {k: v.tolist() for k, v in again.surgery.slices.items()} == {
        k: v.tolist() for k, v in kept.items()
    }
    out, into = (kept["a.weight", axis] for axis in (0, 1))
    assert again.model.a.weight.shape[:2] == (len(out), len(into))
    assert residual.a.weight.shape == (24, 16, 3, 3)


def test_equal_snapshots_give_equal_bytes(twice, tmp_path):
    for number in range(8):
        save_snapshot(tmp_path / f"{number}.safetensors", twice[0])
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_one_cut_is_itself(twice):
    surgery = twice[0].surgery
    assert compose(None, surgery) is surgery and compose(surgery, None) is surgery
    assert compose(None, None) is None


def test_a_damaged_file_is_refused(residual, twice, tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(ValueError, match="delete the folder to begin anew"):
        load_snapshot(path, residual)
    save_snapshot(path, twice[0])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        load_snapshot(path, residual)
