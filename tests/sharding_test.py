"""A mesh changes where numbers lie and what travels, not the numbers."""

import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

import jax_attn as a
from jax_attn import train
from tests import sharded_model as small

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")


def traffic(hlo: str) -> Counter[tuple[str, str]]:
    """(collective, shape) of each array that travels, scalars left out; a loop counts once."""
    found = Counter()
    for line in hlo.splitlines():
        made = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
        if made:
            shapes = re.findall(r"\w+\[([\d,]+)\]", made[1])
            found.update((made[2], shape) for shape in shapes)
    return found


def totals(found: Counter[tuple[str, str]]) -> dict[str, int]:
    return {kind: n for kind in COLLECTIVES if (n := sum(found[k] for k in found if k[0] == kind))}


def compiled(state: Any, mesh: Any, moe: bool = False) -> Any:
    """The step for a state, which may be of ShapeDtypeStructs."""
    batch = a.global_batch(partial(small.rows, 0), mesh, B=small.B)
    lowered = a.shard_step(small.make_step(moe=moe), mesh).lower(state, batch, small.KEY)
    return lowered.compile(small.QUICK)


# (sizes of the mesh, arrays that travel). What they are: with data or fsdp, an all-reduce of each
# of the 20 gradients (XLA for CPUs makes no reduce-scatter of it; the share kept is cut out).
# With fsdp, an all-gather of each of the 6 matrices of a layer forward and again backward, and of
# the two tables. With model, all-reduces of the residual stream, one for each product with a split
# matrix, and two of the softmax over V.
MODES: list[tuple[dict[str, int], dict[str, int]]] = [
    ({"data": 8}, {"all-reduce": 20}),
    ({"fsdp": 8}, {"all-gather": 14, "all-reduce": 20}),
    ({"model": 8}, {"all-reduce": 13}),
    ({"data": 4, "fsdp": 2}, {"all-gather": 14, "all-reduce": 26}),
    ({"data": 4, "model": 2}, {"all-reduce": 33}),
    ({"data": 2, "model": 4}, {"all-reduce": 33}),
    ({"fsdp": 4, "model": 2}, {"all-gather": 14, "all-reduce": 33}),
    ({"fsdp": 2, "model": 4}, {"all-gather": 14, "all-reduce": 33}),
    ({"data": 2, "fsdp": 2, "model": 2}, {"all-gather": 14, "all-reduce": 39}),
]
# The same with experts. With model, what a device's experts made is summed like a product with a
# split matrix, and the router, split by experts, is gathered, forward and backward.
EXPERTS: list[tuple[dict[str, int], dict[str, int]]] = [
    ({"data": 8}, {"all-reduce": 21}),
    ({"model": 8}, {"all-gather": 2, "all-reduce": 14}),
    ({"fsdp": 2, "model": 4}, {"all-gather": 15, "all-reduce": 35}),
    ({"data": 2, "fsdp": 2, "model": 2}, {"all-gather": 15, "all-reduce": 39}),
]


def named(mode: tuple[dict[str, int], dict[str, int]]) -> str:
    return "-".join(f"{name}{size}" for name, size in mode[0].items())


@pytest.mark.few(3)
@pytest.mark.parametrize("mode", MODES, ids=named)
def test_numbers_are_those_of_one_device_and_traffic_is_what_is_declared(mode: Any) -> None:
    sizes, declared = mode
    mesh = a.make_mesh(**sizes)
    losses, before, after = small.on_one_device()
    state = jax.device_put(before, a.specs(before, mesh))
    step_fn = compiled(state, mesh)

    def batch(step: int) -> Any:
        return a.global_batch(partial(small.rows, step), mesh, B=small.B)

    got, state = small.run(step_fn, state, batch)
    small.assert_close(got, losses)
    small.assert_close(state, after)

    found = traffic(step_fn.as_text())
    assert totals(found) == declared
    assert undeclared(found, state.params, mesh) == set()


