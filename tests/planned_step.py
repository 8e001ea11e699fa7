"""Small steps for tests of tpu.plan to compile: one that is right, others with a planted fault.

All but `attends` are without attention, for the TPU's compiler takes a minute for that alone.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import pallas as pl
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


def matrices(mesh: Any, batch: int = 1024) -> Any:
    """Two matrices of 4096 × 4096 and rows, all split over fsdp, and nothing gathered by hand."""
    return _matrices(mesh, batch, PartitionSpec("fsdp", None))


def whole_rows(mesh: Any, batch: int = 1024) -> Any:
    """The same, with the rows between the two matrices on every device."""
    return _matrices(mesh, batch, PartitionSpec(None, None))


def _matrices(mesh: Any, batch: int, between: PartitionSpec) -> Any:
    split = NamedSharding(mesh, PartitionSpec("fsdp", None))

    def step(params: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            h = jax.lax.with_sharding_constraint(x @ params["w0"], NamedSharding(mesh, between))
            return jnp.square((jax.nn.relu(h) @ params["w1"]).astype(jnp.float32)).mean()

        grads = jax.grad(loss)(params)
        return jax.tree.map(lambda w, g: (w - 0.1 * g).astype(w.dtype), params, grads)

    w = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=split)
    x = jax.ShapeDtypeStruct((batch, 4096), jnp.bfloat16, sharding=split)
    return jax.jit(step, donate_argnums=0), ({"w0": w, "w1": w}, x), batch


def kernels(mesh: Any, declared: bool = True) -> Any:
    """Eight products of 2048³ in a row, by a Pallas kernel that declares what it costs."""
    n = 2048
    cost = pl.CostEstimate(flops=2 * n**3, bytes_accessed=6 * n**2, transcendentals=0)

    def kernel(x: Any, y: Any, out: Any) -> None:
        product = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)
        out[...] = product.astype(out.dtype)

    shape = jax.ShapeDtypeStruct((n, n), jnp.bfloat16)
    call = pl.pallas_call(
        kernel,
        out_shape=shape,
        grid=(8, 8),
        in_specs=[
            pl.BlockSpec((256, n), lambda i, j: (i, 0)),
            pl.BlockSpec((n, 256), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((256, 256), lambda i, j: (i, j)),
        cost_estimate=cost if declared else None,
    )

    def step(x: jax.Array, ws: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (call(x, w), None), x, ws)[0]

    everywhere = PartitionSpec()
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(everywhere, everywhere),
                           out_specs=everywhere, check_vma=False)  # fmt: skip
    place = NamedSharding(mesh, everywhere)
    x = jax.ShapeDtypeStruct((n, n), jnp.bfloat16, sharding=place)
    ws = jax.ShapeDtypeStruct((8, n, n), jnp.bfloat16, sharding=place)
    return jax.jit(mapped, donate_argnums=0), (x, ws), n


def undeclared(mesh: Any) -> Any:
    """The same by a kernel that does not."""
    return kernels(mesh, declared=False)


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
