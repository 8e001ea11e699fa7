"""What `observe=` must give on every implementation: values, derivatives, and no change of out."""

from functools import lru_cache, partial
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jax_attn import alibi, causal, dense, dot_product_attention, lengths, mean_of, window_mass
from jax_attn.observe import STATISTICS
from tests import oracle
from tests.attention_cases import (
    KEY,
    MASKS,
    QUICK,
    SHAPES,
    Options,
    Shape,
    allowed,
    distances,
    draw,
    slopes,
)

WIDTH = 2
NAMES = (*STATISTICS, "window_mass", "wave", "mean")
SMOOTH = tuple(name for name in NAMES if name != "argmax_key")
TINY = Shape(2, 3, 5, 2, 1, 3, 2)
jit = partial(jax.jit, compiler_options=QUICK)


def wave(b, n, t, s):
    return (t - 2 * s) % 5 * (n + 1) + b


def table(z: Shape) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(z.B, z.S, z.N)).astype(np.float32)


def observed(z: Shape) -> tuple[Any, ...]:
    return (*STATISTICS, window_mass(WIDTH), mean_of(wave), mean_of(jnp.asarray(table(z))))


def means(z: Shape, q_offset: Any) -> dict[str, Any]:
    """The functions whose mean is taken, written out: [B,N,T,S] each."""
    b, n, t, s = np.ogrid[: z.B, : z.N, : z.T, : z.S]
    t = t + q_offset
    return {
        "expected_distance": s - t + 0 * b + 0 * n,
        "first_mass": (s == 0) + 0 * t + 0 * b + 0 * n,
        "self_mass": (s == t) + 0 * b + 0 * n,
        "window_mass": (abs(s - t) <= WIDTH) + 0 * b + 0 * n,
        "wave": (t - 2 * s) % 5 * (n + 1) + b,
        "mean": np.broadcast_to(table(z).transpose(0, 2, 1)[:, :, None], (z.B, z.N, z.T, z.S)),
    }


