"""What changes while a run trains, and the few things that are done to it."""

import collections
import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_attn.report import Row
from jax_attn.train.checkpoint import UNSAVED, NotSaved, Tell
from jax_attn.train.interrupts import Diverged
from jax_attn.train.optimizer import means_of
from jax_attn.train.run import Run
from jax_attn.train.step import PyTree, StepFn, TrainState, after_rollback, jumped, steps_made
from jax_attn.train.watch import Compiles, Ledger

_TELL_SKIPS_S = 60.0  # at most so often: a run may leave out many steps, each alone


class History(NamedTuple):
    """Hold the metrics of one call of `fit`, the same rows as its JSONL file.

    Attributes:
      train: one dict for each logged step: `step`, the metrics, `time_s`.
      eval: one dict for each evaluation: `step`, the metrics as `eval/NAME`, `time_s`.
        Values are numbers, or NumPy arrays where a metric has axes.
      events: one dict for each thing that happened: `step`, `event`, a line of text.
      seconds: where the time of the call went: "data", "compute" (dispatching steps and waiting for
        their metrics), "compile", "eval", "save", "restore", "write", "loop"; their sum is all.
    Example:
      >>> [row["loss"] for row in History([{"step": 0, "loss": 5.5}], [], [], {}).train]
      [5.5]
    """

    train: list[Row]
    eval: list[Row]
    events: list[Row]
    seconds: dict[str, float]


