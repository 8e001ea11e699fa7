"""Train: one pure step, and one loop that owns the input and output around it.

`make_train_step` builds a pure function that the caller jits, maps over seeds or shards; `fit`
calls it, writes metrics and shows progress. Every row of metrics describes one `step`: the number
of updates that the parameters had seen when its loss was measured, so the first row is step 0.
"""

import collections
import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress

from jax_attn.report import Row, display, jsonl
from jax_attn.shapes import dims

PyTree = Any
LossFn = Callable[[PyTree, PyTree, jax.Array], tuple[jax.Array, Mapping[str, Any]]]


class TrainState(NamedTuple):
    """Hold all that one update changes; a pytree whose leaves keep their names.

    Attributes:
      step: int32, the number of updates made.
      params: the parameters, any pytree of floating-point arrays.
      opt_state: the optimizer's state.
    Example:
      >>> TrainState(jnp.int32(0), {"w_D": jnp.ones(3)}, ()).params["w_D"].shape
      (3,)
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree


StepFn = Callable[[TrainState, PyTree, jax.Array], tuple[TrainState, Mapping[str, Any]]]


class History(NamedTuple):
    """Hold the metrics of one call of `fit`, the same rows as its JSONL file.

    Attributes:
      train: one dict for each logged step: `step`, the metrics, `time_s`.
      eval: one dict for each evaluation: `step`, the metrics as `eval/NAME`, `time_s`.
        Values are numbers, or NumPy arrays where a metric has axes.
    Example:
      >>> [row["loss"] for row in History([{"step": 0, "loss": 5.5}], []).train]
      [5.5]
    """

    train: list[Row]
    eval: list[Row]


def init_state(params: PyTree, tx: optax.GradientTransformation) -> TrainState:
    """Start training at step 0.

    Args:
      params: the initial parameters; kept, not copied: a step that donates its state deletes them.
      tx: the optimizer.
    Returns: the `TrainState`; under `jax.vmap` every leaf gets the mapped axis.
    Example:
      >>> int(init_state({"w_D": jnp.ones(3)}, optax.sgd(0.1)).step)
      0
    """
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def next_token_loss(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Average the cross entropy of every next token, in nats.

        loss = mean over B, T of  -log softmax(logits[b, t])[targets[b, t]]

    Args:
      logits_BTV: unnormalised log-probabilities; any floating dtype, computed in float32.
      targets_BT: integers in [0, V); another makes the loss NaN.
    Returns: scalar float32, nats per token.
    Raises: ValueError naming the argument, the letter and both sizes, or the dtype.
    Example:
      >>> round(float(next_token_loss(jnp.zeros((2, 3, 256)), jnp.zeros((2, 3), int))), 4)
      5.5452
    """
    dims(logits_BTV=logits_BTV, targets_BT=targets_BT)
    if not jnp.issubdtype(targets_BT.dtype, jnp.integer):
        raise ValueError(f"targets_BT must be integers, got dtype {targets_BT.dtype}")
    with jax.named_scope("next_token_loss"):
        # Before the exponentials: a bfloat16 sum over V would lose its small terms.
        logits_BTV = logits_BTV.astype(jnp.float32)
        loss_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
        # optax counts a negative label from behind; above V it gives NaN already.
        return jnp.where(targets_BT < 0, jnp.nan, loss_BT).mean()


