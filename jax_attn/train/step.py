"""One pure step of training: gradients, update, norms, and a guard against steps that do harm."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_attn.shapes import dims

PyTree = Any
LossFn = Callable[[PyTree, PyTree, jax.Array], tuple[jax.Array, Mapping[str, Any]]]

_MEMORY = 0.99  # of the running mean of gradient norms: about the last 100 updates
_FIRST_SPIKE = 100  # updates before a norm can be called unusual


class Guard(NamedTuple):
    """Hold what the step remembers of updates that it left out, and of the norms it has seen.

    Attributes:
      skipped: int32, updates left out so far.
      in_row: int32, updates left out since the last one that was made.
      jumped: int32, batches that a rollback jumped over: step i takes batch i + jumped.
      norm, norm_variance, weight: float32, running mean and variance of the gradient norm, and how
        much has gone into them, from 0 towards 1.
    Example:
      >>> int(init_state({"w_D": jnp.ones(3)}, optax.sgd(0.1)).guard.skipped)
      0
    """

    skipped: jax.Array
    in_row: jax.Array
    jumped: jax.Array
    norm: jax.Array
    norm_variance: jax.Array
    weight: jax.Array


class TrainState(NamedTuple):
    """Hold all that one update changes; a pytree whose leaves keep their names.

    Attributes:
      step: int32, the number of steps made, with those whose update was left out.
      params: the parameters, any pytree of floating-point arrays.
      opt_state: the optimizer's state.
      guard: a `Guard`; None in the state of a step function that was not made here.
    Example:
      >>> TrainState(jnp.int32(0), {"w_D": jnp.ones(3)}, ()).params["w_D"].shape
      (3,)
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    guard: Guard | None = None


StepFn = Callable[[TrainState, PyTree, jax.Array], tuple[TrainState, Mapping[str, Any]]]


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
    # Arrays of their own: a buffer can be donated once.
    counts = [jnp.zeros((), jnp.int32) for _ in range(4)]
    guard = Guard(*counts[1:], *(jnp.zeros((), jnp.float32) for _ in range(3)))
    return TrainState(counts[0], params, tx.init(params), guard)


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


