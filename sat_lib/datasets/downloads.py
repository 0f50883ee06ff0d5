"""Official files from their addresses: progress, resume of a cut download, checksum, and only then the file's name."""

import http.client
import shutil
import urllib.request
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..common.errors import InputError
from ..common.files import file_digest


@dataclass(frozen=True)
class Official:
    """A file of the official distribution."""

    name: str
    url: str
    algorithm: str  # "md5" or "sha256"
    digest: str


def officials(address: str, digests: dict[str, str], algorithm: str = "md5") -> tuple[Official, ...]:
    """Files that lie at `address`: their names and digests."""
    return tuple(Official(name, address + name, algorithm, digest) for name, digest in digests.items())


def mismatch(path: Path, official: Official, found: str, way_out: str) -> str:
    """The message for a file that bears an official name and isn't that file."""
    wanted = f"wanted {official.algorithm} {official.digest}, got {found}"
    return f"{path} is not the official {official.name}: {wanted}. {way_out} ({official.url})"


def download_all(wanted: Collection[Official], folder: Path, progress: bool, task_name: str) -> list[Path]:
    """Say what comes, then `download` one file after the other."""
    if progress:
        size = " (120 GB for the images)" if task_name == "inaturalist" else ""
        print(f"{task_name}: downloading {len(wanted)} file(s){size} to {folder}", flush=True)
    return [download(official, folder, progress, task_name) for official in wanted]


def download(official: Official, folder: Path, progress: bool = True, task_name: str = "TASK") -> Path:
    """Fetch an official file into `folder` unless it is there, and check its digest.

    Bytes go to `<name>.part`, which a later call resumes; the file gets its name when its digest is right.

    Raises:
        InputError: no connection, a connection that broke (the part is kept), a wrong digest (the part is removed).
    """
    target = folder / official.name
    part = folder / f"{official.name}.part"
    if not target.exists():
        way_out = (
            f"Run again to go on from there, or fetch it by other means, put it in {folder} and run again, or name "
            f"the folder it is in: `python -m sat_lib data prepare {task_name} --source DIR`"
        )
        _fetch(official.url, part, progress, way_out)
    path = target if target.exists() else part
    found = file_digest(path, official.algorithm)
    if found != official.digest:
        part.unlink(missing_ok=True)
        removed = "It was removed; run again" if path == part else "Delete it and run again"
        raise InputError(mismatch(path, official, found, removed))
    return path.replace(target)


def _fetch(url: str, part: Path, progress: bool, way_out: str) -> None:
    """Append to `part` what of `url` it does not hold yet."""
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=30) as response:
            if have and response.status != http.HTTPStatus.PARTIAL_CONTENT:
                have = 0  # a server that cannot resume sends everything again
            total = have + int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
            look = {"bytes": False, "unit": "B", "unit_scale": True, "initial": have, "disable": not progress}
            bar = tqdm.wrapattr(response, "read", total, desc=part.stem, **look)
            with part.open("ab" if have else "wb") as file, bar as body:
                shutil.copyfileobj(body, file, 1 << 20)
        if total is not None and part.stat().st_size < total:
            raise http.client.IncompleteRead(b"", total - part.stat().st_size)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # that one: nothing is missing
            raise InputError(f"could not download {url}: {error}. {way_out}") from error
    except (OSError, http.client.HTTPException) as error:
        have = part.stat().st_size if part.exists() else 0
        kept = f"{have:,} bytes are kept in {part}. " if have else ""
        raise InputError(f"could not download {url}: {error}. {kept}{way_out}") from error
