"""From what an implementation sums up of a row, [B,N,T] each, to the statistics asked for."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jax_attn.kernels import pairs
from jax_attn.kernels.call import Call
from jax_attn.observe import Mean

# Columns of `columns.py` that a statistic is made of.
_NEEDS = {
    "max_logit": ("max", "argmax"),
    "min_entropy": ("max", "argmax"),
    "max_prob": ("max", "argmax"),
    "argmax_key": ("max", "argmax"),
    "entropy": ("entropy",),
    "effective_keys": ("square",),
    "expected_distance": ("distance",),
}


def columns(call: Call) -> tuple[str, ...]:
    """Name the columns that the call's statistics need."""
    names = [column for name in call.statistics for column in _NEEDS.get(name, ())]
    return tuple(dict.fromkeys(names))


def finish(call: Call, lse_BNT, rows: dict[str, Any], poison_BTN: Any) -> dict[str, jax.Array]:
    """Return name -> [B,T,N], in the order asked for.

    Args:
      call: with finite q and k wherever a row may not see what they hold.
      rows: columns by name, those of `columns(call)`, and "mean.i" for each of the call's means.
      poison_BTN: NaN for the rows that attend to something not finite, else 0; or None.
    """
    made = {}
    for name in call.statistics:
        if name == "lse":
            made[name] = lse_BNT
        elif name == "max_logit":
            made[name] = rows["max"]
        elif name == "entropy":
            made[name] = rows["entropy"]
        elif name == "effective_keys":
            none = rows["square"] == 0.0
            made[name] = jnp.where(none, 0.0, 1.0 / jnp.where(none, 1.0, rows["square"]))
        elif name in ("min_entropy", "max_prob"):
            some = rows["max"] != -jnp.inf
            gap = jnp.where(some, lse_BNT, 0.0) - jnp.where(some, rows["max"], 0.0)
            made[name] = gap if name == "min_entropy" else jnp.where(some, jnp.exp(-gap), 0.0)
        elif name == "argmax_key":
            made[name] = rows["argmax"]
        elif name == "expected_distance":
            made[name] = rows["distance"]
        elif name == "first_mass":
            made[name] = pairs.mass(call, lse_BNT, jnp.zeros(call.sizes.T, jnp.int32))
        else:
            assert name == "self_mass", name
            made[name] = pairs.mass(call, lse_BNT, jnp.arange(call.sizes.T) + call.q_offset)
    made |= {mean.name: rows[f"mean.{i}"] for i, mean in enumerate(call.means)}
    made = {name: x.transpose(0, 2, 1) for name, x in made.items()}
    if poison_BTN is not None:
        made = {name: x + poison_BTN.astype(x.dtype) for name, x in made.items()}
    if "argmax_key" in made:
        index = jax.lax.stop_gradient(made["argmax_key"])
        made["argmax_key"] = jnp.where(jnp.isnan(index), -1.0, index).astype(jnp.int32)
    return made


def with_masses_as_means(call: Call) -> Call:
    """Ask for the masses of single keys, which may be on another device, as means of functions."""
    masses = {"first_mass": Mean(_first, "first_mass"), "self_mass": Mean(_own, "self_mass")}
    asked = tuple(mean for name, mean in masses.items() if name in call.statistics)
    statistics = tuple(name for name in call.statistics if name not in masses)
    return replace(call, statistics=statistics, means=(*call.means, *asked))


def in_order(call: Call, seen: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Put statistics into the order in which the call asks for them."""
    return {name: seen[name] for name in (*call.statistics, *(mean.name for mean in call.means))}


def _first(b, n, t, s):
    return s == 0


def _own(b, n, t, s):
    return s == t


def of_nothing(call: Call) -> dict[str, jax.Array]:
    """Return the statistics of a call whose arrays hold nothing: no keys but a sink, or no rows."""
    zeros = jnp.zeros(call.sizes["BNT"], call.wide)
    rows = {name: zeros for name in ("entropy", "square", "distance")}
    rows |= {"max": zeros - jnp.inf, "argmax": zeros - 1.0}
    rows |= {f"mean.{i}": zeros for i in range(len(call.means))}
    lse_BNT = zeros - jnp.inf
    if call.sinks_N is not None:
        lse_BNT = zeros + call.sinks_N.astype(call.wide)[None, :, None]
        rows["square"] = zeros + 1.0
    return finish(call, lse_BNT, rows, None)
