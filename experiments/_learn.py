"""Training of small models, all seeds at once: `vmap` over seeds, `scan` over steps.

For data that a device can draw by itself. Seeds share one compiled program, and a dispatch makes
many steps.
"""

import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress
from jax.sharding import NamedSharding, PartitionSpec

from jax_attn import PARAMS, specs, train


class Learned(NamedTuple):
    """Parameters of all seeds after training, and what was measured on the way."""

    params: Any
    """Leaves have a leading axis of seeds."""
    rows: list[dict[str, np.ndarray]]
    """One for each measurement: `step` and arrays [seeds, ...]; the first is of step 0."""


def learn(
    init: Callable[[jax.Array], Any],
    loss_fn: train.LossFn,
    tx: optax.GradientTransformation,
    batch: Callable[[jax.Array], Any],
    *,
    seeds: int,
    steps: int,
    every: int,
    measure: Callable[[Any], Mapping[str, Any]],
    mesh: jax.sharding.Mesh,
    progress: rich.progress.Progress,
    title: str,
    log: pathlib.Path | None = None,
    parts: Sequence[str] = (),
) -> Learned:
    """Train one model from as many seeds as asked for.

    Args:
      init: key -> parameters of one seed.
      loss_fn, tx, parts: as for `train.make_train_step`.
      batch: key -> the batch of one step, arrays with rows first; seed i draws the same rows in
        every model that is trained.
      seeds: how many, from 0 on.
      steps: updates of each.
      every: steps between two measurements; the last measurement is after the last step.
      measure: parameters of one seed -> dict of arrays, called before the first step too.
      mesh: rows are split over data and fsdp, parameters by the letters of their names.
      progress: a bar is added.
      title: of the bar, and of rows in the log.
      log: a file that rows are appended to, as JSON lines.
    Returns: parameters and measurements; the loss of a row is the mean since the last one.
    """
    step_fn = train.make_train_step(loss_fn, tx, parts=parts)
    alone = mesh.size == 1
    if mesh.devices.flat[0].platform == "cpu":
        train.keep_memory()

    def start(seed: jax.Array) -> train.TrainState:
        return train.init_state(init(jax.random.fold_in(jax.random.key(0), seed)), tx)

    def rows_of(seed: jax.Array, step: jax.Array) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), seed), step)
        made = batch(key)
        if alone:
            return made
        place = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, place), made)

    def run(state: train.TrainState, seed: jax.Array, length: int) -> Any:
        def body(state: train.TrainState, _: None) -> Any:
            state, metrics = step_fn(state, rows_of(seed, state.step), jax.random.key(2))
            return state, {k: v for k, v in metrics.items() if "skipped" not in k}

        state, metrics = jax.lax.scan(body, state, None, length=length)
        return state, jax.tree.map(lambda x: x.mean(0), metrics)

    numbers = jnp.arange(seeds)
    places = None
    if not alone:
        shapes = jax.eval_shape(start, numbers[0])
        places = jax.tree.map(
            lambda place: NamedSharding(mesh, PartitionSpec(None, *place.spec)),
            specs(shapes, mesh, PARAMS),
        )
    with jax.set_mesh(mesh):
        # Draws run once, but optimising them takes XLA longer than compiling the step.
        quickly = {"xla_backend_optimization_level": 0}
        state = jax.jit(jax.vmap(start), out_shardings=places, compiler_options=quickly)(numbers)
        advance = jax.jit(jax.vmap(run, in_axes=(0, 0, None)), static_argnums=2, donate_argnums=0)
        look = jax.jit(jax.vmap(measure))
        found: list[dict[str, np.ndarray]] = []

        def note(step: int, metrics: Mapping[str, Any]) -> None:
            made = {**metrics, **look(state.params)}
            found.append({"step": np.asarray(step), **{k: np.asarray(v) for k, v in made.items()}})
            if log is not None:
                row = {k: v.tolist() for k, v in found[-1].items()}
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"model": title, **row}) + "\n")

        task = progress.add_task(title, total=steps, status="")
        note(0, {})
        done, told = 0, time.monotonic()
        while done < steps:
            length = min(every, steps - done)
            state, metrics = advance(state, numbers, length)
            done += length
            note(done, metrics)
            progress.update(task, completed=done)
            if progress.disable and (done == steps or time.monotonic() - told > 30):
                told = time.monotonic()
                print(f"{title}: step {done} of {steps}", file=sys.stderr)
    return Learned(state.params, found)


def check_rows(mesh: jax.sharding.Mesh, rows: Mapping[str, int]) -> None:
    """Refuse numbers of rows that the devices do not divide.

    Args:
      mesh: rows are split over data and fsdp.
      rows: how many, by the name of the option that says so.
    Raises: ValueError naming the option and both numbers.
    """
    share = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, number in rows.items():
        if number % share:
            raise ValueError(
                f"--{name}={number} rows cannot be split over {share} devices; see --mesh"
            )


def first(tree: Any, seed: int = 0) -> Any:
    """Take one seed of a tree.

    Args:
      tree: leaves with a leading axis of seeds.
      seed: which.
    Returns: the tree without that axis.
    """
    return jax.tree.map(lambda leaf: leaf[seed], tree)
