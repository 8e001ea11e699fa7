"""What attention does, as numbers a row: names of statistics, means of functions, reductions."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_attn.shapes import Sizes

# Statistics of a row, by name; `dot_product_attention` says what each is.
STATISTICS = (
    "lse",
    "max_logit",
    "entropy",
    "effective_keys",
    "expected_distance",
    "min_entropy",
    "first_mass",
    "self_mass",
    "argmax_key",
    "max_prob",
)

Pairwise = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Mean:
    """What `mean_of` returns."""

    g: Any
    name: str = field(metadata={"static": True})

    def __call__(self, b, n, t, s):
        """Evaluate the function for pairs; index arrays as in a score function."""
        return jnp.asarray(self.g(b, n, t, s)) if callable(self.g) else self.g[b, s, n]

    @property
    def reaches(self) -> Callable[..., Any] | None:
        """Return the function (t0, nt, s0, ns) that is False of blocks where this is 0, if any."""
        return self.g.reaches if isinstance(self.g, _Within) else None

    def check(self, sizes: Sizes) -> None:
        """Raise unless the function or array fits a call's sizes."""
        if not callable(self.g):
            for letter, size, axis in zip("BSN", sizes["BSN"], self.g.shape, strict=True):
                if size != axis:
                    raise ValueError(
                        f"mean_of: g_BSN has {letter}={axis} but the call has {letter}={size}"
                    )
            return
        full = sizes["BNTS"]
        index = [
            jax.ShapeDtypeStruct([n if i == axis else 1 for i in range(4)], jnp.int32)
            for axis, n in enumerate(full)
        ]
        made = jax.eval_shape(self, *index)
        fits = made.ndim in (0, 4) and all(
            m in (1, n) for m, n in zip(made.shape, full, strict=made.ndim == 4)
        )
        if not fits or jnp.issubdtype(made.dtype, jnp.complexfloating):
            raise ValueError(
                f"mean_of: {self.name!r} must return real numbers that broadcast to [B,N,T,S], "
                f"{full}, got {made.dtype} {made.shape}"
            )


def mean_of(g: Pairwise | jax.Array, *, name: str | None = None) -> Mean:
    """Ask for the mean of a function of pairs under the attention probabilities.

        seen[name][b, t, n] = Σ_s p(s | b, n, t) · g(b, n, t, s)

    Args:
      g: function of index arrays (b, n, t, s) that broadcast to a block [B',N',T',S'], where t is
        the query's position q_offset + index, evaluated pair by pair like a score; or an array
        g_BSN. Gradients reach the array and what the function closes over.
      name: key of the result; default the function's name, "mean" for an array.
    Returns: an entry for `dot_product_attention(observe=...)`.
    Raises: ValueError naming the argument; sizes are compared when it is used.
    Example:
      >>> from jax_attn import causal, dot_product_attention
      >>> x_BTNH = jnp.zeros((1, 3, 2, 5))
      >>> def even(b, n, t, s): return s % 2 == 0
      >>> _, seen = dot_product_attention(
      ...     x_BTNH, x_BTNH, x_BTNH, mask=causal(), observe=(mean_of(even),)
      ... )
      >>> [round(float(x), 2) for x in seen["even"][0, :, 0]]
      [1.0, 0.5, 0.67]
    """
    if not callable(g):
        if not hasattr(g, "dtype") or g.ndim != 3 or not jnp.isrealobj(g):
            raise ValueError(
                f"mean_of: g must be a function (b, n, t, s) or a real array [B,S,N], got "
                f"{getattr(g, 'shape', type(g).__name__)}"
            )
        g, default = jnp.asarray(g), "mean"
    else:
        default = getattr(g, "__name__", type(g).__name__)
    name = default if name is None else name
    if not isinstance(name, str) or not name:
        raise ValueError(f"mean_of: name must be a string that is not empty, got {name!r}")
    if name == "<lambda>":
        raise ValueError("mean_of: give the lambda a name: mean_of(g, name=...)")
    return Mean(g, name)


def window_mass(w: int, *, name: str = "window_mass") -> Mean:
    """Ask for the mass within w positions: Σ_s p_s over |s - position| <= w.

    Args:
      w: int >= 0.
      name: key of the result; of two widths one needs another.
    Returns: an entry for `dot_product_attention(observe=...)`.
    Raises: ValueError naming w or name.
    Example:
      >>> from jax_attn import dot_product_attention
      >>> x_BTNH = jnp.zeros((1, 5, 2, 3))
      >>> _, seen = dot_product_attention(x_BTNH, x_BTNH, x_BTNH, observe=(window_mass(1),))
      >>> [round(float(x), 2) for x in seen["window_mass"][0, :, 0]]
      [0.4, 0.6, 0.6, 0.6, 0.4]
    """
    if not isinstance(w, int | np.integer) or isinstance(w, bool) or w < 0:
        raise ValueError(f"window_mass: w must be an int >= 0, got {w!r}")
    return mean_of(_Within(min(int(w), 2**31 - 1)), name=name)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Within:
    w: int = field(metadata={"static": True})

    def __call__(self, b, n, t, s):
        return jnp.abs(s - t) <= self.w

    def reaches(self, t0, nt, s0, ns):
        """Say whether any of nt positions from t0 and ns keys from s0 is that close."""
        return (s0 - (t0 + nt - 1) <= self.w) & (t0 - (s0 + ns - 1) <= self.w)


