"""Count the multiplications of matrices in a traced program, loops by how often they really run.

XLA's own count takes a loop's body once and a Pallas call as nothing. Here the program is walked as
it was traced: a contraction of sizes [b,m,k] and [b,k,n] is 2·b·m·k·n operations, a scan multiplies
by its length, and integers that depend on no input are computed on the way, so that a loop whose
bounds come from a mask, as in blockwise attention, is followed from its start to its end.
Elementwise work is not counted, as is usual for utilisation (Chowdhery et al., PaLM, 2022, app. B).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.extend import core

_LONGEST = 100_000  # iterations of a loop that are followed
_LARGEST = 1_000_000  # elements of an integer array that is computed
# What a device sees of a value, not the value: outside a mesh these are the identity.
_PLACES = ("pcast", "pvary", "sharding_constraint", "mesh_cast", "copy", "optimization_barrier")


_PROGRAMS = (type(jax.make_jaxpr(lambda: ())()), core.Jaxpr)  # one type in newer releases of JAX


class _Unknown:
    def __repr__(self) -> str:
        return "?"


_UNKNOWN = _Unknown()


@dataclasses.dataclass
class Count:
    """Operations of a whole program, on all devices together."""

    flops: float = 0.0
    """Two for each multiplication with its addition."""
    narrow: float = 0.0
    """The part of it whose factors are narrower than 4 bytes, as matrix units want them."""
    iterations: list[float] = dataclasses.field(default_factory=list)
    """How often each loop ran whose bounds were computed, each time it was met."""
    in_kernel: bool = False
    """Inside a Pallas kernel that declares no cost: of a choice the most is counted there."""
    mesh: Any = None
    """Of the `shard_map` that is being walked, if it is in one."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """What could not be counted; if there is any, `flops` is a lower bound."""

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def count(traced: Any) -> Count:
    """Count the operations of a traced program.

    Args:
      traced: `jax.make_jaxpr(f)(...)`, or `jitted.trace(...).jaxpr`.
    Returns: the count; a part under `shard_map` is counted for every device.
    Example:
      >>> x, y = jax.ShapeDtypeStruct((3, 5), "float32"), jax.ShapeDtypeStruct((5, 7), "float32")
      >>> count(jax.make_jaxpr(lambda x, y: x @ y)(x, y)).flops == 2 * 3 * 5 * 7
      True
    """
    made = Count()
    jaxpr, consts = _opened(traced)
    _walk(jaxpr, consts, [_UNKNOWN] * len(jaxpr.invars), made, 1.0)
    return made


def _walk(
    jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], made: Count, times: float
) -> list[Any]:
    """Follow a jaxpr with what is known of its arguments; return what is known of its results."""
    known: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        if isinstance(atom, core.Literal):
            return _keep(atom.val)
        return known.get(atom, _UNKNOWN)

    known.update(zip(jaxpr.constvars, map(_keep, consts), strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))
    for eqn in jaxpr.eqns:
        results = _equation(eqn, [read(atom) for atom in eqn.invars], made, times)
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _keep(value: Any) -> Any:
    """Keep integers and booleans: floats decide no bound here."""
    if not hasattr(value, "shape"):
        value = np.asarray(value)
    wanted = jax.numpy.issubdtype(value.dtype, np.integer) or value.dtype == bool
    return np.asarray(value) if wanted and value.size <= _LARGEST else _UNKNOWN


def _equation(eqn: Any, inputs: list[Any], made: Count, times: float) -> list[Any]:
    name, params = eqn.primitive.name, eqn.params
    nothing = [_UNKNOWN] * len(eqn.outvars)
    if name == "dot_general":
        _add(made, eqn, times * _contraction(eqn))
    elif name == "ragged_dot_general" or name == "ragged_dot":
        rows, inner = eqn.invars[0].aval.shape[-2:]
        _add(made, eqn, times * 2 * rows * inner * eqn.outvars[0].aval.shape[-1])
    elif name == "conv_general_dilated":
        out, kernel = eqn.outvars[0].aval, eqn.invars[1].aval
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        _add(made, eqn, times * 2 * out.size * kernel.size / features)
    elif name == "pallas_call":
        _pallas(eqn, made, times)
    elif name == "scan":
        return _scan(eqn, inputs, made, times)
    elif name == "while":
        return _while(eqn, inputs, made, times)
    elif name == "cond":
        return _cond(eqn, inputs, made, times)
    elif name == "shard_map":
        return _shard_map(eqn, inputs, made, times)
    elif name in _PLACES:
        return inputs if len(inputs) == len(nothing) else nothing
    elif name == "attention_derivative":
        _derivative(eqn, inputs, made, times)
    elif inner := _inside(params):
        return _walk(inner[0], inner[1], inputs, made, times)
    elif name in ("custom_call", "ffi_call"):
        made.note(f"{params.get('call_target_name', params.get('target_name', name))} not counted")
    elif (inputs and all(x is not _UNKNOWN for x in inputs)) or name == "iota":
        return _compute(eqn, inputs, nothing)
    return nothing


def _derivative(eqn: Any, inputs: list[Any], made: Count, times: float) -> None:
    """Count what stands for a derivative of this library's attention until it is compiled."""
    run = partial(eqn.primitive.impl, **eqn.params)
    shapes = [jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in eqn.invars]
    try:
        if made.mesh is None:
            traced = jax.make_jaxpr(run)(*shapes)
        else:  # it may name axes of the mesh
            everywhere = jax.sharding.PartitionSpec()
            mapped = jax.shard_map(run, mesh=made.mesh, in_specs=everywhere,
                                   out_specs=everywhere, check_vma=False)  # fmt: skip
            traced = jax.make_jaxpr(mapped)(*shapes).eqns[-1].params["jaxpr"]
    except Exception as error:
        made.note(f"attention_derivative not counted: {type(error).__name__}")
        return
    jaxpr, consts = _opened(traced)
    _walk(jaxpr, consts, inputs, made, times)


