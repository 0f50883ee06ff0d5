"""Embedded tasks: data made on the spot from what is installed, no download. Handwritten digits, docstrings, ListOps.

Each reader is a generator of `readers.Batch`es and gives the same examples whenever it is called with the same
arguments and installed versions.
"""

import ast
import hashlib
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..common.errors import require
from .readers import Batch, text_tokens

# ---- digits ----------------------------------------------------------------------------------------------------------


def read_digits(side: int, sizes: dict[str, int]) -> Iterator[Batch]:
    """scikit-learn's 8 x 8 digits at side x side pixels, (b, side^2) uint8: 0..16 scaled to 0..255, bilinear."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    scaled = digits.images.astype(np.float32) * (255 / 16)
    large = [np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)) for image in scaled]
    tokens = np.rint(np.stack(large)).astype(np.uint8).reshape(len(large), side * side)
    labels = digits.target
    parts = train_test_split(np.arange(len(labels)), test_size=sizes["test"], random_state=0, stratify=labels)
    for split, rows in zip(("train", "test"), parts, strict=True):
        yield Batch(split, tokens[rows], labels[rows])


# ---- docstrings ------------------------------------------------------------------------------------------------------

MINIMUM_BYTES = 300  # of a docstring: shorter ones say little, and mean pooling over 1,024 positions hides them
_NOT_ITS_OWN = {"tests", "test", "testing", "conftest.py", "externals", "_external", "_vendor", "extern"}
_NOT_ITS_OWN |= {"array_api_compat", "array_api_extra"}  # vendored by several of the libraries


def read_docstrings(libraries: tuple[str, ...], sizes: dict[str, int], length: int) -> Iterator[Batch]:
    """Docstrings of installed libraries, as many of each: which library is one from?

    Source files are parsed, never imported; tests and vendored packages are left out, docstrings under 300 bytes too,
    and of equal docstrings only the first stays. A file's docstrings are all train or all test (its path's hash says).
    `sizes` are upper bounds on the two splits: the library with the fewest docstrings sets the number per class.
    """
    wanted = {split: size // len(libraries) for split, size in sizes.items()}
    seen: set[str] = set()
    found = {library: _library_docstrings(library, wanted, seen) for library in libraries}
    for split in sizes:
        each = min(len(texts[split]) for texts in found.values())
        counts = ", ".join(f"{library} {len(texts[split])}" for library, texts in found.items())
        require(each > 0, f"docstrings: wanted {split} examples of every library, found {counts}")
        examples = [(text, label) for label, texts in enumerate(found.values()) for text in texts[split][:each]]
        examples.sort(key=lambda example: _hash(example[0]))
        texts, labels = zip(*examples, strict=True)
        yield Batch(split, text_tokens(texts, length), np.array(labels))


def _library_docstrings(library: str, wanted: dict[str, int], seen: set[str]) -> dict[str, list[str]]:
    """Up to `wanted` docstrings per split, files in the order of their hash; adds what it takes to `seen`."""
    spec = importlib.util.find_spec(library)
    require(spec is not None and spec.submodule_search_locations, f"docstrings needs {library}: pip install {library}")
    root = Path(spec.submodule_search_locations[0])
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    names = [name for name in names if not any(p in _NOT_ITS_OWN or p.startswith("test_") for p in name.split("/"))]
    texts = {split: [] for split in wanted}
    for name in sorted(names, key=_hash):
        split = "test" if int(_hash(name), 16) % 4 == 0 else "train"
        if len(texts[split]) < wanted[split]:
            for text in _docstrings(root / name):
                if len(text.encode()) >= MINIMUM_BYTES and text not in seen:
                    seen.add(text)
                    texts[split].append(text)
    return {split: found[: wanted[split]] for split, found in texts.items()}


def _docstrings(path: Path) -> list[str]:
    """Docstrings of a source file; none where it is not Python that this interpreter parses."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return []
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return [text.encode(errors="replace").decode() for text in texts if text]  # an escape may hold half a surrogate


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---- ListOps ---------------------------------------------------------------------------------------------------------

LISTOPS_SYMBOLS = ("[MIN", "[MAX", "[MED", "[SM", "]", *"0123456789")  # token ids 1..15; 0 is padding
_CLOSE, _DIGIT = 5, 6  # ids of "]" and "0"
_MAX_DEPTH, _MAX_ARGUMENTS, _OPERATOR_SHARE = 10, 10, 0.25
_MIN_LENGTH, _MAX_LENGTH = 500, 2_000  # both excluded


class _Level(NamedTuple):
    """The nodes of one depth over many trees, siblings side by side and in the order of their parents."""

    tree: np.ndarray  # (nodes,) which tree
    operator: np.ndarray  # (nodes,) bool
    arguments: np.ndarray  # (operators,) number of children


