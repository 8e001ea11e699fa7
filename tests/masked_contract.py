"""What masked keys, values and queries hold reaches nothing; what attended ones hold shows."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_attn import causal, dense, dot_product_attention, lengths, prefix, window
from tests.attention_cases import FULL, KEY, QUICK, Options, Shape, draw

JUNK = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "huge": 3e38}
Z = Shape(2, 7, 7, 6, 2, 5, 3)
ALL_ROWS = np.ones((Z.B, Z.T), bool)


def same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def zero(tree):
    for leaf in jax.tree.leaves(tree):
        np.testing.assert_array_equal(np.asarray(leaf, np.float64), 0.0)


def finite(tree):
    assert all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(tree))


class Masked:
    implementation: str
    everything = Options(bias=FULL, sinks=True, softcap=2.0)

    def run(self, x, mask, use=ALL_ROWS, *, options=None):
        """Return output, gradients of a loss on the used rows [B,T], and the output's tangent."""
        options = self.everything if options is None else options
        return _run(x, mask, jnp.asarray(use), self.implementation, options.softcap, options.rate)

    @pytest.mark.parametrize("junk", JUNK)
    def test_causal_rows_do_not_see_later_junk(self, junk):
        x = draw(Z, self.everything)
        use = np.broadcast_to(np.arange(Z.T) < Z.T - 1, (Z.B, Z.T))
        clean = self.run(x, causal(), use)
        bad = x | {name: x[name].at[:, -1].set(JUNK[junk]) for name in "kv"}
        got = self.run(bad, causal(), use)
        same(got.out[:, :-1], clean.out[:, :-1])
        same(got.gradients, clean.gradients)
        same(got.tangent[:, :-1], clean.tangent[:, :-1])
        finite((clean, got.gradients))
        if junk == "nan":
            assert np.isnan(got.out[:, -1]).all()

    @pytest.mark.parametrize("junk", JUNK)
    @pytest.mark.parametrize("rate", [0.0, 0.4])
    def test_padding_does_not_matter(self, junk, rate):
        options = self.everything._replace(rate=rate)
        x = draw(Z, options)
        q_B, kv_B = np.array([3, 7]), np.array([5, 0])
        real = {"q": q_B, "k": kv_B, "v": kv_B}
        pad = {n: (np.arange(7)[None] >= at[:, None])[..., None, None] for n, at in real.items()}
        clean = self.run(x, lengths(q_B, kv_B), options=options)
        bad = x | {name: jnp.where(pad[name], JUNK[junk], x[name]) for name in pad}
        got = self.run(bad, lengths(q_B, kv_B), options=options)
        same(got, clean)
        finite(got)
        zero((got.out[0, 3:], got.out[1]))
        zero([np.where(where, got.gradients[name], 0.0) for name, where in pad.items()])

    @pytest.mark.parametrize("name", ["no option", "every option"])
    def test_fully_masked_rows_are_zero_with_zero_gradients(self, name):
        options = self.everything if name == "every option" else Options()
        x = draw(Z, options)
        x |= {name: x[name].at[:, ::2].set(np.nan) for name in "qkv"}
        zero(self.run(x, ~window(None), options=options))

    def test_rows_masked_in_one_head_alone(self):
        x = draw(Z, self.everything)
        allowed = np.ones((1, Z.N, 1, 1), bool)
        allowed[:, 4] = False
        got = self.run(x, dense(allowed))
        zero((got.out[:, :, 4], got.gradients["q"][:, :, 4], got.gradients["bias"][:, 4]))
        zero(got.gradients["sinks"][4])
        assert (np.abs(got.out[:, :, 3]) > 0).all()
        finite(got)

    @pytest.mark.parametrize("name", ["q", "k", "v"])
    @pytest.mark.parametrize("masked", [False, True])
    def test_nan_that_is_attended_is_not_hidden(self, name, masked):
        x = draw(Z)
        x[name] = x[name].at[1, 2].set(np.nan)
        got = self.run(x, prefix(3) if masked else None)
        hit = np.zeros((Z.B, Z.T), bool)
        hit[1] = np.arange(Z.T) == 2 if name == "q" else True
        assert np.isnan(got.out[hit]).all()
        finite(got.out[~hit])

    def test_nan_in_one_kv_head_stays_in_its_query_heads(self):
        x = draw(Z)
        x["k"] = x["k"].at[:, 0, 1].set(np.nan)
        got = self.run(x, causal())
        finite(got.out[:, :, :3])
        assert np.isnan(got.out[:, :, 3:]).all()

    def test_bias_of_minus_inf_is_a_mask(self):
        x = draw(Z, Options(bias=FULL))
        allowed = np.random.default_rng(3).random((Z.B, Z.N, Z.T, Z.S)) < 0.5
        allowed[0, 1, 2] = allowed[1, :, 4] = False
        want = self.run(x, dense(allowed))
        got = self.run(x | {"bias": jnp.where(allowed, x["bias"], -np.inf)}, None)
        same(got.out == 0.0, want.out == 0.0)
        zero((got.out[0, 2, 1], got.out[1, 4], np.where(allowed, 0.0, got.gradients["bias"])))
        finite(got)
        # Two programs of the same formula may round differently, by a few units of the largest.
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=8 * 1.2e-7 * np.abs(b).max())

    def test_sink_of_minus_inf_is_no_sink(self):
        x = draw(Z)
        want, got = self.run(x, causal()), self.run(x | {"sinks": NO_SINKS}, causal())
        zero(got.gradients.pop("sinks"))
        np.testing.assert_allclose(got.out, want.out, rtol=0, atol=8 * 1.2e-7 * 4)
        finite(got)

    def test_gradient_of_the_future_is_exactly_zero(self):
        x = draw(Z)
        for t in (0, 3):
            use = np.broadcast_to(np.arange(Z.T) == t, (Z.B, Z.T))
            got = self.run(x, causal(), use).gradients
            zero([got[name][:, t + 1 :] for name in "qkv"] + [got["q"][:, :t]])
            assert (np.abs(got["v"][:, : t + 1]) > 0).all()


NO_SINKS = np.full((Z.N,), -np.inf, np.float32)


class Out(NamedTuple):
    out: np.ndarray
    gradients: dict[str, np.ndarray]
    tangent: np.ndarray


def _run(x, mask, use, implementation, softcap, rate):
    x = {name: leaf for name, leaf in x.items() if name != "cotangent"}
    return Out(*jax.device_get(_jitted(x, mask, use, implementation, softcap, rate)))


@partial(jax.jit, static_argnums=(3, 4, 5), compiler_options=QUICK)
def _jitted(x, mask, use, implementation, softcap, rate):
    def f(x):
        return dot_product_attention(
            x["q"],
            x["k"],
            x["v"],
            mask=mask,
            bias_BNTS=x.get("bias"),
            sinks_N=x.get("sinks"),
            softcap=softcap,
            dropout_rate=rate,
            dropout_key=jax.random.key(KEY) if rate else None,
            implementation=implementation,
        )

    def loss(x):
        out = f(x)
        return jnp.sum(jnp.sin(jnp.where(use[:, :, None, None], out, 0.0))), out

    gradients, out = jax.grad(loss, has_aux=True)(x)
    tangent = jax.jvp(f, (x,), (jax.tree.map(jnp.ones_like, x),))[1]
    return out, gradients, tangent
