"""Statistics of a row as columns beside its values in the blockwise folds, and their derivatives.

With e = e^(s - m), p = e / Σe over all keys and the sink, a row carries while it is summed up

    entropy  Σ e·(s - m)    square  Σ e²    mean.i  Σ e·f_i    argmax  the first of the largest keys
    distance  Σ e·(key - position)

and holds at its end H = log Σe - Σe·(s - m) / Σe,  Σp²,  E[f_i] and the index; `max` is m over the
keys without the sink. Backward, with D the row's other terms:

    ds = p·(dP - D - g_H·(s - lse + H) + 2·g_q·(p - Σp²) + Σ_i g_i·(f_i - E[f_i])) + g_m·[argmax]
"""

from typing import Any

import jax
import jax.numpy as jnp

from jax_attn.kernels.blocks import At, Data, Plan, real_indices

Columns = dict[str, Any]


def start(plan: Plan, row: jax.Array) -> Columns:
    """Return the columns of no keys, in the shape of `row`."""
    names = [name for name in plan.columns if name != "max"]
    names += [_mean(i) for i in range(len(plan.means))]
    return {name: jnp.full_like(row, -1.0 if name == "argmax" else 0.0) for name in names}


def rescale(columns: Columns, m, top, r, l) -> Columns:
    """Refer columns to a new maximum: r = e^(m - top), l the sum before."""
    delta = jnp.where(m == -jnp.inf, 0.0, m - top)
    made = dict(columns)
    for name, x in columns.items():
        if name == "entropy":
            made[name] = r * x + r * delta * l
        elif name == "square":
            made[name] = r * r * x
        elif name != "argmax":
            made[name] = r * x
    return made


