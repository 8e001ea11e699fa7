"""Rollout, norms of what heads write, and weights times norms, against float64 NumPy."""

from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jax_attn import alibi, causal, lengths, segments, strict, window
from jax_attn.attribution import head_norms, rollout, value_weighted_rows
from jax_attn.kernels import blockwise
from jax_attn.readers import attention_rows
from tests import oracle
from tests.attention_cases import FULL, NOTHING, QUICK, Options, Shape, draw
from tests.derivatives_contract import close

Z = Shape(2, 7, 7, 6, 2, 5, 3)
L, D = 3, 11
jit = partial(jax.jit, compiler_options=QUICK)
PLAIN = jax.jit(oracle.plain, static_argnames=("scale", "softcap"), compiler_options=QUICK)
# name: (mask, pairs [T, S] or [B, 1, T, S], options)
IDS = (np.arange(Z.B)[:, None] + np.arange(Z.T)[None]) // 3
CASES = {
    "none": (None, np.ones((7, 7), bool), Options()),
    "causal": (causal(), np.tri(7, dtype=bool), Options(softcap=2.0, scale=0.8)),
    "window": (window(2, 1), np.tri(7, k=1, dtype=bool) & ~np.tri(7, k=-3, dtype=bool), Options()),
    "segments": (
        causal() & segments(IDS),
        np.tri(7, dtype=bool) & (IDS[:, None, :, None] == IDS[:, None, None]),
        Options(sinks=True),
    ),
    "bias": (causal(), np.tri(7, dtype=bool), Options(bias=FULL, sinks=True)),
}


@pytest.fixture(autouse=True)
def small_blocks():
    with blockwise.block_limits((3, 5)):
        yield


def layers(options: Options = NOTHING, dtype: str = "float32", seed: int = 0) -> dict:
    """Draw L layers; a bias is shared by all."""
    made = [draw(Z, options, dtype, seed + i) for i in range(L)]
    x = {
        name: jnp.stack([m[name] for m in made]) for name in made[0] if name in ("q", "k", "sinks")
    }
    return x | ({"bias": made[0]["bias"]} if options.bias else {})


def rolled(p_LBNTS, rows, residual: float):
    """The paper's formula, with every T x T matrix written out."""
    A_BTS = np.broadcast_to(np.eye(Z.T, dtype=p_LBNTS.dtype), (Z.B, Z.T, Z.T))
    for p_BNTS in p_LBNTS:
        part = p_BNTS.dtype.type(residual) * np.eye(Z.T, dtype=p_BNTS.dtype)
        A_BTS = (part + p_BNTS.dtype.type(1 - residual) * p_BNTS.mean(axis=1)) @ A_BTS
    return A_BTS[:, rows]


