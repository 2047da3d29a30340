import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimgemm import pruning
from slimgemm.pruning import reorder
from slimgemm.pruning.permutation import kept_magnitude
from tests.pruning.norm_models import vit


class Block(nn.Module):
    """A transformer block: `pairs` heads of keys and values, one of three ways to attend."""

    def __init__(self, width, heads, pairs, way):
        super().__init__()
        self.size, self.way, self.times = width // heads, way, heads // pairs
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, pairs * self.size)
        self.v = nn.Linear(width, pairs * self.size)
        self.o = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        b, t, _ = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(b, t, -1, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.way == "grouped":
            a = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (
                z[:, :, None].expand(-1, -1, self.times, -1, -1).reshape(b, -1, t, self.size)
                for z in (k, v)
            )
            if self.way == "eager":
                a = torch.softmax(q @ k.transpose(2, 3) / self.size**0.5, -1) @ v
            else:
                a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).reshape(b, t, -1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Embeddings of words and places, one block, a norm; a head, tied to the words, or none."""

    def __init__(self, way="expanded", heads=2, pairs=1, head=True):
        super().__init__()
        torch.manual_seed(6)
        self.words, self.places = nn.Embedding(11, 16), nn.Embedding(8, 16)
        self.block = Block(16, heads, pairs, way)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 11, bias=False) if head else None
        if head:
            self.head.weight = self.words.weight
        for parameter in self.parameters():
            if parameter.ndim == 1:  # norms of scale 1 and shift 0 look alike in any order
                nn.init.normal_(parameter)

    def forward(self, ids):
        places = torch.arange(ids.shape[1])[None]
        x = self.norm(self.block(self.words(ids) + self.places(places)))
        return x if self.head is None else self.head(x)


IDS = torch.tensor([[1, 5, 2, 9, 0], [3, 3, 7, 10, 4]])
HEADS = [("expanded", 2, 1), ("grouped", 2, 1), ("eager", 2, 2), ("expanded", 2, 2)]


@pytest.mark.parametrize(("way", "heads", "pairs"), HEADS, ids=str)
def test_a_transformer_with_a_head_is_reached_in_all_layers(way, heads, pairs):
    model = Transformer(way, heads, pairs)
    before, old = model(IDS), copy.deepcopy(model)
    found = pruning.permute(model, IDS, rounds=20)
    torch.testing.assert_close(model(IDS), before)
    assert found.layers == tuple(f"block.{n}" for n in ("q", "k", "v", "o", "up", "down"))
    assert found.left == {} and found.outputs == {}
    assert found.after > 1.01 * found.before
    for name in found.layers:
        assert not torch.equal(model.get_submodule(name).weight, old.get_submodule(name).weight)
    kept = sum(kept_magnitude(model.get_submodule(name).weight) for name in found.layers)
    assert kept == pytest.approx(found.after, rel=1e-6)
    assert model.head.weight is model.words.weight


def test_value_channels_stay_in_their_heads_and_queries_in_their_places():
    model = Transformer("grouped", 2, 1, head=False)
    before, old = model(IDS), copy.deepcopy(model)
    found = pruning.permute(model, IDS, rounds=20)
    torch.testing.assert_close(model(IDS), before)
    assert found.layers == ("block.o", "block.down")
    for name in ("q", "k"):
        now, then = getattr(model.block, name), getattr(old.block, name)
        assert torch.equal(now.weight, then.weight)
    rows = old.block.v.weight.tolist()
    order = [rows.index(row) for row in model.block.v.weight.tolist()]
    assert sorted(order) == list(range(8)) and order != list(range(8))
    assert torch.equal(model.block.v.bias, old.block.v.bias[order])
    both = [*order, *(8 + i for i in order)]  # the two query heads that share the values
    assert torch.equal(model.block.o.weight, old.block.o.weight[:, both])


def test_a_returned_residual_stream_stays_unless_its_outputs_may_be_reordered():
    model = Transformer(head=False)
    before = model(IDS)
    found = pruning.permute(model, IDS, rounds=5)
    assert found.left == dict.fromkeys(
        ("block.q", "block.k", "block.v", "block.up"), "it reaches the model's output"
    )
    found = pruning.permute(model, IDS, rounds=5, reorder_outputs=True)
    assert len(found.layers) == 6 and found.left == {}
    ((place, dim),) = found.outputs
    assert (place, dim) == (0, 2)
    after = model(IDS)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after.index_select(dim, found.outputs[place, dim]), before)


def test_layers_that_are_ignored_have_no_say():
    model = Transformer(head=False)
    found = pruning.permute(model, IDS, rounds=5, ignore=["block.down"])
    assert found.layers == ("block.o",) and "block.down" not in found.left


def test_a_score_of_inputs_decides_by_inputs(normal):
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
    with torch.no_grad():
        model[0].weight *= normal(32, 1, seed=1).exp()
    batches = [normal(64, 8, seed=i) for i in range(2)]

    def kept(model):
        hidden = torch.relu(model[0](torch.cat(batches)))
        norm = hidden.double().square().mean(0).sqrt()
        return kept_magnitude(model[2].weight.double() * norm)

    options = {"example_inputs": batches[0], "rounds": 50}
    by_size, by_inputs = copy.deepcopy(model), copy.deepcopy(model)
    pruning.permute(by_size, **options)
    found = pruning.permute(by_inputs, score=pruning.Wanda(), calibration=batches, **options)
    torch.testing.assert_close(by_inputs(batches[0]), model(batches[0]))
    assert found.layers == ("2",)
    assert found.before == pytest.approx(kept(model), rel=1e-5)
    assert found.after == pytest.approx(kept(by_inputs), rel=1e-5)
    assert found.after > kept(by_size) and found.after > 1.02 * found.before


def test_channels_that_are_told_apart_by_a_split_do_not_mix(normal):
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 32), nn.Linear(16, 4), nn.Linear(16, 4)
            self.d = nn.Linear(32, 4)

        def forward(self, x):
            y = self.a(x)
            left, right = y.chunk(2, dim=-1)
            return self.b(left.relu()) + self.c(right.tanh()) + self.d(y)

    torch.manual_seed(8)
    model, x = Split(), normal(3, 4)
    before, rows = model(x), model.a.weight.tolist()
    found = pruning.permute(model, x, rounds=20)
    torch.testing.assert_close(model(x), before)
    assert found.layers == ("b", "c", "d") and found.after > found.before
    order = [rows.index(row) for row in model.a.weight.tolist()]
    assert max(order[:16]) < 16 <= min(order[16:]) and order != list(range(32))


def test_an_operation_that_knows_places_keeps_them(normal):
    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.b(self.a(x).cumsum(-1))

    found = pruning.permute(Places(), normal(3, 4), rounds=2)
    assert found.layers == ()
    assert found.left == dict.fromkeys("ab", "it meets a tensor of fixed size")


def test_permute_keeps_the_outputs_and_raises_what_is_kept(residual, normal):
    x = normal(2, 3, 8, 8)
    residual.eval()
    dense, before = copy.deepcopy(residual), residual(x)
    found = pruning.permute(residual, x, rounds=20)
    torch.testing.assert_close(residual(x), before)
    assert {"b", "g"} <= set(found.layers) and found.after > found.before
    assert kept_magnitude(residual.b.weight) > kept_magnitude(dense.b.weight)
    assert not torch.equal(residual.bn.running_mean, dense.bn.running_mean)
    dense.load_state_dict(residual.state_dict())
    torch.testing.assert_close(dense(x), before)


def test_permute_attention_moves_hidden_units(attention, normal):
    model, x = attention(), normal(2, 5, 16)
    before = model(x)
    found = pruning.permute(model, x, rounds=20)
    torch.testing.assert_close(model(x), before)
    assert found.layers == ("down",) and found.after > found.before


def test_permute_puts_back_what_it_cannot_prove(normal):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.calls = nn.Linear(8, 8), nn.Linear(8, 8), 0

        def forward(self, x):
            self.calls += 1
            return self.b(self.a(x)) * self.calls  # not the same function twice

    model = Fixed()
    weight = model.a.weight.detach().clone()
    with pytest.raises(ValueError, match=r"cannot be reordered in this model: output 0 differs"):
        pruning.permute(model, normal(2, 8))
    assert torch.equal(model.a.weight, weight)


def test_refusals(mlp, normal):
    x = normal(2, 16)
    with pytest.raises(ValueError, match=r"permute needs a score of weights.*got SparseGPT"):
        pruning.permute(mlp, x, score=pruning.SparseGPT(), calibration=[x])
    with pytest.raises(ValueError, match=r"Wanda\(p=1\) needs calibration data; pass calibration="):
        pruning.permute(mlp, x, score=pruning.Wanda())
    pruning.plan(mlp, x, pattern=pruning.NofM(2, 4)).apply(mlp)
    with pytest.raises(ValueError, match=r"0 is pruned already; permute the dense model"):
        pruning.permute(mlp, x)


def test_a_forward_that_fails_puts_everything_back(mlp, normal, monkeypatch):
    runs = []

    def run(model, inputs):
        runs.append(model[0].weight.detach().clone())
        if len(runs) > 1:
            raise RuntimeError("out of memory")
        return model(inputs)

    monkeypatch.setattr(reorder, "run", run)
    before = copy.deepcopy(mlp.state_dict())
    with pytest.raises(ValueError, match="its forward failed: RuntimeError: out of memory; it is"):
        pruning.permute(mlp, normal(2, 16), rounds=5)
    assert not torch.equal(runs[1], runs[0])  # it had moved
    assert all(torch.equal(mlp.state_dict()[name], before[name]) for name in before)


def test_negative_scores_are_refused(mlp, normal):
    class Signed(pruning.Magnitude):
        def __call__(self, weight, context):
            return weight.float()

    with pytest.raises(ValueError, match=r"0: .*Signed\(p=1\) is negative; permute needs scores"):
        pruning.permute(mlp, normal(2, 16), score=Signed())


def test_the_stream_of_a_vision_transformer_with_its_parameters(normal):
    model, x = vit(), normal(2, 3, 8, 8)
    position, want = model.position.detach().clone(), model(x).detach()
    found = pruning.permute(model, x, rounds=20)
    assert {"blocks.0.qkv.0", "blocks.1.up", "head"} <= {*found.layers}
    torch.testing.assert_close(model(x), want)
    assert not torch.equal(model.position, position)
    assert torch.equal(model.position.sort(-1).values, position.sort(-1).values)
