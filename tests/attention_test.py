"""The attention layer against a float64 NumPy layer; its shapes, its caches, its claims."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_attn import (
    alibi,
    attention,
    causal,
    count,
    dense,
    init_attention,
    lengths,
    project_qkv,
    rope,
)
from tests import oracle
from tests.attention_cases import QUICK

B, T, S, D, N, K, H, E = 2, 5, 7, 11, 6, 3, 4, 3
jit = partial(jax.jit, compiler_options=QUICK)


def draw(**options: bool) -> dict:
    """Parameters whose optional leaves are not at their neutral start."""
    params = init_attention(jax.random.key(0), D, N, K=K, H=H, E=E, **options)
    start = {"q_scale_H": 1.0, "k_scale_H": 1.0}
    for i, name in enumerate(sorted(params)):
        if not name.startswith("w"):
            noise = jax.random.normal(jax.random.key(i), params[name].shape)
            params[name] = start.get(name, 0.0) + 0.5 * noise
    return params


def tokens(length: int = T, seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (B, length, D))


EVERY_LEAF = {"bias": True, "qk_norm": True, "sinks": True}


def turned(x: np.ndarray, position_BT: np.ndarray, theta: float = 10_000.0) -> np.ndarray:
    """Rotate pairs (i, i + H/2) of [B,T,N,H] as complex numbers."""
    half = x.shape[-1] // 2
    frequency = theta ** (-np.arange(half) / half)
    turn = np.exp(1j * position_BT[:, :, None, None] * frequency)
    pair = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([pair.real, pair.imag], axis=-1)


def normed(x: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    if scale is None:
        return x
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale


def layer(params, x, kv=None, *, position=None, kv_position=None, **options) -> np.ndarray:
    """The whole layer in float64, written with matrix products of flattened heads."""
    w = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    x = np.asarray(x, np.float64)
    kv = x if kv is None else np.asarray(kv, np.float64)

    def project(z, weight, bias):
        heads, width = w[weight].shape[1:]
        y = z @ w[weight].reshape(-1, heads * width) + w.get(bias, np.zeros(1)).reshape(-1)
        return y.reshape(*z.shape[:2], heads, width)

    q = normed(project(x, "wq_DNH", "bq_NH"), w.get("q_scale_H"))
    k = normed(project(kv, "wk_DKH", "bk_KH"), w.get("k_scale_H"))
    v = project(kv, "wv_DKE", "bv_KE")
    if position is not None:
        q = turned(q, np.broadcast_to(position, x.shape[:2]))
        k = turned(k, np.broadcast_to(np.asarray(kv_position), kv.shape[:2]))
    o = oracle.attend(q, k, v, sinks=w.get("sinks_N"), **options).out
    return o.reshape(*x.shape[:2], -1) @ w["wo_NED"].reshape(-1, D) + w.get("bo_D", 0.0)


def close(got, want: np.ndarray) -> None:
    """Equal but for float32: 32 roundings of the largest, for four products in a row."""
    atol = 32 * float(jnp.finfo(jnp.float32).eps) * np.abs(want).max()
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=atol)


def test_shapes_and_counts_of_768() -> None:
    init = partial(init_attention, D=768, N=12)
    params = jax.eval_shape(init, jax.random.key(0))
    x_BTD = jax.ShapeDtypeStruct((4, 256, 768), jnp.float32)
    assert jax.eval_shape(attention, params, x_BTD).shape == (4, 256, 768)
    for name in ("wq_DNH", "wk_DKH", "wv_DKE", "wo_NED"):
        assert params[name].size == 768 * 768
    assert count(params) == 4 * 768 * 768
    x_BTD = jnp.ones((1, 5, 768))
    assert jit(attention)(jax.jit(init)(jax.random.key(0)), x_BTD).shape == (1, 5, 768)


@pytest.mark.parametrize("leaves", [{}, {"bias": True}, {"qk_norm": True}, EVERY_LEAF])
def test_layer_is_the_formula(leaves: dict) -> None:
    params, x_BTD = draw(**leaves), tokens()
    allowed = np.tril(np.ones((T, T), bool))
    where = np.arange(T)[None]
    got = jit(lambda p, x: attention(p, x, mask=causal(), rope=rope.plain(H)))(params, x_BTD)
    close(got, layer(params, x_BTD, mask=allowed, position=where, kv_position=where))


def test_offset_moves_positions_and_masks() -> None:
    params, x_BTD = draw(), tokens()
    where = np.arange(T)[None] + 3
    slope_N = 0.5 ** np.arange(1, N + 1)
    options = {"mask": causal(), "score": alibi(jnp.asarray(slope_N, jnp.float32)), "scale": 0.7}
    options |= {"rope": rope.plain(H), "softcap": 5.0}
    attend = partial(attention, **options)
    got = jit(lambda p, x, o: attend(p, x, kv_BSD=x, q_offset=o))(params, x_BTD, 3)
    want = layer(
        params,
        x_BTD,
        mask=np.arange(T)[None] <= np.arange(T)[:, None] + 3,
        score=lambda s, b, n, p, at: s - slope_N[n] * abs(p - at),
        q_offset=3,
        position=where,
        kv_position=np.arange(T)[None],
        scale=0.7,
        softcap=5.0,
    )
    close(got, want)
    # Without a cache x's own keys would stay behind, and a causal mask would show the future.
    with pytest.raises(ValueError, match="q_offset moves the queries but not x's own keys"):
        attend(params, x_BTD, q_offset=3)


def test_given_positions() -> None:
    params, x_BTD = draw(**EVERY_LEAF), tokens()
    where = np.array([[0, 1, 5, 2, 9], [7, 7, 0, 3, 1]])
    attend = partial(attention, rope=rope.plain(H))
    got = jit(lambda p, x, at: attend(p, x, position_BT=at))(params, x_BTD, where)
    close(got, layer(params, x_BTD, position=where, kv_position=where))


def test_cross_attention() -> None:
    params, x_BTD, kv_BSD = draw(**EVERY_LEAF), tokens(), tokens(S, seed=2)
    allowed = np.arange(S)[None, None, None] < np.array([4, 0])[:, None, None, None]
    mask = lengths(kv_B=np.array([4, 0]))
    attend = partial(attention, mask=mask, rope=rope.plain(H), q_offset=2)
    got = jit(lambda p, x, z: attend(p, x, kv_BSD=z))(params, x_BTD, kv_BSD)
    where = {"position": np.arange(T)[None] + 2, "kv_position": np.arange(S)[None]}
    close(got, layer(params, x_BTD, kv_BSD, mask=allowed, **where))


def test_projections_are_what_attention_uses() -> None:
    params, x_BTD = draw(**EVERY_LEAF), tokens()
    q_BTNH, k_BSKH, v_BSKE = jit(project_qkv)(params, x_BTD)
    assert (q_BTNH.shape, k_BSKH.shape, v_BSKE.shape) == ((B, T, N, H), (B, T, K, H), (B, T, K, E))
    rms = np.sqrt(np.mean(np.square(q_BTNH / params["q_scale_H"][None, None, None]), axis=-1))
    np.testing.assert_allclose(rms, 1.0, atol=1e-3)


def empty_cache(room: int, dtype=jnp.float32) -> dict:
    return {
        "k_BSKH": jnp.zeros((B, room, K, H), dtype),
        "v_BSKE": jnp.zeros((B, room, K, E), dtype),
    }


@pytest.mark.parametrize("cuts", [[T], [3, 1, 1], [1] * T])
def test_cache_is_the_full_forward(cuts: list[int]) -> None:
    params, x_BTD = draw(**EVERY_LEAF), tokens()
    attend = partial(attention, mask=causal(), rope=rope.plain(H))
    allowed, where = np.tril(np.ones((T, T), bool)), np.arange(T)[None]
    want = layer(params, x_BTD, mask=allowed, position=where, kv_position=where)

    @jit
    def step(params, x_BTD, cache, q_offset):
        y_BTD, aux = attend(params, x_BTD, cache=cache, q_offset=q_offset)
        return y_BTD, aux["cache"]

    cache, made, at = empty_cache(9), [], 0
    # What was never written must not matter.
    cache = jax.tree.map(lambda leaf: leaf.at[:, T:].set(jnp.nan), cache)
    for size in cuts:
        y_BTD, cache = step(params, x_BTD[:, at : at + size], cache, at)
        made.append(y_BTD)
        at += size
    close(np.concatenate(made, axis=1), want)


def test_cache_without_a_mask_hides_what_is_not_written() -> None:
    params, x_BTD = draw(), tokens(1)
    cache = jax.tree.map(lambda leaf: leaf + jnp.nan, empty_cache(4))
    got, aux = jit(lambda p, x, c: attention(p, x, cache=c, q_offset=0))(params, x_BTD, cache)
    close(got, layer(params, x_BTD))
    assert np.isfinite(aux["cache"]["k_BSKH"][:, :1]).all()
    assert np.isnan(aux["cache"]["k_BSKH"][:, 1:]).all()


def test_cache_keeps_its_dtype_and_the_output_that_of_x() -> None:
    params, x_BTD = draw(), tokens(2)
    y_BTD, aux = jax.eval_shape(
        lambda p, x, c: attention(p, x, cache=c, q_offset=1),
        params,
        x_BTD,
        empty_cache(4, jnp.bfloat16),
    )
    assert aux["cache"]["v_BSKE"].dtype == jnp.bfloat16
    assert y_BTD.dtype == x_BTD.dtype


@pytest.mark.parametrize(("q_offset", "length"), [(0, 5), (3, 2), (np.int64(3), 2), (-1, 2)])
def test_cache_overflow_raises(q_offset, length: int) -> None:
    with pytest.raises(ValueError, match=r"S=4.*q_offset=-?\d|q_offset must be >= 0"):
        attention(draw(), tokens(length), cache=empty_cache(4), q_offset=q_offset)


def test_scores_are_derived_and_no_parameter() -> None:
    params = draw(**EVERY_LEAF)
    assert not [name for name in params if "T" in name.rpartition("_")[2]]
    assert not [name for name in params if "score" in name]
    scores = [project_qkv(params, tokens(seed=seed)) for seed in (1, 2)]
    assert (np.asarray(scores[0][0]) != np.asarray(scores[1][0])).all()


def test_gradient_reaches_every_leaf() -> None:
    params, x_BTD = draw(**EVERY_LEAF), tokens()

    def loss(params):
        return jnp.sum(jnp.sin(attention(params, x_BTD, mask=causal(), rope=rope.plain(H))))

    for name, gradient in jit(jax.grad(loss))(params).items():
        assert np.isfinite(gradient).all(), name
        # A bias of the keys adds the same to a row's logits, unless a norm or a sink is there.
        assert np.abs(gradient).max() > 1e-4, name


def test_the_future_has_exactly_no_gradient() -> None:
    params, x_BTD = draw(**EVERY_LEAF), tokens()
    attend = partial(attention, params, mask=causal(), rope=rope.plain(H))
    slope = jit(jax.grad(lambda x: jnp.sum(jnp.sin(attend(x))[:, 2])))(x_BTD)
    np.testing.assert_array_equal(slope[:, 3:], 0.0)
    assert (np.abs(slope[:, :3]).max(axis=-1) > 0).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtype_in_is_dtype_out(dtype) -> None:
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), draw(**EVERY_LEAF))
    x = jax.ShapeDtypeStruct((B, T, D), dtype)
    made = jax.eval_shape(partial(attention, rope=rope.plain(H)), params, x)
    assert made.dtype == dtype


def test_mask_arrays_are_accepted_with_a_cache() -> None:
    params, x_BTD = draw(), tokens(2)
    attend = jit(lambda p, x, c, m: attention(p, x, cache=c, mask=m)[0])
    allowed = np.ones((1, 1, 2, 4), bool)
    got = attend(params, x_BTD, empty_cache(4), allowed)
    np.testing.assert_array_equal(got, attend(params, x_BTD, empty_cache(4), dense(allowed)))
    close(got, layer(params, x_BTD))
