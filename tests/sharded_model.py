"""A small language model whose sizes the meshes divide, and what training it on one device gives.

Sizes are different multiples of 8, times primes, so that two swapped axes cannot agree by accident.
"""

from collections.abc import Iterable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_attn as a
from jax_attn import train

B, T, D, N, H, F, V, X, STEPS = 16, 7, 40, 8, 3, 88, 104, 8, 3
TX = optax.sgd(0.5)
KEY = jax.random.key(1)


def init(key: jax.Array, *, moe: bool = False, L: int = 3) -> dict[str, Any]:
    feed = partial(a.init_moe, D=D, F=F, X=X) if moe else partial(a.init_mlp, D=D, F=F, bias=True)
    attention = partial(a.init_attention, D=D, N=N, H=H, E=5, bias=True, qk_norm=True)
    layer = partial(a.init_block, D=D, attention=attention, mlp=feed)
    return a.init_language_model(key, V=V, D=D, L=L, T=T, layer=layer)


def init_state(key: jax.Array, *, moe: bool = False, L: int = 3) -> train.TrainState:
    return train.init_state(init(key, moe=moe, L=L), TX)


def loss_fn(params: Any, batch: Any, key: jax.Array, *, moe: bool = False) -> Any:
    feed = a.moe if moe else a.mlp
    logits_BTV, aux = a.language_model(params, batch["tokens_BT"], feed=feed)
    loss = train.next_token_loss(logits_BTV, batch["targets_BT"])
    return loss, {"load_LX": aux["mlp"]["routing"].load_X} if moe else {}


def make_step(*, moe: bool = False, axis: str | None = None) -> train.StepFn:
    return train.make_train_step(partial(loss_fn, moe=moe), TX, axis=axis)


def rows(step: int, rows: Iterable[int] = range(B)) -> dict[str, np.ndarray]:
    """Rows of a step's batch, each a function of (step, row)."""
    made = [np.random.default_rng((step, row)).integers(0, V, T + 1, np.int32) for row in rows]
    return {"tokens_BT": np.stack(made)[:, :-1], "targets_BT": np.stack(made)[:, 1:]}


def run(step_fn: Any, state: Any, make: Any = rows) -> tuple[list[float], Any]:
    """Train some steps; return the losses and the state."""
    losses = []
    for step in range(STEPS):
        state, metrics = step_fn(state, make(step), KEY)
        losses.append(float(metrics["loss"]))
    return losses, state


# Half the time to compile; what is parallel is decided before.
QUICK: Any = {"xla_backend_optimization_level": 0}


def quick(fn: Any, *args: Any) -> Any:
    return jax.jit(fn).lower(*args).compile(QUICK)


@cache
def one_device_step(*, moe: bool = False) -> Any:
    state = jax.eval_shape(partial(init_state, moe=moe), jax.random.key(0))
    return quick(make_step(moe=moe), state, rows(0), KEY)


@cache
def on_one_device(*, moe: bool = False) -> tuple[list[float], Any, Any]:
    """Losses, the state before and after, in float32 without any mesh."""
    key = jax.random.key(0)
    state = quick(partial(init_state, moe=moe), key)(key)
    before = jax.device_get(state)
    losses, after = run(one_device_step(moe=moe), state)
    return losses, before, jax.device_get(after)


# A sum of n terms in another order differs by at most n roundings of the sum of their sizes. The
# chain of sums behind an update: rows and positions, the vocabulary, and in each of 3 layers the
# width, the heads, the hidden width and the keys, there and back.
ROUNDINGS = STEPS * (B * T + V + 3 * 2 * (2 * D + N * H + F + T))
EPS = float(jnp.finfo(jnp.float32).eps)


def assert_close(tree: Any, want: Any) -> None:
    """Fail unless every leaf is within the budget of roundings of its largest entry."""
    got = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    for (path, x), y in zip(got, jax.tree.leaves(want), strict=True):
        budget = ROUNDINGS * EPS * float(np.abs(y).max())
        error = float(np.abs(x - y).max())
        assert error <= budget, f"{jax.tree_util.keystr(path)}: {error:.1e} above {budget:.1e}"
