"""One device's step, mapped by shard_map or pmap, makes the same update as one device alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_attn as a
from jax_attn import train
from tests import sharded_model as small

VIAS = ("shard_map", "pmap")
BATCH = {"x_BD": np.arange(80, dtype=np.float32).reshape(16, 5) / 80}


def square(params: Any, batch: Any, key: jax.Array) -> Any:
    return jnp.square(batch["x_BD"] @ params["w_D"]).mean(), {"drawn": jax.random.uniform(key)}


def state() -> train.TrainState:
    return train.init_state({"w_D": jnp.arange(5.0)}, optax.sgd(0.1))


@pytest.mark.parametrize("via", VIAS)
def test_numbers_are_those_of_one_device(via: str) -> None:
    losses, before, after = small.on_one_device()
    step_fn = a.data_parallel(small.make_step(axis="data"), a.make_mesh(data=8), via=via)
    got, trained = small.run(step_fn, jax.tree.map(jnp.asarray, before))
    small.assert_close(got, losses)
    small.assert_close(trained, after)


@pytest.mark.few(1)
@pytest.mark.parametrize("check", [True, False])
def test_the_step_is_right_under_a_users_own_shard_map(check: bool) -> None:
    """With check_vma the gradient of replicated parameters is summed before it is averaged."""
    P = jax.sharding.PartitionSpec
    own = jax.shard_map(
        train.make_train_step(square, optax.sgd(0.1), axis="data"),
        mesh=a.make_mesh(data=8),
        in_specs=(P(), P("data"), P()),
        out_specs=P(),
        check_vma=check,
    )
    plain = train.make_train_step(square, optax.sgd(0.1))
    (got, metrics), (want, wanted) = (
        own(state(), BATCH, small.KEY),
        plain(state(), BATCH, small.KEY),
    )
    small.assert_close(got, want)
    small.assert_close(metrics["grad_norm"], wanted["grad_norm"])


@pytest.mark.parametrize("via", VIAS)
def test_every_device_has_a_key_of_its_own(via: str) -> None:
    step_fn = a.data_parallel(
        train.make_train_step(square, optax.sgd(0.1), axis="data"), a.make_mesh(data=8), via=via
    )
    _, metrics = step_fn(state(), BATCH, small.KEY)
    key = jax.random.fold_in(small.KEY, 0)
    drawn = [float(jax.random.uniform(jax.random.fold_in(key, i))) for i in range(8)]
    assert len(set(drawn)) == 8
    small.assert_close(metrics["drawn"], np.mean(drawn))


@pytest.mark.parametrize("via", VIAS)
def test_it_communicates_one_average_and_compiles_once(via: str) -> None:
    traced = 0

    def counted(params: Any, batch: Any, key: jax.Array) -> Any:
        nonlocal traced
        traced += 1
        return square(params, batch, key)

    step_fn = a.data_parallel(
        train.make_train_step(counted, optax.sgd(0.1), axis="data"), a.make_mesh(data=8), via=via
    )
    made = state()
    for _ in range(4):
        made, _ = step_fn(made, BATCH, small.KEY)
    first = traced
    made, _ = step_fn(made, BATCH, small.KEY)
    assert traced == first
    assert int(made.step) == 5


@pytest.mark.parametrize("via", VIAS)
def test_a_step_that_averages_nothing_is_refused(via: str) -> None:
    alone = train.make_train_step(square, optax.sgd(0.1))
    mesh = a.make_mesh(data=8)
    with pytest.raises(ValueError, match=r"averages over None; .*axis='data'"):
        a.data_parallel(alone, mesh, via=via)
    own = a.data_parallel(lambda state, batch, key: alone(state, batch, key), mesh, via=via)
    with pytest.raises(ValueError, match=r"averages nothing over 'data'.*axis='data'"):
        own(state(), BATCH, small.KEY)
