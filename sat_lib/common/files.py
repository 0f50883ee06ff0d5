"""Files that are either whole or absent: atomic writes, rows as JSON lines, digests, locks."""

import contextlib
import hashlib
import json
import os
import platform
import re
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import filelock

from .errors import InputError

PACKAGE = Path(__file__).resolve().parents[1]  # sat_lib
CHECKOUT = (PACKAGE.parent / "pyproject.toml").exists()  # False: installed from a wheel
ROOT = PACKAGE.parent if CHECKOUT else Path.cwd()  # notebooks, data, figures, runs lie here


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; on success it replaces `path`, on any failure it is removed.

    The data are on disk (fsync) before the name changes, so a reader sees the earlier file or the new one, whole.

    Raises:
        OSError: the disk is full or the folder not writable; the message says that `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        state = "the earlier file is unchanged" if path.exists() else "nothing was left behind"
        message = f"could not write {path}: {error.strerror or error}; {state}. Free some space and run again"
        raise OSError(error.errno, message) from error
    finally:
        temporary.unlink(missing_ok=True)


def write(path: str | Path, data: str | bytes) -> None:
    """Write a whole file atomically (text as UTF-8)."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: str | Path, value) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity raise: they aren't JSON."""
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def append_row(path: str | Path, row: dict) -> None:
    """Append one JSON line and flush it to disk. A line that a killed process left half-written is cut off first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, allow_nan=False) + "\n"
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a JSON-lines file, oldest first; an absent file has none, an unfinished last line doesn't count.

    Raises:
        InputError: a finished line is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    *lines, _unfinished = path.read_text().split("\n")
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error.msg}). Mend or delete that line") from error
    return rows


def digest(value) -> str:
    """First 16 hex digits of the SHA-256 of a JSON-serialisable value; keys in any order give the same digest."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def commit(root: Path = ROOT) -> str:
    """$SAT_LIB_COMMIT, for a copy that git can't tell the commit of; else the checkout's, "-dirty" appended where code
    or notebooks differ; else, as for a package that was installed from a wheel, "unknown"."""
    if "SAT_LIB_COMMIT" in os.environ:
        return os.environ["SAT_LIB_COMMIT"]
    if not CHECKOUT:
        return "unknown"
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = [*git, "status", "--porcelain", "--", "sat_lib", "notebooks"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if changed else "")


def processor() -> str:
    """The name of this machine's processor, as a reader knows it."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return model[1].strip() if model else platform.processor() or platform.machine()


@contextlib.contextmanager
def lock(path: str | Path, purpose: str, *, wait: bool = False, quiet: bool = False) -> Iterator[None]:
    """Hold an exclusive lock for the length of a block. The system drops it when the process dies, however it dies.

    `quiet`: don't say that it has to wait, where that is milliseconds.

    Raises:
        InputError: another living process holds it, unless `wait` says to wait for that.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    system_lock, busy = _system_lock(path), f"{purpose} is already running ({path} is locked)"
    try:
        held = system_lock.acquire(blocking=False)
    except filelock.Timeout as error:
        if not wait:
            raise InputError(f"{busy}. Wait for it or stop it") from error
        if not quiet:
            print(f"{busy}: waiting for it", flush=True)
        held = system_lock.acquire()
    with held:
        yield


def locked(path: str | Path) -> bool:
    """Whether a living process holds a lock."""
    if not Path(path).exists():
        return False
    try:
        with _system_lock(path).acquire(blocking=False):
            return False
    except filelock.Timeout:
        return True


def _system_lock(path: str | Path) -> filelock.FileLock:
    return filelock.FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a killed process
