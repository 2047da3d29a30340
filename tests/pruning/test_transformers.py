"""Models of the transformers library as they are: tied embeddings, grouped queries, their names."""

import copy

import pytest
import torch

from slimgemm import pruning, sparse_ops
from tests.pruning.norm_models import lively

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

IDS = torch.tensor([[1, 5, 2, 9, 0, 7, 30], [3, 3, 7, 10, 4, 8, 21]])
INPUTS = {"input_ids": IDS, "use_cache": False}
PROJECTIONS = [f"self_attn.{n}_proj" for n in "qkvo"]
PROJECTIONS += [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
LINEARS = [f"model.layers.{i}.{name}" for i in range(2) for name in PROJECTIONS]


SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
}


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES,
        num_hidden_layers=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        return model(**INPUTS).logits


def test_two_of_four_by_sparsegpt_packed_saved_and_loaded(tmp_path):
    model = llama()
    plan = pruning.plan(
        model,
        INPUTS,
        pattern=pruning.NofM(2, 4),
        score=pruning.SparseGPT(),
        calibration=[INPUTS, {**INPUTS, "input_ids": IDS.flip(1)}],
    )
    assert [entry.name for entry in plan.pruned] == LINEARS
    assert plan["model.embed_tokens"].refusal == "Embedding is neither a Linear nor a Conv2d"
    assert "shared with model.embed_tokens.weight; untie it" in plan["lm_head"].refusal
    plan.apply(model)
    pruned = copy.deepcopy(model)
    report = sparse_ops.compress(model, INPUTS)
    assert {row.name for row in report.layers if row.packed} == set(LINEARS)
    assert sparse_ops.verify(model, pruned, INPUTS).ok
    torch.testing.assert_close(logits(model), logits(pruned))
    sparse_ops.save(model, tmp_path / "packed")
    again = sparse_ops.load(llama, tmp_path / "packed").eval()
    assert torch.equal(logits(again), logits(model))
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_heads_and_hidden_channels_shrink(tmp_path):
    model = llama()
    plan = pruning.plan(model, INPUTS, pattern=pruning.Channels(), amount=pruning.Uniform(0.5))
    plan.apply(model)  # proves the outputs
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.weight.shape == (16, 32)  # one key-value head, its two queries
    assert layer.self_attn.v_proj.weight.shape == (8, 32)
    assert layer.self_attn.o_proj.weight.shape == (32, 16)
    assert layer.mlp.down_proj.weight.shape == (32, 32)
    sparse_ops.save(model, tmp_path / "narrow")
    again = sparse_ops.load(llama, tmp_path / "narrow").eval()
    assert torch.equal(logits(again), logits(model))


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SIZES,
        num_hidden_layers=2,
        num_labels=3,
    )
    return lively(transformers.BertForSequenceClassification(config))


def untied(kind):
    """A decoder whose head is not its embedding; qwen3 has norms inside its heads."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **SIZES,
        num_hidden_layers=1,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
    )
    return lively(getattr(transformers, f"{kind}ForCausalLM")(config))


def test_the_hidden_size_of_a_classifier_shrinks(tmp_path):
    model, inputs = bert(), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    dense = copy.deepcopy(model)
    pattern = pruning.Channels(multiple_of=4)
    plan = pruning.plan(model, inputs, pattern=pattern, amount=pruning.Uniform(0.5))
    assert plan["bert.embeddings.word_embeddings"].kept_shape == (32, 16)
    assert not plan.refused and "stay: 5 (bert.embeddings.LayerNorm" in str(plan)
    plan.apply(model)  # proves the outputs
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            assert module.embedding_dim == module.weight.shape[1] == 16, name
        if isinstance(module, torch.nn.LayerNorm):
            assert module.normalized_shape == (16,) and module.bias.shape == (16,), name
    block = model.bert.encoder.layer[1]
    assert block.intermediate.dense.weight.shape == (32, 16)
    assert block.attention.output.dense.weight.shape == (16, 16)  # two of four heads
    assert model.bert.pooler.dense.weight.shape == (16, 16)
    assert model.classifier.weight.shape == (3, 16)
    sparse_ops.save(model, tmp_path / "narrow")
    again = sparse_ops.load(bert, tmp_path / "narrow").eval()
    want = model(**inputs).logits.detach()
    assert torch.equal(again(**inputs).logits, want)
    assert sparse_ops.verify(again, dense).ok
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(3):
        loss = model(**inputs, labels=torch.tensor([0, 2])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = model(**inputs, labels=torch.tensor([0, 2])).loss
    assert after < loss and not torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("kind", ["Llama", "Gemma", "Qwen3"])
def test_norms_that_transformers_writes_by_hand(kind, tmp_path):
    model = untied(kind)
    pruning.plan(
        model, INPUTS, pattern=pruning.Channels(multiple_of=4), amount=pruning.Uniform(0.5)
    ).apply(model)  # proves the outputs
    layer = model.model.layers[0]
    assert model.model.norm.weight.shape == layer.input_layernorm.weight.shape == (16,)
    assert layer.self_attn.q_proj.weight.shape == layer.self_attn.o_proj.weight.shape == (16, 16)
    assert model.model.embed_tokens.weight.shape == model.lm_head.weight.shape == (32, 16)
    sparse_ops.save(model, tmp_path / "narrow")
    again = sparse_ops.load(lambda: untied(kind), tmp_path / "narrow").eval()
    assert torch.equal(logits(again), logits(model))


def test_a_tied_embedding_pins_the_stream():
    plan = pruning.plan(llama(), INPUTS, pattern=pruning.Channels(), amount=pruning.Uniform(0.5))
    assert plan["model.embed_tokens"].refusal == "Embedding is neither a Linear nor a Conv2d"
    norm = pruning.plan(
        llama(), INPUTS, pattern=pruning.Channels(), amount=pruning.Uniform(0.5),
        ignore=["model.norm"],
    )  # fmt: skip
    assert plan["model.layers.0.mlp.down_proj"].kept_shape == (32, 32)
    assert norm["model.layers.0.mlp.down_proj"].kept_shape == (32, 32)
    assert not any("moments" in note for note in norm.notes)


def test_every_layer_is_reached_by_a_permutation():
    model = llama()
    before = logits(model)
    found = pruning.permute(model, INPUTS, rounds=5)
    torch.testing.assert_close(logits(model), before)
    assert list(found.layers) == LINEARS and found.after > 1.01 * found.before
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_encoder_that_returns_its_stream():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        attn_implementation="eager",
    )
    model = transformers.BertModel(config).eval()
    before = model(IDS)
    found = pruning.permute(model, IDS, rounds=5, ignore=["pooler"])
    names = ("attention.output.dense", "output.dense")
    assert found.layers == tuple(f"encoder.layer.0.{name}" for name in names)
    assert set(found.left.values()) == {"it reaches the model's output"}
    found = pruning.permute(model, IDS, rounds=5, ignore=["pooler"], reorder_outputs=True)
    assert len(found.layers) == 6
    after = model(IDS)
    back = after[0].index_select(2, found.outputs[0, 2])
    torch.testing.assert_close(back, before[0])
    torch.testing.assert_close(after[1], before[1])  # the pooler reads the stream in any order
