"""Locks between processes."""

import subprocess
import sys
import threading

import pytest

from sat_lib.common import files
from sat_lib.common.errors import InputError

HOLDER = """
import pathlib, sys
from sat_lib.common import files
with files.lock(pathlib.Path(sys.argv[1]), "holding"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a lock until it is told to end or killed."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=files.ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_lock_of_a_living_process_is_told_of(holder, tmp_path):
    path = tmp_path / "lock"
    assert files.locked(path) and not files.locked(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    busy = r"training is already running \(.*lock is locked\). Wait for it or stop it"
    with pytest.raises(InputError, match=busy), files.lock(path, "training"):
        pass


@pytest.mark.parametrize("end", ["kill", "finish"])
def test_a_lock_ends_with_its_process_however_that_ends(holder, tmp_path, end):
    holder.kill() if end == "kill" else holder.stdin.close()
    holder.wait()
    assert not files.locked(tmp_path / "lock")
    with files.lock(tmp_path / "lock", "training"):
        assert files.locked(tmp_path / "lock")
    assert not files.locked(tmp_path / "lock")


@pytest.mark.parametrize("quiet", [False, True])
def test_who_waits_gets_the_lock_once_it_is_free_and_says_so_unless_quiet(holder, tmp_path, capsys, monkeypatch, quiet):
    """The lock is set free once the wait has begun."""
    acquire, waits = files.filelock.FileLock.acquire, threading.Event()

    def told(lock, *arguments, **settings):
        waits.set() if settings.get("blocking", True) else None
        return acquire(lock, *arguments, **settings)

    monkeypatch.setattr(files.filelock.FileLock, "acquire", told)
    thread = threading.Thread(target=lambda: waits.wait() and holder.stdin.close())
    thread.start()
    with files.lock(tmp_path / "lock", "training", wait=True, quiet=quiet):
        assert waits.is_set()
    thread.join()
    said = "" if quiet else f"training is already running ({tmp_path / 'lock'} is locked): waiting for it\n"
    assert capsys.readouterr().out == said


def test_a_lock_leaves_the_content_of_its_file_alone(tmp_path):
    (tmp_path / "lock").write_text("content")
    with files.lock(tmp_path / "lock", "reading"):
        assert files.locked(tmp_path / "lock")
    assert (tmp_path / "lock").read_text() == "content"


def test_an_error_inside_sets_the_lock_free(tmp_path):
    with pytest.raises(ZeroDivisionError), files.lock(tmp_path / "lock", "dividing"):
        1 / 0  # noqa: B018
    assert not files.locked(tmp_path / "lock")