def check_observe(observe: Any, sizes: Sizes) -> tuple[tuple[str, ...], tuple[Mean, ...]]:
    """Return the names and the means that were asked for, or raise the ValueError that names what
    is none."""
    if observe is None:
        return (), ()
    if isinstance(observe, str | Mean) or not isinstance(observe, tuple | list):
        hint = f": write ({observe!r},)" if observe in STATISTICS else ""
        raise ValueError(f"observe must be a tuple of statistics, got {observe!r}{hint}")
    names, means = [], []
    for entry in observe:
        if isinstance(entry, Mean):
            if entry.name in STATISTICS:
                raise ValueError(f"mean_of: {entry.name!r} is a statistic, take another name")
            entry.check(sizes)
            means.append(entry)
        elif isinstance(entry, str) and entry in STATISTICS:
            names.append(entry)
        else:
            raise ValueError(_unknown(entry))
    given = [*names, *(mean.name for mean in means)]
    for name in given:
        if given.count(name) > 1:
            raise ValueError(
                f"observe: {name!r} stands there twice; leave one out, or of window_mass and "
                f"mean_of give one another name="
            )
    return tuple(names), tuple(means)


def _unknown(entry: Any) -> str:
    known = f"known are {', '.join(STATISTICS)}, window_mass(w) and mean_of(g)"
    if entry == "window_mass":
        return "observe: 'window_mass' needs its width, pass window_mass(w)"
    if not isinstance(entry, str):
        return f"observe: {entry!r} is no statistic; wrap a function as mean_of(g); {known}"
    near = difflib.get_close_matches(entry, STATISTICS, n=1, cutoff=0.0)[0]
    return f"observe: unknown statistic {entry!r}, the nearest is {near!r}; {known}"


def head_summary(
    seen: Mapping[str, jax.Array], *, edges: Mapping[str, jax.Array] | None = None
) -> dict[str, dict[str, jax.Array]]:
    """Reduce statistics of rows to numbers a head, on the spot: mean, least, largest, counts.

    Rows that are -inf (lse and max_logit of a row without keys) are left out; NaN and inf are not,
    so that a head that diverges shows.

    Args:
      seen: name -> [..., B, T, N], from `observe=`.
      edges: name -> rising edges of bins, [bins + 1]: adds "counts", how many rows fall into each
        bin, from which quantiles can be read; rows outside count into the first or last bin, NaN
        into none.
    Returns: name -> {"mean", "min", "max": [..., N], "counts": int32 [..., N, bins]}; of no rows
      the mean is 0, the least inf, the largest -inf.
    Raises: ValueError naming a statistic without B and T, edges of a name that is not there or
      that are no rising array [bins + 1].
    Example:
      >>> made = head_summary({"entropy": jnp.ones((2, 3, 5))})
      >>> made["entropy"]["mean"].tolist()
      [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    edges = {} if edges is None else edges
    for name in edges:
        if name not in seen:
            raise ValueError(f"edges: {name!r} is not among {', '.join(seen)}")
        if jnp.ndim(edges[name]) != 1 or len(edges[name]) < 2:
            raise ValueError(f"edges: {name!r} must be [bins + 1], got {jnp.shape(edges[name])}")
        known = not isinstance(edges[name], Tracer)
        if known and not (np.diff(np.asarray(edges[name])) > 0).all():
            raise ValueError(f"edges: {name!r} must rise, got {np.asarray(edges[name])}")
    made = {}
    for name, x_BTN in seen.items():
        if x_BTN.ndim < 3:
            raise ValueError(f"seen: {name!r} must be [..., B, T, N], got {x_BTN.shape}")
        x_BTN = x_BTN.astype(jnp.promote_types(x_BTN.dtype, jnp.float32))
        there = ~jnp.isneginf(x_BTN)
        some = jnp.maximum(jnp.sum(there, axis=(-3, -2)), 1)
        made[name] = {
            "mean": jnp.sum(jnp.where(there, x_BTN, 0.0), axis=(-3, -2)) / some,
            "min": jnp.min(x_BTN, axis=(-3, -2), initial=jnp.inf, where=there),
            "max": jnp.max(x_BTN, axis=(-3, -2), initial=-jnp.inf, where=there),
        }
        if name in edges:
            inner = jnp.asarray(edges[name])[1:-1]
            counted = there & ~jnp.isnan(x_BTN)
            bins = jnp.searchsorted(inner, x_BTN, side="right")
            counts = [
                jnp.sum(counted & (bins == i), axis=(-3, -2)) for i in range(len(edges[name]) - 1)
            ]
            made[name]["counts"] = jnp.stack(counts, axis=-1).astype(jnp.int32)
    return made
