"""SAT in encoders of transformers: equal to eager attention at full density, padding honoured, three phases."""

import gc
import weakref
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AttentionInterface,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from sat_lib.attention.layout import BlockLayout
from sat_lib.common.errors import InputError
from sat_lib.pretrained import weights
from sat_lib.pretrained.encoders import attention_maps, load_model, load_tokenizer
from sat_lib.pretrained.sparse_attention import OWNER, SparseAttention

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def bert(device="cpu", **more):
    torch.manual_seed(0)
    config = BertConfig(**SIZES, **({**NO_DROPOUT, "vocab_size": 50, "max_position_embeddings": 64} | more))
    return BertForSequenceClassification(config).to(device)


def bert_inputs(device="cpu", batch=3, length=45):
    """Token ids with 0, 4 and 33 tokens of padding: 45 is no multiple of any block."""
    torch.manual_seed(1)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1, -4:], mask[2, -33:] = 0, 0
    tokens = torch.randint(1, 50, (batch, length)) * mask
    return {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}


def vit(device="cpu"):
    """197 tokens, like the usual ViT: 224 pixels in patches of 16."""
    torch.manual_seed(0)
    config = ViTConfig(**SIZES, **NO_DROPOUT, image_size=56, patch_size=4, num_channels=1)
    return ViTForImageClassification(config).to(device)


def vit_inputs(device="cpu", batch=2):
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(batch, 1, 56, 56, device=device)}


MODELS = {"bert": (bert, bert_inputs), "vit": (vit, vit_inputs)}


@pytest.fixture(params=MODELS)
def case(request, device):
    make, inputs = MODELS[request.param]
    return make(device), inputs(device)


def results(model, inputs):
    """Logits, and the gradient of each parameter that has one."""
    model.zero_grad()
    logits = model(**inputs).logits
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pruned", ["zero", "drop"])
@pytest.mark.parametrize("phase", ["dense", "sparse, all blocks"])
def test_equals_eager_attention(case, phase, pruned):
    model, inputs = case
    model.set_attn_implementation("eager")
    wanted, wanted_gradients = results(model, inputs)
    sat = SparseAttention(model, inputs, pruned=pruned)
    if phase != "dense":
        blocks = -(-sat.length // sat.block)
        sat.enter_sparse_phase([BlockLayout.full(blocks, blocks, sat.block)] * 2)
    logits, gradients = results(model, inputs)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-3, atol=2e-4, msg=name)


def test_what_padding_holds_changes_nothing(device):
    """In either phase: other token ids under the mask, the same logits; without the mask they differ."""
    model, inputs = bert(device), bert_inputs(device)
    changed = inputs | {"input_ids": torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 7)}
    sat = SparseAttention(model, inputs, density=0.5)
    model.eval()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(**changed).logits, model(**inputs).logits)
            unmasked = model(input_ids=changed["input_ids"]).logits
            assert not torch.allclose(unmasked, model(**inputs).logits, atol=1e-4)
            grid = torch.eye(3, dtype=torch.bool)
            grid[:, 0] = True
            sat.enter_sparse_phase([BlockLayout(grid, 16)] * 2)


def test_sparse_phase_equals_eager_attention_under_a_mask_of_entries(device):
    """pruned="drop" under a layout per layer: eager attention with the same entries masked, padding too."""
    model, inputs = bert(device), bert_inputs(device)
    grids = [torch.tensor(grid, dtype=torch.bool) for grid in ([[1, 1, 0], [1, 0, 1], [1, 0, 0]],) * 2]
    entries = grids[0].repeat_interleave(16, 0).repeat_interleave(16, 1)[:45, :45].to(device)
    allowed = entries[None, None] & inputs["attention_mask"].bool()[:, None, None]
    model.set_attn_implementation("eager")
    bias = torch.zeros(allowed.shape, device=device).masked_fill(~allowed, torch.finfo(torch.float32).min)
    wanted, _ = results(model, inputs | {"attention_mask": bias})
    sat = SparseAttention(model, inputs, pruned="drop")
    sat.enter_sparse_phase([BlockLayout(grid, 16) for grid in grids])
    logits, _ = results(model, inputs)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


