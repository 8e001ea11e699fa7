"""Tests of jax_attn.train.checkpoint, manifest, run and provenance, within one process."""

import dataclasses
import json
import math
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_attn import make_mesh, shard_init, shard_step, specs, train
from jax_attn.train import manifest, provenance, verify
from tests.trained_model import KEY, B, D, batch_fn, init_params, loss_fn, loss_rows

TX = optax.adamw(1e-2)


def start() -> train.TrainState:
    return train.init_state(init_params(KEY), TX)


def fit(folder: pathlib.Path, steps: int, **options: Any) -> tuple[train.TrainState, train.History]:
    run = {name: options.pop(name) for name in tuple(options) if name in RUN}
    batch = options.pop("batch_fn", batch_fn)
    step_fn = jax.jit(train.make_train_step(loss_fn, TX), donate_argnums=0)
    made = train.Run(folder, **{"save_every": 4, **run})
    return train.fit(step_fn, start(), batch, steps=steps, key=KEY, run=made, **options)


RUN = ("save_every", "save_minutes", "keep_last", "best", "config", "allow_config_change", "tell")


def kept(folder: pathlib.Path) -> list[int]:
    return train.Checkpoints(folder / "checkpoints").steps()


def test_a_run_in_pieces_is_the_run_in_one(tmp_path: pathlib.Path) -> None:
    whole, history = fit(tmp_path / "whole", 23)
    parts = tmp_path / "parts"
    for steps in (3, 10, 11, 23):
        state, _ = fit(parts, steps)
    assert train.digest(state) == train.digest(whole)
    rows = loss_rows(parts / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(23))
    assert [row["loss"] for row in rows] == [row["loss"] for row in history.train]
    again, nothing = fit(parts, 23)
    assert train.digest(again) == train.digest(whole)
    assert nothing.train == []


def test_keeps_the_last_the_best_and_the_last_healthy(tmp_path: pathlib.Path) -> None:
    marks = iter([5.0, 1.0, 3.0, 4.0, 2.0, 6.0, 7.0])

    def evaluate(params: Any) -> dict[str, float]:
        return {"mark": next(marks)}

    fit(tmp_path, 24, evaluate=evaluate, eval_every=4, best="eval/mark", keep_last=2)
    assert kept(tmp_path) == [4, 20, 24]  # 4 has mark 1.0
    with pytest.raises(ValueError, match="best is 'eval/x', but evaluate has eval/mark"):
        fit(tmp_path / "b", 4, evaluate=lambda p: {"mark": 1.0}, best="eval/x")
    with pytest.raises(ValueError, match="best is 'eval/x' but evaluate is None"):
        fit(tmp_path / "c", 4, best="eval/x")
    checkpoints = train.Checkpoints(tmp_path / "d", keep_last=1)
    for step in range(5):
        checkpoints.save(step, {"w_D": jnp.ones(3)})
        if step < 2:
            checkpoints.wait()
            checkpoints.confirm(step)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 4]


def nan_batches(first: int, last: int) -> Any:
    return lambda step: np.full((B, D), np.nan, np.float32) if first <= step <= last else (
        batch_fn(step))  # fmt: skip


def test_a_streak_of_nans_goes_back_and_on_with_other_batches(tmp_path: pathlib.Path) -> None:
    told: list[str] = []
    asked: list[int] = []

    def watched(step: int) -> Any:
        asked.append(step)
        return nan_batches(10, 14)(step)

    state, history = fit(
        tmp_path, 20, batch_fn=watched, give_up_after=5, tell=told.append, log_every=1
    )
    # Step 14 is the fifth; its metrics come in after step 15 was dispatched.
    assert asked == [*range(16), *range(16, 28)]
    first, second = (row["event"] for row in history.events)
    assert "step 10: loss is nan, update_norm is nan, so its update was left out" in first
    assert "went back to step 8, which takes batch 16 instead of 8" in second
    assert told == [first, second]
    assert int(state.step) == 20
    assert int(state.guard.jumped) == 8  # type: ignore[union-attr]
    # The same updates as a run that never saw the others.
    step = jax.jit(train.make_train_step(loss_fn, TX))
    by_hand = start()
    for i in [*range(8), *range(16, 28)]:
        jumped = jnp.int32(0 if i < 8 else 8)
        by_hand = by_hand._replace(guard=by_hand.guard._replace(jumped=jumped))  # type: ignore[union-attr]
        by_hand, _ = step(by_hand, batch_fn(i), KEY)
    assert train.digest(state.params) == train.digest(by_hand.params)
    assert train.digest(fit(tmp_path, 20)[0]) == train.digest(state)


