"""Watch a run: where its time goes, what compiles again, and whether it still moves."""

import contextlib
import faulthandler
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

PyTree = Any


_AWAY = ("compile", "eval", "save", "restore")  # from training


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

    def rename(self, name: str) -> None:
        """Book the entry that is open, from its start, under another name."""
        self.open = name

    def away(self) -> float:
        """Return the seconds booked so far on what is no training."""
        return sum(self.seconds.get(name, 0.0) for name in _AWAY)

    def close(self) -> dict[str, float]:
        """Book the time up to now and return all entries."""
        self._switch(self.open)
        return dict(self.seconds)


def host_share(seconds: Mapping[str, float]) -> float:
    """Return the share of the steps' time in which Python did other things than wait for a step.

        share = (data + write + loop) / (data + write + loop + compute)

    The device computes meanwhile, one step ahead, so it stands still for at most that share.

    Example:
      >>> host_share({"data": 0.5, "write": 0.25, "loop": 0.25, "compute": 99.0, "eval": 7.0})
      0.01
    """
    host = sum(seconds.get(name, 0.0) for name in ("data", "write", "loop"))
    whole = host + seconds.get("compute", 0.0)
    return host / whole if whole else 0.0


class Pace:
    """Rates of training since the row before: without compiles, evaluations, saves, restores.

    Args:
      ledger: what knows how long those took.
      tokens_per_step, flops_per_step, peak_flops: as for `fit`; what is 0 gives no rate.
    Example:
      >>> pace = Pace(Ledger(), 768, 0.0, 0.0)
      >>> pace(1), list(pace(11))
      ({}, ['tokens_per_s'])
    """

    def __init__(
        self, ledger: Ledger, tokens_per_step: float, flops_per_step: float, peak_flops: float
    ) -> None:
        self.ledger, self.each = ledger, {"tokens_per_s": float(tokens_per_step)}
        name, unit = ("mfu", peak_flops) if peak_flops else ("flops_per_s", 1.0)
        self.each[name] = flops_per_step / unit
        self.before: tuple[int, float] | None = None

    def __call__(self, made: int) -> dict[str, float]:
        """Return the rates of the steps since the last call; none at first or after a rollback."""
        before, now = self.before, time.perf_counter() - self.ledger.away()
        self.before = made, now
        if before is None or made <= before[0]:
            return {}
        steps_per_s = (made - before[0]) / max(now - before[1], 1e-9)
        return {name: each * steps_per_s for name, each in self.each.items() if each}


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
      stall_s: seconds without a step; 0 or infinity watches nothing.
    Example:
      >>> with watchdog(Ledger(), lambda: 0, float("inf")):
      ...     pass
    """
    if stall_s in (0, float("inf")):
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
                text = (
                    f"\nwarning: process {jax.process_index()} of {jax.process_count()} has made "
                    f"no step for {now - moved:.0f} s, after {made} steps; it has been in "
                    f"'{ledger.open}' for {now - ledger.since:.0f} s. Its threads:"
                )
                with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                    print(text, file=sys.__stderr__, flush=True)
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
      of: steps in the whole run.
      metrics_path: the folder of it gets a folder `profile`.
    Raises: ValueError naming what is wrong with the steps, or that there is no folder.
    Example:
      >>> Trace(None, 7, None).ends(3)
      False
    """

    def __init__(
        self,
        steps: tuple[int, int] | None,
        of: int,
        metrics_path: str | os.PathLike[str] | None,
    ) -> None:
        if steps is not None and not 0 <= steps[0] <= steps[1] < of:
            raise ValueError(
                f"profile must be (first, last) with 0 <= first <= last < steps={of}, got {steps}"
            )
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
