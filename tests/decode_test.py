"""Decoding with a cache gives what the whole forward pass gives."""

import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_attn import (
    alibi,
    alibi_slopes,
    attention,
    causal,
    extend,
    generate,
    init_attention,
    init_block,
    init_cache,
    init_language_model,
    init_mlp,
    language_model,
    rope,
    sample,
    window,
)
from tests.formulas import assert_near, cast, draw

B, T, STEPS, D, L, V, F, H = 3, 5, 6, 14, 2, 23, 11, 4
KEY = jax.random.key(0)
RNG = np.random.default_rng(1)
PROMPT_BT = jnp.asarray(RNG.integers(0, V, (B, T)))
TOKENS_BT = jnp.asarray(RNG.integers(0, V, (B, 5)))
# name: (options of init_attention, options of attention, longest input of learned positions)
MODELS = {
    "mha, alibi": ({"N": 2}, {"score": alibi(alibi_slopes(2))}, None),
    "gqa": ({"N": 6, "K": 2, "H": H, "E": 5}, {}, None),
    "mqa, sinks": (
        {"N": 3, "K": 1, "H": H, "bias": True, "qk_norm": True, "sinks": True},
        {"softcap": 5.0},
        None,
    ),
    "positions, window": ({"N": 2}, {"mask": causal() & window(2)}, T + STEPS),
    "rope": ({"N": 2, "H": H}, {}, None),
}
ROPES = {
    "plain": rope.plain(H),
    "linear": rope.linear(H, factor=2.0),
    "llama3": rope.llama3(H, original=16),
    "yarn": rope.yarn(H, factor=4.0, original=16),
}
CASES = [(name, None) for name in MODELS if name != "rope"] + [("rope", kind) for kind in ROPES]


@functools.cache
def make(name):
    """Return parameters, and three functions of (parameters, ..., rope): whole, step, generate."""
    inits, options, longest = MODELS[name]
    attention_init = partial(init_attention, D=D, **inits)
    mlp_init = partial(init_mlp, D=D, F=F) if name == "gqa" else None
    layer = partial(init_block, D=D, attention=attention_init, mlp=mlp_init)
    params = draw(partial(init_language_model, V=V, D=D, L=L, layer=layer, T=longest))

    def model(params, tokens_BT, rope, cache=None, q_offset=0):
        attend = partial(attention, **({"mask": causal()} | options), rope=rope)
        return language_model(params, tokens_BT, attend=attend, cache=cache, q_offset=q_offset)

    @jax.jit
    def whole(params, tokens_BT, rope):
        return model(params, tokens_BT, rope)[0]

    @jax.jit
    def step(params, tokens_BT, cache, rope):
        return extend(params, tokens_BT, cache, model=partial(model, rope=rope))

    @partial(jax.jit, static_argnames=("steps", "temperature", "top_k", "top_p"))
    def continued(params, prompt_BT, rope, key, steps=STEPS, **options):
        bound = partial(model, rope=rope)
        return generate(params, prompt_BT, steps=steps, key=key, model=bound, **options)

    return params, whole, step, continued


@pytest.mark.few(4)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_cache_gives_the_logits_of_the_whole_pass(name, kind) -> None:
    # The budget is twice the float32 error of the whole pass, measured against itself in float64.
    params, whole, step, _ = make(name)
    turn = ROPES.get(kind)
    plain = whole(params, TOKENS_BT, turn)
    with jax.enable_x64(True):
        exact = whole(cast(params, np.float64), TOKENS_BT, turn)
    made, cache = step(params, TOKENS_BT[:, :3], init_cache(params, B, 11), turn)
    assert int(cache["length"]) == 3
    parts = [made]
    for t in range(3, 5):
        made, cache = step(params, TOKENS_BT[:, t, None], cache, turn)
        parts.append(made)
    assert int(cache["length"]) == 5
    assert_near(np.concatenate(parts, axis=1), exact, plain)
    assert not cache["layers"]["k_BSKH"][:, :, 5:].any()


def test_ropes_differ() -> None:
    params, whole, _, _ = make("rope")
    made = [whole(params, TOKENS_BT, turn) for turn in ROPES.values()]
    assert all((made[i] != made[j]).any() for i in range(4) for j in range(i))


def without_cache(name, turn, key=None, **options):
    """Run the whole sequence again for each token, padded to one length: causal, so unnoticed."""
    params, whole, _, _ = make(name)
    tokens = np.zeros((B, T + STEPS), np.int32)
    tokens[:, :T] = PROMPT_BT
    keys = [None] * STEPS if key is None else jax.random.split(key, STEPS)
    for i in range(STEPS):
        logits_BV = whole(params, tokens, turn)[:, T + i - 1]
        tokens[:, T + i] = sample(keys[i], logits_BV, **options)
    return tokens


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_generates_what_the_whole_pass_generates(name, kind) -> None:
    params, _, _, continued = make(name)
    made = continued(params, PROMPT_BT, ROPES.get(kind), None, temperature=0.0)
    assert made.shape == (B, T + STEPS)
    assert made.dtype == jnp.int32
    np.testing.assert_array_equal(made, without_cache(name, ROPES.get(kind), temperature=0.0))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_k": 7, "top_p": 0.6}])