def statistics(p, lse, z: Shape, q_offset: int) -> dict[str, np.ndarray]:
    """The statistics of probabilities [B,N,T,S] and lse [B,N,T] in float64, [B,T,N] each."""
    sink = np.where(lse > -np.inf, 1.0 - p.sum(axis=-1), 0.0)
    sink = np.where(sink < 1e-14, 0.0, sink)  # what is left of the sum's rounding is no sink
    every = np.concatenate([p, sink[..., None]], axis=-1)
    largest, some = p.max(axis=-1, initial=0.0), (p > 0).any(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        square = (every**2).sum(axis=-1)
        made = {
            "lse": lse,
            "max_logit": np.where(some, lse + np.log(largest), -np.inf),
            "entropy": -np.where(every > 0, every * np.log(every), 0.0).sum(axis=-1),
            "effective_keys": np.where(square > 0, 1 / square, 0.0),
            "min_entropy": np.where(some, -np.log(largest), 0.0),
            "max_prob": largest,
            "argmax_key": np.where(some, p.argmax(axis=-1) if p.shape[-1] else 0, -1),
        }
    made |= {name: (p * f).sum(axis=-1) for name, f in means(z, q_offset).items()}
    return {name: made[name].transpose(0, 2, 1) for name in NAMES}


def plain(q, k, *, mask, bias, sinks, scale, softcap, functions) -> dict[str, jax.Array]:
    """The same as anyone would write it in JAX, in the dtype of q or float32; rows without keys
    are left at what comes out."""
    (B, T, N, H), K = q.shape, k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    s = jnp.einsum("BTNH,BSNH->BNTS", q, jnp.repeat(k, N // K, axis=2), preferred_element_type=wide)
    s = s * (H**-0.5 if scale is None else scale)
    s = (s if softcap is None else softcap * jnp.tanh(s / softcap)) + jnp.asarray(bias, wide)
    s = jnp.where(mask, s, -1e30)
    last = jnp.full((N,), -1e30, wide) if sinks is None else sinks.astype(wide)
    column = jnp.broadcast_to(last[None, :, None, None], (B, N, T, 1))
    every = jax.nn.softmax(jnp.concatenate([s, column], axis=-1), axis=-1)
    p = every[..., :-1]
    lse = jax.nn.logsumexp(jnp.concatenate([s, column], axis=-1), axis=-1)
    best = jnp.argmax(s, axis=-1)
    top = jnp.take_along_axis(s, best[..., None], axis=-1)[..., 0]
    made = {
        "lse": lse,
        "max_logit": top,
        "entropy": -jnp.sum(every * jnp.log(jnp.where(every > 0, every, 1.0)), axis=-1),
        "effective_keys": 1 / jnp.sum(every**2, axis=-1),
        "min_entropy": lse - top,
        "max_prob": jnp.exp(top - lse),
        "argmax_key": best,
    }
    made |= {name: jnp.sum(p * f.astype(wide), axis=-1) for name, f in functions.items()}
    return {name: made[name].transpose(0, 2, 1) for name in NAMES}


@lru_cache
def observer(implementation: str, z: Shape, options: Options):
    """A jitted (inputs, mask, q_offset) -> (out, seen)."""
    score = alibi(jnp.asarray(slopes(z), jnp.float32)) if options.slopes else None
    key = jax.random.key(KEY) if options.rate else None

    @jit
    def run(x, mask, q_offset):
        return dot_product_attention(
            x["q"],
            x["k"],
            x["v"],
            mask=mask,
            bias_BNTS=x.get("bias"),
            sinks_N=x.get("sinks"),
            score=score,
            softcap=options.softcap,
            scale=options.scale,
            q_offset=q_offset,
            dropout_rate=options.rate,
            dropout_key=key,
            observe=observed(z),
            implementation=implementation,
        )

    return run


@lru_cache
def rough(z: Shape, options: Options):
    @jit
    def run(x, mask, functions, added):
        bias = jnp.asarray(x.get("bias", 0.0), jnp.promote_types(x["q"].dtype, jnp.float32)) + added
        more = {"sinks": x.get("sinks"), "scale": options.scale, "softcap": options.softcap}
        return plain(x["q"], x["k"], mask=mask, bias=bias, functions=functions, **more)

    return run


def check_observed(implementation, z: Shape, mask: str, options: Options, dtype, seed=0) -> None:
    x = draw(z, options, dtype, seed)
    pairs, at = allowed(mask, z, options.q_offset), options.q_offset
    run = observer(implementation, z, options._replace(q_offset=0))
    spec = dense(pairs) if implementation != "native" else MASKS[mask][0](z)
    _, seen = run(x, spec, at)
    arrays = {name: np.asarray(leaf, np.float64) for name, leaf in x.items()}
    added = distances(z, at) if options.slopes else np.zeros((1, 1, 1, 1))
    exact = oracle.attend(
        *(arrays[name] for name in "qkv"),
        mask=pairs,
        bias=arrays.get("bias", 0.0) + added,
        sinks=arrays.get("sinks"),
        scale=options.scale,
        softcap=options.softcap,
        dtype=dtype,
    )
    want = statistics(exact.p, exact.lse, z, at)
    wide = np.promote_types(np.float32, np.asarray(seen["lse"]).dtype)
    functions = {name: jnp.asarray(f, wide) for name, f in means(z, at).items()}
    yardstick = rough(z, options)(x, pairs, functions, jnp.asarray(added, wide))
    assert tuple(sorted(seen)) == tuple(sorted(NAMES))
    some = np.any(exact.p > 0, axis=-1).transpose(0, 2, 1)
    for name in NAMES:
        got = np.asarray(seen[name])
        assert got.dtype == (np.int32 if name == "argmax_key" else np.float32), name
        if name == "argmax_key":
            # Where two keys are closest to one another rounding may choose.
            reached = np.take_along_axis(
                exact.p.transpose(0, 2, 1, 3), np.maximum(got, 0)[..., None], axis=-1
            )[..., 0]
            np.testing.assert_array_equal(got >= 0, some)
            oracle.assert_same("p of argmax_key", np.float32(reached), reached, want["max_prob"])
            continue
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want[name]), name)
        there = np.isfinite(want[name])
        ours, exactly = np.where(there, got, 0.0), np.where(there, want[name], 0.0)
        unit = np.where(there & some, np.asarray(yardstick[name], np.float64), exactly)
        # Eight roundings of the largest entry, and what one of logit and lse each does to e^(s-lse)
        roundings = 8.0 + 2.0 * np.abs(np.where(there, want["lse"], 0.0)).max(initial=0.0)
        floor = roundings * np.finfo(np.float32).eps * np.abs(exactly).max(initial=0.0)
        oracle.assert_within(name, ours, unit, exactly, np.full(exactly.shape, floor))


class Observes:
    implementation: str
    every_option: Options

    @pytest.mark.parametrize("mask", ["none", "causal", "ahead", "lengths", "packed"])
    def test_observe_masks(self, mask):
        check_observed(self.implementation, SHAPES["mha"], mask, Options(q_offset=1), "float32")

    @pytest.mark.few(2)
    @pytest.mark.parametrize("shape", ["mqa", "T1", "S1", "ones"])
    def test_observe_shapes(self, shape):
        options = self.every_option._replace(q_offset=0)
        check_observed(self.implementation, SHAPES[shape], "causal", options, "float32")

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_observe_options(self, dtype):
        check_observed(self.implementation, SHAPES["gqa"], "prefix", self.every_option, dtype)

    @hypothesis.settings(
        max_examples=20, suppress_health_check=[hypothesis.HealthCheck.differing_executors]
    )
    @hypothesis.given(
        q_offset=st.integers(-2, 12),
        mask=st.sampled_from(["causal", "window", "chunks", "segments", "lengths", "packed"]),
        seed=st.integers(0, 999),
    )
    def test_observe_any_case(self, q_offset, mask, seed):
        options = self.every_option._replace(q_offset=q_offset)
        check_observed(self.implementation, SHAPES["gqa"], mask, options, "float32", seed)

    def test_rows_without_keys(self):
        z, x = TINY, draw(TINY)
        # The array of `mean` has S of its own.
        entries = tuple(e for e in observed(z) if getattr(e, "name", "") != "mean")
        none = lengths(kv_B=np.array([0, 0]))
        for keys in (x["k"], x["k"][:, :0]):
            v = x["v"][:, : keys.shape[1]]
            mask = none if keys.shape[1] else None
            more = {"observe": entries, "implementation": self.implementation}
            _, seen = dot_product_attention(x["q"], keys, v, mask=mask, **more)
            for name, value in seen.items():
                empty = {"lse": -np.inf, "max_logit": -np.inf, "argmax_key": -1}.get(name, 0.0)
                np.testing.assert_array_equal(value, np.full((z.B, z.T, z.N), empty), name)

    @pytest.mark.parametrize("by", ["bias", "score"])
    def test_logits_of_minus_infinity_are_a_mask(self, by):
        """Without any other mask, and with a mean that is infinite where nothing attends."""
        z, x = TINY, draw(TINY)
        bias_BNTS = jnp.where(jnp.tri(z.T, z.S, dtype=bool), 0.0, -jnp.inf)[None, None]

        def far(b, n, t, s):
            return jnp.where(s > t, jnp.inf, 2.0)

        def hide(logits, b, n, t, s):
            return jnp.where(s <= t, logits, -jnp.inf)

        def loss(q, k, how):
            options = {"bias": {"bias_BNTS": bias_BNTS}, "score": {"score": hide}}
            options |= {"mask": {"mask": causal()}}
            seen = dot_product_attention(
                *(q, k, x["v"]),
                **options[how],
                observe=(*STATISTICS, mean_of(far)),
                implementation=self.implementation,
            )[1]
            return sum(jnp.sum(x) for name, x in seen.items() if name != "argmax_key"), seen

        derive = jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
        (_, got), grads = derive(x["q"], x["k"], by)
        (_, want), same = derive(x["q"], x["k"], "mask")
        eps = float(np.finfo(np.float32).eps)
        for a, b in zip(jax.tree.leaves((got, grads)), jax.tree.leaves((want, same)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=16 * eps * np.abs(b).max())

    def test_output_and_its_gradient_do_not_change(self):
        x = draw(SHAPES["gqa"], self.every_option)

        def loss(x, observe):
            made = dot_product_attention(
                *(x[name] for name in "qkv"),
                mask=causal(),
                sinks_N=x.get("sinks"),
                bias_BNTS=x.get("bias"),
                implementation=self.implementation,
                observe=observe,
            )
            out = made if observe is None else made[0]
            return jnp.sum(out * x["cotangent"]), out

        derive = jit(jax.grad(loss, has_aux=True), static_argnums=1)
        names = ("entropy", "max_logit", "expected_distance", "self_mass")
        got, want = derive(x, names), derive(x, None)
        jax.tree.map(np.testing.assert_array_equal, got, want)

    @pytest.mark.few(1)
    @pytest.mark.parametrize("kind", ["gradient", "jvp", "gradient of gradient"])
    def test_derivatives_of_statistics(self, kind):
        z = TINY
        x = {name: leaf for name, leaf in draw(z, Options(sinks=True)).items() if name in "qksinks"}
        v = draw(z)["v"]
        pairs = np.tril(np.ones((z.T, z.S), bool), k=1)[None, None]
        g = jnp.asarray(table(z))
        weight = {
            name: jnp.asarray(np.random.default_rng(i).normal(size=(z.B, z.T, z.N)), jnp.float32)
            for i, name in enumerate(SMOOTH)
        }

        def ours(x):
            observe = (*STATISTICS, window_mass(WIDTH), mean_of(wave), mean_of(x["g"]))
            more = {"q_offset": 1, "observe": observe, "implementation": self.implementation}
            return dot_product_attention(
                x["q"], x["k"], v, mask=causal(), sinks_N=x["sinks"], softcap=3.0, **more
            )[1]

        def textbook(x):
            functions = {name: jnp.asarray(f) for name, f in means(z, 1).items()}
            functions["mean"] = x["g"].transpose(0, 2, 1)[:, :, None]
            more = {"functions": functions, "scale": None, "softcap": 3.0}
            return plain(x["q"], x["k"], mask=pairs, bias=0.0, sinks=x["sinks"], **more)

        def scalar(f, x):
            seen = f(x)
            return sum(jnp.sum(jnp.sin(seen[n]) * weight[n].astype(seen[n].dtype)) for n in SMOOTH)

        def derive(f, x):
            if kind == "gradient":
                return jax.grad(partial(scalar, f))(x)
            if kind == "jvp":
                direction = {name: jnp.cos(3.0 * leaf) for name, leaf in x.items()}
                made = jax.jvp(f, (x,), (direction,))[1]
                return {name: made[name] for name in SMOOTH}

            def norm(x):
                leaves = jax.tree.leaves(jax.grad(partial(scalar, f))(x))
                return sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves)

            return jax.grad(norm)(x)

        x["g"] = g
        got, unit = jit(partial(derive, ours))(x), jit(partial(derive, textbook))(x)
        host = jax.device_get(x)
        with jax.enable_x64(True):
            wide = {name: jnp.asarray(leaf, jnp.float64) for name, leaf in host.items()}
            exact = jax.device_get(jit(partial(derive, textbook))(wide))
        for name, value in got.items():
            assert np.abs(exact[name]).max() > 0, name
            oracle.assert_same(f"{kind} {name}", value, unit[name], exact[name])

    @pytest.mark.parametrize("junk", [np.nan, np.inf, 3e38])
    def test_junk_behind_the_mask_is_not_seen(self, junk):
        z = SHAPES["square"]
        x = draw(z)
        bad = x | {"k": x["k"].at[:, -1].set(junk), "v": x["v"].at[:, -1].set(junk)}

        @jit
        def run(x):
            made = dot_product_attention(
                *(x[name] for name in "qkv"),
                mask=causal(),
                observe=tuple(name for name in NAMES[:-3]),
                implementation=self.implementation,
            )
            return made[1]

        clean, got = run(x), run(bad)
        for name in clean:
            # Entropy is Σ e·(s - r): r, of a block, is up to 32 from a row's maximum, and another
            # row may move it.
            last_bits = 32 * float(np.finfo(np.float32).eps) if name == "entropy" else 0.0
            seen = (np.asarray(x[name])[:, :-1] for x in (got, clean))
            np.testing.assert_allclose(*seen, rtol=0, atol=last_bits, err_msg=name)
        if not np.isfinite(junk):
            assert np.isnan(got["entropy"][:, -1]).all()
            assert (np.asarray(got["argmax_key"])[:, -1] == -1).all()
