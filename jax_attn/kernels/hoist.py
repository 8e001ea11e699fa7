"""Functions of users, made safe to call inside loops and derivative rules.

A score or a mask may close over traced arrays. Those have to enter a custom derivative, a loop
body and a `shard_map` as arguments: they are found by tracing the function once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core


def hoist(
    fn: Callable[..., Any], axes: frozenset[str], *example: Any
) -> tuple[Callable[..., Any], list[Any]]:
    """Turn what a function closes over into an argument: (consts, *args) -> fn(*args), consts.

    The result is for arguments with the shapes and dtypes of the example, and for consts that vary
    over `axes`, the mesh axes over which anything in the caller's loops varies.
    """
    closed = jax.make_jaxpr(fn)(*(vary(x, axes) for x in example))
    as_traced = all(varying_axes(x) >= axes for x in closed.consts)

    def call(consts, *args):
        args = [vary(x, axes) for x in args]
        if as_traced:
            return jax.extend.core.jaxpr_as_fun(closed.replace(consts=list(consts)))(*args)[0]
        return _evaluate(closed.jaxpr, consts, args)[0]

    return call, closed.consts


def vary_together(tree: Any) -> Any:
    """Under `shard_map`, let every array vary over the mesh axes over which any of them does.

    A loop's carry must not begin to vary on the way, nor a replicated array collect its gradient
    by a collective inside a loop that ends sooner on one device than on another.
    """
    axes = varying_axes(tree)
    return jax.tree.map(lambda x: vary(x, axes), tree)


def vary(x: Any, axes: frozenset[str]) -> Any:
    """Let an array vary over mesh axes, those over which it does not yet."""
    missing = tuple(axes - varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def varying_axes(tree: Any) -> frozenset[str]:
    """Return the mesh axes of an enclosing `shard_map` over which any array of a tree varies."""
    types = [jax.typeof(x).manual_axis_type for x in jax.tree.leaves(tree)]
    return frozenset().union(*(kind.varying for kind in types))


def _evaluate(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
    """Evaluate a jaxpr whose consts vary over more mesh axes than when it was traced: before each
    operation, let its operands vary together, as `jax.lax` does."""
    values = dict(zip(jaxpr.constvars + jaxpr.invars, [*consts, *args], strict=True))

    def read(atom):
        return atom.val if hasattr(atom, "val") else values[atom]

    for equation in jaxpr.eqns:
        operands = vary_together([read(atom) for atom in equation.invars])
        inner = equation.params.get("jaxpr")
        if equation.primitive.name == "pvary":
            made = [vary(x, frozenset(equation.params["axes"])) for x in operands]
        elif equation.primitive.name in ("jit", "pjit") and inner is not None:
            made = _evaluate(inner.jaxpr, inner.consts, operands)
        else:
            params = equation.primitive.get_bind_params(equation.params)
            made = equation.primitive.bind(*operands, **params)
            made = made if equation.primitive.multiple_results else [made]
        values.update(zip(equation.outvars, made, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
