"""Training controls: their formulas, and a training run that fails without each and not with it."""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_attn import (
    attention,
    causal,
    control,
    dot_product_attention,
    head_summary,
    init_attention,
    init_block,
    init_stack,
    rope,
    stack,
)
from tests import formulas
from tests.attention_cases import QUICK
from tests.formulas import random_like

B, T, D, N, K, H, E, L = 5, 11, 7, 6, 3, 2, 13, 4
EPS = float(np.finfo(np.float32).eps)
jit = partial(jax.jit, compiler_options=QUICK)
X_BTD = random_like(np.zeros((B, T, D)), 1)
INIT = partial(init_attention, D=D, N=N, K=K, H=H, E=E)


def largest(params: dict, **options: Any) -> jax.Array:
    """The largest logit of each head on X_BTD, [N]."""
    _, aux = attention(params, X_BTD, observe=("max_logit",), reduce=head_summary, **options)
    return aux["seen"]["max_logit"]["max"]


def changed(old: jax.Array, new: jax.Array) -> np.ndarray:
    """Which heads of leaves [D,N,H] or [N,H] have changed, at all or at no entry."""
    other = np.moveaxis(np.asarray(old != new).reshape(-1, *old.shape[-2:]), 1, 0)
    assert (other.all(axis=(1, 2)) | ~other.any(axis=(1, 2))).all()
    return np.asarray(other.any(axis=(1, 2)))


# Of the three groups of two heads: both above the bound, one, none.
LOGITS_N = jnp.array([40.0, 30.0, 10.0, 80.0, 5.0, 20.0])
ABOVE_N = np.array([1, 1, 0, 1, 0, 0], bool)


@pytest.mark.parametrize("options", [{}, {"bias": True}], ids=["plain", "bias"])
def test_clip_bounds_the_logits_of_the_same_batch(options: dict) -> None:
    params = formulas.draw(partial(INIT, **options), 2)
    measure = jit(partial(largest, mask=causal(), rope=rope.plain(H), scale=0.7))
    before_N = np.sort(measure(params))
    tau = float(before_N[2:4].mean())  # three heads above, three below
    before_N = measure(params)
    clipped = control.qk_clip(params, before_N, tau=tau)
    above_N = np.asarray(before_N) > tau
    assert above_N.sum() == 3
    after_N = np.asarray(measure(clipped), np.float64)
    # Two weights rounded, and the products of their rows with x: H + D + 4 roundings.
    np.testing.assert_allclose(after_N[above_N], tau, rtol=(H + D + 4) * EPS)
    # The others: their weights may move between query and key, or stay as they are.
    np.testing.assert_allclose(after_N[~above_N], before_N[~above_N], rtol=(H + D + 4) * EPS)
    assert sorted(clipped) == sorted(params)
    for name in params.keys() - {"wq_DNH", "wk_DKH", "bq_NH", "bk_KH"}:
        assert clipped[name] is params[name]


def test_clip_leaves_heads_within_the_bound_bit_equal() -> None:
    params = formulas.draw(partial(INIT, bias=True), 2)
    made = control.qk_clip(params, LOGITS_N, tau=20.0)
    for name in ("wq_DNH", "bq_NH"):
        np.testing.assert_array_equal(changed(params[name], made[name]), ABOVE_N)
    for name in ("wk_DKH", "bk_KH"):  # of the first group alone both query heads are above
        np.testing.assert_array_equal(changed(params[name], made[name]), [True, False, False])
    # γ: 1/2, 2/3 | 1, 1/4 | 1, 1; the keys of the first group take the root of the larger.
    root = np.sqrt(2 / 3)
    gamma_N = np.array([0.5 / root, 2 / 3 / root, 1, 0.25, 1, 1])
    want = np.asarray(params["wq_DNH"], np.float64) * gamma_N[:, None]
    np.testing.assert_allclose(made["wq_DNH"], want, rtol=4 * EPS)
    want = np.asarray(params["wk_DKH"], np.float64)[:, 0] * root
    np.testing.assert_allclose(made["wk_DKH"][:, 0], want, rtol=4 * EPS)


def test_clip_leaves_a_head_without_keys_alone() -> None:
    params = formulas.draw(INIT, 2)
    made = control.qk_clip(params, LOGITS_N.at[3].set(-np.inf), tau=20.0)
    np.testing.assert_array_equal(changed(params["wq_DNH"], made["wq_DNH"]), [1, 1, 0, 0, 0, 0])


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_clip_does_not_hide_a_head_that_has_diverged(lost: float) -> None:
    made = control.qk_clip(formulas.draw(INIT, 2), LOGITS_N.at[3].set(lost), tau=20.0)
    assert np.isnan(made["wq_DNH"][:, 3]).all()
    assert np.isfinite(made["wq_DNH"][:, :2]).all()


