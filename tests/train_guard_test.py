"""Tests of what keeps a step from doing harm, and of what else a step may be told to do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_attn import make_mesh, shard_init, shard_step, train
from jax_attn.train import digest
from jax_attn.train.step import _judge
from tests.trained_model import KEY, B, D, batch_fn, init_params, loss_fn, norm


def start(tx: optax.GradientTransformation) -> train.TrainState:
    return train.init_state(init_params(KEY), tx)


def linear(params: Any, scale: Any, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    return (params["w"].astype(jnp.float32) * scale).sum(), {}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_its_counts(bad: float) -> None:
    tx = optax.adamw(1e-2)
    step = jax.jit(train.make_train_step(loss_fn, tx))
    state, _ = step(start(tx), batch_fn(0), KEY)
    x_BD = batch_fn(1)
    x_BD[3, 2] = bad
    after, metrics = step(state, x_BD, KEY)
    assert digest((after.params, after.opt_state)) == digest((state.params, state.opt_state))
    assert (int(after.step), int(after.guard.skipped), int(after.guard.in_row)) == (2, 1, 1)
    assert (metrics["skipped"], metrics["skipped_in_row"]) == (1, 1)
    after, metrics = step(after, batch_fn(2), KEY)
    assert (metrics["skipped"], metrics["skipped_in_row"]) == (1, 0)
    assert digest(after.params) != digest(state.params)


def test_a_finite_loss_with_a_gradient_that_is_not_and_an_update_that_is_not() -> None:
    def root(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        return jnp.sqrt(params["w"]).sum(), {}

    w = {"w": jnp.array([4.0, 0.0])}
    state, metrics = train.make_train_step(root, optax.sgd(0.1))(
        train.init_state(w, optax.sgd(0.1)), None, KEY
    )
    assert np.isfinite(metrics["loss"])
    assert state.params["w"].tolist() == [4, 0]
    tx = optax.scale(np.inf)
    state = train.init_state({"w": jnp.array([4.0, 1.0])}, tx)
    state, metrics = train.make_train_step(root, tx)(state, None, KEY)
    assert np.isfinite(metrics["grad_norm"])
    assert state.params["w"].tolist() == [4, 1]


def test_seeds_under_vmap_are_left_out_one_by_one() -> None:
    tx = optax.adam(1e-2)
    step = jax.vmap(train.make_train_step(loss_fn, tx), in_axes=(0, 0, None))
    states = jax.vmap(lambda key: train.init_state(init_params(key), tx))(jax.random.split(KEY, 3))
    x = np.stack([batch_fn(0)] * 3)
    x[1] = np.nan
    after, metrics = jax.jit(step)(states, x, KEY)
    assert metrics["skipped"].tolist() == [0, 1, 0]
    for seed in range(3):
        of = [digest(jax.tree.map(lambda p: p[seed], s.params)) for s in (states, after)]  # noqa: B023
        assert (of[0] == of[1]) == (seed == 1)


def test_a_spike_is_left_out_and_norms_that_stay_high_become_usual() -> None:
    tx = optax.sgd(1e-3)
    step = jax.jit(train.make_train_step(linear, tx, skip_spikes=6.0))
    state = train.init_state({"w": jnp.ones(1)}, tx)
    rng = np.random.default_rng(0)
    for i in range(150):
        scale = np.float32(8 if i == 50 else 1 + 0.1 * rng.standard_normal())
        state, metrics = step(state, scale, KEY)
    # The one at 50 came before there was anything to compare with, and is nearly forgotten.
    assert metrics["skipped"] == 0
    for _ in range(400):
        state, metrics = step(state, np.float32(1 + 0.1 * rng.standard_normal()), KEY)
    state, metrics = step(state, np.float32(1e4), KEY)
    assert metrics["skipped"] == 1
    left_out = []
    for _ in range(200):
        state, metrics = step(state, np.float32(30.0), KEY)
        left_out.append(bool(metrics["skipped_in_row"]))
    assert left_out[:2] == [True, True]
    assert not any(left_out[100:])


@pytest.mark.parametrize("noise", [0.05, 1e-4])
def test_one_outlier_leaves_out_itself_alone(noise: float) -> None:
    judge = jax.jit(lambda guard, step, norm: _judge(
        guard, step, {"loss": norm, "grad_norm": norm, "update_norm": norm}, 6.0, jnp.bool_(True)
    ))  # fmt: skip
    guard: Any = start(optax.sgd(0.1)).guard
    left_out: list[int] = []
    seen: list[np.floating] = []
    rng = np.random.default_rng(0)
    for i in range(600):
        size = np.float32(50 if i == 105 else 1 + noise * rng.standard_normal())
        made, guard = judge(guard, np.int32(i), size)
        left_out += [] if made else [i]
        seen.append(size)
    assert left_out == [105]
    np.testing.assert_allclose(guard.norm, np.mean(seen[-300:]), rtol=noise)
    np.testing.assert_allclose(np.sqrt(guard.norm_variance), noise, rtol=0.4)


def test_a_norm_too_large_to_square_is_not_remembered() -> None:
    guard: Any = start(optax.sgd(0.1)).guard
    for i, size in enumerate([1.0, 1e30, 2.0]):
        metrics = {name: jnp.float32(size) for name in ("loss", "grad_norm", "update_norm")}
        made, guard = _judge(guard, jnp.int32(i), metrics, 6.0, jnp.bool_(True))
        assert made
    assert 1 < guard.norm < 2
    assert np.isfinite(guard.norm_variance)


@pytest.mark.parametrize(
    ("dtype", "tx", "scale"),
    [(jnp.float16, optax.adam(1e-3), 9000), (jnp.float32, optax.adagrad(1e-3), 1e19)],
)
def test_a_number_of_the_optimizer_that_overflows_leaves_the_step_out(
    dtype: Any, tx: optax.GradientTransformation, scale: float
) -> None:
    # The gradient, its norm and the update are finite; the optimizer's squares are not for long.
    step = jax.jit(train.make_train_step(linear, tx))
    state = train.init_state({"w": jnp.zeros(1, dtype)}, tx)
    for _ in range(5):
        before = state
        state, metrics = step(state, jnp.float32(scale), KEY)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.opt_state))
    assert np.isfinite(metrics["update_norm"])
    assert metrics["skipped_in_row"] >= 1
    assert digest(state.opt_state) == digest(before.opt_state)


def test_a_number_that_was_infinite_from_the_start_blocks_nothing() -> None:
    def unchanged(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, state

    best = optax.GradientTransformation(lambda params: jnp.float32(jnp.inf), unchanged)
    tx = optax.chain(best, optax.sgd(0.1))
    state = train.init_state({"w": jnp.zeros(1)}, tx)
    metrics = train.make_train_step(linear, tx)(state, jnp.float32(1), KEY)[1]
    assert metrics["skipped"] == 0


@pytest.mark.parametrize("accumulate", [1, 11])
def test_accumulated_gradients_equal_the_big_batch(accumulate: int) -> None:
    tx = optax.sgd(0.1)
    x_BD = batch_fn(0)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), init_params(KEY))
        grads = jax.grad(loss_fn, has_aux=True)(exact, jnp.asarray(x_BD, jnp.float64), KEY)[0]
        expected = jax.tree.map(lambda p, g: np.asarray(p - 0.1 * g), exact, grads)
    step = jax.jit(train.make_train_step(loss_fn, tx, accumulate=accumulate))
    state, metrics = step(start(tx), x_BD, KEY)
    plain, whole = jax.jit(train.make_train_step(loss_fn, tx))(start(tx), x_BD, KEY)
    for got, big, want in zip(
        *map(jax.tree.leaves, (state.params, plain.params, expected)), strict=True
    ):
        budget = 2 * np.abs(np.asarray(big, np.float64) - want).max()
        assert np.abs(np.asarray(got, np.float64) - want).max() <= max(budget, 11 * 2**-24)
    for name in ("loss", "grad_norm", "hidden"):
        np.testing.assert_allclose(metrics[name], whole[name], rtol=1e-6)


def test_accumulation_gives_each_part_its_key_and_names_what_it_cannot_cut() -> None:
    def noisy(params: Any, x_B: Any, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        return params["w"].sum(), {"noise": jax.random.normal(key), "first": x_B[0]}

    tx = optax.sgd(0.1)
    state = train.init_state({"w": jnp.ones(3)}, tx)
    step = train.make_train_step(noisy, tx, accumulate=3)
    metrics = step(state, jnp.arange(6.0), KEY)[1]
    keys = [jax.random.fold_in(jax.random.fold_in(KEY, 0), i) for i in range(3)]
    expected = np.mean([jax.random.normal(key) for key in keys])
    np.testing.assert_allclose(metrics["noise"], expected, rtol=1e-6)
    assert metrics["first"] == 1  # rows 0, 1, 2 open the three parts
    with pytest.raises(ValueError, match=r"accumulate=3 does not divide the rows of batch.*\(7,\)"):
        step(state, jnp.arange(7.0), KEY)
    for wrong in (0, 2.0, True):
        with pytest.raises(ValueError, match="accumulate must be an int >= 1"):
            train.make_train_step(noisy, tx, accumulate=wrong)  # type: ignore[arg-type]


def test_accumulation_over_devices_keeps_rows_where_they_are() -> None:
    tx = optax.sgd(0.1)
    mesh = make_mesh(data=4, devices=jax.devices()[:4])
    loss = lambda p, batch, key: loss_fn(p, batch["x_BD"], key)  # noqa: E731
    x_BD = np.random.default_rng(0).standard_normal((24, D), np.float32)
    step_fn = shard_step(train.make_train_step(loss, tx, accumulate=3), mesh)
    state = shard_init(lambda key: train.init_state(init_params(key), tx), KEY, mesh)
    text = step_fn.lower(state, {"x_BD": x_BD}, KEY).compile().as_text()
    assert "all-to-all" not in text
    assert "all-gather" not in text
    state, _ = step_fn(state, {"x_BD": x_BD}, KEY)
    alone, _ = train.make_train_step(loss, tx)(start(tx), {"x_BD": x_BD}, KEY)
    for got, want in zip(*map(jax.tree.leaves, (state.params, alone.params)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_compute_in_bfloat16_keeps_parameters_and_gradients_wide() -> None:
    seen = []

    def watched(params: Any, x_BD: Any, key: jax.Array) -> Any:
        seen.append(jax.tree.map(lambda p: p.dtype.name, params))
        return loss_fn(params, x_BD, key)

    tx = optax.sgd(0.1)
    narrow = train.compute_in(watched, jnp.bfloat16, keep=["bias_D"])
    state, metrics = jax.jit(train.make_train_step(narrow, tx))(start(tx), batch_fn(0), KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    attention, mlp = seen[0]["layers"]
    assert attention["attention"]["w_DF"] == mlp["mlp"]["w_FD"] == "bfloat16"
    assert mlp["mlp"]["bias_D"] == "float32"
    plain = jax.jit(train.make_train_step(loss_fn, tx))(start(tx), batch_fn(0), KEY)[1]
    assert 0 < abs(metrics["loss"] - plain["loss"]) < 0.02 * plain["loss"]
    with pytest.raises(ValueError, match="dtype must be floating, got int8"):
        train.compute_in(loss_fn, jnp.int8)
    with pytest.raises(ValueError, match="keep: no parameter has the key 'scale'"):
        train.compute_in(loss_fn, keep=["scale"])(init_params(KEY), batch_fn(0), KEY)


def test_the_learning_rate_reported_is_the_one_used() -> None:
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    tx = optax.sgd(schedule)
    step = jax.jit(train.make_train_step(loss_fn, tx, schedule=schedule))
    state = start(tx)
    for i, x_BD in enumerate([batch_fn(0), np.full((B, D), np.nan, np.float32), batch_fn(2)]):
        state, metrics = step(state, x_BD, KEY)
        used = metrics["update_norm"] / metrics["grad_norm"]
        if i != 1:
            np.testing.assert_allclose(used, metrics["learning_rate"], rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"], 0.09, rtol=1e-5)


def test_freeze_scale_and_average_by_name() -> None:
    tx = optax.chain(
        train.freeze(train.scale_rates(optax.sgd(0.1), {"bias_D": 0.0, "mlp": 2.0}), ["attention"]),
        train.average_params(0.75),
    )
    before = start(tx)
    state, _ = jax.jit(train.make_train_step(loss_fn, tx))(before, batch_fn(0), KEY)
    grads = jax.grad(loss_fn, has_aux=True)(before.params, batch_fn(0), KEY)[0]
    (attention, mlp), (old, was) = state.params["layers"], before.params["layers"]
    assert digest(attention) == digest(old)
    assert digest(mlp["mlp"]["bias_D"]) == digest(was["mlp"]["bias_D"])
    expected = was["mlp"]["w_FD"] - 0.2 * grads["layers"][1]["mlp"]["w_FD"]
    np.testing.assert_allclose(mlp["mlp"]["w_FD"], expected, rtol=1e-6)
    mean = train.averaged(state.opt_state)["layers"][1]["mlp"]["w_FD"]
    np.testing.assert_allclose(mean, 0.75 * was["mlp"]["w_FD"] + 0.25 * expected, rtol=1e-6)
    assert norm(*jax.tree.leaves(before.opt_state)) > 0  # the mean starts at the parameters


def test_optimizers_by_name_reject() -> None:
    params = init_params(KEY)
    with pytest.raises(ValueError, match="freeze: no parameter has the key 'attn'"):
        train.freeze(optax.sgd(0.1), ["attn"]).init(params)
    with pytest.raises(ValueError, match="got the string 'mlp'"):
        train.freeze(optax.sgd(0.1), "mlp")
    with pytest.raises(ValueError, match="scale_rates: no parameter has the key 'x'"):
        train.scale_rates(optax.sgd(0.1), {"x": 1.0}).init(params)
    with pytest.raises(ValueError, match="decay must be from 0 to below 1, got 1"):
        train.average_params(1)
    inside = train.freeze(optax.chain(optax.sgd(0.1), train.average_params(0.5)), ["mlp"])
    with pytest.raises(ValueError, match="some parameters are masked; put it outside"):
        inside.init(params)
    with pytest.raises(ValueError, match="holds 0 means"):
        train.averaged(optax.sgd(0.1).init(params))
    with pytest.raises(ValueError, match="state has no guard; make it with init_state"):
        train.make_train_step(loss_fn, optax.sgd(0.1))(
            train.TrainState(jnp.int32(0), params, ()), batch_fn(0), KEY
        )
    with pytest.raises(ValueError, match="skip_spikes must be > 0"):
        train.make_train_step(loss_fn, optax.sgd(0.1), skip_spikes=0)
