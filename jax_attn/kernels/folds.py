"""Attention in blocks of queries by keys: O(S) memory, forward and backward, on any backend.

A row of blocks is one fold of the softmax algebra (arXiv:1805.02867, arXiv:2112.05682); backward
recomputes probabilities from the row's lse (arXiv:2205.14135). Blocks whose pairs are all masked
are skipped, blocks whose pairs are all allowed run without a mask.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jax_attn.kernels import columns, derivative
from jax_attn.kernels.blocks import (
    Data,
    Plan,
    Point,
    Value,
    add_at,
    allowed,
    cut,
    cut_bias,
    final,
    find,
    has_holes,
    kept,
)
from jax_attn.kernels.hoist import vary, varying_axes
from jax_attn.kernels.walk import join, over_units, rows, visit


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def fold(plan: Plan, point: Point, data: Data) -> Value:
    """Return output, lse and columns of every row, float32 or wider."""
    return forward(plan, point, data)


@fold.defjvp
def _fold_jvp(plan, primals, tangents):
    point, data = primals
    value = fold(plan, point, data)
    rules = derivative.Rules(partial(push, plan), partial(_pull, plan))
    return value, derivative.push(rules, point, value, data, tangents[0])


def forward(plan: Plan, point: Point, data: Data) -> Value:
    """Return what a part of the keys makes of every row."""

    def unit(b, k, point):
        B, K, G, T = point.q_BKGTH.shape[:4]
        bound = point.k_BKSH.shape[2] // plan.keys

        def row(i):
            q_BKGTH = cut(point.q_BKGTH, i * plan.queries, plan.queries, 3)
            o_BKGTE = _no_output(plan, q_BKGTH, point.v_BKSE)
            l_BKGT = jnp.zeros_like(q_BKGTH[..., 0], plan.wide)
            m_BKGT = jnp.full_like(l_BKGT, -jnp.inf)
            seen = columns.start(plan, l_BKGT)

            def step(masked, at, carry):
                m_BKGT, l_BKGT, o_BKGTE, seen = carry
                j = data.by_query.order[i, at]
                at, first = find(data, b, k * G, i, j), j * plan.keys
                k_BKSH = cut(point.k_BKSH, first, plan.keys, 2)
                v_BKSE = cut(point.v_BKSE, first, plan.keys, 2)
                s_BKGTS = jnp.einsum(
                    "BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=plan.wide
                )
                s_BNTS = s_BKGTS.reshape(B, K * G, *s_BKGTS.shape[3:])
                of_bias = (b, k * G, i * plan.queries, at.s)
                bias_BNTS = cut_bias(plan, point.bias_BNTS, of_bias, (B, K * G))
                s_BNTS = final(plan, data, at, masked, s_BNTS, bias_BNTS, point.shared)
                s_BKGTS = s_BNTS.reshape(s_BKGTS.shape)
                top_BKGT = jnp.maximum(m_BKGT, jnp.max(s_BKGTS, axis=-1))
                shift_BKGT = jnp.where(top_BKGT == -jnp.inf, 0.0, top_BKGT)
                r_BKGT = jnp.exp(m_BKGT - shift_BKGT)
                e_BKGTS = jnp.exp(s_BKGTS - shift_BKGT[..., None])
                seen = columns.rescale(seen, m_BKGT, shift_BKGT, r_BKGT, l_BKGT)
                holes = has_holes(plan, masked, bias_BNTS)
                seen = columns.add(
                    plan, data, point.shared, at, holes, seen, s_BKGTS, e_BKGTS, shift_BKGT, m_BKGT
                )
                l_BKGT = l_BKGT * r_BKGT + jnp.sum(e_BKGTS, axis=-1)
                if plan.rate > 0.0:
                    stays_BKGTS = kept(plan, data, at, s_BNTS.shape).reshape(s_BKGTS.shape)
                    e_BKGTS = jnp.where(stays_BKGTS, e_BKGTS / (1.0 - plan.rate), 0.0)
                o_BKGTE = o_BKGTE * r_BKGT[..., None] + jnp.einsum(
                    "BKGTS,BKSE->BKGTE",
                    e_BKGTS.astype(plan.narrow),
                    v_BKSE,
                    preferred_element_type=plan.wide,
                )
                return top_BKGT, l_BKGT, o_BKGTE, seen

            visits = data.by_query
            carry = visit(plan, visits, i, bound, step, (m_BKGT, l_BKGT, o_BKGTE, seen), False)
            m_BKGT, l_BKGT, o_BKGTE, seen = carry
            of_keys_BKGT = m_BKGT
            if point.sinks_KG is not None:
                z_BKGT = point.sinks_KG.astype(plan.wide)[None, :, :, None]
                top_BKGT = jnp.maximum(m_BKGT, z_BKGT)
                shift_BKGT = jnp.where(top_BKGT == -jnp.inf, 0.0, top_BKGT)
                r_BKGT = jnp.exp(m_BKGT - shift_BKGT)
                seen = columns.rescale(seen, m_BKGT, shift_BKGT, r_BKGT, l_BKGT)
                seen = columns.add_sink(seen, z_BKGT, shift_BKGT)
                l_BKGT = l_BKGT * r_BKGT + jnp.exp(z_BKGT - shift_BKGT)
                o_BKGTE, m_BKGT = o_BKGTE * r_BKGT[..., None], top_BKGT
            none_BKGT = l_BKGT == 0.0
            l_BKGT = jnp.where(none_BKGT, 1.0, l_BKGT)
            lse_BKGT = jnp.where(none_BKGT, -jnp.inf, m_BKGT + jnp.log(l_BKGT))
            seen = columns.finish(plan, seen, l_BKGT, of_keys_BKGT)
            return Value(o_BKGTE / l_BKGT[..., None], lse_BKGT, seen)

        return rows(row, T // plan.queries)

    def every(_, at, point):
        return None, unit(at[0], at[1], point)

    return over_units(plan, point, every, None)[1]


def _pull(plan: Plan, point: Point, value: Value, data: Data, d: Value, reversible: bool) -> Point:
    made = pull(plan, point, value, data, d, reversible)
    return jax.tree.map(lambda made, x: made.astype(x.dtype), made, point)


def pull(plan: Plan, point: Point, value: Value, data: Data, d: Value, reversible: bool) -> Point:
    """Return the cotangent of the point for that of the value, float32 or wider.

    With D = Σ do·o - dlse: ds = p·(dP - D), and from ds those of q, k, bias, scale and the score.
    `columns` says what statistics add. The keys may be a part of those that the value is of.
    """
    do_BKGTE, delta_BKGT, d_seen = _cotangents(value, d)
    lse_BKGT = _no_row_of_nothing(value.lse_BKGT)
    d_sinks_KG = None if point.sinks_KG is None else pull_sinks(plan, point.sinks_KG, value, d)

    def unit(carry, at, parts):
        point, lse_BKGT, delta_BKGT, do_BKGTE, d_seen, argmax_BKGT = parts
        b, k = at
        B, K, G, T = point.q_BKGTH.shape[:4]
        bound = T // plan.queries

        def column(carry, j):
            k_BKSH = cut(point.k_BKSH, j * plan.keys, plan.keys, 2)
            v_BKSE = cut(point.v_BKSE, j * plan.keys, plan.keys, 2)

            def step(masked, at, carry):
                d_shared, d_bias_BNTS, dq_BKGTH, dk_BKHS, dv_BKES = carry
                i = data.by_key.order[j, at]
                at, first = find(data, b, k * G, i, j), i * plan.queries
                q_BKGTH = cut(point.q_BKGTH, first, plan.queries, 3)
                out_BKGTE = cut(do_BKGTE, first, plan.queries, 3)
                s_BKGTS = jnp.einsum(
                    "BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=plan.wide
                )
                of_bias = (b, k * G, first, at.s)
                bias_BNTS = cut_bias(plan, point.bias_BNTS, of_bias, (B, K * G))
                shape = (B, K * G, *s_BKGTS.shape[3:])
                s_BNTS, undo = jax.vjp(
                    partial(final, plan, data, at, masked),
                    s_BKGTS.reshape(shape),
                    bias_BNTS,
                    point.shared,
                )
                lse_row = cut(lse_BKGT, first, plan.queries, 3)[..., None]
                p_BKGTS = jnp.exp(s_BNTS.reshape(s_BKGTS.shape) - lse_row)
                dp_BKGTS = jnp.einsum(
                    "BKGTE,BKSE->BKGTS", out_BKGTE, v_BKSE, preferred_element_type=plan.wide
                )
                mixed_BKGTS = p_BKGTS
                if plan.rate > 0.0:
                    stays_BKGTS = kept(plan, data, at, shape).reshape(s_BKGTS.shape)
                    mixed_BKGTS = jnp.where(stays_BKGTS, p_BKGTS / (1.0 - plan.rate), 0.0)
                    dp_BKGTS = jnp.where(stays_BKGTS, dp_BKGTS / (1.0 - plan.rate), 0.0)
                delta_row, argmax_row, d_seen_row = (
                    jax.tree.map(lambda x: cut(x, first, plan.queries, 3)[..., None], rows)
                    for rows in (delta_BKGT, argmax_BKGT, d_seen)
                )
                slope_BKGTS = dp_BKGTS - delta_row
                more_BKGTS, beside_BKGTS, d_means = columns.slope(
                    *(plan, data, point.shared, at, has_holes(plan, masked, bias_BNTS)),
                    *(d_seen_row, argmax_row),
                    *(p_BKGTS, s_BNTS.reshape(s_BKGTS.shape), lse_row),
                )
                if more_BKGTS is not None:
                    slope_BKGTS = slope_BKGTS + more_BKGTS
                ds_BKGTS = p_BKGTS * slope_BKGTS
                if beside_BKGTS is not None:
                    ds_BKGTS = ds_BKGTS + beside_BKGTS
                ds_BNTS, d_bias_block, d_shared_block = undo(ds_BKGTS.reshape(shape))
                if d_means is not None:
                    d_shared_block = {**d_shared_block, "means": d_means}
                ds_BKGTS = ds_BNTS.reshape(s_BKGTS.shape).astype(plan.narrow)
                # The large operand second and S last in the result: no T×S block is transposed.
                dv_BKES = dv_BKES + jnp.einsum(
                    "BKGTE,BKGTS->BKES",
                    out_BKGTE,
                    mixed_BKGTS.astype(plan.narrow),
                    preferred_element_type=plan.wide,
                )
                dk_BKHS = dk_BKHS + jnp.einsum(
                    "BKGTH,BKGTS->BKHS", q_BKGTH, ds_BKGTS, preferred_element_type=plan.wide
                )
                part_BKGTH = jnp.einsum(
                    "BKGTS,BKSH->BKGTH", ds_BKGTS, k_BKSH, preferred_element_type=plan.wide
                )
                dq_BKGTH = add_at(dq_BKGTH, part_BKGTH, (0, 0, 0, first, 0))
                if d_bias_BNTS is not None:
                    d_bias_BNTS = add_at(d_bias_BNTS, d_bias_block, of_bias)
                d_shared = jax.tree.map(jnp.add, d_shared, d_shared_block)
                return d_shared, d_bias_BNTS, dq_BKGTH, dk_BKHS, dv_BKES

            zeros = (jnp.zeros_like(x.swapaxes(2, 3), plan.wide) for x in (k_BKSH, v_BKSE))
            carry = visit(plan, data.by_key, j, bound, step, (*carry, *zeros), reversible)
            return carry[:3], carry[3:]

        carry = (*carry, jnp.zeros_like(point.q_BKGTH, plan.wide))
        if point.k_BKSH.shape[2] == plan.keys:
            carry, (dk_BKHS, dv_BKES) = column(carry, 0)
        else:
            every = jnp.arange(point.k_BKSH.shape[2] // plan.keys)
            carry, parts = jax.lax.scan(column, carry, every)
            dk_BKHS, dv_BKES = (join(x) for x in parts)
        dk_BKSH, dv_BKSE = dk_BKHS.swapaxes(2, 3), dv_BKES.swapaxes(2, 3)
        dq_BKGTH = carry[2] * plan.scale if plan.scales_q else carry[2]
        return carry[:2], (dq_BKGTH, dk_BKSH, dv_BKSE)

    def wide_zeros(x):
        return jnp.zeros_like(x, jnp.promote_types(x.dtype, plan.wide))

    carry = jax.tree.map(wide_zeros, (point.shared, point.bias_BNTS))
    argmax_BKGT = value.seen_BKGT.get("argmax")
    parts = (point, lse_BKGT, delta_BKGT, do_BKGTE.astype(plan.narrow), d_seen, argmax_BKGT)
    (d_shared, d_bias), grads = over_units(plan, parts, unit, carry)
    dq_BKGTH, dk_BKSH, dv_BKSE = grads
    return Point(dq_BKGTH, dk_BKSH, dv_BKSE, d_bias, d_sinks_KG, d_shared)


def pull_sinks(plan: Plan, sinks_KG: jax.Array, value: Value, d: Value) -> jax.Array:
    """Return the cotangent of the sinks for that of the value."""
    _, delta_BKGT, d_seen = _cotangents(value, d)
    lse_BKGT = _no_row_of_nothing(value.lse_BKGT)
    z_BKGT = sinks_KG.astype(plan.wide)[None, :, :, None]
    p_BKGT = jnp.exp(z_BKGT - lse_BKGT)
    slope_BKGT = columns.sink_slope(d_seen, p_BKGT, z_BKGT, lse_BKGT) - delta_BKGT
    return jnp.sum(p_BKGT * slope_BKGT, axis=(0, 3))


def _cotangents(value: Value, d: Value) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Return the output's cotangent, D of every row, and what cotangents the columns have."""
    do_BKGTE, dlse_BKGT = (
        jnp.zeros_like(x) if dx is None else dx for x, dx in zip(value[:2], d[:2], strict=True)
    )
    d_seen = {name: x for name, x in d.seen_BKGT.items() if x is not None}
    delta_BKGT = jnp.sum(do_BKGTE * value.o_BKGTE, axis=-1) - dlse_BKGT
    return do_BKGTE, delta_BKGT + columns.moved(value.seen_BKGT, d_seen), d_seen


