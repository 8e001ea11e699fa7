"""Stacks of blocks: a scan that equals the loop, compiles once, and can forget activations."""

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_attn import (
    attention,
    block,
    causal,
    init_attention,
    init_block,
    init_mlp,
    init_moe,
    init_stack,
    moe,
    stack,
)
from jax_attn.language_model import causal_attention
from tests import formulas
from tests.formulas import assert_near, assert_within_budget, cast, draw, random_like

B, T, D, F, L = 2, 7, 6, 11, 3
KEY = jax.random.key(0)
X_BTD = random_like(np.zeros((B, T, D)), 1)
BLOCK = partial(
    init_block,
    D=D,
    attention=partial(init_attention, D=D, N=2),
    mlp=partial(init_mlp, D=D, F=F, bias=True),
)
PARAMS = draw(partial(init_stack, L=L, init=BLOCK), 2)
run = partial(stack, attend=causal_attention)


def layers(params):
    return [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(L)]


def test_equals_a_loop_over_blocks() -> None:
    params = PARAMS
    made, aux = run(params, X_BTD)
    assert aux == {}
    parts = [("attention", formulas.attention), ("mlp", formulas.mlp)]

    def formula(params, x_BTD):
        for one in layers(params):
            x_BTD = formulas.block(one, x_BTD, parts)
        return x_BTD

    assert_within_budget(made, formula, params, X_BTD)
    x_BTD = X_BTD
    for one in layers(params):
        x_BTD, _ = block(one, x_BTD, attend=causal_attention)
    assert_within_budget(x_BTD, formula, params, X_BTD)


def test_init_draws_each_layer_from_its_own_key() -> None:
    init = partial(init_block, D=D, mlp=partial(init_mlp, D=D, F=F))
    params = init_stack(KEY, L, init)
    for key, one in zip(jax.random.split(KEY, L), layers(params), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, init(key))
    assert (params["mlp"]["w_in_DF"][0] != params["mlp"]["w_in_DF"][1]).any()
    wrong: Any
    for wrong in (0, True, 2.0):
        with pytest.raises(ValueError, match="L \\(layers\\) must be an int >= 1"):
            init_stack(KEY, wrong, BLOCK)


def test_reports_carry_a_leading_axis() -> None:
    experts = partial(init_block, D=D, mlp=partial(init_moe, D=D, F=F, X=5))
    params = draw(partial(init_stack, L=L, init=experts))
    _, aux = stack(params, X_BTD, feed=moe)
    assert aux["mlp"]["routing"].load_X.shape == (L, 5)
    x_BTD = X_BTD
    for i, one in enumerate(layers(params)):
        x_BTD, own = block(one, x_BTD, feed=moe)
        np.testing.assert_array_equal(aux["mlp"]["routing"].load_X[i], own["mlp"]["routing"].load_X)


def loss(params, x_BTD, remat=None):
    return jnp.square(run(params, x_BTD, remat=remat)[0]).sum()


@functools.cache
def gradients():
    """The gradient without remat, in float32 and in float64."""
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    with jax.enable_x64(True):
        exact = gradient(*cast((PARAMS, X_BTD), np.float64))
    return gradient(PARAMS, X_BTD), exact


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_gives_the_same_gradient(remat) -> None:
    plain, exact = gradients()
    made = jax.jit(jax.grad(partial(loss, remat=remat), argnums=(0, 1)))(PARAMS, X_BTD)
    jax.tree.map(assert_near, made, exact, plain)


def products(remat) -> int:
    """The matrix products of a gradient, as they are written down before XLA sees them."""
    params = jax.eval_shape(partial(init_stack, L=L, init=BLOCK), KEY)
    text = str(jax.make_jaxpr(jax.grad(partial(loss, remat=remat)))(params, X_BTD))
    return text.count("dot_general")


