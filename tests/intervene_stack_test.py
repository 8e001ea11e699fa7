"""Edits of heads in stacks and language models: which layer, under which transformation, to what
effect."""

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
    extend,
    init_attention,
    init_block,
    init_cache,
    init_language_model,
    init_mlp,
    intervene,
    language_model,
    stack,
    window,
)
from tests import formulas
from tests.attention_cases import QUICK
from tests.formulas import random_like
from tests.intervene_test import close

B, T, D, N, K, H, E, F, V, L = 2, 5, 7, 3, 1, 11, 13, 17, 23, 4
jit = partial(jax.jit, compiler_options=QUICK)


def array(*shape: int, seed: int = 1) -> jax.Array:
    return random_like(np.zeros(shape), seed)


LAYER = partial(
    init_block,
    D=D,
    attention=partial(init_attention, D=D, N=N, K=K, H=H, E=E),
    mlp=partial(init_mlp, D=D, F=F),
)
MODEL = formulas.draw(partial(init_language_model, V=V, D=D, L=L, layer=LAYER), 3, scale=0.5)
LAYERS = MODEL["layers"]
X_BTD = array(B, T, D)
TOKENS_BT = jnp.asarray(np.random.default_rng(1).integers(0, V, (B, T)))
AT, CHOSEN_N = 2, np.array([False, True, False])
HEADS_LN = intervene.heads(L, N, [(AT, 1)])
ATTEND = partial(attention, mask=causal(), keep=("o_BTNE",))
EDITS = {
    "zero": intervene.zero(HEADS_LN),
    "mean given": intervene.mean(HEADS_LN, array(L, N, E, seed=6)),
    "given output": intervene.given_output(HEADS_LN, array(L, B, T, N, E, seed=7)),
    "pattern": intervene.given_pattern(HEADS_LN, array(L, T, T, seed=8)),
    "pattern of heads": intervene.given_pattern(HEADS_LN, array(L, 1, N, T, T, seed=9)),
    "knock out": intervene.knock_out(HEADS_LN, window(1)),
}


@jit
def run(x_BTD: jax.Array, edits: Any) -> tuple[jax.Array, jax.Array]:
    """Return the stream and the heads' outputs, [L,B,T,N,E]."""
    y_BTD, aux = stack(LAYERS, x_BTD, attend=ATTEND, intervene=edits)
    return y_BTD, aux["attention"]["kept"]["o_BTNE"]


def test_heads_are_written_out() -> None:
    want = np.zeros((L, N), bool)
    want[AT, 1] = True
    np.testing.assert_array_equal(HEADS_LN, want)
    assert HEADS_LN.dtype == np.bool_
    every = intervene.heads(L, N, [(at, n) for at in range(L) for n in range(N)])
    assert every.all()
    np.testing.assert_array_equal(intervene.heads(L, N, np.argwhere(want)), want)


@pytest.mark.parametrize("kind", EDITS)
def test_stack_edits_one_layer(kind: str) -> None:
    edit = EDITS[kind]
    (got_BTD, got), (_, computed) = run(X_BTD, edit), run(X_BTD, None)
    np.testing.assert_array_equal(got[:AT], computed[:AT])
    np.testing.assert_array_equal(got[AT][:, :, ~CHOSEN_N], computed[AT][:, :, ~CHOSEN_N])
    assert (got[AT][:, :, CHOSEN_N] != computed[AT][:, :, CHOSEN_N]).any()
    assert (got[AT + 1] != computed[AT + 1]).any()
    # The same by hand, block after block.
    value = None if edit.value is None else edit.value[AT]
    own, x_BTD = intervene.Edit(edit.heads[AT], value, edit.mask, edit.kind), X_BTD
    for at in range(L):
        layer = jax.tree.map(lambda leaf, at=at: leaf[at], LAYERS)
        x_BTD, aux = block(layer, x_BTD, attend=ATTEND, intervene=own if at == AT else None)
        close(got[at], aux["attention"]["kept"]["o_BTNE"])
    close(got_BTD, x_BTD)


def test_several_edits_in_several_layers() -> None:
    first, second = (intervene.zero(intervene.heads(L, N, [pair])) for pair in ((0, 2), (AT, 1)))
    _, got = run(X_BTD, (first, second))
    np.testing.assert_array_equal(got[0][:, :, 2], 0.0)
    np.testing.assert_array_equal(got[AT][:, :, 1], 0.0)
    assert (np.asarray(got) == 0).mean() == 2 / (L * N)


def test_edit_bound_to_attention_is_that_of_every_layer() -> None:
    heads_N = jnp.asarray(CHOSEN_N)
    attend = partial(ATTEND, intervene=intervene.zero(heads_N))
    every = intervene.zero(jnp.broadcast_to(heads_N, (L, N)))
    made, _ = jit(lambda x: stack(LAYERS, x, attend=attend))(X_BTD)
    np.testing.assert_array_equal(made, run(X_BTD, every)[0])


def test_patching_a_run() -> None:
    y_BTD, own = run(X_BTD, None)
    every = jnp.ones((L, N), bool)
    same_BTD, _ = run(X_BTD, intervene.given_output(every, own))
    np.testing.assert_array_equal(same_BTD, y_BTD)
    _, other = run(2 * X_BTD, None)
    _, patched = run(X_BTD, intervene.given_output(HEADS_LN, other))
    np.testing.assert_array_equal(patched[AT][:, :, CHOSEN_N], other[AT][:, :, CHOSEN_N])
    assert (other != own).all(axis=-1).any()


