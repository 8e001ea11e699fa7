"""Training of small models, all seeds and cases at once: `vmap` over both, `scan` over steps.

For data that a device can draw by itself. Seeds share one compiled program, and a dispatch makes
many steps. Cases differ by numbers that are inputs of the program, such as a learning rate.
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

Case = Mapping[str, Any]


class Learned(NamedTuple):
    """Parameters of all seeds after training, and what was measured on the way."""

    params: Any
    """Leaves have a leading axis of seeds."""
    rows: list[dict[str, np.ndarray]]
    """One for each measurement: `step` and arrays [seeds, ...]; the first is of step 0."""


def learn(
    init: Callable[..., Any],
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
    given: Any = None,
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
      given: leaves with a leading axis of seeds: `init` gets those of its seed behind the key.
    Returns: parameters and measurements; the loss of a row is the mean since the last one.
    """
    return learn_cases(
        init,
        lambda case, params, rows, key: loss_fn(params, rows, key),
        lambda case: tx,
        batch,
        cases={title: {}},
        seeds=seeds,
        steps=steps,
        every=every,
        measure=lambda case, params: measure(params),
        mesh=mesh,
        progress=progress,
        title=title,
        log=log,
        parts=parts,
        given=given,
    )[title]


def learn_cases(
    init: Callable[..., Any],
    loss_fn: Callable[[Case, Any, Any, jax.Array], tuple[jax.Array, Mapping[str, Any]]],
    tx: Callable[[Case], optax.GradientTransformation],
    batch: Callable[[jax.Array], Any],
    *,
    cases: Mapping[str, Case],
    seeds: int,
    steps: int,
    every: int,
    measure: Callable[[Case, Any], Mapping[str, Any]],
    mesh: jax.sharding.Mesh,
    progress: rich.progress.Progress,
    title: str,
    log: pathlib.Path | None = None,
    parts: Sequence[str] = (),
    given: Any = None,
    after: Callable[[Case, Any, Mapping[str, jax.Array]], Any] | None = None,
) -> dict[str, Learned]:
    """Train a model in each case from each seed.

    Args:
      init: key -> parameters; a seed has the same in every case.
      loss_fn: case, parameters, batch, key -> loss, and what else was measured, a flat dict of
        arrays.
      tx: case -> optimizer.
      batch: key -> the batch of one step, arrays with rows first; a seed draws the same rows in
        every case.
      cases: by name, each with the same numbers; functions get them as scalar arrays.
      measure: case, parameters of one seed -> dict of arrays, called before the first step too.
      seeds, steps, every, mesh, progress, title, parts, given: as for `learn`.
      log: a file that rows are appended to, as JSON lines, one for each case.
      after: case, parameters, the step's metrics -> parameters; for updates that were made, not for
        one that was left out because something was not finite.
    Returns: what was learned by case, with a leading axis of seeds. Metrics are means since the
      last measurement, but `skipped`, the updates left out so far.
    """
    first = next(iter(cases.values()))
    numbers = {name: jnp.array([case[name] for case in cases.values()]) for name in first}
    case_M = {name: jnp.repeat(x, seeds) for name, x in numbers.items()}
    seed_M = jnp.tile(jnp.arange(seeds), len(cases))
    given_M = jax.tree.map(lambda x: jnp.concatenate([x] * len(cases)), given)
    if mesh.devices.flat[0].platform == "cpu":
        train.keep_memory()
    alone = mesh.size == 1

    def begin(case: Case, seed: jax.Array, given: Any) -> train.TrainState:
        key = jax.random.fold_in(jax.random.key(0), seed)
        params = init(key) if given is None else init(key, given)
        return train.init_state(params, tx(case))

    def rows_of(seed: jax.Array, step: jax.Array) -> Any:
        made = batch(jax.random.fold_in(jax.random.fold_in(jax.random.key(1), seed), step))
        if alone:
            return made
        place = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, place), made)

    def run(state: train.TrainState, case: Case, seed: jax.Array, length: int) -> Any:
        step_fn = train.make_train_step(
            lambda params, rows, key: loss_fn(case, params, rows, key), tx(case), parts=parts
        )

        def body(state: train.TrainState, _: None) -> Any:
            state, metrics = step_fn(state, rows_of(seed, state.step), jax.random.key(2))
            if after is None:
                return state, metrics
            updated = metrics["skipped_in_row"] == 0
            params = jax.tree.map(
                lambda new, old: jnp.where(updated, new, old),
                after(case, state.params, metrics),
                state.params,
            )
            return state._replace(params=params), metrics

        state, metrics = jax.lax.scan(body, state, None, length=length)
        means = {name: x.mean(0) for name, x in metrics.items() if "skipped" not in name}
        return state, means | {"skipped": metrics["skipped"][-1]}

    places = None
    if not alone:
        shapes = jax.eval_shape(begin, *jax.tree.map(lambda x: x[0], (case_M, seed_M, given_M)))
        places = jax.tree.map(
            lambda place: NamedSharding(mesh, PartitionSpec(None, *place.spec)),
            specs(shapes, mesh, PARAMS),
        )

    def of_case(i: int, tree: Any) -> Any:
        return jax.tree.map(lambda x: x[i * seeds : (i + 1) * seeds], tree)

    with jax.set_mesh(mesh):
        # Draws run once, but optimising them takes XLA longer than compiling the step.
        quickly = {"xla_backend_optimization_level": 0}
        made = jax.jit(jax.vmap(begin), out_shardings=places, compiler_options=quickly)
        state = made(case_M, seed_M, given_M)
        mapped = jax.vmap(run, in_axes=(0, 0, 0, None))
        advance = jax.jit(mapped, static_argnums=3, donate_argnums=0)
        look = jax.jit(jax.vmap(measure))
        found: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in cases}

        def note(step: int, metrics: Mapping[str, Any]) -> None:
            made = jax.tree.map(np.asarray, {**metrics, **look(case_M, state.params)})
            for i, name in enumerate(cases):
                found[name].append({"step": np.asarray(step), **of_case(i, made)})
                if log is not None:
                    row = {key: x.tolist() for key, x in found[name][-1].items()}
                    with log.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"model": name, **row}) + "\n")

        task = progress.add_task(title, total=steps, status="")
        note(0, {})
        done, told = 0, time.monotonic()
        while done < steps:
            length = min(every, steps - done)
            state, metrics = advance(state, case_M, seed_M, length)
            done += length
            note(done, metrics)
            progress.update(task, completed=done)
            if progress.disable and (done == steps or time.monotonic() - told > 30):
                told = time.monotonic()
                print(f"{title}: step {done} of {steps}", file=sys.stderr)
        return {
            name: Learned(of_case(i, state.params), found[name]) for i, name in enumerate(cases)
        }


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
