"""JAX's splash attention, the fused kernel for TPUs; first-order reverse mode alone.

Lengths that do not divide its blocks are padded here, and the padding masked by segment.
"""

import jax
import jax.numpy as jnp

from jax_attn.kernels import fused
from jax_attn.kernels.call import Call
from jax_attn.kernels.processor import backend
from jax_attn.shapes import Sizes

# True runs the kernel's logic in the interpreter, on any backend: slow, for tests.
interpreted = jax.make_user_context(default_value=False)

_LANES = 128
_BLOCK = 512
# Keys that are not there and queries that are not there, in no segment that a user has.
_NO_KEY, _NO_QUERY = -(2**31), -(2**31) + 1


def refuses(call: Call) -> str | None:
    """Say why the call cannot run here."""
    z, mask = call.sizes, fused.simple(call.mask)
    if backend() != "tpu" and not interpreted.value:
        return f"needs a TPU, and JAX runs on {backend()}"
    if call.wide != jnp.float32:
        return f"takes bfloat16 or float32, got {call.q_BTNH.dtype}"
    if mask is not None and len(mask.segments) > 1:
        return "takes one segments mask, got several"
    if mask is not None and mask.segments and mask.lengths:
        # A row whose segment is padding alone has no key, which its window does not tell.
        return "takes segments or lengths, not both"
    if mask is not None and mask.segments and z.T != z.S:
        return f"needs T = S with segments, got T={z.T}, S={z.S}"
    if (
        mask is not None
        and mask.segments
        and mask.segments[0].q_ids_BT is not (mask.segments[0].kv_ids_BS)
    ):
        return "needs the same segments for queries and keys"
    return fused.refuses_options(call, takes=("softcap", "sinks_N")) or fused.refuses_mask(call)


def attend(call: Call) -> tuple[jax.Array, dict]:
    """Run the call on splash attention."""
    return fused.run(call, _kernel)


def _kernel(call: Call, mask: fused.Simple) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    z = call.sizes
    T, S = (-(-n // _LANES) * _LANES for n in (z.T, z.S))
    shape = (T, S)
    if (mask.left, mask.right) == (None, None):
        one_head = splash_attention_mask.FullMask(shape)
    else:
        one_head = splash_attention_mask.LocalMask(shape, (mask.left, mask.right), 0)
    queries, keys = (_LANES * _largest_divisor(n // _LANES, _BLOCK // _LANES) for n in shape)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([one_head] * z.N),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=queries,
            block_kv=keys,
            block_q_dkv=queries,
            block_kv_dkv=keys,
            block_q_dq=queries,
            block_kv_dq=keys,
        ),
        attn_logits_soft_cap=None if call.softcap is None else float(call.softcap),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpreted.value,
    )
    q_BTNH = (call.q_BTNH.astype(jnp.float32) * call.scale).astype(call.q_BTNH.dtype)
    inputs = (
        jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, n - x.shape[1]), (0, 0)))
        for x, n in ((q_BTNH, T), (call.k_BSKH, S), (call.v_BSKE, S))
    )
    ids = _segment_ids(mask, z, T, S)
    if ids is not None:
        ids = splash_attention_kernel.SegmentIds(*ids)
    over_batch = jax.vmap(kernel, in_axes=(0, 0, 0, None if ids is None else 0, None))
    out_BNTE = jnp.asarray(over_batch(*inputs, ids, call.sinks_N))
    return out_BNTE[:, :, : z.T].transpose(0, 2, 1, 3)


def _segment_ids(mask: fused.Simple, z: Sizes, T: int, S: int) -> tuple | None:
    """Return ids of queries [B,T] and keys [B,S] that also mask padding; None if nothing does."""
    q_B, kv_B = fused.lengths_of(mask, z)
    if z["TS"] == (T, S) and q_B is None and kv_B is None and not mask.segments:
        return None
    made = []
    for length_B, size, padded, absent in ((q_B, z.T, T, _NO_QUERY), (kv_B, z.S, S, _NO_KEY)):
        ids = jnp.zeros((z.B, padded), jnp.int32)
        if mask.segments:
            given = jnp.asarray(mask.segments[0].q_ids_BT, jnp.int32)
            ids = jnp.pad(
                jnp.broadcast_to(given, (z.B, given.shape[1])), ((0, 0), (0, padded - size))
            )
        end_B1 = jnp.full((z.B, 1), size) if length_B is None else length_B[:, None]
        made.append(jnp.where(jnp.arange(padded)[None] < end_B1, ids, absent))
    return made[0], made[1]


def _largest_divisor(n: int, limit: int) -> int:
    return max(m for m in range(1, limit + 1) if n % m == 0)
