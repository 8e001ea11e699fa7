"""Kernels that tpu.cycles knows by name: this library's attention, and two to compare with.

Each function takes the options of a sweep and returns (function, abstract arguments); a third value
says how often the inner block runs in a call, for a kernel whose grid depends on data.
"""

from typing import Any

import jax
import jax.numpy as jnp


def _shapes(*shape: int, of: int, dtype: str) -> tuple[Any, ...]:
    return (jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),) * of


def _divides(**sizes: tuple[int, int]) -> None:
    for name, (block, size) in sizes.items():
        if block < 1 or size % block:
            raise ValueError(f"{name}={block} does not divide {size}")


def matmul(
    m: int = 2048,
    n: int = 2048,
    k: int = 2048,
    block_m: int = 512,
    block_n: int = 512,
    block_k: int = 512,
    dtype: str = "bfloat16",
) -> Any:
    """Multiply [m,k] by [k,n] in blocks, summed in float32: the reference."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    _divides(block_m=(block_m, m), block_n=(block_n, n), block_k=(block_k, k))

    def body(x: Any, y: Any, out: Any, total: Any) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        total[...] += jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _() -> None:
            out[...] = total[...].astype(out.dtype)

    call = pl.pallas_call(
        body,
        grid=(m // block_m, n // block_n, k // block_k),
        in_specs=[
            pl.BlockSpec((block_m, block_k), lambda i, j, step: (i, step)),
            pl.BlockSpec((block_k, block_n), lambda i, j, step: (step, j)),
        ],
        out_specs=pl.BlockSpec((block_m, block_n), lambda i, j, step: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.dtype(dtype)),
        scratch_shapes=[pltpu.VMEM((block_m, block_n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        name="matmul",
    )
    return call, _shapes(m, k, of=1, dtype=dtype) + _shapes(k, n, of=1, dtype=dtype)


def flash_attention(
    B: int = 1,
    T: int = 4096,
    N: int = 4,
    H: int = 128,
    block_q: int = 512,
    block_k_major: int = 0,
    block_k: int = 0,
    dtype: str = "bfloat16",
) -> Any:
    """JAX's flash attention for TPUs, causal, forward; block_k_major=0 means block_q, block_k=0
    block_k_major."""
    from jax.experimental.pallas.ops.tpu import flash_attention as ops

    major = block_k_major or block_q
    sizes = ops.BlockSizes(
        block_q=block_q, block_k_major=major, block_k=block_k or major, block_b=1
    )

    def attend(q_BNTH: Any, k_BNSH: Any, v_BNSH: Any) -> Any:
        return ops.flash_attention(
            q_BNTH, k_BNSH, v_BNSH, causal=True, sm_scale=H**-0.5, block_sizes=sizes
        )

    return attend, _shapes(B, N, T, H, of=3, dtype=dtype)


def splash(
    T: int = 4096,
    N: int = 4,
    H: int = 128,
    block_q: int = 512,
    block_kv: int = 512,
    block_kv_compute: int = 0,
    dtype: str = "bfloat16",
) -> Any:
    """JAX's splash attention, the kernel behind this library's "splash", causal, forward.

    The grid depends on data; the blocks that hold allowed pairs are counted here.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    inner = block_kv_compute or block_kv
    _divides(block_q=(block_q, T), block_kv=(block_kv, T), block_kv_compute=(inner, block_kv))
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((T, T))] * N),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block_q, block_kv=block_kv, block_kv_compute=inner
        ),
        head_shards=1,
        q_seq_shards=1,
    )
    active = sum(-(-(start + block_q) // block_kv) for start in range(0, T, block_q))
    return kernel, _shapes(N, T, H, of=3, dtype=dtype), N * active * (block_kv // inner)


def attention(B: int = 1, T: int = 4096, N: int = 4, H: int = 128, dtype: str = "bfloat16") -> Any:
    """This library's attention as it runs on a TPU, causal, forward, its blocks its own."""
    import jax_attn

    def attend(q_BTNH: Any, k_BSNH: Any, v_BSNH: Any) -> Any:
        return jax_attn.dot_product_attention(
            q_BTNH, k_BSNH, v_BSNH, mask=jax_attn.causal(), implementation="splash"
        )

    return attend, _shapes(B, T, N, H, of=3, dtype=dtype)
