"""Inputs of the attention tests: shapes, masks as spec and as a rule on scalars, random arrays."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn import (
    Mask,
    alibi,
    causal,
    chunks,
    dense,
    dot_product_attention,
    dropout,
    lengths,
    prefix,
    segments,
    where,
    window,
)
from tests import oracle

# Compiling is what these tests wait for; what is compiled is the same program.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Shape(NamedTuple):
    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    E: int


SHAPES = {
    "mha": Shape(2, 7, 11, 3, 3, 5, 13),
    "mqa": Shape(2, 11, 5, 3, 1, 7, 2),
    "gqa": Shape(2, 5, 13, 6, 2, 3, 7),
    "square": Shape(3, 7, 7, 4, 2, 5, 5),
    "T1": Shape(2, 1, 7, 6, 3, 5, 11),
    "S1": Shape(2, 5, 1, 3, 1, 7, 2),
    "S0": Shape(2, 3, 0, 6, 2, 5, 7),
    "ones": Shape(1, 1, 1, 1, 1, 1, 1),
}


def q_ids(z: Shape) -> np.ndarray:
    return (np.arange(z.B)[:, None] + np.arange(z.T)[None]) // 3


def kv_ids(z: Shape) -> np.ndarray:
    return (np.arange(z.B)[:, None] + np.arange(z.S)[None]) // 3


def table(z: Shape) -> np.ndarray:
    return np.random.default_rng(7).random((z.B, 1, z.T, z.S)) < 0.6


def q_real(z: Shape) -> np.ndarray:
    return np.maximum(z.T - 2 * np.arange(z.B), 0)


def kv_real(z: Shape) -> np.ndarray:
    return np.arange(z.B)[::-1] * (z.S - 1) // max(z.B - 1, 1)  # the last sequence has none


def strided(b, n, t, s):
    return (2 * t + n + s) % 3 != b % 3


Rule = Callable[..., Any]
# name: (the mask of a shape, whether query t at position p may attend to key s)
MASKS: dict[str, tuple[Callable[[Shape], Mask | None], Rule]] = {
    "none": (lambda z: None, lambda z, b, n, t, s, p: True),
    "causal": (lambda z: causal(), lambda z, b, n, t, s, p: s <= p),
    "window": (lambda z: window(2, 1), lambda z, b, n, t, s, p: p - 2 <= s <= p + 1),
    "ahead": (lambda z: window(0, None), lambda z, b, n, t, s, p: p <= s),
    "prefix": (lambda z: prefix(3), lambda z, b, n, t, s, p: s < 3),
    "prefix_B": (lambda z: prefix(np.arange(z.B)), lambda z, b, n, t, s, p: s < b),
    "chunks": (lambda z: chunks(3), lambda z, b, n, t, s, p: p // 3 == s // 3),
    "segments": (
        lambda z: segments(q_ids(z), kv_ids(z)),
        lambda z, b, n, t, s, p: q_ids(z)[b, t] == kv_ids(z)[b, s],
    ),
    "lengths": (
        lambda z: lengths(q_real(z), kv_real(z)),
        lambda z, b, n, t, s, p: t < q_real(z)[b] and s < kv_real(z)[b],
    ),
    "where": (lambda z: where(strided), lambda z, b, n, t, s, p: strided(b, n, p, s)),
    "dense": (lambda z: dense(table(z)), lambda z, b, n, t, s, p: table(z)[b, 0, t, s]),
    "nothing": (lambda z: ~window(None), lambda z, b, n, t, s, p: False),
    "packed": (
        lambda z: causal() & window(3) & segments(q_ids(z), kv_ids(z)),
        lambda z, b, n, t, s, p: s <= p <= s + 3 and q_ids(z)[b, t] == kv_ids(z)[b, s],
    ),
    "prefix_lm": (
        lambda z: (causal() | prefix(2)) & lengths(kv_B=kv_real(z)),
        lambda z, b, n, t, s, p: (s <= p or s < 2) and s < kv_real(z)[b],
    ),
    "not": (
        lambda z: ~(causal() & dense(table(z))) & ~chunks(2),
        lambda z, b, n, t, s, p: not (s <= p and table(z)[b, 0, t, s]) and p // 2 != s // 2,
    ),
}


def allowed(mask: str, z: Shape, q_offset: int = 0) -> np.ndarray:
    """Write a mask out by its rule, pair by pair."""
    rule = MASKS[mask][1]
    made = np.zeros((z.B, z.N, z.T, z.S), bool)
    for b, n, t, s in np.ndindex(made.shape):
        made[b, n, t, s] = rule(z, b, n, t, s, q_offset + t)
    return made


class Options(NamedTuple):
    """What a case uses beside q, k, v and a mask."""

    bias: tuple[int, ...] | None = None  # which of B, N, T, S it has; the others are 1
    sinks: bool = False
    softcap: float | None = None
    scale: float | None = None
    slopes: bool = False  # ALiBi; q_offset shifts it as well
    rate: float = 0.0
    q_offset: int = 0


NOTHING = Options()
FULL = (1, 1, 1, 1)
KEY = 11  # of dropout


def draw(z: Shape, options: Options = NOTHING, dtype: Any = "float32", seed: int = 0) -> dict:
    """Draw inputs as jax arrays of the dtype: q, k, v, cotangent, and bias and sinks if used."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "q": (z.B, z.T, z.N, z.H),
        "k": (z.B, z.S, z.K, z.H),
        "v": (z.B, z.S, z.K, z.E),
        "cotangent": (z.B, z.T, z.N, z.E),
    }
    if options.bias is not None:
        full = (z.B, z.N, z.T, z.S)
        shapes["bias"] = tuple(m if on else 1 for m, on in zip(full, options.bias, strict=True))
    if options.sinks:
        shapes["sinks"] = (z.N,)
    return {name: jnp.asarray(rng.normal(size=s) * 1.5, dtype) for name, s in shapes.items()}