def test_remat_computes_again_what_it_says() -> None:
    # Six products with parameters in a block (q, k, v, o, in, out), two without (scores, mix).
    # "dots" makes the scores again; "full" everything, up to what no derivative needs.
    none, dots, full = (products(remat) for remat in (None, "dots", "full"))
    assert none == 8 * 3  # one forward, two backward
    assert none < dots <= none + 2
    assert dots + 4 <= full <= none + 8
    with pytest.raises(ValueError, match="remat must be None or one of full, dots"):
        run(PARAMS, X_BTD, remat="none")


def test_program_does_not_grow_with_depth() -> None:
    sizes = []
    for depth in (2, 17):
        params = jax.eval_shape(partial(init_stack, L=depth, init=BLOCK), KEY)
        sizes.append(len(jax.jit(jax.grad(loss)).lower(params, X_BTD).as_text()))
    # Only the digits of L may make a difference.
    assert abs(sizes[1] - sizes[0]) < 0.02 * sizes[0]


def test_every_layer_drops_something_else() -> None:
    params = {"mlp": jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * L), PARAMS["mlp"])}

    def feed(params, x_BTD):
        return jnp.ones_like(x_BTD), {"stream": x_BTD}

    @jax.jit
    def streams(key):
        out_BTD, aux = stack(params, X_BTD, feed=feed, dropout_rate=0.5, dropout_key=key)
        return jnp.concatenate([aux["mlp"]["stream"], out_BTD[None]])

    dropped = np.diff(streams(KEY), axis=0) == 0
    assert dropped.any(axis=(1, 2, 3)).all()
    for i in range(L):
        for j in range(i):
            assert (dropped[i] != dropped[j]).any()
    np.testing.assert_array_equal(streams(KEY), streams(KEY))
    assert (streams(KEY) != streams(jax.random.key(9))).any()


def test_every_layer_gives_attention_another_key() -> None:
    def attend(params, x_BTD, *, dropout_key):
        return jnp.zeros_like(x_BTD), {"key": jax.random.key_data(dropout_key)}

    params = PARAMS
    _, aux = stack(params, X_BTD, attend=attend, dropout_key=KEY)
    assert len({tuple(key) for key in np.asarray(aux["attention"]["key"])}) == L
    # And with attention's own dropout the whole runs, deterministically.
    drop = partial(attention, mask=causal(), dropout_rate=0.3)
    made = [stack(params, X_BTD, attend=drop, dropout_key=KEY)[0] for _ in range(2)]
    np.testing.assert_array_equal(made[0], made[1])
    assert (made[0] != run(params, X_BTD)[0]).any()
    with pytest.raises(ValueError, match="needs a dropout_key"):
        stack(params, X_BTD, attend=drop)


def test_no_gradient_reaches_later_tokens() -> None:
    jacobian = jax.jit(jax.jacobian(lambda x: run(PARAMS, x, remat="full")[0]))(X_BTD)
    reached = np.abs(jacobian[0, :, :, 0]).sum(axis=(1, 3))
    assert ((reached > 0) == np.tri(T, dtype=bool)).all()


def test_leaves_must_agree_on_the_number_of_layers() -> None:
    params = PARAMS | {"mlp": PARAMS["mlp"] | {"b_in_F": PARAMS["mlp"]["b_in_F"][:2]}}
    with pytest.raises(ValueError, match=r"\['mlp'\]\['b_in_F'\] has L=\(2,\) but .* has L=3"):
        stack(params, X_BTD)
    with pytest.raises(ValueError, match="params is empty"):
        stack({}, X_BTD)


def test_a_block_must_keep_the_dtype() -> None:
    params = PARAMS
    with pytest.raises(ValueError, match="x_BTD is bfloat16 but a block returns float32"):
        run(params, X_BTD.astype(jnp.bfloat16))
    # Wide norms are usual beside narrow products, and widen nothing.
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    half["mlp_norm"] = params["mlp_norm"]
    assert run(half, X_BTD.astype(jnp.bfloat16))[0].dtype == jnp.bfloat16
