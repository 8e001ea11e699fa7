"""ALiBi: no position embedding, logits fall with distance instead (arXiv:2108.12409)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn.kernels.call import Score
from jax_attn.shapes import Sizes, dims, floating


def alibi(slopes_N: jax.Array) -> Score:
    """Return a score function that lowers logits with distance (ALiBi, arXiv:2108.12409).

        logits - slope_n · |p - s|

    Args:
      slopes_N: one slope a head, logits per position; `alibi_slopes(N)` for the paper's.
    Returns: a function for `dot_product_attention(score=...)`; gradients reach the slopes.
    Raises: ValueError naming a wrong rank or dtype; a wrong N when it is used.
    Example:
      >>> from jax_attn import dot_product_attention
      >>> x_BTNH = jnp.ones((1, 3, 2, 5))
      >>> dot_product_attention(x_BTNH, x_BTNH, x_BTNH, score=alibi(alibi_slopes(2))).shape
      (1, 3, 2, 5)
    """
    dims(slopes_N=slopes_N)
    floating(slopes_N=slopes_N)
    return _Alibi(slopes_N)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class _Alibi:
    slopes_N: jax.Array

    def __call__(self, logits, b, n, t, s):
        return logits - self.slopes_N[n] * jnp.abs(t - s).astype(logits.dtype)

    def check(self, sizes: Sizes) -> None:
        if self.slopes_N.shape[0] != sizes.N:
            raise ValueError(f"slopes_N has N={self.slopes_N.shape[0]} but q_BTNH has N={sizes.N}")


def alibi_slopes(N: int) -> jax.Array:
    """Return the slopes of the ALiBi paper: 2^(-8i/N) for i = 1 … N.

    For N that is no power of two: those of the next lower power P, followed by every other slope
    of 2P heads, as in the authors' code.

    Args:
      N: query heads, >= 1.
    Returns: float32 [N].
    Raises: ValueError naming N.
    Example:
      >>> alibi_slopes(4).tolist()
      [0.25, 0.0625, 0.015625, 0.00390625]
    """
    if not isinstance(N, int | np.integer) or N < 1:
        raise ValueError(f"alibi_slopes: N must be an int >= 1, got {N!r}")
    power = 1 << (N.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-4.0 * i / power) for i in range(1, 2 * (N - power), 2)]
    return jnp.asarray(slopes, jnp.float32)
