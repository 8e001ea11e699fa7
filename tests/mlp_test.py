"""MLPs against float64 NumPy; each token is processed on its own, by the same matrices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_attn import count, gated_mlp, init_gated_mlp, init_mlp, mlp
from jax_attn.mlp import ACTIVATIONS
from tests import formulas
from tests.formulas import assert_within_budget, draw, random_like

B, T, D, F = 2, 5, 7, 11
KEY = jax.random.key(0)
X_BTD = random_like(np.zeros((B, T, D)), 1)
PLAIN = draw(partial(init_mlp, D=D, F=F, bias=True), 2)
GATED = draw(partial(init_gated_mlp, D=D, F=F), 3)
JITTED = {mlp: jax.jit(mlp), gated_mlp: jax.jit(gated_mlp)}
LAYERS = [pytest.param(mlp, PLAIN, id="plain"), pytest.param(gated_mlp, GATED, id="gated")]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biases", [(), ("b_in_F",), ("b_out_D",), ("b_in_F", "b_out_D")])
def test_mlp_is_the_formula_with_the_biases_that_are_there(activation, biases) -> None:
    params = {k: v for k, v in PLAIN.items() if k[0] == "w" or k in biases}
    y_BTD = mlp(params, X_BTD, activation=activation)
    assert_within_budget(y_BTD, partial(formulas.mlp, activation=activation), params, X_BTD)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_mlp_is_the_formula(activation) -> None:
    y_BTD = gated_mlp(GATED, X_BTD, activation=activation)
    formula = partial(formulas.gated_mlp, activation=activation)
    assert_within_budget(y_BTD, formula, GATED, X_BTD)


def test_activations_default_to_exact_gelu_and_to_silu() -> None:
    np.testing.assert_array_equal(mlp(PLAIN, X_BTD), mlp(PLAIN, X_BTD, activation="gelu"))
    assert (mlp(PLAIN, X_BTD) != mlp(PLAIN, X_BTD, activation="gelu_tanh")).any()
    np.testing.assert_array_equal(
        gated_mlp(GATED, X_BTD), gated_mlp(GATED, X_BTD, activation="silu")
    )


def test_matrices_do_not_depend_on_the_input(monkeypatch) -> None:
    # C1: with the activation out of the way the layer is one matrix, the same for every input.
    monkeypatch.setitem(ACTIVATIONS, "none", lambda x: x)
    layer = jax.jacobian(lambda x_D: mlp(PLAIN, x_D[None, None], activation="none")[0, 0])
    matrices = np.stack([layer(x_D) for x_D in X_BTD.reshape(-1, D)])
    assert (np.ptp(matrices, axis=0) == 0).all(), "variance across inputs is not exactly 0"

    def product(params, x_BTD):
        del x_BTD
        return (params["w_in_DF"] @ params["w_out_FD"]).T

    assert_within_budget(matrices[0], product, PLAIN, X_BTD)


def test_activation_is_all_that_depends_on_the_input() -> None:
    # y' = W_out^T · diag(activation'(x W_in)) · W_in^T: between the same two matrices a relu can
    # only switch units, so two inputs with the same units on have bit-equal derivatives.
    params = {k: v for k, v in PLAIN.items() if k[0] == "w"}
    layer = jax.jacobian(lambda x_D: mlp(params, x_D[None, None], activation="relu")[0, 0])
    x_D = X_BTD[0, 0]
    np.testing.assert_array_equal(layer(x_D), layer(2 * x_D))
    assert (np.asarray(layer(x_D)) != layer(-x_D)).any()


@pytest.mark.parametrize(("layer", "params"), LAYERS)
@given(seed=st.integers(0, 2**31), kept=st.integers(0, T - 1), poison=st.booleans())
def test_a_token_is_processed_on_its_own(layer, params, seed, kept, poison) -> None:
    layer = JITTED[layer]
    other = np.random.default_rng(seed).standard_normal((B, T, D)).astype(np.float32)
    if poison:
        other[:, ::2] = np.nan
        other[:, 1::2] = np.inf
    other[:, kept] = X_BTD[:, kept]
    made = layer(params, jnp.asarray(other))[:, kept]
    np.testing.assert_array_equal(made, layer(params, X_BTD)[:, kept])
    assert np.isfinite(made).all()


@pytest.mark.parametrize(("layer", "params"), LAYERS)
def test_no_gradient_reaches_another_token(layer, params) -> None:
    jacobian = jax.jacobian(partial(layer, params))(X_BTD)
    for b, t in np.ndindex(B, T):
        own = np.asarray(jacobian[b, t, :, b, t])
        assert (own != 0).all()
        assert np.count_nonzero(jacobian[b, t]) == np.count_nonzero(own)


@pytest.mark.parametrize(("layer", "params"), LAYERS)
def test_transforms_agree(layer, params) -> None:
    formula = formulas.mlp if layer is mlp else formulas.gated_mlp
    assert_within_budget(jax.jit(layer)(params, X_BTD), formula, params, X_BTD)
    # One set of weights for each sequence: vmap over both arguments.
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), params)
    y_BTD = jax.vmap(lambda p, x_TD: layer(p, x_TD[None])[0])(stacked, X_BTD)
    for b in range(B):
        own = jax.tree.map(lambda leaf, b=b: leaf[b], stacked)
        assert_within_budget(y_BTD[b][None], formula, own, X_BTD[b][None])


@pytest.mark.parametrize(("layer", "params"), LAYERS)
def test_dtype_follows_the_arguments(layer, params) -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert layer(half, X_BTD.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert layer(params, X_BTD[:0]).shape == (0, T, D)
    assert layer(params, X_BTD[:, :0]).shape == (B, 0, D)


def test_init_declares_the_leaves() -> None:
    assert {k: v.shape for k, v in PLAIN.items()} == {
        "w_in_DF": (D, F),
        "w_out_FD": (F, D),
        "b_in_F": (F,),
        "b_out_D": (D,),
    }
    without, with_bias = init_mlp(KEY, D, F), init_mlp(KEY, D, F, bias=True)
    assert set(without) == {"w_in_DF", "w_out_FD"}
    for name, leaf in without.items():
        np.testing.assert_array_equal(leaf, with_bias[name])
    assert not with_bias["b_in_F"].any()
    assert not with_bias["b_out_D"].any()
    # A leaf's key depends on its name, so the gated MLP shares two of its leaves with the plain.
    gated = init_gated_mlp(KEY, D, F, dtype=jnp.bfloat16)
    assert set(gated) == {"w_gate_DF", "w_in_DF", "w_out_FD"}
    assert {leaf.dtype for leaf in gated.values()} == {jnp.dtype(jnp.bfloat16)}
    assert (gated["w_gate_DF"] != gated["w_in_DF"]).any()


def test_init_has_the_variance_of_one_over_fan_in() -> None:
    D, F = 61, 211
    for params in (init_mlp(KEY, D, F), init_gated_mlp(KEY, D, F)):
        for name, leaf in params.items():
            fan_in = F if name == "w_out_FD" else D
            # The variance of n normal draws scatters by sqrt(2 / n) of itself: five of that.
            bound = 5 * (2 / leaf.size) ** 0.5
            assert abs(fan_in * float(jnp.var(leaf)) - 1) < bound, name


def test_sizes_of_the_claim() -> None:
    params = jax.eval_shape(partial(init_mlp, D=768, F=3072), KEY)
    assert count(params) == 2 * 768 * 3072
    made = jax.eval_shape(mlp, params, jax.ShapeDtypeStruct((4, 256, 768), jnp.float32))
    assert made.shape == (4, 256, 768)
