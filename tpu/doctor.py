"""Say whether this machine is fit to train on: a laptop, a TPU VM or a host of a slice.

Command: python -m tpu.doctor [--expect=v5e-16] [--coordinator=HOST:8476] [--json=FILE]

It compares versions, devices and variables with what they should be, names the process that has
the chips, tests arithmetic and collectives against float64, and measures rates against the table
of tpu/topology.py. Less than half a minute on two CPU cores. It changes nothing but FILE. Not run
on a TPU yet.

On a slice start it on every host at once: the processes join, as those of a training job do. A
host that does not come is named, and nothing waits longer than --limit_s for any one part.

  --expect       the slice to compare with; default TPU_ACCELERATOR_TYPE, if it is set
  --coordinator  HOST:PORT of process 0: does this host reach it?
  --limit_s      seconds for each part; what JAX does happens in a process that is then killed
  --least_share  of the table's rate; a slower one FAILED (all-reduce: warning)
  --rates        false: test, but measure no rates
  --json         file for scripts
  --matmul_size, --stream_mib, --reduce_mib   sizes of what is timed; 0 chooses by device

Verdicts: ok, warning, FAILED, unavailable and skipped, each with its reason, and what to do.
Exit code: 0 healthy, 1 not (a row says FAILED), 2 wrong usage, 130 interrupted.
"""

import dataclasses
import datetime
import importlib.util
import json
import math
import os
import pathlib
import shutil
import socket
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tpu import checks, facts, rates, topology, versions
from tpu.ask import ask
from tpu.checks import FAILED, OK, SKIPPED, UNAVAILABLE, WARNING, Row

ROOT = pathlib.Path(__file__).resolve().parent.parent
NUMERICS = ("matmul", "attention", "psum", "ppermute")
RATES = ("matmul rate", "memory bandwidth", "all-reduce bandwidth")
PARTS = ("devices", "matmul", "attention", *RATES[:2], "psum", "ppermute", RATES[2])
COLORS = {OK: "green", WARNING: "yellow", FAILED: "bold red", UNAVAILABLE: "magenta"}


@dataclasses.dataclass(frozen=True)
class Config:
    expect: str = ""
    coordinator: str = ""
    limit_s: float = 90.0
    least_share: float = 0.5
    rates: bool = True
    json: str = ""
    matmul_size: int = 0
    stream_mib: int = 0
    reduce_mib: int = 0


PRESETS = {"default": {}, "quick": {"matmul_size": 256, "stream_mib": 8, "reduce_mib": 1}}


def judge(
    part: str,
    answer: Mapping[str, Any],
    seen: Mapping[str, Any],
    here: facts.Facts,
    want: tuple[topology.Slice | None, str],
    least_share: float,
) -> Row:
    """Make a row of what the child answered for a part.

    Args:
      part: its name.
      answer: {"result"}, {"error"} or {"late"}.
      seen: the result of "devices".
      here: what the machine says of itself.
      want: from `tpu.checks.expected`.
      least_share: of the table's rate.
    Returns: one row.
    Example:
      >>> late = {"late": "no answer within 9 s while starting the devices"}
      >>> judge("devices", late, {}, facts.Facts(), (None, ""), 0.5).verdict
      'FAILED'
    """
    if "result" not in answer:
        late = "late" in answer
        text = str(answer["late" if late else "error"])
        return Row(part, FAILED, text, _advice(part, text, late))
    result = answer["result"]
    if part == "devices":
        return checks.devices(result, here, *want)
    if part in NUMERICS:
        return rates.numerics(part, result)
    flops, memory, table = rates.peaks(seen)
    if part == "all-reduce bandwidth":
        # A bound that an algorithm need not reach: too little of it is no proof of a fault.
        return rates.rate(part, result, *rates.links(seen), least_share, WARNING)
    peak = flops if part == "matmul rate" else memory
    return rates.rate(part, result, peak, table, least_share)


def examine(cfg: Config, tell: Callable[[str], None]) -> Iterator[Row]:
    """Yield the rows, each as soon as it is known.

    Args:
      cfg: what to do.
      tell: gets a line when something new is done.
    Returns: an iterator of rows.
    Raises: ValueError naming the option that is wrong, before anything is done.
    Example:
      >>> next(examine(Config(rates=False), print)).name
      'versions'
    """
    _check(cfg)
    here = facts.gather()
    want = checks.expected(cfg.expect, here.environ)
    yield versions.versions(here)
    yield checks.environment(here)
    yield checks.in_use(here)
    limit_s = min(cfg.limit_s, 10.0)
    if cfg.coordinator:
        tell(f"connecting to {cfg.coordinator}")
    outcome = checks.reach(cfg.coordinator, limit_s) if cfg.coordinator else ""
    yield checks.coordinator(cfg.coordinator, outcome, limit_s)
    parts = [part for part in PARTS if cfg.rates or part not in RATES]
    sizes = {name: getattr(cfg, name) for name in PRESETS["quick"]}
    seen: dict[str, Any] = {"kind": "unknown", "coords": [], "slices": 1}
    answered = []
    for part, answer in ask(parts, sizes, cfg.limit_s, tell):
        answered.append(part)
        seen = answer.get("result", seen) if part == "devices" else seen
        yield judge(part, answer, seen, here, want, cfg.least_share)
    for part in parts:
        if part not in answered:
            yield Row(part, UNAVAILABLE, "what came before it did not end well")
    for part in RATES if not cfg.rates else ():
        yield Row(part, SKIPPED, "--rates=false")


