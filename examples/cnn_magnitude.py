"""2:4 by magnitude on a small CNN: prune, fine-tune, pack, verify, save, load.

pip install scikit-learn && python examples/cnn_magnitude.py
"""

import copy
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from slimgemm import pruning, sparse_ops


def make_model():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def main(epochs=10, finetune_epochs=5, seed=0):
    torch.manual_seed(seed)
    data = load_digits()
    x, y = torch.tensor(data.images[:, None] / 16).float(), torch.tensor(data.target)
    train, test = torch.randperm(len(y)).split((1400, 397))
    batches = [(x[rows], y[rows]) for rows in train.split(64)]

    def accuracy(model):
        with torch.no_grad():
            return float((model(x[test]).argmax(1) == y[test]).float().mean())

    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    pruning.finetune(model, optimizer, batches, F.cross_entropy, epochs, show=False)
    results = {"dense": accuracy(model)}

    plan = pruning.plan(model, x[:8], pattern=pruning.NofM(keep=2, group=4))  # by magnitude
    print(plan)  # 2:4 drops nothing of the first convolution: it has one input
    plan.apply(model)
    results["pruned"] = accuracy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)  # finetune keeps the masks
    pruning.finetune(model, optimizer, batches, F.cross_entropy, finetune_epochs, show=False)
    results["fine-tuned"] = accuracy(model)
    reference = copy.deepcopy(model)
    print(sparse_ops.compress(model, x[:8]))
    report = sparse_ops.verify(model, reference, x[:8])
    with tempfile.TemporaryDirectory() as folder:
        sparse_ops.save(model, Path(folder, "packed"))
        again = sparse_ops.load(make_model, Path(folder, "packed"))
    results["loaded again"] = accuracy(again)
    print("\n".join(f"{step:<14}{100 * value:6.2f} %" for step, value in results.items()))
    return results, model, report


if __name__ == "__main__":
    main()