def test_another_scale_than_the_usual_one(monkeypatch):
    model, inputs = bert(), bert_inputs()
    for layer in model.bert.encoder.layer:
        layer.attention.self.scaling = 0.9
    model.set_attn_implementation("eager")
    wanted, _ = results(model, inputs)
    SparseAttention(model, inputs)
    torch.testing.assert_close(results(model, inputs)[0], wanted, rtol=1e-4, atol=1e-5)


def train(model, sat, inputs, steps):
    optimiser = torch.optim.SGD([*model.parameters(), *sat.parameters()], lr=0.01)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        logits = model(**inputs).logits
        loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
        (loss + sat.loss()).backward()
        optimiser.step()
        sat.step()


def test_three_phases(case):
    model, inputs = case
    sat = SparseAttention(model, inputs, density=0.3, switch_at=2)
    before = sat.sparsity[0].weight.clone()
    train(model, sat, inputs, 2)
    assert (sat.phase, sat.transition_step) == ("dense", None)
    assert not torch.equal(sat.sparsity[0].weight, before), "W^P didn't train"
    train(model, sat, inputs, 1)
    blocks = -(-sat.length // 16)
    assert (sat.phase, sat.transition_step) == ("sparse", 2)
    assert [layout.kept_blocks for layout in sat.layouts] == [int(blocks**2 * 0.3)] * 2
    kept = sat.sparsity[0]().flatten().topk(int(blocks**2 * 0.3)).values.min()
    assert bool((sat.sparsity[0]()[sat.layouts[0].grid] >= kept).all())
    frozen = sat.sparsity[0].weight.clone()
    train(model, sat, inputs, 2)
    assert torch.equal(sat.sparsity[0].weight, frozen)
    assert float(sat.loss()) == 0 and sat.step() is False


def test_statistics_are_those_of_the_eager_maps(case):
    """The target of W^P and what the transition test sees, layer by layer."""
    model, inputs = case
    maps = attention_maps(model, inputs)
    sat = SparseAttention(model, inputs, block=16)
    model.train()
    model(**inputs)
    for layer, attention in enumerate(maps):
        torch.testing.assert_close(sat._seen[layer].mean_map, attention.mean((0, 1)), rtol=1e-3, atol=1e-6)
    targets = [F.avg_pool2d(attention.mean((0, 1))[None], 16, ceil_mode=True)[0] for attention in maps]
    losses = [(target - parameter()).square().mean() for target, parameter in zip(targets, sat.sparsity, strict=True)]
    torch.testing.assert_close(sat.loss(), 0.02 * sum(losses))


def test_gradient_of_the_loss_reaches_w_p_alone():
    model, inputs = bert(), bert_inputs()
    sat = SparseAttention(model, inputs)
    model.train()
    model(**inputs)
    sat.loss().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in sat.parameters())


def test_the_test_switches_by_itself():
    model, inputs = vit(), vit_inputs()
    sat = SparseAttention(model, inputs, theta=-10.0, delta=1e9)
    train(model, sat, inputs, 2)
    assert sat.phase == "dense", "steps 0 and 1 cannot pass"
    train(model, sat, inputs, 1)
    assert (sat.phase, sat.transition_step, len(sat.tests)) == ("sparse", 2, 2)


def test_pooled_pattern_keeps_the_blocks_with_most_attention():
    model, inputs = bert(), bert_inputs()
    sat = SparseAttention(model, inputs, pattern="pooled", switch_at=0, density=0.34)
    pooled = [F.avg_pool2d(a.mean((0, 1))[None], 16, ceil_mode=True)[0] for a in attention_maps(model, inputs)]
    train(model, sat, inputs, 1)
    for target, layout in zip(pooled, sat.layouts, strict=True):
        assert set(layout.grid.flatten().nonzero().flatten().tolist()) == set(target.flatten().topk(3).indices.tolist())


def test_evaluation_takes_no_statistics():
    model, inputs = bert(), bert_inputs()
    sat = SparseAttention(model, inputs)
    model.eval()(**inputs)
    assert not sat._seen
    with pytest.raises(InputError, match=r"forward of the model in training mode before loss\(\)"):
        sat.loss()


