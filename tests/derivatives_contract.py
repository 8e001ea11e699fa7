"""Derivatives of every kind, on tiny sizes, against the plain formula in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_attn import causal, dot_product_attention, lengths
from tests import oracle
from tests.attention_cases import QUICK, Options, Shape, draw

Z = Shape(2, 3, 5, 2, 1, 3, 2)
jit = partial(jax.jit, compiler_options=QUICK)
ALLOWED = np.tril(np.ones((Z.T, Z.S), bool))[None, None]


def bend(weight, logits):
    """A score that is not linear and closes over a parameter."""
    return logits + weight * jnp.sin(logits)


def bent(weight, logits, b, n, t, s):
    return bend(weight, logits)


def plain(x):
    """The oracle's dense formula, but with the score in between."""
    wide = jnp.promote_types(x["q"].dtype, jnp.float32)
    k, v = (jnp.repeat(x[name], Z.N // Z.K, axis=2) for name in "kv")
    s = jnp.einsum("BTNH,BSNH->BNTS", x["q"], k, preferred_element_type=wide) * Z.H**-0.5
    s = jnp.where(ALLOWED, bend(x.get("weight", 0.0), s + x.get("bias", jnp.zeros_like(s))), -1e30)
    sink = jnp.broadcast_to(x["sinks"][None, :, None, None], (Z.B, Z.N, Z.T, 1))
    p = jax.nn.softmax(jnp.concatenate([s, sink], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("BNTS,BSNE->BTNE", p, v)


def scalar(f, x):
    return jnp.sum(jnp.sin(f(x)))


def gradient_norm(f, x):
    return sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(jax.grad(partial(scalar, f))(x)))


def tangents(f, x):
    direction = {name: jnp.cos(3.0 * leaf) for name, leaf in x.items()}
    return jax.jvp(f, (x,), (direction,))[1]


def hessian(f, x):
    """Of q, bias, sinks and the score's weight; one batch entry is enough."""

    def some(y):
        return scalar(f, x | y)

    return jax.hessian(some)({name: x[name] for name in ("q", "sinks", "weight") if name in x})


DERIVATIVES = {
    "gradient": lambda f, x: jax.grad(partial(scalar, f))(x),
    "jvp": tangents,
    "gradient of gradient": lambda f, x: jax.grad(partial(gradient_norm, f))(x),
    "hessian": hessian,
}


class Derivatives:
    implementation: str
    # What a kernel does not offer; it must raise then, and a subclass tests that it does.
    lacks: tuple[str, ...] = ()
    takes_bias_and_score = True

    def attend(self, x, mask=None, **options):
        return dot_product_attention(
            x["q"], x["k"], x["v"], mask=mask, implementation=self.implementation, **options
        )

    @pytest.mark.few(2)
    @pytest.mark.parametrize("kind", DERIVATIVES)
    def test_derivatives(self, kind):
        if kind in self.lacks:
            pytest.skip(f"{self.implementation} has no {kind}")
        x = draw(Z, Options(bias=(1, 1, 1, 1) if self.takes_bias_and_score else None, sinks=True))
        del x["cotangent"]
        if self.takes_bias_and_score:
            x["weight"] = jnp.float32(0.3)

        def attend(x):
            score = partial(bent, x["weight"]) if "weight" in x else None
            bias = x.get("bias")
            return self.attend(x, causal(), bias_BNTS=bias, sinks_N=x["sinks"], score=score)

        derive = DERIVATIVES[kind]
        got = jit(partial(derive, attend))(x)
        rough = jit(partial(derive, plain))(x)
        host = jax.device_get(x)
        with jax.enable_x64(True):
            wide = {name: jnp.asarray(leaf, jnp.float64) for name, leaf in host.items()}
            exact = jax.device_get(jit(partial(derive, plain))(wide))
        leaves = [jax.tree_util.tree_leaves_with_path(tree) for tree in (got, rough, exact)]
        for (path, a), (_, b), (_, c) in zip(*leaves, strict=True):
            assert np.abs(c).max() > 0
            oracle.assert_same(jax.tree_util.keystr(path), a, b, c)

    def test_vmap_over_batch_and_over_an_extra_axis(self):
        x, y = draw(Z, seed=1), draw(Z, seed=2)
        kv_B = np.array([5, 2])
        both = {name: jnp.stack([x[name], y[name]]) for name in "qkv"}
        plain_calls = [jit(self.attend)(z, lengths(kv_B=kv_B)) for z in (x, y)]
        got = jit(jax.vmap(self.attend, in_axes=(0, None)))(both, lengths(kv_B=kv_B))
        close(got, jnp.stack(plain_calls))
        # Over the batch: each call sees one sequence and its own mask.
        one = {name: x[name][:, None] for name in "qkv"}
        got = jit(jax.vmap(lambda z, n: self.attend(z, lengths(kv_B=n))))(one, kv_B[:, None])
        close(got[:, 0], plain_calls[0])
        # Queries differ, keys and values are shared.
        shared = {"q": both["q"], "k": x["k"], "v": x["v"]}
        axes = {"q": 0, "k": None, "v": None}
        got = jit(jax.vmap(lambda z: self.attend(z), in_axes=(axes,)))(shared)
        close(got[1], jit(self.attend)({"q": y["q"], "k": x["k"], "v": x["v"]}))

    def test_gradient_under_vmap(self):
        xs = [draw(Z, seed=seed) for seed in (1, 2)]
        both = {name: jnp.stack([x[name] for x in xs]) for name in "qkv"}
        derive = jax.grad(lambda x: jnp.sum(jnp.sin(self.attend(x, causal()))))
        got = jit(jax.vmap(derive))(both)
        want = [jit(derive)({name: x[name] for name in "qkv"}) for x in xs]
        jax.tree.map(lambda g, *w: close(g, jnp.stack(w)), got, *want)


def close(got, want):
    """Equal up to the order of summation: eight roundings of the largest entry."""
    scale = float(np.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=8 * 1.2e-7 * scale)
