"""The small character model that several experiments look into, and its text."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress

from experiments import _counts
from experiments._learn import Learned, check_rows, learn
from jax_attn import (
    attention,
    causal,
    data,
    init_attention,
    init_block,
    init_language_model,
    init_mlp,
    language_model,
    mlp,
    rope,
    specs,
    train,
)
from jax_attn.command_line import check_positive

CHUNK = 32  # windows evaluated at once


@dataclasses.dataclass(frozen=True)
class Character:
    """Sizes of the model by their letters, and its training; RoPE, relu, pre-norm."""

    D: int = 128
    N: int = 4
    L: int = 4
    T: int = 64
    B: int = 12
    steps: int = 2000
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.1
    data: str = ""


def check(model: Character, mesh: jax.sharding.Mesh) -> None:
    """Refuse sizes that mean nothing or do not fit the mesh, and a text that is too short."""
    check_positive(model, "model.")
    if not model.learning_rate > 0:
        raise ValueError(f"--model.learning_rate must be above 0, got {model.learning_rate}")
    if model.D % model.N or (model.D // model.N) % 2:
        raise ValueError(
            f"--model.N={model.N} heads must divide --model.D={model.D} into even widths, for RoPE"
        )
    check_rows(mesh, {"model.B": model.B})
    specs(jax.eval_shape(partial(init, model), jax.random.key(0)), mesh)
    data.load_text(model.data or None, T=model.T)


def init(model: Character, key: jax.Array) -> Any:
    """Draw the parameters."""
    layer = partial(
        init_block,
        D=model.D,
        attention=partial(init_attention, D=model.D, N=model.N),
        mlp=partial(init_mlp, D=model.D, F=4 * model.D),
    )
    return init_language_model(key, V=data.VOCABULARY, D=model.D, L=model.L, layer=layer)


def attend(model: Character) -> Callable[..., Any]:
    """Make what attention does: causal, with RoPE; more arguments may follow."""
    return partial(attention, mask=causal(), rope=rope.plain(model.D // model.N))


def feed(params: Any, x_BTD: jax.Array) -> jax.Array:
    """Do what an MLP does: by relu, as an exact GELU takes a CPU as long as the rest."""
    return mlp(params, x_BTD, activation="relu")


def loss(model: Character, params: Any, windows: jax.Array) -> jax.Array:
    """Measure the mean cross entropy of every byte of windows [B,T+1] but the first, in nats."""
    logits_BTV, _ = language_model(params, windows[:, :-1], attend=attend(model), feed=feed)
    return train.next_token_loss(logits_BTV, windows[:, 1:])


def optimizer(model: Character) -> optax.GradientTransformation:
    """Clip, AdamW, warm-up (at most half the steps) and cosine."""
    warmup = min(model.warmup, model.steps // 2)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, model.learning_rate, warmup, max(model.steps, warmup + 1), model.learning_rate / 10
    )
    adamw = optax.adamw(rate, b2=0.99, weight_decay=model.weight_decay)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def drawn(text_bytes: np.ndarray, B: int, T: int) -> Callable[[jax.Array], jax.Array]:
    """Make what draws a batch of windows [B,T+1] of a text, uniformly, from a key."""
    placed = jnp.asarray(text_bytes)

    def batch(key: jax.Array) -> jax.Array:
        start_B = jax.random.randint(key, (B,), 0, text_bytes.size - T)
        return placed[start_B[:, None] + jnp.arange(T + 1)[None]].astype(jnp.int32)

    return batch


def chunks(text_bytes: np.ndarray, T: int, total: int) -> np.ndarray:
    """Cut about `total` windows, evenly spread, [chunks, windows, T + 1]."""
    B = min(CHUNK, total)
    return data.windows(text_bytes, B=B, T=T, count=total // B)


def loss_of_pairs(text: data.Text, windows: Any) -> float:
    """Measure the loss of counts of pairs of bytes (order 1) on windows [...,T+1], nats a byte."""
    flat = np.asarray(windows).reshape(-1, np.shape(windows)[-1])
    return float(_counts.losses(text.train, flat, orders=2)[1])


def untrained(text: data.Text, windows: Any, loss: Any) -> str:
    """Say that models have not learned enough to be asked what they do with context.

    Counts of pairs of bytes (order 1) know the last byte and no more.

    Args:
      text: what was trained on.
      windows: held-out ones [...,T+1].
      loss: of the models on them, nats a byte; one that is not a number is too high.
    Returns: why nothing can be judged; "" if no loss is given, or all are below that of counting.
    """
    if np.size(loss) == 0:
        return ""
    pairs, worst = loss_of_pairs(text, windows), float(np.max(loss))
    if worst < pairs:
        return ""
    return (
        f"not judged: the loss of {worst:.3f} nats is not below {pairs:.3f}, that of counting "
        "pairs of bytes"
    )


def trained(
    model: Character,
    text: data.Text,
    *,
    seeds: int,
    every: int,
    measure: Callable[[Any], Mapping[str, Any]],
    mesh: jax.sharding.Mesh,
    progress: rich.progress.Progress,
    title: str,
    log: pathlib.Path,
) -> Learned:
    """Train the model from every seed; arguments as for `learn`."""
    return learn(
        partial(init, model),
        lambda params, windows, key: (loss(model, params, windows), {}),
        optimizer(model),
        drawn(text.train, model.B, model.T),
        seeds=seeds,
        steps=model.steps,
        every=every,
        measure=measure,
        mesh=mesh,
        progress=progress,
        title=title,
        log=log,
    )
