"""What the kernels of others share here: which calls they can take, and this library's meanings.

cuDNN, tokamax and splash attention know masks only as a window and lengths, answer a row without
keys with mean(v) or NaN, and let NaN in masked keys through. `run` calls them so that rows without
keys give 0, and NaN reaches those rows alone that attend to one.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn.kernels import blockwise
from jax_attn.kernels.call import Call
from jax_attn.mask_types import And, Lengths, Mask, Segments, Window
from jax_attn.shapes import Sizes


class Simple(NamedTuple):
    """A mask as these kernels know it: position - left <= s <= position + right, inside lengths,
    within a segment. None is unbounded."""

    left: int | None = None
    right: int | None = None
    lengths: tuple[Lengths, ...] = ()
    segments: tuple[Segments, ...] = ()


def simple(mask: Mask | None) -> Simple | None:
    """Read a mask as a Simple one, if it is."""
    if mask is None:
        return Simple()
    if isinstance(mask, Window):
        return Simple(mask.left, mask.right)
    if isinstance(mask, Lengths):
        return Simple(lengths=(mask,))
    if isinstance(mask, Segments):
        return Simple(segments=(mask,))
    if not isinstance(mask, And):
        return None
    a, b = simple(mask.left), simple(mask.right)
    if a is None or b is None:
        return None
    left, right = (
        min((x for x in pair if x is not None), default=None)
        for pair in ((a.left, b.left), (a.right, b.right))
    )
    return Simple(left, right, a.lengths + b.lengths, a.segments + b.segments)


def refuses_options(call: Call, *, takes: tuple[str, ...] = ()) -> str | None:
    """Name the first option of the call that a kernel does not take."""
    present = {
        "score": call.score is not None,
        "bias_BNTS": call.bias_BNTS is not None,
        "softcap": call.softcap is not None,
        "sinks_N": call.sinks_N is not None,
        "dropout_rate": call.dropout_rate > 0.0,
        # What extra columns of values could give, they would round to the values' dtype.
        "observe": bool(call.statistics or call.means),
    }
    for name, here in present.items():
        if here and name not in takes:
            return f"does not take {name}"
    for name, value in (("scale", call.scale), ("softcap", call.softcap)):
        if value is not None and not isinstance(value, int | float | np.number):
            return f"needs {name} as a number, not as an array"
    return None


def refuses_mask(call: Call) -> str | None:
    """Say why the call's mask is none that these kernels know."""
    mask, z = simple(call.mask), call.sizes
    if mask is None:
        return "knows masks made of causal, window and lengths joined by &, no others"
    if (mask.left, mask.right) == (None, None):
        return None
    if not isinstance(call.q_offset, int) or call.q_offset != 0:
        return "needs q_offset=0 with a window"
    if z.T != z.S:
        return f"needs T = S with a window, got T={z.T}, S={z.S}"
    if min(mask.left or 0, mask.right or 0) < 0:
        return f"needs a window with its own position in it, got {mask.left}, {mask.right}"
    return None


def run(call: Call, kernel: Callable[[Call, Simple], jax.Array]) -> tuple[Any, dict]:
    """Run a kernel so that every row means here what it means elsewhere in this library.

    Args:
      call: one that `refuses_mask` has nothing against.
      kernel: (call with finite q, k, v, its mask) -> [B,T,N,E]; rows without keys are ignored.
    Returns: the output, and no statistics.
    """
    z, mask = call.sizes, simple(call.mask)
    assert mask is not None
    out_BTNE = jnp.zeros(z["BTNE"], call.v_BSKE.dtype)
    if 0 in z["BTSNE"]:
        return out_BTNE, {}
    poison_BTN = None
    if call.mask is not None:
        poison_BTN = blockwise.poison(call)
        q, k, v = (jnp.nan_to_num(x, posinf=0, neginf=0) for x in _inputs(call))
        call = replace(call, q_BTNH=q, k_BSKH=k, v_BSKE=v)
    there_BT = _attends(mask, z)
    out_BTNE = kernel(call, mask).astype(call.v_BSKE.dtype)
    if there_BT is not None:
        out_BTNE = jnp.where(there_BT[:, :, None, None], out_BTNE, 0)
    if poison_BTN is not None:
        out_BTNE = out_BTNE + poison_BTN[..., None].astype(out_BTNE.dtype)
    return out_BTNE, {}


def window_of(mask: Simple, sizes: Sizes) -> tuple[bool, tuple[int, int] | None]:
    """Return the mask as `is_causal` and `local_window_size` of `jax.nn.dot_product_attention`."""
    causal = mask.right == 0
    if mask.left is None and (causal or mask.right is None):
        return causal, None
    left, right = sizes.S if mask.left is None else mask.left, mask.right
    return causal, (left, sizes.T if right is None else right)


def lengths_of(mask: Simple, sizes: Sizes) -> tuple[Any, Any]:
    """Return the lengths of queries and of keys, int32 [B], or None where none is given."""
    made = []
    for name, letter in (("q_B", "T"), ("kv_B", "S")):
        given = [getattr(x, name) for x in mask.lengths if getattr(x, name) is not None]
        least_B = None
        for x in given:
            x_B = jnp.clip(jnp.broadcast_to(jnp.asarray(x), (sizes.B,)), 0, sizes[letter][0])
            least_B = x_B if least_B is None else jnp.minimum(least_B, x_B)
        made.append(None if least_B is None else least_B.astype(jnp.int32))
    return made[0], made[1]


def _attends(mask: Simple, sizes: Sizes) -> jax.Array | None:
    """Say of each row whether it has any key, [B,T]; None if all have."""
    q_B, kv_B = lengths_of(mask, sizes)
    if q_B is None and kv_B is None:
        return None
    t = jnp.arange(sizes.T)[None]
    there = t < sizes.T
    if q_B is not None:
        there = there & (t < q_B[:, None])
    if kv_B is not None:
        first = 0 if mask.left is None else jnp.maximum(t - mask.left, 0)
        there = there & (first < kv_B[:, None])
    return there


def _inputs(call: Call) -> tuple[jax.Array, jax.Array, jax.Array]:
    return call.q_BTNH, call.k_BSKH, call.v_BSKE
