"""What every implementation of `dot_product_attention` must do: inherit, and name it.

class TestDense(AttentionContract):
    implementation = "dense"
"""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jax_attn import alibi, causal, dense, lengths
from tests import oracle
from tests.attention_cases import (
    FULL,
    KEEP,
    KEY,
    MASKS,
    QUICK,
    SHAPES,
    Options,
    Shape,
    check,
    draw,
    slopes,
)
from tests.derivatives_contract import Derivatives
from tests.masked_contract import Masked

OPTIONS = {
    "sinks": Options(sinks=True, q_offset=2),
    "bias, scale, softcap": Options(bias=FULL, scale=1.3, softcap=2.0),
    "bias of a head": Options(bias=(0, 1, 0, 0), sinks=True),
    "alibi, bias of a key": Options(bias=(1, 0, 0, 1), slopes=True, q_offset=4),
    "dropout": Options(rate=0.3, q_offset=2),
    "all": Options(FULL, True, 3.0, 0.7, True, 0.2, 3),
}
DTYPES = ("float64", "float32", "bfloat16", "float16")
Z = SHAPES["gqa"]
PLAIN = jax.jit(oracle.plain)


class AttentionContract(Derivatives, Masked):
    implementation: str
    dtypes: tuple[str, ...] = DTYPES
    every_option = OPTIONS["all"]
    # True for a kernel that does not take every call: what it refuses by name is skipped.
    refuses = False

    def check(self, shape, mask, options=None, dtype="float32", **more):
        options = self.every_option if options is None else options
        if dtype not in self.dtypes:
            pytest.skip(f"{self.implementation} does not take {dtype}")
        with jax.enable_x64(dtype == "float64"):
            check(self.implementation, shape, mask, options, dtype, **more)

    @pytest.mark.few(7)
    @pytest.mark.parametrize("mask", MASKS)
    def test_masks(self, mask):
        self.check("mha", mask, OPTIONS["sinks"])

    @pytest.mark.few(3)
    @pytest.mark.parametrize("options", OPTIONS)
    def test_options(self, options):
        self.check("gqa", "causal", OPTIONS[options])

    @pytest.mark.parametrize("shape", ["T1", "S1", "S0", "ones"])
    def test_shapes(self, shape):
        self.check(shape, "none", self.every_option._replace(rate=0.0, q_offset=0, slopes=False))

    @pytest.mark.few(2)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes(self, dtype):
        self.check("mqa", "prefix_lm", self.every_option._replace(q_offset=1), dtype)

    def test_traced_offset(self):
        self.check("gqa", "packed", traced_offset=True)

    # Each implementation's class runs it: examples are not shared between them.
    @hypothesis.settings(
        max_examples=20, suppress_health_check=[hypothesis.HealthCheck.differing_executors]
    )
    @hypothesis.given(
        shape=st.sampled_from(["mqa", "gqa"]),
        dtype=st.sampled_from(["float32", "bfloat16"]),
        q_offset=st.integers(-2, 12),
        rule=st.sampled_from(sorted(MASKS)),
        seed=st.integers(0, 999),
    )
    def test_any_case(self, shape, dtype, q_offset, rule, seed):
        """Masks come written out and the offset traced, so that four programs serve all."""
        chosen = self.every_option._replace(q_offset=q_offset)
        more = {"seed": seed, "traced_offset": True, "written_out": True}
        self.check(shape, rule, chosen, dtype, **more)

    def test_kept_pairs_are_those_of_the_hash(self):
        z = Shape(2, 5, 7, 4, 2, 3, 7)
        x, rate = draw(z), 0.4
        v = jnp.broadcast_to(jnp.eye(7)[None, :, None], (z.B, z.S, z.K, z.E))
        key = jax.random.key(KEY)
        out = self.run_jit(x | {"v": v}, dropout_rate=rate, dropout_key=key, q_offset=3)
        b, n, t, s = np.indices((z.B, z.N, z.T, z.S))
        kept = KEEP(key, rate, b, n, t + 3, s)
        np.testing.assert_array_equal(np.moveaxis(np.asarray(out), 1, 2) > 0, kept)

    def test_dropout_keeps_the_mean(self):
        x, rate, draws = draw(Z), 0.3, 600
        keys = jax.random.split(jax.random.key(3), draws)

        def once(key):
            return self.attend(x, causal(), dropout_rate=rate, dropout_key=key)

        made = np.asarray(jax.jit(jax.vmap(once), compiler_options=QUICK)(keys), np.float64)
        want = self.run_jit(x, causal())
        # Mean of independent draws: 5 standard errors, floored where nothing can vary.
        error = 5 * made.std(axis=0) / draws**0.5 + 1e-6
        assert (np.abs(made.mean(axis=0) - want) < error).mean() > 0.999
        assert (made.std(axis=0) > 0).all()

    def test_order_of_keys_does_not_matter(self):
        x = draw(Z, Options(bias=FULL))
        order = np.random.default_rng(0).permutation(Z.S)
        allowed = np.random.default_rng(1).random((Z.B, 1, Z.T, Z.S)) < 0.7
        arrays = [np.asarray(x[name], np.float64) for name in "qkv"]
        bias = np.asarray(x["bias"], np.float64)
        exact = oracle.attend(*arrays, mask=allowed, bias=bias, dtype="float32")
        plain = PLAIN(x["q"], x["k"], x["v"], mask=allowed, bias=x["bias"])
        y = {"q": x["q"], "k": x["k"][:, order], "v": x["v"][:, order]}
        bias = x["bias"][..., order]
        got = self.run_jit(y, dense(allowed[..., order]), bias_BNTS=bias)
        oracle.assert_within("out", got, plain, exact.out, exact.floors["out"])

    def test_eager_is_jit(self):
        x = draw(Z)
        exact = oracle.attend(*(np.asarray(x[n], np.float64) for n in "qkv"), dtype="float32")
        plain = PLAIN(x["q"], x["k"], x["v"])
        for got in (self.attend(x), self.run_jit(x)):
            oracle.assert_within("out", got, plain, exact.out, exact.floors["out"])

    def test_one_program_serves_masks_of_a_kind(self):
        traced = []

        @jax.jit
        def f(x, mask, q_offset):
            traced.append(1)
            return self.attend(x, mask, q_offset=q_offset)

        x = {name: draw(Z)[name] for name in "qkv"}
        for offset, kv_B in ((0, [3, 5]), (4, [1, 2])):
            f(x, causal() & lengths(kv_B=np.array(kv_B)), offset)
        assert len(traced) == 1

    def test_gradient_reaches_what_score_closes_over(self):
        x = draw(Z)
        arrays = [np.asarray(x[name], np.float64) for name in "qkv"]
        distance = abs(np.arange(Z.T)[:, None] - np.arange(Z.S)[None])
        slope_N = jnp.asarray(slopes(Z), jnp.float32)

        def loss(slope_N):
            return jnp.sum(self.attend(x, causal(), score=alibi(slope_N)) * x["cotangent"])

        def plain(slope_N):
            bias = -slope_N[None, :, None, None] * distance[None, None]
            mask = np.tril(np.ones((Z.T, Z.S), bool))
            out = oracle.plain(x["q"], x["k"], x["v"], mask=mask[None, None], bias=bias)
            return jnp.sum(out * x["cotangent"])

        exact = oracle.attend(
            *arrays,
            mask=np.tril(np.ones((Z.T, Z.S), bool)),
            score=lambda s, b, n, p, at: s - slopes(Z)[n] * abs(p - at),
            cotangent=np.asarray(x["cotangent"], np.float64),
            dtype="float32",
        )
        want, floor = (
            sign * (ds["bias"] * distance).sum(axis=(0, 2, 3))
            for sign, ds in ((-1, exact.gradients), (1, exact.floors))
        )
        got, rough = (jax.jit(jax.grad(f))(slope_N) for f in (loss, plain))
        oracle.assert_within("dslopes", got, rough, want, floor)

    def run_jit(self, x, mask=None, **options):
        x = {name: x[name] for name in "qkv"}
        attend = jax.jit(lambda x: self.attend(x, mask, **options), compiler_options=QUICK)
        return attend(x)
