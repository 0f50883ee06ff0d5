"""Fine-tuning and its measurements on tiny encoders: phases, data, what rows say, what is refused."""

import numpy as np
import pytest
import torch
from conftest import tiny_splits
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from sat_lib.common.errors import InputError
from sat_lib.datasets.pairs import Pairs, PairSplits
from sat_lib.experiments.pretrained import look_at_maps, pretrained_step
from sat_lib.maps import describe
from sat_lib.pretrained import finetune
from sat_lib.pretrained.encoders import attention_maps
from sat_lib.pretrained.finetune import FineTuner, FineTuning, Images, encode_pairs, fine_tune

CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE = FineTuning("tiny-vit", "image", "digits16", batch=4, epochs=2, rate=1e-3)
TEXT = FineTuning("tiny-bert", "text", "mrpc", batch=4, epochs=1, length=40, rate=1e-3)


class Words:
    """A tokenizer of the interface's shape: a word is a token, named by its length."""

    def __call__(self, first, second, *, truncation, padding, max_length, return_tensors):
        assert (truncation, padding, return_tensors) == (True, "max_length", "pt")
        rows = [[1, *map(len, a.split()), 2, *map(len, b.split()), 2][:max_length] for a, b in zip(first, second)]  # noqa: B905
        ids = torch.zeros(len(rows), max_length, dtype=torch.int64)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def pairs(count):
    random = np.random.default_rng(0)
    texts = [" ".join("x" * n for n in random.integers(1, 9, random.integers(3, 25))) for _ in range(2 * count)]
    return Pairs(texts[:count], texts[count:], random.integers(0, 2, count))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Models of two layers and data of a few examples in the place of downloads."""

    def load_model(name, kind, classes, pretrained=True):
        torch.manual_seed(1 if pretrained else 2)
        if kind == "image":
            sizes = {"image_size": 16, "patch_size": 2, "num_channels": 1, "num_labels": classes}
            return ViTForImageClassification(ViTConfig(**SIZES, **NO_DROPOUT, **sizes))
        sizes = {"vocab_size": 30, "max_position_embeddings": 64, "num_labels": classes}
        return BertForSequenceClassification(BertConfig(**SIZES, **NO_DROPOUT, **sizes))

    splits = PairSplits(pairs(12), pairs(5), pairs(7), {"data_digest": "0", "data_official": False})
    monkeypatch.setattr(finetune, "load_model", load_model)
    monkeypatch.setattr(finetune, "load_tokenizer", lambda name: Words())
    monkeypatch.setattr(finetune, "load_pairs", lambda name: splits)
    monkeypatch.setattr(finetune.datasets, "load", lambda name: tiny_splits())
    monkeypatch.setattr(finetune.datasets, "provenance", lambda name: {"data_digest": "1", "data_official": True})


def changed(settings, **more):
    return FineTuning(**{**vars(settings), **more})


@pytest.mark.parametrize("settings", [IMAGE, TEXT], ids=["image", "text"])
def test_dense_run(settings):
    result = fine_tune(settings, CPU)
    assert (result["phase"], result["transition_step"], result["kept"]) == ("dense", None, None)
    assert result["steps"] == settings.epochs * (result["train_examples"] // settings.batch)
    assert len(result["losses"]) == result["steps"]
    right = result["test_accuracy"] * result["test_examples"]
    assert right == pytest.approx(round(right))
    assert result["step_ms"] > 0
    assert fine_tune(settings, CPU)["losses"] == result["losses"], "the same settings, the same run"
    assert fine_tune(changed(settings, seed=1), CPU)["losses"] != result["losses"]


@pytest.mark.parametrize("pattern", ["learned", "pooled"])
@pytest.mark.parametrize("settings", [IMAGE, TEXT], ids=["image", "text"])
def test_sat_run(settings, pattern):
    result = fine_tune(changed(settings, attention="sat", pattern=pattern, density=0.4, switch_share=0.5), CPU)
    assert (result["phase"], result["transition_step"]) == ("sparse", int(0.5 * result["steps"]))
    blocks = -(-(65 if settings.kind == "image" else 40) // 16)
    assert [sum(map(sum, grid)) for grid in result["kept"]] == [int(blocks**2 * 0.4)] * 2
    assert len(result["skewness"]) == len(result["change_percent"]) == result["transition_step"] + 1
    assert all(0 < mass < 1 for mass in result["mass_kept"])


def test_switch_halves_the_rate_and_takes_a_fresh_optimiser():
    tuner = FineTuner(changed(IMAGE, epochs=6, attention="sat", switch_share=0.3), CPU)
    rates = []
    while tuner.step < tuner.steps:
        before = tuner.optimiser
        rates.append(before.param_groups[0]["lr"])
        tuner.train_step()
        assert (tuner.optimiser is before) == (tuner.step - 1 != tuner.sat.transition_step)
    warm_up, switched = max(1, tuner.steps // 10), tuner.sat.transition_step
    shares = [min((step + 1) / warm_up, (tuner.steps - step) / (tuner.steps - warm_up)) for step in range(tuner.steps)]
    wanted = [IMAGE.rate * share * (0.5 if step > switched else 1) for step, share in enumerate(shares)]
    assert warm_up > 1 and 0 < switched < tuner.steps - 1
    assert rates == pytest.approx(wanted, rel=1e-12, abs=0)


def test_mass_kept_against_the_maps():
    """Of a text model with padding: the share of real queries' attention that lies in the kept blocks."""
    tuner = FineTuner(changed(TEXT, attention="sat", switch_share=0.0, density=0.4), CPU)
    tuner.train_step()
    inputs, _ = tuner.test.batch(np.arange(7), CPU)
    real = inputs["attention_mask"].bool()
    said = finetune._what_is_kept(tuner)["mass_kept"]
    for maps, layout, found in zip(attention_maps(tuner.model, inputs), tuner.sat.layouts, said, strict=True):
        kept = layout.entries(40)
        inside = sum(float(maps[b, h, q][kept[q]].sum()) for b, q in real.nonzero().tolist() for h in range(2))
        assert found == pytest.approx(inside / (2 * int(real.sum())), rel=1e-5)