def gathered(params: Any, mesh: Any, axis: str) -> set[str]:
    """The shapes that a device would hold if every matrix were gathered over a mesh axis."""
    shapes = set()
    for leaf, place in zip(
        jax.tree.leaves(params), jax.tree.leaves(a.specs(params, mesh)), strict=True
    ):
        if axis in place.spec:
            spec = [None if part == axis else part for part in place.spec]
            sizes = [1 if part is None else mesh.shape[part] for part in spec]
            sizes += [1] * (leaf.ndim - len(sizes))
            shape = [size // share for size, share in zip(leaf.shape, sizes, strict=True)]
            # Of stacked layers one is gathered at a time; gathering all of them shows too.
            shapes |= {",".join(map(str, shape)), ",".join(map(str, shape[1:]))}
    return shapes


def undeclared(found: Counter[tuple[str, str]], params: Any, mesh: Any) -> set[str]:
    """Matrices that are gathered over another axis than fsdp, whole ones among them."""
    travelled = {shape for kind, shape in found if kind == "all-gather"}
    wrong = gathered(params, mesh, "model") - gathered(params, mesh, "fsdp")
    if mesh.shape["model"] > 1:
        whole = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(params)}
        wrong |= whole | {shape.partition(",")[2] for shape in whole if shape.count(",") > 1}
        wrong -= gathered(params, mesh, "fsdp")
    return travelled & wrong


@pytest.mark.long
@pytest.mark.parametrize("mode", EXPERTS, ids=named)
def test_experts_on_a_mesh(mode: Any) -> None:
    sizes, declared = mode
    mesh = a.make_mesh(**sizes)
    losses, before, after = small.on_one_device(moe=True)
    state = jax.device_put(before, a.specs(before, mesh))
    step_fn = compiled(state, mesh, True)
    got, state = small.run(step_fn, state)
    small.assert_close(got, losses)
    small.assert_close(state, after)
    found = traffic(step_fn.as_text())
    assert totals(found) == declared
    assert undeclared(found, state.params, mesh) == set()


def test_a_gathered_weight_is_seen() -> None:
    """The checks above fail where they should: without a place for the stream, the compiler moves
    activations; a step that wants a matrix whole gathers it over model."""
    mesh = a.make_mesh(fsdp=2, model=4)
    state = jax.eval_shape(small.init_state, jax.random.key(0))
    found = Counter({("all-gather", "40,88"): 1, ("all-gather", "40,22"): 2})
    assert undeclared(found, state.params, mesh) == {"40,88"}
    assert undeclared(Counter({("all-gather", "104,40"): 1}), state.params, mesh) == {"104,40"}
    assert undeclared(Counter({("all-reduce", "40,88"): 1}), state.params, mesh) == set()
    hlo = "%a = (f32[4,5]{1,0}, f32[]) all-reduce(%b, %c)\n%d = f32[7]{0} all-gather-start(%e)"
    assert traffic(hlo) == {("all-reduce", "4,5"): 1, ("all-gather", "7"): 1}


def test_the_budget_sees_one_wrong_token() -> None:
    losses, before, after = small.on_one_device()
    wrong = jax.tree.map(np.array, small.rows(0))
    wrong["targets_BT"][3, 2] = (wrong["targets_BT"][3, 2] + 1) % small.V

    def batch(step: int) -> Any:
        return small.rows(step) if step else wrong

    got, state = small.run(small.one_device_step(), before, batch)
    with pytest.raises(AssertionError):
        small.assert_close(got, losses)
    with pytest.raises(AssertionError):
        small.assert_close(state, after)


def test_a_deeper_model_is_no_larger_program() -> None:
    mesh = a.make_mesh(data=2, fsdp=2, model=2)

    def lines(L: int) -> int:
        state = jax.eval_shape(partial(small.init_state, L=L), jax.random.key(0))
        lowered = a.shard_step(small.make_step(), mesh).lower(state, small.rows(0), small.KEY)
        return len(lowered.as_text().splitlines())

    assert lines(5) == lines(11)


