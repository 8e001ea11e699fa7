"""Attention over a sequence that is split over the devices of a mesh axis."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jax_attn.kernels import exchange, ring, split_kv
from jax_attn.kernels.call import Call, Score, checked
from jax_attn.mask_types import Mask
from jax_attn.observe import Mean
from jax_attn.shapes import axes

CONTEXTS = ("ring", "zigzag", "all_to_all", "split_kv")


def context_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKE: jax.Array,
    *,
    context: str,
    axis: str = "context",
    mask: Mask | jax.Array | None = None,
    bias_BNTS: jax.Array | None = None,
    score: Score | None = None,
    scale: Any = None,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
    q_offset: Any = 0,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    observe: tuple[str | Mean, ...] | None = None,
) -> Any:
    """Attend as `dot_product_attention` does, inside `jax.shard_map`, over a split sequence.

    T and S are those of a device; the sequence is P times as long, P the size of the mesh axis.

        ring        device i holds the i-th of P runs of tokens; keys and values go round
        zigzag      the same, and it holds runs i and 2P - 1 - i of 2P: causal work is balanced.
                    `zigzag_order` says how to order tokens so that a plain split does that
        all_to_all  runs as in ring; devices exchange tokens for heads, attend to the whole sequence
                    for K / P of the heads, and exchange back
        split_kv    runs of keys as in ring, and every device has all queries, as in decoding: each
                    attends to its own keys, and what comes out is summed over devices

    Per device a ring holds nothing longer than its part of the sequence, forward or backward
    (arXiv:2310.01889), all_to_all the whole sequence of its heads (arXiv:2309.14509).

    Args:
      q_BTNH, k_BSKH, v_BSKE: this device's part.
      context: "ring", "zigzag", "all_to_all" or "split_kv".
      axis: the mesh axis that the sequence is split over.
      bias_BNTS: of this device's queries, in their order, and all keys, in the sequence's.
      mask, score, observe, q_offset, dropout_key: as in `dot_product_attention`, of the whole
        sequence, and the same on every device: t and s are indices in the sequence, b and n those
        at hand.
      scale, softcap, sinks_N, dropout_rate: as in `dot_product_attention`.
    Returns: out [B,T,N,E], with `observe` (out, seen), of this device's queries; of split_kv the
      same on every device.
    Raises: ValueError naming the argument, the axis letter and both sizes.
    Example:
      >>> from functools import partial
      >>> from jax.sharding import PartitionSpec as P
      >>> from jax_attn import causal
      >>> mesh = jax.make_mesh((1,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> ring = partial(context_attention, context="ring", mask=causal())
      >>> split = P(None, "context")
      >>> x_BTNH = jnp.ones((1, 4, 2, 3))
      >>> jax.shard_map(ring, mesh=mesh, in_specs=split, out_specs=split)(
      ...     x_BTNH, x_BTNH, x_BTNH
      ... ).shape
      (1, 4, 2, 3)
    """
    size = _axis_size(context, axis)
    many = {"T": 1 if context == "split_kv" else size, "S": size}
    call = checked(
        q_BTNH,
        k_BSKH,
        v_BSKE,
        mask,
        bias_BNTS,
        score,
        scale,
        softcap,
        sinks_N,
        q_offset,
        dropout_rate,
        dropout_key,
        observe,
        many,
    )
    made = attend_part(call, context, axis, (0, 0))
    return made[0] if observe is None else made


def attend_part(
    call: Call, context: str, axis: str, first: tuple[Any, Any]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Run a device's part of a call, whose batch entries and heads begin at `first`."""
    sizes, size = call.sizes, jax.lax.axis_size(axis)
    if context == "zigzag" and (sizes.T % 2 or sizes.S % 2):
        raise ValueError(
            f"context='zigzag' cuts a device's tokens into two runs, but it has T={sizes.T} and "
            f"S={sizes.S}: take a sequence that {2 * size} divides, or context='ring'"
        )
    if context == "all_to_all" and sizes.K % size:
        raise ValueError(
            f"context='all_to_all' gives each of {size} devices as many key/value heads, but "
            f"K={sizes.K}: take a multiple, or context='ring'"
        )
    if context == "all_to_all":
        return exchange.attend(call, axis, size, first)
    if context == "split_kv":
        return split_kv.attend(call, axis, first)
    return ring.attend(call, ring.Ring(axis, size), context == "zigzag", first)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKE: jax.Array,
    *,
    context: str,
    mask: Mask | jax.Array | None = None,
    bias_BNTS: jax.Array | None = None,
    score: Score | None = None,
    scale: Any = None,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
    q_offset: Any = 0,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    observe: tuple[str | Mean, ...] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Run `context_attention` where it is called, or under `jax.set_mesh` in a `jax.shard_map` of
    its own over whole arrays.

    Args: as in `context_attention`; whole arrays are split by B over the mesh axes "data" and
      "fsdp", by T and S over "context", by N and K over "model".
    Returns: (out_BTNE, seen).
    Raises: ValueError without the mesh axis "context", or naming a letter that a mesh axis does not
      divide.
    """
    mesh = None if _inside() else jax.sharding.get_abstract_mesh()
    many = {"B": 1, "N": 1}
    if mesh is not None:
        if "context" not in mesh.axis_names:
            raise ValueError(
                f"context={context!r} needs the mesh axis 'context': call under jax.set_mesh(mesh) "
                f"with such a mesh, or inside jax.shard_map over it"
            )
        many = {"B": mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)}
        many["N"] = mesh.shape.get("model", 1)
    batch = tuple(name for name in ("data", "fsdp") if mesh and name in mesh.axis_names)
    heads = "model" if mesh and "model" in mesh.axis_names else None
    arrays = {"q_BTNH": q_BTNH, "k_BSKH": k_BSKH, "v_BSKE": v_BSKE}
    arrays |= {"bias_BNTS": bias_BNTS, "sinks_N": sinks_N}
    arrays = {name: x for name, x in arrays.items() if x is not None}

    def part(arrays: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        size = _axis_size(context, "context")
        call = checked(
            arrays["q_BTNH"],
            arrays["k_BSKH"],
            arrays["v_BSKE"],
            mask,
            arrays.get("bias_BNTS"),
            score,
            scale,
            softcap,
            arrays.get("sinks_N"),
            q_offset,
            dropout_rate,
            dropout_key,
            observe,
            {
                **many,
                "K": many["N"],
                "T": 1 if context == "split_kv" else size,
                "S": size,
            },
        )
        b = jax.lax.axis_index(batch) * call.sizes.B if batch else 0
        n = jax.lax.axis_index(heads) * call.sizes.N if heads else 0
        return attend_part(call, context, "context", (b, n))

    if mesh is None:
        return part(arrays)
    queries = None if context == "split_kv" else "context"
    rules = {"B": batch, "N": heads, "K": heads, "T": queries, "S": "context"}
    specs = {}
    for name, x in arrays.items():
        letters = axes(name)
        mapped = [
            None if x.shape[i] == 1 and name == "bias_BNTS" else rules.get(letter)
            for i, letter in enumerate(letters)
        ]
        if name == "bias_BNTS":
            mapped[3] = None
        specs[name] = PartitionSpec(*mapped)
        for letter, size, on in zip(letters, x.shape, mapped, strict=True):
            names = (on,) if isinstance(on, str) else on or ()
            devices = math.prod(mesh.shape[one] for one in names)
            if size % devices:
                raise ValueError(
                    f"{name} has {letter}={size}, which the {devices} devices of the mesh axes "
                    f"{', '.join(map(repr, names))} do not divide"
                )
    out = PartitionSpec(batch, queries, heads)
    return jax.shard_map(part, mesh=mesh, in_specs=(specs,), out_specs=out)(arrays)


def positions(context: str, T: int) -> jax.Array:
    """Return the positions, int32 [T], of the tokens at hand: of a device inside `jax.shard_map`,
    else of the whole sequence in its layout."""
    inside, zigzag = _inside(), context == "zigzag"
    if zigzag and not inside:
        return jnp.asarray(
            zigzag_order(T, jax.sharding.get_abstract_mesh().shape.get("context", 1))
        )
    if not inside or context == "split_kv":
        return jnp.arange(T, dtype=jnp.int32)
    me, size = jax.lax.axis_index("context"), jax.lax.axis_size("context")
    starts = ring.runs(me, size, T, zigzag)
    run = jnp.arange(T // len(starts))
    return (starts[:, None] + run[None]).reshape(-1).astype(jnp.int32)


def zigzag_order(T: int, devices: int) -> np.ndarray:
    """Order tokens so that a plain split into `devices` parts is the zigzag layout.

        x_BTD[:, zigzag_order(T, P)]  puts a sequence into it
        y_BTD[:, np.argsort(zigzag_order(T, P))]  takes one out of it

    Returns: int32 [T], the position of the token at each index; RoPE takes it as `position_BT`.
    Raises: ValueError if 2 * devices does not divide T.
    Example:
      >>> zigzag_order(8, 2).tolist()
      [0, 1, 6, 7, 2, 3, 4, 5]
    """
    if not isinstance(devices, int) or devices < 1 or T % (2 * devices):
        raise ValueError(
            f"zigzag_order: 2 * devices = 2 * {devices!r} must divide T={T}; pad the sequence"
        )
    runs = np.arange(T, dtype=np.int32).reshape(2 * devices, -1)
    return np.stack([runs[:devices], runs[devices:][::-1]], axis=1).reshape(T)


def _inside() -> bool:
    """Say whether this is inside a `jax.shard_map` over the mesh axis "context"."""
    try:
        jax.lax.axis_size("context")
    except NameError:
        return False
    return True


def _axis_size(context: Any, axis: Any) -> int:
    if context not in CONTEXTS:
        known = ", ".join(map(repr, CONTEXTS))
        raise ValueError(f"context must be one of {known}, got {context!r}")
    try:
        return jax.lax.axis_size(axis)
    except NameError as error:
        raise ValueError(
            f"context={context!r} needs the mesh axis {axis!r}: call inside jax.shard_map over a "
            f"mesh that has it"
        ) from error
