"""Small steps for tests of tpu.plan to compile: one that is right, others with a planted fault."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import jax_attn as ja
from experiments import character_lm as lm
from jax_attn import train

SIZES = {"D": 512, "N": 4, "L": 3, "dtype": "bfloat16", "remat": "full"}


def plan_step(mesh: Any, batch: int = 16, length: int = 1024, remat: str = "full") -> Any:
    """A language model's step."""
    cfg = dataclasses.replace(lm.Config(**SIZES), B=batch, T=length, remat=remat)
    return build(mesh, cfg, lm.make_step(cfg), partial(lm.start, cfg))


def longer(mesh: Any) -> Any:
    """The same with four times the context."""
    return plan_step(mesh, length=4096)


def too_large(mesh: Any, batch: int = 256, remat: str = "") -> Any:
    """A state of 11 GB on each of 4 devices, and activations that do not fit beside it."""
    cfg = dataclasses.replace(lm.Config(**SIZES), D=4096, N=32, L=12, B=batch, T=2048, remat=remat)
    return build(mesh, cfg, lm.make_step(cfg), partial(lm.start, cfg))


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

    step = ja.shard_step(train.make_train_step(loss_fn, optax.adam(1e-3)), mesh)
    state = places(jax.eval_shape(init, jax.random.key(0)), mesh, ja.PARAMS)
    rows = {"x_BD": jax.ShapeDtypeStruct((16384, 512), jnp.float32)}
    return step, (state, places(rows, mesh, ja.ACTIVATIONS), key_of(mesh)), 16384


def places(tree: Any, mesh: Any, rules: Any) -> Any:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        tree,
        ja.specs(tree, mesh, rules),
    )


def key_of(mesh: Any) -> Any:
    key = jax.eval_shape(jax.random.key, 0)
    place = NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=place)


def build(mesh: Any, cfg: lm.Config, step: Any, init: Any) -> Any:
    state = places(jax.eval_shape(init, jax.random.key(0)), mesh, ja.PARAMS)
    tokens = jax.ShapeDtypeStruct((cfg.B, cfg.T), "int32")
    rows = places({"tokens_BT": tokens, "targets_BT": tokens}, mesh, ja.ACTIVATIONS)
    return ja.shard_step(step, mesh), (state, rows, key_of(mesh)), cfg.B * cfg.T