def push(plan: Plan, point: Point, value: Value, data: Data, d: Point, reversible: bool) -> Value:
    """Return the tangent of the value for that of the point: dlse = Σ p·ds, do = Σ p·ds·v + p·dv
    - dlse·o. With a part of the keys alone it is their part of the sum."""
    lse_BKGT = _no_row_of_nothing(value.lse_BKGT)

    def unit(carry, at, parts):
        point, d, lse_BKGT, argmax_BKGT = parts
        b, k = at
        B, K, G, T = point.q_BKGTH.shape[:4]
        bound = point.k_BKSH.shape[2] // plan.keys

        def row(i):
            q_BKGTH, dq_BKGTH = (
                cut(x.q_BKGTH, i * plan.queries, plan.queries, 3) for x in (point, d)
            )
            lse_row, argmax_row = (
                jax.tree.map(lambda x: cut(x, i * plan.queries, plan.queries, 3), x)
                for x in (lse_BKGT, argmax_BKGT)
            )

            def step(masked, at, carry):
                dlse_BKGT, do_BKGTE, d_seen = carry
                j = data.by_query.order[i, at]
                at, first = find(data, b, k * G, i, j), j * plan.keys
                k_BKSH, dk_BKSH = (cut(x.k_BKSH, first, plan.keys, 2) for x in (point, d))
                v_BKSE, dv_BKSE = (cut(x.v_BKSE, first, plan.keys, 2) for x in (point, d))
                of_bias = (b, k * G, i * plan.queries, at.s)
                bias_BNTS, d_bias_BNTS = (
                    cut_bias(plan, x.bias_BNTS, of_bias, (B, K * G)) for x in (point, d)
                )
                product = partial(jnp.einsum, "BKGTH,BKSH->BKGTS", preferred_element_type=plan.wide)
                s_BKGTS = product(q_BKGTH, k_BKSH)
                ds_BKGTS = product(dq_BKGTH, k_BKSH) + product(q_BKGTH, dk_BKSH)
                shape = (B, K * G, *s_BKGTS.shape[3:])
                s_BNTS, ds_BNTS = jax.jvp(
                    partial(final, plan, data, at, masked),
                    (s_BKGTS.reshape(shape), bias_BNTS, point.shared),
                    (ds_BKGTS.reshape(shape), d_bias_BNTS, d.shared),
                )
                s_BKGTS, ds_BKGTS = (x.reshape(s_BKGTS.shape) for x in (s_BNTS, ds_BNTS))
                p_BKGTS = jnp.exp(s_BKGTS - lse_row[..., None])
                dp_BKGTS = p_BKGTS * ds_BKGTS
                dlse_BKGT = dlse_BKGT + jnp.sum(dp_BKGTS, axis=-1)
                d_seen = columns.push(
                    *(plan, data, point.shared, d.shared, at, has_holes(plan, masked, bias_BNTS)),
                    *(d_seen, argmax_row),
                    *(p_BKGTS, ds_BKGTS, s_BKGTS, lse_row[..., None]),
                )
                if plan.rate > 0.0:
                    stays_BKGTS = kept(plan, data, at, shape).reshape(s_BKGTS.shape)
                    p_BKGTS, dp_BKGTS = (
                        jnp.where(stays_BKGTS, x / (1.0 - plan.rate), 0.0)
                        for x in (p_BKGTS, dp_BKGTS)
                    )
                for w_BKGTS, x_BKSE in ((dp_BKGTS, v_BKSE), (p_BKGTS, dv_BKSE)):
                    do_BKGTE = do_BKGTE + jnp.einsum(
                        "BKGTS,BKSE->BKGTE",
                        w_BKGTS.astype(plan.narrow),
                        x_BKSE,
                        preferred_element_type=plan.wide,
                    )
                return dlse_BKGT, do_BKGTE, d_seen

            o_BKGTE = _no_output(plan, q_BKGTH, point.v_BKSE)
            nothing = {name: jnp.zeros_like(lse_row) for name in value.seen_BKGT}
            carry = (jnp.zeros_like(lse_row), o_BKGTE, nothing)
            return visit(plan, data.by_query, i, bound, step, carry, reversible)

        return carry, rows(row, T // plan.queries)

    parts = (point, d, lse_BKGT, value.seen_BKGT.get("argmax"))
    dlse_BKGT, do_BKGTE, d_seen = over_units(plan, parts, unit, None)[1]
    d_seen = columns.pushed(value.seen_BKGT, d_seen, dlse_BKGT)
    made = Value(do_BKGTE - dlse_BKGT[..., None] * value.o_BKGTE, dlse_BKGT, d_seen)
    if point.sinks_KG is None:
        return made
    of_sinks = push_sinks(plan, point.sinks_KG, value, d.sinks_KG)
    return jax.tree.map(jnp.add, made, of_sinks)


def push_sinks(plan: Plan, sinks_KG: jax.Array, value: Value, d_sinks_KG: jax.Array) -> Value:
    """Return the tangent of the value for that of the sinks."""
    z_BKGT, dz_BKGT = (x.astype(plan.wide)[None, :, :, None] for x in (sinks_KG, d_sinks_KG))
    lse_BKGT = _no_row_of_nothing(value.lse_BKGT)
    p_BKGT = jnp.exp(z_BKGT - lse_BKGT)
    dlse_BKGT = p_BKGT * dz_BKGT
    nothing = jax.tree.map(jnp.zeros_like, value.seen_BKGT)
    d_seen = columns.push_sink(nothing, p_BKGT, z_BKGT, dz_BKGT, lse_BKGT)
    d_seen = columns.pushed(value.seen_BKGT, d_seen, dlse_BKGT)
    return Value(-dlse_BKGT[..., None] * value.o_BKGTE, dlse_BKGT, d_seen)


def attends_to(plan: Plan, bad_q_BKGT: jax.Array, bad_kv_BKS: jax.Array, data: Data) -> jax.Array:
    """Say of each row whether it attends to a bad key, or is bad itself and attends to any."""

    def unit(carry, at, parts):
        bad_q_BKGT, bad_kv_BKS = parts
        b, k = at
        B, K, G, T = bad_q_BKGT.shape
        bound = bad_kv_BKS.shape[2] // plan.keys

        def row(i):
            bad_row = cut(bad_q_BKGT, i * plan.queries, plan.queries, 3)

            def step(masked, at, hit_BKGT):
                j = data.by_query.order[i, at]
                at = find(data, b, k * G, i, j)
                bad_keys = cut(bad_kv_BKS, j * plan.keys, plan.keys, 2)
                bad_BKGTS = bad_keys[:, :, None, None] | bad_row[..., None]
                if masked:
                    shape = (B, K * G, *bad_BKGTS.shape[3:])
                    allowed_BNTS = jnp.broadcast_to(allowed(plan, data, at, shape), shape)
                    bad_BKGTS &= allowed_BNTS.reshape(bad_BKGTS.shape)
                return hit_BKGT | jnp.any(bad_BKGTS, axis=-1)

            return visit(plan, data.by_query, i, bound, step, jnp.zeros_like(bad_row), False)

        return carry, rows(row, T // plan.queries)

    return over_units(plan, (bad_q_BKGT, bad_kv_BKS), unit, None)[1]


def _no_output(plan: Plan, q_BKGTH: jax.Array, v_BKSE: jax.Array) -> jax.Array:
    """Make zeros for a loop's carry: under `shard_map` they have to vary as the loop's results."""
    zeros_BKGTE = jnp.zeros((*q_BKGTH.shape[:4], v_BKSE.shape[3]), plan.wide)
    return vary(zeros_BKGTE, varying_axes(q_BKGTH))


def _no_row_of_nothing(lse_BKGT: jax.Array) -> jax.Array:
    """Where no key is allowed, make e^(s - lse) 0 instead of e^(-inf + inf)."""
    return jnp.where(lse_BKGT == -jnp.inf, jnp.inf, lse_BKGT)
