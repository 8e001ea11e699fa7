"""The language model against float64 NumPy, its causality, and its loss before training."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_attn import (
    gated_mlp,
    init_attention,
    init_block,
    init_gated_mlp,
    init_language_model,
    init_layer_norm,
    init_mlp,
    init_moe,
    init_static_mixer,
    language_model,
    moe,
)
from tests import formulas
from tests.formulas import assert_within_budget

B, T, D, L, V, F = 2, 7, 6, 3, 23, 11
KEY = jax.random.key(0)
TOKENS_BT = jnp.asarray(np.random.default_rng(1).integers(0, V, (B, T)))
WITH_ATTENTION = partial(
    init_block,
    D=D,
    attention=partial(init_attention, D=D, N=4, K=2, H=5),
    mlp=partial(init_mlp, D=D, F=F, bias=True),
)
WITH_MLP = partial(init_block, D=D, mlp=partial(init_mlp, D=D, F=F))
WITH_MIXER = partial(
    init_block,
    D=D,
    mixer=partial(init_static_mixer, D=D, N=2, T=T),
    mlp=partial(init_gated_mlp, D=D, F=F),
    init_norm=init_layer_norm,
)
WITH_EXPERTS = partial(
    init_block,
    D=D,
    attention=partial(init_attention, D=D, N=2),
    mlp=partial(init_moe, D=D, F=F, X=5),
)
MODELS = {
    "attention": (WITH_ATTENTION, {}, [("attention", formulas.attention), ("mlp", formulas.mlp)]),
    "mixer": (
        WITH_MIXER,
        {"feed": gated_mlp},
        [("mixer", formulas.static_mixer), ("mlp", formulas.gated_mlp)],
    ),
    "experts": (
        WITH_EXPERTS,
        {"feed": moe},
        [("attention", formulas.attention), ("mlp", formulas.moe)],
    ),
}


def draw(layer, **options):
    """A model in which no leaf is 0 or 1 from its initialiser."""
    init = partial(init_language_model, V=V, D=D, L=L, layer=layer, **options)
    return formulas.draw(init, 2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_is_the_formula(model, tied) -> None:
    layer, options, parts = MODELS[model]
    params = draw(layer, T=T + 2 if tied else None, tied=tied)
    logits_BTV, aux = jax.jit(partial(language_model, **options))(params, TOKENS_BT)
    formula = partial(formulas.language_model, parts=parts)
    assert_within_budget(logits_BTV, formula, params, TOKENS_BT)
    if model == "experts":
        assert aux["mlp"]["routing"].load_X.shape == (L, 5)
    else:
        assert aux == {}


def test_the_last_norm_is_there_if_its_leaf_is() -> None:
    params = draw(WITH_ATTENTION)
    del params["norm"]
    logits_BTV, _ = language_model(params, TOKENS_BT)
    formula = partial(formulas.language_model, parts=MODELS["attention"][2])
    assert_within_budget(logits_BTV, formula, params, TOKENS_BT)


def test_init_declares_the_leaves() -> None:
    init = partial(init_language_model, V=V, D=D, L=L, layer=WITH_MLP)
    plain, full = init(KEY), init(KEY, T=T, tied=False)
    assert sorted(plain) == ["embed_VD", "layers", "norm"]
    assert sorted(full) == ["embed_VD", "head_DV", "layers", "norm", "position_TD"]
    assert full["head_DV"].shape == (D, V)
    assert full["position_TD"].shape == (T, D)
    # Optional leaves leave the others bit-equal.
    jax.tree.map(np.testing.assert_array_equal, plain, {k: full[k] for k in plain})
    half = jax.eval_shape(partial(init, dtype=jnp.bfloat16, tied=False), KEY)
    assert half["embed_VD"].dtype == half["head_DV"].dtype == jnp.bfloat16
    assert half["norm"]["scale_D"].dtype == jnp.bfloat16


def test_a_tied_head_gets_both_gradients() -> None:
    params = draw(WITH_MLP)
    free = params | {"head_DV": params["embed_VD"].T}
    tied_BTV, _ = language_model(params, TOKENS_BT)
    free_BTV, _ = language_model(free, TOKENS_BT)
    formula = partial(formulas.language_model, parts=[("mlp", formulas.mlp)])
    assert_within_budget(free_BTV, formula, params, TOKENS_BT)
    assert_within_budget(tied_BTV, formula, params, TOKENS_BT)

    def loss(params):
        return jnp.square(language_model(params, TOKENS_BT)[0]).sum()

    unused = np.setdiff1d(np.arange(V), TOKENS_BT)
    assert unused.size
    gradient = jax.jit(jax.grad(loss))
    assert not gradient(free)["embed_VD"][unused].any()
    assert gradient(params)["embed_VD"][unused].all()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32"])
@pytest.mark.parametrize("numpy", [True, False])
def test_any_integer_type_names_tokens(dtype, numpy) -> None:
    V = 251  # more than int8 holds
    params = formulas.draw(partial(init_language_model, V=V, D=D, L=1, layer=WITH_MLP))
    tokens: Any = (np if numpy else jnp).asarray([[0, 5, 127]]).astype(dtype)
    made, _ = language_model(params, tokens)
    np.testing.assert_array_equal(made, language_model(params, jnp.array([[0, 5, 127]]))[0])


@pytest.mark.few(3)
@pytest.mark.parametrize("unknown", [V, V + 1, 2**31 - 1, -1, -V, -V - 1, -(2**31)])
def test_an_unknown_token_gives_nan_from_its_position_on(unknown) -> None:
    params = draw(WITH_ATTENTION)
    place = 4
    logits_BTV, _ = language_model(params, TOKENS_BT.at[0, place].set(unknown))
    clean_BTV, _ = language_model(params, TOKENS_BT)
    assert np.isnan(logits_BTV[0, place:]).all()
    np.testing.assert_array_equal(logits_BTV[0, :place], clean_BTV[0, :place])
    np.testing.assert_array_equal(logits_BTV[1], clean_BTV[1])


def test_learned_positions_are_added_at_the_offset() -> None:
    params = draw(WITH_MLP, T=T + 2)
    moved = params | {"position_TD": params["position_TD"][2:]}
    np.testing.assert_array_equal(
        language_model(params, TOKENS_BT, q_offset=2)[0], language_model(moved, TOKENS_BT)[0]
    )
    with pytest.raises(ValueError, match=f"ends at T={T + 3} but position_TD has T={T + 2}"):
        language_model(params, TOKENS_BT, q_offset=3)
    # A traced offset is known when it runs: positions that do not exist give NaN.
    traced = jax.jit(lambda offset: language_model(params, TOKENS_BT, q_offset=offset)[0])
    assert np.isfinite(traced(0)).all()
    assert np.isnan(traced(3)[:, -1]).all()
    assert np.isnan(traced(-1)[:, 0]).all()


@pytest.mark.parametrize("model", MODELS)
def test_no_gradient_reaches_later_tokens(model) -> None:
    layer, options, _ = MODELS[model]
    # A row of the embedding for each position makes a token's gradient that of its embedding.
    params = draw(layer, tied=False)
    tokens_BT = jnp.arange(T)[None]
    weights_V = np.random.default_rng(3).standard_normal(V).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient(embed_VD, t):
        logits_BTV, _ = language_model(params | {"embed_VD": embed_VD}, tokens_BT, **options)
        return logits_BTV[0, t] @ weights_V

    rows = [np.abs(gradient(params["embed_VD"], t))[:T].sum(axis=1) for t in range(T)]
    assert ((np.stack(rows) > 0) == np.tri(T, dtype=bool)).all()


def test_loss_before_training_is_that_of_a_guess() -> None:
    # norm() gives the head inputs of length sqrt(D), and head_DV has variance 1 / D: a logit is
    # N(0, 1), independent for different tokens. By Jensen ln V <= E[lse] <= ln V + 1/2, and the
    # mean of n targets' logits, all different, is N(0, 1/n): five of that to either side.
    D, V, B, T = 61, 1009, 5, 101
    n = B * T
    layer = partial(
        init_block,
        D=D,
        attention=partial(init_attention, D=D, N=1),
        mlp=partial(init_mlp, D=D, F=2 * D),
    )
    order = np.random.default_rng(3).permutation(V)
    tokens_BT, targets_BT = order[:n].reshape(B, T), order[-n:].reshape(B, T)
    drawn = init_language_model(KEY, V=V, D=D, L=2, layer=layer, tied=False)
    for tied in (True, False):
        params = {name: leaf for name, leaf in drawn.items() if name != "head_DV" or not tied}
        logits_BTV = np.asarray(language_model(params, jnp.asarray(tokens_BT))[0], np.float64)
        lse_BT = np.log(np.exp(logits_BTV).sum(axis=-1))
        loss = (lse_BT - np.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]).mean()
        # A tied head sees the token it was given in its own residual stream, and only that one
        # logit is not N(0, 1): it adds to the sum what it is.
        own_BT = np.take_along_axis(logits_BTV, tokens_BT[..., None], -1)[..., 0]
        upper = np.log(V * np.exp(0.5) + (np.exp(own_BT) if tied else 0)).mean()
        assert np.log(V) - 5 / n**0.5 <= loss <= upper + 5 / n**0.5
        assert upper < np.log(V) + 1


def test_dtypes() -> None:
    params = draw(WITH_ATTENTION, T=T)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    logits_BTV, _ = language_model(half, TOKENS_BT)
    assert logits_BTV.dtype == jnp.float32
    assert np.isfinite(logits_BTV).all()
    with pytest.raises(ValueError, match="x_BTD is bfloat16 but a block returns float32"):
        language_model(params | {k: half[k] for k in ("embed_VD", "position_TD")}, TOKENS_BT)


def test_dropout_and_remat_are_handed_to_the_stack() -> None:
    params = draw(WITH_ATTENTION)

    @jax.jit
    def run(key):
        return language_model(params, TOKENS_BT, dropout_rate=0.5, dropout_key=key)[0]

    first, second = (np.asarray(run(jax.random.key(seed))) for seed in (0, 1))
    np.testing.assert_array_equal(first, run(KEY))
    assert (first != second).any()
    assert (first != language_model(params, TOKENS_BT)[0]).any()
    for remat in (None, "full", "dots"):
        model = partial(language_model, remat=remat)
        text = str(jax.make_jaxpr(model)(params, TOKENS_BT))
        assert bool(re.search(r"\b(remat|checkpoint)", text)) == (remat is not None)


def test_parts_can_be_any_functions() -> None:
    params = draw(WITH_ATTENTION)
    same, _ = language_model(params, TOKENS_BT, attend=lambda p, x_BTD: 0 * x_BTD)
    without = params | {"layers": {k: v for k, v in params["layers"].items() if k[:3] == "mlp"}}
    np.testing.assert_array_equal(same, language_model(without, TOKENS_BT)[0])