def test_clip_with_a_head_of_keys_for_each_query_head() -> None:
    params = formulas.draw(partial(init_attention, D=D, N=N, H=H), 2)
    made = jit(partial(control.qk_clip, tau=20.0))(params, LOGITS_N)
    root_N = np.sqrt(np.minimum(1.0, 20 / np.asarray(LOGITS_N, np.float64)))
    for name in ("wq_DNH", "wk_DKH"):
        want = np.asarray(params[name], np.float64) * root_N[:, None]
        np.testing.assert_allclose(made[name], want, rtol=4 * EPS)


def test_clip_of_a_stack() -> None:
    init = partial(init_stack, L=L, init=partial(init_block, D=D, attention=INIT))
    params = formulas.draw(init, 2)
    attend = partial(attention, mask=causal(), observe=("max_logit",), reduce=head_summary)
    _, aux = stack(params, X_BTD, attend=attend)
    max_logit_LN = aux["attention"]["seen"]["max_logit"]["max"]
    assert max_logit_LN.shape == (L, N)
    tau = float(jnp.median(max_logit_LN))
    made = control.qk_clip(params["attention"], max_logit_LN, tau=tau)
    for at in range(L):
        layer = jax.tree.map(lambda leaf, at=at: leaf[at], params["attention"])
        want = control.qk_clip(layer, max_logit_LN[at], tau=tau)
        for name, leaf in want.items():
            np.testing.assert_array_equal(made[name][at], leaf, name)
    assert (made["wq_DNH"] != params["attention"]["wq_DNH"]).any()


def test_clip_keeps_the_dtype() -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), formulas.draw(INIT, 2))
    made = control.qk_clip(half, LOGITS_N, tau=20.0)
    assert {leaf.dtype for leaf in made.values()} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(changed(half["wq_DNH"], made["wq_DNH"]), ABOVE_N)


# Penalties.


def test_z_loss_is_the_mean_square() -> None:
    lse = np.array([[3.0, -np.inf], [-1.0, 0.5]], np.float32)
    value, slope = jax.value_and_grad(control.z_loss)(jnp.asarray(lse))
    np.testing.assert_allclose(value, (9 + 1 + 0.25) / 3, rtol=2 * EPS)
    np.testing.assert_allclose(slope, [[2.0, 0.0], [-2 / 3, 1 / 3]], rtol=2 * EPS)
    assert float(control.z_loss(jnp.full(3, -jnp.inf))) == 0.0
    assert np.isnan(control.z_loss(jnp.array([1.0, jnp.nan])))


def test_entropy_floor_is_the_mean_square_of_what_is_missing() -> None:
    entropy = jnp.array([[0.5, 3.0], [1.0, 0.0]])
    value, slope = jax.value_and_grad(partial(control.entropy_floor, floor=1.5))(entropy)
    assert float(value) == (1 + 0 + 0.25 + 2.25) / 4
    np.testing.assert_allclose(slope, [[-0.5, 0.0], [-0.25, -0.75]], rtol=2 * EPS)
    assert np.isnan(control.entropy_floor(entropy.at[0, 0].set(jnp.nan), floor=1.5))


def test_entropy_floor_of_chosen_rows() -> None:
    entropy = jnp.array([[0.5, 3.0], [1.0, jnp.nan]])
    where = jnp.array([[True, True], [True, False]])
    penalty = partial(control.entropy_floor, floor=1.5)
    value, slope = jax.value_and_grad(penalty)(entropy, where=where)
    np.testing.assert_allclose(value, 1.25 / 3, rtol=2 * EPS)
    np.testing.assert_allclose(slope, [[-2 / 3, 0.0], [-1 / 3, 0.0]], rtol=2 * EPS)
    # It broadcasts; of no rows the mean is 0.
    assert float(penalty(entropy, where=jnp.array([True, False]))) == (1 + 0.25) / 2
    assert float(penalty(entropy, where=jnp.zeros((1, 1), bool))) == 0.0


def test_gradients_reach_queries_and_keys() -> None:
    q, k = (random_like(np.zeros((B, T, N, H)), seed) for seed in (3, 4))

    def penalty(q, k, name):
        _, seen = dot_product_attention(q, k, k, mask=causal(), observe=(name,))
        x = seen[name]
        return control.z_loss(x) if name == "lse" else control.entropy_floor(x, floor=2.0)

    for name in ("lse", "entropy"):
        fall = jit(jax.value_and_grad(partial(penalty, name=name), argnums=(0, 1)))
        before, (dq, dk) = fall(q, k)
        for step in ((dq, 0.0), (0.0, dk)):
            after, _ = fall(q - 10 * step[0], k - 10 * step[1])
            assert float(after) < 0.99 * float(before)


