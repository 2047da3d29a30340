import json

import pytest

from slimgemm.pruning import Channels, NetAdapt, NofM, Search, count_macs
from slimgemm.pruning.search_report import front


@pytest.fixture(scope="module")
def found(blobs):
    macs = count_macs(blobs.model, blobs.example).macs
    return Search(
        blobs.accuracy, max_macs=0.6 * macs, method=NetAdapt(step=0.3), show=False,
        patterns=(Channels(multiple_of=4), NofM(2, 4)),
    ).run(blobs.model, blobs.example)  # fmt: skip


def test_the_front_is_what_nothing_beats():
    points = [(3, 1.0), (1, 5.0), (2, 5.0), (4, 1.0), (2.5, 2.0)]
    assert front(points) == [(1, 5.0), (2.5, 2.0), (3, 1.0)]


def test_the_table_says_what_each_layer_saves(found, blobs):
    text = str(found)
    assert "MACs" in text and "mJ" in text and "µs measured" in text
    changed = {row.name: row.verdict for row in found.layers if row.verdict != "dense"}
    assert changed
    for name, word in found.allocation.patterns.items():
        assert word in changed[name]
    for group in found.allocation.channels:
        assert all("channels" in changed[name] for name in group.split(" + "))
    assert sum(row.now.macs for row in found.layers) == found.measured.macs


def test_json_holds_all_but_the_model(found):
    data = json.loads(json.dumps(found.as_dict()))
    assert data["allocation"] == found.allocation.as_dict()
    assert data["costs"]["measured"]["macs"] == found.measured.macs
    assert [row["name"] for row in data["layers"]] == [row.name for row in found.layers]
    assert data["layers"][0]["us_measured"] == [None, None]


def test_the_picture(found, tmp_path):
    pytest.importorskip("matplotlib")
    found.draw(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"
