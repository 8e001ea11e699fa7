"""Attention in float64 NumPy, one row at a time, and the error that an implementation may make.

Written to be read, not to be fast, and independent of the library: masks come as bool arrays, a
score as a NumPy function, dropout as the set of pairs that were kept.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# What is differentiated, in the order in which gradients are compared.
INPUTS = ("q", "k", "v", "bias", "sinks")


class Result(NamedTuple):
    """Outputs, gradients of sum(out · cotangent), and floors of the error budget for all of them.

    `gradients` and `floors` are dicts with the keys of `INPUTS`; floors also has "out". The
    gradient of the bias has the full shape [B,N,T,S].
    """

    out: np.ndarray
    lse: np.ndarray
    p: np.ndarray
    gradients: dict[str, np.ndarray]
    floors: dict[str, np.ndarray]


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    score: Callable[..., Any] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: np.ndarray | None = None,
    q_offset: int = 0,
    kept: np.ndarray | None = None,
    rate: float = 0.0,
    cotangent: np.ndarray | None = None,
    dtype: Any = np.float64,
) -> Result:
    """Compute softmax attention and its gradients row by row; `dtype` is that of the tested code.

    q [B,T,N,H], k [B,S,K,H], v [B,S,K,E]; mask, bias, kept broadcast to [B,N,T,S]; a masked key
    is never looked at, so it may hold anything. `score` maps (logits [S'], b, n, position, s [S'])
    to logits and must be analytic in the first, whose derivative is taken by a complex step.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (B, T, N, H), (S, K), E = q.shape, k.shape[1:3], v.shape[3]
    scale = float(H**-0.5 if scale is None else scale)
    pairs = (B, N, T, S)
    mask = np.broadcast_to(True if mask is None else mask, pairs)
    bias = np.broadcast_to(0.0 if bias is None else np.asarray(bias, np.float64), pairs)
    kept = np.broadcast_to(True if kept is None else kept, pairs) / (1.0 - rate)
    sink = np.full(N, -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    do = np.zeros((B, T, N, E)) if cotangent is None else np.asarray(cotangent, np.float64)
    eps = float(jnp.finfo(dtype).eps)
    eps_wide = min(eps, float(jnp.finfo(jnp.float32).eps))

    out, lse, p_all = np.zeros((B, T, N, E)), np.full((B, N, T), -np.inf), np.zeros(pairs)
    shapes = dict(zip(INPUTS, (q.shape, k.shape, v.shape, pairs, (N,)), strict=True))
    grad = {name: np.zeros(shape) for name, shape in shapes.items()}
    floor = {"out": np.zeros(out.shape)} | {name: np.zeros(s) for name, s in shapes.items()}

    for b, n, t in np.ndindex(B, N, T):
        g = n // (N // K)
        s = np.flatnonzero(mask[b, n, t])
        query, keys, values, do_row = q[b, t, n], k[b, s, g], v[b, s, g], do[b, t, n]
        logits, slope = scale * (keys @ query), np.ones(s.size)
        if softcap is not None:
            slope = 1.0 - np.tanh(logits / softcap) ** 2
            logits = softcap * np.tanh(logits / softcap)
        logits = logits + bias[b, n, t, s]
        bend = np.ones(s.size)  # d score / d logits
        if score is not None:
            bend = np.imag(score(logits + 1e-30j, b, n, q_offset + t, s)) / 1e-30
            logits = score(logits, b, n, q_offset + t, s)
        top = max([*logits, sink[n]])
        if top == -np.inf:
            continue  # no key at all: output 0, gradients 0, lse -inf
        e, e_sink = np.exp(logits - top), np.exp(sink[n] - top)
        total = e.sum() + e_sink
        p, p_sink, keep = e / total, e_sink / total, kept[b, n, t, s]
        out[b, t, n] = (p * keep) @ values
        lse[b, n, t] = top + np.log(total)
        p_all[b, n, t, s] = p

        dp = keep * (values @ do_row)
        d_final = p * (dp - p @ dp)
        d_raw = scale * slope * bend * d_final
        grad["q"][b, t, n] += d_raw @ keys
        grad["k"][b, s, g] += np.outer(d_raw, query)
        grad["v"][b, s, g] += np.outer(p * keep, do_row)
        grad["bias"][b, n, t, s] = bend * d_final
        grad["sinks"][n] -= p_sink * (p @ dp)

        # The floors: the same sums over absolute values, where every probability is off by one
        # rounding and by what one rounding of the logit does to it.
        size = abs(scale) * (abs(keys) @ abs(query)) + np.nan_to_num(
            abs(bias[b, n, t, s]), posinf=0
        )
        u = p * (eps + eps_wide * (1.0 + size))
        dp = keep * (abs(values) @ abs(do_row))
        d_raw = abs(scale) * abs(bend) * (u * (dp + p @ dp))
        floor["out"][b, t, n] = (u * keep) @ abs(values)
        floor["q"][b, t, n] += d_raw @ abs(keys)
        floor["k"][b, s, g] += np.outer(d_raw, abs(query))
        floor["v"][b, s, g] += np.outer(u * keep, abs(do_row))
        floor["bias"][b, n, t, s] = abs(bend) * (u * (dp + p @ dp))
        floor["sinks"][n] += p_sink * (u @ dp)
    return Result(out, lse, p_all, grad, floor)


def plain(
    q, k, v, *, mask: Any = True, bias: Any = 0.0, sinks=None, scale=None, softcap=None, kept=1.0
):
    """The dense formula as anyone would write it in JAX; its error is the unit of the budget."""
    (B, T, N, H), K = q.shape, k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # One more column for the sink; without one it has no weight.
    last = jnp.full((N,), -1e30, wide) if sinks is None else sinks.astype(wide)
    k, v = jnp.repeat(k, N // K, axis=2), jnp.repeat(v, N // K, axis=2)
    s = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=wide)
    s = s * (H**-0.5 if scale is None else scale)
    s = (s if softcap is None else softcap * jnp.tanh(s / softcap)) + jnp.asarray(bias, wide)
    mask = jnp.broadcast_to(mask, s.shape)
    column = jnp.broadcast_to(last[None, :, None, None], (B, N, T, 1))
    s = jnp.concatenate([jnp.where(mask, s, -1e30), column], axis=-1)
    p = jnp.where(mask, jax.nn.softmax(s, axis=-1)[..., :-1], 0.0) * kept
    o = jnp.einsum("BNTS,BSNE->BTNE", p.astype(v.dtype), v, preferred_element_type=wide)
    return o.astype(v.dtype)


def budget(plain: Any, exact: np.ndarray, floor: Any) -> np.ndarray:
    """Return the error that an implementation may make, elementwise.

        max(2 · max|plain - exact|, floor)

    The floor is for the cases in which the plain formula happens to make next to no error: one
    key, equal keys, gradients that cancel. It is what one rounding of every term adds up to at
    worst (see `Result.floors`), the unit that any order of summation is free to move within.
    """
    error = np.abs(np.asarray(plain, np.float64) - exact)
    return np.maximum(2.0 * error.max(initial=0.0), np.asarray(floor))


def assert_within(name: str, got: Any, plain: Any, exact: np.ndarray, floor: Any) -> None:
    """Fail if anywhere the error of `got` is above the budget; NaN is above any."""
    error = np.abs(np.asarray(got, np.float64) - exact)
    allowed = budget(plain, exact, floor)
    assert error.shape == allowed.shape, f"{name} has shape {error.shape}, not {allowed.shape}"
    if not (error <= allowed).all():
        ratio = np.where(error > allowed, error / np.maximum(allowed, 1e-300), 0.0)
        at = np.unravel_index(np.argmax(np.nan_to_num(ratio, nan=np.inf)), error.shape)
        raise AssertionError(
            f"{name}{[int(i) for i in at]}: got {np.asarray(got)[at]}, exact {exact[at]}, error "
            f"{error[at]:.3g} > budget {allowed[at]:.3g}"
        )


def assert_same(name: str, got: Any, plain: Any, exact: np.ndarray) -> None:
    """Like `assert_within`, with a floor of eight roundings of the largest entry.

    For derived quantities whose terms the oracle does not list: second derivatives, layers.
    """
    floor = 8.0 * float(jnp.finfo(np.asarray(got).dtype).eps) * abs(exact).max(initial=0.0)
    assert_within(name, got, plain, exact, np.full(exact.shape, floor))