def probabilities(x: dict, pairs: np.ndarray, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Return p of all layers, [L,B,N,T,S], exact and by the plain formula in float32."""
    eye = np.broadcast_to(np.eye(Z.S, dtype=np.float32)[None, :, None], (Z.B, Z.S, Z.K, Z.S))
    exact, plain = [], []
    for i in range(L):
        one = {name: x[name][i] for name in ("q", "k", "sinks") if name in x}
        bias = x.get("bias", jnp.zeros((1, 1, 1, 1)))
        made = oracle.attend(
            np.asarray(one["q"], np.float64),
            np.asarray(one["k"], np.float64),
            eye,
            mask=pairs,
            bias=np.asarray(bias, np.float64),
            sinks=one.get("sinks"),
            scale=options.scale,
            softcap=options.softcap,
        )
        given = {"scale": options.scale, "softcap": options.softcap, "sinks": one.get("sinks")}
        rank = pairs if pairs.ndim == 4 else pairs[None, None]
        rough = PLAIN(one["q"], one["k"], jnp.asarray(eye), mask=rank, bias=bias, **given)
        exact.append(made.p)
        plain.append(np.moveaxis(np.asarray(rough), 1, 2))
    return np.stack(exact), np.stack(plain)


@pytest.mark.few(3)
@pytest.mark.parametrize("case", CASES)
def test_rollout_is_the_product_of_the_layers(case: str) -> None:
    mask, pairs, options = CASES[case]
    x, rows, residual = layers(options), [6, 0, 3], 0.3

    @jit
    def run(x):
        return rollout(
            x["q"],
            x["k"],
            rows=rows,
            residual=residual,
            mask=mask,
            bias_BNTS=x.get("bias"),
            sinks_LN=x.get("sinks"),
            scale=options.scale,
            softcap=options.softcap,
        )

    exact, plain = probabilities(x, pairs, options)
    want = rolled(exact, rows, residual)
    oracle.assert_same("rollout", run(x), rolled(plain, rows, residual), want)
    assert (want.sum(axis=-1) < 0.99).any() == options.sinks


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_rollout_in_other_dtypes(dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        x = layers(dtype=dtype)
        got = jit(lambda x: rollout(x["q"], x["k"], rows=[5, 2], mask=causal()))(x)
        assert got.dtype == jnp.promote_types(dtype, jnp.float32)
        exact, plain = probabilities(x, np.tri(7, dtype=bool), NOTHING)
        oracle.assert_same("out", got, rolled(plain, [5, 2], 0.5), rolled(exact, [5, 2], 0.5))


def test_rollout_sums_to_one_and_ends_where_it_should() -> None:
    x = layers()
    roll = jit(lambda rows, residual: rollout(x["q"], x["k"], rows=rows, residual=residual))
    close(roll(jnp.arange(7), 0.5).sum(axis=-1), np.ones((2, 7), np.float32))
    np.testing.assert_array_equal(roll(jnp.array([4]), 1.0), np.eye(7)[None, [4]].repeat(2, 0))
    one = rollout(x["q"][:1], x["k"][:1], rows=4, residual=0.0, mask=causal())
    mean = attention_rows(x["q"][0], x["k"][0], rows=4, mask=causal()).mean(axis=1)
    close(one, mean)
    assert np.isnan(roll(jnp.array([-1, 7]), 0.5)).all()
    empty = rollout(x["q"][:0], x["k"][:0], rows=[2, 3])
    np.testing.assert_array_equal(empty, np.eye(7)[None, 2:4].repeat(2, 0))


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(seed=st.integers(0, 99), residual=st.floats(0.0, 1.0, width=32))
def test_rollout_of_causal_layers(seed: int, residual: float) -> None:
    x = layers(seed=3 * seed)
    got = np.asarray(ROLL(x, residual))
    exact, plain = probabilities(x, np.tri(7, dtype=bool), NOTHING)
    rows = range(7)
    oracle.assert_same("out", got, rolled(plain, rows, residual), rolled(exact, rows, residual))
    assert not np.triu(got, 1).any()
    assert (got >= 0).all()


@jit
def ROLL(x, residual):
    return rollout(x["q"], x["k"], rows=range(7), residual=residual, mask=causal())


def test_nan_of_later_tokens_stays_there() -> None:
    x = layers()
    clean = np.asarray(ROLL(x, 0.5))
    for name in "qk":
        for layer in range(L):
            bad = x | {name: x[name].at[layer, :, 5].set(np.nan)}
            got = np.asarray(ROLL(bad, 0.5))
            np.testing.assert_array_equal(got[:, :5], clean[:, :5])
            assert np.isnan(got[:, 5]).any()
            assert not np.isnan(np.triu(got, 1)).any()
    padded = {name: x[name].at[:, :, 4:].set(np.nan) for name in "qk"}
    mask = lengths(np.array([4, 4]), np.array([4, 4]))
    got = rollout(padded["q"], padded["k"], rows=range(7), mask=mask)
    want = rollout(x["q"][:, :, :4], x["k"][:, :, :4], rows=range(4))
    close(got[:, :4, :4], want)
    # A token that attends to nothing keeps its residual share alone.
    np.testing.assert_array_equal(got[:, 4:], 0.5**L * np.eye(7)[None, 4:].repeat(2, 0))


@pytest.mark.long
def test_gradient_of_rollout() -> None:
    x = layers() | {"residual": jnp.float32(0.4), "slope": jnp.full((Z.N,), 0.3)}

    def ours(x):
        score = alibi(x["slope"])
        options = {"rows": [5, 2], "residual": x["residual"], "mask": causal(), "score": score}
        return rollout(x["q"], x["k"], **options)

    def plain(x):
        dtype, distance = x["q"].dtype, abs(np.arange(7)[:, None] - np.arange(7)[None])
        A_BTS = jnp.broadcast_to(jnp.eye(7, dtype=dtype), (Z.B, 7, 7))
        for q, k in zip(x["q"], x["k"], strict=True):
            k_BSNH = jnp.repeat(k, Z.N // Z.K, axis=2)
            s_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q, k_BSNH) * Z.H**-0.5
            s_BNTS = s_BNTS - x["slope"][None, :, None, None] * distance[None, None]
            p_BNTS = jax.nn.softmax(jnp.where(np.tri(7, dtype=bool)[None, None], s_BNTS, -1e30))
            mixed = x["residual"] * jnp.eye(7, dtype=dtype)[None]
            A_BTS = (mixed + (1 - x["residual"]) * p_BNTS.mean(axis=1)) @ A_BTS
        return A_BTS[:, jnp.array([5, 2])]

    def derive(f):
        return jit(jax.grad(lambda x: jnp.sum(jnp.sin(3.0 * f(x)))))

    got, rough, host = derive(ours)(x), derive(plain)(x), jax.device_get(x)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(leaf, jnp.float64) for name, leaf in host.items()}
        exact = jax.device_get(derive(plain)(wide))
    for name in x:
        assert np.abs(exact[name]).max() > 0
        oracle.assert_same(name, got[name], rough[name], exact[name])


@pytest.mark.long
def test_memory_of_rollout_is_linear_and_the_program_does_not_grow() -> None:
    made = []
    for layers, S in ((2, 4096), (2, 8192), (5, 4096)):
        x = jax.ShapeDtypeStruct((layers, 1, S, 2, 8), jnp.float32)
        with strict(), blockwise.block_limits(None):
            lowered = jax.jit(partial(rollout, rows=[3, 1, 5], mask=causal())).lower(x, x)
        program = lowered.compile()
        text, memory = program.as_text(), program.memory_analysis()
        assert text is not None
        assert memory is not None
        assert f"{S},{S}" not in text
        made.append((memory.temp_size_in_bytes, text.count("\n")))
    (small, short), (large, long), (deep, deeper) = made
    assert large < 2.2 * small
    assert long < 1.1 * short
    assert deep < 1.1 * small
    assert deeper < 1.1 * short


def plain_norms(x, wo):
    """‖x_n Wo_n‖ in the dtype of the arguments; x has a head for each of Wo."""
    return np.sqrt(np.square(np.einsum("BTNE,NED->BTND", x, wo)).sum(axis=-1))


@pytest.mark.parametrize("K", [6, 2, 1])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_head_norms(K: int, dtype: str) -> None:
    rng = np.random.default_rng(2)
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(rng.normal(size=(2, 7, K, 3)), dtype)
        wo = jnp.asarray(rng.normal(size=(6, 3, D)), dtype)
        got = jit(head_norms)(x, wo)
        assert got.dtype == jnp.promote_types(dtype, jnp.float32)
        every = np.repeat(np.asarray(x, np.float64), 6 // K, axis=2)
        exact = plain_norms(every, np.asarray(wo, np.float64))
        plain = plain_norms(every.astype(got.dtype), np.asarray(wo, got.dtype))
        oracle.assert_same("norms", got, plain, exact)


def test_head_norms_of_nothing_have_gradient_zero_and_hold_one_head_at_a_time() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 3)), jnp.float32)
    x = x.at[:, 2].set(0.0)
    wo = jnp.ones((2, 3, D))
    value, (dx, dwo) = jax.value_and_grad(lambda *a: head_norms(*a).sum(), argnums=(0, 1))(x, wo)
    assert np.isfinite(value)
    assert not dx[:, 2].any()
    # d‖x Wo‖/dx = y Wo^T / ‖y‖
    y = np.einsum("BTNE,NED->BTND", x, wo)
    y = y / np.maximum(np.linalg.norm(y, axis=-1, keepdims=True), 1e-30)
    close(dx, np.einsum("BTND,NED->BTNE", y, wo))
    close(dwo, np.einsum("BTND,BTNE->NED", y, x))
    big = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 512, 16, 8), (16, 8, 64)))
    program = jax.jit(jax.grad(lambda *a: head_norms(*a).sum(), argnums=(0, 1))).lower(*big)
    memory = program.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 512 * 16 * 64 * 4


def test_value_weighted_rows_are_weights_times_norms() -> None:
    x = draw(Z)
    wo = jnp.asarray(np.random.default_rng(2).normal(size=(Z.N, Z.E, D)), jnp.float32)
    rows, heads = [6, 1], [4, 0, 5]

    def f(v, wo):
        given = {"rows": rows, "heads": heads, "mask": causal()}
        return value_weighted_rows(x["q"], x["k"], v, wo, **given)

    p = attention_rows(x["q"], x["k"], rows=rows, heads=heads, mask=causal())
    norms = np.moveaxis(np.asarray(head_norms(x["v"], wo)), 2, 1)[:, heads]
    got = f(x["v"], wo)
    close(got, np.asarray(p) * norms[:, :, None])
    assert (np.asarray(got)[:, :, 0] > 0).all()
    # Key 5 is seen by row 6 and not by row 1.
    bad = np.asarray(f(x["v"].at[:, 5].set(np.nan), wo))
    np.testing.assert_array_equal(bad[:, :, 1], np.asarray(got)[:, :, 1])
    np.testing.assert_array_equal(
        np.isnan(bad[:, :, 0]), np.broadcast_to(np.arange(7) == 5, (2, 3, 7))
    )
    whole = value_weighted_rows(x["q"], x["k"], x["v"], wo, rows=rows, mask=causal())
    close(whole[:, jnp.array(heads)], got)

    def loss(v, wo):
        return jnp.sum(f(v, wo)[:, :, 1])

    v = x["v"].at[:, 5].set(np.nan)
    for ours, want in zip(*(jax.grad(loss, (0, 1))(v, wo) for v in (v, x["v"])), strict=True):
        np.testing.assert_array_equal(ours, want)
