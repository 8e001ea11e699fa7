"""Sharding: name a mesh, and every array finds its place by the letters that its name ends in.

    mesh = make_mesh(data=2, fsdp=2, model=2)
    state = shard_init(lambda key: init_state(init(key), tx), jax.random.key(0), mesh)
    step_fn = shard_step(make_train_step(loss_fn, tx), mesh)
    state, metrics = step_fn(state, global_batch(rows_of_step, mesh, B=64), key)

What is data parallel, FSDP, tensor or expert parallel is the size of a mesh axis; sizes combine.
Two tables say which letter lies on which axis: `PARAMS` for parameters and what the optimizer keeps
of them, `ACTIVATIONS` for batches and caches. Inside a step the residual stream alone is told where
to lie (`whole_width`); the compiler derives the rest.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_attn.mesh import MESH_AXES, require_auto
from jax_attn.shapes import ALPHABET, axes, spec
from jax_attn.train import StepFn, TrainState

PyTree = Any
Rules = Mapping[str, str | tuple[str, ...] | None]

PARAMS: Rules = {
    "D": "fsdp",
    "N": "model",
    "K": "model",
    "F": "model",
    "V": "model",
    "X": "model",
}
ACTIVATIONS: Rules = {
    "B": ("data", "fsdp"),
    "T": "context",
    "S": "context",
    "N": "model",
    "K": "model",
    "F": "model",
    "V": "model",
    "X": "model",
}


def specs(tree: PyTree, mesh: Mesh | AbstractMesh, rules: Rules = PARAMS) -> PyTree:
    """Derive the place of every leaf from the letters that its name ends in.

    A leaf with one axis more than letters has L in front, as in `layers`. Where two letters of a
    leaf are mapped to one mesh axis the first letter has it: `w_in_XDF` is split by experts, each
    expert whole. Vectors `_D`, which are norms and biases, are replicated: they are small, and
    gathering one would wait for the network longer than its bytes are worth. So are leaves without
    a suffix: steps, counts and keys. Of a `TrainState`, what the optimizer keeps lies where its
    parameter lies if it has the parameter's shape, and is replicated if not (Adafactor's rows).

    Args:
      tree: parameters, a `TrainState` or a batch; arrays or ShapeDtypeStructs.
      mesh: from `make_mesh`, or an AbstractMesh to ask without devices.
      rules: letter to mesh axis or axes; `PARAMS`, `ACTIVATIONS`, or one of them changed:
        `PARAMS | {"K": None}` replicates key/value heads.
    Returns: the tree with a NamedSharding in place of each leaf.
    Raises: ValueError naming leaf, letter, size, mesh axis and its size if the one does not divide
      the other; or the leaf and its shape if that does not fit its letters.
    Example:
      >>> from jax.sharding import AbstractMesh
      >>> mesh = AbstractMesh((2, 3), ("fsdp", "model"))
      >>> specs({"wq_DNH": np.ones((6, 3, 5))}, mesh)["wq_DNH"].spec
      P('fsdp', 'model')
    """
    if isinstance(tree, TrainState):
        params = specs(tree.params, mesh, rules)
        shapes = [
            (path, leaf.shape, place)
            for (path, leaf), place in zip(
                jax.tree_util.tree_leaves_with_path(tree.params),
                jax.tree.leaves(params),
                strict=True,
            )
        ]
        nowhere = NamedSharding(mesh, PartitionSpec())

        def beside(path: Any, leaf: Any) -> NamedSharding:
            # optax keeps a parameter's path as the end of its own.
            found = (p for at, shape, p in shapes if path[-len(at) :] == at and shape == leaf.shape)
            return next(found, nowhere)

        kept = jax.tree_util.tree_map_with_path(beside, tree.opt_state)
        guard = jax.tree.map(lambda leaf: nowhere, tree.guard)
        return tree._replace(step=nowhere, params=params, opt_state=kept, guard=guard)

    _check_rules(rules, mesh)

    def place(path: Any, leaf: Any) -> NamedSharding:
        name, where = _name(path), jax.tree_util.keystr(path)
        suffix = name.rpartition("_")[2]
        if suffix.isalpha() and suffix.isupper() and "_" in name and not axes(name):
            unknown = ", ".join(sorted(set(suffix) - set(ALPHABET)))
            raise ValueError(
                f"{where} ends in {suffix}, and {unknown} is no axis letter; they are "
                f"{' '.join(ALPHABET)}"
            )
        return NamedSharding(mesh, _spec(where, axes(name), np.shape(leaf), mesh, rules))

    return jax.tree_util.tree_map_with_path(place, tree)


def shard_init(
    init: Callable[[jax.Array], PyTree], key: jax.Array, mesh: Mesh, rules: Rules = PARAMS
) -> PyTree:
    """Draw parameters, or a whole `TrainState`, in their places: no device holds all of them.

    The numbers are those of `jax.jit(init)(key)` on one device.

    Args:
      init: key -> tree, `init_language_model` with its sizes bound, or
        `lambda key: init_state(init(key), tx)`.
      key: a jax.random key.
      mesh: from `make_mesh`.
      rules: see `specs`.
    Returns: the tree, every leaf placed by `specs`.
    Raises: ValueError as `specs`, before anything is compiled.
    Example:
      >>> from functools import partial
      >>> from jax_attn import init_mlp
      >>> from jax_attn import make_mesh
      >>> mesh = make_mesh(devices=jax.devices()[:1])
      >>> params = shard_init(partial(init_mlp, D=6, F=24), jax.random.key(0), mesh)
      >>> params["w_in_DF"].sharding.mesh.axis_names
      ('data', 'fsdp', 'context', 'model')
    """
    places = specs(jax.eval_shape(init, key), mesh, rules)
    return jax.jit(init, out_shardings=places)(key)


def shard_step(step: StepFn, mesh: Mesh, rules: Rules = PARAMS) -> Any:
    """Compile a training step for a mesh: state and batch stay in the places that `specs` says.

    Args:
      step: from `make_train_step`, written for one device.
      mesh: from `make_mesh`.
      rules: of the state, those that `shard_init` had; the batch has `ACTIVATIONS`.
    Returns: `step(state, batch, key) -> (state, metrics)`, jitted, so it has `.lower`. It donates
      its state; metrics are replicated. Arrays of the batch need names: `{"tokens_BT": ...}`.
    Raises: ValueError when it is traced: as `specs`, or naming an array of the batch without axes
      in its name.
    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jax_attn import make_mesh
      >>> from jax_attn.train import init_state, make_train_step
      >>> def loss_fn(params, batch, key):
      ...     return jnp.square(batch["x_BD"] @ params["w_DF"]).mean(), {}
      >>> tx, mesh = optax.sgd(0.1), make_mesh(devices=jax.devices()[:1])
      >>> init = lambda key: init_state({"w_DF": jax.random.normal(key, (6, 4))}, tx)
      >>> step_fn = shard_step(make_train_step(loss_fn, tx), mesh)
      >>> state = shard_init(init, jax.random.key(0), mesh)
      >>> state, metrics = step_fn(state, {"x_BD": jnp.ones((2, 6))}, jax.random.key(1))
      >>> int(state.step)
      1
    """

    require_auto("shard_step", mesh)
    if getattr(step, "axis", None) is not None:
        raise ValueError(
            f"shard_step: step was made with axis={step.axis!r}, for data_parallel; here the "  # type: ignore[attr-defined]
            f"compiler finds what to average: leave axis out"
        )

    def placed(state: TrainState, batch: PyTree, key: jax.Array) -> Any:
        if not isinstance(state, TrainState):
            raise ValueError(
                f"shard_step: state must be a TrainState, from init_state or shard_init, got "
                f"{type(state).__name__}"
            )
        hold = jax.lax.with_sharding_constraint
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            batch = hold(batch, _batch_specs("shard_step", batch, mesh))
            state = hold(state, specs(state, mesh, rules))
            state, metrics = step(state, batch, key)
            state = hold(state, specs(state, mesh, rules))
            return state, hold(metrics, NamedSharding(mesh, PartitionSpec()))

    return jax.jit(placed, donate_argnums=0)


def whole_width(letters: str, x: jax.Array) -> jax.Array:
    """Say that D is whole on each device while rows and positions are split: weights move, not x.

    Without this the compiler may follow a weight that is stored split by D and split the residual
    stream by D too, and every product would then be summed over the network.

    Args:
      letters: axes of x; other letters than B, T, D are left to the compiler, and so are B and T
        of a size that their mesh axes do not divide: one token that is decoded, one prompt.
      x: an array inside `shard_step`, or in `jit` under `jax.set_mesh` of a mesh from `make_mesh`;
        elsewhere, and inside `shard_map` or `pmap`, it is returned as it is.
    Returns: x.
    Example:
      >>> whole_width("BTD", np.ones((2, 3, 5))).shape
      (2, 3, 5)
    """
    if not isinstance(x, Tracer):
        return x
    mesh = jax.sharding.get_abstract_mesh()
    if not set(MESH_AXES) <= set(mesh.axis_names) or AxisType.Manual in mesh.axis_types:
        return x
    if AxisType.Explicit in mesh.axis_types:
        return x
    rules: dict[str, Any] = {}
    for letter, size in zip(letters, x.shape, strict=True):
        over = ACTIVATIONS[letter] if letter in "BT" else ()
        over = (over,) if isinstance(over, str) else over or ()
        if over and size % math.prod(mesh.shape[axis] for axis in over) == 0:
            rules[letter] = over
    fixed = _spec(f"x_{letters}", letters, x.shape, mesh, rules)
    free = PartitionSpec.UNCONSTRAINED
    places = dict(zip(letters, fixed, strict=False))
    known = {*rules, "D"}
    parts = [places.get(letter) if letter in known else free for letter in letters]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*parts))


def global_batch(make: Callable[[range], PyTree], mesh: Mesh, *, B: int) -> PyTree:
    """Make a batch that lies over all processes, of which each makes its own rows alone.

    Args:
      make: rows -> their part of the batch: a tree of NumPy arrays with names that start in B,
        `lambda rows: {"tokens_BT": data.batch(text, seed, step, B=B, T=T, rows=rows)}`.
      mesh: from `make_mesh`.
      B: rows of the whole batch.
    Returns: the tree with global arrays, placed by `ACTIVATIONS`.
    Raises: ValueError naming an array whose axes do not start in B or that has another number of
      rows than it was asked for; as `specs`.
    Example:
      >>> from jax_attn import make_mesh
      >>> mesh = make_mesh(devices=jax.devices()[:1])
      >>> make = lambda rows: {"x_BT": np.ones((len(rows), 3)) * np.array(rows)[:, None]}
      >>> global_batch(make, mesh, B=2)["x_BT"].tolist()
      [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    if not isinstance(B, int | np.integer) or isinstance(B, bool) or B < 1:
        raise ValueError(f"global_batch: B must be an int >= 1, got {B!r}")
    places = NamedSharding(mesh, _spec("global_batch: B", "B", (B,), mesh, ACTIVATIONS))
    indices = places.addressable_devices_indices_map((B,)).values()
    mine: list[range] = []
    for rows in sorted({range(B)[index[0]] for index in indices if index}, key=lambda r: r.start):
        if mine and mine[-1].stop == rows.start:
            rows = range(mine.pop().start, rows.stop)
        mine.append(rows)
    parts = [make(rows) for rows in mine]
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts[0]):
        if not axes(_name(path)).startswith("B") or not np.ndim(leaf):
            raise ValueError(
                f"global_batch: {jax.tree_util.keystr(path) or 'the array'} needs a name whose "
                f"axes start in B, such as {{'tokens_BT': ...}}"
            )
    local = jax.tree.map(lambda *part: np.concatenate(part), *parts)
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct((B, *x.shape[1:]), x.dtype), local)
    for path, leaf in jax.tree_util.tree_leaves_with_path(local):
        if len(leaf) != sum(map(len, mine)):
            raise ValueError(
                f"global_batch: {jax.tree_util.keystr(path)} has B={len(leaf)} but make was asked "
                f"for {sum(map(len, mine))} rows"
            )
    return jax.tree.map(
        lambda place, x, like: jax.make_array_from_process_local_data(place, x, like.shape),
        specs(whole, mesh, ACTIVATIONS),
        local,
        whole,
    )


