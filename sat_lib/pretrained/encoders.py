"""Pretrained encoders of transformers by name: loading, their inputs, and their attention maps."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.errors import InputError, require
from . import weights

KINDS = ("image", "text")


def load_model(name: str, kind: str, classes: int, *, pretrained: bool = True) -> nn.Module:
    """A classifier on a pretrained encoder, in float32, without dropout in the attention.

    A saved head for as many classes is kept; otherwise the head, BERT's pooler included, is drawn anew.

    Args:
        name: a stand-in ("minilm", "cifar-vit"), a local folder, or a name on the hub; see `weights.folder`.
        kind: "image" or "text".
        pretrained: False draws all weights anew: the same architecture before any training.

    Raises:
        InputError: another kind, the weights can't be had (the message says where from and where to), they aren't
            those of a classifier of that kind, or they leave a part of the encoder without weights.
    """
    require(kind in KINDS, f"kind: wanted one of {KINDS}; got {kind!r}")
    require(classes >= 2, f"classes: wanted 2 or more; got {classes}")
    folder = weights.folder(name)
    from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

    factory = AutoModelForImageClassification if kind == "image" else AutoModelForSequenceClassification
    with _input_errors(f"{name}: transformers can't make a model for {kind}s of it"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        config.num_labels = classes
        for dropout in ("attention_probs_dropout_prob", "attention_dropout"):  # names of various encoders
            if hasattr(config, dropout):
                setattr(config, dropout, 0.0)
        if not pretrained:
            return factory.from_config(config, dtype=torch.float32)
        settings = {"config": config, "dtype": torch.float32, "local_files_only": True}
        model, said = _quietly(factory.from_pretrained, folder, **settings)
    inside = f"{model.base_model_prefix}."
    without = [*said["missing_keys"], *(key for key, *_ in said["mismatched_keys"])]
    without = sorted(key for key in without if key.startswith(inside) and ".pooler." not in key)
    require(
        not without,
        f"{name}: wanted weights of the whole encoder; {folder} has none that fit for {len(without)} of its parameters "
        f"({without[0] if without else ''}, ...). Is its config.json that of its model.safetensors?",
    )
    return model


def _quietly(from_pretrained: Callable, folder: Path, **settings) -> tuple[nn.Module, dict]:
    """The model and what transformers says of missing weights, which it would otherwise print, with progress bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **settings)
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _input_errors(what: str) -> Iterator[None]:
    """Turn what transformers raises about a folder into an InputError that begins with `what`."""
    try:
        yield
    except (ValueError, OSError, KeyError, ImportError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise InputError(f"{what} ({reason}). Name another model, or the other kind") from error


def load_tokenizer(name: str):
    """The tokenizer that belongs to a text encoder; arguments as for `load_model`.

    Raises:
        InputError: the weights can't be had, or have no tokenizer beside them.
    """
    folder = weights.folder(name)
    from transformers import AutoTokenizer

    with _input_errors(f"{name}: {folder} has no tokenizer that transformers can load"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def pixels(tokens: Tensor, side: int | None = None, channels: int = 1) -> Tensor:
    """Gray image tokens (b, S^2), 0 to 255 -> what image models take: (b, channels, side, side) float32 from -1 to 1.

    Another side than S is reached by antialiased bilinear interpolation; the channels are all the same.
    """
    own = math.isqrt(tokens.shape[1])
    images = (tokens.float() / 127.5 - 1).reshape(-1, 1, own, own)
    if side not in (None, own):
        images = F.interpolate(images, size=side, mode="bilinear", antialias=True)
    return images.expand(-1, channels, -1, -1)


@torch.no_grad()
def attention_maps(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """`A^s` of every layer, each (B, H, L, L), padding keys 0: transformers' own eager attention, in evaluation mode.

    The model's attention implementation and mode are what they were before, also after an error.

    Raises:
        InputError: the model returns no maps.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with evaluating(model):
            maps = model(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    require(
        bool(maps) and all(isinstance(attention, Tensor) for attention in maps),
        f"model: wanted one that returns attention maps under 'eager'; {type(model).__name__} returns none",
    )
    return list(maps)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the length of a block; then every module's mode is what it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
