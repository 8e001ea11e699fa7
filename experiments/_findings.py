"""What an experiment leaves behind: verdicts computed from numbers, a table, summary.json."""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import rich.box
import rich.console
import rich.table

from experiments._report import environment
from jax_attn.command_line import parse

Config = TypeVar("Config", bound=Any)

WORDS = {True: "holds", False: "does not hold", None: "undecided"}


class Verdict(NamedTuple):
    """A statement, what was expected and from where, what was measured, and whether it holds."""

    statement: str
    expected: str
    measured: str
    holds: bool | None
    """None: some seeds say yes and some say no."""


def spread(values: Any, digits: int = 4) -> str:
    """Write seeds as their mean, with the least and the largest: `0.75 [0.5, 1]`.

    Args:
      values: one number for each seed.
      digits: significant ones.
    Returns: text.
    Example:
      >>> spread([1.0, 0.5]), spread([0.25])
      ('0.75 [0.5, 1]', '0.25')
    """
    x = np.atleast_1d(np.asarray(values, dtype=float))
    mean = f"{x.mean():.{digits}g}"
    return mean if x.size == 1 else f"{mean} [{x.min():.{digits}g}, {x.max():.{digits}g}]"


def gate(
    statement: str,
    values: Any,
    *,
    least: float | None = None,
    most: float | None = None,
    source: str = "",
) -> Verdict:
    """Judge one number of each seed against bounds.

    Args:
      statement: what would be true if it holds.
      values: one number for each seed; not a number counts as a failure.
      least, most: bounds, either or both.
      source: where the bounds are from.
    Returns: holds if every seed lies within, does not hold if none does, else undecided.
    Raises: ValueError: neither bound, or no values.
    Example:
      >>> gate("recall is perfect", [1.0, 0.995], least=0.99).holds
      True
      >>> gate("recall is perfect", [1.0, 0.5], least=0.99).holds is None
      True
    """
    x = np.atleast_1d(np.asarray(values, dtype=float))
    if x.size == 0 or (least is None and most is None):
        raise ValueError("gate needs at least one value, and least or most")
    within = np.isfinite(x)
    if least is not None:
        within &= x >= least
    if most is not None:
        within &= x <= most
    ends = {"at least": least, "at most": most}
    bounds = " and ".join(f"{word} {b:.6g}" for word, b in ends.items() if b is not None)
    holds = True if within.all() else False if not within.any() else None
    expected = f"{bounds} ({source})" if source else bounds
    return Verdict(statement, expected, spread(x), holds)


class Figure(NamedTuple):
    """A picture in the folder of the run, and what it shows."""

    file: str
    caption: str


class Answer(NamedTuple):
    """What an experiment found: rows of a table, verdicts and pictures, in reading order."""

    table: Sequence[Mapping[str, Any]]
    """Rows of like keys; a list or array is a number for each seed."""
    verdicts: Sequence[Verdict]
    figures: Sequence[Figure]


def run(
    doc: str,
    config: type[Config],
    presets: Mapping[str, Mapping[str, Any]],
    argv: Sequence[str] | None,
    check: Callable[[Config], jax.sharding.Mesh],
    find: Callable[[Config, jax.sharding.Mesh, pathlib.Path], Answer],
) -> int:
    """Run an experiment: read its command line, measure, write summary.json, print what it says.

    Args:
      doc: the experiment's docstring; its first line is the question.
      config: dataclass with `out`, the folder to write to.
      presets, argv: as for `jax_attn.command_line.parse`.
      check: config -> mesh; raises ValueError for what cannot be run, before anything is written.
      find: config, mesh and folder -> answer; metrics.jsonl is not there when it begins.
    Returns: exit status: 0 whatever the verdicts are, 2 for a wrong argument.
    """
    began = time.perf_counter()
    cfg = parse(config, presets, doc, argv)
    out = pathlib.Path(cfg.out)
    try:
        if not cfg.out:
            raise ValueError("--out must name a folder")
        mesh = check(cfg)
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.jsonl").unlink(missing_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    answer = find(cfg, mesh, out)
    summary = {
        "question": doc.strip().splitlines()[0],
        "config": dataclasses.asdict(cfg),
        **environment(),
        "table": [{k: _plain(v) for k, v in row.items()} for row in answer.table],
        "verdicts": [{**v._asdict(), "verdict": WORDS[v.holds]} for v in answer.verdicts],
        "figures": [figure._asdict() for figure in answer.figures],
        "seconds": round(time.perf_counter() - began, 1),
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
    (out / "summary.json").write_text(text + "\n", encoding="utf-8")
    show(summary["table"], answer.verdicts)
    print(f"wrote {out / 'summary.json'} in {summary['seconds']:.0f} s")
    return 0


def show(rows: Sequence[Mapping[str, Any]], verdicts: Sequence[Verdict]) -> None:
    """Print a table and verdicts."""
    console = rich.console.Console()
    shown = rich.table.Table(box=rich.box.SIMPLE)
    for i, name in enumerate(rows[0] if rows else ()):
        shown.add_column(name, justify="right" if i else "left")
    for row in rows:
        shown.add_row(*[_cell(value) for value in row.values()])
    console.print(shown)
    for v in verdicts:
        style = {True: "green", False: "red", None: "yellow"}[v.holds]
        console.print(f"[{style}]{WORDS[v.holds].upper():>13}[/]  {v.statement}", highlight=False)
        line = f"               measured {v.measured}; expected {v.expected}"
        console.print(line, highlight=False, markup=False)


def script(main: Callable[[], int]) -> None:
    """Run an experiment as a script: exit with its status, or with 130 after Ctrl-C.

    Args:
      main: returns the status.
    """
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("stopped; what was measured so far is in the run's folder", file=sys.stderr)
        raise SystemExit(130) from None


def _plain(value: Any) -> Any:
    """Make a value JSON: numbers that are not finite become text."""
    if isinstance(value, str) or value is None:
        return value
    x = np.asarray(value)
    if x.ndim:
        return [_plain(one) for one in x]
    if x.dtype.kind == "f":
        number = float(x)
        return float(f"{number:.6g}") if np.isfinite(number) else str(number)
    return x.item()


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return spread([float(one) for one in value])
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)
