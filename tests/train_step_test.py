"""Tests of jax_attn.train.step: what one step does and measures."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_attn import train
from tests.trained_model import (
    KEY,
    PARTS,
    batch_fn,
    frozen_attention,
    init_params,
    leaves,
    loss_fn,
    norm,
)

# Loss.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_next_token_loss_matches_float64(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    logits_BTV = jnp.asarray(30 * rng.standard_normal((2, 3, 13)), dtype)
    targets_BT = rng.integers(0, 13, (2, 3))
    exact_BTV = np.asarray(logits_BTV, np.float64)
    exact_BTV -= exact_BTV.max(-1, keepdims=True)
    log_p_BTV = exact_BTV - np.log(np.exp(exact_BTV).sum(-1, keepdims=True))
    expected = -np.mean(np.take_along_axis(log_p_BTV, targets_BT[..., None], -1))
    loss = train.next_token_loss(logits_BTV, jnp.asarray(targets_BT))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_next_token_loss_rejects() -> None:
    with pytest.raises(ValueError, match="targets_BT has T=5 but logits_BTV has T=3"):
        train.next_token_loss(jnp.zeros((2, 3, 13)), jnp.zeros((2, 5), jnp.int32))
    with pytest.raises(ValueError, match="targets_BT must be integers, got dtype float32"):
        train.next_token_loss(jnp.zeros((2, 3, 13)), jnp.zeros((2, 3)))


def test_bits_per_byte() -> None:
    np.testing.assert_allclose(train.bits_per_byte(np.log([2.0, 8.0, 256.0])), [1, 3, 8])


# One step.


def test_norms_equal_float64_norms_of_gradients_updates_and_parameters() -> None:
    tx = optax.adam(1e-2)
    state = train.init_state(init_params(KEY), tx)
    step = jax.jit(train.make_train_step(loss_fn, tx, parts=PARTS))
    for index in range(3):
        x_BD = batch_fn(index)
        grads = jax.grad(loss_fn, has_aux=True)(state.params, x_BD, KEY)[0]
        new, metrics = step(state, x_BD, KEY)
        # float64 of float32 parameters: the difference itself is exact.
        change = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), new.params, state.params)
        trees = {"grad_norm": grads, "update_norm": change, "param_norm": state.params}
        for name, tree in trees.items():
            # Rounding a parameter after the update moves the difference by up to eps * |param|.
            atol = 1e-6 if name == "update_norm" else 0
            expected = norm(*jax.tree.leaves(tree))
            np.testing.assert_allclose(metrics[name], expected, rtol=1e-5, atol=atol)
            for part in PARTS:
                expected = norm(*leaves(tree, part))
                assert expected > 0
                np.testing.assert_allclose(
                    metrics[f"{name}/{part}"], expected, rtol=1e-5, atol=atol
                )
        assert int(new.step) == index + 1
        state = new


def test_metrics_are_scalar_float32_and_include_what_the_loss_measured() -> None:
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), init_params(KEY))
    tx = optax.sgd(0.1)
    step = jax.jit(train.make_train_step(loss_fn, tx, parts=["mlp"]))
    state, metrics = step(train.init_state(params, tx), batch_fn(0).astype(jnp.bfloat16), KEY)
    norms = {f"{name}_norm{part}" for name in ("grad", "update", "param") for part in ("", "/mlp")}
    assert set(metrics) == {"loss", "hidden", "skipped", "skipped_in_row"} | norms
    assert {(value.dtype, value.shape) for value in metrics.values()} == {
        (np.dtype(np.float32), ())
    }
    expected = norm(*jax.tree.leaves(params))
    np.testing.assert_allclose(metrics["param_norm"], expected, rtol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}


def test_part_without_gradient_reports_exactly_zero() -> None:
    tx = optax.adam(1e-2)
    state = train.init_state(init_params(KEY), tx)
    step = jax.jit(train.make_train_step(frozen_attention, tx, parts=PARTS))
    new, metrics = step(state, batch_fn(0), KEY)
    assert metrics["grad_norm/attention"] == 0
    assert metrics["update_norm/attention"] == 0
    assert metrics["grad_norm/mlp"] == metrics["grad_norm"] > 0
    assert metrics["update_norm/mlp"] > 0
    before, after = leaves(state.params, "attention"), leaves(new.params, "attention")
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_part_may_be_a_leaf_a_position_or_an_attribute() -> None:
    class Params(NamedTuple):
        query: list[jax.Array]
        value: dict[str, jax.Array]

    def loss(params: Params, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        return optax.tree.norm(params) ** 2 / 2, {}

    params = Params([jnp.full(3, 2.0), jnp.full(5, 3.0)], {"w": jnp.full(7, 5.0)})
    tx = optax.sgd(1.0)
    step = train.make_train_step(loss, tx, parts=("query", "1", "w"))
    metrics = step(train.init_state(params, tx), None, KEY)[1]
    got = [float(metrics[f"grad_norm/{part}"]) ** 2 for part in ("query", "1", "w")]
    np.testing.assert_allclose(got, [12 + 45, 45, 175], rtol=1e-6)


def test_unknown_part_lists_the_keys_that_exist() -> None:
    tx = optax.sgd(0.1)
    step = train.make_train_step(loss_fn, tx, parts=("attention", "mpl"))
    message = r"no parameter has the key 'mpl'; the keys are 0, 1, attention, bias_D, layers, mlp,"
    with pytest.raises(ValueError, match=message):
        step(train.init_state(init_params(KEY), tx), batch_fn(0), KEY)
    with pytest.raises(ValueError, match="parts must be a sequence of keys, got the string 'mlp'"):
        train.make_train_step(loss_fn, tx, parts="mlp")


def test_metric_may_not_hide_one_made_by_the_step() -> None:
    step = train.make_train_step(lambda p, x, k: (loss_fn(p, x, k)[0], {"loss": 0}), optax.sgd(0.1))
    with pytest.raises(ValueError, match="may not be named loss: taken"):
        step(train.init_state(init_params(KEY), optax.sgd(0.1)), batch_fn(0), KEY)


def test_every_step_gets_its_own_key() -> None:
    def noisy(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        return params["w"].sum(), {"noise": jax.random.normal(key)}

    tx = optax.sgd(0.1)
    step_fn = jax.jit(train.make_train_step(noisy, tx))
    state = train.init_state({"w": jnp.ones(3)}, tx)
    history = train.fit(step_fn, state, lambda step: None, steps=5, key=KEY)[1]
    expected = [jax.random.normal(jax.random.fold_in(KEY, step)) for step in range(5)]
    assert [row["noise"] for row in history.train] == [float(value) for value in expected]
    assert len(set(map(float, expected))) == 5


def test_step_needs_no_implicit_rank_promotion() -> None:
    tx = optax.adamw(1e-2)
    state = train.init_state(init_params(KEY), tx)
    with jax.numpy_rank_promotion("raise"):
        train.make_train_step(loss_fn, tx, parts=PARTS)(state, batch_fn(0), KEY)
        train.next_token_loss(jnp.zeros((2, 3, 13)), jnp.zeros((2, 3), jnp.int32))
