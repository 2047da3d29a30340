"""Network slimming: push batch-norm scales towards zero while training, then cut their channels.

pip install scikit-learn && python examples/network_slimming.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from slimgemm import pruning


def make_model(width=32):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AvgPool2d(4),
        nn.Flatten(), nn.Linear(width, 10),
    )  # fmt: skip


def main(epochs=12, finetune_epochs=6, strength=1e-3, share=0.5, seed=0):
    torch.manual_seed(seed)
    data = load_digits()
    x, y = torch.tensor(data.images[:, None] / 16).float(), torch.tensor(data.target)
    train, test = torch.randperm(len(y)).split((1400, 397))
    batches = [(x[rows], y[rows]) for rows in train.split(64)]
    model, rows = make_model(), []

    def note(step):
        model.eval()
        with torch.no_grad():
            accuracy = float((model(x[test]).argmax(1) == y[test]).float().mean())
        macs = pruning.count_macs(model, x[:1]).macs
        rows.append((step, accuracy, sum(p.numel() for p in model.parameters()), macs))

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    pruning.finetune(
        model, optimizer, batches, F.cross_entropy, epochs,
        penalty=pruning.BatchNormL1(strength), show=False,
    )  # fmt: skip
    note("dense")
    plan = pruning.plan(
        model, x[:8], pattern=pruning.Channels(multiple_of=8, floor=8),
        score=pruning.BatchNormScale(), amount=pruning.Global(share), ignore=["12"],
    )  # fmt: skip
    print(plan)  # the head has no norm behind it, so it is ignored and its inputs stay
    plan.apply(model)  # layers are narrower now; no special kernel is needed
    note("pruned")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    pruning.finetune(model, optimizer, batches, F.cross_entropy, finetune_epochs, show=False)
    note("fine-tuned")
    for step, accuracy, weights, macs in rows:
        print(f"{step:<12}{100 * accuracy:6.2f} %{weights:>9,} weights{macs:>11,} MACs per image")
    return rows, model


if __name__ == "__main__":
    main()
