"""Options of the verbs of tpu.run, and the place that they name."""

import dataclasses
import inspect
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from jax_attn.command_line import Nothing, parse_both
from tpu import steps
from tpu.steps import Desk
from tpu.verbs import Place, check


@dataclasses.dataclass(frozen=True)
class Common:
    """
    --name     of the machines: small letters, digits and dashes
    --state    the folder where this computer keeps what it knows of them
    --dry-run  print the commands, run none; for a name that is not up yet, with the options of up
    """

    name: str = ""
    state: str = "runs/tpu"
    dry_run: bool = False


@dataclasses.dataclass(frozen=True)
class Up(Common):
    """
    --backend      queued (TPU API), compute (Compute Engine), or local: folders here, no cloud
    --target       the slice, as in v5e-16; 2*v5e-16 is two slices
    --workers      how many, for --backend=local alone
    --zone         where, as in us-west4-a
    --project      who pays
    --capacity     on-demand, spot (may be taken at any time) or reserved
    --reservation  what --backend=compute --capacity=reserved takes from
    --poll_s       seconds between looks
    --wait         false: ask, and do not wait until the machines are there
    """

    backend: str = "queued"
    target: str = ""
    workers: int = 0
    zone: str = ""
    project: str = ""
    capacity: str = "on-demand"
    reservation: str = ""
    poll_s: float = 30.0
    wait: bool = True


@dataclasses.dataclass(frozen=True)
class Launch(Common):
    """
    --run   name of the run; the same name again is its next attempt. Default: --name
    --port  where the processes of the job meet. Default: 8476, or a free one with --backend=local
    """

    run: str = ""
    port: int = 0


@dataclasses.dataclass(frozen=True)
class Logs(Common):
    """
    --lines   how many of each worker, from the end
    --follow  or -f: go on until Ctrl-C
    """

    lines: int = 100
    follow: bool = False


@dataclasses.dataclass(frozen=True)
class Status(Common):
    """
    --json  for scripts
    """

    json: bool = False


@dataclasses.dataclass(frozen=True)
class Stop(Common):
    """
    --grace  seconds in which the job may save
    --kill   end what still runs after that
    """

    grace: int = 60
    kill: bool = False


@dataclasses.dataclass(frozen=True)
class Watch(Common):
    """
    --max-hours      then the job saves, and the machines are given back
    --idle-teardown  minutes from the end of the job until they are given back; below 0: they stay
    --poll_s         seconds between looks
    """

    max_hours: float = 24.0
    idle_teardown: float = 10.0
    poll_s: float = 30.0


OPTIONS: dict[str, type[Common]] = {
    "up": Up,
    "sync": Common,
    "setup": Common,
    "launch": Launch,
    "status": Status,
    "logs": Logs,
    "stop": Stop,
    "watch": Watch,
    "down": Common,
}
PLACE = tuple(field.name for field in dataclasses.fields(Place))


def parse(verb: str, words: Sequence[str]) -> Any:
    """Read a verb's options.

    Example:
      >>> parse("stop", ["--name=demo", "--kill"])
      Stop(name='demo', state='runs/tpu', dry_run=False, grace=60, kill=True)
    """
    kinds = dict.fromkeys((OPTIONS[verb], Common))
    told = "\n".join(inspect.getdoc(kind) or "" for kind in kinds)
    doc = f"python -m tpu.run {verb}: see python -m tpu.run --help\n\n{told}"
    return parse_both(Nothing, OPTIONS[verb], {"default": {}}, doc, words)[1]


def divide(verb: str, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take the options of `up` that name machines from a dry run of another verb.

    Returns: words that name machines, with --name and --state; and the others.
    Example:
      >>> divide("sync", ["--name=demo", "--workers=2", "--backend=local", "--dry-run"])
      (['--name=demo', '--workers=2', '--backend=local'], ['--name=demo', '--dry-run'])
    """
    names = [word.removeprefix("--").partition("=")[0].replace("-", "_") for word in words]
    if verb == "up" or "dry_run" not in names or not set(names) & (set(PLACE) - {"name"}):
        return [], list(words)
    both = list(zip(names, words, strict=True))
    return (
        [word for name, word in both if name in (*PLACE, "state")],
        [word for name, word in both if name not in PLACE or name == "name"],
    )


def place_for_up(options: Any, state: pathlib.Path) -> Place:
    """Read the place from options; one that exists with other settings is refused."""
    asked = Place(**{name: getattr(options, name) for name in PLACE})
    if not (state / asked.name / "place.json").exists():
        check(asked)
        return asked
    known = steps.read_place(state, asked.name)
    if asked == Place(asked.name) or asked == known:
        return known
    check(asked)
    desk = Desk(known, state / asked.name)
    if not options.dry_run and steps.look(desk).state != "absent":
        there = vars(known).items()
        settings = " ".join(f"--{name}={value}" for name, value in there if value)
        raise ValueError(f"this name is up with other settings, down first: {settings}")
    return asked


def check_poll(seconds: float) -> None:
    """Refuse a pause that is none, or has no end."""
    if not 0 < seconds < math.inf:
        raise ValueError(f"--poll_s must be above 0 and not inf, got {seconds}")