class Training:
    """What changes while a run trains, and the few things that are done to it."""

    def __init__(
        self, step_fn: StepFn, state: TrainState, batch_fn: Callable[[int], PyTree], steps: int,
        key: jax.Array, run: Run | None, tell: Tell, give_up_after: int, strict: bool,
    ) -> None:  # fmt: skip
        self.step_fn, self.state, self.batch_fn, self.key = step_fn, state, batch_fn, key
        self.steps, self.run, self.tell = steps, run, tell
        self.give_up_after, self.strict = give_up_after, strict
        self.began, self.ledger = time.perf_counter(), Ledger()
        self.history = History([], [], [], {})
        self.waiting: collections.deque[tuple[int, Mapping[str, Any]]] = collections.deque()
        self.compiles = Compiles(step_fn)
        if strict and not self.compiles.watches:
            raise ValueError(
                "strict: step_fn does not tell how often it compiled; give what jax.jit, "
                "shard_step or data_parallel returned, not a function around it"
            )
        self.asked: Callable[[int], bool] = lambda step: False
        self.put: Callable[[Row], None] = lambda row: None
        self.pace: Callable[[int], dict[str, float]] = lambda made: {}
        self.made, self.jumped, self.compiled = steps_made(state), jumped(state), False
        # The step saved last, until it is marked as healthy, and whether an update followed it.
        self.unconfirmed, self.followed = 0, False
        self.failed_at = -(10**9)  # where a rollback gave up
        self.skipping, self.told_skip = False, -math.inf  # told_skip: when
        self.measured: dict[str, Any] = {}

    def resume(self) -> None:
        """Take the run's newest whole step if it is later than the state."""
        assert self.run is not None
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.state):
            if np.size(leaf) == 0 and hasattr(leaf, "dtype"):
                raise ValueError(
                    f"state{jax.tree_util.keystr(path)} has shape {np.shape(leaf)}: an array of no "
                    f"numbers cannot be saved; leave it out of the parameters"
                )
        found = self.run.checkpoints.restore(self.state)
        if found is not None and found[0] > self.made:
            self.made, self.state = found
            if steps_made(self.state) != self.made:
                raise ValueError(
                    f"{self.run.checkpoints.at(self.made)} holds step {steps_made(self.state)}"
                )
            self.jumped = jumped(self.state)
            said = self.run.checkpoints.said(self.made) or {}
            self.measured = said.get("metrics", {})
        self.run.started()

    def advance(self) -> None:
        """Make one step."""
        with self.ledger("data"):
            batch = self.batch_fn(self.made + self.jumped)
        with self.ledger("compute" if self.compiled else "compile"):
            given = self.state
            self.state, metrics = self.step_fn(given, batch, self.key)
            changed = self.compiles.changed(given, batch, self.key)
            if changed:
                self.ledger.rename("compile")
        self.compiled = True
        self.waiting.append((self.made, metrics))
        self.made += 1
        self.measured = {}
        if changed:
            event = f"step {self.made - 1} compiled again: {'; '.join(changed[:5])}"
            if self.strict:
                raise RuntimeError(f"strict: {event}")
            self.happened(event)

    def record(self, step: int, metrics: Mapping[str, Any], log_every: int) -> Row:
        """Fetch a step's metrics; write them if it is their turn, or if they are not finite."""
        with self.ledger("compute"):
            jax.block_until_ready(dict(metrics))
        with self.ledger("write"):
            row = _row(step, metrics, self.began)
            if "loss" not in row:
                raise ValueError(f"step_fn's metrics have no 'loss', only {', '.join(metrics)}")
            if step % log_every == 0 or step == self.steps - 1 or _not_finite(row):
                for name, rate in self.pace(step + 1).items():
                    row.setdefault(name, rate)  # a metric of the step's own counts
                self.history.train.append(row)
                self.put(row)
        return row

    def evaluate(self, evaluate: Callable[[PyTree], Mapping[str, Any]] | None) -> None:
        """Evaluate the parameters as they are now; a stop asked for meanwhile may leave it out."""
        if evaluate is None:
            return
        with self.ledger("eval"):
            measured = _measured("eval", evaluate(self.state.params))
            means = means_of(self.state.opt_state)
            if len(means) == 1:
                if self.made < self.steps and self.asked(self.made):
                    return  # half of it is nothing: it is made again where the run goes on
                measured |= _measured("eval/average", evaluate(means[0].params))
            row = _row(self.made, measured, self.began)
        best = self.run.checkpoints.best if self.run is not None else None
        if best is not None and best not in measured:
            raise ValueError(f"run: best is {best!r}, but evaluate has {', '.join(measured)}")
        self.measured = {name: row[name] for name in measured}
        self.history.eval.append(row)
        with self.ledger("write"):
            self.put(row)

    def save(self) -> None:
        """Save the state as it is now."""
        assert self.run is not None
        with self.ledger("save"):
            self.run.checkpoints.wait()
            self.confirm()
            self.run.save(self.made, self.state, metrics=self.measured)
            self.unconfirmed, self.followed = self.made, False

    def confirm(self) -> None:
        """Mark the step saved last as healthy, if an update was made from it."""
        if self.run is not None and self.followed:
            self.run.checkpoints.confirm(self.unconfirmed)
            self.unconfirmed, self.followed = 0, False

    def rescue(self) -> None:
        """Save the last state after an error that was not its fault, in a batch for example."""
        alive = not any(
            isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(self.state)
        )
        # Alone: other processes would not take part in a save.
        if self.run is not None and alive and self.made and jax.process_count() == 1:
            with contextlib.suppress(Exception):
                self.save()
                self.run.checkpoints.wait()

    def harmed(self, row: Row) -> bool:
        """Go back if too many updates in a row were left out, or stop; return whether it did."""
        bad = _not_finite(row)
        in_row = np.max(row.get("skipped_in_row", math.inf if bad else 0))
        if in_row == 0 and self.run is not None and row["step"] >= self.unconfirmed > 0:
            # The saved parameters gave a finite loss, and an update was made from them.
            self.followed = True
            if not self.run.checkpoints.busy():  # else at a later step: nobody waits for this
                self.confirm()
        began, self.skipping = in_row > 0 and not self.skipping, in_row > 0
        now = time.perf_counter()
        if began and np.isfinite(in_row) and now - self.told_skip >= _TELL_SKIPS_S:
            self.told_skip = now
            self.happened(
                f"step {row['step']}: {', '.join(bad or [_large(row)])}, so its update was left "
                f"out; metrics count those that follow as `skipped`"
            )
        if in_row < self.give_up_after:
            return False
        why = f"step {row['step']}: {', '.join(bad or [_large(row)])}"
        if np.isfinite(in_row):
            why += f", the last of {in_row:.0f} steps in a row whose update was left out"
        again = self.made <= self.failed_at + self.give_up_after
        if self.run is None or again or self.state.guard is None:
            self.tell(why)
            raise Diverged(why)
        with self.ledger("restore"):
            self.run.checkpoints.wait()
            self.confirm()
            found = self.run.checkpoints.restore(self.state, healthy=True)
            if found is None:
                self.tell(f"{why}; there is no healthy step to go back to")
                raise Diverged(why)
            self.failed_at, self.unconfirmed = self.made, 0
            self.jumped += self.made - found[0]
            self.run.checkpoints.forget_above(found[0])
            self.made, state = found
            self.state = state._replace(guard=after_rollback(state.guard, self.jumped))
        self.waiting.clear()
        self.happened(
            f"{why}; went back to step {self.made}, which takes batch {self.made + self.jumped} "
            f"instead of {self.made}"
        )
        return True

    def close_books(self) -> None:
        """Wait for the last save, and write where the time went.

        Raises: NotSaved if this state could not be saved, not at the second try either.
        """
        lost = False
        if self.run is not None:
            with self.ledger("save"):
                self.run.checkpoints.wait()
                self.confirm()
            if self.run.checkpoints.failed == self.made:
                self.save()
                self.run.checkpoints.wait()
                lost = self.run.checkpoints.failed == self.made
        self.history.seconds.update(self.ledger.close())
        seconds = {f"seconds/{name}": round(s, 3) for name, s in self.history.seconds.items()}
        self.put({"step": self.made, **seconds})
        if lost:
            self.tell(f"step {self.made} could not be saved at the second try either: it is lost")
            raise NotSaved(UNSAVED)

    def happened(self, event: str, calm: bool = False) -> None:
        """Tell something that a reader of the metrics needs to know, and keep it with them."""
        if not calm:
            self.tell(event)
        elif jax.process_index() == 0:
            with contextlib.suppress(OSError):
                print(event, file=sys.stderr, flush=True)
        self.history.events.append({"step": self.made, "event": event})
        self.put(self.history.events[-1])


