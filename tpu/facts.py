"""What this machine says of itself, read without JAX, which may be what is broken.

Importing JAX also sets variables of the environment; they are read before anything does.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import re
from collections.abc import Iterator, Mapping

PACKAGES = ("jax", "jaxlib", "libtpu", "libtpu-nightly", "numpy")
LOCK = "tmp/libtpu_lockfile"
# PCI vendor and devices; JAX looks for the same ones (jax/_src/hardware_utils.py).
VENDOR = "0x1ae0"
CHIPS = {"0x005e": "v4", "0x0063": "v5e", "0x0062": "v5p", "0x006f": "v6e", "0x0076": "7x"}
DEVICE = re.compile(r"/dev/(?:vfio/(?:\d+|vfio)|accel\d+|accel/accel\d+)")


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process that has a TPU's device file or libtpu's lock open."""

    pid: int
    command: str
    paths: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Facts:
    """All that the checks are made from; a test plants its own."""

    python: str = "3.13.0"
    packages: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Version by name, of those of `PACKAGES` that are installed."""
    jax_needs: tuple[str, ...] = ()
    """Requirements of the installed JAX, as its metadata writes them."""
    environ: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chips: tuple[str, ...] = ()
    """Generation of each TPU chip on the PCI bus."""
    holders: tuple[Holder, ...] = ()
    hidden: int = 0
    """Processes of other users, whose open files cannot be read."""
    lock: str = ""
    """Of libtpu's lock file: "" where there is none, "mine" where it can be opened, else "foreign"
    """
    hugepages: str = ""
    """The kernel's setting in brackets, "" where it does not say."""

    @property
    def tpu(self) -> bool:
        """Whether this is a machine with TPUs."""
        return bool(self.chips)


def gather(root: pathlib.Path = pathlib.Path("/")) -> Facts:
    """Read the facts; nothing is changed.

    Args:
      root: of the tree that holds dev, proc, sys and tmp; a test plants one.
    Returns: `Facts`.
    Example:
      >>> gather().python.startswith("3.")
      True
    """
    found, hidden = holders(root)
    lock = root / LOCK
    writable = os.access(lock, os.R_OK | os.W_OK)
    return Facts(
        python=platform.python_version(),
        packages=dict(_installed()),
        jax_needs=_needs("jax"),
        environ=dict(os.environ),
        chips=chips(root),
        holders=found,
        hidden=hidden,
        lock=("mine" if writable else "foreign") if lock.exists() else "",
        hugepages=_hugepages(root),
    )


def chips(root: pathlib.Path) -> tuple[str, ...]:
    """List the generation of each TPU chip on the PCI bus.

    Args:
      root: of the tree that holds sys.
    Returns: names as in `tpu.topology`.
    Example:
      >>> chips(pathlib.Path("/nowhere"))
      ()
    """
    found = []
    for vendor in sorted(root.glob("sys/bus/pci/devices/*.0/vendor")):
        device = _read(vendor.with_name("device")).strip()
        if _read(vendor).strip() == VENDOR and device in CHIPS:
            found.append(CHIPS[device])
    return tuple(found)


def holders(root: pathlib.Path) -> tuple[tuple[Holder, ...], int]:
    """Find the processes that have a TPU's device file or libtpu's lock open.

    A lock names its process even where that process's files belong to another user.

    Args:
      root: of the tree that holds proc and tmp.
    Returns: the processes, and how many others could not be looked into.
    Example:
      >>> holders(pathlib.Path("/nowhere"))
      ((), 0)
    """
    open_by: dict[int, set[str]] = {pid: {f"/{LOCK}"} for pid in _lockers(root)}
    hidden = 0
    for process in root.glob("proc/[0-9]*"):
        try:
            opened = list(process.joinpath("fd").iterdir())
        except PermissionError:
            hidden += 1
            continue
        except OSError:  # it has ended since
            continue
        for file in opened:
            try:
                target = os.readlink(file)
            except OSError:
                continue
            if DEVICE.fullmatch(target) or target.removesuffix(" (deleted)") == f"/{LOCK}":
                open_by.setdefault(int(process.name), set()).add(target)
    made = [Holder(p, _command(root, p), tuple(sorted(open_by[p]))) for p in sorted(open_by)]
    return tuple(made), hidden


def _lockers(root: pathlib.Path) -> Iterator[int]:
    """Yield who locks libtpu's lock file, by the kernel's list of locks."""
    try:
        status = os.stat(root / LOCK)
    except OSError:
        return
    where = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in _read(root / "proc/locks").splitlines():
        # 1: POSIX  ADVISORY  WRITE 4242 08:01:1835012 0 EOF
        held = re.match(r"\d+: \w+ +\w+ +\w+ +(\d+) ([0-9a-f]+:[0-9a-f]+:\d+) ", line)
        if held and held[2] == where and int(held[1]) > 0:
            yield int(held[1])


def _command(root: pathlib.Path, pid: int) -> str:
    text = _read(root / f"proc/{pid}/cmdline").replace("\0", " ").strip()
    text = text or _read(root / f"proc/{pid}/comm").strip() or "?"
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 100 else f"{text[:99]}…"


def _hugepages(root: pathlib.Path) -> str:
    found = re.search(r"\[(\w+)\]", _read(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    return found[1] if found else ""


def _installed() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def _needs(package: str) -> tuple[str, ...]:
    try:
        return tuple(importlib.metadata.requires(package) or ())
    except importlib.metadata.PackageNotFoundError:
        return ()


def _read(path: pathlib.Path) -> str:
    """Read a file of the kernel's, "" where it cannot be read: processes end, sandboxes hide."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
