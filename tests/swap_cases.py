"""What the tests of compress share: pruned models, and a picture of all it must not change."""

import torch
from helpers import randn
from torch import nn

from slimgemm.kernels.reference import prune_dense_24_ref

X = randn(4, 16, seed=1)


def pruned(model, keep=2, group=4):
    """Every weight of a Linear, and of a Conv2d along its input channels, made keep:group."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, nn.Parameter):
            module.weight.data = prune_dense_24_ref(module.weight.data, keep, group)
        if isinstance(module, nn.Conv2d):
            taps = module.weight.data.permute(0, 2, 3, 1)
            kept = prune_dense_24_ref(taps.reshape(-1, taps.shape[-1]), keep, group)
            module.weight.data = kept.view(taps.shape).permute(0, 3, 1, 2).contiguous()
    return model


def mlp(seed=0):
    torch.manual_seed(seed)
    return pruned(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)))


def packed_names(report):
    return [layer.name for layer in report.packed]


def reasons(report):
    return {layer.name: layer.reason for layer in report.layers if not layer.packed}


def own_parameters(module):
    return dict(module.named_parameters(recurse=False))


def everything(model):
    """All that compress must not change, or must bring back: a comparable picture of `model`."""
    return {
        name: (
            type(module),
            module.training,
            {k: (id(v), v.clone(), v.requires_grad) for k, v in own_parameters(module).items()},
            {k: v for k, v in module.__dict__.items() if not k.startswith("_")},
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }  # fmt: skip


def assert_untouched(model, before):
    after = everything(model)
    assert after.keys() == before.keys()
    for name, (kind, training, parameters, attributes) in before.items():
        assert after[name][:2] == (kind, training) and after[name][3] == attributes
        for key, (identity, value, needs) in parameters.items():
            now = after[name][2][key]
            assert now[0] == identity and now[2] == needs and torch.equal(now[1], value)
