"""Edges of runs: poisoned, damaged and foreign steps, errors of the caller, the best step."""

import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_attn import train
from jax_attn.train import manifest
from tests.checkpoint_test import TX, fit, kept, norm_of, start
from tests.trained_model import KEY, batch_fn, init_params, loss_fn


def test_a_poisoned_step_is_not_healthy_and_good_ones_stay(tmp_path: pathlib.Path) -> None:
    """An update that is finite but huge: what is saved right after it gives no finite loss."""

    def loss(params: Any, scale: Any, key: jax.Array) -> Any:
        return jnp.abs(params["w"] * scale).sum() + 0 * (params["w"] ** 4).sum(), {}

    tx = optax.sgd(0.05)
    step_fn = jax.jit(train.make_train_step(loss, tx))
    options = {"key": KEY, "give_up_after": 10}
    _, history = train.fit(
        step_fn,
        train.init_state({"w": jnp.ones(3)}, tx),
        lambda step: np.float32(1e15 if step == 11 else 1e-3),
        steps=60,
        run=train.Run(tmp_path, save_every=4, keep_last=3),
        **options,
    )
    assert "went back to step 8, which takes batch" in history.events[1]["event"]
    assert np.isfinite(history.train[-1]["loss"])


def test_what_others_left_in_the_folder_stays(tmp_path: pathlib.Path) -> None:
    foreign = tmp_path / "checkpoints" / "777"
    foreign.mkdir(parents=True)
    (foreign / "mine.txt").write_text("mine")
    fit(tmp_path, 4)
    shutil.copytree(tmp_path / "checkpoints" / "00000004", tmp_path / "checkpoints" / "70")
    fit(tmp_path, 9)
    assert (foreign / "mine.txt").exists()
    assert (tmp_path / "checkpoints" / "70" / "COMMIT").exists()
    assert kept(tmp_path) == [4, 8, 9]


@pytest.mark.few(2)
@pytest.mark.parametrize("how", ["cut", "empty", "gone", "bits", "renamed"])
def test_a_damaged_manifest_is_a_damaged_step(how: str, tmp_path: pathlib.Path) -> None:
    whole, _ = fit(tmp_path / "whole", 12)
    told: list[str] = []
    fit(tmp_path / "run", 8)
    newest = tmp_path / "run" / "checkpoints" / "00000008"
    path = newest / manifest.MANIFEST
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "renamed":
        older = newest.with_name("00000004")
        older.rename(newest.with_name("other"))
        newest.rename(older)
        newest.with_name("other").rename(newest)
        with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
            fit(tmp_path / "run", 12)
        with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
            fit(tmp_path / "run", 12)  # said again, not forgotten
        return
    else:
        path.write_bytes({"cut": content[:50], "empty": b"", "bits": b"\xff" + content[1:]}[how])
    state, _ = fit(tmp_path / "run", 12, tell=told.append)
    assert train.digest(state) == train.digest(whole)
    assert "checkpoint 8 is damaged" in told[0]


def test_an_error_of_the_caller_saves_first(tmp_path: pathlib.Path) -> None:
    def broken(step: int) -> Any:
        if step == 7:
            raise OSError("no such file")
        return batch_fn(step)

    with pytest.raises(OSError, match="no such file"):
        fit(tmp_path, 9, batch_fn=broken)
    assert kept(tmp_path) == [4, 7]
    assert train.digest(fit(tmp_path, 9)[0]) == train.digest(fit(tmp_path / "whole", 9)[0])


def test_the_best_is_saved_when_it_is_measured_and_the_mean_is_measured_too(
    tmp_path: pathlib.Path,
) -> None:
    marks = iter([9.0, 9.0, 5.0, 5.0, 7.0, 7.0, 8.0, 8.0])
    tx = optax.chain(optax.sgd(0.1), train.average_params(0.5))
    _, history = train.fit(
        jax.jit(train.make_train_step(loss_fn, tx)),
        train.init_state(init_params(KEY), tx),
        batch_fn,
        steps=9,
        key=KEY,
        evaluate=lambda params: {"mark": next(marks), "norm": norm_of(params)},
        eval_every=3,
        run=train.Run(tmp_path, save_every=100, keep_last=1, best="eval/mark"),
    )
    assert kept(tmp_path) == [3, 9]
    last = history.eval[-1]
    assert last["eval/norm"] != last["eval/average/norm"]


def test_what_cannot_be_saved_or_watched_is_said_before_the_first_step(
    tmp_path: pathlib.Path,
) -> None:
    empty = train.init_state({"w": jnp.zeros((0, 3))}, TX)
    step_fn = jax.jit(train.make_train_step(loss_fn, TX))
    with pytest.raises(ValueError, match=r"state.params\['w'\] has shape \(0, 3\): an array of no"):
        train.fit(step_fn, empty, batch_fn, steps=3, key=KEY, run=train.Run(tmp_path))
    with pytest.raises(ValueError, match="strict: step_fn does not tell how often it compiled"):
        train.fit(lambda *x: step_fn(*x), start(), batch_fn, steps=3, key=KEY, strict=True)
    with pytest.raises(ValueError, match="evaluate must return a mapping of names to numbers"):
        train.fit(step_fn, start(), batch_fn, steps=3, key=KEY, evaluate=lambda p: 3.0)  # type: ignore[arg-type,return-value]
