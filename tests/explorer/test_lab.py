"""The explorer in a real JupyterLab, driven in headless Chromium."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from PIL import Image

from sat_lib.common import files

nbformat = pytest.importorskip("nbformat")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"needs one of {', '.join(NAMES)}, or $CHROMIUM")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
SETTINGS = (
    "--no-browser", "--allow-root", "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password=",
    "--ServerApp.disable_check_xsrf=True", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    "--LabApp.expose_app_in_browser=True",
)  # fmt: skip
CONNECTED = (
    "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.connectionStatus === 'connected'"
)
SOURCE = """
import torch


class Maps:
    label, steps, examples, layers, heads, length, block = "random maps", (0, 50, 100), 3, 2, 2, 256, 16

    def maps(self, step, example):
        generator = torch.Generator().manual_seed(step + example)
        return (2 * torch.randn(2, 2, 256, 256, generator=generator)).softmax(-1)

    def scores(self, step, layer):
        scores = torch.rand(16, 16, generator=torch.Generator().manual_seed(layer))
        return scores + scores.T

    def layout(self, step, layer):
        return None
"""


@pytest.fixture
def lab(tmp_path):
    """Address of a server whose folder holds a small notebook; what it writes beside goes to tmp_path."""
    folder, settings = tmp_path / "notebooks", tmp_path / "settings" / "@jupyterlab" / "apputils-extension"
    folder.mkdir()
    (folder / "maps.py").write_text(SOURCE)
    code = "from maps import Maps\nfrom sat_lib.explorer.widget import widget\n\nwidget(Maps())"
    cell = nbformat.v4.new_code_cell(code)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), folder / "small.ipynb")
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),  # nothing of the user's
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "PYTHONPATH": str(files.ROOT),
    }
    command = [sys.executable, "-m", "jupyterlab", f"--port={port}", f"--ServerApp.root_dir={folder}", *SETTINGS]
    log = tmp_path / "lab.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=folder)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api/status", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(300)


def _wait_for(address, server, log, seconds=300):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, f"JupyterLab ended:\n{log.read_text()[-2000:]}"
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"JupyterLab didn't answer within {seconds} s:\n{log.read_text()[-2000:]}")


def test_a_slider_moves_the_pictures_and_the_numbers(lab, tmp_path):
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{lab}/lab/tree/small.ipynb?reset")
        page.wait_for_selector(".jp-Notebook", timeout=300_000)
        page.wait_for_function(CONNECTED, timeout=300_000)
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
        images, text = page.locator(".widget-image"), page.get_by_text("random ones hold")
        sync_api.expect(images).to_have_count(4, timeout=300_000)
        sync_api.expect(text).to_be_visible()
        sync_api.expect(page.locator(".jp-OutputArea table")).to_contain_text("4.69%")  # 12 of 256 blocks
        before = [image.get_attribute("src") for image in images.all()]
        said = text.text_content()
        handle = page.locator(".noUi-handle").nth(2)  # example, step, density
        handle.focus()
        page.keyboard.press("ArrowRight")
        sync_api.expect(images.nth(3)).not_to_have_attribute("src", before[3], timeout=300_000)
        sync_api.expect(page.locator(".jp-OutputArea table")).to_contain_text("7.81%")  # 20 of 256 blocks
        assert text.text_content() != said
        page.screenshot(path=tmp_path / "widget.png")
        sizes = images.evaluate_all("images => images.map(image => [image.naturalWidth, image.naturalHeight])")
        assert sizes == [[512, 512]] * 4
        notebook = page.locator(".jp-Notebook").bounding_box()
        for element in (*images.all(), page.locator(".jp-OutputArea table")):
            box = element.bounding_box()
            assert box["x"] + box["width"] <= notebook["x"] + notebook["width"]
            assert box["y"] + box["height"] <= notebook["y"] + notebook["height"]
        browser.close()
    assert errors == []
    with Image.open(tmp_path / "widget.png") as screenshot:
        assert screenshot.size == (1280, 900)
