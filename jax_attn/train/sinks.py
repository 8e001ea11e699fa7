"""Where rows of metrics go besides the JSONL file; none of them can stop or slow a run."""

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Sink = Callable[[Mapping[str, Any]], None]

_WAITING = 1000  # rows that a slow sink may be behind
_PAUSE_S, _LONGEST_S = 1.0, 300.0  # after a failure; doubled for each one in a row, up to


@contextlib.contextmanager
def running(
    sinks: Sequence[Sink], tell: Callable[[str], None], patience_s: float = 5.0
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Give every sink a thread of its own and rows as they come.

    A sink that raises loses that row and gets the next ones after a pause: a second, twice as long
    after each failure in a row, at most 5 minutes. One that falls behind by 1,000 rows, or hangs,
    loses rows. What fails or falls behind is told once, until it works again.

    Args:
      sinks: called with each row, one row at a time; at the end one's `close()`, if it has that.
      tell: what gets a line about a sink that failed.
      patience_s: how long to wait at the end for sinks that have rows left.
    Returns: a context manager that yields `send(row)`, which never blocks and never raises.
    Example:
      >>> rows = []
      >>> with running([rows.append], print) as send:
      ...     send({"step": 3, "loss": 0.5})
      >>> rows
      [{'step': 3, 'loss': 0.5}]
    """
    lines = [_Line(sink, tell) for sink in sinks]

    def send(row: Mapping[str, Any]) -> None:
        for line in lines:
            line.send(dict(row))  # its own: a sink may change it

    try:
        yield send
    finally:
        for line in lines:
            line.close(patience_s)


class _Line:
    """One sink, its thread and the rows that wait for it."""

    def __init__(self, sink: Sink, tell: Callable[[str], None]) -> None:
        self.sink, self.tell = sink, tell
        self.name = getattr(sink, "__name__", type(sink).__name__)
        self.rows: queue.Queue[Mapping[str, Any] | None] = queue.Queue(_WAITING)
        self.lost, self.ended = False, threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"sink-{self.name}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        failures, row = 0, {}
        while row is not None:
            row = self.rows.get()
            try:
                if row is not None:
                    self.sink(row)
                elif hasattr(self.sink, "close"):
                    self.sink.close()  # type: ignore[attr-defined]
                failures = 0
            except BaseException as error:  # SystemExit would end the thread without a word
                if not failures:
                    self.tell(
                        f"sink {self.name} failed and loses rows, training goes on: "
                        f"{type(error).__name__}: {error}"
                    )
                failures += 1
                # At the end of the run the rows that wait are tried without a pause.
                self.ended.wait(min(_PAUSE_S * 2 ** min(failures - 1, 20), _LONGEST_S))

    def send(self, row: Mapping[str, Any]) -> None:
        try:
            self.rows.put_nowait(row)
        except queue.Full:
            if not self.lost:
                self.lost = True
                self.tell(f"sink {self.name} is {_WAITING} rows behind and loses rows")

    def close(self, patience_s: float) -> None:
        self.ended.set()
        with contextlib.suppress(queue.Full):
            self.rows.put_nowait(None)
        self.thread.join(patience_s)
        if self.thread.is_alive():
            self.tell(f"sink {self.name} still hangs after {patience_s:.0f} s and loses rows")


def tensorboard(folder: str | os.PathLike[str]) -> Sink:
    """Make a sink that writes TensorBoard's files, with `pip install 'jax-attn[tensorboard]'`.

    Args:
      folder: what to give to `tensorboard --logdir`.
    Returns: a sink; numbers become scalars, arrays their mean, text is left out.
    Raises: ImportError saying what to install.
    Example:
      >>> import tempfile
      >>> sink = tensorboard(tempfile.mkdtemp())
      >>> sink({"step": 3, "loss": 0.5, "time_s": 1.5})
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ImportError("tensorboard needs: pip install 'jax-attn[tensorboard]'") from None
    writer = SummaryWriter(os.fspath(folder))

    def write(row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and not isinstance(value, str):
                writer.add_scalar(name, float(np.mean(value)), row["step"])
        writer.flush()

    write.__name__ = "tensorboard"
    write.close = writer.close  # type: ignore[attr-defined]  # flush leaves the last row behind
    return write
