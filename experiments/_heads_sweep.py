"""Heads and MLPs of a language model edited one by one: every edit a mask, so that one program runs
them all.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _character
from experiments._character import Character
from jax_attn import (
    attribution,
    causal,
    dense_weights,
    head_summary,
    intervene,
    language_model,
    readers,
)

HEADS = ("zero", "mean", "uniform", "patched", "permuted")
MLPS = ("zero", "mean", "patched")
SEEN = ("entropy", "max_prob", "first_mass")
TOGETHER = 8  # edits run at once


class Masks(NamedTuple):
    """What each run edits; a run may edit nothing."""

    heads: Any
    """bool [runs, kinds of HEADS, L, N]."""
    mlps: Any
    """bool [runs, kinds of MLPS, L]."""


class Clean(NamedTuple):
    """What a run without edits holds, of one batch; leaves with L in front."""

    logits_BTV: jax.Array
    q_LBTNH: jax.Array
    k_LBSNH: jax.Array
    v_LBSNE: jax.Array
    o_LBTNE: jax.Array
    mlp_LBTD: jax.Array
    seen: Any


def masks(L: int, N: int) -> Masks:
    """List the runs: none; then by kind each head, each layer's heads, all; the same of MLPs.

    Runs that edit nothing are added, so that `TOGETHER` divides their number.
    """
    heads_LNLN = np.eye(L * N, dtype=bool).reshape(L * N, L, N)
    layers_LLN = np.repeat(np.eye(L, dtype=bool)[:, :, None], N, axis=2)
    chosen = np.concatenate([heads_LNLN, layers_LLN, np.ones((1, L, N), bool)])
    feeds = np.concatenate([np.eye(L, dtype=bool), np.ones((1, L), bool)])
    K, M = len(HEADS) * len(chosen), len(MLPS) * len(feeds)
    runs = -(-(1 + K + M) // TOGETHER) * TOGETHER
    made = Masks(np.zeros((runs, len(HEADS), L, N), bool), np.zeros((runs, len(MLPS), L), bool))
    for kind in range(len(HEADS)):
        first = 1 + kind * len(chosen)
        made.heads[first : first + len(chosen), kind] = chosen
    for kind in range(len(MLPS)):
        first = 1 + K + kind * len(feeds)
        made.mlps[first : first + len(feeds), kind] = feeds
    return made


def sorted_out(x_R: np.ndarray, L: int, N: int) -> dict[str, Any]:
    """Sort a number of each run of `masks` by what it edits, less that of no edit.

    Args:
      x_R: [..., runs].
      L, N: as given to `masks`.
    Returns: {"heads", "mlps"}: kind to {"head": [..., L, N], "layer": [..., L], "all": [...]},
      MLPs without "head".
    """
    change_R = x_R - x_R[..., :1]
    at, made = 1, {"heads": {}, "mlps": {}}
    for part, kinds in (("heads", HEADS), ("mlps", MLPS)):
        for kind in kinds:
            found = {}
            if part == "heads":
                found["head"] = change_R[..., at : at + L * N].reshape(*x_R.shape[:-1], L, N)
                at += L * N
            found["layer"], found["all"] = change_R[..., at : at + L], change_R[..., at + L]
            at += L + 1
            made[part][kind] = found
    return made


def clean(model: Character, params: Any, tokens_BT: jax.Array) -> Clean:
    """Run the model without edits and keep what edits need."""
    kept = ("q_BTNH", "k_BSKH", "v_BSKE", "o_BTNE")
    attend = partial(_character.attend(model), keep=kept, observe=SEEN, reduce=head_summary)

    def feed(part: Any, x_BTD: jax.Array) -> Any:
        y_BTD = _character.feed(part, x_BTD)
        return y_BTD, {"y_BTD": y_BTD}

    logits_BTV, aux = language_model(params, tokens_BT, attend=attend, feed=feed)
    said = aux["attention"]
    q_LBTNH, k_LBSNH, v_LBSNE, o_LBTNE = (said["kept"][name] for name in kept)
    mlp_LBTD = aux["mlp"]["y_BTD"]
    return Clean(logits_BTV, q_LBTNH, k_LBSNH, v_LBSNE, o_LBTNE, mlp_LBTD, said["seen"])


def shuffled(p_BNTS: jax.Array, key: jax.Array) -> jax.Array:
    """Permute the weights of each row among the keys that are not later than its query."""
    T, S = p_BNTS.shape[2:]
    past_TS = jnp.arange(S)[None] <= jnp.arange(T)[:, None]
    # The past in random order, then the rest, whose weights are 0.
    chance_BNTS = jnp.where(past_TS[None, None], jax.random.uniform(key, p_BNTS.shape), 2.0)
    return jnp.take_along_axis(p_BNTS, jnp.argsort(chance_BNTS, axis=-1), axis=-1)


def means(model: Character, params: Any, chunks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Average what heads [L,N,E] and MLPs [L,D] hand on, over windows [chunks,B,T+1]."""

    def one(windows: jax.Array) -> Any:
        found = clean(model, params, windows[:, :-1])
        return found.o_LBTNE.mean(axis=(1, 2)), found.mlp_LBTD.mean(axis=(1, 2))

    return jax.tree.map(lambda x: x.mean(axis=0), jax.lax.map(one, chunks))


