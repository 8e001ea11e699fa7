"""What an experiment leaves behind: verdicts computed from numbers, a table, summary.json."""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.console
import rich.table

from experiments._report import environment

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


def write(
    out: pathlib.Path,
    doc: str,
    cfg: Any,
    *,
    table: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Verdict],
    figures: Sequence[Figure],
    began: float,
) -> None:
    """Write summary.json, and print its table and verdicts.

    Args:
      out: the folder; must be there.
      doc: the experiment's docstring; its first line is the question.
      cfg: its config, a dataclass.
      table: rows of like keys; a list or array is a number for each seed.
      verdicts, figures: in reading order.
      began: time.perf_counter() at its start.
    """
    rows = [{k: _plain(v) for k, v in row.items()} for row in table]
    summary = {
        "question": doc.strip().splitlines()[0],
        "config": dataclasses.asdict(cfg),
        **environment(),
        "table": rows,
        "verdicts": [{**v._asdict(), "verdict": WORDS[v.holds]} for v in verdicts],
        "figures": [figure._asdict() for figure in figures],
        "seconds": round(time.perf_counter() - began, 1),
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
    (out / "summary.json").write_text(text + "\n", encoding="utf-8")
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
    console.print(f"wrote {out / 'summary.json'} in {summary['seconds']:.0f} s", highlight=False)


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
