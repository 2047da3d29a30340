"""The file of measured times: what it holds, which row speaks for a shape, what is refused."""

import json

import pytest
import torch
from tune_fakes import HEAD, fakes, ok, table_of, tuner

from slimgemm.kernels import tune, tune_jobs, tune_table
from slimgemm.kernels.tune_table import Choice, Result, Row, Table, load, save


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache folder and the package's tables, both empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shipped = tmp_path / "shipped.json"
    monkeypatch.setattr(tune_table, "shipped_path", lambda head: shipped)
    return tmp_path


def one_of_everything():
    tile = (("mt", 2), ("nt", 8))
    results = (
        ok(Choice("mma_sp", tile, 4), 3.5),
        ok(Choice("dense"), 8.0),
        Result(Choice("wgmma_sp"), tune_table.WRONG, None, 0.5, 0.002, "error 5.00e-01 > 2.00e-03"),
        Result(Choice("portable"), tune_table.FAILED, reason="RuntimeError: no"),
    )
    return Table(
        HEAD,
        (Row("spmm_24", "fp16", 64, 32, 8, results),),
        (("spmm_24", "bf16", results[0].choice),),
    )


def test_a_table_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "new folder" / "table.json"
    save(one_of_everything(), path)
    assert load(path) == one_of_everything()
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]
    assert [str(r.choice) for r in load(path).rows[0].ranked] == [
        "mma_sp mt=2 nt=8 splits=4",
        "dense",
    ]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    save(one_of_everything(), path)
    before = path.read_bytes()
    monkeypatch.setattr(json, "dumps", lambda *a, **k: "half\ud800")  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        save(Table(HEAD), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def damage(change):
    """The JSON of a good table after `change`."""

    def text(path):
        save(one_of_everything(), path)
        content = json.loads(path.read_text())
        change(content)
        return json.dumps(content)

    return text


def result(content):
    return content["rows"][0]["results"][0]


@pytest.mark.parametrize(
    "damaged,why",
    [
        (lambda path: "{", "Expecting property name"),
        (lambda path: "[]", "list indices"),
        (damage(lambda c: c.pop("rows")), "'rows' is missing"),
        (damage(lambda c: c.update(format=1)), "its format is 1, not 2"),
        (damage(lambda c: c["head"].pop("torch")), "its head lacks torch"),
        (damage(lambda c: c["head"].update(torch=2)), "head must be text, got 2"),
        (damage(lambda c: c["rows"][0].update(n=0)), "n must be a whole number from 1, got 0"),
        (damage(lambda c: c["rows"][0].update(dtype="int8")), "dtype must be one of fp16, bf16"),
        (damage(lambda c: result(c).update(implementation="os.system")), "got 'os.system'"),
        (damage(lambda c: result(c).update(us_p50=float("nan"))), "us_p50 must be a number"),
        (damage(lambda c: result(c).update(us_p50=None)), "is ok without a time"),
        (damage(lambda c: result(c).update(error=0.5)), "or beyond the allowed error"),
        (damage(lambda c: result(c).update(verdict="fine")), "verdict must be ok, wrong or failed"),
        (damage(lambda c: result(c)["tile"].update(mt=1.5)), "tile mt must be a whole number"),
        (damage(lambda c: result(c).update(splits=-1)), "splits must be a whole number from 1"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_by_name(tmp_path, damaged, why):
    path = tmp_path / "table.json"
    path.write_text(damaged(path))
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path} is no table of measured times: ")
    assert why in str(caught.value)
    assert str(caught.value).endswith("delete it and run `slimgemm tune` again")


def test_the_users_table_comes_before_the_packages(cache):
    theirs, mine = table_of((64, 64, 1, {"dense": 1.0})), table_of((64, 64, 1, {"mma_sp": 1.0}))
    assert tune_table.find(HEAD) is None
    save(theirs, tune_table.shipped_path(HEAD))
    assert tune_table.find(HEAD) == theirs
    assert tune_table.user_path(HEAD) == cache / "cache/slimgemm/tune/test_9000-2.99-3.99.json"
    save(mine, tune_table.user_path(HEAD))
    assert tune_table.find(HEAD) == mine


@pytest.mark.parametrize("key", tune_table.SAME, ids="another_{}".format)
def test_a_table_of_another_gpu_or_version_is_not_used(cache, key):
    stale = Table({**HEAD, key: "another"}, table_of((64, 64, 1, {"dense": 1.0})).rows)
    save(stale, tune_table.user_path(HEAD))
    assert tune_table.find(HEAD) is None
    fresh = table_of((64, 64, 1, {"dense": 1.0}))
    save(fresh, tune_table.shipped_path(HEAD))
    assert tune_table.find(HEAD) == fresh


def test_a_damaged_table_is_not_passed_over(cache):
    path = tune_table.user_path(HEAD)
    path.parent.mkdir(parents=True)
    path.write_text("half a tab")
    with pytest.raises(ValueError, match=r"test_9000-2\.99-3\.99\.json is no table"):
        tune_table.find(HEAD)


def test_file_names():
    assert tune_table.slug("NVIDIA H200") == "h200"
    assert tune_table.slug("NVIDIA A100-SXM4-80GB") == "a100_sxm4_80gb"
    assert tune_table.shipped_path({"gpu": "NVIDIA H200"}).parts[-3:] == (
        "kernels",
        "tables",
        "h200.json",
    )


def test_tables_of_the_package_are_installed_with_it():
    folder = tune_table.shipped_path(HEAD).parent
    setup = (folder.parents[1] / "setup.py").read_text()
    assert f'"{folder.name}/*.json"' in setup
    for path in folder.glob("*"):
        assert path == tune_table.shipped_path(load(path).head)


@pytest.mark.parametrize(
    "n,k,m,found",
    [
        (1024, 1024, 1, (1024, 1024, 1)),
        (1024, 1024, 2, (1024, 1024, 8)),
        (1024, 1024, 8, (1024, 1024, 8)),
        (1024, 1024, 16, (1024, 1024, 64)),
        (1024, 1024, 4096, (1024, 1024, 64)),  # above the last: the last
        (1024, 4096, 1, (1024, 4096, 1)),
        (1024, 2048, 1, (1024, 1024, 1)),  # as near as 1024x4096: the smaller one
        (1024, 2049, 1, (1024, 4096, 1)),
        (512, 1024, 1, (1024, 1024, 1)),
        (2048, 512, 1, (1024, 1024, 1)),
        (511, 1024, 1, None),
        (2049, 1024, 1, None),
        (1024, 8193, 1, None),
    ],
)
def test_which_row_speaks_for_a_shape(n, k, m, found):
    times = {"dense": 1.0}
    table = table_of(
        (1024, 1024, 64, times), (1024, 1024, 1, times), (1024, 1024, 8, times),
        (1024, 4096, 1, times),
    )  # fmt: skip
    row = table.row_for("spmm_24", "bf16", n, k, m)
    assert (None if row is None else (row.n, row.k, row.m)) == found
    assert table.row_for("spmm_24", "fp16", n, k, m) is None
    assert table.row_for("spmm_24_dgrad", "bf16", n, k, m) is None


def test_a_row_in_which_nothing_ran_speaks_for_nobody():
    failed = Row("spmm_24", "bf16", 64, 64, 1, (Result(Choice("dense"), tune_table.FAILED),))
    (fine,) = table_of((64, 64, 8, {"dense": 1.0})).rows
    assert Table(HEAD, (failed, fine)).row_for("spmm_24", "bf16", 64, 64, 1) == fine
    assert Table(HEAD, (failed,)).row_for("spmm_24", "bf16", 64, 64, 1) is None


def test_what_tuning_writes_can_be_read_again(tmp_path):
    path = tmp_path / "table.json"
    (job,) = tune_jobs.jobs([(16, 32)], [torch.bfloat16], [4])
    ((_, row, _),) = tune.tune([job], Table(HEAD), path, tuner(fakes()))
    assert load(path).rows == (row,)
