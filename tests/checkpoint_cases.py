"""The model that the tests of save and load share."""

import torch
from helpers import randn
from torch import nn

from slimgemm.kernels.reference import prune_dense_24_ref
from slimgemm.sparse_ops import compress

X = randn(4, 20, seed=1)


class Net(nn.Module):
    """Packed layers, a dense one, two tied ones, one under two names, a norm with buffers."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(20, 16)
        self.norm = nn.BatchNorm1d(16)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.b.weight = self.a.weight
        self.mix = self.again = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        y = self.norm(self.fc1(x)).relu()
        return self.head(self.again(self.mix(self.b(self.a(y)))))


def packed_net(dtype=torch.float32):
    torch.manual_seed(0)
    model = Net().to(dtype)
    for layer in (model.fc1, model.a, model.mix):
        layer.weight.data = prune_dense_24_ref(layer.weight.data)
    model(X.to(dtype))  # statistics of the norm
    assert len(compress(model, X.to(dtype)).packed) == 4
    return model


def assert_same(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name])


def never():
    raise AssertionError("the model was made")
