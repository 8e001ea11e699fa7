"""Watch a run: where its time goes, what compiles again, and whether it still moves."""

import contextlib
import faulthandler
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

PyTree = Any


class Ledger:
    """Book wall time: at every moment one entry is open, and entries add up.

    Attributes:
      seconds: name to seconds; "loop" is what no other entry holds.
      open: the entry that time is booked on now.
      since: `time.perf_counter()` when it was opened.
    Example:
      >>> ledger = Ledger()
      >>> with ledger("data"):
      ...     pass
      >>> sorted(ledger.close())
      ['data', 'loop']
    """

    def __init__(self) -> None:
        self.seconds = {"loop": 0.0}
        self.open, self.since = "loop", time.perf_counter()

    def _switch(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[self.open] = self.seconds.get(self.open, 0.0) + now - self.since
        self.open, self.since = name, now

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        outer = self.open
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def close(self) -> dict[str, float]:
        """Book the time up to now and return all entries."""
        self._switch(self.open)
        return dict(self.seconds)


class Compiles:
    """Notice that a jitted step compiles again, and say what was other than before.

    Args:
      step_fn: the jitted step. One that does not tell how often it compiled is not watched.
    Example:
      >>> step_fn = jax.jit(lambda state, batch, key: batch)
      >>> compiles = Compiles(step_fn)
      >>> for size in (3, 3, 5):
      ...     batch = {"x_B": np.ones(size, np.float32)}
      ...     _ = step_fn((), batch, None)
      ...     print(compiles.changed((), batch, None))
      None
      None
      ["batch['x_B']: float32[5], was float32[3]"]
    """

    def __init__(self, step_fn: Any) -> None:
        self._count: Callable[[], int] | None = getattr(step_fn, "_cache_size", None)
        self.watches = self._count is not None
        self._seen = 0
        self._before: dict[str, str] | None = None

    def changed(self, state: PyTree, batch: PyTree, key: Any) -> list[str] | None:
        """Return what changed if the call with these arguments, just made, compiled again."""
        if self._count is None or (count := self._count()) == self._seen:
            return None
        now = {
            **_described("state", state), **_described("batch", batch), **_described("key", key)
        }  # fmt: skip
        before, self._before, first = self._before, now, self._seen == 0
        self._seen = count
        if first or before is None:
            return None
        found = [
            f"{name}: {now.get(name, 'not there')}, was {before.get(name, 'not there')}"
            for name in sorted(now.keys() | before.keys())
            if now.get(name) != before.get(name)
        ]
        return found or ["nothing in shapes, dtypes or places: a setting of JAX, or a static value"]


def _described(argument: str, tree: PyTree) -> dict[str, str]:
    """Describe the leaves of an argument as `jit` tells them apart."""
    told = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        kind = f"{getattr(x, 'dtype', type(x).__name__)}[{','.join(map(str, np.shape(x)))}]"
        if isinstance(x, np.ndarray) and argument == "state":
            kind += " (NumPy's)"
        if getattr(x, "weak_type", False):
            kind += " (weakly typed)"
        if isinstance(x, jax.Array) and x.committed:
            # Bound to a place, by device_put or by a mesh; else jit may choose one.
            kind += f" on {getattr(x.sharding, 'spec', None) or x.sharding.device_set}"
        told[argument + jax.tree_util.keystr(path)] = kind
    return told


@contextlib.contextmanager
def watchdog(ledger: Ledger, progress: Callable[[], int], stall_s: float) -> Iterator[None]:
    """Report, once for each stall, that no step was finished for so long, and where Python is.

    Args:
      ledger: its open entry says what the process is doing.
      progress: steps finished so far.
      stall_s: seconds without a step; infinity watches nothing.
    Example:
      >>> with watchdog(Ledger(), lambda: 0, float("inf")):
      ...     pass
    """
    if stall_s == float("inf"):
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        last, moved, told = progress(), time.perf_counter(), False
        while not ended.wait(min(stall_s / 4, 10.0)):
            now = time.perf_counter()
            if (made := progress()) != last:
                last, moved, told = made, now, False
            elif now - moved > stall_s and not told:
                told = True
                print(
                    f"\nwarning: process {jax.process_index()} of {jax.process_count()} has made "
                    f"no step for {now - moved:.0f} s, after {made} steps; it has been in "
                    f"'{ledger.open}' for {now - ledger.since:.0f} s. Its threads:",
                    file=sys.__stderr__, flush=True,
                )  # fmt: skip
                faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Trace:
    """Trace some steps for xprof.

    Args:
      steps: the first and the last step to trace, both included; None traces nothing.
      metrics_path: the folder of it gets a folder `profile`.
    Raises: ValueError naming what is wrong with the steps, or that there is no folder.
    Example:
      >>> Trace(None, None).ends(3)
      False
    """

    def __init__(
        self, steps: tuple[int, int] | None, metrics_path: str | os.PathLike[str] | None
    ) -> None:
        if steps is not None and not 0 <= steps[0] <= steps[1]:
            raise ValueError(f"profile must be (first, last) with 0 <= first <= last, got {steps}")
        if steps is not None and metrics_path is None:
            raise ValueError("profile needs a folder: give run or metrics_path")
        self.steps, self.running = steps, False
        self.folder = pathlib.Path(metrics_path or ".").parent / "profile"

    def before(self, step: int) -> None:
        """Start, if this step is to be traced."""
        if self.steps and not self.running and self.steps[0] <= step <= self.steps[1]:
            jax.profiler.start_trace(self.folder)
            self.running = True

    def ends(self, made: int) -> bool:
        """Return whether the last step to trace has been dispatched."""
        return self.running and self.steps is not None and made > self.steps[1]

    def after(self, made: int) -> None:
        """Stop, if the last step to trace has been finished."""
        if self.ends(made):
            self.stop()

    def stop(self) -> None:
        """Stop, also where a run ends before its last step to trace."""
        if self.running:
            self.running, self.steps = False, None
            jax.profiler.stop_trace()