def read_listops(sizes: dict[str, int], length: int, seed: int = 0) -> Iterator[Batch]:
    """Nested list operations of the Long Range Arena, (b, length) uint16; label = value of the expression, 0..9.

    Splits are filled one after the other from one stream of distinct expressions; the same seed gives the same
    stream. Drawn anew from the definition in Tay et al., "Long Range Arena" (2021), and Nangia and Bowman (2018).
    """
    rng = np.random.default_rng(seed)
    seen: set[bytes] = set()
    tokens = labels = ()
    for split, wanted in sizes.items():
        while wanted:
            if not len(labels):
                tokens, labels = _distinct(*_listops_batch(rng, length), seen)
            batch = Batch(split, tokens[:wanted], labels[:wanted])
            yield batch
            tokens, labels, wanted = tokens[wanted:], labels[wanted:], wanted - len(batch.labels)


def _distinct(tokens: np.ndarray, labels: np.ndarray, seen: set[bytes]) -> tuple[np.ndarray, np.ndarray]:
    keys = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in tokens]
    new = [key not in seen and not seen.add(key) for key in keys]
    return tokens[new], labels[new]


def _listops_batch(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw 4,000 expressions; the one in twelve of admissible length as tokens (n, length) and values (n,)."""
    levels, lengths = _draw_shapes(rng, 4_000)
    kept = (lengths > _MIN_LENGTH) & (lengths < _MAX_LENGTH)
    levels = [_keep(level, kept) for level in levels]
    sized = [(level.operator, len(level.tree)) for level in levels]
    symbols = [np.where(operator, rng.integers(4, size=n), rng.integers(10, size=n)) for operator, n in sized]
    spans, values = _evaluate(levels, symbols)
    tokens = np.zeros((int(kept.sum()), length), np.uint16)
    starts = np.zeros(len(tokens), np.int64)
    for level, symbol, span, deeper in zip(levels, symbols, spans, [*spans[1:], None], strict=True):
        tokens[level.tree, starts] = np.where(level.operator, 1 + symbol, _DIGIT + symbol)
        parents = level.operator
        tokens[level.tree[parents], (starts + span)[parents] - 1] = _CLOSE
        if not parents.any():  # nor are there any deeper down
            break
        first = np.cumsum(level.arguments) - level.arguments  # index of each operator's first child
        before = np.cumsum(deeper) - deeper  # tokens of all nodes left of a child, on its level
        starts = np.repeat(starts[parents] + 1 - before[first], level.arguments) + before
    return tokens, values


def _draw_shapes(rng: np.random.Generator, trees: int) -> tuple[list[_Level], np.ndarray]:
    """Random trees level by level, and the number of tokens of each: 1 a value, 2 + its children an operator."""
    levels, lengths, tree = [], np.zeros(trees, np.int64), np.arange(trees)
    for depth in range(1, _MAX_DEPTH + 1):
        operator = (rng.random(len(tree)) <= _OPERATOR_SHARE) & (depth < _MAX_DEPTH)
        arguments = rng.integers(2, _MAX_ARGUMENTS + 1, size=int(operator.sum()))
        levels.append(_Level(tree, operator, arguments))
        lengths += np.bincount(tree, minlength=trees) + np.bincount(tree[operator], minlength=trees)
        tree = np.repeat(tree[operator], arguments)
    return levels, lengths


def _keep(level: _Level, kept: np.ndarray) -> _Level:
    """The nodes of the kept trees, which are counted anew."""
    mine = kept[level.tree]
    return _Level((np.cumsum(kept) - 1)[level.tree[mine]], level.operator[mine], level.arguments[mine[level.operator]])


def _evaluate(levels: list[_Level], symbols: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """From the leaves up: number of tokens of every node, by level, and the values of the roots."""
    spans, values = [], np.empty(0, np.int64)
    for level, symbol in zip(reversed(levels), reversed(symbols), strict=True):
        span, value = np.ones(len(level.tree), np.int64), symbol.copy()
        if level.operator.any():
            first = np.cumsum(level.arguments) - level.arguments
            span[level.operator] = 2 + np.add.reduceat(spans[-1], first)
            value[level.operator] = _apply(symbol[level.operator], values, level.arguments)
        spans.append(span)
        values = value
    return spans[::-1], values


def _apply(operators: np.ndarray, values: np.ndarray, arguments: np.ndarray) -> np.ndarray:
    """MIN, MAX, MED (integer part of the median) or SM (sum modulo 10) of each run of `arguments` values."""
    filled = np.arange(_MAX_ARGUMENTS) < arguments[:, None]
    table = np.full(filled.shape, 10)  # 10 sorts behind every value
    table[filled] = values
    table.sort(axis=1)
    every = np.arange(len(table))
    median = (table[every, (arguments - 1) // 2] + table[every, arguments // 2]) // 2
    total = np.where(table < 10, table, 0).sum(axis=1) % 10
    return np.choose(operators, [table[:, 0], table[every, arguments - 1], median, total])
