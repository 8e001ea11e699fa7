"""Learning together: the split of the gradient is exact, models side by side are models alone."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import _character, learning_together
from experiments._character import Character
from experiments._gradient_routes import compared, routes
from experiments._learn import learn
from experiments._seed_curves import early, half_way, path
from experiments._side_by_side import apart, beside, keys, replaced, together
from experiments.learning_together import AGAIN, FROZEN, verdicts
from jax_attn import language_model, make_mesh, train
from jax_attn.report import training_progress
from tests.formulas import draw

MODEL = Character(D=8, N=2, L=3, T=7, B=2)
TINY = ["--model.D=8", "--model.N=2", "--model.L=2", "--model.T=7", "--model.B=2", "--looked=3"]
RUN = [*TINY, "--model.steps=2", "--every=1", "--again=2", "--eval_windows=3", "--seeds=2"]


@pytest.mark.long
def test_writes_all_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(learning_together, "read_mesh", lambda text: mesh)
    assert learning_together.main([*RUN, f"--out={tmp_path}"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = {row["what"]: row for row in summary["table"]}
    names = ("none frozen", *FROZEN, *AGAIN)
    first = [found[f"held-out loss, {name}"]["at first"] for name in names]
    assert first[:5] == [first[0]] * 5, "one init for all, and the fresh start"
    assert np.isfinite(first).all()
    sorted_SA = np.sort(np.array(first[4:], float).T)
    assert np.diff(sorted_SA).min() > 1e-4, "each swap another model"
    assert len(found) == len(summary["table"]) == 9 + 3 + 4 + 4
    exact, *others = summary["verdicts"]
    assert exact["holds"] is True
    assert len(others) == 8
    for figure in summary["figures"]:
        assert (tmp_path / figure["file"]).stat().st_size > 10_000
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] * 3
    for part in ("attention_0", "attention_1", "mlp_0", "mlp_1"):
        assert np.shape(rows[1][f"update_norm/{part}"]) == (2,)
    assert np.shape(rows[3]["heldout"]) == (2, 3)
    assert np.shape(rows[6]["heldout"]) == (2, 4)


@pytest.fixture(scope="module")
def split() -> Any:
    """Both routes in float64, and what they are split from."""

    def wide_loss(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT).mean()

    params = draw(partial(_character.init, MODEL))
    windows = np.random.default_rng(0).integers(0, 256, (3, 8))
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "next_token_loss", wide_loss)  # the library's own is in float32
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), params)
        windows = jnp.asarray(windows)
        outputs, leaves = jax.jit(partial(routes, MODEL))(params, windows)
        gradient = jax.jit(jax.grad(partial(_character.loss, MODEL)))(params, windows)

        def loss(added_LBTD: jax.Array, cut_L: jax.Array, layers: Any) -> jax.Array:
            """Read the definition off the page: cut the input of one MLP."""

            def mix(part: Any, x_BTD: jax.Array) -> jax.Array:
                return _character.attend(MODEL)(part["own"], x_BTD) + part["added_BTD"]

            def feed(part: Any, x_BTD: jax.Array) -> jax.Array:
                still_BTD = jax.lax.stop_gradient(x_BTD)
                return _character.feed(part["own"], jnp.where(part["cut"], still_BTD, x_BTD))

            attention = {"own": layers["attention"], "added_BTD": added_LBTD}
            made = layers | {"attention": attention, "mlp": {"own": layers["mlp"], "cut": cut_L}}
            logits_BTV, _ = language_model(
                params | {"layers": made}, windows[:, :-1], attend=mix, feed=feed
            )
            return wide_loss(logits_BTV, windows[:, 1:])

        cuts = jnp.concatenate([jnp.zeros((1, 3), bool), jnp.eye(3, dtype=bool)])
        added_LBTD = jnp.zeros((3, 3, 7, 8), jnp.float64)
        defined = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 2)), in_axes=(None, 0, None)))(
            added_LBTD, cuts, params["layers"]
        )
    return jax.device_get((outputs, leaves, gradient["layers"]["attention"], defined))


def close(actual: Any, expected: Any) -> None:
    """Compare to the rounding of float64."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13 * np.abs(expected).max())


