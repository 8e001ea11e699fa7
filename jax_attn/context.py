"""Attention over a sequence that is split over the devices of a mesh axis."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn.kernels import exchange, ring, split_kv, spread
from jax_attn.kernels.call import Call, Score, checked
from jax_attn.kernels.spread import CONTEXT
from jax_attn.mask_types import Mask
from jax_attn.observe import Mean

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
        _many(context, size),
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
      "fsdp", by T and S over "context", by N and K over "model", as far as the mesh has them.
    Returns: (out_BTNE, seen).
    Raises: ValueError without the mesh axis "context", or naming a letter that a mesh axis does not
      divide.
    """
    within = inside()
    require(context)
    size = _axis_size(context, CONTEXT) if within else 1
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
        _many(context, size) if within else None,
    )
    if within:
        return attend_part(call, context, CONTEXT, (0, 0))
    queries = None if context == "split_kv" else CONTEXT

    name = spread.closes_over(call)
    if name is not None:
        raise ValueError(
            f"{name} closes over traced arrays, which cannot enter the shard_map of "
            f"context={context!r}: make it a class registered as a pytree that holds them, or call "
            f"inside jax.shard_map"
        )

    def run(call: Call, first: tuple[Any, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        return attend_part(call, context, CONTEXT, first)

    return spread.attend(call, run, queries=queries, keys=CONTEXT)


def require(context: str) -> None:
    """Raise unless the name is one of a context, and this is inside a `jax.shard_map`, or under a
    mesh, that has the axis "context"."""
    _check(context)
    if not inside() and CONTEXT not in jax.sharding.get_abstract_mesh().axis_names:
        raise ValueError(
            f"context={context!r} needs the mesh axis 'context': call under jax.set_mesh(mesh) "
            f"with such a mesh, or inside jax.shard_map over it"
        )


def write(name: str, held: jax.Array, new: jax.Array, at: Any) -> jax.Array:
    """Write new entries from index `at` of a cache whose axis S is split, each device those that
    fall to its part; an entry outside is dropped."""

    def part(held: jax.Array, new: jax.Array, at: Any) -> jax.Array:
        S = held.shape[1]
        index_T = jnp.arange(new.shape[1]) + at - jax.lax.axis_index(CONTEXT) * S
        index_T = jnp.where(index_T < 0, S, index_T)  # a negative index would count from the end
        return held.at[:, index_T].set(new.astype(held.dtype), mode="drop")

    if inside():
        return part(held, new, at)
    return spread.change(part, name, {name: held, f"new_{name}": new}, at)


def length_of(cache: dict[str, jax.Array]) -> int:
    """Return S of a whole cache, of which this may be a device's part."""
    S = cache["k_BSKH"].shape[1]
    return S * jax.lax.axis_size(CONTEXT) if inside() else S


def positions(context: str, T: int) -> jax.Array:
    """Return the positions, int32 [T], of the tokens at hand: of a device inside `jax.shard_map`,
    else of the whole sequence in its layout."""
    within, zigzag = inside(), context == "zigzag"
    if zigzag and not within:
        return jnp.asarray(zigzag_order(T, jax.sharding.get_abstract_mesh().shape.get(CONTEXT, 1)))
    if not within or context == "split_kv":
        return jnp.arange(T, dtype=jnp.int32)
    me, size = jax.lax.axis_index(CONTEXT), jax.lax.axis_size(CONTEXT)
    starts = ring.runs(me, size, T, zigzag)
    run = jnp.arange(T // len(starts))
    return (starts[:, None] + run[None]).reshape(-1).astype(jnp.int32)


def key_positions(context: str, S: int) -> jax.Array:
    """Return the positions, int32 [S], of the keys at hand, as `positions` does for queries."""
    return positions("ring" if context == "split_kv" else context, S)


def context_of(attend: Any) -> str | None:
    """Read the context that is bound to a function, `partial(attention, context="ring")`."""
    while isinstance(attend, partial):
        if attend.keywords.get("context") is not None:
            return attend.keywords["context"]
        attend = attend.func
    return None


def token_positions(owner: str, attend: Any, T: int) -> jax.Array:
    """Return the positions of the tokens at hand, int32 [T], by the context that `attend` has.

    Raises: ValueError inside a `jax.shard_map` over "context" if `attend` does not say which.
    """
    context = context_of(attend)
    if context is not None:
        return positions(context, T)
    if parted():
        raise ValueError(
            f"{owner} needs the positions of its tokens, and inside jax.shard_map over 'context' "
            f"they follow from how tokens are laid out: bind it where it can be read, "
            f"attend=partial(attention, context='ring')"
        )
    return jnp.arange(T, dtype=jnp.int32)


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
    for name, value in (("T", T), ("devices", devices)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
            raise ValueError(f"zigzag_order: {name} must be an int >= 1, got {value!r}")
    if T % (2 * devices):
        raise ValueError(
            f"zigzag_order: 2 * devices = {2 * devices} must divide T={T}; pad the sequence"
        )
    runs = np.arange(T, dtype=np.int32).reshape(2 * devices, -1)
    return np.stack([runs[:devices], runs[devices:][::-1]], axis=1).reshape(T)


def _many(context: str, size: int) -> dict[str, int]:
    """Say how many times as long the sequence is as a device's part."""
    return {"T": 1 if context == "split_kv" else size, "S": size}


def inside() -> bool:
    """Say whether this is inside a `jax.shard_map` over the mesh axis "context"."""
    try:
        jax.lax.axis_size(CONTEXT)
    except NameError:
        return False
    return True


def parted() -> bool:
    """Say whether this is inside a `jax.shard_map` in which a device has part of the sequence."""
    return inside() and jax.lax.axis_size(CONTEXT) > 1


def _check(context: Any) -> None:
    if not isinstance(context, str) or context not in CONTEXTS:
        known = ", ".join(map(repr, CONTEXTS))
        raise ValueError(f"context must be one of {known}, got {context!r}")


def _axis_size(context: Any, axis: Any) -> int:
    _check(context)
    try:
        return jax.lax.axis_size(axis)
    except NameError as error:
        raise ValueError(
            f"context={context!r} needs the mesh axis {axis!r}: call inside jax.shard_map over a "
            f"mesh that has it"
        ) from error