# Training: a head has to find the one earlier token that fits best, for which no logit is too
# large. Adam moves every weight by about its rate, so that logits grow with the steps.

STEPS, TAU, FLOOR = 300, 10.0, 0.7
LATE = np.arange(T)[None, :, None] >= 3  # rows that can reach the floor: log 4 > 1.9 · FLOOR


class Run(NamedTuple):
    loss: np.ndarray
    max_logit: np.ndarray
    z: np.ndarray
    entropy: np.ndarray


def clip(params: Any, seen: Any) -> Any:
    return control.qk_clip(params, head_summary(seen)["max_logit"]["max"], tau=TAU)


PENALTIES = {
    "z_loss": lambda seen: 1e-2 * control.z_loss(seen["lse"]),
    "entropy_floor": lambda seen: (
        10.0 * control.entropy_floor(seen["entropy"], floor=FLOOR, where=jnp.asarray(LATE))
    ),
}


@cache
def trained(controlled: str, rate: float, seed: int) -> Run:
    """What each step saw, on one batch, by Adam."""
    rng = np.random.default_rng(seed)
    x_BTD = rng.normal(size=(B, T, D))
    fit = x_BTD @ np.swapaxes(x_BTD @ rng.normal(size=(D, D)), 1, 2)
    best = np.where(np.tri(T, dtype=bool), fit, -np.inf).argmax(axis=-1)
    target_BTD = np.take_along_axis(x_BTD, best[..., None], axis=1)
    init = partial(init_attention, D=D, N=2, K=1, H=3, E=E)
    params = formulas.draw(init, seed, scale=D**-0.5)
    arrays = params, np.float32(x_BTD), np.float32(target_BTD), rate
    return Run(*map(np.asarray, training(controlled)(*arrays)))


@cache
def training(controlled: str) -> Any:
    penalty = PENALTIES.get(controlled, lambda seen: 0.0)

    @jit
    def train(params, x_BTD, target_BTD, rate):
        optimizer = optax.adam(rate)

        def objective(params):
            names = ("max_logit", "lse", "entropy")
            y_BTD, aux = attention(params, x_BTD, mask=causal(), observe=names)
            loss = jnp.mean(jnp.square(y_BTD - target_BTD))
            return loss + penalty(aux["seen"]), (loss, aux["seen"])

        def step(carry, _):
            params, state = carry
            gradient, (loss, seen) = jax.grad(objective, has_aux=True)(params)
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            if controlled == "qk_clip":
                params = clip(params, seen)
            entropy = jnp.min(seen["entropy"], initial=jnp.inf, where=LATE)
            lines = loss, jnp.max(seen["max_logit"]), control.z_loss(seen["lse"]), entropy
            return (params, state), lines

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=STEPS)[1]

    return train


SEEDS = pytest.mark.parametrize("seed", range(3))


@SEEDS
def test_without_clip_logits_explode_and_with_it_they_do_not(seed: int) -> None:
    # At this rate the softmax saturates, and what saturates does not learn.
    without, made = trained("nothing", 0.5, seed), trained("qk_clip", 0.5, seed)
    assert made.loss[0] == without.loss[0]
    assert without.max_logit[50:].min() > 4 * TAU
    # Past the bound by what one step adds.
    assert TAU < made.max_logit[50:].max() < 1.5 * TAU
    assert made.loss[-50:].mean() < 0.6 * without.loss[-50:].mean()


@SEEDS
def test_without_z_loss_normalisers_drift_and_with_it_they_do_not(seed: int) -> None:
    without, made = trained("nothing", 0.1, seed), trained("z_loss", 0.1, seed)
    assert without.z[-1] > 100
    assert without.z[-1] > 1.5 * without.z[100]
    assert made.z[50:].max() < 15
    assert made.loss[-50:].mean() < 0.1 * made.loss[0]


@SEEDS
def test_without_a_floor_entropy_collapses_and_with_it_it_does_not(seed: int) -> None:
    without, made = trained("nothing", 0.1, seed), trained("entropy_floor", 0.1, seed)
    assert without.entropy[100:].max() < 1e-2
    # A penalty gives way a little.
    assert made.entropy[100:].min() > 0.4 * FLOOR
    assert np.median(made.entropy[100:]) > 0.8 * FLOOR
    assert made.loss[-50:].mean() < 0.1 * made.loss[0]
