"""NVIDIA's fused kernel, through `jax.nn.dot_product_attention`. No jvp: cuDNN has none."""

import jax
import jax.numpy as jnp

from jax_attn.kernels import fused
from jax_attn.kernels.call import Call
from jax_attn.kernels.processor import backend


def refuses(call: Call) -> str | None:
    """Say why the call cannot run here."""
    z = call.sizes
    dtypes = {x.dtype for x in (call.q_BTNH, call.k_BSKH, call.v_BSKE)}
    if backend() != "gpu":
        return f"needs a GPU, and JAX runs on {backend()}"
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype("bfloat16"), jnp.dtype("float16")}:
        return f"takes bfloat16 or float16, got {', '.join(sorted(map(str, dtypes)))}"
    if z.H != z.E or z.H % 8 or z.H > 256:
        return f"needs H = E, a multiple of 8 up to 256, got H={z.H}, E={z.E}"
    if (mask := fused.simple(call.mask)) is not None and mask.segments:
        return "does not take segments"
    return fused.refuses_options(call) or fused.refuses_mask(call)


def attend(call: Call) -> tuple[jax.Array, dict]:
    """Run the call on cuDNN."""
    return fused.run(call, _kernel)


def _kernel(call: Call, mask: fused.Simple) -> jax.Array:
    q_B, kv_B = fused.lengths_of(mask, call.sizes)
    if (q_B is None) != (kv_B is None):
        z = call.sizes
        q_B = jnp.full(z["B"], z.T, jnp.int32) if q_B is None else q_B
        kv_B = jnp.full(z["B"], z.S, jnp.int32) if kv_B is None else kv_B
    causal, window = fused.window_of(mask, call.sizes)
    return jax.nn.dot_product_attention(
        call.q_BTNH,
        call.k_BSKH,
        call.v_BSKE,
        scale=float(call.scale),
        is_causal=causal,
        local_window_size=window,
        query_seq_lengths=q_B,
        key_value_seq_lengths=kv_B,
        implementation="cudnn",
    )
