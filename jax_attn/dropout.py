"""Dropout of attention probabilities as a pure function of (key, b, n, t, s).

Each pair's fate is a hash of the key and its four indices, so it is the same however the pairs
are cut into blocks or spread over devices, and a backward pass can ask again.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def keep(key: jax.Array, rate: float, b: Any, n: Any, t: Any, s: Any) -> jax.Array:
    """Decide which pairs survive dropout.

        keep = hash(key, b, n, t, s) >= rate · 2^32

    The hash chains the 32-bit finaliser of MurmurHash3 over the key's words and the indices; only
    its last link is evaluated once a pair.

    Args:
      key: a jax.random key.
      rate: probability of dropping a pair, 0 <= rate < 1.
      b, n, t, s: int index arrays that broadcast together; t is the query's position.
    Returns: bool, True = keep, of the broadcast shape; kept values are to be divided by 1 - rate.
    Example:
      >>> t, s = jnp.arange(64)[:, None], jnp.arange(64)[None, :]
      >>> kept = keep(jax.random.key(0), 0.25, 0, 0, t, s)
      >>> bool((kept[8:, 3:] == keep(jax.random.key(0), 0.25, 0, 0, t[8:], s[:, 3:])).all())
      True
    """
    state = jnp.uint32(0x9E3779B9)
    for word in jnp.ravel(jax.random.key_data(key)).astype(jnp.uint32):
        state = _mix(state ^ word)
    for index in (b, n, t, s):
        # The odd constant keeps index 0 from leaving the state as it was.
        word = jnp.asarray(index).astype(jnp.uint32) * jnp.uint32(0x85EBCA77) + jnp.uint32(1)
        state = _mix(state ^ word)
    return state >= jnp.uint32(int(rate * 2**32))


def check(rate: Any, key: Any) -> None:
    """Raise ValueError unless `rate` is in [0, 1) and, above 0, `key` is one jax.random key."""
    if not isinstance(rate, int | float | np.number) or not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout_rate must be a number in [0, 1), got {rate!r}")
    if rate == 0.0:
        return
    if key is None:
        raise ValueError(f"dropout_rate={rate} needs a dropout_key; evaluate with rate 0")
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and dtype != jnp.uint32:
        raise ValueError(f"dropout_key must be one jax.random key, got {key!r}")
    one = () if typed else jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
    if key.shape != one:
        raise ValueError(f"dropout_key must be one jax.random key, got shape {key.shape}")


def _mix(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
