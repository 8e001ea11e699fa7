"""Wrong meshes, rules and batches; see tests/bad_input_test.py."""

import optax
from jax.sharding import AbstractMesh

import jax_attn as a
from jax_attn import train
from jax_attn.bootstrap import bootstrap
from tests.bad_input_cases import KEY, MLP, Entry, assert_named, call, tables, x

MESH = AbstractMesh((2, 3, 1, 5), ("data", "fsdp", "context", "model"))
EIGHT = a.make_mesh(data=8)


def loss_fn(params, batch, key):
    return (batch["x_BD"] @ params["w_D"]).mean(), {}


STEP = train.make_train_step(loss_fn, optax.sgd(0.1), axis="data")
ALONE = train.make_train_step(loss_fn, optax.sgd(0.1))
X = x(1, 4, 2, 3)
STATE = train.init_state({"w_D": x(6)}, optax.sgd(0.1))


def rows_of(n: int):
    return lambda rows: {"x_BT": x(n, 3)}


BAD: list[Entry] = [
    (call(a.make_mesh, data=3), r"data=3 .*model=1 is 3 but there are 8 devices; .* pass 3"),
    (call(a.make_mesh, data=0), r"data must be an int >= 1, got 0"),
    (call(a.make_mesh, model=2.0), r"model must be an int >= 1, got 2.0"),
    (call(a.read_mesh, "rows=8"), r"a mesh looks like .* got 'rows=8'"),
    (call(a.read_mesh, "data=2,data=4"), r"each once; got 'data=2,data=4'"),
    (call(a.read_mesh, "data=-8"), r"a mesh looks like .* got 'data=-8'"),
    (call(a.read_mesh, "data=3"), r"data=3 is 3 but there are 8 devices; .* data=8"),
    (
        call(a.specs, {"layers": {"w_in_DF": x(2, 6, 24)}}, MESH),
        r"\['layers'\]\['w_in_DF'\] has F=24 .*mesh axis model=5 does not divide",
    ),
    (
        call(a.specs, {"tokens_BT": x(8, 3)}, MESH, a.ACTIVATIONS),
        r"tokens_BT'\] has B=8 \(batch\), which mesh axis data \* fsdp=6 does not divide",
    ),
    (call(a.specs, {"w_DF": x(6)}, MESH), r"w_DF'\] has shape \(6,\).* fit its axes D F"),
    (call(a.specs, {"w_DF": x(6, 5)}, MESH, {"F": "tensor"}), r"F to mesh axis 'tensor', but the"),
    (call(a.shard_init, lambda key: MLP, KEY, MESH), r"F=24 .* model=5 does not divide"),
    (call(a.shard_step(ALONE, EIGHT), STATE, x(8, 6), KEY), r"batch has no axes in its name"),
    (call(a.global_batch, lambda rows: x(6, 3), EIGHT, B=8), r"the array needs a name whose axes"),
    (call(a.global_batch, rows_of(7), EIGHT, B=8), r"x_BT'\] has B=7 but make was asked for 8"),
    (call(a.global_batch, rows_of(6), EIGHT, B=6), r"B=6 .* data=8 does not divide"),
    (call(a.data_parallel, STEP, EIGHT, via="jit"), r"via must be 'shard_map' or 'pmap'"),
    (call(a.data_parallel, STEP, MESH), r"mesh axis 'fsdp' has size 3, .* use shard_step"),
    (
        call(a.data_parallel(STEP, EIGHT), STATE, {"x_BD": x(6, 6)}, KEY),
        r"batch\['x_BD'\] has shape \(6, 6\), whose first axis 8 devices do not divide",
    ),
    (call(bootstrap, "h:1", 2), r"index missing; give all of coordinator, count, index"),
    (call(bootstrap, "h:1", 2, 2), r"index must be from 0 to count=2 - 1, got 2"),
    (
        call(bootstrap, "h", 2, 1),
        r"must be 'host:port' with a port below 65536, got 'h'",
    ),
    (call(bootstrap, "h:1", "two", 1), r"count from arguments must be an int, got 'two'"),
    (call(a.zigzag_order, 12, 4), r"2 \* devices = 8 must divide T=12; pad the sequence"),
    (call(a.zigzag_order, 12.0, 2), r"T must be an int >= 1, got 12.0"),
    (call(a.zigzag_order, 12, 0), r"devices must be an int >= 1, got 0"),
    (
        call(a.context_attention, X, X, X, context="rings"),
        r"context must be one of 'ring', .*rings",
    ),
    (
        call(a.context_attention, X, X, X, context="ring"),
        r"needs the mesh axis 'context': call ins",
    ),
    (call(bootstrap, timeout_s=0), r"timeout_s must be > 0, got 0"),
]


@tables(*BAD)
def test_wrong_argument_is_named(entry: Entry) -> None:
    assert_named(entry)
