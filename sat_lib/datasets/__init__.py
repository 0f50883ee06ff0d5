"""Tasks, and what they are made of: official files, read once, cached as tokens.

tasks: the table of them. cache: from files to tokens and splits; batches: from a split to a device. downloads and
readers: official files; builtin: data that need none; store: a folder of data, kept whole; pairs: pairs of texts, for
pretrained models.
"""

from .cache import PROTOCOLS, Split, Splits, describe, load, prepare, provenance

__all__ = ["PROTOCOLS", "Split", "Splits", "describe", "load", "prepare", "provenance"]