KEEP = jax.jit(dropout.keep, static_argnums=1, compiler_options=QUICK)


def slopes(z: Shape) -> np.ndarray:
    return 0.5 ** np.arange(1, z.N + 1)


def distances(z: Shape, q_offset: int) -> np.ndarray:
    """ALiBi as a bias: -slope · |p - s|."""
    t, s = np.arange(z.T)[:, None] + q_offset, np.arange(z.S)[None]
    return (-slopes(z)[:, None, None] * abs(t - s))[None]


def kept(z: Shape, options: Options) -> np.ndarray:
    """The pairs that dropout keeps, as the library's hash has it."""
    if not options.rate:
        return np.ones((z.B, z.N, z.T, z.S), bool)
    b, n, t, s = np.indices((z.B, z.N, z.T, z.S))
    return np.asarray(KEEP(jax.random.key(KEY), options.rate, b, n, t + options.q_offset, s))


@partial(jax.jit, static_argnames=("softcap", "scale"), compiler_options=QUICK)
def plain_vjp(inputs, cotangent, mask, added, weight, *, softcap, scale):
    def f(inputs):
        x = dict(inputs)
        q, k, v, bias = x["q"], x["k"], x["v"], x.get("bias", jnp.zeros((1, 1, 1, 1)))
        options = {"sinks": x.get("sinks"), "softcap": softcap, "scale": scale}
        bias = bias.astype(jnp.promote_types(bias.dtype, jnp.float32)) + added
        return oracle.plain(q, k, v, mask=mask, bias=bias, kept=weight, **options)

    out, vjp = jax.vjp(f, inputs)
    return out, vjp(cotangent)[0]


@lru_cache
def library_vjp(
    implementation: str, z: Shape, options: Options, traced_offset: bool = False
) -> Callable[..., Any]:
    """Return a jitted (inputs, cotangent, mask, q_offset) -> (out, gradients)."""
    score = alibi(jnp.asarray(slopes(z), jnp.float32)) if options.slopes else None
    dropout_key = jax.random.key(KEY) if options.rate else None

    @partial(jax.jit, compiler_options=QUICK)
    def run(inputs, cotangent, mask, q_offset):
        def f(inputs):
            return dot_product_attention(
                inputs["q"],
                inputs["k"],
                inputs["v"],
                mask=mask,
                bias_BNTS=inputs.get("bias"),
                sinks_N=inputs.get("sinks"),
                score=score,
                softcap=options.softcap,
                scale=options.scale,
                q_offset=q_offset if traced_offset else options.q_offset,
                dropout_rate=options.rate,
                dropout_key=dropout_key,
                implementation=implementation,
            )

        out, vjp = jax.vjp(f, inputs)
        return out, vjp(cotangent)[0]

    return run


def check(
    implementation: str,
    shape: str | Shape,
    mask: str,
    options: Options = NOTHING,
    dtype: str = "float32",
    seed: int = 0,
    traced_offset: bool = False,
    written_out: bool = False,
) -> None:
    """Compare output and all gradients of one case with the oracle, within the error budget.

    `traced_offset` and `written_out` (the mask, as a bool array) let one program serve many cases.
    """
    z = SHAPES[shape] if isinstance(shape, str) else shape
    x = draw(z, options, dtype, seed)
    cotangent = x.pop("cotangent")
    spec, pairs = MASKS[mask][0](z), allowed(mask, z, options.q_offset)
    survivors = kept(z, options)
    if written_out:
        spec = dense(pairs)
    still = options._replace(q_offset=0) if traced_offset else options
    run = library_vjp(implementation, z, still, traced_offset)
    out, gradients = run(x, cotangent, spec, options.q_offset)
    assert out.dtype == x["v"].dtype
    added = distances(z, options.q_offset) if options.slopes else np.zeros((1, 1, 1, 1))
    exact = oracle.attend(
        *(np.asarray(x[name], np.float64) for name in "qkv"),
        mask=pairs,
        bias=np.asarray(x.get("bias", 0.0), np.float64) + added,
        sinks=np.asarray(x["sinks"], np.float64) if options.sinks else None,
        scale=options.scale,
        softcap=options.softcap,
        q_offset=options.q_offset,
        kept=survivors,
        rate=options.rate,
        cotangent=np.asarray(cotangent, np.float64),
        dtype=dtype,
    )
    weight = jnp.asarray(survivors / (1 - options.rate), jnp.promote_types(dtype, jnp.float32))
    plain_out, plain_gradients = plain_vjp(
        x,
        cotangent,
        pairs,
        jnp.asarray(added, weight.dtype),
        weight,
        softcap=options.softcap,
        scale=options.scale,
    )
    oracle.assert_within("out", out, plain_out, exact.out, exact.floors["out"])
    for name, gradient in gradients.items():
        want, floor = exact.gradients[name], exact.floors[name]
        if name == "bias":
            ones = tuple(axis for axis, on in enumerate(options.bias or ()) if not on)
            want, floor = (y.sum(axis=ones, keepdims=True) for y in (want, floor))
        assert gradient.dtype == x[name].dtype
        oracle.assert_within(f"d{name}", gradient, plain_gradients[name], want, floor)
