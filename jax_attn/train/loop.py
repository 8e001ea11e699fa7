"""The loop: it owns input and output around a pure step, and keeps a run alive.

Every row of metrics describes one `step`: the number of steps that were made when its loss was
measured, so the first row is step 0.
"""

import contextlib
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.progress

from jax_attn.report import Row, display, jsonl, tell_stderr
from jax_attn.train.interrupts import STOPPED, Stopped, stop_requests
from jax_attn.train.memory import keep_memory
from jax_attn.train.run import Run
from jax_attn.train.sinks import Sink, running
from jax_attn.train.step import PyTree, StepFn, TrainState
from jax_attn.train.training import History, Training
from jax_attn.train.watch import Pace, Trace, watchdog


def fit(
    step_fn: StepFn,
    state: TrainState,
    batch_fn: Callable[[int], PyTree],
    *,
    steps: int,
    key: jax.Array,
    evaluate: Callable[[PyTree], Mapping[str, Any]] | None = None,
    eval_every: int = 0,
    log_every: int = 1,
    run: Run | None = None,
    metrics_path: str | os.PathLike[str] | None = None,
    tags: Mapping[str, Any] | None = None,
    sinks: Sequence[Sink] = (),
    title: str = "",
    tokens_per_step: int = 0,
    flops_per_step: float = 0.0,
    peak_flops: float = 0.0,
    progress: rich.progress.Progress | None = None,
    give_up_after: int = 10,
    strict: bool = False,
    stall_s: float = 1800.0,
    profile: tuple[int, int] | None = None,
) -> tuple[TrainState, History]:
    """Train until `steps` steps are made, from wherever `state` stands, or where `run` had saved.

    The metrics of a step are fetched after the next step is dispatched, so logging never leaves the
    device idle; an evaluation or a save waits for the steps before it. Metrics may have a leading
    axis of seeds (`jax.vmap`): rows then hold arrays, JSONL lists, and the display shows the mean.

    Rows go to `History` and, as they come, to the JSONL file (see `report.jsonl`; where a resumed
    run logs a step again, the last line counts) and to the sinks. `time_s` counts seconds since
    the call. The file's last line alone has the ledger, `seconds/NAME`. With several processes only
    process 0 writes and shows.

    On a CPU memory that a step frees stays with the process (`keep_memory`).

    Ctrl-C writes the rows of the steps already dispatched, restores the terminal and re-raises;
    with a `run` it saves and raises `Stopped`, exit code 75, as SIGTERM does.

    A step whose numbers are not finite changes nothing (`make_train_step`). After `give_up_after`
    of them in a row a `run` goes back to the last healthy step saved and on with batches that were
    not used yet. Without a run, or if that happens again before the run got past where it failed,
    training stops: `Diverged`. An error in `batch_fn` or `evaluate` saves the state first.

    Args:
      step_fn: a jitted step of `make_train_step`; `fit` does not jit. It may donate its state. One
        of your own that does not report `skipped_in_row` stops at the first loss or `update_norm`
        that is not finite.
      state: where to start; `state.step` says which batch comes next. Where `run` has saved a later
        step, that one is restored into the places of this state.
      batch_fn: the batch of a step, a pure function of its number.
      steps: steps in the whole run, not in this call.
      key: passed to every step, which folds in its number.
      evaluate: `params -> metrics`, called before the first update of a new run (if `eval_every`),
        after every `eval_every` updates and after the last one; of the mean of the parameters too,
        as `eval/average/NAME`, where the optimizer keeps one (`average_params`).
      eval_every: updates between evaluations; 0 evaluates at the end only.
      log_every: steps between rows; the last step always gets one.
      run: a `Run`: the folder of checkpoints and metrics.
      metrics_path: the JSONL file without a run; its directory is made.
      tags: constants that open every line of the file, to tell runs that share it apart.
      sinks: more receivers of rows, such as `tensorboard(folder)`; one that fails stops nothing.
      title: what to call the run in the display.
      tokens_per_step: tokens in one batch, for tokens/s, in rows `tokens_per_s`; 0 shows steps/s.
      flops_per_step: floating-point operations that the model needs for one step, forward and
        backward, without recomputation; shows TFLOP/s, in rows `flops_per_s`.
      peak_flops: what all devices can do in a second; shows the share reached, `mfu`, instead.
        Rates in a row are those since the row before.
      progress: a display to share, see `report.training_progress`; the caller starts and stops it.
      give_up_after: steps in a row whose update was left out.
      strict: raise where the step compiles a second time, instead of a line.
      stall_s: report, with the stacks of all threads, that no step was finished for so long; 0
        reports nothing.
      profile: (first, last) step, both included, to trace for xprof into `run.folder`/profile or
        beside the metrics.
    Returns: the last state and the `History`; at once and empty when the steps are already made.
    Raises: ValueError naming a bad argument; `Diverged`, a FloatingPointError, naming the step and
      the metric, after its row is written; `Stopped`; RuntimeError: strict, and what changed.
    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jax_attn.train import init_state, make_train_step
      >>> def loss_fn(params, batch, key):
      ...     return jnp.square(params["w_D"] - batch).sum(), {}
      >>> tx = optax.sgd(0.25)
      >>> step_fn = jax.jit(make_train_step(loss_fn, tx))
      >>> state = init_state({"w_D": jnp.array([3.0, 4.0])}, tx)
      >>> state, history = fit(
      ...     step_fn, state, lambda step: jnp.zeros(2), steps=3, key=jax.random.key(0))
      >>> [(row["step"], row["loss"]) for row in history.train]
      [(0, 25.0), (1, 6.25), (2, 1.5625)]
    """
    for name, value, least in (
        ("steps", steps, 1),
        ("log_every", log_every, 1),
        ("eval_every", eval_every, 0),
        ("give_up_after", give_up_after, 1),
        ("tokens_per_step", tokens_per_step, 0),
        ("flops_per_step", flops_per_step, 0),
        ("peak_flops", peak_flops, 0),
        ("stall_s", stall_s, 0),
    ):
        if name in ("steps", "log_every", "eval_every", "give_up_after"):
            _check_int(name, value)
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    _check(state, run, sinks, metrics_path, evaluate, eval_every)
    path = metrics_path if run is None else run.metrics_path
    told = tell_stderr if run is None else run.tell

    def tell(text: str) -> None:
        with contextlib.suppress(OSError):  # a log on a full disk
            told(text)

    trace = Trace(profile, steps, path)
    if jax.default_backend() == "cpu":
        keep_memory()

    training = Training(step_fn, state, batch_fn, steps, key, run, tell, give_up_after, strict)
    ledger, history = training.ledger, training.history
    with contextlib.ExitStack() as stack:
        if run is not None:
            training.asked = stack.enter_context(stop_requests())
            with ledger("restore"):
                asked = {"steps": steps, "eval_every": eval_every, "give_up_after": give_up_after}
                stack.enter_context(run.opened(asked))
                training.resume()
        start = training.made
        if start >= steps:
            if run is not None and start > steps:
                tell(f"{run.folder} has {start} steps already, and {steps} were asked for")
            return training.state, history
        first = jax.process_index() == 0
        write = stack.enter_context(jsonl(path if first else None, tags, tell))
        sinking = stack.enter_context(contextlib.ExitStack())
        send = sinking.enter_context(running(sinks if first else (), tell))
        show = stack.enter_context(
            display(progress, title, start, steps, flops_per_step, peak_flops)
        ) if first else None  # fmt: skip
        stack.enter_context(watchdog(ledger, lambda: training.made, stall_s))
        stack.callback(trace.stop)

        def put(row: Row, again: bool = False) -> None:
            write(row, again)
            send(row)

        training.put = put
        training.pace = Pace(ledger, tokens_per_step, flops_per_step, peak_flops)

        def finish(step: int, metrics: Mapping[str, Any]) -> Row:
            row = training.record(step, metrics, log_every)
            if show is not None:
                rate = row.get("learning_rate")
                rate = None if rate is None else float(np.mean(rate))
                with contextlib.suppress(OSError):
                    show(
                        step + 1, float(np.mean(row["loss"])), tokens_per_step, ledger.away(), rate
                    )
            return row

        def leave() -> None:
            training.happened(f"asked to stop: saving after {training.made} steps")
            raise Stopped(STOPPED)

        def close_books() -> None:
            with ledger("write"):
                sinking.close()  # may wait for a sink that hangs
            training.put = write
            training.close_books()

        try:
            if start and run is not None:
                training.happened(f"goes on from step {start}, saved in {run.folder}", calm=True)
            # At the start; or one that a stop had left out.
            due = eval_every and start % eval_every == 0 and not training.measured
            if due and (start == 0 or run is not None):
                training.evaluate(evaluate)
            stop = training.asked(start)
            if stop:
                training.save()
                leave()
            if profile is not None and profile[1] < start:
                tell(f"profile: steps {profile[0]} to {profile[1]} were made before this start")
            while training.made < steps:
                trace.before(training.made)
                training.advance()
                made = training.made
                last = made == steps
                pause = last or (eval_every > 0 and made % eval_every == 0)
                stop |= training.asked(made)  # a rollback may come before it is obeyed
                saves = run is not None and (run.due(made) | last | stop)
                empty = pause or saves or trace.ends(made)
                while len(training.waiting) > (0 if empty else 1):
                    row = finish(*training.waiting[0])
                    training.waiting.popleft()
                    if training.harmed(row):
                        break
                if training.made < made:
                    continue  # rolled back
                trace.after(made)
                if pause and (last or not stop):
                    training.evaluate(evaluate)
                    stop |= training.asked(made)
                    saves |= run is not None and (run.improves(training.measured) | stop)
                if saves:
                    training.save()
                if stop and not last:
                    leave()
        except (FloatingPointError, Stopped):
            close_books()
            raise
        except BaseException:
            # Steps that ran belong in the file; a failure to fetch them must not hide the cause.
            with contextlib.suppress(Exception):
                for step, metrics in training.waiting:
                    if history.train and history.train[-1]["step"] == step:
                        put(history.train[-1], again=True)
                    else:
                        training.record(step, metrics, log_every)
            training.rescue()
            raise
        close_books()
    return training.state, history