def _check_rules(rules: Any, mesh: Mesh | AbstractMesh) -> None:
    if not isinstance(rules, Mapping):
        raise ValueError(f"rules must map letters to mesh axes, got {rules!r}")
    for letter, over in rules.items():
        if letter not in ALPHABET:
            raise ValueError(f"rules: {letter!r} is no axis letter; they are {' '.join(ALPHABET)}")
        names = (over,) if isinstance(over, str) else over if over is not None else ()
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"rules: {letter} must map to a mesh axis, a tuple of them or None, got {over!r}"
            )
        for name in names:
            if name not in mesh.shape and name not in MESH_AXES:
                raise ValueError(
                    f"rules map {letter} to mesh axis {name!r}, but the mesh has "
                    f"{', '.join(mesh.shape)}"
                )


def _batch_specs(owner: str, batch: PyTree, mesh: Mesh) -> PyTree:
    """Place a batch; an array without a name would be replicated, and all devices do all work."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if leaf.ndim and not axes(_name(path)):
            raise ValueError(
                f"{owner}: batch{jax.tree_util.keystr(path)} has no axes in its name; give the "
                f"batch as a dict such as {{'tokens_BT': ...}}"
            )
    return specs(batch, mesh, ACTIVATIONS)


def _name(path: Any) -> str:
    """The last key of a path, if it is a name."""
    last = path[-1] if path else None
    name = getattr(last, "key", getattr(last, "name", ""))
    return name if isinstance(name, str) else ""


def _spec(leaf: str, letters: str, shape: Sequence[int], mesh: Any, rules: Rules) -> PartitionSpec:
    """Apply rules to one array, checked against its shape; `leaf` is what errors call it."""
    if letters and len(shape) == len(letters) + 1:
        letters = "L" + letters
    if not letters or letters in ("D", "LD"):
        return PartitionSpec()
    if len(shape) != len(letters):
        raise ValueError(
            f"{leaf} has shape {tuple(shape)}, which does not fit its axes {' '.join(letters)}; "
            f"one more, L in front, is allowed"
        )
    mine: dict[str, str | tuple[str, ...] | None] = {}
    taken: set[str] = set()
    for letter, size in zip(letters, shape, strict=True):
        rule = rules.get(letter)
        over = (rule,) if isinstance(rule, str) else rule or ()
        if not over or taken & set(over):
            continue
        for axis in over:
            if axis not in mesh.shape:
                raise ValueError(
                    f"{leaf}: rules map {letter} to mesh axis {axis!r}, but the mesh has "
                    f"{', '.join(mesh.shape)}"
                )
        over = tuple(axis for axis in over if mesh.shape[axis] > 1)
        share = math.prod(mesh.shape[axis] for axis in over)
        if size % share:
            raise ValueError(
                f"{leaf} has {letter}={size} ({ALPHABET[letter]}), which mesh axis "
                f"{' * '.join(over)}={share} does not divide; "
                + (
                    "take a multiple (of T + 1 tokens make inputs and targets first), or another "
                    "mesh"
                    if letter in "BTS"
                    else f"change one of them, or give rules with {{{letter!r}: None}}"
                )
            )
        taken |= set(over)
        mine[letter] = over[0] if len(over) == 1 else over or None
    # No axes of size 1 and no None at the end, as compiled steps return them: the same place
    # written in another way would compile the step again.
    parts = list(spec(letters, mine))
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)