def compute_in(loss_fn: LossFn, dtype: Any = jnp.bfloat16, *, keep: Sequence[str] = ()) -> LossFn:
    """Compute a loss in a narrow dtype while parameters and the optimizer keep theirs.

        loss(cast(params)),  gradients come back in the dtype of the parameters

    Args:
      loss_fn: as for `make_train_step`. It gets the batch as it is, and floats in it too are for it
        to cast: float32 times bfloat16 is computed in float32.
      dtype: of the parameters that `loss_fn` gets.
      keep: keys such as `"norm"`; leaves whose path contains one are not cast.
    Returns: a loss function of the uncast parameters.
    Raises: ValueError: `dtype` is not floating, `keep` is one string, or, when it is called, a key
      of `keep` matches no leaf.
    Example:
      >>> def loss_fn(params, batch, key):
      ...     return (params["w_D"] * batch).sum(), {}
      >>> grad = jax.grad(lambda p: compute_in(loss_fn)(p, 1 / 3, None)[0])
      >>> grad({"w_D": jnp.ones(1)})["w_D"].dtype
      dtype('float32')
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"compute_in: dtype must be floating, got {jnp.dtype(dtype)}")
    keep = keys_of("keep", keep)

    def narrow(
        params: PyTree, batch: PyTree, key: jax.Array
    ) -> tuple[jax.Array, Mapping[str, Any]]:
        kept = {i for at in leaves_of("keep", params, keep).values() for i in at}
        leaves, tree = jax.tree.flatten(params)
        for i, x in enumerate(leaves):
            if i not in kept and jnp.issubdtype(x.dtype, jnp.floating):
                leaves[i] = x.astype(dtype)
        return loss_fn(jax.tree.unflatten(tree, leaves), batch, key)

    return narrow


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    parts: Sequence[str] = (),
    axis: str | None = None,
    accumulate: int = 1,
    skip_spikes: float | None = None,
    schedule: optax.Schedule | None = None,
) -> StepFn:
    """Build the pure function that makes one update; the caller jits, maps or shards it.

        grads = d loss / d params,   updates = tx(grads),   params' = params + updates
        NAME_norm = sqrt(sum of squares over all leaves)

    A step whose loss, gradient norm, update norm, new parameters or new state of the optimizer are
    not finite changes nothing but its count, decided inside the compiled step.

    Args:
      loss_fn: `(params, batch, key) -> (loss, metrics)`: a scalar and a flat dict of arrays.
      tx: the optimizer. Norms of updates are those of what it returns, before rounding to the
        parameters' dtype, and also where the update is left out.
      parts: keys such as `"attention"`; a part is every leaf whose path contains that key.
      axis: a mesh axis that `data_parallel`, `shard_map` or `pmap` maps the step over. Gradients
        and metrics are averaged over it, so every device makes the same update; `loss_fn` averages
        over the rows of one device and gets a key of its own on each. None: the step sees all rows.
      accumulate: parts that the batch is cut into, every `accumulate`-th row in one; gradients and
        metrics are averaged over them, and memory is that of one part. Each gets a key of its own.
        All parts weigh the same: a loss averaged over what a mask leaves becomes a mean of means.
      skip_spikes: also leave out an update whose gradient norm is above mean + skip_spikes *
        deviation of the last 100 or so, once there were 100. None: never.
      schedule: step -> learning rate, to report it; give the optimizer the same.
    Returns: `step(state, batch, key) -> (state, metrics)`. `loss_fn` gets
      `fold_in(key, number of the batch)`, so the same `key` serves all steps. Metrics: `loss`,
      `grad_norm`, `update_norm` and `param_norm` (of the parameters that the loss was measured
      with), each norm also as `NAME/PART`, `skipped` and `skipped_in_row` (updates left out so far
      and since the last one made), `learning_rate` if there is a schedule, all scalar float32;
      then what `loss_fn` measured, cast to float32.
    Raises: ValueError: `parts` is one string; or, when the step is traced, a part matches no leaf
      (it lists the keys that exist), `accumulate` does not divide the rows of an array of the
      batch, or a metric of `loss_fn` has the name of one made here.
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
    parts = keys_of("parts", parts)
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise ValueError(f"accumulate must be an int >= 1, got {accumulate!r}")
    if skip_spikes is not None and not skip_spikes > 0:
        raise ValueError(f"skip_spikes must be > 0 deviations or None, got {skip_spikes!r}")

    def step(
        state: TrainState, batch: PyTree, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        if state.guard is None:
            raise ValueError("state has no guard; make it with init_state(params, tx)")
        leaves = leaves_of("parts", state.params, parts)
        key = jax.random.fold_in(key, state.step + state.guard.jumped)
        params = state.params
        if axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
            # The gradient of parameters that shard_map knows to be replicated is summed over the
            # axis before anyone averages it: as many times too large as there are devices.
            params = jax.tree.map(lambda p: jax.lax.pcast(p, axis, to="varying"), params)
        with jax.named_scope("loss_and_gradients"):
            loss, measured, grads = _gradients(loss_fn, params, batch, key, accumulate)
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
        with jax.named_scope("guard"):
            # Norms are finite where a sum of squares, or a sum in float16, may not be.
            whole = _stays_finite((params, opt_state), (state.params, state.opt_state))
            made, guard = _judge(state.guard, state.step, metrics, skip_spikes, whole)
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(made, new, old),
                (params, opt_state),
                (state.params, state.opt_state),
            )
            metrics |= {"skipped": guard.skipped, "skipped_in_row": guard.in_row}
        if schedule is not None:
            # What the optimizer counts are updates made.
            metrics["learning_rate"] = schedule(state.step - state.guard.skipped)
        clash = sorted(metrics.keys() & measured.keys())
        if clash:
            raise ValueError(f"loss_fn's metrics may not be named {', '.join(clash)}: taken")
        metrics |= measured
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return TrainState(state.step + 1, params, opt_state, guard), metrics

    step.axis = axis  # type: ignore[attr-defined]  # so that what maps it can tell
    return step