def _check(
    state: TrainState,
    run: Run | None,
    sinks: Sequence[Sink],
    metrics_path: str | os.PathLike[str] | None,
    evaluate: Callable[[PyTree], Mapping[str, Any]] | None,
    eval_every: int,
) -> None:
    """Refuse arguments of another kind, and pairs of them that do not go together."""
    if not hasattr(state, "step"):
        raise ValueError(f"state must be a TrainState, see init_state, got {type(state).__name__}")
    if run is not None and not isinstance(run, Run):
        raise ValueError(f"run must be a train.Run, for example train.Run({run!r}), got {run!r}")
    if not isinstance(sinks, Sequence) or not all(map(callable, sinks)):
        raise ValueError(f"sinks must be a sequence of functions of a row, got {sinks!r}")
    if eval_every and evaluate is None:
        raise ValueError(f"eval_every is {eval_every} but evaluate is None")
    if run is not None and metrics_path is not None:
        raise ValueError("metrics_path: a run has its own, run.metrics_path; give one of the two")
    if run is not None and run.checkpoints.best is not None and evaluate is None:
        raise ValueError(f"run: best is {run.checkpoints.best!r} but evaluate is None")


def _check_int(name: str, value: Any) -> None:
    try:
        if isinstance(value, bool):
            raise TypeError
        operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an int, got {value!r}") from None
