"""Second-pass readers against the float64 oracle: its probabilities, cut, sorted and added up."""

from functools import lru_cache, partial
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jax_attn import Mask, alibi, causal, dense, dense_weights, lengths, segments, window
from jax_attn.kernels import blockwise, links
from jax_attn.readers import attention_block, attention_rows, received_mass, top_links
from tests import oracle
from tests.attention_cases import (
    FULL,
    MASKS,
    NOTHING,
    QUICK,
    SHAPES,
    Options,
    Shape,
    allowed,
    distances,
    draw,
    slopes,
)
from tests.derivatives_contract import close

OPTIONS = {
    "nothing": NOTHING,
    "sinks": Options(sinks=True, q_offset=2),
    "bias, scale, softcap": Options(bias=FULL, scale=1.3, softcap=2.0),
    "bias of a head": Options(bias=(0, 1, 0, 0), sinks=True),
    "alibi, bias of a key": Options(bias=(1, 0, 0, 1), slopes=True, q_offset=4),
    "all": Options(FULL, True, 3.0, 0.7, True, 0.0, 3),
}
Z = SHAPES["gqa"]
DTYPES = ("float64", "float32", "bfloat16", "float16")
jit = partial(jax.jit, compiler_options=QUICK)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    """Blocks of 3 queries by 5 keys: every size is padded, every mask has blocks of each kind."""
    monkeypatch.setattr(links, "GATHERED", 9)
    with blockwise.block_limits((3, 5)):
        yield


