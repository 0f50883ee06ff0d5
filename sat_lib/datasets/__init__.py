"""Tasks, and what they are made of: official files, read once, cached as tokens."""

from .cache import PROTOCOLS, Split, Splits, describe, load, prepare, provenance

__all__ = ["PROTOCOLS", "Split", "Splits", "describe", "load", "prepare", "provenance"]