def add(plan: Plan, data: Data, shared: dict, at: At, holes: bool, columns, s, e, shift, m):
    """Add a block to columns that refer to its maximum; m was the maximum before.

    `holes` says that logits may be -inf. On a CPU a sum that takes one number a row from each entry
    costs several times as much as one that takes one number from all: rows are accounted for after.
    """
    made = dict(columns)
    total = jnp.sum(e, axis=-1)
    if "entropy" in made:
        made["entropy"] += _shifted(s, e, shift, total, holes)
    if "square" in made:
        made["square"] += jnp.sum(e * e, axis=-1)
    if "distance" in made:
        T, S = s.shape[3:]
        middle = jax.lax.convert_element_type(at.s - at.t - data.q_offset, s.dtype)
        keys = (jnp.arange(S, dtype=s.dtype) - T // 2).reshape(1, 1, 1, 1, S)
        rows = (jnp.arange(T, dtype=s.dtype) - T // 2).reshape(1, 1, 1, T)
        made["distance"] += jnp.sum(e * keys, axis=-1) + (middle - rows) * total
    if "argmax" in made:
        # Not the first e = 1: the compiler may round s differently on its way into e.
        (best, first), old = _first_largest(s), made["argmax"]
        first = first + jax.lax.convert_element_type(at.s, s.dtype)
        tied = (best == m) & (m > -jnp.inf)
        made["argmax"] = jnp.where(best > m, first, jnp.where(tied, jnp.minimum(first, old), old))
    for i, reaches in enumerate(plan.reaches):

        def mass(i=i):
            f = _mean_function(plan, data, shared, at, s, i)
            return jnp.sum(_there(e, e * f, holes), axis=-1)

        if reaches is None:
            made[_mean(i)] += mass()
        else:
            some = reaches(at.t + data.q_offset, s.shape[3], at.s, s.shape[4])
            made[_mean(i)] += jax.lax.cond(some, mass, lambda: jnp.zeros_like(total))
    return made


def _first_largest(s):
    """Return the largest logit of each row of a block, and the index of the first that is it.

    Parts of a row are compared with each other first: with one number a row only as many entries
    are compared as one part has.
    """
    parts = jnp.split(s, 8 if s.shape[-1] % 8 == 0 else 1, axis=-1)
    top, part = parts[0], jnp.zeros_like(parts[0])
    for i, x in enumerate(parts[1:], 1):
        part = jnp.where(x > top, float(i), part)
        top = jnp.maximum(x, top)
    best = jnp.max(s, axis=-1)
    keys = jnp.arange(top.shape[-1], dtype=s.dtype).reshape(1, 1, 1, 1, -1)
    index = part * top.shape[-1] + keys
    first = jnp.min(jnp.where(top == best[..., None], index, jnp.inf), axis=-1)
    # The compiler may round s differently on its way into `best` and into `top`; then no entry is
    # equal. A reduction that carries index and number together cannot lose either, but is slower.
    lost = (first == jnp.inf) & ~jnp.isnan(best)

    def together():
        return jnp.where(lost, jnp.argmax(s, axis=-1).astype(s.dtype), first)

    return best, jax.lax.cond(jnp.any(lost), together, lambda: first)


def _shifted(s, e, shift, total, holes: bool):
    """Return Σ e·(s - shift)."""
    some = total > 0.0
    reference = jnp.max(jnp.where(some, shift, -jnp.inf))
    # Far from a row's maximum it would cost that row's last bits, and all of them if it is inf.
    near = jnp.all(~some | (reference - shift <= 32.0)) & jnp.any(some)

    def by_block():
        gap = s - reference
        gap = jnp.maximum(gap, -1e30) if holes else gap  # 0 · -inf is NaN
        return jnp.sum(e * gap, axis=-1) + (reference - shift) * total

    def by_row():
        return jnp.sum(e * _gap(s, shift[..., None], e, holes), axis=-1)

    return jax.lax.cond(near, by_block, by_row)


def add_sink(columns: Columns, z, shift) -> Columns:
    """Add the sink, a key with logit z, to columns that refer to its maximum."""
    made = dict(columns)
    e = jnp.exp(z - shift)
    if "entropy" in made:
        made["entropy"] += jnp.where(e > 0.0, e * (z - shift), 0.0)
    if "square" in made:
        made["square"] += e * e
    return made


def finish(plan: Plan, columns: Columns, l, m) -> Columns:
    """Turn the sums of all keys into statistics; l is not 0, m the maximum without the sink."""
    made = dict(columns)
    for name, x in columns.items():
        if name == "entropy":
            made[name] = jnp.log(l) - x / l
        elif name == "square":
            made[name] = x / (l * l)
        elif name != "argmax":
            made[name] = x / l
    if "max" in plan.columns:
        made["max"] = m
    return made


def none(plan: Plan, row: jax.Array) -> Columns:
    """Return the statistics of a row without keys, in the shape of `row`."""
    made = start(plan, row)
    if "max" in plan.columns:
        made["max"] = jnp.full_like(row, -jnp.inf)
    return made


def merge(left: Columns, right: Columns, lse_left, lse_right, lse) -> Columns:
    """Merge the statistics of two parts of the keys; lse is that of all, 0 of rows without any."""
    made = {
        name: _share(name, left[name], lse_left, lse) + _share(name, right[name], lse_right, lse)
        for name in left
        if name not in ("max", "argmax")
    }
    if "max" in left:
        a, b, i, j = left["max"], right["max"], left["argmax"], right["argmax"]
        first = jnp.where(a > b, i, jnp.where(b > a, j, jnp.minimum(i, j)))
        made |= {"max": jnp.maximum(a, b), "argmax": first}
    return made


def gather(columns: Columns, lse_part, lse, axis: str) -> Columns:
    """Merge the statistics of the parts of the keys that the devices of a mesh axis have."""
    made = {
        name: jax.lax.psum(_share(name, x, lse_part, lse), axis)
        for name, x in columns.items()
        if name not in ("max", "argmax")
    }
    if "max" in columns:
        best, index = jax.lax.stop_gradient((columns["max"], columns["argmax"]))
        index = jnp.where(best == jax.lax.pmax(best, axis), index, jnp.inf)
        first = jax.lax.pmin(index, axis)
        # The derivative is that of the one device that has this key; of no keys every one has it.
        best = jax.lax.psum(jnp.where(index == first, columns["max"], 0.0), axis)
        made |= {"max": best, "argmax": first}
    return made


def _share(name: str, x, lse_part, lse):
    """Return what a part of the keys, which holds the share w = e^(lse_part - lse), adds to the
    statistic of all: H = Σ w·(H - log w), Σp² = Σ w²·Σp², E[f] = Σ w·E[f]."""
    some = lse_part != -jnp.inf
    gap = jnp.where(some, lse_part - lse, 0.0)
    w = jnp.where(some, jnp.exp(gap), 0.0)
    return w * (x - gap) if name == "entropy" else w * w * x if name == "square" else w * x


def moved(value: Columns, d: Columns) -> Any:
    """Return what the cotangents of the columns add to D, the row's constant term."""
    more = 0.0
    for name, g in d.items():
        if name not in ("max", "argmax"):
            more = more + (2.0 * g if name == "square" else g) * value[name]
    return more


def sink_slope(d: Columns, p, z, lse) -> Any:
    """Return what the columns' cotangents add to the factor of p in the sink's gradient."""
    more = 0.0
    if d.get("entropy") is not None:
        more = more - d["entropy"] * jnp.where(p > 0.0, z - lse, 0.0)
    if d.get("square") is not None:
        more = more + 2.0 * d["square"] * p
    return more


def slope(plan, data, shared, at, holes, rows: Columns, argmax, p, s, lse) -> tuple[Any, Any, Any]:
    """Return what the columns' cotangents, `rows` [..., 1], add to the factor of p in ds, what
    they add to ds beside it, and the cotangent of `shared["means"]`; None where nothing."""
    inside, beside, d_means = None, None, None
    if rows.get("entropy") is not None:
        inside = _sum(inside, -rows["entropy"] * _gap(s, lse, p, holes))
    if rows.get("square") is not None:
        inside = _sum(inside, 2.0 * rows["square"] * p)
    if rows.get("distance") is not None:
        inside = _sum(inside, rows["distance"] * _distance(data, at, s))
    wanted = [rows.get(_mean(i)) for i in range(len(plan.means))]
    if any(g is not None for g in wanted):

        def of(consts):
            every = range(len(plan.means))
            return [_mean_function(plan, data, {"means": consts}, at, s, i) for i in every]

        means, undo = jax.vjp(of, shared["means"])
        cotangents = [
            jnp.zeros_like(f) if g is None else p * g for f, g in zip(means, wanted, strict=True)
        ]
        # Where nothing attends, what a function answers must not matter, be it NaN.
        cotangents = [_there(p, c, holes) for c in cotangents]
        for f, g in zip(means, wanted, strict=True):
            if g is not None:
                inside = _sum(inside, g * _there(p, f, holes))
        d_means = undo(cotangents)[0]
    if rows.get("max") is not None:
        beside = jnp.where(_keys(at, s) == argmax, rows["max"], 0.0)
    return inside, beside, d_means


def push(plan, data, shared, d_shared, at, holes, columns: Columns, argmax, p, ds, s, lse):
    """Add a block's part to the columns' tangents: Σ of slope · ds, and of p · df."""
    made = dict(columns)
    if "entropy" in made:
        made["entropy"] -= jnp.sum(p * _gap(s, lse, p, holes) * ds, axis=-1)
    if "square" in made:
        made["square"] += jnp.sum(2.0 * p * p * ds, axis=-1)
    if "distance" in made:
        made["distance"] += jnp.sum(p * _distance(data, at, s) * ds, axis=-1)
    if "max" in made:
        made["max"] += jnp.sum(jnp.where(_keys(at, s) == argmax[..., None], ds, 0.0), axis=-1)
    if plan.means:

        def of(consts):
            every = range(len(plan.means))
            return [_mean_function(plan, data, {"means": consts}, at, s, i) for i in every]

        means, d_means = jax.jvp(of, (shared["means"],), (d_shared["means"],))
        for i, (f, df) in enumerate(zip(means, d_means, strict=True)):
            made[_mean(i)] += jnp.sum(_there(p, p * (f * ds + df), holes), axis=-1)
    return made


def push_sink(columns: Columns, p, z, dz, lse) -> Columns:
    """Add the sink's part to the columns' tangents."""
    made = dict(columns)
    if "entropy" in made:
        made["entropy"] -= p * jnp.where(p > 0.0, z - lse, 0.0) * dz
    if "square" in made:
        made["square"] += 2.0 * p * p * dz
    return made


def pushed(value: Columns, columns: Columns, dlse) -> Columns:
    """Finish the columns' tangents with what the row's constant term says."""
    made = dict(columns)
    for name, x in columns.items():
        if name not in ("max", "argmax"):
            made[name] = x - (2.0 * dlse if name == "square" else dlse) * value[name]
    return made


def _mean(i: int) -> str:
    return f"mean.{i}"


def _mean_function(plan: Plan, data: Data, shared: dict, at: At, s, i: int) -> jax.Array:
    """Evaluate the i-th function whose mean is wanted, on a block [B,K,G,T,S]."""
    B, K, G = s.shape[:3]
    b, n, t, keys = real_indices(plan, at, (B, K * G, *s.shape[3:]))
    consts = (shared["means"][i], data.means[i])
    f_BNTS = jnp.asarray(plan.means[i](consts, b, n, t + data.q_offset, keys)).astype(plan.wide)
    return jnp.broadcast_to(f_BNTS, (B, K * G, *s.shape[3:])).reshape(s.shape)


def _gap(s, reference, p, holes: bool):
    """s - reference, and 0 where 0 · -inf would be NaN."""
    return _there(p, s - reference, holes)


def _there(p, x, holes: bool):
    return jnp.where(p > 0.0, x, 0.0) if holes else x


def _distance(data: Data, at: At, s) -> jax.Array:
    """Key minus position for every pair of a block."""
    T = s.shape[3]
    positions = (at.t + jnp.arange(T) + data.q_offset).astype(s.dtype).reshape(1, 1, 1, T, 1)
    return _keys(at, s) - positions


def _keys(at: At, s) -> jax.Array:
    """Indices of a block's keys, in the dtype of the logits: exact up to 2^24 in float32."""
    return (at.s + jnp.arange(s.shape[-1])).astype(s.dtype).reshape(1, 1, 1, 1, -1)


def _sum(a, b):
    return b if a is None else a + b
