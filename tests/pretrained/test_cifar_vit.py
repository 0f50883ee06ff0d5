"""The small ViT's pretraining: pixels, augmentation, resuming, and what is written."""

import json
import math

import numpy as np
import pytest
import torch

from sat_lib.common.errors import InputError
from sat_lib.datasets.cache import Split, Splits
from sat_lib.datasets.tasks import task
from sat_lib.pretrained import cifar_vit
from sat_lib.pretrained.cifar_vit import Pretraining, augment, pretrain
from sat_lib.pretrained.encoders import pixels

CPU = torch.device("cpu")
TINY = Pretraining(layers=1, width=16, heads=2, hidden=16, epochs=3, batch=8, warm_up=2)


@pytest.fixture(autouse=True)
def tiny_cifar(monkeypatch):
    """48 random images of CIFAR-10's shape: 6 steps an epoch of batches of 8 from 24 to train on."""
    random = np.random.default_rng(0)
    split = Split(random.integers(0, 256, (48, 1024)).astype(np.uint8), np.arange(48), random.integers(0, 10, 48))
    parts = [split.take(np.arange(*ends)) for ends in ((0, 24), (24, 30), (30, 48))]
    monkeypatch.setattr(cifar_vit.datasets, "load", lambda name: Splits(task("cifar10"), *parts, "dev"))
    provenance = {"data_digest": "0", "data_official": False}
    monkeypatch.setattr(cifar_vit.datasets, "provenance", lambda name: provenance)


def test_pixels():
    tokens = torch.tensor([[0, 51, 204, 255]], dtype=torch.uint8)
    torch.testing.assert_close(pixels(tokens), torch.tensor([[[[-1.0, -0.6], [0.6, 1.0]]]]))


def test_augment_shifts_mirrors_and_blanks():
    """Every result is a shift by at most 4 of the image or its mirror image, apart from one gray square."""
    images = pixels(torch.randint(1, 128, (20, 1024)))  # no black, no gray
    found = augment(images, 8, np.random.default_rng(0))
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4), value=-1.0)
    seen = set()
    for before, after in zip(padded[:, 0], found[:, 0], strict=True):
        blank = after == 0
        assert int(blank.sum()) == 64
        rows, columns = blank.any(1).nonzero().flatten(), blank.any(0).nonzero().flatten()
        assert len(rows) == len(columns) == 8 and int(rows[-1] - rows[0]) == int(columns[-1] - columns[0]) == 7
        fits = [
            (top, left, mirrored)
            for top in range(9)
            for left in range(9)
            for mirrored, crop in enumerate(
                (before[top:][:32, left:][:, :32], before[top:][:32, left:][:, :32].flip(1))
            )
            if torch.equal(crop[~blank], after[~blank])
        ]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len({top for top, _, _ in seen}) > 3 and {mirrored for _, _, mirrored in seen} == {0, 1}


def test_written_model_loads_and_scores_what_the_card_says(tmp_path):
    from transformers import AutoModelForImageClassification

    result = pretrain(TINY, tmp_path / "vit", tmp_path / "work", CPU, progress=False)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "vit", dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == result["parameters"]
    tokens, labels = cifar_vit.datasets.load("cifar10").test.batch(np.arange(18))
    right = (model(pixel_values=pixels(torch.as_tensor(tokens))).logits.argmax(-1).numpy() == labels).sum()
    assert result["test_accuracy"] == right / 18
    card = (tmp_path / "vit" / "README.md").read_text()
    assert f"{result['test_accuracy']:.2%} of 18 images" in card and result["stamp"]["commit"] in card
    assert json.loads((tmp_path / "vit" / "training.json").read_text())["settings"]["epochs"] == 3
    with pytest.raises(InputError, match=r"folder: .* exists"):
        pretrain(TINY, tmp_path / "vit", tmp_path / "work", CPU, progress=False)


def test_an_interrupted_run_ends_like_an_unbroken_one(tmp_path, monkeypatch):
    pretrain(TINY, tmp_path / "one", tmp_path / "one-work", CPU, progress=False)
    monkeypatch.setattr(cifar_vit, "CHECKPOINT_SECONDS", 0)
    step, rates = cifar_vit._train_step, {}

    def noted(*arguments):
        rates[arguments[4]] = [group["lr"] for group in arguments[1].param_groups]
        return step(*arguments)

    def interrupted(*arguments):
        if arguments[4] == 4:
            raise KeyboardInterrupt
        return noted(*arguments)

    monkeypatch.setattr(cifar_vit, "_train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(TINY, tmp_path / "two", tmp_path / "two-work", CPU, progress=False)
    assert not (tmp_path / "two").exists()
    monkeypatch.setattr(cifar_vit, "_train_step", noted)
    with pytest.raises(InputError, match=r"settings: .* holds a run with"):
        pretrain(
            Pretraining(**{**vars(TINY), "rate": 0.1}), tmp_path / "two", tmp_path / "two-work", CPU, progress=False
        )
    pretrain(TINY, tmp_path / "two", tmp_path / "two-work", CPU, progress=False)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    steps, warm_up = len(rates), TINY.warm_up
    wanted = [TINY.rate * min((k + 1) / warm_up, (1 + math.cos(math.pi * k / steps)) / 2) for k in range(steps)]
    assert [rates[k] for k in range(steps)] == [pytest.approx([rate] * 2, rel=1e-12, abs=0) for rate in wanted]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"warm_up": 0}, "warm_up: wanted at least 1"),
        ({"mixup": 0.0}, "mixup: wanted more than 0"),
        ({"erased": 40}, "erased: wanted 0 to 32 pixels; got 40"),
        ({"epochs": 0}, "epochs: wanted at least 1"),
        ({"heads": 5}, "don't divide"),
        ({"rate": 0.0}, "rate: wanted more"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        Pretraining(**settings)


def test_the_shipped_model():
    """At most 6 MB, whole, and with a card that repeats what training.json says."""
    from sat_lib.pretrained import weights

    folder = weights.folder("cifar-vit")
    result = json.loads((folder / "training.json").read_text())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6_000_000
    assert (folder / "README.md").read_text() == cifar_vit.model_card(result)
    assert not result["stamp"]["commit"].endswith("-dirty")