def without(heads_LN: Any, model: dict = MODEL) -> dict:
    """The model in which the part of Wo that reads these heads is 0."""
    layers = model["layers"]
    wo = layers["attention"]["wo_NED"] * ~np.asarray(heads_LN)[:, :, None, None]
    return model | {"layers": layers | {"attention": layers["attention"] | {"wo_NED": wo}}}


def loss(params: dict, edits: Any, remat: str | None = None) -> jax.Array:
    logits_BTV, _ = language_model(params, TOKENS_BT, intervene=edits, remat=remat)
    return jnp.mean(jnp.sin(logits_BTV))


def test_language_model_without_a_head() -> None:
    derive = jit(jax.value_and_grad(loss), static_argnames="remat")
    want, wanted = derive(without(HEADS_LN), None)
    for remat in (None, "full"):
        got, made = derive(MODEL, EDITS["zero"], remat=remat)
        close(got, want)
        for part, name in (("attention", "wq_DNH"), ("attention", "wv_DKE"), ("mlp", "w_in_DF")):
            close(made["layers"][part][name], wanted["layers"][part][name])
        close(made["embed_VD"], wanted["embed_VD"])
        np.testing.assert_array_equal(made["layers"]["attention"]["wo_NED"][AT, 1], 0.0)
        assert (np.abs(made["layers"]["attention"]["wo_NED"][:, 0]) > 0).any(axis=(1, 2)).all()
    assert abs(want - jit(loss)(MODEL, None)) > 1e-3


ROW_BY_ROW = {
    "zero": intervene.zero,
    "uniform": intervene.uniform,
    "first_token": intervene.first_token,
    "knock_out": partial(intervene.knock_out, mask=window(1)),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ROW_BY_ROW)
def test_decoding_with_a_cache_is_the_whole_pass(kind: str) -> None:
    model = partial(language_model, intervene=ROW_BY_ROW[kind](HEADS_LN))
    whole_BTV, _ = jit(model)(MODEL, TOKENS_BT)
    cache = init_cache(MODEL, B, T + 2)
    # What was never written must not matter.
    cache["layers"] = jax.tree.map(lambda leaf: leaf + jnp.nan, cache["layers"])
    step, made, at = jit(partial(extend, model=model)), [], 0
    for size in (2, 1, 1, 1):
        logits_BTV, cache = step(MODEL, TOKENS_BT[:, at : at + size], cache)
        made.append(logits_BTV)
        at += size
    close(np.concatenate(made, axis=1), whole_BTV)
    assert (np.abs(whole_BTV - language_model(MODEL, TOKENS_BT)[0]) > 1e-3).any()


def test_a_pattern_reads_a_cache() -> None:
    # Keys 0 and 1 of the 7 that there is room for.
    p_LTS = jnp.zeros((L, T, T + 2)).at[:, :, :2].set(0.5)
    edits = intervene.given_pattern(HEADS_LN, p_LTS)
    cache = init_cache(MODEL, B, T + 2)
    cache["layers"] = jax.tree.map(lambda leaf: leaf + jnp.nan, cache["layers"])
    made, _ = extend(MODEL, TOKENS_BT, cache, model=partial(language_model, intervene=edits))
    edits = intervene.given_pattern(HEADS_LN, p_LTS[:, :, :T])
    close(made, language_model(MODEL, TOKENS_BT, intervene=edits)[0])


# The effect of one head.


@pytest.mark.parametrize("kind", ["zero", "given_output"])
def test_path_effect_is_the_loop(kind: str) -> None:
    _, aux = language_model(MODEL, TOKENS_BT[::-1], attend=ATTEND)
    other = aux["attention"]["kept"]["o_BTNE"]
    edit = {
        "zero": intervene.zero,
        "given_output": partial(intervene.given_output, o_BTNE=other),
    }[kind]
    made = jit(lambda: intervene.path_effect(partial(loss, MODEL), edit, L=L, N=N))()
    one = jit(lambda heads_LN: loss(MODEL, edit(heads_LN)))
    plain = jit(loss)(MODEL, None)
    want = [[one(intervene.heads(L, N, [(at, n)])) - plain for n in range(N)] for at in range(L)]
    assert made.shape == (L, N)
    # Differences of numbers whose size is that of the loss.
    atol = 32 * float(jnp.finfo(jnp.float32).eps) * max(1.0, abs(float(plain)))
    np.testing.assert_allclose(made, np.asarray(want), rtol=0, atol=atol)
    assert np.abs(made).min() > 8 * atol


def test_path_effect_finds_the_heads_that_matter() -> None:
    # So large that one program rounds otherwise than another: what metric does not read has an
    # effect of exactly 0 all the same.
    B, T, D, N, L = 3, 17, 31, 5, 2
    layer = partial(
        init_block,
        D=D,
        attention=partial(init_attention, D=D, N=N, H=7),
        mlp=partial(init_mlp, D=D, F=61),
    )
    model = formulas.draw(partial(init_language_model, V=V, D=D, L=L, layer=layer), 4, scale=0.3)
    idle = np.ones((L, N), bool)
    idle[0, 2] = idle[1, 4] = False
    params = without(idle, model)
    tokens_BT = np.random.default_rng(2).integers(0, V, (B, T))

    def metric(edit: intervene.Edit) -> jax.Array:
        logits_BTV, _ = language_model(params, jnp.asarray(tokens_BT), intervene=edit)
        return jnp.mean(jnp.sin(logits_BTV))

    made = intervene.path_effect(metric, intervene.zero, L=L, N=N)
    np.testing.assert_array_equal(made != 0, ~idle)
    assert np.abs(made[~idle]).min() > 1e-4