def chosen(z: Shape) -> dict[str, Any]:
    """What is read of a shape: rows and heads out of order, a tile inside, three links."""
    return {
        "rows": np.array([z.T - 1, 0, z.T // 2]),
        "heads": [z.N - 1, 0],
        "queries": (z.T // 3, z.T - z.T // 5),
        "keys": (z.S // 4, z.S - z.S // 5),
        "k": min(3, z.S),
    }


def weights_of_queries(z: Shape) -> jax.Array:
    return jnp.asarray(np.random.default_rng(5).normal(size=(z.B, z.T, z.N)), jnp.float32)


@lru_cache
def read(z: Shape, options: Options, traced_offset: bool = False):
    """Return a jitted (inputs, mask, q_offset) -> what every reader gives."""
    pick = chosen(z)

    @jit
    def run(x, mask, q_offset):
        q, k = x["q"], x["k"]
        given = {
            "mask": mask,
            "bias_BNTS": x.get("bias"),
            "score": alibi(jnp.asarray(slopes(z), jnp.float32)) if options.slopes else None,
            "scale": options.scale,
            "softcap": options.softcap,
            "sinks_N": x.get("sinks"),
            "q_offset": q_offset if traced_offset else options.q_offset,
        }
        made = {
            "rows": attention_rows(q, k, rows=pick["rows"], heads=pick["heads"], **given),
            "block": attention_block(q, k, queries=pick["queries"], keys=pick["keys"], **given),
            "mass": received_mass(q, k, queries_BTN=weights_of_queries(z), **given),
        }
        if z.S:
            made["weights"], made["keys"] = top_links(q, k, k=pick["k"], **given)
        return made

    return run


def probabilities(x: dict, z: Shape, options: Options, pairs: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return exact p, that of the plain formula, and the floor of the budget, [B,N,T,S] each."""
    wide = jnp.promote_types(x["q"].dtype, jnp.float32)
    added = distances(z, options.q_offset) if options.slopes else np.zeros((1, 1, 1, 1))
    v = np.broadcast_to(np.eye(z.S)[None, :, None], (z.B, z.S, z.K, z.S))
    q, k = (np.asarray(x[name], np.float64) for name in "qk")
    exact = oracle.attend(
        q,
        k,
        v,
        mask=pairs,
        bias=np.asarray(x.get("bias", 0.0), np.float64) + added,
        sinks=np.asarray(x["sinks"], np.float64) if options.sinks else None,
        scale=options.scale,
        softcap=options.softcap,
        q_offset=options.q_offset,
        dtype=wide,
    )
    plain = PLAIN(
        x["q"],
        x["k"],
        jnp.asarray(v, wide),
        mask=pairs,
        bias=x.get("bias", jnp.zeros((1, 1, 1, 1))).astype(wide) + added.astype(wide),
        sinks=x.get("sinks"),
        scale=options.scale,
        softcap=options.softcap,
    )
    made = (exact.out, np.asarray(plain, np.float64), exact.floors["out"])
    return tuple(np.moveaxis(y, 1, 2) for y in made)


PLAIN = jax.jit(oracle.plain, static_argnames=("scale", "softcap"), compiler_options=QUICK)


def compare(got: dict, z: Shape, p: tuple[np.ndarray, ...], pairs: np.ndarray) -> None:
    """Hold every reader against the probabilities (exact, plain, floor)."""
    exact, plain, floor = p
    pick = chosen(z)
    (t0, t1), (s0, s1), rows = pick["queries"], pick["keys"], pick["rows"]
    parts = {
        "rows": lambda y: y[:, pick["heads"]][:, :, rows],
        "block": lambda y: y[:, :, t0:t1, s0:s1],
    }
    for name, part in parts.items():
        oracle.assert_within(name, got[name], part(plain), part(exact), part(floor))
        assert not (np.asarray(got[name]) * ~part(pairs)).any(), f"{name}: masked pairs"
    w_BTN = np.asarray(weights_of_queries(z), np.float64)
    plain_BSN, exact_BSN = (np.einsum("BNTS,BTN->BSN", y_BNTS, w_BTN) for y_BNTS in (plain, exact))
    floor_BSN = np.einsum("BNTS,BTN->BSN", floor, abs(w_BTN))
    oracle.assert_within("mass", got["mass"], plain_BSN, exact_BSN, floor_BSN)
    if z.S:
        compare_links(got["weights"], got["keys"], p, pairs, pick["k"])


def compare_links(weights, keys, p, pairs, k: int) -> None:
    exact, plain, floor = (np.swapaxes(y, 1, 2) for y in p)
    pairs, weights, keys = np.swapaxes(pairs, 1, 2), np.asarray(weights), np.asarray(keys)
    there = keys >= 0
    count = np.minimum(pairs.sum(axis=-1), k)
    np.testing.assert_array_equal(there, np.arange(k) < count[..., None])
    assert keys.dtype == np.int32
    assert np.isin(keys[~there], -1).all()
    assert not weights[~there].any()
    assert (weights[..., :-1] >= weights[..., 1:]).all()
    at = np.maximum(keys, 0)
    assert np.take_along_axis(pairs, at, -1)[there].all(), "a masked pair is a link"
    for row in keys.reshape(-1, k):
        assert len(set(row[row >= 0])) == (row >= 0).sum(), "a key is there twice"
    exact_at, plain_at, floor_at = (
        np.where(there, np.take_along_axis(y, at, -1), 0.0) for y in (exact, plain, floor)
    )
    oracle.assert_within("weights", weights, plain_at, exact_at, floor_at)
    best = -np.sort(-exact, axis=-1)[..., :k]
    oracle.assert_within("largest", weights, plain_at + best - exact_at, best, floor_at)


def check(
    shape: str, mask: str, options: Options, dtype: str = "float32", seed: int = 0, traced=False
) -> None:
    z = SHAPES[shape]
    with jax.enable_x64(dtype == "float64"):
        x = inputs(z, options, dtype, seed)
        pairs, spec = allowed(mask, z, options.q_offset), MASKS[mask][0](z)
        run = read(z, options._replace(q_offset=0) if traced else options, traced)
        got = run(x, dense(pairs) if traced else spec, options.q_offset)
        for name, leaf in got.items():
            assert name == "keys" or leaf.dtype == jnp.promote_types(dtype, jnp.float32)
        compare(got, z, probabilities(x, z, options, pairs), pairs)


@pytest.mark.long
@pytest.mark.parametrize("mask", ["none", "causal", "packed", "lengths", "not", "nothing"])
def test_masks(mask: str) -> None:
    check("mha", mask, OPTIONS["sinks"])


@pytest.mark.long
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str) -> None:
    check("gqa", "causal", OPTIONS[options])


@pytest.mark.parametrize("shape", ["T1", "S1", "S0", "ones"])
def test_shapes(shape: str) -> None:
    check(shape, "where" if shape == "T1" else "none", OPTIONS["all"])


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: str) -> None:
    check("mqa", "prefix_lm", OPTIONS["all"]._replace(q_offset=1), dtype)


@pytest.mark.long
@pytest.mark.parametrize("mask", ["causal", "none"])
def test_one_block(mask: str) -> None:
    with blockwise.block_limits(None):
        check("mha", mask, OPTIONS["all"])


@pytest.mark.long
def test_batch_and_heads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU or TPU; the scale is one that no other test has compiled for."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    check("gqa", "packed", OPTIONS["all"]._replace(scale=0.9))


@hypothesis.settings(
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ]
)
@hypothesis.given(
    dtype=st.sampled_from(["float32", "bfloat16"]),
    q_offset=st.integers(-2, 12),
    rule=st.sampled_from(sorted(MASKS)),
    seed=st.integers(0, 999),
)
def test_any_case(dtype: str, q_offset: int, rule: str, seed: int) -> None:
    """Masks come written out and the offset traced, so that two programs serve all."""
    check("gqa", rule, OPTIONS["all"]._replace(q_offset=q_offset), dtype, seed, traced=True)


def inputs(z: Shape = Z, options: Options = NOTHING, dtype: str = "float32", seed: int = 0) -> dict:
    made = draw(z, options, dtype, seed)
    return {name: x for name, x in made.items() if name not in ("v", "cotangent")}


def test_of_equal_weights_the_first_keys_are_taken() -> None:
    q, k = jnp.zeros((1, 7, 1, 3)), jnp.ones((1, 13, 1, 3))
    weights, keys = top_links(q, k, k=6)
    assert (np.asarray(weights) == np.float32(1 / 13)).all()
    np.testing.assert_array_equal(keys, np.broadcast_to(np.arange(6), (1, 7, 1, 6)))
    # A larger one late, behind a block that needs no mask and one that does.
    bias = jnp.zeros((1, 1, 1, 13)).at[..., 9].set(2.0)
    mask = ~window(0)
    keys = np.asarray(top_links(q, k, k=4, mask=mask, bias_BNTS=bias)[1])[0, :, 0]
    for t, row in enumerate(keys):
        assert row.tolist() == [9] + [s for s in range(5) if s != t][:3]


TILES = [((0, 5), (0, 13)), ((1, 4), (2, 6)), ((2, 3), (3, 13)), ((3, 5), (3, 5)), ((1, 3), (2, 2))]
TILES += [((2, 2), (0, 3))]


def test_every_key_may_be_a_link() -> None:
    """As many links as keys, more than a block holds."""
    x = inputs()
    weights, keys = top_links(x["q"], x["k"], k=Z.S)
    assert (np.sort(keys, axis=-1) == np.arange(Z.S)).all()
    assert (weights[..., :-1] >= weights[..., 1:]).all()
    close(weights.sum(axis=-1), np.ones((Z.B, Z.T, Z.N), np.float32))


@pytest.mark.long
@pytest.mark.parametrize(
    "mask",
    [
        segments(np.arange(Z.T)[None] // 2, np.arange(Z.S)[None] // 3),
        lengths(np.array([2, 4]), np.array([3, 9])) & causal(),
    ],
    ids=["segments", "lengths"],
)
def test_a_tile_is_the_rows_cut(mask: Mask) -> None:
    """Any tile, of masks that read the query's index and not its position."""
    x, given = inputs(), {"mask": mask, "q_offset": 3}
    whole = attention_rows(x["q"], x["k"], rows=range(Z.T), **given)
    for queries, keys in TILES:
        got = attention_block(x["q"], x["k"], queries=queries, keys=keys, **given)
        want = whole[:, :, slice(*queries), slice(*keys)]
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=0, atol=8 * 1.2e-7)


def test_rows_may_be_traced_and_then_miss() -> None:
    x = inputs()

    @jit
    def f(rows, heads):
        return attention_rows(x["q"], x["k"], rows=rows, heads=heads, mask=causal())

    want = attention_rows(x["q"], x["k"], rows=[4, 2], heads=[5, 3], mask=causal())
    np.testing.assert_allclose(f(jnp.array([4, 2]), jnp.array([5, 3])), want, atol=8 * 1.2e-7)
    got = np.asarray(f(jnp.array([-1, 4, 5, 1]), jnp.array([5, 6])))
    np.testing.assert_array_equal(np.isnan(got).any(axis=(0, 3)), [[1, 0, 1, 0], [1, 1, 1, 1]])
    one = attention_rows(x["q"], x["k"], rows=jnp.int32(4), heads=5, mask=causal())
    np.testing.assert_allclose(one, want[:, :1, :1], atol=8 * 1.2e-7)
    assert attention_rows(x["q"], x["k"], rows=[]).shape == (2, 6, 0, 13)


@pytest.mark.long
def test_what_is_received_adds_up_to_the_queries() -> None:
    x = inputs(options=OPTIONS["sinks"])
    mass = received_mass(x["q"], x["k"], mask=causal() & lengths(np.array([3, 5])))
    np.testing.assert_allclose(mass.sum(axis=1)[0], np.full(Z.N, 3.0), rtol=8 * 1.2e-7)
    np.testing.assert_allclose(mass.sum(axis=1)[1], np.full(Z.N, 5.0), rtol=8 * 1.2e-7)
    less = received_mass(x["q"], x["k"], sinks_N=x["sinks"])
    assert (less.sum(axis=1) < 5.0).all()
    of_head = received_mass(x["q"], x["k"], queries_BTN=jnp.arange(6.0)[None, None], mask=causal())
    want = received_mass(x["q"], x["k"], mask=causal()) * jnp.arange(6.0)[None, None]
    np.testing.assert_allclose(of_head, want, rtol=8 * 1.2e-7)


@pytest.mark.long
@pytest.mark.parametrize("T", [17, 37])
def test_links_have_as_many_rows_as_there_are_queries(T: int) -> None:
    """More than 16, of which blocks hold multiples."""
    rng = np.random.default_rng(3)
    q_BTNH, k_BSNH = (jnp.asarray(rng.normal(size=(1, T, 1, 3)), jnp.float32) for _ in range(2))

    def strongest(q_BTNH, k_BSNH):
        return top_links(q_BTNH, k_BSNH, k=1)[0]

    def largest(q_BTNH, k_BSNH):
        return dense_weights(q_BTNH, k_BSNH).max(axis=-1).transpose(0, 2, 1)[..., None]

    got, want = (jax.vjp(f, q_BTNH, k_BSNH) for f in (strongest, largest))
    assert got[0].shape == (1, T, 1, 1)
    jax.tree.map(close, got[0], want[0])
    ones = jnp.ones_like(got[0])
    jax.tree.map(close, got[1](ones), want[1](ones))


@pytest.mark.long
def test_gradient_of_links_is_that_of_their_pairs() -> None:
    """In grouped heads, of several groups of rows, against the rows written out."""
    more = {"mask": causal(), "scale": 0.7, "softcap": 3.0, "q_offset": 3}
    more["score"] = alibi(jnp.asarray(slopes(Z), jnp.float32))

    def given(x):
        return {"bias_BNTS": x["bias"], "sinks_N": x["sinks"]} | more

    def of_links(x):
        weights, keys = top_links(x["q"], x["k"], k=3, **given(x))
        return jnp.sum(jnp.sin(weights)), keys

    def of_rows(x, keys):
        p_BNTS = attention_rows(x["q"], x["k"], rows=range(Z.T), **given(x))
        p_BTNS = p_BNTS.transpose(0, 2, 1, 3)
        return jnp.sum(jnp.sin(jnp.take_along_axis(p_BTNS, keys, axis=-1)))

    with jax.enable_x64(True):
        x = inputs(options=OPTIONS["all"], dtype="float64")
        got, keys = jit(jax.grad(of_links, has_aux=True))(x)
        assert (np.asarray(keys) >= 0).all()
        jax.tree.map(close, got, jit(jax.grad(of_rows))(x, keys))
