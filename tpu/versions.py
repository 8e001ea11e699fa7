"""Versions that fit together, and those known to be bad."""

import dataclasses
import re
from collections.abc import Sequence

from tpu.checks import FAILED, WARNING, Row, merged
from tpu.facts import Facts

LEAST = {"python": "3.11", "jax": "0.10.2"}  # as in pyproject.toml


@dataclasses.dataclass(frozen=True)
class Bad:
    """Versions of a package that must not be used, first and last included."""

    package: str
    first: str
    last: str
    why: str
    do: str


KNOWN_BAD = (
    Bad(
        "libtpu",
        "0.0.43",
        "0.0.45",
        "DMA in Pallas kernels can return zeros without an error (jax issue 39744)",
        'pip install -U "jax[tpu]", which pins another libtpu',
    ),
)


def versions(facts: Facts) -> Row:
    """Compare versions with what JAX asks for, and with those known to be bad.

    Args:
      facts: `python`, `packages`, `jax_needs`; on a TPU machine libtpu is needed.
    Returns: one row.
    Example:
      >>> have = {"jax": "0.12.0", "jaxlib": "0.12.0", "libtpu": "0.0.44"}
      >>> versions(Facts(packages=have)).verdict
      'FAILED'
    """
    have, found = dict(facts.packages), []
    for package, least in LEAST.items():
        version = facts.python if package == "python" else have.get(package)
        if version and _numbers(version) < _numbers(least):
            do = f"use Python {least} or newer"
            do = do if package == "python" else f'pip install "{package}>={least}"'
            found.append((FAILED, f"{package} {version} is older than {least}", do))
    install = f"pip install jax=={have.get('jax', '')}".removesuffix("==")
    for package in ("jax", "jaxlib"):
        if package not in have:
            found.append((FAILED, f"{package} is not installed", "pip install -e . here"))
    needed = _asked("jaxlib", facts.jax_needs)
    if "jaxlib" in have and needed and not _fits(have["jaxlib"], needed):
        seen = f"jaxlib {have['jaxlib']} does not fit jax {have.get('jax')}, which needs {needed}"
        found.append((FAILED, seen, install))
    for_tpu = install.replace("jax", "'jax[tpu]", 1) + "'"
    pinned = _asked("libtpu", facts.jax_needs, extra="tpu")
    if facts.tpu and "libtpu" not in have:
        found.append((FAILED, "libtpu is not installed, so JAX cannot use the TPU", for_tpu))
    elif "libtpu" in have and pinned and not _fits(have["libtpu"], pinned):
        seen = f"libtpu {have['libtpu']} is not the one jax[tpu] pins, {pinned}"
        found.append((WARNING, seen, for_tpu))
    if "libtpu" in have and "libtpu-nightly" in have:
        seen = "libtpu and libtpu-nightly are both installed, and one overwrites the other"
        do = f"pip uninstall -y libtpu libtpu-nightly; {for_tpu}"
        found.append((FAILED, seen, do))
    for bad in KNOWN_BAD:
        version = have.get(bad.package, "")
        first, this, last = (_numbers(v)[:3] for v in (bad.first, version, bad.last))
        if first <= this <= last:
            found.append((FAILED, f"{bad.package} {version}: {bad.why}", bad.do))
    listed = " · ".join([f"Python {facts.python}", *(f"{n} {v}" for n, v in have.items())])
    return merged("versions", found, listed, {"python": facts.python, **have})


def _numbers(version: str) -> tuple[int, ...]:
    """Read the numbers that a version begins with, with zeros after them: 1.2 is 1.2.0."""
    start = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in start[0].split(".")] if start else []
    return tuple((numbers + [0] * 6)[:6])


def _asked(package: str, requirements: Sequence[str], extra: str = "") -> str:
    """Find what a package's metadata asks of another: ">=0.11.2,<=0.12.0"."""
    for line in requirements:
        wanted, _, marker = line.partition(";")
        named = re.fullmatch(rf"{package}\s*([<>=!~].*)", wanted.strip())
        if named and marker.replace("'", '"').strip() == (f'extra == "{extra}"' if extra else ""):
            return named[1].strip()
    return ""


def _fits(version: str, wanted: str) -> bool:
    """Whether a version is within bounds; a kind of bound not known here is taken as kept."""
    for bound in wanted.split(","):
        bound = bound.strip()
        text = bound.lstrip("<>=!~")
        sign = bound.removesuffix(text)
        length = text.count(".") if text.endswith(".*") else 6
        have, other = _numbers(version)[:length], _numbers(text)[:length]
        kept = {
            "==": have == other, "!=": have != other, "<=": have <= other, ">=": have >= other,
            "<": have < other, ">": have > other,
        }  # fmt: skip
        if not kept.get(sign, True):
            return False
    return True