def test_only_so_many_examples():
    result = fine_tune(changed(IMAGE, train_examples=8, test_examples=3), CPU)
    assert (result["steps"], result["train_examples"], result["test_examples"]) == (4, 8, 3)


def test_images_are_brought_to_the_models_size():
    split = tiny_splits().test
    inputs, labels = Images(split, 32, 3).batch(np.array([2, 0]), CPU)
    pixels = inputs["pixel_values"]
    assert tuple(pixels.shape) == (2, 3, 32, 32) and labels.tolist() == split.labels[[2, 0]].tolist()
    own, _ = Images(split, 16, 1).batch(np.array([2, 0]), CPU)
    tokens, _ = split.batch(np.array([2, 0]))
    assert torch.equal(own["pixel_values"].flatten(1), torch.tensor(tokens).float() / 127.5 - 1)
    assert torch.equal(pixels[:, 0], pixels[:, 2])
    torch.testing.assert_close(pixels[:, 0].mean(), own["pixel_values"].mean(), atol=0.02, rtol=0)


def test_pairs_are_cut_and_padded():
    encoded = encode_pairs(Words(), Pairs(["a bb"], ["ccc"], np.array([1])), 8)
    assert encoded.inputs["input_ids"].tolist() == [[1, 1, 2, 2, 3, 2, 0, 0]]
    assert encode_pairs(Words(), Pairs(["a bb"], ["ccc"], np.array([1])), 3).inputs["input_ids"].shape == (1, 3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"attention": "lsg"}, "attention: wanted 'dense' or 'sat'"),
        ({"epochs": 0}, "epochs: wanted at least 1"),
        ({"train_examples": 0}, "train_examples: wanted at least 1; got 0"),
        ({"rate": 0.0}, "rate: wanted more than 0"),
        ({"precision": "fp16"}, "precision: wanted 'fp32' or 'bf16'"),
        ({"switch_share": 1.0}, "switch_share: wanted 0 to below 1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        changed(IMAGE, **settings)


def test_batches_larger_than_the_data():
    with pytest.raises(InputError, match="batch: wanted at most the 24 training examples; got 100"):
        FineTuner(changed(IMAGE, batch=100), CPU)


# ---- a look at the maps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [IMAGE, TEXT], ids=["image", "text"])
def test_look_at_maps(settings):
    result = look_at_maps(settings, 11, CPU)
    moments = ("untrained", "pretrained", "half way", "fine-tuned")
    assert [(line["moment"], line["layer"], line["head"]) for line in result["metrics"]] == [
        (moment, layer, head) for moment in moments for layer in range(2) for head in range(2)
    ]
    steps = FineTuner(settings, CPU).steps
    assert {line["moment"]: line["step"] for line in result["metrics"]} == dict(
        zip(moments, (0, 0, steps // 2, steps), strict=True)
    )
    shown = np.array(result["shown"]) / 1e5
    assert shown.shape == (result["length"],) * 2
    np.testing.assert_allclose(shown.sum(1), 1, atol=2e-3)
    if settings.kind == "image":
        assert (result["grid"], len(result["profiles"]), len(result["profiles"][0]["profile"])) == (8, 8, 33)
    else:
        assert result["grid"] is None and result["profiles"] == []
        assert (shown[:, result["tokens"] :] == 0).all()


def test_metrics_are_means_over_the_examples():
    """More examples than are held together: the last, smaller chunk weighs no more than it should."""
    result = look_at_maps(TEXT, 11, CPU)
    tuner = FineTuner(TEXT, CPU)
    chosen = np.random.default_rng([0, 1]).choice(12, 11, replace=False)
    inputs, _ = tuner.train.batch(chosen, CPU)
    found = describe(attention_maps(tuner.model, inputs)[1], inputs["attention_mask"].bool())
    line = next(line for line in result["metrics"] if (line["moment"], line["layer"]) == ("pretrained", 1))
    for name, value in found.items():
        assert line[name] == pytest.approx(float(value.mean(0)[0]), abs=1e-5), name


def test_more_examples_than_there_are():
    with pytest.raises(InputError, match="examples: wanted at most 12; got 13"):
        look_at_maps(TEXT, 13, CPU)


# ---- the time of a step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "phase"), [("eager", "dense"), ("sdpa", "dense"), ("sat", "dense"), ("sat", "sparse")]
)
@pytest.mark.parametrize("architecture", ["bert-base", "vit-base"])
def test_pretrained_step(architecture, attention, phase, monkeypatch):
    def small(case):
        sizes = {**SIZES, "attention_probs_dropout_prob": 0.0}
        if case["architecture"] == "bert-base":
            return BertForSequenceClassification(BertConfig(**sizes, vocab_size=50))
        return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=4))

    monkeypatch.setattr("sat_lib.experiments.pretrained._architecture", small)
    density = 0.5 if phase == "sparse" else None
    sizes = {"batch": 2, "length": 40, "layers": 2, "block": 16, "precision": "fp32"}
    case = {"architecture": architecture, "attention": attention, "phase": phase, "density": density, **sizes}
    result = pretrained_step(case, CPU)
    assert result["median_ms"] > 0 and result["peak_bytes"] > 0 and result["parameters"] > 1_000
