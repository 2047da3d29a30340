"""How much to prune where: a sensitivity scan, then a search under a limit of MACs.

pip install scikit-learn && python examples/search_limits.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from slimgemm import pruning


def make_model():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def main(steps=200, short=10, long=100, step=0.1, folder=None, seed=0):
    torch.manual_seed(seed)
    data = load_digits()
    x, y = torch.tensor(data.images[:, None] / 16).float(), torch.tensor(data.target)
    train, test = torch.randperm(len(y)).split((1400, 397))
    batches = [(x[rows], y[rows]) for rows in train.split(64)]
    tune = pruning.FineTune(batches, F.cross_entropy, rate=2e-3)

    def accuracy(model):
        return 100 * float((model(x[test]).argmax(1) == y[test]).float().mean())

    model = make_model()
    tune(model, steps)

    # Each group of channels alone, and 2:4 in each layer alone.
    patterns = (pruning.Channels(multiple_of=4), pruning.NofM(2, 4))
    scan = pruning.scan(
        model, x[:8], accuracy, patterns=patterns, ratios=(0.25, 0.5, 0.75), show=False
    )
    print(scan)

    # All of them together: the best accuracy within 40 % of the MACs, fine-tuned.
    dense = pruning.count_macs(model, x[:8])
    search = pruning.Search(
        accuracy, max_macs=0.4 * dense.macs, method=pruning.NetAdapt(step=step), finetune=tune,
        short=short, long=long, patterns=patterns, folder=folder, show=False,
    )  # fmt: skip
    found = search.run(model, x[:8])
    print(dense, found, sep="\n")
    return scan, found, dense


if __name__ == "__main__":
    main()
