"""Mistakes that were made once: NaN that leaked, values that compared wrongly, silent paths."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_attn import (
    attention,
    causal,
    init_attention,
    init_block,
    init_mlp,
    init_moe,
    init_static_mixer,
    init_token_mlp,
    moe,
    rope,
    sample,
    segments,
    static_mixer,
    token_mlp,
    train,
    window,
)
from jax_attn.modules import Attention, LanguageModel

KEY = jax.random.key(0)


def any_kind(x: Any) -> Any:
    return x


X_BTD = jax.random.normal(KEY, (2, 5, 6))


@pytest.mark.long
def test_static_mixers_keep_nan_from_earlier_tokens() -> None:
    mixer = partial(static_mixer, init_static_mixer(KEY, 6, 2, T=5), mask=causal())
    tokens = partial(token_mlp, init_token_mlp(KEY, 5, 10), causal=True)
    for mix in (mixer, tokens):
        clean, junk = mix(X_BTD), mix(X_BTD.at[0, 3, 1].set(jnp.nan))
        np.testing.assert_array_equal(junk[0, :3], clean[0, :3])
        np.testing.assert_array_equal(junk[1], clean[1])
        assert np.isnan(junk[0, 3:]).all()
        gradient = jax.grad(lambda x, mix=mix: mix(x)[0, :3].sum())(X_BTD.at[0, 3, 1].set(jnp.nan))
        assert np.isfinite(gradient).all()


def test_masks_and_ropes_compare_by_value() -> None:
    assert causal() == causal()
    assert hash(causal() & window(3)) == hash(causal() & window(3))
    assert causal() & window(3) != causal() & window(5)
    ids = jnp.array([[0, 1]])
    assert segments(ids) == segments(ids)
    assert segments(ids) != segments(ids + 1)
    assert rope.plain(4) == rope.plain(4)
    assert rope.plain(4) != rope.linear(4, factor=2.0)


def test_a_shell_is_a_static_argument_that_compiles_once() -> None:
    traced = []

    @partial(jax.jit, static_argnums=0)
    def run(shell, variables, x_BTD):
        traced.append(shell)
        return shell.apply(variables, x_BTD)

    def shell():
        return Attention(N=3, rope=rope.plain(2), mask=causal())

    variables = shell().init(KEY, X_BTD)
    for _ in range(3):
        run(shell(), variables, X_BTD)
    assert len(traced) == 1


def test_numpy_scalars_are_numbers() -> None:
    D, N, rate = (any_kind(x) for x in (np.int64(6), np.int64(3), np.float32(0.5)))
    params = init_attention(KEY, D, N)
    assert params["wq_DNH"].shape == (6, 3, 2)
    y_BTD = attention(params, X_BTD, dropout_rate=rate, dropout_key=KEY)
    assert y_BTD.shape == X_BTD.shape


def test_a_temperature_too_small_for_float32_takes_the_most_probable() -> None:
    logits_BV = jnp.array([[0.0, 2.0, 1.0]])
    for temperature in (0.0, 1e-40, 1e-37, 1e-30):
        assert sample(KEY, logits_BV, temperature=temperature).tolist() == [1]


def test_an_offset_before_the_cache_is_nan() -> None:
    params = init_attention(KEY, 6, 3)
    cache = {name: jnp.zeros((2, 7, 3, 2)) for name in ("k_BSKH", "v_BSKE")}
    attend = jax.jit(lambda at: attention(params, X_BTD, cache=cache, q_offset=at)[0])
    assert np.isnan(attend(-2)).all()
    assert np.isnan(attend(3)).all()
    assert np.isfinite(attend(2)).all()


def test_no_tokens_give_no_nan() -> None:
    y_BTD, aux = moe(init_moe(KEY, 6, 4, 3), X_BTD[:0])
    assert y_BTD.shape == (0, 5, 6)
    assert np.isfinite(np.concatenate([np.ravel(leaf) for leaf in aux["routing"]])).all()


def test_a_negative_target_is_no_class() -> None:
    loss = train.next_token_loss(jnp.zeros((1, 2, 3)), jnp.array([[0, -1]]))
    assert np.isnan(loss)


@pytest.mark.long
def test_attention_dropout_reaches_the_shells() -> None:
    layer = partial(
        init_block,
        D=6,
        attention=partial(init_attention, D=6, N=3),
        mlp=partial(init_mlp, D=6, F=5),
    )
    attend = partial(attention, mask=causal(), dropout_rate=0.5)
    shell = LanguageModel(V=11, D=6, L=2, layer=layer, attend=attend)
    tokens_BT = jnp.array([[1, 2, 3, 4]])
    variables = shell.init({"params": KEY, "dropout": KEY}, tokens_BT, deterministic=False)
    seen = [
        shell.apply(variables, tokens_BT, deterministic=False, rngs={"dropout": jax.random.key(s)})
        for s in (1, 1, 2)
    ]
    np.testing.assert_array_equal(seen[0][0], seen[1][0])
    assert (seen[0][0] != seen[2][0]).any()