def test_a_second_streak_stops_with_a_code_of_its_own(tmp_path: pathlib.Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path, 40, batch_fn=nan_batches(10, 99), give_up_after=5)
    assert stopped.value.code == train.DIVERGED == 76
    assert isinstance(stopped.value, FloatingPointError)
    assert "step 12: loss is nan" in str(stopped.value)
    checkpoints = train.Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps() == [4, 8, 12]
    marked = [step for step in (4, 8, 12) if (checkpoints.at(step) / manifest.HEALTHY).exists()]
    assert marked == [4, 8]


def test_a_few_left_out_change_nothing_and_are_counted(tmp_path: pathlib.Path) -> None:
    state, history = fit(tmp_path, 20, batch_fn=nan_batches(10, 12), give_up_after=5)
    assert int(state.guard.skipped) == 3  # type: ignore[union-attr]
    assert [row["skipped"] for row in history.train][-1] == 3
    folder = train.Checkpoints(tmp_path / "checkpoints").at(12)
    assert (folder / manifest.HEALTHY).exists()  # updates went on from it


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 2, "model": 4}, {"data": 1}])
def test_another_mesh_reads_the_same_values(sizes: dict[str, int], tmp_path: pathlib.Path) -> None:
    def init(key: jax.Array) -> train.TrainState:
        params = {"w_DF": jax.random.normal(key, (6, 8)), "scale_D": jnp.ones(6)}
        return train.init_state(params, TX)

    there = make_mesh(fsdp=2, data=2, devices=jax.devices()[:4])
    state = shard_init(init, KEY, there)
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(1, state)
    devices = jax.devices()[: math.prod(sizes.values())]
    here = make_mesh(**sizes, devices=devices)
    like = jax.eval_shape(init, KEY)
    like = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        like, specs(like, here),
    )  # fmt: skip
    found = checkpoints.restore(like)
    assert found is not None
    assert train.digest(found[1]) == train.digest(state)
    assert found[1].params["w_DF"].sharding == like.params["w_DF"].sharding
    step_fn = shard_step(train.make_train_step(lambda p, b, k: (norm_of(p), {}), TX), here)
    step_fn(found[1], {"x_B": jnp.ones(8)}, KEY)
    assert step_fn._cache_size() == 1


def norm_of(params: Any) -> jax.Array:
    return optax.tree.norm(params)


def test_another_architecture_lists_the_leaves_that_differ(tmp_path: pathlib.Path) -> None:
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(1, {"a_D": jnp.ones(3), "b_D": jnp.ones(5), "c_D": jnp.ones(7)})
    with pytest.raises(ValueError, match="holds another architecture") as error:
        checkpoints.restore(
            {"a_D": jnp.ones(3), "b_D": jnp.ones(5, jnp.bfloat16), "d_D": jnp.ones(2)}
        )
    for line in (
        r"['b_D']: saved float32[5], here bfloat16[5]",
        r"['c_D']: saved float32[7], here not at all",
        r"['d_D']: saved not at all, here float32[2]",
    ):
        assert line in str(error.value)
    assert "a_D" not in str(error.value)


def test_random_keys_and_every_dtype_come_back_to_the_bit(tmp_path: pathlib.Path) -> None:
    tree = {
        "key": jax.random.key(3),
        "half": jnp.arange(7, dtype=jnp.bfloat16) / 3,
        "int": jnp.int8([1, -2]),
        "bool": jnp.array([True, False]),
        "small": jnp.float32(-0.0),
        "nan": jnp.array([jnp.nan, jnp.inf]),
        "nested": [(jnp.zeros((1, 3)),), {"x": jnp.ones((2, 3, 5))}],
    }
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(7, tree)
    found = checkpoints.restore(tree)
    assert found is not None
    assert found[0] == 7
    assert train.digest(found[1]) == train.digest(tree)
    assert jax.random.normal(found[1]["key"]) == jax.random.normal(tree["key"])


def test_a_save_that_fails_is_told_and_leaves_the_others(tmp_path: pathlib.Path) -> None:
    told: list[str] = []
    checkpoints = train.Checkpoints(tmp_path / "c", tell=told.append)
    checkpoints.save(1, {"w": jnp.ones(3)})
    checkpoints.wait()
    (tmp_path / "c").rename(tmp_path / "away")
    (tmp_path / "c").write_text("in the way")
    checkpoints.save(2, {"w": jnp.ones(3)})
    checkpoints.wait()
    assert "checkpoint 2 was NOT saved, training goes on" in told[0]
    (tmp_path / "c").unlink()
    (tmp_path / "away").rename(tmp_path / "c")
    checkpoints.save(3, {"w": jnp.ones(3)})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]