def _row(step: int, metrics: Mapping[str, Any], began: float) -> Row:
    """Fetch metrics into host values: numbers, or NumPy arrays where there are axes."""
    values = {name: np.asarray(value) for name, value in jax.device_get(dict(metrics)).items()}
    row = {name: value if value.ndim else value.item() for name, value in values.items()}
    if clash := {"step", "time_s", "event"} & row.keys():
        raise ValueError(f"metrics may not be named {', '.join(sorted(clash))}: taken")
    return {"step": step, **row, "time_s": round(time.perf_counter() - began, 6)}


def _large(row: Row) -> str:
    """Describe the gradient norm that an update was left out for."""
    return f"grad_norm is {np.asarray(row['grad_norm']).tolist()}"


def _measured(prefix: str, made: Any) -> dict[str, Any]:
    """Name what an evaluation returned."""
    if not isinstance(made, Mapping):
        raise ValueError(f"evaluate must return a mapping of names to numbers, got {made!r}")
    return {f"{prefix}/{name}": value for name, value in made.items()}


def _not_finite(row: Row) -> list[str]:
    """Describe the metrics that must be finite and are not."""
    # A gradient may be infinite where the optimizer guards the update (optax.apply_if_finite).
    names = [name for name in ("loss", "update_norm") if name in row]
    values = {name: np.asarray(row[name]) for name in names}
    return [f"{name} is {v.tolist()}" for name, v in values.items() if not np.isfinite(v).all()]
