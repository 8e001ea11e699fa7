"""Residual blocks: which parts run, how they are normed, and what reaches what."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_attn import (
    attention,
    block,
    causal,
    gated_mlp,
    init_attention,
    init_block,
    init_gated_mlp,
    init_layer_norm,
    init_mlp,
    init_moe,
    init_static_mixer,
    moe,
)
from jax_attn.language_model import causal_attention, causal_mixer
from tests import formulas
from tests.formulas import assert_within_budget, random_like

B, T, D, F = 2, 7, 6, 11
KEY = jax.random.key(0)
X_BTD = random_like(np.zeros((B, T, D)), 1)
INITS: dict[str, Any] = {
    "attention": partial(init_attention, D=D, N=2),
    "mixer": partial(init_static_mixer, D=D, N=3, T=T),
    "mlp": partial(init_mlp, D=D, F=F, bias=True),
}
FORMULAS = [
    ("attention", formulas.attention),
    ("mixer", formulas.static_mixer),
    ("mlp", formulas.mlp),
]
run = partial(block, attend=causal_attention, mix=causal_mixer)
SUBSETS = [
    ["attention"],
    ["mlp"],
    ["mixer"],
    ["attention", "mlp"],
    ["mixer", "mlp"],
    ["attention", "mixer", "mlp"],
]


def draw(names, **options):
    """A block in which no leaf is 0 or 1 from its initialiser."""
    inits = {name: INITS[name] for name in names}
    return formulas.draw(partial(init_block, D=D, **inits, **options), 2)


def rename(params, old, new):
    """Move the norms of a block: `old` and `new` end the names of their leaves."""
    return {
        k.removesuffix(old) + new if k.endswith("_norm") else k: v
        for k, v in params.items()
        if new or not k.endswith("_norm")
    }


@pytest.mark.parametrize("where", ["_norm", "_post_norm", ""])
@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_the_parts_that_are_there_run(names, where) -> None:
    params = draw(names)
    assert list(params) == [k for name in names for k in (name, f"{name}_norm")]
    params = rename(params, "_norm", where)
    x_BTD, aux = run(params, X_BTD)
    parts = [(name, formula) for name, formula in FORMULAS if name in names]
    assert_within_budget(x_BTD, partial(formulas.block, parts=parts), params, X_BTD)
    assert aux == {}


def test_norm_before_and_after() -> None:
    params = draw(["attention", "mlp"], init_norm=init_layer_norm)
    params["mlp_post_norm"] = random_like(params["mlp_norm"], 5)
    parts = [FORMULAS[0], FORMULAS[2]]
    made, _ = run(params, X_BTD)
    assert_within_budget(made, partial(formulas.block, parts=parts), params, X_BTD)


def test_order_of_leaves_does_not_matter() -> None:
    params = draw(["attention", "mlp"])
    backwards = dict(reversed(params.items()))
    np.testing.assert_array_equal(run(params, X_BTD)[0], run(backwards, X_BTD)[0])


def test_feed_is_replaced_where_it_is_passed_in() -> None:
    params = draw(["attention"]) | {"mlp": formulas.draw(partial(init_gated_mlp, D=D, F=F))}
    made, _ = run(params, X_BTD, feed=partial(gated_mlp, activation="relu"))
    parts = [FORMULAS[0], ("mlp", partial(formulas.gated_mlp, activation="relu"))]
    assert_within_budget(made, partial(formulas.block, parts=parts), params, X_BTD)


def test_what_a_part_reports_comes_out() -> None:
    params = draw(["attention"]) | {"mlp": formulas.draw(partial(init_moe, D=D, F=F, X=5))}
    made, aux = run(params, X_BTD, feed=moe)
    assert list(aux) == ["mlp"]
    assert aux["mlp"]["routing"].load_X.shape == (5,)
    parts = [FORMULAS[0], ("mlp", formulas.moe)]
    assert_within_budget(made, partial(formulas.block, parts=parts), params, X_BTD)


def test_attention_hands_on_an_output_and_nothing_else() -> None:
    # C7: the feed-forward part is called with its own parameters and the residual stream alone.
    seen = []

    def feed(*arguments, **options):
        seen.append((arguments, options))
        return arguments[1]

    params = draw(["attention", "mlp"])
    run(params, X_BTD, feed=feed)
    ((given_params, h_BTD), options) = seen[0]
    assert given_params is params["mlp"]
    assert options == {}
    after, _ = run(draw(["attention"]), X_BTD)
    assert_within_budget(h_BTD, formulas.norm, params["mlp_norm"], after)


def test_swapping_one_initialiser_leaves_the_others_bit_equal() -> None:
    # C7: each part has its own random initialisation.
    whole = init_block(KEY, D, **INITS)
    for swapped in INITS:
        other: dict[str, Any] = {swapped: lambda key: {"made": jnp.ones(3)}}
        made = init_block(KEY, D, **(INITS | other))
        for name in whole.keys() - {swapped}:
            jax.tree.map(np.testing.assert_array_equal, made[name], whole[name])
        alone = init_block(KEY, D, **{swapped: INITS[swapped]})
        jax.tree.map(np.testing.assert_array_equal, alone[swapped], whole[swapped])
    # A leaf of the same name and size in two parts.
    assert (whole["mixer"]["wo_NED"].ravel() != whole["attention"]["wo_NED"].ravel()).all()


def test_swapping_the_mlp_leaves_attention_bit_equal() -> None:
    # C7, measured on outputs: what attention computes does not know the MLP's weights.
    seen = []

    def attend(params, x_BTD):
        seen.append(causal_attention(params, x_BTD))
        return seen[-1]

    first = draw(["attention", "mlp"])
    second = first | {"mlp": formulas.draw(partial(init_mlp, D=D, F=29), 5)}
    made = [run(params, X_BTD, attend=attend)[0] for params in (first, second)]
    np.testing.assert_array_equal(seen[0], seen[1])
    assert (made[0] != made[1]).any()


def test_both_learn_together() -> None:
    # C8: one loss gives gradients to every leaf of both parts, from the first step on.
    params = init_block(KEY, D, attention=INITS["attention"], mlp=INITS["mlp"])
    gradient = jax.jit(jax.grad(lambda p: jnp.square(run(p, X_BTD)[0]).sum()))(params)
    assert all(leaf.all() for leaf in jax.tree.leaves(gradient))


only_mlp = jax.jit(run)


@given(seed=st.integers(0, 2**31), place=st.integers(0, T - 1))
def test_without_attention_a_token_is_on_its_own(seed, place) -> None:
    # C9: bit-equal under any prefix, and under anything that follows.
    params = draw(["mlp"])
    other = np.random.default_rng(seed).standard_normal((B, T, D)).astype(np.float32)
    other[:, place] = X_BTD[:, place]
    made = only_mlp(params, other)[0][:, place]
    np.testing.assert_array_equal(made, only_mlp(params, X_BTD)[0][:, place])


@pytest.mark.parametrize(
    ("name", "context"), [("attention", np.tri(T)), ("mixer", np.tri(T)), ("mlp", np.eye(T))]
)
def test_what_reaches_what(name, context) -> None:
    # C9: exactly zero gradient to later tokens, and some to all previous ones.
    params = draw([name])
    jacobian = jax.jit(jax.jacobian(lambda x_BTD: run(params, x_BTD)[0]))(X_BTD)
    reached = np.abs(jacobian).sum(axis=(2, 5))
    for b in range(B):
        assert ((reached[b, :, b] > 0) == context.astype(bool)).all()
        assert not reached[b, :, 1 - b].any()


# Dropout.


def test_dropout_is_a_function_of_the_key() -> None:
    params = draw(["attention", "mlp"])
    dropped = jax.jit(lambda key: run(params, X_BTD, dropout_rate=0.5, dropout_key=key)[0])
    first, second = jax.random.split(KEY, 2)
    np.testing.assert_array_equal(dropped(first), dropped(first))
    assert (dropped(first) != dropped(second)).any()


def test_dropout_of_nothing_is_none() -> None:
    params = draw(["attention", "mlp"])
    made, _ = run(params, X_BTD, dropout_rate=0.0, dropout_key=KEY)
    np.testing.assert_array_equal(made, run(params, X_BTD)[0])


def test_dropout_takes_a_share_and_keeps_the_mean() -> None:
    # n draws of y/(1-r) or 0 have mean y and variance y²·r/(1-r)/n; seven standard deviations
    # leave less than 1e-11 for each of the entries.
    n, rate = 2003, 0.3
    drop = partial(run, feed=lambda params, x_BTD: X_BTD, dropout_rate=rate)
    zero_BTD = jnp.zeros((B, T, D))
    one = jax.vmap(lambda key: drop({"mlp": {}}, zero_BTD, dropout_key=key)[0])
    draws = np.asarray(jax.jit(one)(jax.random.split(KEY, n)))
    bound = 7 * np.abs(X_BTD) * (rate / (1 - rate) / n) ** 0.5
    assert (np.abs(draws.mean(axis=0, dtype=np.float64) - X_BTD) < bound).all()
    dropped = draws == 0
    assert abs(dropped.mean() - rate) < 7 * (rate * (1 - rate) / dropped.size) ** 0.5
    kept = np.broadcast_to(X_BTD, draws.shape)[~dropped] / np.float32(1 - rate)
    # A division, or a product with a reciprocal that is itself rounded: one eps.
    np.testing.assert_allclose(draws[~dropped], kept, rtol=float(np.finfo(np.float32).eps))


def test_parts_drop_apart_from_each_other_and_hand_keys_to_attention() -> None:
    keys = []

    def attend(params, x_BTD, *, dropout_key):
        keys.append(dropout_key)
        return jnp.ones_like(x_BTD)

    params = draw(["attention", "mlp"])
    params = rename(params, "_norm", "")
    x_BTD = jnp.zeros((B, T, D))
    # Ones from attention, tens from the MLP: the sum says which of the two was dropped.
    made, _ = run(
        params,
        x_BTD,
        attend=attend,
        feed=lambda p, x_BTD: 10 * jnp.ones_like(x_BTD),
        dropout_rate=0.5,
        dropout_key=KEY,
    )
    assert set(np.unique(made)) == {0.0, 2.0, 20.0, 22.0}
    assert len(keys) == 1
    assert (jax.random.key_data(keys[0]) != jax.random.key_data(KEY)).any()
    # Attention's own dropout runs on that key.
    drop = partial(attention, mask=causal(), dropout_rate=0.5)
    first, _ = block(draw(["attention"]), X_BTD, attend=drop, dropout_key=KEY)
    second, _ = block(draw(["attention"]), X_BTD, attend=drop, dropout_key=keys[0])
    assert (first != second).any()


def test_a_mixer_refuses_a_cache() -> None:
    with pytest.raises(ValueError, match="cannot use a cache"):
        run(draw(["mixer"]), X_BTD, cache={})