def test_incomplete_and_damaged_steps_are_not_taken(tmp_path: pathlib.Path, capsys: Any) -> None:
    told: list[str] = []
    checkpoints = train.Checkpoints(tmp_path / "checkpoints", tell=told.append)
    for step in (1, 2, 3):
        checkpoints.save(step, {"w": jnp.full(3, step)})
    checkpoints.wait()
    manifest.beside(checkpoints.at(4), "saving").mkdir()  # killed while it saved
    pathlib.Path(checkpoints.at(3), manifest.COMMIT).unlink()
    text = pathlib.Path(checkpoints.at(2), manifest.MANIFEST)
    text.write_text(text.read_text().replace('"step": 2', '"step": 4'))
    with pytest.raises(SystemExit, match="1"):
        monkey_main(verify.main, [str(tmp_path)])
    assert re.search(r"step 2  DAMAGED.*\nstep 3  DAMAGED: cannot be read", capsys.readouterr().out)
    found = checkpoints.restore({"w": jnp.zeros(3, jnp.int32)})
    assert found is not None
    assert (found[0], found[1]["w"].tolist()) == (1, [1, 1, 1])
    assert "checkpoint 3 is damaged (cannot be read: " in told[0]
    assert "checkpoint 2 is damaged (manifest.json has changed since it was written)" in told[1]
    checkpoints.clear_incomplete()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "00000001", "00000002.damaged", "00000003.damaged",
    ]  # fmt: skip


def monkey_main(main: Any, argv: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["", *argv])
        main()


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class Config:
    D: int = 5
    inner: Inner = Inner()
    shape: tuple[int, ...] = (1, 2)


def test_another_config_needs_leave(tmp_path: pathlib.Path) -> None:
    fit(tmp_path, 4, config=Config())
    fit(tmp_path, 5, config=Config())
    told: list[str] = []
    other = Config(inner=Inner(0.2))
    with pytest.raises(ValueError, match=r"inner.rate: 0.2, was 0.1\ngo on with the new one"):
        fit(tmp_path, 6, config=other, tell=told.append)
    fit(tmp_path, 6, config=other, allow_config_change=True, tell=told.append)
    assert told == [f"{tmp_path}: changed since step 5: inner.rate: 0.2, was 0.1"]
    said = json.loads((tmp_path / "run.json").read_text())
    assert said["config"] == {"D": 5, "inner": {"rate": 0.2}, "shape": [1, 2]}
    assert said["versions"]["jax"] == jax.__version__
    assert said["devices"]["count"] == jax.device_count()
    assert (
        manifest.read(train.Checkpoints(tmp_path / "checkpoints").at(6))["config"] == said["config"]
    )
    with pytest.raises(ValueError, match=r"config: x=.* does not fit into JSON"):
        train.Run(tmp_path, config={"x": object()})


def test_differences_and_agreement() -> None:
    found = provenance.differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5})
    assert found == ["a.c: 2, was 4", "d: 3, was not there", "e: not here, was 5"]
    assert provenance.differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) == []


def test_two_trainings_do_not_share_a_folder(tmp_path: pathlib.Path) -> None:
    with train.Run(tmp_path).opened(), pytest.raises(RuntimeError, match="another process is"):
        fit(tmp_path, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_every": -1}, "save_every must be an int >= 0, got -1"),
        ({"save_every": 2.5}, "save_every must be an int >= 0, got 2.5"),
        ({"save_minutes": math.nan}, "save_minutes must be at least 0, got nan"),
        ({"keep_last": 0}, "keep_last must be an int >= 1, got 0"),
        ({"config": 3}, "config must be a dataclass or a mapping, got int"),
    ],
)
def test_a_run_rejects(options: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=message):
        train.Run(tmp_path, **options)
    with pytest.raises(ValueError, match="folder must name a folder"):
        train.Run("")
    for made in (train.Run, train.Checkpoints):
        with pytest.raises(ValueError, match=r"must be on a disk, got 'gs://b/run'; mount the"):
            made("gs://b/run")


def test_saves_by_the_clock(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("jax_attn.train.run.time.monotonic", lambda: now[0])

    def slow(step: int) -> Any:
        now[0] += 25.0
        return batch_fn(step)

    fit(tmp_path, 10, batch_fn=slow, save_every=0, save_minutes=1.0, keep_last=9)
    assert kept(tmp_path) == [3, 6, 9, 10]


def test_the_readme_example_runs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (pathlib.Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Train for a week\n")[2].partition("\n## ")[0]
    code = section.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    there: dict[str, Any] = {}
    exec(code, there)
    assert there["history"].eval[-1]["eval/loss"] < 0.9 * there["history"].eval[0]["eval/loss"]
    assert kept(tmp_path / "runs" / "readme") == [100, 150, 200]
    assert jax.tree.structure(there["mean_params"]) == jax.tree.structure(there["state"].params)
