"""What an experiment leaves behind: verdicts computed from numbers, a table, summary.json."""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import rich.box
import rich.console
import rich.table
import scipy.special

from experiments._report import environment, revision
from jax_attn import data
from jax_attn.command_line import parse
from jax_attn.lock import hold

Config = TypeVar("Config", bound=Any)

WORDS = {True: "holds", False: "does not hold", None: "undecided"}
MARK = ".experiment"  # in the folder of a run: whose it is, and the lock of the one that writes


class Verdict(NamedTuple):
    """A statement, what was expected and from where, what was measured, and whether it holds."""

    statement: str
    expected: str
    measured: str
    holds: bool | None
    """None: undecided."""
    values: tuple[float, ...] = ()
    """What was judged, a number for each seed."""
    exact: bool = False
    """True of an identity, which one seed and a model that learned nothing show as well."""


def spread(values: Any, digits: int = 4) -> str:
    """Write seeds as their mean, with the least and the largest: `0.75 [0.5, 1]`.

    Args:
      values: one number for each seed; those that are not finite are counted, not averaged.
      digits: significant ones.
    Returns: text.
    Example:
      >>> spread([1.0, 0.5]), spread([0.25])
      ('0.75 [0.5, 1]', '0.25')
      >>> spread([1.0, 0.5, float("nan")])
      '0.75 [0.5, 1], 1 of 3 not finite'
    """
    every = np.atleast_1d(np.asarray(values, dtype=float))
    x = every[np.isfinite(every)]
    if x.size == 0:
        return str(every[0])
    lost = f", {every.size - x.size} of {every.size} not finite" if x.size < every.size else ""
    mean = f"{x.mean():.{digits}g}"
    ends = f" [{x.min():.{digits}g}, {x.max():.{digits}g}]" if every.size > 1 else ""
    return mean + ends + lost