def sweep(
    model: Character, params: Any, mean: Any, runs: Masks, windows: jax.Array, key: jax.Array
) -> dict[str, jax.Array]:
    """Measure each run on a batch of windows.

    Patched: what the part hands on in the next window of the batch, at the same positions.

    Args:
      model, windows: of `_character.loss`.
      params: those of one seed.
      mean: from `means`.
      runs: from `masks`.
      key: drives the permutations.
    Returns: "loss", nats, and "moved", how far the prediction is from that of no edit (total
      variation, mean of tokens), both [runs].
    """
    tokens_BT, targets_BT = windows[:, :-1], windows[:, 1:]
    found = clean(model, params, tokens_BT)
    weights = jax.vmap(partial(dense_weights, mask=causal()))
    p_LBNTS = weights(found.q_LBTNH, found.k_LBSNH)
    p_LBNTS = jax.vmap(shuffled)(p_LBNTS, jax.random.split(key, model.L))
    o_LBTNE, mlp_LBTD = (jnp.roll(x, -1, axis=1) for x in (found.o_LBTNE, found.mlp_LBTD))
    usual_BTV = jax.nn.softmax(found.logits_BTV)
    edits: dict[str, Callable[[jax.Array], intervene.Edit]] = {
        "zero": intervene.zero,
        "mean": partial(intervene.mean, mean_NE=mean[0]),
        "uniform": intervene.uniform,
        "patched": partial(intervene.given_output, o_BTNE=o_LBTNE),
        "permuted": partial(intervene.given_pattern, p=p_LBNTS),
    }

    def feed(part: Any, x_BTD: jax.Array) -> jax.Array:
        y_BTD = _character.feed(part["own"], x_BTD)
        other = {"zero": 0.0, "mean": part["mean_D"][None, None], "patched": part["other_BTD"]}
        for kind, chosen in zip(MLPS, part["chosen"], strict=True):
            y_BTD = jnp.where(chosen, other[kind], y_BTD)
        return y_BTD

    def run(mask: Masks) -> dict[str, jax.Array]:
        own = {"own": params["layers"]["mlp"], "chosen": tuple(mask.mlps)}
        part = own | {"mean_D": mean[1], "other_BTD": mlp_LBTD}
        edited = params | {"layers": params["layers"] | {"mlp": part}}
        made = tuple(edits[kind](at) for kind, at in zip(HEADS, mask.heads, strict=True))
        logits_BTV, _ = language_model(
            edited, tokens_BT, attend=_character.attend(model), feed=feed, intervene=made
        )
        nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
        moved_BT = jnp.abs(jax.nn.softmax(logits_BTV) - usual_BTV).sum(axis=-1) / 2
        return {"loss": nats_BT.mean(), "moved": moved_BT.mean()}

    return jax.lax.map(run, jax.tree.map(jnp.asarray, runs), batch_size=TOGETHER)


def gates(model: Character, params: Any, windows: jax.Array) -> jax.Array:
    """Measure how the loss answers to a gate on each head: E |dL / dgate| over windows, [L,N].

    (Michel et al. 2019, arXiv:1905.10650.) L is the loss of one window, the gate is at 1.
    """

    def loss(gate_LN: jax.Array, window: jax.Array) -> jax.Array:
        layers = params["layers"]
        wo = layers["attention"]["wo_NED"] * gate_LN[:, :, None, None]
        layers = layers | {"attention": layers["attention"] | {"wo_NED": wo}}
        return _character.loss(model, params | {"layers": layers}, window[None])

    open_LN = jnp.ones((model.L, model.N))
    return jnp.abs(jax.vmap(jax.grad(loss), in_axes=(None, 0))(open_LN, windows)).mean(axis=0)


def statistics(model: Character, params: Any, windows: jax.Array) -> dict[str, jax.Array]:
    """Measure what might tell which heads matter, [L,N] each: means over rows.

    Args:
      model, windows: of `_character.loss`.
      params: those of one seed.
    Returns: statistics of the weights; "norm", of what the head writes; "gate"; and "small_values",
      the norm of the values where the weight goes, over their mean norm in the past: below 1 the
      head looks at small ones.
    """
    found = clean(model, params, windows[:, :-1])
    wo_LNED = params["layers"]["attention"]["wo_NED"]
    made = {name: found.seen[name]["mean"] for name in SEEN}
    norm_LBTN = jax.vmap(attribution.head_norms)(found.o_LBTNE, wo_LNED)
    value_LBSN = jax.vmap(attribution.head_norms)(found.v_LBSNE, wo_LNED)
    raw, weighted = maps(found, wo_LNED, range(model.T))
    past_T = jnp.arange(1, model.T + 1)[None, None, :, None]
    usual_LBTN = jnp.cumsum(value_LBSN, axis=2) / past_T
    # The first query has no choice.
    ratio_LBTN = (weighted.sum(axis=-1).transpose(0, 1, 3, 2) / usual_LBTN)[:, :, 1:]
    return made | {
        "norm": norm_LBTN.mean(axis=(1, 2)),
        "gate": gates(model, params, windows),
        "small_values": ratio_LBTN.mean(axis=(1, 2)),
        "apart": apart(raw, weighted).mean(axis=(1, 3)),
    }


def maps(found: Clean, wo_LNED: jax.Array, rows: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Write out weights, and weights times the norm of what their values write, [L,B,N,R,S].

    (Kobayashi et al. 2020, arXiv:2004.10102.)
    """
    asked = {"rows": jnp.asarray(rows), "mask": causal()}
    raw = jax.vmap(partial(readers.attention_rows, **asked))(found.q_LBTNH, found.k_LBSNH)
    weigh = jax.vmap(partial(attribution.value_weighted_rows, **asked))
    return raw, weigh(found.q_LBTNH, found.k_LBSNH, found.v_LBSNE, wo_LNED)


def apart(raw: jax.Array, weighted: jax.Array) -> jax.Array:
    """Measure how far rows [...,S] of both kinds of maps are apart, as total variation."""
    share = weighted / jnp.maximum(weighted.sum(axis=-1, keepdims=True), 1e-30)
    return jnp.abs(raw - share).sum(axis=-1) / 2