def plain(row: Row, width: int) -> str:
    """Write a row as lines of text: what goes to a file or a pipe.

    Args:
      row: the row.
      width: columns; words longer than that stay whole.
    Returns: the text.
    Example:
      >>> print(plain(Row("psum", "skipped", "one device"), 60))
      skipped      psum                  one device
    """
    head = f"{row.verdict:<12} {row.name:<21} "
    lines = _wrap(row.seen, width - len(head))
    lines += _wrap(f"→ {row.do}", width - len(head)) if row.do else []
    return "\n".join([head + lines[0], *(" " * len(head) + line for line in lines[1:])])


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """Make what --json=FILE holds.

    Args:
      rows: all of them.
    Returns: a dict that JSON can hold, without NaN.
    Example:
      >>> report([Row("psum", "skipped", "one device")])["healthy"]
      True
    """
    made = {
        "healthy": healthy(rows),
        "host": socket.gethostname(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    return _finite(made)


def healthy(rows: Sequence[Row]) -> bool:
    """Whether no row says FAILED.

    Args:
      rows: all of them.
    Returns: whether to train here.
    Example:
      >>> healthy([Row("psum", "warning", "")])
      True
    """
    return all(row.verdict != FAILED for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Examine this machine, print the table, and return the exit code."""
    cfg = _parse()(Config, PRESETS, __doc__ or "", argv)
    try:
        rows = _on_terminal(cfg) if sys.stdout.isatty() and _has_rich() else _in_lines(cfg)
        if cfg.json:
            _write(pathlib.Path(cfg.json), json.dumps(report(rows), indent=1) + "\n")
        failed = [row.name for row in rows if row.verdict == FAILED]
        print(f"NOT healthy: {', '.join(failed)}" if failed else "healthy", flush=True)
    except OSError as error:  # nobody reads it any more, or its disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left is flushed at exit
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0 if healthy(rows) else 1


def _in_lines(cfg: Config) -> list[Row]:
    rows, width = [], max(shutil.get_terminal_size((100, 24)).columns, 60)
    for row in examine(cfg, lambda text: print(f"doctor: {text} ...", file=sys.stderr, flush=True)):
        rows.append(row)
        print(plain(row, width), flush=True)
    return rows


def _on_terminal(cfg: Config) -> list[Row]:
    import rich.box
    import rich.console
    import rich.table
    import rich.text

    console, rows = rich.console.Console(), []
    with console.status("looking") as status:
        for row in examine(cfg, lambda text: status.update(f"{len(rows)} of 12 done; {text}")):
            rows.append(row)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("check", no_wrap=console.width >= 80)
    table.add_column("verdict", no_wrap=True)
    table.add_column("what was seen", overflow="fold")
    for row in rows:
        seen = rich.text.Text(row.seen)
        if row.do:
            seen.append(f"\n→ {row.do}", style="bold" if row.verdict == FAILED else "dim")
        verdict = rich.text.Text(row.verdict, style=COLORS.get(row.verdict, "dim"))
        table.add_row(rich.text.Text(row.name), verdict, seen)
    console.print(table)
    return rows


def _check(cfg: Config) -> None:
    """Raise a ValueError that names a wrong option, before anything is measured."""
    if cfg.expect:
        checks.expected(cfg.expect, {})
    host, _, port = cfg.coordinator.rpartition(":")
    if cfg.coordinator and not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(
            f"--coordinator must look like HOST:8476, with a port below 65536, "
            f"got {cfg.coordinator!r}"
        )
    for name in ("limit_s", "least_share"):
        value = getattr(cfg, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"--{name} must be a number above 0, got {value:g}")
    for name in PRESETS["quick"]:
        if getattr(cfg, name) < 0:
            raise ValueError(f"--{name} must be at least 0, got {getattr(cfg, name)}")
    path = pathlib.Path(cfg.json)
    if cfg.json and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"--json must be a file in a folder that exists, got {cfg.json!r}")
    if cfg.json and not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--json={cfg.json} cannot be written")


def _parse() -> Any:
    """Load the options' parser by its file: its package imports JAX, which may be what is broken,
    and which sets variables that are to be looked at first."""
    path = ROOT / "jax_attn" / "command_line.py"
    spec = importlib.util.spec_from_file_location("_command_line", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.parse


def _advice(part: str, text: str, late: bool) -> str:
    if "bootstrap:" in text:
        return (
            "start this on every host at once, with the same options; try --coordinator=HOST:8476"
        )
    if part != "devices":
        return "run again; on a slice see the other hosts; if it stays: replace the VM"
    if late:
        return (
            "on a slice start this on every host at once; else see the row chips in use; restart "
            "the machine; a slow start needs a larger --limit_s"
        )
    return "see the rows versions, environment and chips in use; then python -c 'import jax'"


def _has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


def _wrap(text: str, width: int) -> list[str]:
    wide = max(width, 20)
    return textwrap.wrap(text, wide, break_long_words=False, break_on_hyphens=False) or [""]


def _finite(value: Any) -> Any:
    """Write numbers that JSON does not have as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _write(path: pathlib.Path, text: str) -> None:
    """Write a file whole or not at all."""
    try:
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise ValueError(f"--json={path} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
