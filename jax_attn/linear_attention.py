"""Attention whose score is a product of features: the context as a matrix, written and read.

softmax compares each query with each key. Where the score is phi(q) · phi(k) instead, the sum over
keys can be taken first: a matrix of features against values, written once for each token and read
by every query (arXiv:2006.16236; as fast weights: arXiv:2102.11174).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn.shapes import dims, floating

Feature = Callable[[jax.Array], jax.Array]


def positive(x: jax.Array) -> jax.Array:
    """Make features that are above 0: elu(x) + 1 (arXiv:2006.16236).

    Args:
      x: any shape.
    Returns: the same shape.
    Example:
      >>> positive(jnp.array([0.0, 2.0])).tolist()
      [1.0, 3.0]
    """
    return jax.nn.elu(x) + 1


def dpfp(x: jax.Array, *, nu: int = 1) -> jax.Array:
    """Make sparse features in more dimensions, without drawing any at random: DPFP.

        r = [relu(x), relu(-x)],   phi = concat_{i=1..nu} r * roll(r, i)     (arXiv:2102.11174)

    Args:
      x: [..., H].
      nu: how many rolls, from 1 to 2 H - 1.
    Returns: [..., 2 H nu].
    Raises: ValueError: `nu` is out of its range.
    Example:
      >>> dpfp(jnp.array([1.0, 2.0])).tolist()
      [0.0, 2.0, 0.0, 0.0]
    """
    width = 2 * x.shape[-1]
    if not isinstance(nu, int) or isinstance(nu, bool) or not 1 <= nu < max(width, 2):
        raise ValueError(f"dpfp: nu must be an int from 1 to {width - 1}, got {nu!r}")
    r = jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=-1)
    return jnp.concatenate([r * jnp.roll(r, i, axis=-1) for i in range(1, nu + 1)], axis=-1)


def linear_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKE: jax.Array,
    *,
    feature: Feature | None = positive,
    causal: bool = False,
    normalize: bool = True,
    block: int = 128,
) -> jax.Array:
    """Mix values by products of features.

        y_t = sum_s (phi(q_t) · phi(k_s)) v_s / sum_s phi(q_t) · phi(k_s)

    In O(T) time and memory, in float32 or wider. Heads are as in `dot_product_attention`: query
    head n reads key/value head n // (N / K). There is no 1 / sqrt(H): a factor of all scores
    cancels, or with `normalize=False` is the caller's.

    Args:
      q_BTNH, k_BSKH, v_BSKE: queries, keys, values.
      feature: phi, over the last axis; None: x itself.
      causal: query t reads keys up to t; needs T = S.
      normalize: divide by the sum of scores; where that is 0 the output is 0. Only sensible with
        features that are not negative.
      block: tokens that a causal sum is taken over at a time.
    Returns: [B,T,N,E] in the dtype of v.
    Raises: ValueError naming the argument, the axis letter and both sizes.
    Example:
      >>> x_BTNH = jnp.ones((1, 3, 2, 4))
      >>> linear_attention(x_BTNH, x_BTNH, x_BTNH, causal=True).shape
      (1, 3, 2, 4)
    """
    sizes = dims(q_BTNH=q_BTNH, k_BSKH=k_BSKH, v_BSKE=v_BSKE)
    floating(q_BTNH=q_BTNH, k_BSKH=k_BSKH, v_BSKE=v_BSKE)
    if sizes.N % max(sizes.K, 1):
        raise ValueError(f"q_BTNH has N={sizes.N} but k_BSKH has K={sizes.K}: K must divide N")
    if causal and sizes.T != sizes.S:
        raise ValueError(f"causal needs T = S: q_BTNH has T={sizes.T}, k_BSKH has S={sizes.S}")
    if not isinstance(block, int | np.integer) or isinstance(block, bool) or block < 1:
        raise ValueError(f"linear_attention: block must be an int >= 1, got {block!r}")
    dtype, wide = v_BSKE.dtype, jnp.promote_types(v_BSKE.dtype, jnp.float32)
    phi = feature or (lambda x: x)
    B, T, K, G = sizes.B, sizes.T, sizes.K, sizes.N // max(sizes.K, 1)
    q_BTNH = phi(q_BTNH.astype(wide))
    q_BTKGH = q_BTNH.reshape(B, T, K, G, q_BTNH.shape[-1])
    k_BSKH, v_BSKE = phi(k_BSKH.astype(wide)), v_BSKE.astype(wide)
    # A column of ones beside the values sums the scores.
    ones = jnp.ones((*v_BSKE.shape[:-1], 1), wide)
    v_BSKE = jnp.concatenate([v_BSKE, ones], axis=-1) if normalize else v_BSKE
    if causal:
        y_BTKGE = _past(q_BTKGH, k_BSKH, v_BSKE, block)
    else:
        w_BKHE = jnp.einsum("BSKH,BSKE->BKHE", k_BSKH, v_BSKE)
        y_BTKGE = jnp.einsum("BTKGH,BKHE->BTKGE", q_BTKGH, w_BKHE)
    if normalize:
        total = y_BTKGE[..., -1:]
        some = total != 0
        y_BTKGE = jnp.where(some, y_BTKGE[..., :-1] / jnp.where(some, total, 1), 0)
    return y_BTKGE.reshape(B, T, K * G, sizes.E).astype(dtype)


def _past(q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKE: jax.Array, block: int) -> jax.Array:
    """Sum over keys up to each query: pairs within a block, what was written before it."""
    B, T, K, _, H = q_BTKGH.shape
    block = min(block, max(T, 1))
    missing = -T % block

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, block, *x.shape[2:]), 1, 0)

    def step(w_BKHE: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q_BTKGH, k_BSKH, v_BSKE = part
        s_BKGTS = (
            jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH) * jnp.tri(block)[None, None, None]
        )
        y_BTKGE = jnp.einsum("BKGTS,BSKE->BTKGE", s_BKGTS, v_BSKE)
        y_BTKGE += jnp.einsum("BTKGH,BKHE->BTKGE", q_BTKGH, w_BKHE)
        return w_BKHE + jnp.einsum("BSKH,BSKE->BKHE", k_BSKH, v_BSKE), y_BTKGE

    w_BKHE = jnp.zeros((B, K, H, v_BSKE.shape[-1]), v_BSKE.dtype)
    _, y = jax.lax.scan(step, w_BKHE, (cut(q_BTKGH), cut(k_BSKH), cut(v_BSKE)))
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape(B, T + missing, *y.shape[3:])[:, :T]
