"""Small steps for tests of tpu.plan to compile: one that is right, others with a planted fault.

All but `attends` are without attention, for the TPU's compiler takes a minute for that alone.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import jax_attn as ja
from experiments import character_lm as lm
from jax_attn import train

V = 256


def plan_step(mesh: Any, batch: int = 16, length: int = 1024, remat: str = "full") -> Any:
    """A language model of MLPs, that sees one token at a time."""
    return words(mesh, D=512, L=3, batch=batch, length=length, remat=remat)


def longer(mesh: Any, remat: str = "full") -> Any:
    """The same with four times the context."""
    return plan_step(mesh, length=4096, remat=remat)


def too_large(mesh: Any, batch: int = 32, remat: str = "") -> Any:
    """A state of 3 GB on each of 4 devices, and activations that do not fit beside it."""
    return words(mesh, D=4096, L=8, batch=batch, length=16384, remat=remat)


def words(mesh: Any, *, D: int, L: int, batch: int, length: int, remat: str) -> Any:
    tx = optax.adamw(1e-3)

    def init(key: jax.Array) -> train.TrainState:
        layer = partial(ja.init_block, D=D, mlp=partial(ja.init_mlp, D=D, F=4 * D))
        return train.init_state(ja.init_language_model(key, V=V, D=D, L=L, layer=layer), tx)

    def loss_fn(params: Any, rows: Any, key: jax.Array) -> Any:
        logits_BTV, _ = ja.language_model(params, rows["tokens_BT"], remat=remat or None)
        return train.next_token_loss(logits_BTV, rows["targets_BT"]), {}

    step = train.make_train_step(train.compute_in(loss_fn, dtype=jnp.bfloat16), tx)
    rows = jax.ShapeDtypeStruct((batch, length), "int32")
    return build(mesh, step, init, {"tokens_BT": rows, "targets_BT": rows}, batch * length)


def attends(mesh: Any) -> Any:
    """A language model with attention, on short texts."""
    cfg = lm.Config(D=256, N=2, L=2, B=16, T=256, dtype="bfloat16")
    rows = jax.ShapeDtypeStruct((cfg.B, cfg.T), "int32")
    rows = {"tokens_BT": rows, "targets_BT": rows}
    return build(mesh, lm.make_step(cfg), partial(lm.start, cfg), rows, cfg.B * cfg.T)


def gathers(mesh: Any) -> Any:
    """A step that gathers its activations on every device."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> Any:
        x_BD = jax.nn.relu(batch["x_BD"] @ params["w_in_DF"]) @ params["w_out_FD"]
        x_BD = jax.lax.with_sharding_constraint(x_BD, everywhere)
        return jnp.square(jnp.sort(x_BD, axis=0) @ params["w_in_DF"]).mean(), {}

    def init(key: jax.Array) -> train.TrainState:
        params = {"w_in_DF": jnp.zeros((512, 1024)), "w_out_FD": jnp.zeros((1024, 512))}
        return train.init_state(params, optax.adam(1e-3))

    step = train.make_train_step(loss_fn, optax.adam(1e-3))
    rows = {"x_BD": jax.ShapeDtypeStruct((16384, 512), jnp.float32)}
    return build(mesh, step, init, rows, 16384)


def build(mesh: Any, step: Any, init: Any, rows: Any, tokens: int) -> Any:
    def places(tree: Any, rules: Any) -> Any:
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            tree,
            ja.specs(tree, mesh, rules),
        )

    state = jax.eval_shape(init, jax.random.key(0))
    key = jax.eval_shape(jax.random.key, 0)
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    return (
        ja.shard_step(step, mesh),
        (places(state, ja.PARAMS), places(rows, ja.ACTIVATIONS), key),
        tokens,
    )