def test_detach_gives_the_model_back():
    model, inputs = bert(), bert_inputs()
    model.set_attn_implementation("eager")
    wanted = model.eval()(**inputs).logits
    SparseAttention(model, inputs).detach()
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model.eval()(**inputs).logits, wanted)
    SparseAttention(model, inputs)  # and may take it up again


def test_a_copy_has_sat_of_its_own():
    model, inputs = bert(), bert_inputs()
    sat = SparseAttention(model, inputs, switch_at=0)
    copy = deepcopy(model)
    train(model, sat, inputs, 1)
    assert sat.phase == "sparse" and copy.train()(**inputs).logits.requires_grad
    owners = {module.__dict__[OWNER] for module in copy.modules()}
    assert len(owners) == 1 and owners.pop().phase == "dense"


def test_nothing_keeps_a_model_alive():
    model, inputs = bert(), bert_inputs()
    sat = SparseAttention(model, inputs, switch_at=0)
    train(model, sat, inputs, 1)
    alive = weakref.ref(model)
    del model, sat
    gc.collect()
    assert alive() is None


def test_attention_maps_leave_the_model_as_it_was(case):
    model, inputs = case
    model.train()
    before = model.config._attn_implementation
    maps = attention_maps(model, inputs)
    assert (model.training, model.config._attn_implementation) == (True, before)
    batch, length = len(maps[0]), maps[0].shape[-1]
    assert [tuple(attention.shape) for attention in maps] == [(batch, 4, length, length)] * 2
    torch.testing.assert_close(maps[0].sum(-1), torch.ones_like(maps[0][..., 0]))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"pruned": "half"}, "pruned: wanted one of"),
        ({"pattern": "best"}, "pattern: wanted one of"),
        ({"block": 0}, "block: wanted 1 to the length of 45 positions; got 0"),
        ({"block": 46}, "block: wanted 1 to the length of 45 positions; got 46"),
        ({"density": 0.01}, "density: 0.01 of 9 blocks keeps none"),
        ({"sparsity_init": "zero"}, "init: wanted one of"),
    ],
)
def test_settings_out_of_range(settings, message):
    model, inputs = bert(), bert_inputs()
    before = model.config._attn_implementation
    with pytest.raises(InputError, match=message):
        SparseAttention(model, inputs, **settings)
    assert model.config._attn_implementation == before, "the model is as it was"
    SparseAttention(model, inputs)


def test_more_tokens_than_positions():
    with pytest.raises(InputError, match="input_ids: the model has 64 positions; got 65 tokens"):
        SparseAttention(bert(), bert_inputs(length=65))


def test_batches_of_another_length():
    model = bert()
    SparseAttention(model, bert_inputs())
    with pytest.raises(InputError, match=r"wanted the 45 positions of the example batch; got 44[.] Pad to that length"):
        model(**bert_inputs(length=44))


def test_models_without_the_attention_interface():
    with pytest.raises(InputError, match="got Linear, which has no attention interface"):
        SparseAttention(torch.nn.Linear(2, 2), {})


def test_layers_that_share_their_attention():
    config = AlbertConfig(**SIZES, **NO_DROPOUT, vocab_size=50, embedding_size=16)
    with pytest.raises(InputError, match="several layers share one AlbertAttention"):
        SparseAttention(AlbertForSequenceClassification(config), bert_inputs())


def test_models_that_never_call_the_interface():
    model = bert()
    for layer in model.bert.encoder.layer:
        layer.attention = torch.nn.Identity()
        layer.attention.forward = lambda hidden, *_, **__: (hidden, None)
    with pytest.raises(InputError, match="BertForSequenceClassification doesn't call the attention interface"):
        SparseAttention(model, bert_inputs())


def test_causal_models():
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, pad_token_id=0, attn_pdrop=0.0)
    with pytest.raises(InputError, match="this one is causal or windowed"):
        SparseAttention(GPT2ForSequenceClassification(config), bert_inputs())


