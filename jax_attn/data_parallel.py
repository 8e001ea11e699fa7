"""Data parallelism written out: one device's step, mapped over the devices.

`shard_step` lets the compiler find the communication; here it is the one average that
`make_train_step(..., axis="data")` writes down, whichever way the step is mapped.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jax_attn.mesh import require_auto
from jax_attn.train import StepFn

AXIS = "data"


def data_parallel(step: StepFn, mesh: Mesh, *, via: str = "shard_map") -> Callable[..., Any]:
    """Run one device's step on every device, each with its own rows of the batch.

    Every device holds the whole state and makes the same update.

    Args:
      step: from `make_train_step(loss_fn, tx, axis="data")`.
      mesh: from `make_mesh(data=...)`, the other axes 1.
      via: "shard_map", or "pmap", which knows the devices of one process alone.
    Returns: `step(state, batch, key) -> (state, metrics)`, compiled; it donates its state. Every
      array of the batch is split along its first axis.
    Raises: ValueError naming `via`, or the mesh axis that is not 1; when it is called, naming the
      array of the batch whose first axis the devices do not divide, or if the step averages nothing
      over "data".
    A step that is not `make_train_step`'s must average gradients over "data" by itself; only that
    it averages something is checked.
    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jax_attn import make_mesh
      >>> from jax_attn.train import init_state, make_train_step
      >>> def loss_fn(params, batch, key):
      ...     return jnp.square(batch["x_BD"] @ params["w_D"]).mean(), {}
      >>> tx, mesh = optax.sgd(0.25), make_mesh(data=1, devices=jax.devices()[:1])
      >>> step_fn = data_parallel(make_train_step(loss_fn, tx, axis="data"), mesh)
      >>> state = init_state({"w_D": jnp.array([3.0, 4.0])}, tx)
      >>> state, metrics = step_fn(state, {"x_BD": jnp.eye(2)}, jax.random.key(0))
      >>> float(metrics["loss"]), state.params["w_D"].tolist()
      (12.5, [2.25, 3.0])
    """
    if via not in ("shard_map", "pmap"):
        raise ValueError(f"via must be 'shard_map' or 'pmap', got {via!r}")
    if AXIS not in mesh.shape:
        raise ValueError(f"data_parallel: the mesh has no axis {AXIS!r}, only {mesh.axis_names}")
    for name, size in mesh.shape.items():
        if name != AXIS and size != 1:
            raise ValueError(
                f"data_parallel: mesh axis {name!r} has size {size}, but the state is replicated "
                f"and only {AXIS!r} may be larger than 1; use shard_step for the others"
            )
    require_auto("data_parallel", mesh)
    averaged = getattr(step, "axis", AXIS)  # a step of the caller's own is looked at below
    if averaged != AXIS:
        raise ValueError(
            f"data_parallel: step averages over {averaged!r}; make it with "
            f"make_train_step(..., axis={AXIS!r})"
        )
    devices = list(mesh.devices.flat)
    if via == "pmap" and len({device.process_index for device in devices}) > 1:
        raise ValueError("via='pmap' maps one process's devices; the mesh has several processes'")

    def checked(state: Any, batch: Any, key: jax.Array) -> Any:
        # Without the average each device would go its own way, and one device's result be returned.
        if f"'{AXIS}'" not in str(jax.make_jaxpr(step)(state, batch, key)):
            raise ValueError(
                f"data_parallel: step averages nothing over {AXIS!r}; make it with "
                f"make_train_step(..., axis={AXIS!r})"
            )
        return step(state, batch, key)

    if via == "shard_map":
        # Not check_vma: the check does not know every primitive that a loss may use.
        mapped = jax.shard_map(
            checked,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(AXIS), PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        run = jax.jit(mapped, donate_argnums=0)
    else:
        run = jax.pmap(
            checked,
            axis_name=AXIS,
            in_axes=(None, 0, None),
            out_axes=None,  # type: ignore[arg-type]  # what every device has; pmap allows None
            devices=devices,
            donate_argnums=0,
        )

    def parallel(state: Any, batch: Any, key: jax.Array) -> Any:
        n = len(devices)
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
            shape = np.shape(leaf)
            if not shape or not shape[0] or shape[0] % n:
                raise ValueError(
                    f"data_parallel: batch{jax.tree_util.keystr(path)} has shape {shape}, "
                    f"whose first axis {n} devices do not divide; take a multiple of {n} rows"
                )
        if via == "pmap":
            batch = jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), batch)
        return run(state, batch, key)

    if via == "shard_map":
        parallel._cache_size = run._cache_size  # type: ignore[attr-defined]  # counts compiles
    return parallel
