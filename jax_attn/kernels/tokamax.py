"""Google's tokamax (needs Python 3.12 or newer): Triton and Mosaic kernels on GPU, splash on TPU.

Only its fused kernels are asked for, never its quadratic fallback.
"""

import importlib
import importlib.util

import jax

from jax_attn.kernels import fused
from jax_attn.kernels.call import Call
from jax_attn.kernels.processor import backend

_FUSED = {"gpu": ("mosaic", "triton"), "tpu": ("mosaic",), "cpu": ("xla_chunked",)}


def refuses(call: Call) -> str | None:
    """Say why the call cannot run here."""
    if importlib.util.find_spec("tokamax") is None:
        return "is not installed: pip install tokamax, on Python 3.12 or newer"
    if (mask := fused.simple(call.mask)) is not None and mask.segments:
        return "does not take segments"
    return fused.refuses_options(call, takes=("softcap",)) or fused.refuses_mask(call)


def attend(call: Call) -> tuple[jax.Array, dict]:
    """Run the call on tokamax."""
    return fused.run(call, _kernel)


def _kernel(call: Call, mask: fused.Simple) -> jax.Array:
    attend_fused = importlib.import_module("tokamax").dot_product_attention
    z = call.sizes
    q_B, kv_B = fused.lengths_of(mask, z)
    causal, window = fused.window_of(mask, z)
    return attend_fused(
        call.q_BTNH,
        call.k_BSKH,
        call.v_BSKE,
        scale=float(call.scale),
        is_causal=causal,
        local_window_size=window,
        query_seq_lengths=q_B,
        key_value_seq_lengths=kv_B,
        logits_soft_cap=None if call.softcap is None else float(call.softcap),
        implementation=_FUSED[backend()],
    )