def test_init_in_place_draws_the_same_numbers() -> None:
    mesh = a.make_mesh(data=2, fsdp=2, model=2)
    made = a.shard_init(small.init_state, jax.random.key(0), mesh)
    small.assert_close(made, small.on_one_device()[1])
    w_in_DF = made.params["layers"]["mlp"]["w_in_DF"]
    assert w_in_DF.sharding.spec == PartitionSpec(None, "fsdp", "model")
    assert w_in_DF.addressable_shards[0].data.shape == (3, small.D // 2, small.F // 2)


def test_a_step_is_compiled_once_and_keeps_every_place() -> None:
    def loss_fn(params: Any, batch: Any, key: jax.Array) -> Any:
        hidden_BF = jax.nn.relu(a.mlp(params, batch["x_BTD"]))
        return (hidden_BF**2).mean(), {"size_B": batch["x_BTD"].mean((1, 2))}

    tx = optax.adamw(0.1)
    step_fn = a.shard_step(
        train.make_train_step(loss_fn, tx), mesh := a.make_mesh(data=2, fsdp=2, model=2)
    )

    def init(key: jax.Array) -> train.TrainState:
        return train.init_state(a.init_mlp(key, D=6, F=10, bias=True), tx)

    state = a.shard_init(init, jax.random.key(0), mesh)
    want = a.specs(jax.eval_shape(init, jax.random.key(0)), mesh)
    batch = {"x_BTD": np.ones((4, 3, 6), np.float32)}
    for _ in range(3):
        placed = jax.tree.map(lambda x, place: x.sharding == place, state, want)
        assert jax.tree.all(placed), placed
        state, metrics = step_fn(state, batch, small.KEY)
    assert step_fn._cache_size() == 1
    assert metrics["size_B"].sharding.is_fully_replicated


SHAPES = AbstractMesh((2, 3, 1, 5), ("data", "fsdp", "context", "model"))


@pytest.mark.parametrize(
    ("name", "shape", "spec"),
    [
        ("wq_DNH", (6, 5, 7), ("fsdp", "model")),
        ("wo_NED", (5, 7, 6), ("model", None, "fsdp")),
        ("wq_DNH", (2, 6, 5, 7), (None, "fsdp", "model")),
        ("embed_VD", (10, 6), ("model", "fsdp")),
        ("w_in_XDF", (5, 6, 25), ("model", "fsdp")),
        ("w_out_XFD", (5, 25, 6), ("model", None, "fsdp")),
        ("logits_NTS", (5, 7, 11), ("model",)),
        ("b_in_F", (25,), ("model",)),
        ("scale_D", (6,), ()),
        ("scale_D", (2, 6), ()),
        ("kernel", (6, 25), ()),
        ("count", (), ()),
    ],
)
def test_places_of_parameters(name: str, shape: tuple[int, ...], spec: Any) -> None:
    leaf = jax.ShapeDtypeStruct(shape, "float32")
    assert a.specs({name: leaf}, SHAPES)[name].spec == PartitionSpec(*spec)


def test_places_of_batches_and_changed_rules() -> None:
    tokens = {"tokens_BT": jax.ShapeDtypeStruct((12, 7), "int32")}
    spec = a.specs(tokens, SHAPES, a.ACTIVATIONS)["tokens_BT"].spec
    assert spec == PartitionSpec(("data", "fsdp"))
    two_heads = {"wk_DKH": jax.ShapeDtypeStruct((6, 2, 7), "float32")}
    rules = {**a.PARAMS, "K": None}
    assert a.specs(two_heads, SHAPES, rules)["wk_DKH"].spec == PartitionSpec("fsdp")


@pytest.mark.parametrize("tx", [optax.adamw(0.1), optax.adafactor(0.1, 2), optax.sgd(0.1, 0.9)])
def test_what_the_optimizer_keeps_lies_beside_its_parameter(tx: Any) -> None:
    params = {
        "layers": {
            "w_in_DF": np.ones((7, 6, 25), np.float32),
            "b_in_F": np.ones((7, 25), np.float32),
        }
    }
    state = jax.eval_shape(lambda: train.init_state(params, tx))
    places = a.specs(state, SHAPES)
    for (path, leaf), place in zip(
        jax.tree_util.tree_leaves_with_path(state.opt_state),
        jax.tree.leaves(places.opt_state),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        known = {"w_in_DF": (None, "fsdp", "model"), "b_in_F": (None, "model")}
        spec = next((known[n] for n in known if n in name), ())
        if leaf.shape not in ((7, 6, 25), (7, 25)) or leaf.ndim != len(spec):
            spec = ()  # Adafactor's rows and columns
        assert place.spec == PartitionSpec(*spec), name


def test_whole_width_does_nothing_without_a_mesh() -> None:
    x_BTD = jax.numpy.ones((2, 3, 5))
    assert a.whole_width("BTD", x_BTD) is x_BTD


@pytest.mark.long
def test_the_readme_examples_run() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Shard\n")[2].partition("\n## ")[0]
    variables: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        with jax.numpy_rank_promotion("allow"):  # as it runs for a user
            exec(example, variables)
    assert int(variables["state"].step) == 2
    assert variables["out_BTNE"].sharding.spec == jax.P(None, "context")
    assert variables["seen"]["entropy"].shape == (1, 512, 4)