def _gradients(
    loss_fn: LossFn, params: PyTree, batch: PyTree, key: jax.Array, accumulate: int
) -> tuple[jax.Array, Mapping[str, Any], PyTree]:
    """Differentiate the loss; with `accumulate`, average over parts of the batch in turn."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def whole(batch: PyTree, key: jax.Array) -> tuple[jax.Array, Mapping[str, Any], PyTree]:
        (loss, measured), grads = value_and_grad(params, batch, key)
        return loss, measured, grads

    if accumulate == 1:
        return whole(batch, key)

    def cut(path: Any, x: jax.Array) -> jax.Array:
        if not jnp.ndim(x) or x.shape[0] % accumulate:
            raise ValueError(
                f"accumulate={accumulate} does not divide the rows of "
                f"batch{jax.tree_util.keystr(path)}, which has shape {jnp.shape(x)}"
            )
        # Every accumulate-th row: where rows are split over devices, each keeps rows of its own.
        return x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def share(i: jax.Array, batch: PyTree) -> Any:
        made = whole(batch, jax.random.fold_in(key, i))
        return jax.tree.map(lambda x: jnp.true_divide(x, accumulate), made)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, share(*part)), None

    parts = (jnp.arange(accumulate), jax.tree_util.tree_map_with_path(cut, batch))
    like = jax.eval_shape(share, *jax.tree.map(lambda x: x[0], parts))
    # Zeros that vary over the same mesh axes as what is added, where shard_map keeps account.
    zeros = jax.tree.map(
        lambda x: (
            jax.lax.pcast(jnp.zeros(x.shape, x.dtype), tuple(x.vma), to="varying")
            if getattr(x, "vma", None)
            else jnp.zeros(x.shape, x.dtype)
        ),
        like,
    )
    return jax.lax.scan(add, zeros, parts)[0]


def _judge(
    guard: Guard,
    step: jax.Array,
    metrics: Mapping[str, jax.Array],
    skip_spikes: float | None,
    whole: jax.Array,
) -> tuple[jax.Array, Guard]:
    """Decide whether an update is made, and remember it; `whole`: what else must hold."""
    norm = metrics["grad_norm"]
    made = whole & jnp.isfinite(norm)
    made &= jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["update_norm"])
    counted = made
    if skip_spikes is not None:
        limit = guard.norm + skip_spikes * jnp.sqrt(guard.norm_variance)
        limit = jnp.where(step - guard.skipped >= _FIRST_SPIKE, limit, jnp.inf)
        # A spike counts as large as the limit, so that norms that stay high become usual.
        made &= norm <= limit
        norm = jnp.minimum(norm, limit)
    # The variance is a mean of squares, never a difference of two numbers that nearly cancel.
    weight = _MEMORY * guard.weight + (1 - _MEMORY)
    share, away = (1 - _MEMORY) / weight, norm - guard.norm
    variance = (1 - share) * (guard.norm_variance + share * jnp.square(away))
    counted &= jnp.isfinite(variance)
    return made, Guard(
        skipped=guard.skipped + ~made,
        in_row=jnp.where(made, 0, guard.in_row + 1),
        jumped=guard.jumped,
        norm=jnp.where(counted, guard.norm + share * away, guard.norm),
        norm_variance=jnp.where(counted, variance, guard.norm_variance),
        weight=jnp.where(counted, weight, guard.weight),
    )


def _stays_finite(new: PyTree, old: PyTree) -> jax.Array:
    """Tell whether no number became infinite or NaN; one that was so before may stay so."""
    holds = jnp.bool_(True)
    for x, was in zip(*map(jax.tree.leaves, (new, old)), strict=True):
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            holds &= (jnp.isfinite(x) | ~jnp.isfinite(was)).all()
    return holds


def keys_of(argument: str, keys: Sequence[str]) -> tuple[str, ...]:
    """Check that keys are a sequence of names, not one string, which is a sequence of letters."""
    if isinstance(keys, str):
        raise ValueError(f"{argument} must be a sequence of keys, got the string {keys!r}")
    return tuple(keys)


def leaves_of(argument: str, params: PyTree, keys: Sequence[str]) -> dict[str, list[int]]:
    """Find the leaves whose path contains each key, as positions in the flattened parameters."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    there = [{jax.tree_util.keystr((entry,), simple=True) for entry in path} for path in paths]
    leaves = {key: [i for i, names in enumerate(there) if key in names] for key in keys}
    for key, found in leaves.items():
        if not found:
            exist = ", ".join(sorted(set().union(*there)))
            raise ValueError(f"{argument}: no parameter has the key {key!r}; the keys are {exist}")
    return leaves


def _norms(name: str, tree: PyTree, leaves: Mapping[str, Sequence[int]]) -> dict[str, jax.Array]:
    """Return the norm of the whole tree and of each part."""
    # float32: a bfloat16 sum would lose its small terms.
    squares = [jnp.square(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(tree)]
    groups = {name: range(len(squares)), **{f"{name}/{part}": at for part, at in leaves.items()}}
    return {group: jnp.sqrt(sum(squares[i] for i in at)) for group, at in groups.items()}


def steps_made(state: TrainState) -> int:
    """Return the step that all of the state's seeds share."""
    made = np.unique(jax.device_get(state.step))
    if made.size != 1:
        raise ValueError(f"state.step must be the same for every seed, got {made.tolist()}")
    return int(made[0])


def jumped(state: TrainState) -> int:
    """Return how many batches rollbacks have jumped over."""
    return 0 if state.guard is None else int(np.max(jax.device_get(state.guard.jumped)))


def after_rollback(guard: Guard, jumped: int) -> Guard:
    """Count anew, and say which batches come next, in the places where the guard lies."""

    def filled(like: jax.Array, value: int) -> jax.Array:
        full = np.full(like.shape, value, like.dtype)
        return jax.device_put(full, like.sharding) if like.committed else jnp.asarray(full)

    return guard._replace(in_row=filled(guard.in_row, 0), jumped=filled(guard.jumped, jumped))
