"""Channel pruning of a residual network: channels that meet in a sum go together.

pip install scikit-learn && python examples/residual_channels.py
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from slimgemm import pruning, sparse_ops


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.conv2(F.relu(self.norm(self.conv1(x)))))


def make_model(width=32):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), Residual(width), nn.AvgPool2d(2), Residual(width),
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(width, 10),
    )  # fmt: skip


def main(epochs=8, finetune_epochs=6, seed=0):
    torch.manual_seed(seed)
    data = load_digits()
    x, y = torch.tensor(data.images[:, None] / 16).float(), torch.tensor(data.target)
    train, test = torch.randperm(len(y)).split((1400, 397))
    batches = [(x[rows], y[rows]) for rows in train.split(64)]
    model, results, half = make_model(), {}, pruning.Uniform(0.5)
    for step, steps in (("dense", epochs), ("halved", 0), ("fine-tuned", finetune_epochs)):
        if step == "halved":
            plan = pruning.plan(model, x[:8], pattern=pruning.Channels(), amount=half)
            print(plan)
            plan.apply(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        pruning.finetune(model, optimizer, batches, F.cross_entropy, steps, show=False)
        model.eval()
        with torch.no_grad():
            results[step] = float((model(x[test]).argmax(1) == y[test]).float().mean())
    with tempfile.TemporaryDirectory() as folder:  # a narrow model loads from the wide one's code
        sparse_ops.save(model, Path(folder, "narrow"))
        again = sparse_ops.load(make_model, Path(folder, "narrow")).eval()
    print("\n".join(f"{step:<12}{100 * value:6.2f} %" for step, value in results.items()))
    return results, model, again


if __name__ == "__main__":
    main()
