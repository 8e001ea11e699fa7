"""Training of one model in many cases, from several seeds each: one program, `vmap` over both.

Like `experiments._learn`. What sets cases apart are numbers that are inputs of the program, such as
a learning rate, so that all of them compile at once; and parameters may be changed after an update.
"""

import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress
from jax.sharding import NamedSharding, PartitionSpec

from experiments._learn import Learned
from jax_attn import PARAMS, specs, train

Case = Mapping[str, Any]


def learn_cases(
    init: Callable[[jax.Array], Any],
    loss_fn: Callable[[Case, Any, Any], tuple[jax.Array, Mapping[str, Any]]],
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
    log: pathlib.Path,
    after: Callable[[Case, Any, Mapping[str, jax.Array]], Any] | None = None,
) -> dict[str, Learned]:
    """Train a model in each case from each seed.

    Args:
      init: key -> parameters; a seed has the same in every case.
      loss_fn: case, parameters, batch -> loss, and what else was measured, a flat dict of arrays.
      tx: case -> optimizer.
      batch: key -> the batch of one step, arrays with rows first; a seed draws the same rows in
        every case.
      cases: by name, each with the same numbers; functions get them as scalar arrays.
      measure: case, parameters of one seed -> dict of arrays, called before the first step too.
      seeds, steps, every, mesh, progress, title: as for `learn`.
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
    alone = mesh.size == 1

    def start(case: Case, seed: jax.Array) -> train.TrainState:
        return train.init_state(init(jax.random.fold_in(jax.random.key(0), seed)), tx(case))

    def rows_of(seed: jax.Array, step: jax.Array) -> Any:
        made = batch(jax.random.fold_in(jax.random.fold_in(jax.random.key(1), seed), step))
        if alone:
            return made
        place = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, place), made)

    def run(state: train.TrainState, case: Case, seed: jax.Array, length: int) -> Any:
        step_fn = train.make_train_step(
            lambda params, rows, key: loss_fn(case, params, rows), tx(case)
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
        shapes = jax.eval_shape(start, {name: x[0] for name, x in case_M.items()}, seed_M[0])
        places = jax.tree.map(
            lambda place: NamedSharding(mesh, PartitionSpec(None, *place.spec)),
            specs(shapes, mesh, PARAMS),
        )

    def of_case(i: int, tree: Any) -> Any:
        return jax.tree.map(lambda x: x[i * seeds : (i + 1) * seeds], tree)

    with jax.set_mesh(mesh):
        # Draws run once, but optimising them takes XLA longer than compiling the step.
        quickly = {"xla_backend_optimization_level": 0}
        begin = jax.jit(jax.vmap(start), out_shardings=places, compiler_options=quickly)
        state = begin(case_M, seed_M)
        mapped = jax.vmap(run, in_axes=(0, 0, 0, None))
        advance = jax.jit(mapped, static_argnums=3, donate_argnums=0)
        look = jax.jit(jax.vmap(measure))
        found: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in cases}

        def note(step: int, metrics: Mapping[str, Any]) -> None:
            made = jax.tree.map(np.asarray, {**metrics, **look(case_M, state.params)})
            with log.open("a", encoding="utf-8") as file:
                for i, name in enumerate(cases):
                    found[name].append({"step": np.asarray(step), **of_case(i, made)})
                    row = {key: x.tolist() for key, x in found[name][-1].items()}
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
