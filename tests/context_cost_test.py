"""What a split sequence costs: what devices send each other, their work and their memory."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_attn import causal, context_attention
from jax_attn.kernels import blockwise, ring
from jax_attn.kernels.call import checked
from tests.context_test import DEVICES, SPLIT, mesh_of


def compiled(context: str, devices: int, T: int, of: Any, **options: Any) -> Any:
    """Compile a function of attention over sharded arrays [1,T,8,16]."""
    mesh = mesh_of(context=devices)
    queries = P() if context == "split_kv" else SPLIT
    run = partial(context_attention, context=context, **options)
    specs = (queries, SPLIT, SPLIT)
    run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=queries)
    arrays = [
        jax.ShapeDtypeStruct((1, T, 8, 16), jnp.float32, sharding=jax.NamedSharding(mesh, spec))
        for spec in specs
    ]
    return jax.jit(partial(of, run)).lower(*arrays).compile()


def gradient_of(run: Any, *x: jax.Array) -> Any:
    return jax.grad(lambda x: jnp.sum(jnp.sin(run(*x))))(x)


def output_of(run: Any, *x: jax.Array) -> Any:
    return run(*x)


def collectives(program: Any) -> dict[str, int]:
    text = program.as_text()
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
    return {kind: n for kind in kinds if (n := text.count(f" {kind}(") + text.count(f"{kind}-st"))}


@pytest.mark.parametrize(
    ("context", "forward", "gradient"),
    [
        # k with v goes round; backward they do once more, and their gradients, which then go home.
        ("ring", {"collective-permute": 1}, {"collective-permute": 4}),
        ("zigzag", {"collective-permute": 1}, {"collective-permute": 4}),
        ("all_to_all", {"all-to-all": 4}, {"all-to-all": 8}),
        ("split_kv", {"all-reduce": 3}, None),
    ],
)
def test_devices_send_what_was_declared(context, forward, gradient) -> None:
    assert collectives(compiled(context, DEVICES, 64, output_of)) == forward
    if gradient is not None:
        assert collectives(compiled(context, DEVICES, 64, gradient_of)) == gradient


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_zigzag_balances_causal_work(devices: int) -> None:
    """Blocks visited by each device, all steps together; without zigzag the last does most."""

    def work(zigzag: bool) -> np.ndarray:
        per_device = 512

        def part(x_BTNH):
            call = checked(
                *(x_BTNH, x_BTNH, x_BTNH, causal()),
                *(None, None, None, None, None, 0, 0.0, None, None),
            )
            place = ring.part_of(
                ring.Ring("context", devices), zigzag, per_device, per_device, (0, 0)
            )
            with blockwise.block_limits((16, 16)):
                data = blockwise.prepare(call, place)[1]
            return jnp.sum(data.by_query.some)[None]

        x_BTNH = jnp.zeros((1, per_device * devices, 1, 1))
        mesh = mesh_of(context=devices)
        return np.asarray(
            jax.jit(jax.shard_map(part, mesh=mesh, in_specs=SPLIT, out_specs=P("context")))(x_BTNH)
        )

    balanced, plain = work(True), work(False)
    assert balanced.sum() == plain.sum()
    assert balanced.max() <= 1.05 * balanced.mean()
    assert plain.max() >= (2 - 1.5 / devices) * plain.mean()


def test_memory_of_a_ring_falls_with_devices() -> None:
    """Temporaries of forward and backward, of each device."""
    with blockwise.block_limits((64, 64)):
        few, many = (
            compiled("ring", devices, 8192, gradient_of, mask=causal())
            .memory_analysis()
            .temp_size_in_bytes
            for devices in (2, 8)
        )
    assert many < few / 3.5, (few, many)
