"""What is run, as data: commands, the machines they are for, and what a backend has to say.

A command is a tuple of words, never a string for a shell. Where a shell reads them on the other
side of ssh, they pass through `shlex.join`.
"""

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tpu import topology
from tpu.watch import Cloud

CAPACITIES = ("on-demand", "spot", "reserved")
PORT = 8476  # open between the hosts of a slice; JAX's own 8482 is not


@dataclasses.dataclass(frozen=True)
class Command:
    """Words to run, and why; `cwd` is where, if that matters."""

    argv: tuple[str, ...]
    why: str
    cwd: str = ""


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a command said."""

    code: int
    out: str = ""
    err: str = ""


@dataclasses.dataclass(frozen=True)
class Place:
    """Machines under one name: what `up` asks for, and every other verb reads back."""

    name: str = ""
    backend: str = "queued"
    target: str = ""
    workers: int = 0
    zone: str = ""
    project: str = ""
    capacity: str = "on-demand"
    reservation: str = ""

    @property
    def slice(self) -> topology.Slice:
        """The slice that the target names."""
        return topology.find(self.target)

    @property
    def hosts(self) -> int:
        """Workers of one slice."""
        return self.workers or self.slice.hosts

    @property
    def count(self) -> int:
        """Workers of all slices."""
        return self.workers or self.slice.hosts * self.slice.slices

    @property
    def root(self) -> str:
        """The folder on each worker, below where ssh arrives."""
        return f"tpu-run/{self.name}"


@dataclasses.dataclass(frozen=True)
class Job:
    """A program and the run that it belongs to; started again it goes on with the same run."""

    run: str
    argv: tuple[str, ...]
    attempt: int = 1


class Backend(Protocol):
    """Where machines come from. Every method only says what to run, or reads what was replied."""

    @property
    def place(self) -> Place: ...

    def create(self) -> list[Command]:
        """What asks for the machines."""
        ...

    def look(self) -> list[Command]:
        """What shows their state."""
        ...

    def seen(self, replies: Sequence[Reply]) -> Cloud:
        """Read the replies to `look`."""
        ...

    def send(self, cloud: Cloud, files: Sequence[str]) -> list[Command]:
        """What copies files to each worker, to where ssh arrives."""
        ...

    def everywhere(self, cloud: Cloud, words: Sequence[str], why: str) -> list[Command]:
        """What runs words on every worker; each is told its own number with --index or --first."""
        ...

    def delete(self) -> list[Command]:
        """What gives the machines back."""
        ...

    def remains(self) -> list[Command]:
        """What lists everything that may still be paid for."""
        ...

    def left(self, replies: Sequence[Reply]) -> list[str]:
        """Read the replies to `remains`: names of what is left."""
        ...


def check(place: Place) -> None:
    """Refuse a place that cannot be asked for.

    Raises: ValueError naming the option, what it got and what to do.
    Example:
      >>> check(Place("demo", "local", workers=2))
      >>> check(Place("demo", "queued", "v5e-16", zone="us-west4-a"))
      Traceback (most recent call last):
        ...
      ValueError: --project must name the project that pays
    """
    check_name(place.name)
    if place.backend not in ("queued", "compute", "local"):
        raise ValueError(f"--backend must be queued, compute or local, got {place.backend!r}")
    if place.capacity not in CAPACITIES:
        raise ValueError(f"--capacity must be one of {', '.join(CAPACITIES)}, got {place.capacity}")
    if place.backend == "local":
        if not 1 <= place.workers <= 64:
            raise ValueError(f"--workers must be from 1 to 64, got {place.workers}")
        for name in ("target", "zone", "project", "reservation"):
            if getattr(place, name):
                raise ValueError(f"--{name} means nothing to --backend=local, leave it out")
        return
    if place.workers:
        raise ValueError("--workers is for --backend=local; a slice's follow from --target")
    if not place.target:
        raise ValueError("--target must name a slice, as in --target=v5e-16")
    generation = place.slice.generation
    if place.backend == "queued" and not generation.runtime:
        raise ValueError(
            f"--target={place.target}: the TPU API does not know {generation.name}; "
            "use --backend=compute"
        )
    if place.backend == "compute" and generation.name not in ("v5p", "v6e", "7x"):
        raise ValueError(
            f"--target={place.target}: Compute Engine has v5p, v6e and 7x; use --backend=queued"
        )
    if place.backend == "compute" and place.slice.slices > 1:
        raise ValueError(f"--target={place.target}: --backend=compute makes one slice")
    if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", place.zone):
        raise ValueError(f"--zone must be one such as us-west4-a, got {place.zone!r}")
    if not place.project:
        raise ValueError("--project must name the project that pays")
    if not re.fullmatch(r"[a-z][-a-z0-9:.]{4,}[a-z0-9]", place.project):
        raise ValueError(f"--project must be a project's id, got {place.project!r}")
    named = bool(place.reservation)
    if named != (place.backend == "compute" and place.capacity == "reserved"):
        raise ValueError(
            "--reservation names what --backend=compute --capacity=reserved takes from, "
            f"got {place.reservation!r}"
        )


def check_name(name: str) -> None:
    """Refuse a name that Google Cloud or a folder would not take.

    Example:
      >>> check_name("Demo 1")
      Traceback (most recent call last):
        ...
      ValueError: --name must be small letters, digits and dashes, at most 40, got 'Demo 1'
    """
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise ValueError(
            f"--name must be small letters, digits and dashes, at most 40, got {name!r}"
        )


def check_job(place: Place, job: Job) -> None:
    """Refuse a job that could not go on elsewhere.

    Raises: ValueError naming what to give.
    Example:
      >>> check_job(Place("demo", "local", workers=2), Job("demo", ("python", "--out=runs/x")))
      Traceback (most recent call last):
        ...
      ValueError: --out='runs/x' is below a folder that each worker has for itself; name ...
    """
    if not job.argv:
        raise ValueError("nothing to launch; put the command after --: launch --name=... -- python")
    if not re.fullmatch(r"[A-Za-z0-9][-\w.]{0,99}", job.run):
        raise ValueError(f"--run must be letters, digits, dots and dashes, got {job.run!r}")
    for word in job.argv:
        name, equals, value = word.partition("=")
        if name != "--out" or not equals or value.startswith("/") or "://" in value:
            continue
        if place.count > 1 or place.capacity == "spot":
            raise ValueError(
                f"--out={value!r} is below a folder that each worker has for itself; name one "
                "that all share and that outlives them by its path from /: a mounted bucket or a "
                "network disk"
            )


def worker(
    place: Place, verb: str, options: Mapping[str, Any], command: Sequence[str] = ()
) -> tuple[str, ...]:
    """Write the words of `worker.sh VERB`; an option of True has no value, one of "" is left out.

    Example:
      >>> worker(Place("demo"), "stop", {"grace": 60, "kill": True})
      ('bash', 'tpu-run/demo/worker.sh', 'stop', '--root=tpu-run/demo', '--grace=60', '--kill')
    """
    script = f"tpu-run-{place.name}.sh" if verb == "unpack" else f"{place.root}/worker.sh"
    words = ["bash", script, verb, f"--root={place.root}"]
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not False and value != "":
            words.append(f"--{name}={value}")
    return (*words, *(("--", *command) if command else ()))


def numbered(words: Sequence[str], option: str) -> tuple[str, ...]:
    """Put an option before the job's own words.

    Example:
      >>> numbered(("bash", "worker.sh", "launch", "--", "python"), "--index=1")
      ('bash', 'worker.sh', 'launch', '--index=1', '--', 'python')
    """
    words = tuple(words)
    at = words.index("--") if "--" in words else len(words)
    return (*words[:at], option, *words[at:])


def written(commands: Sequence[Command]) -> str:
    """Write commands as a person would type them, each below its reason.

    Example:
      >>> print(written([Command(("echo", "a b"), "for fun", "/tmp")]))
      # for fun
      (cd /tmp && echo 'a b')
    """
    lines = []
    for command in commands:
        text = shlex.join(command.argv)
        where = f"(cd {shlex.quote(command.cwd)} && {text})" if command.cwd else text
        lines += [f"# {command.why}", where]
    return "\n".join(lines)
