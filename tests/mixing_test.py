"""Static mixers against float64 NumPy; their matrix is the same for every input."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_attn import (
    causal,
    init_static_mixer,
    init_token_mlp,
    static_mixer,
    static_weights,
    token_mlp,
    window,
)
from tests import formulas
from tests.formulas import assert_within_budget, draw, random_like

B, T, D, N, E = 2, 5, 11, 3, 7
F = 3 * T  # a causal token MLP needs a multiple of T
KEY = jax.random.key(0)
X_BTD = random_like(np.zeros((B, T, D)), 1)
LEARNED = draw(partial(init_static_mixer, D=D, N=N, T=T, E=E))
BARE = {name: leaf for name, leaf in LEARNED.items() if name != "logits_NTS"}
FIXED_NTS = random_like(LEARNED["logits_NTS"], 2, scale=3.0)
TOKENS = draw(partial(init_token_mlp, T=T, F=F))
MASKS = [pytest.param(None, False, id="full"), pytest.param(causal(), True, id="causal")]


@pytest.mark.parametrize("length", [1, 3, T])
@pytest.mark.parametrize(("mask", "is_causal"), MASKS)
def test_learned_fixed_and_uniform_are_the_formula(mask, is_causal, length) -> None:
    x_BTD = X_BTD[:, :length]
    formula = partial(formulas.static_mixer, causal=is_causal)
    learned = static_mixer(LEARNED, x_BTD, mask=mask)
    assert_within_budget(learned, formula, LEARNED, x_BTD)
    fixed = static_mixer(BARE, x_BTD, mask=mask, logits_NTS=FIXED_NTS)
    assert_within_budget(fixed, formula, BARE, x_BTD, FIXED_NTS)
    assert_within_budget(static_mixer(BARE, x_BTD, mask=mask), formula, BARE, x_BTD)


@pytest.mark.parametrize("mask", [None, causal(), window(1), causal() & window(2)])
def test_rows_sum_to_one_and_respect_the_mask(mask) -> None:
    for params, logits_NTS in ((LEARNED, None), (BARE, FIXED_NTS), (BARE, None)):
        weights = np.asarray(static_weights(params, T, mask=mask, logits_NTS=logits_NTS))
        assert weights.shape == (N, T, T)
        assert (weights >= 0).all()
        # T divisions and T - 1 sums of positive numbers that add up to 1, half an eps each.
        assert (np.abs(weights.sum(axis=-1) - 1) <= T * np.finfo(np.float32).eps).all()
        allowed = np.ones((T, T)) if mask is None else mask.materialize(T, T)[0, 0]
        assert ((weights > 0) == np.asarray(allowed, bool)).all()


def test_uniform_weights_are_one_over_the_allowed() -> None:
    weights = static_weights(BARE, T, mask=causal())
    expected = np.tri(T, dtype=np.float32) / np.arange(1, T + 1, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(weights, np.broadcast_to(expected, (N, T, T)))


def test_a_row_without_anything_allowed_is_zero() -> None:
    mask = ~causal() & window(1)  # the next token only: the last has none
    assert not static_weights(LEARNED, T, mask=mask)[:, -1].any()
    assert not static_mixer(LEARNED, X_BTD, mask=mask)[:, -1].any()


@pytest.mark.parametrize("mask", [None, causal()])
def test_the_matrix_is_the_same_for_every_input(mask) -> None:
    # C3: the derivative of the output with respect to the input is the mixing matrix, and has no
    # variance across inputs.
    matrix = jax.jit(jax.jacobian(partial(static_mixer, LEARNED, mask=mask)))
    first, second = matrix(X_BTD[:1]), matrix(random_like(X_BTD[:1], 3, scale=10.0))
    assert first.any()
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(("params", "logits_NTS"), [(LEARNED, None), (BARE, FIXED_NTS)])
def test_causal_mixing_has_no_gradient_to_later_tokens(params, logits_NTS) -> None:
    layer = partial(static_mixer, params, mask=causal(), logits_NTS=logits_NTS)
    jacobian = np.asarray(jax.jit(jax.jacobian(layer))(X_BTD[:1]))[0, :, :, 0]
    reached = np.abs(jacobian).sum(axis=(1, 3))
    assert ((reached > 0) == np.tri(T, dtype=bool)).all()


def test_gradient_reaches_the_learned_logits() -> None:
    gradient = jax.grad(lambda p: static_mixer(p, X_BTD, mask=causal())[:, :3].sum())(LEARNED)
    reached = np.asarray(gradient["logits_NTS"]) != 0
    expected = np.tri(T, dtype=bool)
    expected[0] = expected[3:] = False  # row 0 is one key, always 1; later rows are unused
    assert (reached == expected).all()
    assert gradient["wv_DNE"].any()
    assert gradient["wo_NED"].any()


def test_mixer_transforms_and_dtypes() -> None:
    mixer = partial(static_mixer, mask=causal())
    assert_within_budget(jax.jit(mixer)(LEARNED, X_BTD), formulas.static_mixer, LEARNED, X_BTD)
    y_BTD = jax.vmap(lambda x_TD: mixer(LEARNED, x_TD[None])[0])(X_BTD)
    assert_within_budget(y_BTD, formulas.static_mixer, LEARNED, X_BTD)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), LEARNED)
    assert mixer(half, X_BTD.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert static_weights(half, T).dtype == jnp.float32
    # Wide logits do not widen the stream.
    narrow = half | {"logits_NTS": LEARNED["logits_NTS"]}
    assert mixer(narrow, X_BTD.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_longer_inputs_and_two_matrices_are_refused() -> None:
    longer_BTD = jnp.ones((B, T + 1, D))
    with pytest.raises(ValueError, match=r"T=6 but logits_NTS has T=5, S=5"):
        static_mixer(LEARNED, longer_BTD)
    with pytest.raises(ValueError, match=r"T=6 but logits_NTS has T=5, S=5"):
        static_mixer(BARE, longer_BTD, logits_NTS=FIXED_NTS)
    with pytest.raises(ValueError, match="give one"):
        static_mixer(LEARNED, X_BTD, logits_NTS=FIXED_NTS)
    assert static_mixer(BARE, longer_BTD).shape == longer_BTD.shape


def test_init_declares_the_leaves() -> None:
    shapes = {"wv_DNE": (D, N, E), "wo_NED": (N, E, D)}
    bare, learned = init_static_mixer(KEY, D, N, E=E), init_static_mixer(KEY, D, N, T=T, E=E)
    assert {k: v.shape for k, v in bare.items()} == shapes
    assert {k: v.shape for k, v in learned.items()} == shapes | {"logits_NTS": (N, T, T)}
    for name, leaf in bare.items():
        np.testing.assert_array_equal(leaf, learned[name])
    narrow = jax.eval_shape(partial(init_static_mixer, D=6, N=2), KEY)
    assert narrow["wv_DNE"].shape == (6, 2, 3)
    assert {k: v.shape for k, v in TOKENS.items()} == {"w_in_SF": (T, F), "w_out_FT": (F, T)}


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_token_mlp_is_the_formula(is_causal, activation) -> None:
    options = {"causal": is_causal, "activation": activation}
    formula = partial(formulas.token_mlp, **options)
    assert_within_budget(token_mlp(TOKENS, X_BTD, **options), formula, TOKENS, X_BTD)
    made = jax.jit(partial(token_mlp, **options))(TOKENS, X_BTD)
    assert_within_budget(made, formula, TOKENS, X_BTD)


@pytest.mark.parametrize("width", [1, 3])
def test_causal_token_mlp_has_no_gradient_to_later_tokens(width) -> None:
    params = draw(partial(init_token_mlp, T=T, F=width * T), 4)
    layer = partial(token_mlp, params, causal=True, activation="silu")
    jacobian = np.asarray(jax.jit(jax.jacobian(layer))(X_BTD[:1]))[0, :, :, 0]
    reached = np.abs(jacobian).sum(axis=(1, 3))
    assert ((reached > 0) == np.tri(T, dtype=bool)).all()
    # Channels never mix.
    assert not (np.abs(jacobian).sum(axis=(0, 2)) * ~np.eye(D, dtype=bool)).any()


@pytest.mark.parametrize("length", range(1, T))
def test_causal_token_mlp_of_a_prefix_is_the_prefix(length) -> None:
    made = token_mlp(TOKENS, X_BTD[:, :length], causal=True)

    def formula(params, x_BTD):
        return formulas.token_mlp(params, x_BTD, causal=True)[:, :length]

    assert_within_budget(made, formula, TOKENS, X_BTD)
    with pytest.raises(ValueError, match=f"x_BTD has T={length} but w_in_SF has S={T}"):
        token_mlp(TOKENS, X_BTD[:, :length])


def test_token_mlp_refuses_what_would_not_be_causal() -> None:
    params = draw(partial(init_token_mlp, T=T, F=F + 1))
    with pytest.raises(ValueError, match="no multiple of T=5"):
        token_mlp(params, X_BTD, causal=True)
    assert token_mlp(params, X_BTD).shape == X_BTD.shape
    with pytest.raises(ValueError, match="x_BTD has T=6"):
        token_mlp(TOKENS, jnp.ones((B, T + 1, D)), causal=True)
