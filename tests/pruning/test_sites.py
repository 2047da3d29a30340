import pytest
import torch
from torch import nn

from slimgemm.pruning.sites import find_sites, inputs_of


def test_every_site_makes_its_own_layer_again(residual, normal):
    sites = find_sites(residual, normal(2, 3, 8, 8))
    assert list(sites) == ["stem", "a", "b", "dw", "squeeze", "excite", "c", "d", "f", "g"]
    for name, site in sites.items():
        module, x = site.make(*site.weight[:2])
        own = residual.get_submodule(name)
        assert module.weight.shape == own.weight.shape and x.shape == site.input
        assert module(x).nbytes * site.calls == site.output_bytes
        if isinstance(own, nn.Conv2d):
            assert (module.groups, module.padding) == (own.groups, own.padding)


def test_widths_change_and_depthwise_groups_follow(residual, normal):
    sites = find_sites(residual, normal(2, 3, 8, 8))
    module, x = sites["dw"].make(10, 1)
    assert sites["dw"].depthwise and module.groups == 10 and x.shape[1] == 10
    module, x = sites["d"].make(16, 5)
    assert module.groups == 4 and x.shape[1] == 20 and module(x).shape[1] == 16
    module, x = sites["f"].make(7, 100)
    assert module(x).shape == (2, 7)


def test_the_signature_holds_all_but_the_widths(normal):
    def signature(module, *shape):
        return find_sites(module, normal(*shape))[""].signature

    base = signature(nn.Conv2d(4, 8, 3), 2, 4, 8, 8)
    assert base == signature(nn.Conv2d(6, 5, 3), 2, 6, 8, 8)
    others = [
        signature(nn.Conv2d(4, 8, 3, stride=2), 2, 4, 8, 8),
        signature(nn.Conv2d(4, 8, 3, padding=1), 2, 4, 8, 8),
        signature(nn.Conv2d(4, 8, 3, bias=False), 2, 4, 8, 8),
        signature(nn.Conv2d(4, 8, 3, groups=2), 2, 4, 8, 8),
        signature(nn.Conv2d(4, 8, 3), 3, 4, 8, 8),
        signature(nn.Conv2d(4, 8, 3), 2, 4, 9, 8),
        signature(nn.Linear(4, 8), 2, 4),
        signature(nn.Linear(4, 8), 2, 3, 4),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_channels_last_is_seen(normal):
    x = normal(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    site = find_sites(nn.Conv2d(4, 8, 3), x)[""]
    assert site.channels_last and "channels_last" in site.signature
    assert site.make(8, 4)[1].is_contiguous(memory_format=torch.channels_last)


def test_inputs_are_those_of_the_layers(mlp, normal):
    x = normal(3, 16)
    found = inputs_of(mlp, ["0", "2"], x)
    assert torch.equal(found["0"], x)
    assert torch.equal(found["2"], mlp[1](mlp[0](x)))
    assert not mlp[0]._forward_pre_hooks


@pytest.mark.parametrize("kind", [nn.ConvTranspose2d, nn.Conv1d])
def test_what_cannot_be_cut_is_no_site(kind, normal):
    x = normal(1, 3, 4) if kind is nn.Conv1d else normal(1, 3, 4, 4)
    assert find_sites(kind(3, 5, 2), x) == {}
