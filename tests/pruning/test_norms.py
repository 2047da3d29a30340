"""Channels under normalisations shrink: the norm takes its moments over those that stay."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimgemm import pruning, sparse_ops
from slimgemm.pruning.coupling import without
from slimgemm.pruning.netadapt import NetAdapt
from slimgemm.pruning.snapshot import Snapshot, compose, load_snapshot, save_snapshot
from slimgemm.pruning.space import Allocation, Choices, Space
from tests.pruning.norm_models import MODELS, Mlp, Rms, ViT, lively, make, vit
from tests.pruning.test_space import check_prediction

HALF = {"pattern": pruning.Channels(), "amount": pruning.Uniform(0.5)}
# Modules of MODELS that carry the stream of 16 channels on axis 0 of their weights.
STREAM = ("stem", "mid", "down", "patches", "depthwise", "o")


def halved(name, normal, **options):
    """(smaller model, dense model, inputs, plan)."""
    dense, x = make(name), normal(*MODELS[name][1])
    model = copy.deepcopy(dense)
    plan = pruning.plan(model, x, **{**HALF, **options})
    plan.apply(model)
    return model, dense, x, plan


class OverKept(nn.Module):
    """A norm of the dense model in float64 that sees kept channels alone, written out here."""

    def __init__(self, norm, kept):
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x):
        dim = -1 if isinstance(self.norm, Rms) or x.ndim < 4 else 1
        if type(self.norm) is nn.LayerNorm:
            dim = -1
        part = x.index_select(dim, self.kept).movedim(dim, -1)
        groups = getattr(self.norm, "num_groups", 1)
        shape = part.shape
        part = part.unflatten(-1, (groups, -1))
        within = (-1,) if dim == -1 or isinstance(self.norm, nn.LayerNorm) else (1, 2, -1)
        if not isinstance(self.norm, (Rms, nn.RMSNorm)):
            part = part - part.mean(within, keepdim=True)
        eps = self.norm.eps or torch.finfo(torch.float32).eps
        part = (part / (part.square().mean(within, keepdim=True) + eps).sqrt()).reshape(shape)
        if getattr(self.norm, "weight", None) is not None:
            part = part * (getattr(self.norm, "offset", 0.0) + self.norm.weight[self.kept])
        if getattr(self.norm, "bias", None) is not None:
            part = part + self.norm.bias[self.kept]
        return torch.zeros_like(x).index_copy(dim, self.kept, part.movedim(-1, dim))


def oracle(dense, surgery):
    """The dense model in float64: zeros in its readers, norms over what is kept."""
    model = copy.deepcopy(dense).double()
    for name, columns in surgery.readers.items():
        model.get_parameter(name).data[:, columns] = 0
    for name, module in dict(model.named_modules()).items():
        if name in surgery.norms:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, OverKept(module, surgery.norms[name]))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_stream_shrinks_and_the_norm_sees_what_stays(name, normal, tmp_path):
    model, dense, x, plan = halved(name, normal)
    surgery = plan.surgery
    # with moments over all channels the outputs are others, but where each channel has its own
    own = name in ("a group each", "instance", "instance without a scale")
    assert own == (not surgery.norms)
    assert all(kept.numel() == 8 for kept in surgery.norms.values())
    widths = [m.weight.shape[0] for n, m in model.named_modules() if n.split(".")[-1] in STREAM]
    assert widths and set(widths) == {8}
    want = oracle(dense, surgery)(x.double())
    assert (model(x).double() - want).abs().max() <= 1e-5 * want.abs().max()
    others = oracle(dense, replace(surgery, norms={}))(x.double())
    assert ((model(x).double() - others).abs().max() <= 1e-5 * want.abs().max()) == own
    for norm in surgery.norms:
        assert "forward" not in model.get_submodule(norm).__dict__
    with warnings.catch_warnings(action="error"):  # InstanceNorm warns of another width
        model(x)
    # saved, and loaded into the user's own code
    sparse_ops.save(model, tmp_path / "out")
    again = sparse_ops.load(lambda: MODELS[name][0](), tmp_path / "out").eval()
    assert torch.equal(again(x), model(x)) and repr(again) == repr(model)
    assert sparse_ops.verify(again, dense).ok


def test_attributes_say_the_new_widths(normal):
    layer = halved("layer norm", normal)[0].norm
    assert layer.normalized_shape == (8,) and layer.kept_out.kept == 8
    assert halved("rms norm", normal)[0].norm.normalized_shape == (8,)
    groups = halved("groups", normal)[0].norm
    assert (groups.num_groups, groups.num_channels) == (4, 8)
    by_group = groups.kept_out.index.view(4, 2) - 4 * torch.arange(4)[:, None]
    assert bool((by_group == by_group[0]).all())  # channel j goes in every group
    each = halved("a group each", normal)[0].norm
    assert (each.num_groups, each.num_channels) == (8, 8)
    assert halved("instance", normal)[0].norm.num_features == 8
    kept = halved("rms norm by hand", normal)[0].norm.kept_parameters
    assert kept["weight"][0] == 0 and kept["weight"][1].kept == 8


def test_the_plan_says_that_moments_change(normal):
    *_, plan = halved("ViT", normal)
    note = next(note for note in plan.notes if "moments" in note)
    names = "blocks.0.norm1, blocks.0.norm2, blocks.1.norm1 ..."
    assert note.startswith("Normalisations that will take their moments over the channels that st")
    assert f"stay: 5 ({names}). The smaller model is not the dense one with zeros: fine-" in note
    assert note in str(plan)
    *_, plan = halved("layer norm", normal)
    assert "stay: 1 (norm). The" in plan.notes[0]
    assert not halved("instance", normal)[3].notes


def test_a_vision_transformer(normal, tmp_path):
    model, dense, x, plan = halved("ViT", normal)
    assert model.token.shape == (1, 1, 8) and model.position.shape == (1, 5, 8)
    kept = model.patches.kept_out.index
    assert torch.equal(model.token, dense.token[..., kept])
    assert torch.equal(model.position, dense.position[..., kept])
    assert {key: (axis, i.kept) for key, (axis, i) in model.kept_parameters.items()} == {
        "token": (2, 8),
        "position": (2, 8),
    }
    for block in model.blocks:
        assert block.qkv[0].weight.shape == (8, 8) and block.o.weight.shape == (8, 8)
        assert block.up.weight.shape == (16, 8) and block.down.weight.shape == (8, 16)
    assert model.head.weight.shape == (3, 8)
    entry = plan[""]
    assert (entry.shape, entry.kept_shape, entry.refusal) == ((1, 1, 16), (1, 1, 8), None)
    before = model(x).detach()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    optimizer.step()
    assert not torch.equal(model(x), before)
    sparse_ops.save(model, tmp_path / "out")
    again = sparse_ops.load(ViT, tmp_path / "out").eval()
    assert torch.equal(again(x), model(x)) and not torch.equal(again(x), before)
    with pytest.raises(ValueError, match=r"\.token is \[1, 1, 12\] in the model.*axis 2"):
        sparse_ops.load(lambda: _token_of_another_width(), tmp_path / "out")


def _token_of_another_width():
    model = ViT()
    model.token = nn.Parameter(torch.zeros(1, 1, 12))
    return model


def test_a_table_that_is_read_as_a_weight_too(normal):
    class Read(nn.Module):
        """The scores of 7 words, as a decoder without a head of its own takes them."""

        def __init__(self):
            super().__init__()
            self.words, self.norm = nn.Embedding(7, 16), nn.LayerNorm(16)
            self.up, self.down, self.out = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(7, 3)

        def forward(self, ids):
            x = self.words(ids[:, 1:])
            x = self.norm(x + self.down(F.gelu(self.up(x))))
            return self.out(F.linear(x, self.words.weight).relu())

    torch.manual_seed(0)
    model = lively(Read())
    pruning.plan(model, torch.tensor([[1, 5, 2], [0, 6, 3]]), **HALF).apply(model)
    assert model.words.weight.shape == (7, 8) and model.words.embedding_dim == 8
    assert model.out.in_features == 7 and model.down.out_features == 8
    assert "kept_in" not in model.words.__dict__


def test_least_squares_repairs_what_reads_the_stream(normal):
    dense, batches = make("layer norm"), [normal(64, 6, seed=seed) for seed in range(4)]
    errors = []
    for repair in (None, pruning.LeastSquares()):
        model = copy.deepcopy(dense)
        options = {
            **HALF,
            "repair": repair,
            "calibration": batches,
            "amount": pruning.Uniform(0.25),
        }
        pruning.plan(model, batches[0], **options).apply(model)  # which proves the outputs
        assert model.norm.normalized_shape == (12,)
        with torch.no_grad():
            errors.append(float((model(batches[1]) - dense(batches[1])).square().mean()))
    assert errors[1] < errors[0]


def test_packed_attention_pins_its_stream_alone(normal):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = lively(nn.Sequential(nn.Linear(6, 16), layer, nn.Linear(16, 3)))
    plan = pruning.plan(model, normal(2, 5, 6), **HALF)
    plan.apply(model)
    assert layer.linear1.weight.shape == (12, 16) and layer.norm1.normalized_shape == (16,)
    why = "1.self_attn: MultiheadAttention is neither a Linear nor a Conv2d"
    assert plan["0"].refusal == why
    assert plan.notes == (f"Output channels that stay: 1.linear2 (16 of 16): {why}",)


def test_a_second_cut_maps_to_the_first_axis(normal, tmp_path):
    model, dense, x, _ = halved("ViT", normal)
    first = model.position.detach().clone()
    pruning.plan(model, x, **HALF).apply(model)
    axis, kept = model.kept_parameters["position"]
    assert (axis, kept.width, kept.kept) == (2, 16, 4) and first.shape == (1, 5, 8)
    assert torch.equal(model.position, dense.position[..., kept.index])
    assert torch.equal(model.norm.weight, dense.norm.weight[model.norm.kept_out.index])
    assert model.norm.kept_out.width == 16 and model.norm.normalized_shape == (4,)
    sparse_ops.save(model, tmp_path / "out")
    again = sparse_ops.load(ViT, tmp_path / "out").eval()
    assert torch.equal(again(x), model(x)) and sparse_ops.verify(again, dense).ok


def test_widths_are_rounded_and_have_a_floor(normal):
    options = {"amount": pruning.Uniform(0.7)}
    model, *_ = halved("ViT", normal, pattern=pruning.Channels(multiple_of=8), **options)
    assert model.norm.normalized_shape == (8,) and model.token.shape == (1, 1, 8)
    model, *_ = halved("ViT", normal, pattern=pruning.Channels(floor=11), **options)
    assert model.norm.normalized_shape == (11,) and model.position.shape == (1, 5, 11)
    model, *_ = halved("groups", normal, pattern=pruning.Channels(multiple_of=3), **options)
    assert model.norm.num_channels == 12  # 3 of each of the 4 groups


def test_masks_are_cut_and_kept_in_training(normal):
    model, x = vit(), normal(2, 3, 8, 8)
    pruning.plan(model, x, pattern=pruning.NofM(2, 4), ignore=["patches"]).apply(model)
    pruning.plan(model, x, **HALF).apply(model)
    layer = model.blocks[0].up
    mask = pruning.mask_of(layer)
    assert mask.shape == layer.weight.shape == (16, 8) and not bool(mask.all())
    optimizer = pruning.keep_masks(torch.optim.AdamW(model.parameters(), 0.1), model)
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    optimizer.step()
    assert torch.equal(layer.weight != 0, mask)


@pytest.mark.parametrize("name", MODELS)
def test_predicted_costs_are_those_of_the_cut_model(name, normal):
    space = Space(make(name), normal(*MODELS[name][1]), Choices())
    for share in (0.25, 0.5):
        model = check_prediction(space, space.uniform(share))
    derived = Space(model, space.example_inputs, Choices(), coupling=_after(space, 0.5))
    traced = Space(model, space.example_inputs, Choices())
    assert derived.options == traced.options
    for group, options in traced.options.items():
        one = Allocation({group: options[-1]})
        assert derived.costs(one) == traced.costs(one)
        smaller = derived.apply(one)[0]  # which proves it
        assert repr(smaller) == repr(traced.apply(one)[0])


def _after(space, share):
    _, surgery = space.apply(space.uniform(share))
    return without(space.coupling, surgery.slices)


def test_two_cuts_are_one_in_a_snapshot(normal, tmp_path):
    dense, x = vit(), normal(2, 3, 8, 8)
    space = Space(dense, x, Choices())
    model, first = space.apply(space.uniform(0.25))
    again = Space(model, x, Choices())
    model, second = again.apply(again.uniform(0.5))
    save_snapshot(
        tmp_path / "s.safetensors", Snapshot(model, compose(first, second), Allocation(), 0.0)
    )
    loaded = load_snapshot(tmp_path / "s.safetensors", dense).model.eval()
    assert torch.equal(loaded(x), model(x)) and repr(loaded) == repr(model)
    kept = (m.kept_parameters["token"][1].index.tolist() for m in (loaded, model))
    assert next(kept) == next(kept)


def test_the_plan_predicts_the_macs_of_the_cut_stream(normal):
    model, x = vit(), normal(2, 3, 8, 8)
    plan = pruning.plan(model, x, **HALF)
    before = pruning.count_macs(model, x).macs
    plan.apply(model)
    after = pruning.count_macs(model, x).macs
    assert after == sum(entry.pruned_macs for entry in plan.pruned) < 0.3 * before


def test_a_search_cuts_the_stream(blobs):
    torch.manual_seed(0)
    model = Mlp(nn.LayerNorm(16))
    model.stem, model.head = nn.Linear(16, 16), nn.Linear(16, 4)
    blobs.tune(model, 60)
    limit = 0.4 * pruning.count_macs(model, blobs.example).macs
    found = pruning.Search(
        blobs.accuracy, method=NetAdapt(step=0.25), patterns=(pruning.Channels(multiple_of=4),),
        finetune=blobs.tune, short=3, long=20, show=False, max_macs=limit,
    ).run(model, blobs.example)  # fmt: skip
    width = found.model.norm.weight.numel()
    assert found.model.norm.normalized_shape == (width,) and width < 16
    assert found.predicted.macs == found.measured.macs <= limit
    assert found.predicted.params == found.measured.params
    assert found.drop < 15 and found.value == blobs.accuracy(found.model.eval())
