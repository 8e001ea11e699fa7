"""The blocks as plain NumPy formulas in the dtype of their arguments, and the error budget.

The same formula is the oracle, on float64 arguments, and the yardstick, on float32 arguments: a
block may be twice as far from the oracle as the plain formula is. Distances are root mean squares
over all entries, which depend little on the order of a sum.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

erf = np.vectorize(math.erf, otypes=[float])


def cast(tree: Any, dtype: Any) -> Any:
    """Turn every floating leaf into a NumPy array of `dtype`, every other into a NumPy array."""

    def leaf(x: Any) -> np.ndarray:
        array = np.asarray(x)
        return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array

    return jax.tree.map(leaf, tree)


def rms(x: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def assert_near(actual: Any, exact: Any, plain: Any) -> None:
    """Compare with twice the error of a plain float32 result, at least that of one rounding."""
    actual, exact, plain = (np.asarray(x, np.float64) for x in (actual, exact, plain))
    assert actual.shape == exact.shape == plain.shape
    one_rounding = rms(exact) * np.finfo(np.float32).eps / 2
    budget = 2 * max(rms(plain - exact), one_rounding)
    assert rms(actual - exact) <= budget, f"error {rms(actual - exact):.3g}, budget {budget:.3g}"


def assert_within_budget(actual: Any, formula: Callable[..., Any], *arguments: Any) -> None:
    """Compare a float32 result with a formula below: see the top of this file."""
    plain = formula(*cast(arguments, np.float32))
    assert plain.dtype == np.float32, "the formula widens its arguments: no yardstick"
    assert np.asarray(actual).dtype == np.float32
    assert_near(actual, formula(*cast(arguments, np.float64)), plain)


def random_like(tree: Any, seed: int = 0, scale: float = 1.0) -> Any:
    """Draw a float32 tree of the same shapes, so that no leaf is left at 0 or 1."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), jnp.float32), tree
    )


def draw(init: Callable[..., Any], seed: int = 0, scale: float = 0.7) -> Any:
    """Draw the tree that an initialiser declares, in NumPy: compiling its draws takes seconds."""
    return random_like(jax.eval_shape(init, jax.random.key(0)), seed, scale)


def activate(name: str, x: np.ndarray) -> np.ndarray:
    match name:
        case "relu":
            return np.maximum(x, 0)
        case "gelu":
            return x * ((1 + erf(x / math.sqrt(2))) / 2).astype(x.dtype)
        case "gelu_tanh":
            return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
        case "silu":
            return x / (1 + np.exp(-x))
    raise AssertionError(name)


def softmax(s: np.ndarray) -> np.ndarray:
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def norm(params: Any, x: np.ndarray) -> np.ndarray:
    if "bias_D" in params:
        x = x - x.mean(axis=-1, keepdims=True)
    y = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6) * params["scale_D"]
    return y + params["bias_D"] if "bias_D" in params else y


def mlp(params: Any, x: np.ndarray, activation: str = "gelu") -> np.ndarray:
    h = activate(activation, x @ params["w_in_DF"] + params.get("b_in_F", 0))
    return h @ params["w_out_FD"] + params.get("b_out_D", 0)


def gated_mlp(params: Any, x: np.ndarray, activation: str = "silu") -> np.ndarray:
    gate = activate(activation, x @ params["w_gate_DF"])
    return (gate * (x @ params["w_in_DF"])) @ params["w_out_FD"]


def moe(
    params: Any, x: np.ndarray, k: int = 2, renormalize: bool = False, activation: str = "silu"
) -> np.ndarray:
    """Loop over tokens and experts. Of equally probable experts the first is taken."""
    y = np.zeros_like(x)
    for place in np.ndindex(x.shape[:-1]):
        token = x[place]
        p = softmax(token @ params["router_DX"])
        chosen = np.argsort(-p, kind="stable")[:k]
        share = p[chosen] / p[chosen].sum() if renormalize else p[chosen]
        for weight, expert in zip(share, chosen, strict=True):
            h = token @ params["w_in_XDF"][expert]
            if "w_gate_XDF" in params:
                h = activate(activation, token @ params["w_gate_XDF"][expert]) * h
            else:
                h = activate(activation, h)
            y[place] += weight * (h @ params["w_out_XFD"][expert])
    return y


def attention(params: Any, x: np.ndarray, causal: bool = True) -> np.ndarray:
    """Loop over sequences and query heads; head n reads key/value head n // G."""
    (B, T, _), (_, N, H), K = x.shape, params["wq_DNH"].shape, params["wk_DKH"].shape[1]
    y = np.zeros_like(x)
    for b, n in np.ndindex(B, N):
        kv = n // (N // K)
        q = x[b] @ params["wq_DNH"][:, n]
        k = x[b] @ params["wk_DKH"][:, kv]
        v = x[b] @ params["wv_DKE"][:, kv]
        s = q @ k.T / math.sqrt(H)
        if causal:
            s = np.where(np.tri(T, dtype=bool), s, x.dtype.type(-np.inf))
        y[b] += softmax(s) @ v @ params["wo_NED"][n]
    return y


def static_mixer(
    params: Any, x: np.ndarray, logits: np.ndarray | None = None, causal: bool = True
) -> np.ndarray:
    """Loop over sequences and heads. Without logits the weights are uniform."""
    (B, T, _), (_, N, _) = x.shape, params["wv_DNE"].shape
    logits = params.get("logits_NTS", logits)
    y = np.zeros_like(x)
    for b, n in np.ndindex(B, N):
        s = np.zeros((T, T), x.dtype) if logits is None else logits[n, :T, :T]
        if causal:
            s = np.where(np.tri(T, dtype=bool), s, x.dtype.type(-np.inf))
        y[b] += softmax(s) @ (x[b] @ params["wv_DNE"][:, n]) @ params["wo_NED"][n]
    return y


def token_mlp(
    params: Any, x: np.ndarray, causal: bool = False, activation: str = "gelu"
) -> np.ndarray:
    w_in, w_out = params["w_in_SF"].copy(), params["w_out_FT"].copy()
    T, F = w_in.shape
    if causal:
        for position, unit in np.ndindex(T, F):
            owner = unit * T // F
            w_in[position, unit] *= position <= owner
            w_out[unit, position] *= owner <= position
    length = x.shape[1]
    h = activate(activation, np.swapaxes(x, 1, 2) @ w_in[:length])
    return np.swapaxes(h @ w_out[:, :length], 1, 2)


def block(params: Any, x: np.ndarray, parts: Any) -> np.ndarray:
    """Run (name, function) of `parts` in order, each around a residual, normed where leaves say."""
    for name, function in parts:
        h = norm(params[f"{name}_norm"], x) if f"{name}_norm" in params else x
        x = x + function(params[name], h)
        if f"{name}_post_norm" in params:
            x = norm(params[f"{name}_post_norm"], x)
    return x


def language_model(params: Any, tokens: np.ndarray, parts: Any) -> np.ndarray:
    x = params["embed_VD"][tokens]
    if "position_TD" in params:
        x = x + params["position_TD"][: tokens.shape[1]]
    L = len(jax.tree.leaves(params["layers"])[0])
    for index in range(L):
        x = block(jax.tree.map(lambda leaf, i=index: leaf[i], params["layers"]), x, parts)
    x = norm(params["norm"], x) if "norm" in params else x
    return x @ params.get("head_DV", params["embed_VD"].T)
