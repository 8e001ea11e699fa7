"""A head in a few numbers, with the names and units that pages and pictures show."""

from typing import Any, NamedTuple

import numpy as np


class Label(NamedTuple):
    """Say what a statistic is called, its unit ("" for none) and, in a sentence, what it is.

    Example:
      >>> LABELS["entropy"].unit
      'nats'
    """

    title: str
    unit: str
    about: str


# Names as in `dot_product_attention(observe=...)`, where that has the statistic.
LABELS = {
    "entropy": Label("entropy", "nats", "How widely a query spreads: −Σ p ln p."),
    "max_prob": Label("largest weight", "", "A query's largest weight."),
    "expected_distance": Label(
        "distance", "positions", "Mean position of the keys minus the query's: negative looks back."
    ),
    "first_mass": Label("weight on first token", "", "Weight on key 0."),
    "previous_mass": Label("weight on previous token", "", "Weight on the key one before."),
    "self_mass": Label("weight on own position", "", "Weight on the query's own position."),
    "sink_mass": Label("weight on sink", "", "What the weights of a query lack to a sum of 1."),
    "max_logit": Label("largest logit", "", "A query's largest logit."),
    "lse": Label("log-sum-exp", "nats", "Log of the sum of a query's exponentiated logits."),
    "min_entropy": Label("min-entropy", "nats", "−ln of a query's largest weight."),
    "effective_keys": Label("effective keys", "keys", "How many keys share the weight: 1 / Σ p²."),
}


def full_name(name: str) -> str:
    """Return the key of a statistic in `LABELS` from what it is called for short.

    Args:
      name: any name.
    Returns: the key; another name as it is.
    Example:
      >>> full_name("distance"), full_name("entropy")
      ('expected_distance', 'entropy')
    """
    return {"distance": "expected_distance"}.get(name, name)


def label(name: str) -> Label:
    """Return the label of a statistic; one that is not known is called by its name.

    Args:
      name: key in `LABELS`, or a user's own.
    Returns: the `Label`.
    Example:
      >>> label("entropy").title, label("induction score").title
      ('entropy', 'induction score')
    """
    return LABELS.get(full_name(name)) or Label(name, "", "")


def summarize_map(weights_TS: np.ndarray, q_offset: int | None) -> dict[str, float]:
    """Average what each query does over the queries that attend to anything.

    A sink counts as one more key in the entropy. Fully masked rows are left out.

    Args:
      weights_TS: a checked map.
      q_offset: the position of query 0 among the keys; None where positions of queries and keys
        have nothing to do with each other: statistics of position are then left out.
    Returns: name -> mean, NaN where every row is masked.
    Example:
      >>> made = summarize_map(np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]]), 0)
      >>> made["max_prob"], made["expected_distance"], made["self_mass"]
      (0.75, -0.25, 0.75)
    """
    weights_TS = weights_TS.astype(np.float64)
    index_T = np.flatnonzero(weights_TS.any(-1))
    p_TS, S = weights_TS[index_T], weights_TS.shape[1]
    sink_T = np.maximum(1.0 - p_TS.sum(-1), 0.0)
    rows_T = {
        "entropy": _surprise(p_TS).sum(-1) + _surprise(sink_T),
        "max_prob": p_TS.max(-1),
    }
    if q_offset is not None:
        position_T = np.add(index_T, q_offset)
        rows_T["expected_distance"] = p_TS @ np.arange(S) - p_TS.sum(-1) * position_T
    rows_T["first_mass"] = p_TS[:, 0]
    if q_offset is not None:
        rows_T["previous_mass"] = _at(p_TS, position_T - 1)
        rows_T["self_mass"] = _at(p_TS, position_T)
    rows_T["sink_mass"] = sink_T
    if not len(index_T):
        return dict.fromkeys(rows_T, np.nan)
    return {name: float(row_T.mean()) for name, row_T in rows_T.items()}


def _surprise(p: np.ndarray) -> np.ndarray:
    return -p * np.log(np.where(p > 0, p, 1.0))


def _at(p_TS: np.ndarray, key_T: Any) -> np.ndarray:
    """The weight of one key a query, 0 where there is no such key."""
    there_T = (key_T >= 0) & (key_T < p_TS.shape[1])
    return np.where(there_T, p_TS[np.arange(len(p_TS)), np.where(there_T, key_T, 0)], 0.0)
