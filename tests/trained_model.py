"""A small model for the tests of training: two parts, a loss, batches by step."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

D, F, B = 5, 7, 11
KEY = jax.random.key(3)
PARTS = ("attention", "mlp")


def init_params(key: jax.Array) -> dict[str, Any]:
    keys = jax.random.split(key, 2)
    attention = {"w_DF": 0.5 * jax.random.normal(keys[0], (D, F))}
    mlp = {"w_FD": 0.5 * jax.random.normal(keys[1], (F, D)), "bias_D": jnp.zeros(D)}
    return {"layers": [{"attention": attention}, {"mlp": mlp}]}


def loss_fn(params: Any, x_BD: jax.Array, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    attention, mlp = params["layers"][0]["attention"], params["layers"][1]["mlp"]
    hidden_BF = jnp.tanh(x_BD @ attention["w_DF"])
    out_BD = hidden_BF @ mlp["w_FD"] + mlp["bias_D"][None]
    loss = jnp.mean(jnp.square(out_BD - jnp.sin(3 * x_BD)))
    return loss, {"hidden": jnp.abs(hidden_BF).mean()}


def frozen_attention(params: Any, x_BD: jax.Array, key: jax.Array) -> Any:
    first, second = params["layers"]
    return loss_fn({"layers": [jax.lax.stop_gradient(first), second]}, x_BD, key)


def batch_fn(step: int) -> np.ndarray:
    return np.random.default_rng([17, step]).standard_normal((B, D), np.float32)


def norm(*arrays: Any) -> float:
    squares = [np.sum(np.asarray(array, np.float64) ** 2) for array in arrays]
    return float(np.sqrt(np.sum(squares)))


def leaves(tree: Any, part: str) -> list[Any]:
    return jax.tree.leaves(tree["layers"][PARTS.index(part)])


def jsonl_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def loss_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    return [row for row in jsonl_rows(path) if "loss" in row or "eval/loss" in row]