def test_the_routes_add_up_to_the_gradient(split: Any) -> None:
    outputs, leaves, gradient, (at_output, _) = split
    assert set(leaves["mlp"]) == {"wq_DNH", "wk_DKH", "wv_DKE", "wo_NED"}
    for name in gradient:
        close(leaves["mlp"][name] + leaves["skip"][name], gradient[name])
    close(outputs["mlp"] + outputs["skip"], at_output[0])
    for route in ("mlp", "skip"):
        assert np.abs(outputs[route]).max() > 1e-4, "both are there"


def test_the_skip_is_what_is_left_when_the_mlp_is_cut(split: Any) -> None:
    outputs, leaves, _, (at_output, of_layers) = split
    for layer in range(3):
        close(outputs["skip"][layer], at_output[1 + layer][layer])
        for name, g in leaves["skip"].items():
            close(g[layer], of_layers["attention"][name][1 + layer][layer])


def test_shares_and_cosines_are_those_of_vectors() -> None:
    one = {"mlp": {"w_D": jnp.array([[3.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])}}
    other = {"skip": {"w_D": jnp.array([[0.0, 4.0], [1.0, 0.0], [3.0, 0.0]])}}
    made = compared(one | other)
    np.testing.assert_allclose(made["share_L"], [9 / 25, 0.5, -0.5], rtol=1e-6)
    np.testing.assert_allclose(made["cosine_L"], [0.0, 1.0, -1.0], rtol=1e-6)
    np.testing.assert_allclose(made["part_L"], [3 / 7, 0.5, 0.25], rtol=1e-6)


def test_layers_apart_come_together_again() -> None:
    params = draw(partial(_character.init, MODEL))
    alone = apart(params)
    assert set(keys("mlp_norm", 3)) < set(alone["layers"])
    assert alone["layers"]["attention_2"]["wq_DNH"].shape == (8, 2, 4)
    jax.tree.map(np.testing.assert_array_equal, together(alone), params)
    other = jax.tree.map(lambda x: x + 1, alone)
    mixed = together(replaced("mlp", alone, other))["layers"]
    np.testing.assert_array_equal(mixed["mlp"]["w_in_DF"], params["layers"]["mlp"]["w_in_DF"] + 1)
    for name in ("attention", "attention_norm", "mlp_norm"):
        jax.tree.map(np.testing.assert_array_equal, mixed[name], params["layers"][name])


def test_models_side_by_side_are_trained_as_each_alone() -> None:
    tx = _character.optimizer(dataclasses.replace(MODEL, warmup=1, steps=3))
    tree = {"embed_VD": (3, 2), "layers": {"attention_0": {"w_D": (2,)}, "mlp_0": {"w_D": (2,)}}}
    rng = np.random.default_rng(0)

    def drawn() -> Any:
        def leaf(shape: tuple[int, ...]) -> jax.Array:
            return jnp.asarray(rng.normal(size=(3, *shape)))

        return jax.tree.map(leaf, tree, is_leaf=lambda x: isinstance(x, tuple))

    frozen = [("attention_0",), ("attention_0", "mlp_0"), ()]
    params, gradients = drawn(), [drawn(), drawn()]
    together_tx = beside(tx, frozen)
    state = together_tx.init(params)
    for g in gradients:  # the first rate of a warm-up is 0
        made, state = together_tx.update(g, state, params)
    for i, names in enumerate(frozen):
        alone = train.freeze(tx, names) if names else tx
        own = jax.tree.map(lambda x, at=i: x[at], params)
        kept = alone.init(own)
        for g in gradients:
            expected, kept = alone.update(jax.tree.map(lambda x, at=i: x[at], g), kept, own)
        for path_, leaf in jax.tree_util.tree_leaves_with_path(expected):
            got = dict(jax.tree_util.tree_leaves_with_path(made))[path_][i]
            np.testing.assert_allclose(got, leaf, rtol=1e-5, atol=1e-9)
            still = any(entry.key in names for entry in path_)
            assert (np.asarray(leaf) == 0).all() == still


def test_a_seed_begins_with_what_it_is_given() -> None:
    def begun(key: jax.Array, given: Any) -> Any:
        return {"w_D": given["w_D"], "drawn_D": jax.random.normal(key, (2,))}

    with training_progress() as progress:
        found = learn(
            begun,
            lambda params, rows, key: (params["w_D"].sum(), {}),
            optax.sgd(0.5),
            lambda key: jnp.zeros(()),
            seeds=3,
            steps=1,
            every=1,
            measure=dict,
            mesh=make_mesh(devices=jax.devices()[:1]),
            progress=progress,
            title="given",
            given={"w_D": jnp.arange(3.0)[:, None]},
        )
    first, last = found.rows
    assert first["w_D"].tolist() == [[0.0], [1.0], [2.0]]
    assert last["w_D"].tolist() == [[-0.5], [0.5], [1.5]]
    for seed in range(3):
        key = jax.random.fold_in(jax.random.key(0), seed)
        np.testing.assert_array_equal(first["drawn_D"][seed], jax.random.normal(key, (2,)))


def test_half_way_is_found_between_measurements() -> None:
    curves = np.array([[0.0, 2.0, 0.0], [1.0, 2.0, -1.0], [3.0, 2.0, 0.0], [4.0, 3.0, -2.0]])
    np.testing.assert_allclose(half_way([0, 10, 20, 30], curves), [15.0, 0.0, np.nan])


def test_a_path_adds_up_steps() -> None:
    norm_RSL = np.array([[[1.0, 3.0]], [[4.0, 4.0]]])
    assert path([0, 10, 15], norm_RSL).tolist() == [[0.0], [20.0], [40.0]]


STEPS = [0, 10, 50, 100]


def holds(
    costs: tuple[float, ...], first: float, again: tuple[float, ...], error: float, part: float
) -> list[bool | None]:
    """Plant what freezing costs in the end, and of attention in the first tenth, of three seeds."""
    spread = np.array([0.0, 0.002, -0.002])
    shape = np.array([0.0, 0.8, 1.5, 1.0])[:, None]
    freezing = {name: shape * (cost + spread) for name, cost in zip(FROZEN, costs, strict=True)}
    freezing["attention frozen"][1] = costs[0] * (first + 10 * spread)
    losses = {name: loss + spread for name, loss in zip(AGAIN, again, strict=True)}
    part_RSL = np.full((4, 3, 2), 0.5)
    part_RSL[2, :, 1] = part
    half = {"attention": 500 + 100 * spread, "mlp": 1000 * first + 100 * spread}
    found = verdicts(STEPS, freezing, losses, np.full(3, error), part_RSL, half)
    return [v.holds for v in found]


def test_verdicts_come_out_either_way() -> None:
    good, bad = (2.4, 2.3, 2.2, 2.2), (2.4, 2.2, 2.2, 2.3)
    assert holds((0.2, 0.3, 0.6), 0.4, good, 1e-7, 0.94) == [True] * 9
    assert holds((0.2, 0.3, 0.4), 0.9, bad, 1e-3, 0.96) == [
        *(False, False, True, True, False, False, False, False, False)
    ]
    assert holds((0.0, -0.1, -0.3), 0.4, bad, 1e-3, 0.01)[:7] == [False] * 7
    assert holds((0.2, 0.3, 0.6), 0.8, good, 1e-7, 0.94)[7] is None, "seeds disagree"


def test_a_cost_is_early_by_its_first_tenth() -> None:
    cost_RS = np.array([[9.0, 9.0], [1.0, 1.0], [2.0, 2.0], [7.0, 7.0], [2.0, 0.0]])
    np.testing.assert_allclose(early([0, 5, 10, 11, 100], cost_RS), [0.75, np.nan])
    np.testing.assert_allclose(early([0, 50, 60, 70, 100], cost_RS), [0.5, np.nan])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.steps=0", "--model.steps must be at least 1, got 0"),
        ("--looked=0", "--looked must be at least 1, got 0"),
        ("--model.N=64", "--model.N=64 heads must divide --model.D=64 into even widths, for RoPE"),
        ("--model.data=no-such-file", "no-such-file"),
        ("--mesh=date=8", "a mesh looks like data=2"),
        ("--out=", "--out must name a folder"),
    ],
)
def test_wrong_arguments_are_one_line(argument, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert learning_together.main([argument, "--model.B=8"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())
