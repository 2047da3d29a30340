import pytest
import torch
from torch import nn

from slimgemm.pruning.layers import check_finite, digest, find_layers, matches


def reasons(model, ignore=()):
    return {layer.name: layer.refusal for layer in find_layers(model, ignore)}


def test_kinds_and_reasons():
    class Own(nn.Linear):
        def forward(self, x):
            return x

    model = nn.Sequential(
        nn.Linear(4, 4), nn.Conv2d(4, 4, 1), nn.Conv1d(4, 4, 1), Own(4, 4), nn.Embedding(4, 4)
    )
    found = find_layers(model)
    assert [layer.kind for layer in found] == ["linear", "conv2d", "Conv1d", "Own", "Embedding"]
    assert found[0].refusal is None and found[1].refusal is None
    assert "Conv1d is neither" in found[2].refusal
    assert "its own forward" in found[3].refusal
    assert "Embedding is neither" in found[4].refusal


def test_tied_weights_are_refused_and_name_each_other():
    model = nn.Module()
    model.embed = nn.Embedding(6, 4)
    model.head = nn.Linear(4, 6, bias=False)
    model.head.weight = model.embed.weight
    assert "shared with embed.weight; untie it" in reasons(model)["head"]


def test_one_module_under_two_names_is_one_layer():
    layer = nn.Linear(4, 4)
    assert reasons(nn.Sequential(layer, layer)) == {"0": None}


def test_quantised_and_parametrised_weights_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    nn.utils.parametrizations.weight_norm(model[1])
    assert "quantised (torch.int8)" in reasons(model)["0"]
    assert any("parametri" in (r or "").lower() for r in reasons(model).values())


def test_ignore_by_name_parent_and_expression():
    model = nn.ModuleDict(
        {"head": nn.Linear(2, 2), "header": nn.Linear(2, 2), "body": nn.Sequential(nn.Linear(2, 2))}
    )
    assert reasons(model, ["head"])["head"] == "ignored (head)"
    assert reasons(model, ["head"])["header"] is None
    assert reasons(model, ["body"])["body.0"] == "ignored (body)"
    assert reasons(model, ["re:.*head"]) == {
        "head": "ignored (re:.*head)",
        "header": None,
        "body.0": None,
    }
    assert matches("a.b", ["re:a", "a", "c"]) == ["a"]


def test_ignore_that_covers_nothing_is_an_error():
    with pytest.raises(ValueError, match="'haed', which covers no layer; layers are 0"):
        find_layers(nn.Sequential(nn.Linear(2, 2)), ["haed"])
    with pytest.raises(ValueError, match=r"write \['head'\]"):
        find_layers(nn.Sequential(nn.Linear(2, 2)), "head")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_not_finite_names_the_place(value):
    weight = torch.zeros(3, 4)
    weight[1, 2] = value
    with pytest.raises(ValueError, match=r"fc.weight\[1, 2\] is -?(nan|inf) \(1 such"):
        check_finite("fc", weight)
    check_finite("fc", torch.zeros(3))


def test_digest_sees_every_bit_the_shape_and_the_dtype():
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    known = digest(x)
    assert digest(x.clone()) == known
    assert digest(-x) != known  # -0.0
    assert digest(x.reshape(3, 2)) != known
    assert digest(x.half()) != known
    assert digest(torch.arange(6.0).reshape(2, 3).T) == digest(
        torch.arange(6.0).reshape(2, 3).T.contiguous()
    )
