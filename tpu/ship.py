"""What is shipped to workers: the files of a git working tree, with uncommitted changes."""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import subprocess
import tarfile


@dataclasses.dataclass(frozen=True)
class Revision:
    """What was shipped.

    Attributes:
      revision: the commit.
      diff_sha256: of everything that differs from it: the diff, and files that git does not know
        yet; empty where nothing does.
      files: how many were shipped.
      left_out: what git lists and a file cannot hold: submodules.
    """

    revision: str
    diff_sha256: str
    files: int
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        changed = f" with changes {self.diff_sha256[:8]}" if self.diff_sha256 else ""
        return f"{self.revision[:12]}{changed}, {self.files} files"


def pack(tree: pathlib.Path, archive: pathlib.Path, state: pathlib.Path) -> Revision:
    """Write an archive of a working tree, REVISION.json in it.

    Files are what git tracks, as they are now, and what it would track with the next commit; what
    it ignores stays here, and so does what it does not know below the folder of tpu.run itself.

    Args:
      tree: the top of a git working tree.
      archive: where to write, a .tar.gz.
      state: the folder in which tpu.run keeps what it knows, and archives.
    Returns: what was packed.
    Raises: ValueError where there is no git or no commit, or where `state` is the tree.
    Example:
      >>> pack(pathlib.Path("/"), pathlib.Path("unused"), pathlib.Path("runs"))
      Traceback (most recent call last):
        ...
      ValueError: ...
    """
    top = pathlib.Path(_git(tree, "rev-parse", "--show-toplevel").decode().strip())
    if top.resolve() != tree.resolve():
        raise ValueError(f"{tree} is not the top of its git working tree; start from {top}")
    revision = _git(tree, "rev-parse", "HEAD").decode().strip()
    own, there = state.resolve(), tree.resolve()
    if own == there:
        raise ValueError(f"--state={state} is the tree that is shipped; name another folder")
    inside = f"{own.relative_to(there).as_posix()}/" if own.is_relative_to(there) else ""
    unknown = _names(tree, "--others")
    unknown = [name for name in unknown if not inside or not name.startswith(inside)]
    names = sorted({*_names(tree, "--cached"), *unknown})
    digest = hashlib.sha256(changes := _git(tree, "diff", "HEAD", "--binary"))
    found = [name for name in names if (tree / name).is_symlink() or (tree / name).is_file()]
    new = [name for name in unknown if name in set(found)]
    for name in new:
        digest.update(os.fsencode(name) + b"\0" + hashlib.sha256(_bytes(tree / name)).digest())
    left_out = tuple(name for name in set(names) - set(found) if (tree / name).is_dir())
    made = Revision(revision, digest.hexdigest() if changes or new else "", len(found), left_out)
    text = json.dumps(dataclasses.asdict(made)).encode()
    archive.parent.mkdir(parents=True, exist_ok=True)
    unfinished = archive.with_name(archive.name + ".new")
    with tarfile.open(unfinished, "w:gz") as tar:
        for name in found:
            tar.add(tree / name, arcname=name, recursive=False)
        entry = tarfile.TarInfo("REVISION.json")
        entry.size = len(text)
        tar.addfile(entry, io.BytesIO(text))
    unfinished.replace(archive)
    return made


def member(archive: pathlib.Path, name: str) -> str:
    """Read a file of an archive; empty where it is not in it."""
    with tarfile.open(archive) as tar:
        try:
            file = tar.extractfile(name)
        except KeyError:
            return ""
        return file.read().decode() if file is not None else ""


def _names(tree: pathlib.Path, *which: str) -> list[str]:
    said = _git(tree, "ls-files", *which, "--exclude-standard", "-z")
    return sorted({os.fsdecode(name) for name in said.split(b"\0") if name} - {"REVISION.json"})


def _bytes(path: pathlib.Path) -> bytes:
    return os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes()


def _git(tree: pathlib.Path, *words: str) -> bytes:
    try:
        done = subprocess.run(["git", *words], cwd=tree, capture_output=True)
    except FileNotFoundError:
        raise ValueError("git is not on PATH; what is shipped is what it lists") from None
    if done.returncode:
        said = (done.stderr.decode(errors="replace").strip().splitlines() or ["no word"])[0]
        raise ValueError(f"git {words[0]}, in {tree}: {said}")
    return done.stdout
