"""What makes a saved step complete, and what tells that it was damaged since.

00001000/SAVING         written first: with it and without COMMIT, what is left of a killed save
00001000/state/...      what Orbax wrote
00001000/manifest.json  size and SHA-256 of every file in state/, the leaves, what the run said
00001000/COMMIT         SHA-256 of manifest.json; written last: without it the step does not exist
00001000/HEALTHY        added once a later update was made, with a finite loss
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

STATE, MANIFEST, COMMIT = "state", "manifest.json", "COMMIT"
SAVING, HEALTHY = "SAVING", "HEALTHY"


def write(folder: epath.Path, said: Mapping[str, Any]) -> None:
    """Make a step complete: hash every file, then write the manifest, then the marker."""
    files = {name: {"bytes": size, "sha256": sha} for name, (size, sha) in _hashes(folder).items()}
    text = json.dumps({**said, "files": files}, indent=1)
    put(folder / MANIFEST, text)
    put(folder / COMMIT, hashlib.sha256(text.encode()).hexdigest())


def put(path: epath.Path, text: str) -> None:
    """Write a small file, and wait until it is on the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        with contextlib.suppress(AttributeError, OSError):  # a bucket has no such thing
            os.fsync(file.fileno())


def read(folder: epath.Path) -> dict[str, Any]:
    """Return what a complete step's manifest says, files included.

    Raises: ValueError saying how it is damaged.
    """
    try:
        text = (folder / MANIFEST).read_text()
        if hashlib.sha256(text.encode()).hexdigest() != (folder / COMMIT).read_text().strip():
            raise ValueError(f"{MANIFEST} has changed since it was written")
        said = json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read: {error}") from None
    if said["step"] != int(folder.name):
        raise ValueError(f"holds step {said['step']}: it was renamed")
    return said


def complete(folder: epath.Path) -> bool:
    """Return whether a step was written to its end."""
    return bool(re.fullmatch(r"\d+", folder.name)) and (folder / COMMIT).exists()


def damage(folder: epath.Path) -> list[str]:
    """Compare a complete step with its manifest.

    Returns: a line for each thing that is not as it was written; empty if all is well.
    """
    try:
        expected = read(folder)["files"]
        found = _hashes(folder)
    except (ValueError, OSError) as error:
        return [str(error)]
    wrong = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    wrong += [f"{name} was not there" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        size, sha = found[name]
        if size != expected[name]["bytes"]:
            wrong.append(f"{name} has {size} bytes instead of {expected[name]['bytes']}")
        elif sha != expected[name]["sha256"]:
            wrong.append(f"{name} has other contents, of the same size")
    return wrong


def _hashes(folder: epath.Path) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of every file in `state`, by path."""
    files, folders = [], [folder / STATE]
    while folders:
        for path in folders.pop().iterdir():
            (folders if path.is_dir() else files).append(path)
    # hashlib lets other threads run: training goes on, and so do other files.
    with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
        found = pool.map(_hash, files)
    return {
        str(path.relative_to(folder)): hashed for path, hashed in zip(files, found, strict=True)
    }


def _hash(path: epath.Path) -> tuple[int, str]:
    size, sha = 0, hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            size += len(chunk)
            sha.update(chunk)
    return size, sha.hexdigest()