def gate(
    statement: str,
    values: Any,
    *,
    least: float | None = None,
    most: float | None = None,
    source: str = "",
    exact: bool = False,
    whole: bool = False,
) -> Verdict:
    """Judge one number of each seed against bounds.

    Args:
      statement: what would be true if it holds.
      values: one number for each seed; not a number counts as a failure.
      least, most: bounds, either or both.
      source: where the bounds are from.
      exact: that it is an identity, which one seed decides.
      whole: that the one number is of all seeds together.
    Returns: holds if every seed lies within, does not hold if none does; undecided if some do, and
      if there is one seed only.
    Raises: ValueError: neither bound, or no values.
    Example:
      >>> gate("recall is perfect", [1.0, 0.995], least=0.99).holds
      True
      >>> gate("recall is perfect", [1.0, 0.5], least=0.99).holds is None
      True
      >>> gate("recall is perfect", [1.0], least=0.99).measured
      '1; one seed decides nothing, it lies within'
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
    made = Verdict(statement, expected, spread(x), holds, tuple(x.tolist()), exact)
    if x.size > 1 or exact or whole:
        return made
    return moot(made, f"one seed decides nothing, it lies {'within' if holds else 'outside'}")


def positive(statement: str, differences: Any, *, source: str = "") -> Verdict:
    """Judge whether a difference, of which only the sign is expected, is above 0.

    Seeds scatter around the mean m with deviation s, so m is known to m ± t s / sqrt(n), with t of
    Student's distribution of n - 1 degrees of freedom: the 95 % interval.

    Args:
      statement: what would be true if the difference is above 0.
      differences: one for each seed, of two numbers of the same seed.
      source: where the expectation is from.
    Returns: holds if the interval lies above 0, does not hold if below, else undecided; undecided
      too if a seed has no number.
    Raises: ValueError: no differences.
    Example:
      >>> positive("more is better", [0.3, 0.31, 0.32]).holds
      True
      >>> positive("more is better", [0.01, 0.31, 0.02]).holds is None
      True
    """
    x = np.atleast_1d(np.asarray(differences, dtype=float))
    if x.size == 0:
        raise ValueError("positive needs at least one difference")
    expected = "mean above 0 by its 95 % interval" + (f" ({source})" if source else "")
    made = Verdict(statement, expected, spread(x), None, tuple(x.tolist()))
    if x.size == 1:
        return moot(made, f"one seed decides nothing, it is {'above' if x[0] > 0 else 'not above'}")
    if not np.isfinite(x).all():
        return moot(made, "a seed without a number decides nothing")
    half = float(scipy.special.stdtrit(x.size - 1, 0.975) * x.std(ddof=1) / math.sqrt(x.size))
    low, high = float(x.mean()) - half, float(x.mean()) + half
    said = f"{spread(x)}; mean within {low:.4g} to {high:.4g}"
    return made._replace(measured=said, holds=True if low > 0 else False if high < 0 else None)


def moot(verdict: Verdict, why: str) -> Verdict:
    """Leave a verdict undecided, and say why.

    Example:
      >>> moot(gate("x", [1.0, 2.0], least=0.0), "nothing was learned").measured
      '1.5 [1, 2]; nothing was learned'
    """
    return verdict._replace(holds=None, measured=f"{verdict.measured}; {why}")


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
    text: data.Text | None = None
    """What was trained on, if it was a text."""
    untrained: str = ""
    """Why nothing but identities can be judged of these models, such as a loss that is too high."""
    fitted: Mapping[str, Any] = {}
    """What was fitted to the table: the name of a number to its value and interval."""


def run(
    doc: str,
    config: type[Config],
    presets: Mapping[str, Mapping[str, Any]],
    argv: Sequence[str] | None,
    check: Callable[[Config], jax.sharding.Mesh],
    find: Callable[[Config, jax.sharding.Mesh, pathlib.Path], Answer],
) -> int:
    """Run an experiment: read its command line, measure, write summary.json, print what it says.

    The folder is the experiment's own: one that holds something else, or in which another process
    is at work, is refused. Summary, figures and metrics.jsonl of an earlier run are removed first.

    Args:
      doc: the experiment's docstring; its first line is the question.
      config: dataclass with `out`, the folder to write to.
      presets, argv: as for `jax_attn.command_line.parse`.
      check: config -> mesh; raises ValueError for what cannot be run, before anything is written.
      find: config, mesh and folder -> answer; metrics.jsonl is not there when it begins.
    Returns: exit status: 0 whatever the verdicts are, 1 out of memory, 2 for a wrong argument, 130
      after Ctrl-C.
    """
    began = time.perf_counter()
    argv = list(sys.argv[1:] if argv is None else argv)
    cfg = parse(config, presets, doc, argv)
    name, out = pathlib.Path(inspect.getfile(find)).stem, pathlib.Path(cfg.out)
    preset = [word.partition("=")[2] for word in argv if word.startswith("--preset=")]
    with contextlib.ExitStack() as stack:
        try:
            if not cfg.out:
                raise ValueError("--out must name a folder")
            mesh = check(cfg)
            stack.enter_context(_own(out, name))
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        at = revision()
        try:
            answer = find(cfg, mesh, out)
        except KeyboardInterrupt:
            log = out / "metrics.jsonl"
            left = f"{log} has what was measured" if log.exists() else "nothing was measured"
            print(f"stopped; {left}", file=sys.stderr)
            return 130
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"error: out of memory, make it smaller: {error}"[:300], file=sys.stderr)
            return 1
        summary = {
            "question": doc.strip().splitlines()[0],
            "command": shlex.join(["python", "-m", f"experiments.{name}", *argv]),
            "preset": (preset or ["default"])[0],
            "config": dataclasses.asdict(cfg),
            **environment(),
            "revision": at,
            "text": answer.text and {"name": answer.text.name, "sha256": answer.text.sha256},
            **findings(answer),
            "seconds": round(time.perf_counter() - began, 1),
        }
        text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
        partial = out / "summary.partial"
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, out / "summary.json")
    show(summary["table"], judged(answer))
    print(f"wrote {out / 'summary.json'} in {summary['seconds']:.0f} s")
    return 0


def judged(answer: Answer) -> list[Verdict]:
    """Return the verdicts of an answer, undecided where its models have not learned enough."""
    return [
        moot(v, answer.untrained) if answer.untrained and not v.exact else v
        for v in answer.verdicts
    ]


def findings(answer: Answer) -> dict[str, Any]:
    """Make the part of summary.json that is of the answer: table, fits, verdicts, figures."""
    return {
        "table": [{k: _plain(v) for k, v in row.items()} for row in answer.table],
        "fitted": {
            name: {k: _plain(v) for k, v in one.items()} for name, one in answer.fitted.items()
        },
        "verdicts": [
            {**v._asdict(), "values": _plain(v.values), "verdict": WORDS[v.holds]}
            for v in judged(answer)
        ],
        "figures": [figure._asdict() for figure in answer.figures],
    }


@contextlib.contextmanager
def _own(out: pathlib.Path, name: str) -> Iterator[None]:
    """Hold the folder of a run alone, without an earlier one's summary, figures and metrics."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out={out} is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    mark, old = out / MARK, out / "summary.json"
    owner = mark.read_text(encoding="utf-8").strip() if mark.exists() else ""
    if owner != name and (old.exists() or (out / "metrics.jsonl").exists()):
        raise ValueError(
            f"--out={out} holds a run of {owner or 'something else'}; name another folder"
        )
    taken = ValueError(f"another process is writing to --out={out}; name another folder")
    with hold(mark, taken):
        mark.write_text(name + "\n", encoding="utf-8")
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            figures = json.loads(old.read_text(encoding="utf-8"))["figures"]
            for file_name in (pathlib.PurePath(figure["file"]).name for figure in figures):
                (out / file_name).unlink(missing_ok=True)
        old.unlink(missing_ok=True)
        (out / "metrics.jsonl").unlink(missing_ok=True)
        yield


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
    """Run an experiment as a script: exit with its status."""
    raise SystemExit(main())


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
