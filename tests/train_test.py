"""Tests of jax_attn.train: what one step measures, and what the loop around it does."""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_attn import train

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


# Loss.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_next_token_loss_matches_float64(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    logits_BTV = jnp.asarray(30 * rng.standard_normal((2, 3, 13)), dtype)
    targets_BT = rng.integers(0, 13, (2, 3))
    exact_BTV = np.asarray(logits_BTV, np.float64)
    exact_BTV -= exact_BTV.max(-1, keepdims=True)
    log_p_BTV = exact_BTV - np.log(np.exp(exact_BTV).sum(-1, keepdims=True))
    expected = -np.mean(np.take_along_axis(log_p_BTV, targets_BT[..., None], -1))
    loss = train.next_token_loss(logits_BTV, jnp.asarray(targets_BT))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_next_token_loss_rejects() -> None:
    with pytest.raises(ValueError, match="targets_BT has T=5 but logits_BTV has T=3"):
        train.next_token_loss(jnp.zeros((2, 3, 13)), jnp.zeros((2, 5), jnp.int32))
    with pytest.raises(ValueError, match="targets_BT must be integers, got dtype float32"):
        train.next_token_loss(jnp.zeros((2, 3, 13)), jnp.zeros((2, 3)))


def test_bits_per_byte() -> None:
    np.testing.assert_allclose(train.bits_per_byte(np.log([2.0, 8.0, 256.0])), [1, 3, 8])


# One step.


def test_norms_equal_float64_norms_of_gradients_updates_and_parameters() -> None:
    tx = optax.adam(1e-2)
    state = train.init_state(init_params(KEY), tx)
    step = jax.jit(train.make_train_step(loss_fn, tx, parts=PARTS))
    for index in range(3):
        x_BD = batch_fn(index)
        grads = jax.grad(loss_fn, has_aux=True)(state.params, x_BD, KEY)[0]
        new, metrics = step(state, x_BD, KEY)
        # float64 of float32 parameters: the difference itself is exact.
        change = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), new.params, state.params)
        trees = {"grad_norm": grads, "update_norm": change, "param_norm": state.params}
        for name, tree in trees.items():
            # Rounding a parameter after the update moves the difference by up to eps * |param|.
            atol = 1e-6 if name == "update_norm" else 0
            expected = norm(*jax.tree.leaves(tree))
            np.testing.assert_allclose(metrics[name], expected, rtol=1e-5, atol=atol)
            for part in PARTS:
                expected = norm(*leaves(tree, part))
                assert expected > 0
                np.testing.assert_allclose(
                    metrics[f"{name}/{part}"], expected, rtol=1e-5, atol=atol
                )
        assert int(new.step) == index + 1
        state = new


def test_metrics_are_scalar_float32_and_include_what_the_loss_measured() -> None:
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), init_params(KEY))
    tx = optax.sgd(0.1)
    step = jax.jit(train.make_train_step(loss_fn, tx, parts=["mlp"]))
    state, metrics = step(train.init_state(params, tx), batch_fn(0).astype(jnp.bfloat16), KEY)
    norms = {f"{name}_norm{part}" for name in ("grad", "update", "param") for part in ("", "/mlp")}
    assert set(metrics) == {"loss", "hidden"} | norms
    assert {(value.dtype, value.shape) for value in metrics.values()} == {
        (np.dtype(np.float32), ())
    }
    expected = norm(*jax.tree.leaves(params))
    np.testing.assert_allclose(metrics["param_norm"], expected, rtol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}


