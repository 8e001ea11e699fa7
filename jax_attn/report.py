"""Report on a run while it trains: metrics as JSONL, progress as a bar or as plain lines."""

import contextlib
import datetime
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import numpy as np
import rich.console
import rich.progress
import rich.table
import rich.text

Row = dict[str, Any]

_TITLE_AND_BAR = 10  # columns of a terminal that they share at least, unless it is very narrow
# Away from a terminal: lines printed in one run, one more for the last step.
_PLAIN_LINES = 19
_PLAIN_S = 60.0  # and one more where the last is older than this


@contextlib.contextmanager
def jsonl(
    path: str | os.PathLike[str] | None,
    tags: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Iterator[Callable[..., None]]:
    """Append rows of metrics to a JSONL file: one JSON object a line, flushed at once.

    What the file holds is kept. JSON has no NaN: non-finite numbers become the strings `"nan"`,
    `"inf"` and `"-inf"`, which `float` reads. Arrays become lists.

    Args:
      path: the file; its directory is made. None writes nothing.
      tags: constants that open every line.
      tell: what gets a line when a row cannot be written, a full disk for example: rows are then
        kept, and written before the next one that can be. None: the error is raised.
    Returns: a context manager that yields `write(row, again=False)`. With `again` a row is written
      unless the last call, of the same row, got as far as writing it before it was interrupted.
    Raises: OSError naming the file, before the first row.
    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with jsonl(f"{folder}/metrics.jsonl") as write:
      ...         write({"step": 3, "loss": float("nan")})
      ...     print(pathlib.Path(folder, "metrics.jsonl").read_text(), end="")
      {"step": 3, "loss": "nan"}
    """
    if path is None:
        yield lambda row, again=False: None
        return
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        # A killed run may have left half a line: end it, so that only that line is lost.
        if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")

        tried: tuple[bytes, int] | None = None
        kept: list[bytes] = []

        def write(row: Row, again: bool = False) -> None:
            nonlocal tried
            tagged = {**(tags or {}), **row}
            text = json.dumps({name: _json_value(v) for name, v in tagged.items()}, allow_nan=False)
            line, at = text.encode() + b"\n", file.seek(0, os.SEEK_END)
            if again and tried == (line, at):
                return
            tried = line, at + sum(map(len, kept)) + len(line)
            kept.append(line)
            try:
                rest = memoryview(b"".join(kept))
                while rest:  # a disk that is nearly full takes a part
                    rest = rest[file.write(rest) :]
            except OSError as error:
                # Part of it may be there: the lines are written again, whole, after it is cut off.
                with contextlib.suppress(OSError):
                    file.truncate(at)
                if tell is None:
                    raise
                if len(kept) == 1:
                    tell(f"{path} cannot be written, training goes on: {error}")
                return
            kept.clear()

        yield write
        if kept and tell is not None:
            tell(f"{len(kept)} rows could not be written to {path}")


def tell_stderr(text: str) -> None:
    """Print a line that must be seen, above a progress bar that is there.

    Example:
      >>> tell_stderr("the disk is full")
    """
    text = f"warning: {text}"
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        text = f"\x1b[1;33m{text}\x1b[0m"
    say(text)


def say(text: str) -> None:
    """Print a line on standard error; a full disk or a reader that has gone stops nothing.

    Example:
      >>> say("goes on from step 3")
    """
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        _unread(sys.stderr)
    except (OSError, ValueError):  # ValueError: closed
        pass


def _unread(file: TextIO) -> None:
    """Send what is written from now on nowhere; else Python's last flush would fail, exit 120."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)


class _Console(rich.console.Console):
    """A console that goes on where its reader has gone (`| head`); rich would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _unread(self.file)  # type: ignore[arg-type]


@contextlib.contextmanager
def display(
    progress: rich.progress.Progress | None,
    title: str,
    start: int,
    steps: int,
    flops_per_step: float = 0.0,
    peak_flops: float = 0.0,
) -> Iterator[Callable[..., None]]:
    """Show how far a run is: a bar on a terminal, else about 20 plain lines, or one a minute.

    tokens/s and MFU leave out the first step, which compiles, and what else is no training; ETA
    leaves out the first step. Where a terminal is narrow, the title and the bar get shorter, then
    rates are left out; the steps, the loss and the time left stay.

        MFU = flops_per_step / (seconds per step * peak_flops)

    Args:
      progress: a display that the caller starts and stops; None makes one for this run.
      title: what to call the run.
      start: updates already made.
      steps: updates in the whole run.
      flops_per_step: operations that the model needs for one update; 0: not shown.
      peak_flops: what the devices can do in a second; 0 shows TFLOP/s instead of MFU.
    Returns: a context manager that yields `show(updates made, loss, tokens in a step or 0, seconds
      spent so far on what is no training, learning rate or None)`.
    Example:
      >>> import sys
      >>> console = rich.console.Console(file=sys.stdout, force_interactive=False)
      >>> with display(training_progress(console), "both parts", 0, 7) as show:
      ...     show(1, 5.5452, 64, 0.0)
      both parts  step 1/7  loss 5.5452
    """
    owned = progress is None
    progress = progress or training_progress()
    plain = progress.disable or not progress.console.is_interactive
    task = None if plain else progress.add_task(title, total=steps, completed=start, status="")
    interval = -(-(steps - start) // _PLAIN_LINES)
    first: tuple[int, float, float] | None = None
    printed: float | None = None
    shown = start

    def show(
        made: int,
        loss: float,
        tokens_per_step: int,
        away_s: float,
        learning_rate: float | None = None,
    ) -> None:
        nonlocal first, printed, shown
        now, parts = time.perf_counter(), [f"loss {loss:.4f}"]
        printed = now if printed is None else printed
        if learning_rate is not None:
            parts.append(f"lr {learning_rate:.2e}")
        if first is None or made <= shown:  # the first, or one after a rollback
            first = made, now, away_s
        else:
            since, wall_s = made - first[0], now - first[1]
            training_s = max(wall_s - (away_s - first[2]), 1e-9)
            unit = "tokens" if tokens_per_step else "steps"
            left = datetime.timedelta(seconds=round(wall_s / since * (steps - made)))
            rate = since * (tokens_per_step or 1) / training_s
            parts.append(f"{rate:,.{0 if rate >= 10 else 2}f} {unit}/s")
            done = flops_per_step * since / training_s
            if peak_flops and done:
                parts.append(f"MFU {done / peak_flops:.1%}")
            elif done:
                parts.append(f"{done / 1e12:.3g} TFLOP/s")
            parts.append(f"ETA {left}")
        shown = made
        status = "  ".join(parts)
        if task is not None:
            room = progress.console.width - 2 * len(str(steps)) - 4  # steps, and between columns
            progress.update(task, completed=made, status=_fitting(parts, room))
        elif (made - start - 1) % interval == 0 or made == steps or now - printed > _PLAIN_S:
            printed = now
            line = f"{title}  step {made}/{steps}  {status}".strip()
            progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    with progress if owned and task is not None else contextlib.nullcontext():
        yield show


def _fitting(parts: list[str], room: int) -> str:
    """Join the parts that fit: the loss, the time left, then the rates; the learning rate last."""
    room -= _TITLE_AND_BAR if room >= 4 * _TITLE_AND_BAR else 0
    order = [parts[0], *parts[:0:-1]]
    while len(order) > 1 and len("  ".join(order)) > room:
        order.pop()
    return "  ".join(part for part in parts if part in order)


class _OneLine(rich.progress.TextColumn):
    """Text that is cut, not wrapped, where there is no room."""

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


def training_progress(console: rich.console.Console | None = None) -> rich.progress.Progress:
    """Make the progress display of `fit`, to share among several fits.

    Args:
      console: where to draw; None takes standard error, which keeps standard output for results.
    Returns: a `rich.progress.Progress`, disabled when the console is no terminal. Start it with
      `with`; a task that you add yourself needs the field `status=""`.
    Example:
      >>> training_progress(rich.console.Console(force_interactive=False)).disable
      True
    """
    console = console or _Console(stderr=True)
    whole = rich.table.Column(no_wrap=True)
    return rich.progress.Progress(
        # No markup: a title may hold brackets, "(4,256,768) [seed 0]".
        _OneLine("{task.description}", markup=False, table_column=rich.table.Column()),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.MofNCompleteColumn(table_column=whole),
        _OneLine("{task.fields[status]}", markup=False, table_column=whole.copy()),
        console=console,
        # The display's own thread competes with XLA for the host's cores.
        refresh_per_second=4,
        disable=not console.is_interactive,
    )


def _json_value(value: Any) -> Any:
    """Replace what JSON lacks: arrays by lists, non-finite numbers by strings."""
    if isinstance(value, np.ndarray | list):
        return [_json_value(item) for item in list(value)]
    value = value.item() if isinstance(value, np.generic) else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
