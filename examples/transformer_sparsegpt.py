"""2:4 of a small transformer on the characters of Python's help, in one shot, by three scores."""

import copy
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import nn

from slimgemm import pruning, sparse_ops


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def main(steps=400, width=128, length=64, calibration=32, seed=0):
    torch.manual_seed(seed)
    text = torch.tensor([*" ".join(topics.values()).encode("ascii", "ignore")])
    split = len(text) * 9 // 10

    def batch(start, stop, size):
        at = torch.randint(start, stop - length - 1, (size, 1)) + torch.arange(length + 1)
        return text[at[:, :-1]], text[at[:, 1:]]

    def loss(logits, target):
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    blocks, head = (Block(width), Block(width)), (nn.LayerNorm(width), nn.Linear(width, 128))
    dense = nn.Sequential(nn.Embedding(128, width), *blocks, *head)
    optimizer = torch.optim.AdamW(dense.parameters(), lr=2e-3)
    batches = [batch(0, split, 16) for _ in range(steps)]
    pruning.finetune(dense, optimizer, batches, loss, 1, show=False)
    held_out, data = batch(split, len(text), 128), [batch(0, split, calibration)[0]]
    models = {"dense": dense}
    options = {"pattern": pruning.NofM(keep=2, group=4), "calibration": data, "ignore": ["4"]}
    for score in (pruning.Magnitude(p=1), pruning.Wanda(), pruning.SparseGPT()):
        model = models[type(score).__name__] = copy.deepcopy(dense)
        pruning.plan(model, data[0], score=score, **options).apply(model)
    with torch.no_grad():
        results = {n: float(loss(m(held_out[0]), held_out[1])) for n, m in models.items()}
    packed = copy.deepcopy(models["SparseGPT"])
    sparse_ops.compress(packed, data[0])
    report = sparse_ops.verify(packed, models["SparseGPT"], data[0])
    print("\n".join(f"{n:<11}{v:.4f} nats per character" for n, v in results.items()))
    return results, models["SparseGPT"], report


if __name__ == "__main__":
    main()