def test_part_without_gradient_reports_exactly_zero() -> None:
    tx = optax.adam(1e-2)
    state = train.init_state(init_params(KEY), tx)
    step = jax.jit(train.make_train_step(frozen_attention, tx, parts=PARTS))
    new, metrics = step(state, batch_fn(0), KEY)
    assert metrics["grad_norm/attention"] == 0
    assert metrics["update_norm/attention"] == 0
    assert metrics["grad_norm/mlp"] == metrics["grad_norm"] > 0
    assert metrics["update_norm/mlp"] > 0
    before, after = leaves(state.params, "attention"), leaves(new.params, "attention")
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_part_may_be_a_leaf_a_position_or_an_attribute() -> None:
    class Params(NamedTuple):
        query: list[jax.Array]
        value: dict[str, jax.Array]

    def loss(params: Params, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        return optax.tree.norm(params) ** 2 / 2, {}

    params = Params([jnp.full(3, 2.0), jnp.full(5, 3.0)], {"w": jnp.full(7, 5.0)})
    tx = optax.sgd(1.0)
    step = train.make_train_step(loss, tx, parts=("query", "1", "w"))
    metrics = step(train.init_state(params, tx), None, KEY)[1]
    got = [float(metrics[f"grad_norm/{part}"]) ** 2 for part in ("query", "1", "w")]
    np.testing.assert_allclose(got, [12 + 45, 45, 175], rtol=1e-6)


def test_unknown_part_lists_the_keys_that_exist() -> None:
    tx = optax.sgd(0.1)
    step = train.make_train_step(loss_fn, tx, parts=("attention", "mpl"))
    message = r"no parameter has the key 'mpl'; the keys are 0, 1, attention, bias_D, layers, mlp,"
    with pytest.raises(ValueError, match=message):
        step(train.init_state(init_params(KEY), tx), batch_fn(0), KEY)
    with pytest.raises(ValueError, match="parts must be a sequence of keys, got the string 'mlp'"):
        train.make_train_step(loss_fn, tx, parts="mlp")


def test_metric_may_not_hide_one_made_by_the_step() -> None:
    step = train.make_train_step(lambda p, x, k: (loss_fn(p, x, k)[0], {"loss": 0}), optax.sgd(0.1))
    with pytest.raises(ValueError, match="may not be named loss: taken"):
        step(train.init_state(init_params(KEY), optax.sgd(0.1)), batch_fn(0), KEY)


def test_every_step_gets_its_own_key() -> None:
    def noisy(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        return params["w"].sum(), {"noise": jax.random.normal(key)}

    tx = optax.sgd(0.1)
    step_fn = jax.jit(train.make_train_step(noisy, tx))
    state = train.init_state({"w": jnp.ones(3)}, tx)
    history = train.fit(step_fn, state, lambda step: None, steps=5, key=KEY)[1]
    expected = [jax.random.normal(jax.random.fold_in(KEY, step)) for step in range(5)]
    assert [row["noise"] for row in history.train] == [float(value) for value in expected]
    assert len(set(map(float, expected))) == 5


def test_step_needs_no_implicit_rank_promotion() -> None:
    tx = optax.adamw(1e-2)
    state = train.init_state(init_params(KEY), tx)
    with jax.numpy_rank_promotion("raise"):
        train.make_train_step(loss_fn, tx, parts=PARTS)(state, batch_fn(0), KEY)
        train.next_token_loss(jnp.zeros((2, 3, 13)), jnp.zeros((2, 3), jnp.int32))


# The loop.


def make_run(**options: Any) -> tuple[train.StepFn, train.TrainState]:
    tx = optax.adam(1e-2)
    step_fn = jax.jit(train.make_train_step(loss_fn, tx, parts=PARTS), **options)
    return step_fn, train.init_state(init_params(KEY), tx)


def test_fit_lowers_the_loss_and_compiles_once() -> None:
    traces = 0

    def counted(params: Any, batch: Any, key: jax.Array) -> Any:
        nonlocal traces
        traces += 1
        return loss_fn(params, batch, key)

    tx = optax.adam(3e-2)
    step_fn = jax.jit(train.make_train_step(counted, tx), donate_argnums=0)
    state = train.init_state(init_params(KEY), tx)
    state, history = train.fit(step_fn, state, batch_fn, steps=101, key=KEY)
    losses = [row["loss"] for row in history.train]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
    assert [row["step"] for row in history.train] == list(range(101))
    assert int(state.step) == 101
    assert traces == 1


def fake_state(step: int) -> train.TrainState:
    return train.TrainState(np.int32(step), None, None)  # type: ignore[arg-type]


class FakeMetric:  # tells when it is fetched
    def __init__(self, value: float, on_fetch: Callable[[], object]) -> None:
        self.value, self.on_fetch = value, on_fetch

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self.on_fetch()
        return np.asarray(self.value)


def fake_step_fn(events: list[str], losses: dict[int, float] | None = None) -> Any:
    def step_fn(state: Any, batch: Any, key: Any) -> Any:
        events.append(f"dispatch {state.step}")
        fetched = f"fetch {state.step}"
        loss = FakeMetric((losses or {}).get(int(state.step), 0.5), lambda: events.append(fetched))
        return state._replace(step=state.step + 1), {"loss": loss}

    return step_fn


def test_metrics_are_fetched_after_the_next_step_is_dispatched() -> None:
    events: list[str] = []
    train.fit(fake_step_fn(events), fake_state(0), lambda step: None, steps=3, key=KEY)
    once = list(dict.fromkeys(events))
    assert once == ["dispatch 0", "dispatch 1", "fetch 0", "dispatch 2", "fetch 1", "fetch 2"]


def test_run_in_two_pieces_equals_the_loop_written_by_hand(tmp_path: pathlib.Path) -> None:
    step_fn, state = make_run()
    whole, losses = state, []
    for step in range(7):
        whole, metrics = step_fn(whole, batch_fn(step), KEY)
        losses.append(float(metrics["loss"]))
    path = tmp_path / "new" / "metrics.jsonl"
    asked: list[int] = []

    def recorded(step: int) -> np.ndarray:
        asked.append(step)
        return batch_fn(step)

    half, _ = train.fit(step_fn, state, recorded, steps=3, key=KEY, metrics_path=path)
    rest, tail = train.fit(step_fn, half, recorded, steps=7, key=KEY, metrics_path=path)
    assert asked == list(range(7))
    jax.tree.map(np.testing.assert_array_equal, rest, whole)
    assert [row["step"] for row in tail.train] == [3, 4, 5, 6]
    assert [row["loss"] for row in jsonl_rows(path)] == losses
    same, nothing = train.fit(step_fn, rest, recorded, steps=7, key=KEY, metrics_path=path)
    assert same is rest
    assert nothing == train.History([], [])
    assert len(jsonl_rows(path)) == 7


def test_log_every_and_evaluations(tmp_path: pathlib.Path) -> None:
    step_fn, state = make_run(donate_argnums=0)
    x_BD = batch_fn(1_000_003)

    def evaluate(params: Any) -> dict[str, Any]:
        return {"loss": loss_fn(params, jnp.asarray(x_BD), KEY)[0], "two": 2}

    first_loss = float(evaluate(state.params)["loss"])
    state, history = train.fit(
        step_fn, state, batch_fn, steps=11, key=KEY, log_every=3, evaluate=evaluate, eval_every=4,
        metrics_path=tmp_path / "m.jsonl",
    )  # fmt: skip
    assert [row["step"] for row in history.train] == [0, 3, 6, 9, 10]
    assert [row["step"] for row in history.eval] == [0, 4, 8, 11]
    assert history.eval[0]["eval/loss"] == first_loss
    assert history.eval[-1]["eval/loss"] == float(evaluate(state.params)["loss"])
    rows = jsonl_rows(tmp_path / "m.jsonl")
    assert [row["step"] for row in rows] == [0, 0, 3, 4, 6, 8, 9, 10, 11]
    assert [row for row in rows if "loss" in row] == history.train
    assert [row for row in rows if "eval/loss" in row] == history.eval
    assert [row["time_s"] for row in rows] == sorted(row["time_s"] for row in rows)
    # A resumed run does not evaluate again where the run before it ended.
    for steps, eval_every, expected in ((13, 12, [12, 13]), (16, 0, [16])):
        options = {"steps": steps, "evaluate": evaluate, "eval_every": eval_every}
        state, history = train.fit(step_fn, state, batch_fn, key=KEY, **options)
        assert [row["step"] for row in history.eval] == expected


def test_seeds_under_vmap_record_lists(tmp_path: pathlib.Path, capsys: Any) -> None:
    tx = optax.adam(1e-2)
    step = train.make_train_step(loss_fn, tx, parts=PARTS)
    init_keys, keys = jax.random.split(KEY, (2, 3))
    states = jax.vmap(lambda key: train.init_state(init_params(key), tx))(init_keys)
    step_fn = jax.jit(jax.vmap(step, in_axes=(0, None, 0)))
    path = tmp_path / "m.jsonl"
    states, history = train.fit(step_fn, states, batch_fn, steps=2, key=keys, metrics_path=path)
    rows = jsonl_rows(path)
    assert [row["loss"] for row in rows] == [row["loss"].tolist() for row in history.train]
    for seed in range(3):
        state = train.init_state(init_params(init_keys[seed]), tx)
        alone = train.fit(jax.jit(step), state, batch_fn, steps=2, key=keys[seed])[1]
        for row, expected in zip(rows, alone.train, strict=True):
            for name in set(expected) - {"step", "time_s"}:
                np.testing.assert_allclose(row[name][seed], expected[name], rtol=1e-4)
    assert f"step 2/2  loss {np.mean(rows[1]['loss']):.4f}" in capsys.readouterr().err
    uneven = states._replace(step=jnp.array([2, 2, 3]))
    with pytest.raises(ValueError, match=r"same for every seed, got \[2, 3\]"):
        train.fit(step_fn, uneven, batch_fn, steps=5, key=keys)


def test_interrupt_leaves_the_file_complete_and_is_raised(tmp_path: pathlib.Path) -> None:
    step_fn, state = make_run()
    path = tmp_path / "m.jsonl"

    def interrupted(step: int) -> np.ndarray:
        if step == 3:
            raise KeyboardInterrupt
        return batch_fn(step)

    with pytest.raises(KeyboardInterrupt):
        train.fit(step_fn, state, interrupted, steps=7, key=KEY, metrics_path=path)
    assert [row["step"] for row in jsonl_rows(path)] == [0, 1, 2]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_loss_that_is_not_finite_stops_training(tmp_path: pathlib.Path, value: float) -> None:
    events: list[str] = []
    step_fn = fake_step_fn(events, {2: value})
    path = tmp_path / "m.jsonl"
    with pytest.raises(FloatingPointError, match=f"^step 2: loss is {value}$"):
        train.fit(
            step_fn,
            fake_state(0),
            lambda step: None,
            steps=7,
            key=KEY,
            metrics_path=path,
            log_every=5,
        )
    assert [(row["step"], row["loss"]) for row in jsonl_rows(path)] == [(0, 0.5), (2, str(value))]
    # One step further was on its way when the metrics came in, and no more.
    assert "dispatch 3" in events
    assert "dispatch 4" not in events


def test_update_that_is_not_finite_stops_training_though_the_loss_is_finite() -> None:
    def root(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        return jnp.sqrt(params["w"]).sum(), {}

    state = train.init_state({"w": jnp.zeros(3)}, optax.sgd(0.1))
    step_fn = jax.jit(train.make_train_step(root, optax.sgd(0.1)))
    with pytest.raises(FloatingPointError, match=r"^step 0: update_norm is inf$"):
        train.fit(step_fn, state, lambda step: None, steps=2, key=KEY)
    # An optimizer that refuses such an update keeps the run alive.
    tx = optax.apply_if_finite(optax.sgd(0.1), max_consecutive_errors=5)
    step_fn = jax.jit(train.make_train_step(root, tx))
    state = train.init_state({"w": jnp.zeros(3)}, tx)
    history = train.fit(step_fn, state, lambda step: None, steps=2, key=KEY)[1]
    assert [row["update_norm"] for row in history.train] == [0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"eval_every": -2}, "eval_every must be at least 0, got -2"),
        ({"tokens_per_step": -1}, "tokens_per_step must be at least 0, got -1"),
        ({"eval_every": 2}, "eval_every is 2 but evaluate is None"),
        ({"step_fn": lambda s, b, k: (s, {"accuracy": 1})}, "have no 'loss', only accuracy"),
        ({"step_fn": lambda s, b, k: (s, {"loss": 1, "step": 1})}, "may not be named step: taken"),
    ],
)
def test_fit_rejects(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"step_fn": fake_step_fn([]), "state": fake_state(0), "steps": 3}
    arguments |= {"batch_fn": lambda step: None, "key": KEY} | change
    with pytest.raises(ValueError, match=message):
        train.fit(**arguments)
