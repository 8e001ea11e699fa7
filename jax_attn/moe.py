"""Mixture of experts: each token is processed by the k experts its router prefers; none dropped."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jax_attn.kernels import spread
from jax_attn.mlp import activate
from jax_attn.params import Leaves, Params, check_leaves, draw, fan_in
from jax_attn.shapes import axes, dims, floating


class Routing(NamedTuple):
    """What a router did, to be added to the loss or logged.

    Attributes:
      load_balance: X · Σ_x f_x·P_x, f the share of assignments and P the mean probability of an
        expert; 1 if balanced (arXiv:2101.03961).
      router_z: mean of (log Σ_x e^logit_x)² (arXiv:2202.08906).
      load_X: share of assignments each expert received; sums to 1.
    Example:
      >>> params = init_moe(jax.random.key(0), D=6, F=16, X=4)
      >>> routing = moe(params, jnp.ones((1, 2, 6)))[1]["routing"]
      >>> routing.load_X.shape
      (4,)
    """

    load_balance: jax.Array
    router_z: jax.Array
    load_X: jax.Array


def moe_leaves(D: int, F: int, *, gated: bool = True) -> Leaves:
    """Declare the leaves of a mixture of experts; arguments as in `init_moe`."""
    leaves = {
        "router_DX": fan_in(D),
        "w_in_XDF": fan_in(D),
        "w_out_XFD": fan_in(F),
    }
    return leaves | {"w_gate_XDF": fan_in(D)} if gated else leaves


def init_moe(
    key: jax.Array, D: int, F: int, X: int, *, gated: bool = True, dtype: Any = jnp.float32
) -> Params:
    """Draw a router and X experts, each an MLP or, with a gate leaf, a gated MLP.

    Args:
      key: a jax.random key.
      D: model width.
      F: hidden width of one expert.
      X: experts.
      gated: add leaf w_gate_XDF.
      dtype: of the leaves.
    Returns: {"router_DX", "w_in_XDF", "w_out_XFD"} and the gate.
    Raises: ValueError naming a size that is no int >= 1.
    Example:
      >>> init_moe(jax.random.key(0), D=6, F=16, X=4)["w_in_XDF"].shape
      (4, 6, 16)
    """
    return draw(key, moe_leaves(D, F, gated=gated), {"D": D, "F": F, "X": X}, dtype)


def moe(
    params: Params,
    x_BTD: jax.Array,
    *,
    k: int = 2,
    renormalize: bool = False,
    activation: str = "silu",
) -> tuple[jax.Array, dict[str, Any]]:
    """Process each token by its k most probable experts (arXiv:1701.06538, arXiv:2101.03961).

        y = Σ_{x in top k of p} p_x · expert_x(token),  p = softmax(token · router)

    Tokens are sorted by expert and multiplied in groups (`jax.lax.ragged_dot`), so no token is
    dropped whatever the load. The router runs in float32 or wider. Under `jax.set_mesh`, and so in
    `shard_step`, a device routes its own tokens; with experts split over mesh axis "model" each
    token goes to every device of it, and what they make is summed.

    Args:
      params: from `init_moe`; experts are gated if leaf w_gate_XDF is present.
      x_BTD: tokens.
      k: experts a token, 1 <= k <= X.
      renormalize: divide the k probabilities by their sum. With k = 1 that leaves the router
        without a gradient from y.
      activation: see `activate`.
    Returns: (y_BTD, {"routing": Routing}).
    Raises: ValueError naming the argument or leaf, the axis letter and both sizes.
    Example:
      >>> params = init_moe(jax.random.key(0), D=6, F=16, X=4)
      >>> y_BTD, aux = moe(params, jnp.ones((1, 2, 6)))
      >>> y_BTD.shape, round(float(aux["routing"].load_X.sum()), 4)
      ((1, 2, 6), 1.0)
    """
    check_leaves("moe", params, ("router_DX", "w_in_XDF", "w_out_XFD"), ("w_gate_XDF",))
    sizes = dims(x_BTD=x_BTD, **params)
    floating(x_BTD=x_BTD, **params)
    if not isinstance(k, int | np.integer) or not 1 <= k <= sizes.X:
        raise ValueError(f"k must be an int from 1 to X={sizes.X} experts, got {k!r}")

    run = partial(_run, k=k, renormalize=renormalize, activation=activation)
    found = spread.mesh()
    if found is None:
        y_BTD, sums = run(params, x_BTD)
    else:
        y_BTD, sums = _spread(run, found, params, x_BTD)
    tokens = jnp.maximum(sums.tokens, 1)  # no tokens: every statistic is 0, not NaN
    load_X = sums.load_X / (k * tokens)
    balance = sizes.X * jnp.sum(load_X * sums.probability_X) / tokens
    return y_BTD, {"routing": Routing(balance, sums.router_z / tokens, load_X)}


class _Sums(NamedTuple):
    """What routing adds up over tokens."""

    load_X: jax.Array
    probability_X: jax.Array
    router_z: jax.Array
    tokens: jax.Array


def _spread(
    run: Callable[..., tuple[jax.Array, _Sums]], found: Any, params: Params, x_BTD: jax.Array
) -> tuple[jax.Array, _Sums]:
    """Let each device route its own tokens, to the experts that it holds, and add up.

    Left to itself the compiler would sort the tokens of all devices, on each of them.
    """
    B, T, _ = x_BTD.shape
    X = params["w_in_XDF"].shape[0]
    batch = spread.larger(found, spread.BATCH) if B % spread.count(found, spread.BATCH) == 0 else ()
    context = spread.larger(found, (spread.CONTEXT,))
    context = context if context and T % spread.count(found, context) == 0 else ()
    model = spread.larger(found, (spread.HEADS,))
    if model and X % spread.count(found, model):
        raise ValueError(
            f"w_in_XDF has X={X}, which the {spread.count(found, model)} devices of mesh axis "
            f"model do not divide; take a multiple"
        )
    tokens = (*(batch or ()), *context)

    def part(params: Params, x_BTD: jax.Array) -> tuple[jax.Array, _Sums]:
        mine = params["w_in_XDF"].shape[0]
        first = jax.lax.axis_index(model) * mine if model else 0
        y_BTD, sums = run(params, x_BTD, first=first, axis=model)
        return (
            jax.lax.psum(y_BTD, model) if model else y_BTD,
            jax.tree.map(lambda x: jax.lax.psum(x, tokens) if tokens else x, sums),
        )

    specs = {
        name: PartitionSpec(model) if axes(name).startswith("X") else PartitionSpec()
        for name in params
    }
    place = PartitionSpec(batch or None, context or None)
    mapped = jax.shard_map(
        part, mesh=found, in_specs=(specs, place), out_specs=(place, PartitionSpec())
    )
    return mapped(params, x_BTD)


def _run(
    params: Params,
    x_BTD: jax.Array,
    *,
    k: int,
    renormalize: bool,
    activation: str,
    first: Any = 0,
    axis: Any = None,
) -> tuple[jax.Array, _Sums]:
    """Route tokens among all experts, and process them by those at hand, which begin at `first`."""
    D, X, mine = x_BTD.shape[-1], params["router_DX"].shape[1], params["w_in_XDF"].shape[0]
    with jax.named_scope("route"):
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        logits_BTX = jnp.einsum("BTD,DX->BTX", x_BTD.astype(wide), params["router_DX"].astype(wide))
        logits = logits_BTX.reshape(-1, X)
        probability = jax.nn.softmax(logits, axis=-1)
        weight, expert = jax.lax.top_k(probability, k)
        if renormalize:
            weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
        sums = _Sums(
            jnp.bincount(expert.reshape(-1), length=X).astype(wide),
            jnp.sum(probability, axis=0),
            jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1))),
            jnp.sum(jnp.ones_like(logits[:, 0])),
        )
        # Rows of (token, choice) sorted by expert, those at hand first; stable, so the order is a
        # function of x alone.
        expert = (expert.reshape(-1) - first) % X
        order = jnp.argsort(expert, stable=True)
        group_X = jnp.bincount(expert, length=X).astype(jnp.int32)[:mine]

    # ragged_dot has no vmap over its rows alone. Tied to the groups the weights are batched along
    # with them; XLA knows that an int equals itself, so the tie is gone once compiled.
    tie_X = group_X == group_X

    def grouped(rows: jax.Array, experts: jax.Array) -> jax.Array:
        experts = jnp.where(tie_X[:, None, None], experts, jnp.zeros_like(experts))
        return jax.lax.ragged_dot(rows, experts, group_X)

    # What rows of no group come out as, and their gradient, is not said anywhere: it is 0 here.
    here = jnp.arange(expert.size)[:, None] < jnp.sum(group_X)

    with jax.named_scope("experts"):
        own = x_BTD if axis is None else jax.lax.pcast(x_BTD, axis, to="varying")
        rows = jnp.where(here, own.reshape(-1, D)[order // k], 0)
        hidden = grouped(rows, params["w_in_XDF"])
        if "w_gate_XDF" in params:
            gate = grouped(rows, params["w_gate_XDF"])
            hidden = activate(activation, gate) * hidden
        else:
            hidden = activate(activation, hidden)
        made = jnp.where(here, grouped(hidden, params["w_out_XFD"]), 0)
        # Back to the order of the tokens by a gather, not a scatter-add: the sum over a token's
        # experts then has a fixed order, and the result is the same in every run.
        back = jnp.argsort(order)
        made = made[back].reshape(-1, k, D)
        y = jnp.sum(made * weight[:, :, None].astype(made.dtype), axis=1)
    return y.reshape(x_BTD.shape).astype(x_BTD.dtype), sums