def _add(made: Count, eqn: Any, flops: float) -> None:
    made.flops += flops
    if all(atom.aval.dtype.itemsize < 4 for atom in eqn.invars[:2]):
        made.narrow += flops


def _contraction(eqn: Any) -> float:
    (left, _), _ = eqn.params["dimension_numbers"]
    shared = math.prod(eqn.invars[0].aval.shape[axis] for axis in left)
    return 2.0 * shared * eqn.outvars[0].aval.size


def _inside(params: Any) -> tuple[Any, Sequence[Any]] | None:
    """Find the program of a call that is no loop: jit, checkpoint, custom rules."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = params.get(key)
        if isinstance(inner, _PROGRAMS):
            return _opened(inner)
    return None


def _opened(program: Any) -> tuple[Any, Sequence[Any]]:
    """Split a program from its constants, if it has them with it."""
    return getattr(program, "jaxpr", program), getattr(program, "consts", ())


# Operations on integers as NumPy has them; others are asked of JAX, which takes longer.
_NUMPY: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal, "and": np.bitwise_and, "or": np.bitwise_or,
    "not": np.invert, "neg": np.negative, "sign": np.sign, "abs": np.abs,
    "stop_gradient": lambda x: x,
}  # fmt: skip


def _simply(eqn: Any, inputs: list[Any]) -> Any:
    """Compute what NumPy can; None for other operations."""
    name, params = eqn.primitive.name, eqn.params
    if name in _NUMPY:
        return _NUMPY[name](*inputs)
    if name == "convert_element_type":
        return inputs[0].astype(params["new_dtype"])
    if name in ("squeeze", "reshape", "expand_dims"):
        return inputs[0].reshape(eqn.outvars[0].aval.shape)
    if name == "select_n" and len(inputs) == 3:
        return np.where(inputs[0], inputs[2], inputs[1])
    if name == "dynamic_slice":
        sizes = params["slice_sizes"]
        begins = [np.clip(int(i), 0, n - size) for i, n, size in
                  zip(inputs[1:], inputs[0].shape, sizes, strict=True)]  # fmt: skip
        return inputs[0][tuple(slice(i, i + n) for i, n in zip(begins, sizes, strict=True))]
    if name == "broadcast_in_dim" and len(inputs) == 1:
        shape, dims = params["shape"], params["broadcast_dimensions"]
        inner = [1] * len(shape)
        for axis, n in zip(dims, inputs[0].shape, strict=True):
            inner[axis] = n
        return np.broadcast_to(inputs[0].reshape(inner), shape)
    return None


def _compute(eqn: Any, inputs: list[Any], nothing: list[Any]) -> list[Any]:
    """Compute integers that depend on no input of the program."""
    outputs = [var.aval for var in eqn.outvars]
    small = all(getattr(aval, "size", _LARGEST + 1) <= _LARGEST for aval in outputs)
    if not small or not all(np.issubdtype(a.dtype, np.integer) or a.dtype == bool for a in outputs):
        return nothing
    simple = _simply(eqn, inputs)
    if simple is not None:
        return [_keep(np.asarray(simple, dtype=outputs[0].dtype))]
    params = {key: None if key in ("sharding", "out_sharding") else value
              for key, value in eqn.params.items()}  # fmt: skip
    try:
        with jax.ensure_compile_time_eval(), jax.default_device(jax.devices("cpu")[0]):
            results = eqn.primitive.bind(*inputs, **params)
    except Exception:  # an operation that means something under a mesh alone: its result is unknown
        return nothing
    return [_keep(x) for x in (results if eqn.primitive.multiple_results else [results])]


def _scan(eqn: Any, inputs: list[Any], made: Count, times: float) -> list[Any]:
    params, nothing = eqn.params, [_UNKNOWN] * len(eqn.outvars)
    body, consts = _opened(params["jaxpr"])
    length = params["length"]
    # What is scanned over has one axis more outside than inside; releases of JAX differ in how
    # they write down which is which.
    last = sum(a.aval.shape == b.aval.shape for a, b in zip(eqn.invars, body.invars, strict=True))
    kept = sum(a.aval.shape == b.aval.shape for a, b in zip(eqn.outvars, body.outvars, strict=True))
    fixed, carry, rows = inputs[: last - kept], inputs[last - kept : last], inputs[last:]
    alike = [x if x is _UNKNOWN or len(x) == 0 or (x != x[:1]).any() else x[0] for x in rows]
    same = all(x is _UNKNOWN or x is not y for x, y in zip(alike, rows, strict=True))
    plain = not _has_loops(body) and any(x is _UNKNOWN for x in inputs)
    if plain or length > _LONGEST or (same and all(x is _UNKNOWN for x in carry)):
        # Every iteration is the same to us.
        slices = alike if same else [_UNKNOWN] * len(rows)
        begin = carry if same else [_UNKNOWN] * len(carry)
        results = _walk(body, consts, fixed + begin + slices, made, times * length)
        stacks = [
            x if x is _UNKNOWN else _keep(np.broadcast_to(x, (length, *x.shape)))
            for x in results[len(carry) :]
        ]
        return nothing[: len(carry)] + stacks
    stacked: list[list[Any]] = []
    order = range(length - 1, -1, -1) if params["reverse"] else range(length)
    for i in order:
        row = [x if x is _UNKNOWN else x[i] for x in rows]
        results = _walk(body, consts, fixed + carry + row, made, times)
        carry = results[: len(carry)]
        stacked.append(results[len(carry) :])
    stacked = stacked[::-1] if params["reverse"] else stacked
    columns = [
        _UNKNOWN if any(x is _UNKNOWN for x in column) else _keep(np.stack(column))
        for column in zip(*stacked, strict=True)
    ]
    return carry + (columns or nothing[len(carry) :])


def _shard_map(eqn: Any, inputs: list[Any], made: Count, times: float) -> list[Any]:
    """Walk what each device does; what is known of it is the same on all of them."""
    mesh = eqn.params["mesh"]
    axes = eqn.params.get("manual_axes", mesh.axis_names)
    each = math.prod(mesh.shape[axis] for axis in axes)
    body, consts = _opened(eqn.params["jaxpr"])
    mine = [
        x if x is _UNKNOWN else x[tuple(slice(n) for n in var.aval.shape)]
        for x, var in zip(inputs, body.invars, strict=True)
    ]
    outside, made.mesh = made.mesh, mesh
    results = _walk(body, consts, mine, made, times * each)
    made.mesh = outside
    return [
        x if x is _UNKNOWN else np.tile(x, [a // max(b, 1) for a, b in
                                            zip(var.aval.shape, x.shape, strict=True)])
        for x, var in zip(results, eqn.outvars, strict=True)
    ]  # fmt: skip


def _while(eqn: Any, inputs: list[Any], made: Count, times: float) -> list[Any]:
    params = eqn.params
    condition, body = _opened(params["cond_jaxpr"]), _opened(params["body_jaxpr"])
    first, last = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    asks, fixed, carry = inputs[:first], inputs[first:last], inputs[last:]
    each, trips = Count(mesh=made.mesh, in_kernel=made.in_kernel), 0
    simple = not _has_loops(body[0])
    while trips < _LONGEST:
        (goes_on,) = _walk(*condition, asks + carry, Count(), 0.0)
        if goes_on is _UNKNOWN:
            if not _multiplies(body[0]):
                return [_UNKNOWN] * len(eqn.outvars)
            made.note("a loop whose end depends on data is counted as one iteration")
            _walk(*body, fixed + carry, made, times)
            return [_UNKNOWN] * len(eqn.outvars)
        if not goes_on:
            break
        # Only the first iteration of a body without loops has to be counted: all are alike.
        here = each if not simple or not trips else Count(mesh=made.mesh, in_kernel=made.in_kernel)
        carry = _walk(*body, fixed + carry, here, times)
        trips += 1
    factor = trips if simple else 1
    made.flops, made.narrow = made.flops + each.flops * factor, made.narrow + each.narrow * factor
    made.iterations += [*each.iterations, trips] if _multiplies(body[0]) else each.iterations
    for text in each.notes:
        made.note(text)
    return carry


def _cond(eqn: Any, inputs: list[Any], made: Count, times: float) -> list[Any]:
    branches, index = eqn.params["branches"], inputs[0]
    if index is not _UNKNOWN:
        branch = branches[int(np.clip(index, 0, len(branches) - 1))]
        return _walk(*_opened(branch), inputs[1:], made, times)
    each = [Count(mesh=made.mesh, in_kernel=made.in_kernel) for _ in branches]
    for branch, mine in zip(branches, each, strict=True):
        _walk(*_opened(branch), inputs[1:], mine, times)
    pick = max if made.in_kernel else min  # a kernel's first and last blocks do more, all do most
    chosen = pick(each, key=lambda mine: mine.flops)
    if not made.in_kernel and any(mine.flops > chosen.flops for mine in each):
        made.note("of a choice that depends on data the branch with fewer operations is counted")
    made.flops, made.narrow = made.flops + chosen.flops, made.narrow + chosen.narrow
    made.iterations += chosen.iterations
    for text in chosen.notes:
        made.note(text)
    return [_UNKNOWN] * len(eqn.outvars)


def _pallas(eqn: Any, made: Count, times: float) -> None:
    """Take the cost that a kernel declares: of the whole call."""
    cost = eqn.params.get("cost_estimate")
    if cost is not None:
        _add(made, eqn, times * cost.flops)
        return
    grid = eqn.params["grid_mapping"].grid
    if not all(isinstance(size, int) for size in grid):
        made.note("a Pallas kernel without a cost_estimate and with a grid known at run time only")
        return
    _walk_kernel(eqn.params["jaxpr"], made, times * math.prod(grid))


def _walk_kernel(jaxpr: Any, made: Count, times: float) -> None:
    made.note(
        "a Pallas kernel without a cost_estimate: all of its body is counted for each grid point, "
        "which may be more than runs"
    )
    inside = Count(mesh=made.mesh, in_kernel=True)
    _walk(jaxpr, [_UNKNOWN] * len(jaxpr.constvars), [_UNKNOWN] * len(jaxpr.invars), inside, times)
    made.flops, made.narrow = made.flops + inside.flops, made.narrow + inside.narrow
    for text in inside.notes:
        made.note(text)


def _programs(eqn: Any) -> list[Any]:
    """List the programs inside an equation."""
    found = []
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, _PROGRAMS):
                found.append(_opened(one)[0])
    return found


def _any(jaxpr: Any, names: tuple[str, ...]) -> bool:
    return any(
        eqn.primitive.name in names or any(_any(inner, names) for inner in _programs(eqn))
        for eqn in jaxpr.eqns
    )


def _has_loops(jaxpr: Any) -> bool:
    return _any(jaxpr, ("while", "cond"))


def _multiplies(jaxpr: Any) -> bool:
    return _any(jaxpr, ("dot_general", "ragged_dot_general", "conv_general_dilated", "pallas_call"))
