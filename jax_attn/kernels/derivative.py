"""The derivative of a function as a linear map with a transpose of its own, itself differentiable.

`jax.custom_vjp` has no forward mode, and the derivative rule of a `jax.custom_jvp` is transposed by
JAX operation by operation, which a loop over blocks survives only by storing every block. Here a
function's derivative is one primitive that knows both directions,

    push   tangent of the inputs    ->  tangent of the outputs
    pull   cotangent of the outputs ->  cotangent of the inputs

each the transpose of the other. Forward mode runs push, reverse mode runs pull, both as written;
to differentiate either once more, with respect to the point at which it was taken, JAX goes through
its `reversible` form operation by operation.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_attn.kernels.hoist import vary, varying_axes


class Rules(NamedTuple):
    """Both directions, (point, value, data, x, reversible) -> y, linear in x. `point` is what the
    function was given, `value` what it returned, `data` what has no derivative. A leaf of pull's x
    is None where JAX knows that nothing depends on it."""

    push: Callable[..., Any]
    pull: Callable[..., Any]


def push(rules: Rules, point: Any, value: Any, data: Any, tangent: Any) -> Any:
    """Return the tangent of `value` for a tangent of `point`."""
    parts = (point, value, data)
    leaves, tree = jax.tree.flatten(parts)
    x = jax.tree.leaves(tangent)
    params = {"direction": "push", "rules": rules, "tree": tree, "given": (True,) * len(x)}
    made = _derivative_p.bind(*leaves, *x, **params)
    return jax.tree.unflatten(jax.tree.structure(value), made)


_derivative_p = Primitive("attention_derivative")
_derivative_p.multiple_results = True


def _run(args, direction, rules, tree, given, reversible):
    point, value, data = jax.tree.unflatten(tree, args[: tree.num_leaves])
    like, present = point if direction == "push" else value, iter(args[tree.num_leaves :])
    leaves = [next(present) if there else None for there in given]
    x = jax.tree.unflatten(jax.tree.structure(like), leaves)
    rule = rules.push if direction == "push" else rules.pull
    return jax.tree.leaves(rule(point, value, data, x, reversible))


def _shapes(*avals, direction, rules, tree, given):
    del rules, given
    point, value, _ = jax.tree.unflatten(tree, avals[: tree.num_leaves])
    made = jax.tree.leaves(value if direction == "push" else point)
    return [aval.strip_weak_type() for aval in made]


def _fast(*args, direction, rules, tree, given):
    return _run(args, direction, rules, tree, given, reversible=False)


def _impl(*args, direction, rules, tree, given):
    run = partial(_fast, direction=direction, rules=rules, tree=tree, given=given)
    return jax.jit(run)(*args)


def _jvp(primals, tangents, *, direction, rules, tree, given):
    params = {"direction": direction, "rules": rules, "tree": tree, "given": given}
    at = tree.num_leaves
    made = _derivative_p.bind(*primals, **params)
    total = [None] * len(made)
    if any(type(t) is not ad.Zero for t in tangents[at:]):
        moved = _instantiated(tangents[at:], primals[at:])
        total = _derivative_p.bind(*primals[:at], *moved, **params)
    moving = [
        i
        for i, (x, t) in enumerate(zip(primals[:at], tangents[:at], strict=True))
        if type(t) is not ad.Zero and jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    if moving:

        def of(*values):
            args = list(primals)
            for i, value in zip(moving, values, strict=True):
                args[i] = value
            return _run(args, reversible=True, **params)

        ends = [tuple(leaves[i] for i in moving) for leaves in (primals, tangents)]
        more = jax.jvp(of, ends[0], ends[1])[1]
        total = [b if a is None else a + b for a, b in zip(total, more, strict=True)]
    if total and total[0] is None:
        total = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in made]
    return made, total


def _transpose(cotangents, *args, direction, rules, tree, given):
    at = tree.num_leaves
    point = jax.tree.unflatten(tree, args[:at])[0]
    params = {"rules": rules, "tree": tree}
    if direction == "push":
        there = tuple(type(c) is not ad.Zero for c in cotangents)
        moved = [c for c, yes in zip(cotangents, there, strict=True) if yes]
        made = _derivative_p.bind(*args[:at], *moved, direction="pull", given=there, **params)
    else:
        moved = _instantiated(cotangents, jax.tree.leaves(point))
        every = (True,) * len(moved)
        made = _derivative_p.bind(*args[:at], *moved, direction="push", given=every, **params)
        made = [x for x, yes in zip(made, given, strict=True) if yes]
    return [None] * at + made


def _instantiated(tangents, like):
    """Write zeros out, varying over the mesh axes over which what they belong to varies."""
    made = []
    for t, x in zip(tangents, like, strict=True):
        if type(t) is ad.Zero:
            t = jnp.zeros(x.shape, x.dtype)
        made.append(vary(t, varying_axes(x)))
    return made


def _batch(args, axes, *, direction, rules, tree, given):
    """Map both directions. What has no derivative, block tables above all, is mapped only if it
    came mapped: loops then keep their lengths."""
    at, size = tree.num_leaves, _mapped_size(args, axes)
    numbers = jax.tree.unflatten(tree, list(range(at)))
    fixed = len(jax.tree.leaves(numbers[2]))
    args, axes = list(args), list(axes)
    for i in [*range(at - fixed), *range(at, len(args))]:
        args[i] = batching.bdim_at_front(args[i], axes[i], size)
        axes[i] = 0
    data_axes = axes[at - fixed : at]

    def mapped(rule):
        def run(point, value, data, x, reversible):
            leaves, structure = jax.tree.flatten(data)

            def one(point, value, leaves, x):
                return rule(point, value, jax.tree.unflatten(structure, leaves), x, reversible)

            return jax.vmap(one, in_axes=(0, 0, data_axes, 0))(point, value, leaves, x)

        return run

    both = Rules(mapped(rules.push), mapped(rules.pull))
    made = _derivative_p.bind(*args, direction=direction, rules=both, tree=tree, given=given)
    return made, [0] * len(made)


def _mapped_size(args, axes):
    return next(x.shape[d] for x, d in zip(args, axes, strict=True) if d is not None)


ad.primitive_jvps[_derivative_p] = _jvp
ad.primitive_transposes[_derivative_p] = _transpose
batching.primitive_batchers[_derivative_p] = _batch
_derivative_p.def_impl(_impl)
_derivative_p.def_abstract_eval(_shapes)
mlir.register_lowering(_derivative_p, mlir.lower_fun(_fast, multiple_results=True))
