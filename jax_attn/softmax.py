"""The softmax algebra: a row of attention over a set of keys, summarised so that sets merge.

With logits s and m = max s, a summary holds, over one set of keys,

    maximum m    total Σe^(s-m)    value Σe^(s-m)·v    shifted Σe^(s-m)(s-m)    square Σe^(2(s-m))

Summaries over disjoint key sets merge exactly, associatively and commutatively; the empty set is
the identity. Dense attention is one part, blockwise attention a loop of merges, ring attention a
loop of merges over devices (online softmax: arXiv:1805.02867, arXiv:2112.05682).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Summary(NamedTuple):
    """A row over a set of keys. Fields have the rows' shape; `value` leaves trail further axes."""

    maximum: jax.Array
    total: jax.Array
    value: Any
    shifted: jax.Array
    square: jax.Array


class Finished(NamedTuple):
    """What a summary says once every key is in: see `finish`."""

    value: Any
    lse: jax.Array
    entropy: jax.Array
    square: jax.Array


def summarize(logits: jax.Array, contract: Callable[[jax.Array], Any]) -> Summary:
    """Summarise rows over the keys on the last axis. A logit of -inf is a key that is not there.

    Args:
      logits: [..., S], float32 or wider.
      contract: maps e^(logits - maximum), [..., S], to a pytree of sums over S, each [..., *].
    Returns: a Summary whose rows are `logits.shape[:-1]`; gradients flow through all fields but
      `maximum`, of which no finished number depends.
    Example:
      >>> v_SE = jnp.ones((3, 2))
      >>> part = summarize(jnp.zeros((5, 3)), lambda e_TS: e_TS @ v_SE)
      >>> part.value.shape, float(part.total[0])
      ((5, 2), 3.0)
    """
    maximum = jax.lax.stop_gradient(jnp.max(logits, axis=-1, initial=-jnp.inf))
    absent = logits == -jnp.inf
    # -inf - -inf is NaN in value and in gradient: shift by 0 where there is no key at all. 0 · -inf
    # is NaN too: an absent key has no gap.
    shift = jnp.where(maximum == -jnp.inf, 0.0, maximum)[..., None]
    gap = jnp.where(absent, 0.0, logits - shift)
    weight = jnp.exp(logits - shift)
    return Summary(
        maximum,
        jnp.sum(weight, axis=-1),
        contract(weight),
        jnp.sum(weight * gap, axis=-1),
        jnp.sum(jnp.square(weight), axis=-1),
    )


def empty(like: Summary) -> Summary:
    """Return the summary of no keys at all, the identity of `merge`.

    Args:
      like: a summary with the wanted shapes and dtypes.
    Returns: maximum -inf, everything else 0.
    Example:
      >>> part = summarize(jnp.zeros((5, 3)), lambda e_TS: e_TS)
      >>> bool((merge(part, empty(part)).total == part.total).all())
      True
    """
    zero = jax.tree.map(jnp.zeros_like, like)
    return zero._replace(maximum=jnp.full_like(like.maximum, -jnp.inf))


def sink(logit: jax.Array, like: Summary) -> Summary:
    """Summarise one more key that has a logit but no value: a learned sink.

    Args:
      logit: broadcastable to the rows of `like`; -inf for no sink.
      like: a summary with the wanted shapes.
    Returns: maximum = logit, total = square = 1, value = shifted = 0; `empty` where logit = -inf.
    Example:
      >>> part = summarize(jnp.zeros((5, 3)), lambda e_TS: e_TS)
      >>> float(merge(sink(jnp.zeros(1), part), part).total[0])
      4.0
    """
    row = jnp.broadcast_to(logit.astype(like.total.dtype), like.total.shape)
    return summarize(row[..., None], lambda _: jax.tree.map(jnp.zeros_like, like.value))


def merge(left: Summary, right: Summary) -> Summary:
    """Merge two summaries over disjoint sets of keys into the summary of their union.

    With m = max(m_X, m_Y), δ = m_X - m, r = e^δ (r = δ = 0 where m_X = -inf):
    total = Σ r·total, value = Σ r·value, shifted = Σ r(shifted + δ·total), square = Σ r²·square.

    Args:
      left, right: summaries of the same rows.
    Returns: the summary of the union; exact up to rounding in any order.
    Example:
      >>> def part(s): return summarize(s, lambda e_TS: e_TS.sum(-1, keepdims=True))
      >>> both = merge(part(jnp.zeros((5, 3))), part(jnp.ones((5, 2))))
      >>> bool(jnp.allclose(both.value[:, 0], both.total))
      True
    """
    maximum = jnp.maximum(left.maximum, right.maximum)
    parts = []
    for part in (left, right):
        there = part.maximum > -jnp.inf
        delta = jnp.where(there, part.maximum - jnp.where(there, maximum, 0.0), 0.0)
        rescale = jnp.where(there, jnp.exp(delta), 0.0)
        parts.append(
            Summary(
                maximum,
                rescale * part.total,
                jax.tree.map(lambda leaf, r=rescale: _rows(r, leaf) * leaf, part.value),
                # Not r·(shifted + δ·total): δ·total overflows where finfo.min stands for -inf.
                rescale * part.shifted + rescale * delta * part.total,
                jnp.square(rescale) * part.square,
            )
        )
    added = jax.tree.map(jnp.add, *parts)
    return added._replace(maximum=maximum)


def finish(summary: Summary) -> Finished:
    """Turn the summary of all keys into softmax averages and statistics.

    With probabilities p = e^s / Σe^s: value = Σ p·v, lse = log Σe^s, entropy = -Σ p log p in
    nats, square = Σp². A row without keys gives 0, -inf, 0 and 0, with gradients 0.

    Args:
      summary: over all keys of the rows.
    Returns: Finished(value, lse, entropy, square).
    Example:
      >>> done = finish(summarize(jnp.zeros((1, 4)), lambda e_TS: e_TS))
      >>> round(float(done.entropy[0]), 4), float(done.square[0])
      (1.3863, 0.25)
    """
    none = summary.total == 0.0
    total = jnp.where(none, 1.0, summary.total)
    log_total = jnp.log(total)
    return Finished(
        jax.tree.map(lambda leaf: leaf / _rows(total, leaf), summary.value),
        jnp.where(none, -jnp.inf, summary.maximum + log_total),
        log_total - summary.shifted / total,
        summary.square / jnp.square(total),
    )


def _rows(row: jax.Array, leaf: jax.Array) -> jax.Array:
    """Give per-row factors the trailing axes of a value leaf."""
    return row.reshape(row.shape + (1,) * (leaf.ndim - row.ndim))
