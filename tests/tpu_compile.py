"""Compile for TPU slices that are not here; run as a module, it prints what it found as JSON.

Command: python -m tests.tpu_compile TOPOLOGY
"""

import json
import re
import sys
import time
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, PartitionSpec

import jax_attn as a
from jax_attn import rope, train

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")


def overlapped(text: str) -> list[bool]:
    """For each permute in a loop's body, in the order of the schedule: whether a loop, which is the
    attention to the keys at hand, runs between its start and its done."""
    found = []
    for body in re.split(r"\n\}\n", text):
        lines = body.splitlines()
        starts = {
            made[1]: i
            for i, line in enumerate(lines)
            if (made := re.search(r"%([\w.-]+) = .* collective-permute-start\(", line))
        }
        if not starts or any(line.startswith("ENTRY") for line in lines):
            continue
        loops = [i for i, line in enumerate(lines) if re.search(r" while\(", line)]
        for i, line in enumerate(lines):
            if made := re.search(r" collective-permute-done\(.*?%([\w.-]+)\)", line):
                found.append(any(starts[made[1]] < loop < i for loop in loops))
    return found


def count(text: str) -> dict[str, int]:
    """Collectives of each kind, which are asynchronous if they have a start."""
    made = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in KINDS}
    return {kind: n for kind, n in made.items() if n}


def step(devices: Any) -> dict[str, Any]:
    """Compile a training step that splits everything: rows, parameters, sequence, heads."""
    mesh = Mesh(
        np.array(devices).reshape(1, 2, 2, -1),
        ("data", "fsdp", "context", "model"),
        axis_types=(AxisType.Auto,) * 4,
    )
    attend = partial(a.attention, mask=a.causal(), rope=rope.plain(128), context="zigzag")
    tx = optax.adamw(1e-3)

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> Any:
        logits_BTV, _ = a.language_model(params, batch["tokens_BT"], attend=attend)
        return train.next_token_loss(logits_BTV, batch["tokens_BT"]), {}

    def init(key: jax.Array) -> train.TrainState:
        layer = partial(
            a.init_block,
            D=256,
            attention=partial(a.init_attention, D=256, N=8, H=128),
            mlp=partial(a.init_mlp, D=256, F=512),
        )
        params = a.init_language_model(key, V=512, D=256, L=3, layer=layer)
        return train.init_state(params, tx)

    def placed(tree: Any, places: Any) -> Any:
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
        )

    state = jax.eval_shape(init, jax.random.key(0))
    state = placed(state, a.specs(state, mesh))
    batch = {"tokens_BT": jax.ShapeDtypeStruct((2, 4096), "int32")}
    batch = placed(batch, a.specs(batch, mesh, a.ACTIVATIONS))
    key = jax.eval_shape(jax.random.key, 0)
    key = placed(key, jax.NamedSharding(mesh, PartitionSpec()))
    step_fn = a.shard_step(train.make_train_step(loss_fn, tx), mesh)
    began = time.perf_counter()
    program = step_fn.lower(state, batch, key).compile()
    text, spent = program.as_text() or "", program.memory_analysis()
    return {
        "collectives": count(text),
        "overlapped": overlapped(text),
        "synchronous": len(re.findall(r" collective-permute\(", text)),
        "compile_s": time.perf_counter() - began,
        "arguments": spent.argument_size_in_bytes,
        "temporaries": spent.temp_size_in_bytes,
        "state": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
    }


if __name__ == "__main__":
    slice_ = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1])
    print(json.dumps(step(slice_.devices)))
