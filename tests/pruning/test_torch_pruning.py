"""Coupled groups beside those of torch-pruning's DependencyGraph, found by other means.

Both answer the same question: which output channels go with channel i of a layer. Groups are
compared as sets of (layer, "out" or "in", channel) for every channel of every layer.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimgemm.pruning import channels
from slimgemm.pruning.layers import find_layers
from slimgemm.pruning.proof import apply_surgery
from slimgemm.pruning.trace import trace
from tests.pruning.norm_models import make

tp = pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.norm_a = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.b, self.norm_b = nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.norm_b(self.b(F.relu(self.norm_a(self.a(x))))))
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.c, self.d = nn.Conv2d(10, 5, 3, padding=1), nn.Conv2d(15, 7, 1)
        self.head = nn.Conv2d(7, 3, 1)

    def forward(self, x):
        one = F.relu(self.a(x))
        two = torch.cat([one, F.relu(self.b(one))], 1)
        return self.head(F.relu(self.d(torch.cat([two, F.relu(self.c(two))], 1))))


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.dw = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.out = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.head(F.relu(self.out(F.relu6(self.norm(self.dw(self.stem(x)))))))


class Excite(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.out(x * gate)


class Flattened(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 16, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(F.relu(self.b(torch.flatten(F.max_pool2d(self.a(x), 2), 1))))


class Feedforward(nn.Module):
    """A pre-norm transformer block's MLP beside its residual stream."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((x + self.down(F.gelu(self.up(self.norm(x))))).mean(1))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(F.relu(self.mid(F.relu(self.stem(x)))))


def prepared(kind):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(1, 3, 8, 8)
    return model, x


def ours(model, x):
    """(layer, channel) -> {(module, side, channel)} of everything that goes with it."""
    coupling = trace(model, x, channels.pinned_by(model, find_layers(model), ()))
    everything = {}
    for (name, axis), ids in coupling.axes.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight":
            for place, root in enumerate(coupling.sets.roots(ids).tolist()):
                side = "in" if axis == 1 else "out"
                everything.setdefault(root, set()).add((owner, side, place))
    groups = {}
    for layer in find_layers(model):
        roots = coupling.sets.roots(coupling.axes[f"{layer.name}.weight", 0]).tolist()
        for channel, root in enumerate(roots):
            if coupling.sets.reason(root) is None:
                groups[layer.name, channel] = everything[root]
    return groups


def theirs(model, x, wanted):
    """The same by torch-pruning, for the (layer, channel) pairs asked for."""
    with torch.enable_grad():
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for name, channel in wanted:
        layer = model.get_submodule(name)
        prune = (
            tp.prune_linear_out_channels
            if isinstance(layer, nn.Linear)
            else (
                tp.prune_depthwise_conv_out_channels
                if getattr(layer, "groups", 1) == layer.weight.shape[0]
                else tp.prune_conv_out_channels
            )
        )
        members = set()
        for dependency, places in graph.get_pruning_group(layer, prune, idxs=[channel]):
            module = dependency.target.module
            if module not in names:
                continue  # an operation, not a layer
            side = "out" if graph.is_out_channel_pruning_fn(dependency.handler) else "in"
            members |= {(names[module], side, place) for place in places}
        found[name, channel] = members
    return found


def columns_of(model, members):
    """A layer whose weight has no axis of inputs (batch norm, depthwise) has one side only."""
    narrow = {
        name for name, module in model.named_modules()
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm))
        or (isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1)
    }  # fmt: skip
    return {(name, "out" if name in narrow else side, place) for name, side, place in members}


@pytest.mark.parametrize(
    "make, layers",
    [
        (Block, {"stem", "a", "b"}),
        (Dense, {"a", "b", "c", "d"}),
        (Depthwise, {"stem", "dw", "out"}),
        (Excite, {"stem", "squeeze", "excite"}),
        (Flattened, {"a", "b"}),
        (Feedforward, {"patches", "up", "down"}),
    ],
)
def test_groups_are_those_of_torch_pruning(make, layers):
    model, x = prepared(make)
    groups = ours(model, x)
    assert {name for name, _ in groups} == layers
    for key, members in theirs(model, x, groups).items():
        assert columns_of(model, groups[key]) == columns_of(model, members), key


def test_grouped_convolutions_lose_one_channel_of_each_group_here():
    """torch-pruning names one channel; what the other groups lose it picks when it prunes."""
    model, x = prepared(Grouped)
    groups = ours(model, x)
    wide = {channel for name, side, channel in groups["mid", 0] if (name, side) == ("mid", "out")}
    assert wide == {0, 2, 4, 6}
    assert theirs(model, x, [("mid", 0)])["mid", 0] == {("mid", "out", 0), ("head", "in", 0)}


def test_grouped_norms_lose_one_channel_of_each_group_here():
    """torch-pruning drops one channel, and the groups of the norm no longer divide its width."""
    model, x = make("groups"), torch.randn(2, 3, 8, 8)
    groups = ours(model, x)
    sides = (("stem", "out"), ("norm", "out"), ("mid", "in"))
    four = {(*side, channel) for side in sides for channel in (0, 4, 8, 12)}
    assert groups["stem", 0] == groups["stem", 8] == four
    assert theirs(model, x, [("stem", 0)])["stem", 0] == {m for m in four if m[2] == 0}


def test_grouped_queries_go_as_whole_heads_here(attention):
    """torch-pruning needs the number of heads; without it a key's channel would go alone."""
    model, x = attention(), torch.randn(2, 5, 16)
    groups = ours(model, x)
    pair = {(name, "out", i) for name in "kv" for i in range(4)}  # one pair serves two queries
    pair |= {member for i in range(8) for member in (("q", "out", i), ("o", "in", i))}
    assert groups["k", 0] == groups["q", 5] == pair
    assert theirs(model, x, [("k", 0)])["k", 0] == {("k", "out", 0)}


def test_channels_under_a_layer_norm_go_in_both_with_the_same_outputs():
    """Both norms take their moments over the channels that stay."""
    model, x = prepared(Feedforward)
    nn.init.normal_(model.norm.weight), nn.init.normal_(model.norm.bias)
    peer, gone = copy.deepcopy(model), [1, 4, 6]
    graph = tp.DependencyGraph().build_dependency(peer, example_inputs=x)
    graph.get_pruning_group(peer.patches, tp.prune_conv_out_channels, idxs=gone).prune()
    coupling = trace(model, x, channels.pinned_by(model, find_layers(model), ()))
    roots = coupling.sets.roots(coupling.axes["patches.weight", 0])[gone]
    apply_surgery(model, channels.cut(model, coupling, sorted(roots.tolist()), x))
    assert repr(model) == repr(peer) and model.norm.normalized_shape == (5,)
    assert torch.equal(model(x), peer(x))


def test_an_operation_that_mixes_channels_pins_them_here():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.b(torch.cumsum(self.a(x), 1))

    model, x = prepared(Mixed)
    assert ours(model, x) == {}
    assert theirs(model, x, [("a", 0)])["a", 0] == {("a", "out", 0), ("b", "in", 0)}


def test_frozen_parameters_are_seen_here():
    model, x = prepared(Block)
    groups = ours(model, x)
    model.requires_grad_(False)
    assert ours(model, x) == groups and groups
    with pytest.raises(ValueError, match="not in the dependency graph"):
        theirs(model, x, [("stem", 0)])