def test_samples_what_the_whole_pass_samples(options) -> None:
    params, _, _, continued = make("rope")
    first, second = jax.random.key(7), jax.random.key(8)
    made = continued(params, PROMPT_BT, ROPES["yarn"], first, **options)
    np.testing.assert_array_equal(made, without_cache("rope", ROPES["yarn"], first, **options))
    assert (made != continued(params, PROMPT_BT, ROPES["yarn"], second, **options)).any()


def test_a_token_depends_on_the_key_its_step_and_its_row() -> None:
    params, _, _, continued = make("gqa")
    same_BT = jnp.concatenate([PROMPT_BT[:1]] * 3)
    whole = continued(params, same_BT, None, KEY)
    assert (whole[0] != whole[1]).any(), "sequences with the same prompt must differ"
    fewer = continued(params, same_BT, None, KEY, steps=2)
    np.testing.assert_array_equal(fewer, whole[:, : T + 2])


@st.composite
def cuts(choose):
    inner = choose(st.sets(st.integers(1, 4)))
    return [0, *sorted(inner), 5]


@given(cuts())
def test_chunks_of_any_sizes_equal_all_at_once(bounds) -> None:
    params, whole, step, _ = make("gqa")
    with jax.enable_x64(True):
        exact = whole(cast(params, np.float64), TOKENS_BT, None)
    plain, filled = step(params, TOKENS_BT, init_cache(params, B, 11), None)
    cache, parts = init_cache(params, B, 11), []
    for first, end in itertools.pairwise(bounds):
        made, cache = step(params, TOKENS_BT[:, first:end], cache, None)
        parts.append(made)
    assert_near(np.concatenate(parts, axis=1), exact, plain)
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, filled)


def test_a_full_cache_gives_nan_and_no_wrong_token() -> None:
    params, _, step, _ = make("gqa")
    cache = init_cache(params, B, 4)
    with pytest.raises(ValueError, match="tokens_BT has T=5 but the cache has S=4"):
        extend(params, TOKENS_BT, cache)
    three, cache = step(params, TOKENS_BT[:, :3], cache, None)
    last, full = step(params, TOKENS_BT[:, 3:4], cache, None)
    assert np.isfinite(three).all()
    assert np.isfinite(last).all()
    for tokens_BT, before in ((TOKENS_BT[:, 2:5], cache), (TOKENS_BT[:, 4:5], full)):
        over, after = step(params, tokens_BT, before, None)
        assert np.isnan(over).all()
        again, _ = step(params, TOKENS_BT[:, :1], after, None)
        assert np.isnan(again).all(), "it stays overfull"
        assert (sample(None, over[:, -1], temperature=0.0) == -1).all()


def test_positions_that_do_not_exist_are_an_error_before_anything_runs() -> None:
    params, _, _, continued = make("positions, window")
    longest = partial(continued, rope=None, key=KEY, steps=STEPS + 1)  # the last is never read
    assert jax.eval_shape(longest, params, PROMPT_BT).shape == (B, T + STEPS + 1)
    with pytest.raises(ValueError, match="needs 12 positions, but position_TD has T=11"):
        generate(params, PROMPT_BT, steps=STEPS + 2, key=KEY)


def test_an_unknown_token_in_the_prompt_is_not_continued() -> None:
    params, _, _, continued = make("gqa")
    made = continued(params, PROMPT_BT.at[0, 2].set(V), None, None, temperature=0.0)
    assert (made[0, T:] == -1).all()
    assert (made[1:] >= 0).all()


def test_what_was_not_written_is_not_read() -> None:
    # With no mask, or one that would allow more, attention reads what the cache holds.
    params = draw(partial(init_attention, D=D, N=2))
    x_BTD = jnp.asarray(RNG.standard_normal((B, 4, D)), jnp.float32)
    plain = attention(params, x_BTD)
    with jax.enable_x64(True):
        exact = attention(cast(params, np.float64), cast(x_BTD, np.float64))
    for rest in (0.0, 3.0, np.nan):
        held = {name: jnp.full((B, 9, 2, 7), rest) for name in ("k_BSKH", "v_BSKE")}
        for mask in (None, window(9)):
            _, aux = attention(params, x_BTD[:, :1], mask=mask, cache=held, q_offset=0)
            made, _ = attention(params, x_BTD[:, 1:], mask=mask, cache=aux["cache"], q_offset=1)
            assert_near(made, exact[:, 1:], plain[:, 1:])


def test_cache_has_the_sizes_of_keys_and_values() -> None:
    params, _, step, _ = make("gqa")
    cache = init_cache(params, B, 9, jnp.bfloat16)
    assert cache["layers"]["k_BSKH"].shape == (L, B, 9, 2, H)
    assert cache["layers"]["v_BSKE"].shape == (L, B, 9, 2, 5)
    assert cache["layers"]["k_BSKH"].dtype == cache["layers"]["v_BSKE"].dtype == jnp.bfloat16
    made, after = step(params, TOKENS_BT[:, :3], cache, None)

    def kinds(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert kinds(after) == kinds(cache)
    assert np.isfinite(made).all()
    with pytest.raises(ValueError, match="no 'attention', nothing to cache"):
        init_cache({"layers": {"mlp": {}}}, 1, 3)
