"""Lottery ticket: train, prune, go back to the first weights with the mask, and again.

pip install scikit-learn && python examples/lottery_ticket.py
"""

import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from slimgemm import pruning


def make_model():
    return nn.Sequential(
        nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def main(epochs=12, rounds=4, share=0.9, seed=0):
    torch.manual_seed(seed)
    data = load_digits()
    x, y = torch.tensor(data.data / 16).float(), torch.tensor(data.target)
    fit, test = torch.randperm(len(y)).split((1400, 397))
    batches = [(x[rows], y[rows]) for rows in fit.split(64)]

    def train(model, turn=0):
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        pruning.finetune(model, optimizer, batches, F.cross_entropy, epochs, show=False)

    def accuracy(model):
        with torch.no_grad():
            return float((model(x[test]).argmax(1) == y[test]).float().mean())

    start, results = make_model(), {}
    dense = copy.deepcopy(start)
    train(dense)
    results["dense"] = accuracy(dense)
    for name, score in (("ticket", pruning.Magnitude(p=1)), ("random mask", pruning.Random())):
        model = copy.deepcopy(start)
        pruning.lottery_ticket(
            model, x[:2], pruning.rounds_to(share, rounds), train,
            rewind_to=copy.deepcopy(start.state_dict()), amount=pruning.Uniform,
            pattern=pruning.Unstructured(), score=score, seed=seed,
        )  # fmt: skip
        results[name] = accuracy(model)
        if name == "ticket":
            ticket = model
    kept = sum(int((m.weight != 0).sum()) for m in ticket if isinstance(m, nn.Linear))
    total = sum(m.weight.numel() for m in start if isinstance(m, nn.Linear))
    print(f"{kept:,} of {total:,} weights kept ({total / kept:.1f} times fewer)")
    print("\n".join(f"{name:<13}{100 * value:6.2f} %" for name, value in results.items()))
    return results, ticket, kept / total


if __name__ == "__main__":
    main()