def bits_per_byte(loss: Any) -> Any:
    """Convert nats per byte into bits per byte.

        bits = nats / ln 2

    Args:
      loss: nats per byte, a number or an array.
    Returns: bits per byte, of the same shape.
    Example:
      >>> round(bits_per_byte(5.545177), 4)
      8.0
    """
    return loss / math.log(2)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    parts: Sequence[str] = (),
    axis: str | None = None,
) -> StepFn:
    """Build the pure function that makes one update; the caller jits, maps or shards it.

        grads = d loss / d params,   updates = tx(grads),   params' = params + updates
        NAME_norm = sqrt(sum of squares over all leaves)

    Args:
      loss_fn: `(params, batch, key) -> (loss, metrics)`: a scalar and a flat dict of arrays.
      tx: the optimizer. Norms of updates are those of what it returns, before rounding to the
        parameters' dtype.
      parts: keys such as `"attention"`; a part is every leaf whose path contains that key.
      axis: a mesh axis that `data_parallel`, `shard_map` or `pmap` maps the step over. Gradients
        and metrics are averaged over it, so every device makes the same update; `loss_fn` averages
        over the rows of one device and gets a key of its own on each. None: the step sees all rows.
    Returns: `step(state, batch, key) -> (state, metrics)`. `loss_fn` gets
      `fold_in(key, state.step)`, so the same `key` serves all steps. Metrics: `loss`,
      `grad_norm`, `update_norm` and `param_norm` (of the parameters that the loss was measured
      with), each norm also as `NAME/PART`, all scalar float32; then what `loss_fn` measured,
      cast to float32.
    Raises: ValueError: `parts` is one string; or, when the step is traced, a part matches no leaf
      (it lists the keys that exist), or a metric of `loss_fn` has the name of one made here.
    Example:
      >>> def loss_fn(params, batch, key):
      ...     return jnp.square(params["w_D"] - batch).sum(), {}
      >>> tx = optax.sgd(0.25)
      >>> step = jax.jit(make_train_step(loss_fn, tx))
      >>> state = init_state({"w_D": jnp.array([3.0, 4.0])}, tx)
      >>> state, metrics = step(state, jnp.zeros(2), jax.random.key(0))
      >>> float(metrics["loss"]), float(metrics["grad_norm"]), state.params["w_D"].tolist()
      (25.0, 10.0, [1.5, 2.0])
    """
    if isinstance(parts, str):
        raise ValueError(f"parts must be a sequence of keys, got the string {parts!r}")
    parts = tuple(parts)

    def step(
        state: TrainState, batch: PyTree, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        leaves = _leaves_of_parts(state.params, parts)
        key = jax.random.fold_in(key, state.step)
        params = state.params
        if axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
            # The gradient of parameters that shard_map knows to be replicated is summed over the
            # axis before anyone averages it: as many times too large as there are devices.
            params = jax.tree.map(lambda p: jax.lax.pcast(p, axis, to="varying"), params)
        with jax.named_scope("loss_and_gradients"):
            value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
            (loss, measured), grads = value_and_grad(params, batch, key)
        if axis is not None:
            with jax.named_scope("average"):
                loss, measured, grads = jax.lax.pmean((loss, dict(measured), grads), axis)
        with jax.named_scope("update"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        with jax.named_scope("norms"):
            metrics = {
                "loss": loss,
                **_norms("grad_norm", grads, leaves),
                **_norms("update_norm", updates, leaves),
                **_norms("param_norm", state.params, leaves),
            }
        clash = sorted(metrics.keys() & measured.keys())
        if clash:
            raise ValueError(f"loss_fn's metrics may not be named {', '.join(clash)}: taken")
        metrics |= measured
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step


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
    metrics_path: str | os.PathLike[str] | None = None,
    tags: Mapping[str, Any] | None = None,
    title: str = "",
    tokens_per_step: int = 0,
    progress: rich.progress.Progress | None = None,
) -> tuple[TrainState, History]:
    """Train until `steps` updates are made, from wherever `state` stands.

    The metrics of a step are fetched after the next step is dispatched, so logging never leaves the
    device idle; an evaluation waits for the steps before it. Metrics may have a leading axis of
    seeds (`jax.vmap`): rows then hold arrays, JSONL lists, and the display shows the mean.

    Rows go to `History` and, as they come, to the JSONL file (see `report.jsonl`; where a resumed
    run logs a step again, the last line counts). `time_s` counts seconds since the call.

    Ctrl-C writes the rows of the steps already dispatched, restores the terminal and re-raises. A
    loss or an update that is not finite stops training; no step is skipped or undone.

    Args:
      step_fn: a jitted step of `make_train_step`; `fit` does not jit. It may donate its state.
      state: where to start; `state.step` says which batch comes next.
      batch_fn: the batch of a step, a pure function of its number.
      steps: updates in the whole run, not in this call.
      key: passed to every step, which folds in its number.
      evaluate: `params -> metrics`, called before the first update of a new run (if `eval_every`),
        after every `eval_every` updates and after the last one.
      eval_every: updates between evaluations; 0 evaluates at the end only.
      log_every: steps between rows; the last step always gets one.
      metrics_path: the JSONL file; its directory is made. Give it on one process only.
      tags: constants that open every line of the file, to tell runs that share it apart.
      title: what to call the run in the display.
      tokens_per_step: tokens in one batch, for tokens/s; 0 shows steps/s.
      progress: a display to share, see `report.training_progress`; the caller starts and stops it.
    Returns: the last state and the `History`; at once and empty when the steps are already made.
    Raises: ValueError naming a bad argument; FloatingPointError naming the step and the metric,
      after its row is written.
    Example:
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
        ("tokens_per_step", tokens_per_step, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if eval_every and evaluate is None:
        raise ValueError(f"eval_every is {eval_every} but evaluate is None")
    start = _steps_made(state)
    history = History([], [])
    if start >= steps:
        return state, history

    began, evaluating_s = time.perf_counter(), 0.0
    waiting: collections.deque[tuple[int, Mapping[str, Any]]] = collections.deque()
    with jsonl(metrics_path, tags) as write, display(progress, title, start, steps) as show:

        def record(step: int, metrics: Mapping[str, Any]) -> Row:
            row = _row(step, metrics, began)
            if "loss" not in row:
                raise ValueError(f"step_fn's metrics have no 'loss', only {', '.join(metrics)}")
            if step % log_every == 0 or step == steps - 1 or _not_finite(row):
                history.train.append(row)
                write(row)
            return row

        def finish(step: int, metrics: Mapping[str, Any]) -> None:
            row = record(step, metrics)
            show(step + 1, float(np.mean(row["loss"])), tokens_per_step, evaluating_s)
            if bad := _not_finite(row):
                raise FloatingPointError(f"step {step}: {', '.join(bad)}")

        def run_evaluation(step: int) -> None:
            nonlocal evaluating_s
            if evaluate is None:
                return
            entered = time.perf_counter()
            measured = {f"eval/{name}": v for name, v in evaluate(state.params).items()}
            history.eval.append(_row(step, measured, began))
            write(history.eval[-1])
            evaluating_s += time.perf_counter() - entered

        try:
            if start == 0 and eval_every:
                run_evaluation(0)
            for step in range(start, steps):
                batch = batch_fn(step)
                state, metrics = step_fn(state, batch, key)
                waiting.append((step, metrics))
                made = step + 1
                pause = made == steps or (eval_every > 0 and made % eval_every == 0)
                while len(waiting) > (0 if pause else 1):
                    finish(*waiting[0])
                    waiting.popleft()
                if pause:
                    run_evaluation(made)
        except FloatingPointError:
            raise
        except BaseException:
            # Steps that ran belong in the file; a failure to fetch them must not hide the cause.
            with contextlib.suppress(Exception):
                for step, metrics in waiting:
                    if history.train and history.train[-1]["step"] == step:
                        write(history.train[-1], again=True)
                    else:
                        record(step, metrics)
            raise
    return state, history


def _leaves_of_parts(params: PyTree, parts: Sequence[str]) -> dict[str, list[int]]:
    """Find the leaves of each part, as positions in the flattened parameters."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    keys = [{jax.tree_util.keystr((entry,), simple=True) for entry in path} for path in paths]
    leaves = {part: [i for i, key in enumerate(keys) if part in key] for part in parts}
    for part, found in leaves.items():
        if not found:
            exist = ", ".join(sorted(set().union(*keys)))
            raise ValueError(f"parts: no parameter has the key {part!r}; the keys are {exist}")
    return leaves


def _norms(name: str, tree: PyTree, leaves: Mapping[str, Sequence[int]]) -> dict[str, jax.Array]:
    """Return the norm of the whole tree and of each part."""
    # float32: a bfloat16 sum would lose its small terms.
    squares = [jnp.square(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(tree)]
    groups = {name: range(len(squares)), **{f"{name}/{part}": at for part, at in leaves.items()}}
    return {group: jnp.sqrt(sum(squares[i] for i in at)) for group, at in groups.items()}


def _steps_made(state: TrainState) -> int:
    """Return the step that all of the state's seeds share."""
    made = np.unique(jax.device_get(state.step))
    if made.size != 1:
        raise ValueError(f"state.step must be the same for every seed, got {made.tolist()}")
    return int(made[0])


def _row(step: int, metrics: Mapping[str, Any], began: float) -> Row:
    """Fetch metrics into host values: numbers, or NumPy arrays where there are axes."""
    values = {name: np.asarray(value) for name, value in jax.device_get(dict(metrics)).items()}
    row = {name: value if value.ndim else value.item() for name, value in values.items()}
    if clash := {"step", "time_s"} & row.keys():
        raise ValueError(f"metrics may not be named {', '.join(sorted(clash))}: taken")
    return {"step": step, **row, "time_s": round(time.perf_counter() - began, 6)}


def _not_finite(row: Row) -> list[str]:
    """Describe the metrics that must be finite and are not."""
    # A gradient may be infinite where the optimizer guards the update (optax.apply_if_finite).
    names = [name for name in ("loss", "update_norm") if name in row]
    values = {name: np.asarray(row[name]) for name in names}
    return [f"{name} is {v.tolist()}" for name, v in values.items() if not np.isfinite(v).all()]
