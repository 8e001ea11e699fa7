"""How the folds walk: over units of batch and key/value heads, lines of blocks, and blocks."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_attn.kernels.blocks import Plan, Point, cut, loop


def rows(row: Any, count: int) -> Any:
    """Run a function of the query block for all of them and put the results in one row."""
    if count == 1:
        return row(0)
    return jax.tree.map(join, jax.lax.map(row, jnp.arange(count)))


def visit(plan: Plan, visits: Any, i: Any, bound: int, step: Any, carry: Any, reversible) -> Any:
    """Run step(masked, position in the order, carry) over the blocks that line i visits."""
    if bound == 1 and plan.whole != plan.mixed:
        return step(plan.mixed, 0, carry)
    if plan.whole:
        carry = loop(0, visits.whole[i], bound, partial(step, False), carry, reversible)
    if plan.mixed:
        carry = loop(visits.whole[i], visits.some[i], bound, partial(step, True), carry, reversible)
    return carry


def over_units(plan: Plan, parts: Any, unit: Any, carry: Any) -> Any:
    """Run carry, y = unit(carry, (b, k), parts) over all units; return the carry and all of y.

    Arrays with axes B and K are cut to the unit; bias and what is shared are not.
    """
    B, K = jax.tree.leaves(parts)[0].shape[:2]
    if plan.one_unit or B * K == 1:
        return unit(carry, (0, 0), _narrow(plan, parts))

    def one(carry, u):
        b, k = u // K, u % K
        cut_to_unit = partial(_cut_to_unit, b=b, k=k)
        mine = jax.tree.map(cut_to_unit, parts, is_leaf=lambda x: isinstance(x, Point))
        return unit(carry, (b, k), _narrow(plan, mine))

    carry, made = jax.lax.scan(one, carry, jnp.arange(B * K))
    return carry, jax.tree.map(lambda x: x.reshape(B, K, *x.shape[3:]), made)


def _cut_to_unit(x: Any, b: Any, k: Any) -> Any:
    if isinstance(x, Point):
        q, key, v = (_cut_to_unit(y, b, k) for y in x[:3])
        sinks = None if x.sinks_KG is None else cut(x.sinks_KG, k, 1, 0)
        return x._replace(q_BKGTH=q, k_BKSH=key, v_BKSE=v, sinks_KG=sinks)
    return cut(cut(x, b, 1, 0), k, 1, 1)


def _narrow(plan: Plan, parts: Any) -> Any:
    """Cast q, k, v, and their tangents, to the dtype in which blocks are multiplied; scale q."""

    def cast(x):
        if not isinstance(x, Point):
            return x
        q_BKGTH = x.q_BKGTH
        if plan.scales_q:
            q_BKGTH = q_BKGTH.astype(plan.wide) * plan.scale
        q, k, v = (y.astype(plan.narrow) for y in (q_BKGTH, x.k_BKSH, x.v_BKSE))
        return x._replace(q_BKGTH=q, k_BKSH=k, v_BKSE=v)

    return jax.tree.map(cast, parts, is_leaf=lambda x: isinstance(x, Point))


def join(x: jax.Array, axis: int = 3) -> jax.Array:
    """Put the leading axis, of blocks, before the axis of what is in a block, as one axis."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
