import io
import sys

import pytest
from conftest import tiny_config, tiny_splits

from sat_lib import datasets
from sat_lib.__main__ import main
from sat_lib.common import files
from sat_lib.experiments.demo import demo, demo_config
from sat_lib.training.trainer import Trainer


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("sat_lib.experiments.demo.LONGER", (64, 32, 0.5))


def test_it_shows_both_phases_and_writes_one_picture(tmp_path, capsys, quick):
    for _ in range(2):  # again, over the picture of before
        picture = demo(tiny_config(), tiny_splits(), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [picture.name]
        assert picture.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "Transition at step 5: as it was told to" in said and "Sparse phase: 12 of 64 blocks" in said
    assert "at the end of the dense phase" in said and "at the end of the sparse phase" in said
    for layer in (1, 2):
        assert f"Layer {layer}: the kept blocks hold" in said
    assert "as many at random would hold 18.8%" in said
    assert "dense" in said and "block-sparse" in said and "times as fast" in said
    assert "proves nothing" in said and str(picture) in said and "make reproduce" in said


def test_map_and_layout_stand_beside_each_other(tmp_path, capsys, quick):
    demo(tiny_config(), tiny_splits(), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("attention map")) + 1
    drawn = [line[20:] for line in lines[first : first + 8]]
    assert all(len(line) == 16 for line in drawn)
    assert sum(line.count("██") for line in drawn) == 12


def test_a_terminal_without_unicode_gets_ascii(tmp_path, monkeypatch, quick):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    demo(tiny_config(), tiny_splits(), tmp_path)
    terminal.flush()
    assert b"##" in terminal.buffer.getvalue()


def test_a_run_that_stays_dense_says_so(tmp_path, capsys, quick):
    picture = demo(tiny_config(switch_at=None, theta=float("inf")), tiny_splits(), tmp_path)
    said = capsys.readouterr().out
    assert "The test didn't pass in 12 steps: the model stayed dense." in said and "Layer 1" not in said
    assert picture.exists()


def test_ctrl_c_ends_it_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(trainer):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setattr(datasets, "load", lambda _: tiny_splits())
    monkeypatch.setattr(Trainer, "train_step", interrupted)
    assert main(["demo"]) == 130
    out = capsys.readouterr()
    assert "stopped" in out.err and "SAT in about a minute" in out.out
    assert not list(tmp_path.iterdir())


def test_it_is_made_from_a_task_without_download_and_switches_by_the_test():
    config = demo_config()
    assert datasets.tasks.task(config.recipe.task).embedded
    assert config.recipe.switch_at is None and config.recipe.switch_rule == "stable"
