"""Byte count models, order 0 to 5: what so many bytes of context are worth, without any training.

Witten and Bell's estimate (1991), interpolated as by Chen and Goodman (1998). With n(h) how often
the text has the context h, n(h, w) how often w follows, and d(h) how many different bytes do,

    p(w | h) = (n(h, w) + d(h) p(w | h without its first byte)) / (n(h) + d(h))

and p = 1 / 256 below order 0; of a context that the text does not have, the shorter one decides.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

ORDERS = 6
BYTE = np.uint64(8)  # bits


class Grams(NamedTuple):
    """All strings of one length in a text, each a number whose lowest byte is the string's last.

    `strings` rise and are distinct; `before[i]` counts the occurrences of the i first of them.
    """

    strings: npt.NDArray[np.uint64]
    before: npt.NDArray[np.int64]


def count(text_bytes: npt.NDArray[np.uint8], orders: int = ORDERS) -> list[Grams]:
    """Count the strings of 1 to `orders` bytes.

    Args:
      text_bytes: uint8, one axis, at least `orders` bytes.
      orders: how many orders, from 0 on; at most 8.
    Returns: one `Grams` for each order.
    Raises: ValueError naming the argument.
    Example:
      >>> made = count(np.frombuffer(b"abab", np.uint8), orders=1)
      >>> made[0].strings.tolist(), made[0].before.tolist()
      ([97, 98], [0, 2, 4])
    """
    if not 1 <= orders <= 8:
        raise ValueError(f"orders must be from 1 to 8, got {orders}")
    if text_bytes.size < orders:
        raise ValueError(f"text_bytes has {text_bytes.size} bytes, fewer than orders={orders}")
    letters = text_bytes.astype(np.uint64)
    strings, made = letters, []
    for order in range(orders):
        if order:
            strings = (strings[:-1] << BYTE) | letters[order:]
        ordered = np.sort(strings)
        first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        made.append(Grams(ordered[first], np.append(first, ordered.size)))
    return made


def probabilities(
    grams: Sequence[Grams], windows: npt.NDArray[np.integer]
) -> npt.NDArray[np.float64]:
    """Return the probability of every byte of a window but the first, by each order.

    No order sees more than a model that reads the window: where it holds fewer bytes than the
    order asks for, the longest order that it does hold stands in.

    Args:
      grams: from `count`.
      windows: [B, T + 1] bytes as integers, such as a batch of `data.windows`.
    Returns: [orders, B, T].
    Example:
      >>> grams = count(np.frombuffer(b"abab", np.uint8), orders=2)
      >>> probabilities(grams, np.array([[97, 98]]))[:, 0, 0].round(4).tolist()
      [0.3346, 0.7782]
    """
    tokens = windows.astype(np.uint64)
    T = tokens.shape[1] - 1
    context_BT, byte_BT = np.zeros_like(tokens[:, 1:]), tokens[:, 1:]
    p_BT = np.full(byte_BT.shape, 1 / 256)
    made = []
    for order, table in enumerate(grams):
        first = max(order - 1, 0)  # the first byte that has so much context
        if order:
            context_BT[:, first:] |= tokens[:, : max(T - first, 0)] << np.uint64(8 * first)
        context, shorter = context_BT[:, first:], p_BT[:, first:]
        string = (context << BYTE) | byte_BT[:, first:]
        start = np.searchsorted(table.strings, context << BYTE)
        end = np.searchsorted(table.strings, (context + np.uint64(1)) << BYTE)
        at = np.searchsorted(table.strings, string)
        after = np.searchsorted(table.strings, string, side="right")
        seen, different = table.before[end] - table.before[start], end - start
        followed = table.before[after] - table.before[at]
        # Of a context that is not there both counts are 0.
        mixed = (followed + different * shorter) / np.maximum(seen + different, 1)
        p_BT = p_BT.copy()
        p_BT[:, first:] = np.where(seen > 0, mixed, shorter)
        made.append(p_BT)
    return np.stack(made)


def losses(
    text_bytes: npt.NDArray[np.uint8], windows: npt.NDArray[np.integer], orders: int = ORDERS
) -> npt.NDArray[np.float64]:
    """Return the mean loss of each order on windows, in nats a byte.

    Args:
      text_bytes: what is counted, `Text.train`.
      windows: [B, T + 1], of `Text.heldout`.
      orders: how many orders, from 0 on.
    Returns: [orders].
    Example:
      >>> text_bytes = np.frombuffer(b"abab" * 100, np.uint8)
      >>> losses(text_bytes, np.array([[97, 98, 97]]), orders=2).round(3).tolist()
      [0.698, 0.003]
    """
    return -np.log(probabilities(count(text_bytes, orders), windows)).mean(axis=(1, 2))