def test_dropout_in_the_attention():
    model, inputs = bert(attention_probs_dropout_prob=0.1), bert_inputs()
    SparseAttention(model, inputs)
    with pytest.raises(InputError, match=r"dropout: SAT's attention has none; BertSelfAttention wants 0[.]1"):
        model.train()(**inputs)


def test_attention_with_more_than_queries_keys_and_a_mask():
    model, inputs = bert(), bert_inputs()
    sat = SparseAttention(model, inputs)
    module, x = next(iter(sat._places)), torch.rand(3, 4, 45, 16)
    with pytest.raises(InputError, match="BertSelfAttention wants attention with softcap"):
        AttentionInterface()["sat"](module, x, x, x, None, scaling=0.25, softcap=30.0)


def test_masks_of_entries():
    model, inputs = bert(), bert_inputs()
    SparseAttention(model, inputs)
    with pytest.raises(InputError, match=r"attention_mask: wanted \(B, L\)"):
        model(**inputs | {"attention_mask": torch.zeros(3, 1, 45, 45)})


def test_two_at_once():
    model, inputs = bert(), bert_inputs()
    SparseAttention(model, inputs)
    with pytest.raises(InputError, match="has SAT already"):
        SparseAttention(model, inputs)


def test_layouts_that_do_not_fit():
    model, inputs = bert(), bert_inputs()
    sat = SparseAttention(model, inputs)
    with pytest.raises(InputError, match="layouts: wanted 2, one per layer; got 1"):
        sat.enter_sparse_phase([BlockLayout.full(3, 3, 16)])
    with pytest.raises(InputError, match="layout: 45 queries and 45 keys"):
        sat.enter_sparse_phase([BlockLayout.full(4, 4, 16)] * 2)
    assert sat.phase == "dense"


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_load_model(tmp_path, monkeypatch):
    """The encoder's weights come from the folder, the head is new, the attention has no dropout."""
    saved = bert(attention_probs_dropout_prob=0.1)
    saved.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(weights, "folder", lambda name: tmp_path / name)
    loaded = load_model("saved", "text", classes=5)
    assert loaded.config.attention_probs_dropout_prob == 0 and loaded.classifier.out_features == 5
    assert torch.equal(loaded.bert.embeddings.word_embeddings.weight, saved.bert.embeddings.word_embeddings.weight)
    untrained = load_model("saved", "text", classes=5, pretrained=False)
    fresh = untrained.bert.embeddings.word_embeddings.weight
    assert fresh.shape == saved.bert.embeddings.word_embeddings.weight.shape
    assert not torch.equal(fresh, saved.bert.embeddings.word_embeddings.weight)


def test_weights_that_leave_the_encoder_random(tmp_path, monkeypatch):
    """Of other names, or of other sizes than config.json says: nothing is drawn anew in silence but the head."""
    monkeypatch.setattr(weights, "folder", lambda name: tmp_path / name)
    model = bert()
    model.save_pretrained(tmp_path / "other-names")
    state = {f"another.{name}": value for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "other-names" / "model.safetensors", metadata={"format": "pt"})
    bert(vocab_size=60).save_pretrained(tmp_path / "other-sizes")
    model.config.save_pretrained(tmp_path / "other-sizes")
    for name in ("other-names", "other-sizes"):
        with pytest.raises(InputError, match=f"{name}: wanted weights of the whole encoder; .* of its parameters"):
            load_model(name, "text", classes=2)


def test_models_of_the_other_kind_and_without_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "folder", lambda name: tmp_path / name)
    bert().save_pretrained(tmp_path / "text")
    vit().save_pretrained(tmp_path / "image")
    for name, kind in (("text", "image"), ("image", "text")):
        with pytest.raises(InputError, match=f"{name}: transformers can't make a model for {kind}s of it"):
            load_model(name, kind, classes=2)
    with pytest.raises(InputError, match=r"image: .* has no tokenizer that transformers can load"):
        load_tokenizer("image")


def test_load_model_refuses():
    with pytest.raises(InputError, match="kind: wanted one of"):
        load_model("minilm", "sound", classes=2)
    with pytest.raises(InputError, match="classes: wanted 2 or more; got 1"):
        load_model("minilm", "text", classes=1)
