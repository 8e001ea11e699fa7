"""Readers under grad, jvp and vmap, among NaN, at scale, and without jit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_attn import causal, lengths, strict, window
from jax_attn.kernels import blockwise, links
from jax_attn.readers import attention_block, attention_rows, received_mass, top_links
from tests import derivatives_contract, oracle
from tests.attention_cases import FULL, QUICK, Options, Shape, draw
from tests.derivatives_contract import DERIVATIVES, bent

Z = Shape(2, 3, 5, 2, 1, 3, 5)
jit = partial(jax.jit, compiler_options=QUICK)
QUERIES = jnp.asarray(np.random.default_rng(5).normal(size=(Z.B, Z.T, Z.N)), jnp.float32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(links, "GATHERED", 4)
    with blockwise.block_limits((2, 3)):
        yield


def inputs(seed: int = 0) -> dict:
    x = draw(Z, Options(bias=FULL, sinks=True), seed=seed)
    return {name: x[name] for name in ("q", "k", "bias", "sinks")} | {"weight": jnp.float32(0.3)}


def given(x, mask):
    return {
        "mask": mask,
        "bias_BNTS": x["bias"],
        "score": partial(bent, x["weight"]),
        "sinks_N": x["sinks"],
    }


READERS = {
    "rows": lambda x, mask, **more: attention_rows(x["q"], x["k"], rows=[2, 0], **given(x, mask)),
    "block": lambda x, mask: attention_block(
        x["q"], x["k"], queries=(1, 3), keys=(1, 5), **given(x, mask)
    ),
    "links": lambda x, mask: top_links(x["q"], x["k"], k=2, **given(x, mask))[0],
    "mass": lambda x, mask: received_mass(
        x["q"], x["k"], queries_BTN=x.get("queries", QUERIES), **given(x, mask)
    ),
}
# The same of all probabilities [B,N,T,S].
CUTS = {
    "rows": lambda p, x: p[:, :, jnp.array([2, 0])],
    "block": lambda p, x: p[:, :, 1:3, 1:5],
    "links": lambda p, x: -jnp.sort(-p, axis=-1)[..., :2].transpose(0, 2, 1, 3),
    "mass": lambda p, x: jnp.einsum("BNTS,BTN->BSN", p, x["queries"]),
}


def plain(name, x):
    wide = x["q"].dtype
    v = jnp.broadcast_to(jnp.eye(Z.S, dtype=wide)[None, :, None], (Z.B, Z.S, Z.K, Z.S))
    return CUTS[name](derivatives_contract.plain(x | {"v": v}).transpose(0, 2, 1, 3), x)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "gradient") for name in READERS]
    + [pytest.param(name, "jvp", marks=pytest.mark.long) for name in READERS]
    + [
        pytest.param(name, "gradient of gradient", marks=pytest.mark.long)
        for name in ("links", "mass")
    ],
)
def test_derivatives(name: str, kind: str) -> None:
    x, derive = inputs() | {"queries": QUERIES}, DERIVATIVES[kind]
    got = jit(partial(derive, lambda x: READERS[name](x, causal())))(x)
    rough = jit(partial(derive, partial(plain, name)))(x)
    host = jax.device_get(x)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(leaf, jnp.float64) for name, leaf in host.items()}
        exact = jax.device_get(jit(partial(derive, partial(plain, name)))(wide))
    leaves = [jax.tree_util.tree_leaves_with_path(tree) for tree in (got, rough, exact)]
    for (path, a), (_, b), (_, c) in zip(*leaves, strict=True):
        assert np.abs(c).max() > 0 or jax.tree_util.keystr(path) == "['queries']"
        oracle.assert_same(f"{name} {jax.tree_util.keystr(path)}", a, b, c)


@pytest.mark.long
@pytest.mark.parametrize("name", READERS)
def test_vmap(name: str) -> None:
    xs = [inputs(seed) for seed in (1, 2)]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *xs)
    kv_B = np.array([[5, 2], [1, 4]])

    def f(x, kv_B):
        return READERS[name](x, lengths(kv_B=kv_B))

    def both_ways(x, kv_B):
        return f(x, kv_B), jax.grad(lambda x: jnp.sum(jnp.sin(f(x, kv_B))))(x)

    got = jit(jax.vmap(both_ways))(both, kv_B)
    want = [jit(both_ways)(x, n) for x, n in zip(xs, kv_B, strict=True)]
    jax.tree.map(lambda g, *w: derivatives_contract.close(g, jnp.stack(w)), got, *want)


JUNK = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "huge": 3e38}


def value_and_gradients(name, mask, used=None):
    """A jitted reader and the gradients of a loss on what is used of its rows."""

    @jit
    def f(x):
        def loss(x):
            y = READERS[name](x, mask)
            return jnp.sum(jnp.sin(y if used is None else jnp.where(used, y, 0.0))), y

        gradients, y = jax.grad(loss, has_aux=True)(x)
        return y, gradients

    return lambda x: jax.device_get(f(x))


def same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name", READERS)
def test_what_masked_keys_hold_reaches_nothing(name: str) -> None:
    x, kv_B = inputs(), np.array([3, 0])
    f = value_and_gradients(name, lengths(kv_B=kv_B))
    clean = f(x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(clean))
    assert not clean[0][1].any()
    pad = (np.arange(Z.S)[None] >= kv_B[:, None])[..., None, None]
    for junk in JUNK.values():
        same(f(x | {"k": jnp.where(pad, junk, x["k"])}), clean)


@pytest.mark.parametrize("name", READERS)
def test_nan_that_is_attended_is_not_hidden_and_stays_in_its_rows(name: str) -> None:
    x = inputs()
    # With a causal mask key 2 is seen by query 2 alone, and that query sees the keys 0, 1, 2.
    used = {
        "rows": np.array([0, 1])[None, None, :, None],
        "block": np.array([1, 0])[None, None, :, None],
        "links": np.array([1, 1, 0])[None, :, None, None],
        "mass": np.array([0, 0, 0, 1, 1])[None, :, None],
    }[name].astype(bool)
    f = value_and_gradients(name, causal(), used)
    clean, clean_gradients = f(x)
    for which in "qk":
        y, gradients = f(x | {which: x[which].at[:, 2].set(np.nan)})
        same(np.where(used, y, 0.0), np.where(used, clean, 0.0))
        same(gradients, clean_gradients)
        hit = np.isnan(y)
        if name == "rows":
            np.testing.assert_array_equal(
                hit[:, :, 0], np.broadcast_to(np.arange(5) < 3, (2, 2, 5))
            )
        elif name == "block":
            np.testing.assert_array_equal(
                hit[:, :, 1], np.broadcast_to(np.arange(4) < 2, (2, 2, 4))
            )
        assert (hit | used).all() or name in ("rows", "block")
        assert not (hit & used).any()


def test_a_row_that_meets_nan_has_no_links_but_what_is_not_asked_is_left_out() -> None:
    x = inputs()
    x["k"] = x["k"].at[:, 2].set(jnp.nan)
    keys = np.asarray(top_links(x["q"], x["k"], k=2, mask=causal())[1])
    assert (keys[:, 2] == -1).all()
    assert (keys[:, 1] >= 0).all()
    weights_T = jnp.array([1.0, 1.0, 0.0])[None, :, None]
    got = received_mass(x["q"], x["k"], queries_BTN=weights_T, mask=causal())
    want = received_mass(x["q"][:, :2], x["k"], mask=causal())
    same(np.asarray(got), np.asarray(want))
    assert np.isfinite(want).all()
    weights_T = jnp.array([0.0, jnp.nan, 0.0])[None, :, None]
    got = np.isnan(received_mass(x["q"], x["k"], queries_BTN=weights_T, mask=causal()))
    same(got, np.broadcast_to((np.arange(Z.S) < 2)[None, :, None], got.shape))


def test_nan_without_a_mask_is_everywhere_it_is_seen() -> None:
    x = inputs()
    bad = {name: x[name].at[0, 1].set(np.nan) for name in "qk"}
    rows = [np.isnan(attention_rows(bad["q"], x["k"], rows=[1, 2])).all(axis=(1, 3))]
    rows += [np.isnan(attention_rows(x["q"], bad["k"], rows=[1, 2])).all(axis=(1, 3))]
    np.testing.assert_array_equal(rows[0], [[True, False], [False, False]])
    np.testing.assert_array_equal(rows[1], [[True, True], [False, False]])
    mass = received_mass(bad["q"], x["k"])
    np.testing.assert_array_equal(np.isnan(mass).all(axis=(1, 2)), [True, False])


@pytest.mark.parametrize("name", READERS)
def test_rows_without_keys_are_zero(name: str) -> None:
    x = inputs()
    x |= {which: x[which].at[:, ::2].set(np.nan) for which in "qk"}
    y, gradients = value_and_gradients(name, ~window(None))(x)
    assert not y.any()
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))
    if name == "links":
        keys = top_links(x["q"], x["k"], k=2, mask=~window(None))[1]
        assert (np.asarray(keys) == -1).all()


@pytest.mark.long
@pytest.mark.parametrize("name", ["links", "mass", "block"])
@pytest.mark.parametrize("gradient", [False, True])
def test_memory_is_linear_and_the_program_does_not_grow(
    name: str, gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Temporaries double with S up to 16,384, nothing has T·S elements, strict() agrees."""
    read = {
        "links": lambda x: top_links(x, x, k=4, mask=causal())[0],
        "mass": lambda x: received_mass(x, x, mask=causal()),
        "block": lambda x: attention_block(x, x, queries=(9, 400), keys=(0, 300), mask=causal()),
    }[name]
    made = []
    for S in (8192, 16384):
        x_BTNH = jax.ShapeDtypeStruct((1, S, 2, 8), jnp.float32)
        f = jax.grad(lambda x: jnp.sum(jnp.sin(read(x)))) if gradient else read
        monkeypatch.setattr(links, "GATHERED", 512)
        with strict(), blockwise.block_limits(None):
            program = jax.jit(f).lower(x_BTNH).compile()
        text, memory = program.as_text(), program.memory_analysis()
        assert text is not None
        assert memory is not None
        assert f"{S},{S}" not in text
        made.append((memory.temp_size_in_bytes, text.count("\n")))
    (small, short), (large, long) = made
    assert large < 2.2 * small
    assert large < 16384 * 16384
    assert long < 1.1 * short


@pytest.mark.long
@pytest.mark.parametrize("name", READERS)
def test_eager_is_jit(name: str) -> None:
    x = inputs()
    f = partial(READERS[name], mask=causal())
    derivatives_contract.close(f(x), jit(f)(x))
