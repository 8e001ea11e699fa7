"""The mixture of experts against a float64 loop over tokens and experts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_attn import Routing, init_moe, moe
from jax_attn.mlp import activate
from tests import formulas
from tests.formulas import assert_near, assert_within_budget, cast, draw, random_like

B, T, D, F, X = 2, 11, 7, 13, 5
KEY = jax.random.key(0)
X_BTD = random_like(np.zeros((B, T, D)), 1)
GATED = draw(partial(init_moe, D=D, F=F, X=X), 2, scale=0.5)
PLAIN = {name: leaf for name, leaf in GATED.items() if name != "w_gate_XDF"}
KINDS = [pytest.param(GATED, id="gated"), pytest.param(PLAIN, id="plain")]


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("k", [1, 2, X])
@pytest.mark.parametrize("params", KINDS)
def test_is_the_loop_over_tokens_and_experts(params, k, renormalize) -> None:
    y_BTD, aux = moe(params, X_BTD, k=k, renormalize=renormalize)
    formula = partial(formulas.moe, k=k, renormalize=renormalize)
    assert_within_budget(y_BTD, formula, params, X_BTD)
    assert list(aux) == ["routing"]
    assert isinstance(aux["routing"], Routing)


def test_activation_is_the_one_named() -> None:
    for params in (GATED, PLAIN):
        y_BTD, _ = moe(params, X_BTD, activation="relu")
        assert_within_budget(y_BTD, partial(formulas.moe, activation="relu"), params, X_BTD)


def test_all_experts_renormalized_change_nothing() -> None:
    exact = moe(GATED, X_BTD, k=X)[0]
    again = moe(GATED, X_BTD, k=X, renormalize=True)[0]
    formula = partial(formulas.moe, k=X)
    assert_within_budget(again, formula, GATED, X_BTD)
    assert_within_budget(exact, formula, GATED, X_BTD)


@pytest.mark.parametrize("expert", range(X))
def test_no_token_is_dropped_when_all_want_one_expert(expert) -> None:
    x_BTD = jnp.abs(X_BTD) + 0.5
    router_DX = jnp.zeros((D, X)).at[:, expert].set(31.0)
    params = GATED | {"router_DX": router_DX}
    y_BTD, aux = moe(params, x_BTD, k=1)
    assert_within_budget(y_BTD, partial(formulas.moe, k=1), params, x_BTD)
    assert (jnp.abs(y_BTD).sum(axis=-1) > 0).all()
    np.testing.assert_array_equal(aux["routing"].load_X, jnp.zeros(X).at[expert].set(1.0))


@pytest.mark.parametrize("k", [1, 2, X])
def test_of_equal_experts_the_first_are_taken(k) -> None:
    params = GATED | {"router_DX": jnp.zeros((D, X))}
    y_BTD, aux = moe(params, X_BTD, k=k)
    assert_within_budget(y_BTD, partial(formulas.moe, k=k), params, X_BTD)
    load = [1 / k] * k + [0.0] * (X - k)
    eps = float(np.finfo(np.float32).eps)  # one division
    np.testing.assert_allclose(aux["routing"].load_X, load, rtol=eps)


def routing_formula(router, x, k, field):
    """Of many batches [A,B,T,D], so that the error of a number is not that of a single draw."""
    logits = x.reshape(len(x), -1, D) @ router
    p = formulas.softmax(logits)
    chosen = np.argsort(-p, axis=-1, kind="stable")[..., :k]
    load = (chosen[..., None] == np.arange(X)).mean(axis=(1, 2)).astype(x.dtype)
    top = logits.max(axis=-1)
    z = np.square(np.log(np.exp(logits - top[..., None]).sum(axis=-1)) + top).mean(axis=-1)
    balance = (load * p.mean(axis=1)).sum(axis=-1) * X
    return {"load_balance": balance, "router_z": z, "load_X": load}[field]


def assert_routing(params, dtype, k) -> None:
    x_ABTD = random_like(np.zeros((101, B, T, D)), 4).astype(dtype)
    made = jax.jit(jax.vmap(lambda x_BTD: moe(params, x_BTD, k=k)[1]["routing"]))(x_ABTD)
    for field in Routing._fields:
        formula = partial(routing_formula, k=k, field=field)
        assert_within_budget(getattr(made, field), formula, params["router_DX"], x_ABTD)
    # Each share is one rounding off, and so is each of X - 1 sums.
    assert (np.abs(made.load_X.sum(axis=-1) - 1) <= X * np.finfo(np.float32).eps).all()


@pytest.mark.parametrize("k", [1, 3, X])
def test_routing_is_the_formula(k) -> None:
    assert_routing(GATED, jnp.float32, k)


def test_routing_of_routers_made_by_hand() -> None:
    # Token i wants expert i with logit s, X tokens: perfectly balanced.
    params = draw(partial(init_moe, D=X, F=F, X=X))
    s = 3.0
    params["router_DX"] = s * jnp.eye(X)
    routing = moe(params, jnp.eye(X)[None], k=1)[1]["routing"]
    z = np.log(np.exp(s) + X - 1) ** 2
    # No more than 4 roundings for each of the X terms of a sum of positive numbers.
    rtol = 4 * X * float(np.finfo(np.float32).eps)
    np.testing.assert_allclose(routing.load_X, 1 / X, rtol=rtol)
    np.testing.assert_allclose(routing.load_balance, 1.0, rtol=rtol)
    np.testing.assert_allclose(routing.router_z, z, rtol=rtol)
    # All tokens want one expert and are sure of it: the penalty is X, its largest value.
    params["router_DX"] = jnp.zeros((X, X)).at[:, 2].set(200.0)
    routing = moe(params, jnp.eye(X)[None], k=1)[1]["routing"]
    assert float(routing.load_balance) == X
    assert float(routing.router_z) == 200.0**2


def dense_moe(params, x_BTD, k, renormalize):
    """Every expert on every token, weighted by 0 where it is not chosen: for derivatives."""
    p_BTX = jax.nn.softmax(jnp.einsum("BTD,DX->BTX", x_BTD, params["router_DX"]))
    least = jnp.sort(p_BTX, axis=-1)[..., X - k, None]
    p_BTX = jnp.where(p_BTX >= least, p_BTX, 0)
    if renormalize:
        p_BTX = p_BTX / p_BTX.sum(axis=-1, keepdims=True)
    h_BTXF = jnp.einsum("BTD,XDF->BTXF", x_BTD, params["w_in_XDF"])
    if "w_gate_XDF" in params:
        gate_BTXF = jnp.einsum("BTD,XDF->BTXF", x_BTD, params["w_gate_XDF"])
        h_BTXF = activate("silu", gate_BTXF) * h_BTXF
    else:
        h_BTXF = activate("silu", h_BTXF)
    return jnp.einsum("BTX,BTXF,XFD->BTD", p_BTX, h_BTXF, params["w_out_XFD"])


def loss(layer, params, x_BTD, c_BTD):
    return (layer(params, x_BTD) * c_BTD).sum()


CASES = [(GATED, 1, False), (GATED, 2, True), (PLAIN, 2, False), (PLAIN, X, True)]


@pytest.mark.parametrize(("params", "k", "renormalize"), CASES)
def test_gradients_of_all_leaves(params, k, renormalize) -> None:
    arguments = (params, X_BTD, random_like(X_BTD, 5))

    def gradient(layer, *arguments):
        return jax.jit(jax.grad(partial(loss, layer), argnums=(0, 1)))(*arguments)

    formula = partial(dense_moe, k=k, renormalize=renormalize)
    made = gradient(lambda p, x: moe(p, x, k=k, renormalize=renormalize)[0], *arguments)
    plain = gradient(formula, *arguments)
    with jax.enable_x64(True):
        exact = gradient(formula, *cast(arguments, np.float64))
    assert {x.dtype for x in jax.tree.leaves(exact)} == {np.dtype(np.float64)}
    jax.tree.map(assert_near, made, exact, plain)


def test_router_learns_from_one_expert_unless_renormalized() -> None:
    # One token: its probability p is the only weight. Renormalised the weight is p / p, whose
    # derivative g/p - g·p/p² is 0 but for three roundings; g is what p itself would receive.
    x_BTD, eps = X_BTD[:1, :1], np.finfo(np.float32).eps

    def loss(router_DX, renormalize):
        params = GATED | {"router_DX": router_DX}
        return moe(params, x_BTD, k=1, renormalize=renormalize)[0].sum()

    router_DX = GATED["router_DX"]
    learned = np.abs(jax.grad(loss)(router_DX, False))
    p = float(jax.nn.softmax(x_BTD[0, 0] @ router_DX).max())
    assert (learned > 0).all()
    assert (np.abs(jax.grad(loss)(router_DX, True)) <= 4 * eps / p * learned).all()


def test_routing_losses_reach_the_router_alone() -> None:
    def loss(params, field):
        return getattr(moe(params, X_BTD)[1]["routing"], field)

    for field in ("load_balance", "router_z"):
        gradient = jax.jit(jax.grad(partial(loss, field=field)))(GATED)
        assert (gradient.pop("router_DX") != 0).all(), field
        assert not any(leaf.any() for leaf in gradient.values()), field


def test_order_of_tokens_does_not_matter() -> None:
    order = np.random.default_rng(7).permutation(T)
    y_BTD, aux = moe(GATED, X_BTD[:, order])
    formula = formulas.moe
    assert_within_budget(y_BTD[:, np.argsort(order)], formula, GATED, X_BTD)
    np.testing.assert_array_equal(aux["routing"].load_X, moe(GATED, X_BTD)[1]["routing"].load_X)


def test_a_poisoned_token_stays_alone() -> None:
    y_BTD, _ = moe(GATED, X_BTD.at[0, 3].set(jnp.nan), k=2)
    assert np.isnan(y_BTD[0, 3]).all()
    clean = np.ones((B, T), bool)
    clean[0, 3] = False
    assert_within_budget(
        np.asarray(y_BTD)[clean], lambda p, x: formulas.moe(p, x)[clean], GATED, X_BTD
    )


def test_jit_and_vmap_agree() -> None:
    y_BTD, aux = jax.jit(moe)(GATED, X_BTD)
    assert_within_budget(y_BTD, formulas.moe, GATED, X_BTD)
    # The same weights for each sequence, as in per-example gradients, and one set for each.
    y_BTD, aux = jax.vmap(lambda x_TD: moe(GATED, x_TD[None]))(X_BTD)
    assert aux["routing"].load_X.shape == (B, X)
    assert_within_budget(y_BTD[:, 0], formulas.moe, GATED, X_BTD)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), GATED, random_like(GATED, 3))
    y_BTD, _ = jax.vmap(lambda p, x_TD: moe(p, x_TD[None]))(stacked, X_BTD)
    for b in range(B):
        own = jax.tree.map(lambda leaf, b=b: leaf[b], stacked)
        assert_within_budget(y_BTD[b], formulas.moe, own, X_BTD[b][None])


def test_gradients_of_single_examples() -> None:
    arguments = (GATED, X_BTD[:, None], random_like(X_BTD[:, None], 5))

    def single(layer, *arguments):
        gradient = jax.grad(partial(loss, layer))
        return jax.jit(jax.vmap(gradient, in_axes=(None, 0, 0)))(*arguments)

    formula = partial(dense_moe, k=2, renormalize=False)
    made = single(lambda p, x: moe(p, x)[0], *arguments)
    plain = single(formula, *arguments)
    with jax.enable_x64(True):
        exact = single(formula, *cast(arguments, np.float64))
    jax.tree.map(assert_near, made, exact, plain)


def test_bfloat16_runs_with_a_wide_router() -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), GATED)
    x_BTD = X_BTD.astype(jnp.bfloat16)
    y_BTD, aux = moe(half, x_BTD)
    assert y_BTD.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(y_BTD, np.float32)).all()
    assert {leaf.dtype for leaf in aux["routing"]} == {jnp.dtype(jnp.float32)}
    assert_routing(half, jnp.bfloat16, 2)
    # A float32 router beside experts in bfloat16 leaves the stream in bfloat16.
    assert moe(half | {"router_DX": GATED["router_DX"]}, x_BTD)[0].dtype == jnp.bfloat16


def test_init_declares_the_leaves() -> None:
    shapes = {"router_DX": (D, X), "w_in_XDF": (X, D, F), "w_out_XFD": (X, F, D)}
    plain, gated = init_moe(KEY, D, F, X, gated=False), init_moe(KEY, D, F, X)
    assert {k: v.shape for k, v in plain.items()} == shapes
    assert {k: v.shape for k, v in gated.items()} == shapes | {"w_gate_XDF": (X, D, F)}
    for name, leaf in plain.items():
        np.testing.assert_array_equal(leaf, gated[name])
    assert (gated["w_in_XDF"][0] != gated["w_in_XDF"][1]).all(), "experts start alike"
    for name, leaf in gated.items():
        fan_in = F if name == "w_out_XFD" else D
        # The variance of n normal draws scatters by sqrt(2 / n) of itself: five of that.
        assert abs(fan_in * float(jnp.var(leaf)) - 1) < 5 * (2 / leaf.size) ** 0.5, name


@pytest.mark.xfail(
    raises=NotImplementedError, reason="a Jacobian batches one argument of jax.lax.ragged_dot"
)
def test_jacobian() -> None:
    jax.jacobian(lambda x_BTD: moe(GATED, x_BTD)[0])(X_BTD)
