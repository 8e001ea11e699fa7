"""Say what made a run: its configuration, versions, code and devices; all processes must agree."""

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy")
_LIBRARY = pathlib.Path(__file__).resolve().parent.parent


def describe(config: Any = None) -> dict[str, Any]:
    """Gather what a later reader of a run needs to know, as JSON's types.

    Args:
      config: a dataclass, a mapping of names to JSON's types, or None.
    Returns: "config", "versions", "code" (SHA-256 of this library and of the script that runs),
      "git" (revision of the script's folder and whether files differ from it; None without one),
      "devices" and "processes".
    Raises: ValueError naming a field of config that JSON cannot hold.
    Example:
      >>> describe({"D": 64})["config"]
      {'D': 64}
    """
    import jax_attn

    versions = {"python": platform.python_version(), "jax-attn": jax_attn.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    return {
        "config": plain(config),
        "versions": versions,
        "code": _code(),
        "git": _git(),
        "devices": {"platform": devices[0].platform, "kind": devices[0].device_kind,
                    "count": len(devices)},
        "processes": jax.process_count(),
    }  # fmt: skip


def plain(config: Any) -> dict[str, Any]:
    """Turn a config into JSON's types, nested dataclasses into nested dicts."""
    if config is None:
        return {}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    if not isinstance(config, Mapping):
        raise ValueError(f"config must be a dataclass or a mapping, got {type(config).__name__}")
    for name, value in config.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"config: {name}={value!r} does not fit into JSON: {error}") from None
    # Through JSON and back: a tuple that was saved comes back as a list.
    return json.loads(json.dumps(dict(config)))


def differences(ours: Any, theirs: Any, at: str = "") -> list[str]:
    """List where two trees of JSON's types differ, a line each: "learning_rate: 0.1, was 0.2"."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        found = []
        for name in sorted(ours.keys() | theirs.keys()):
            below = f"{at}.{name}" if at else name
            if name not in ours:
                found.append(f"{below}: not here, was {theirs[name]!r}")
            elif name not in theirs:
                found.append(f"{below}: {ours[name]!r}, was not there")
            else:
                found += differences(ours[name], theirs[name], below)
        return found
    return [] if ours == theirs else [f"{at}: {ours!r}, was {theirs!r}"]


def agree(said: Mapping[str, Any]) -> None:
    """Compare what every process says of itself with process 0, before the first step.

    Args:
      said: of this process, JSON's types.
    Raises: ValueError on every process, naming the process and where it differs.
    Example:
      >>> agree({"config": {"D": 64}})
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(said, sort_keys=True).encode(), np.uint8)
    lengths = np.ravel(multihost_utils.process_allgather(np.int32(len(text))))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    told = [json.loads(bytes(row[:n])) for row, n in zip(rows, lengths, strict=True)]
    wrong = [
        f"process {index}: {'; '.join(differences(other, told[0]))}".replace(", was", ", process 0")
        for index, other in enumerate(told)
        if other != told[0]
    ]
    if wrong:
        raise ValueError("processes differ from process 0:\n" + "\n".join(wrong))


def _script() -> pathlib.Path | None:
    """Return the file that Python was started with."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return pathlib.Path(file).resolve() if file else None


def _code() -> str:
    """Hash the sources of this library and the script that was started."""
    sha, script = hashlib.sha256(), _script()
    sources = sorted(p for p in _LIBRARY.rglob("*") if p.suffix in (".py", ".cc", ".h"))
    for path in sources + ([script] if script else []):
        if path.is_file():
            sha.update(path.name.encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()


def _git() -> dict[str, Any] | None:
    """Return the revision of the script's folder, and whether files differ from it."""
    script = _script()
    folder = script.parent if script and script.is_file() else pathlib.Path()
    try:
        revision, changed = (
            subprocess.run(
                ["git", "-C", str(folder), *command],
                capture_output=True,
                text=True,
                check=True,
                timeout=20,
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": revision, "changed": bool(changed)}
