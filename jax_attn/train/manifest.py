"""What makes a saved step complete, and what tells that it was damaged since.

00001000.saving/         a save that is under way, or what a killed one left
00001000/                complete: it gets this name last
00001000/state/...       what Orbax wrote
00001000/manifest.json   size and SHA-256 of every file in state/, the leaves, what the run said
00001000/COMMIT          SHA-256 of manifest.json
00001000/HEALTHY         added once a later update was made, with a finite loss
00001000.removing/       a step that is being removed, or what a killed process left of it
00001000.damaged/        a step that was set aside: nothing removes it
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

STATE, MANIFEST, COMMIT, HEALTHY = "state", "manifest.json", "COMMIT", "HEALTHY"


def steps(folder: pathlib.Path) -> list[int]:
    """Return the steps in a folder, rising; empty without a folder.

    A name that no save would make, such as "70", is somebody's copy, and no step.
    """
    if not folder.exists():
        return []
    found = [path.name for path in folder.iterdir() if re.fullmatch(r"\d{8,}", path.name)]
    return sorted(int(name) for name in found if name == f"{int(name):08d}")


def beside(folder: pathlib.Path, what: str) -> pathlib.Path:
    """Return where a step is while it is "saving" or "removing", or once it is "damaged".

    Example:
      >>> beside(pathlib.Path("00000030"), "saving").name
      '00000030.saving'
    """
    return folder.with_name(f"{folder.name}.{what}")


def write(folder: pathlib.Path, said: Mapping[str, Any]) -> None:
    """Make the step that `folder` is named for complete: hash its files, then give it its name."""
    saving = beside(folder, "saving")
    files = {name: {"bytes": size, "sha256": sha} for name, (size, sha) in _hashes(saving).items()}
    text = json.dumps({**said, "files": files}, indent=1)
    put(saving / MANIFEST, text)
    put(saving / COMMIT, hashlib.sha256(text.encode()).hexdigest())
    saving.rename(folder)
    _settle(folder.parent)


def put(path: pathlib.Path, text: str) -> None:
    """Write a small file: after a crash it has all of the text, or what it had before."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _settle(path.parent)


def remove(folder: pathlib.Path) -> None:
    """Remove a step; killed meanwhile, it leaves nothing that looks like one."""
    removing = beside(folder, "removing")
    if removing.exists():
        shutil.rmtree(removing)
    shutil.rmtree(folder.rename(removing))


def clear(folder: pathlib.Path) -> None:
    """Remove what killed processes left of saves and removals; nothing else."""
    for path in folder.iterdir() if folder.exists() else ():
        if re.fullmatch(r"\d{8,}\.(saving|removing)", path.name):
            shutil.rmtree(path)


def set_aside(folder: pathlib.Path) -> pathlib.Path:
    """Rename a damaged step; return its new name."""
    names = ("damaged" if i == 1 else f"damaged{i}" for i in range(1, 1000))
    return folder.rename(next(p for n in names if not (p := beside(folder, n)).exists()))


def _settle(folder: pathlib.Path) -> None:
    """Wait until the names in a folder are on the disk."""
    with contextlib.suppress(OSError):  # not every file system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(folder: pathlib.Path) -> dict[str, Any]:
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


def damage(folder: pathlib.Path) -> list[str]:
    """Compare a step with its manifest.

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


def _hashes(folder: pathlib.Path) -> dict[str, tuple[int, str]]:
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


def _hash(path: pathlib.Path) -> tuple[int, str]:
    size, sha = 0, hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            size += len(chunk)
            sha.update(chunk)
    return size, sha.hexdigest()
