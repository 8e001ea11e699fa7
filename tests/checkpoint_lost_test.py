"""What is lost and who hears of it: saves that fail, leftovers of killed ones, refused starts."""

import errno
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from experiments import character_lm
from jax_attn import train
from jax_attn.train import checkpoint, manifest
from tests import faults
from tests.checkpoint_test import TX, kept, start
from tests.trained_model import KEY, batch_fn, loss_fn

TREE = {"w_D": jnp.ones(3)}
STEP = jax.jit(train.make_train_step(loss_fn, TX))


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fit(folder: pathlib.Path, steps: int, batches: Any = batch_fn, **options: Any) -> None:
    train.fit(STEP, start(), batches, steps=steps, key=KEY, run=train.Run(folder, **options))


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def checkpoints(tmp_path: pathlib.Path, told: list[str]) -> train.Checkpoints:
    made = train.Checkpoints(tmp_path / "checkpoints", tell=told.append)
    made.save(3, TREE)
    made.wait()
    return made


def test_what_killed_saves_and_removals_left_blocks_no_step(
    checkpoints: train.Checkpoints, told: list[str]
) -> None:
    for what in ("saving", "removing"):
        manifest.beside(checkpoints.at(5), what).mkdir()
        manifest.beside(checkpoints.at(7), what).mkdir()
    checkpoints.save(5, TREE)
    checkpoints.wait()
    checkpoints.forget_above(3)
    checkpoints.clear_incomplete()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["00000003"]
    assert told == []


def test_a_step_that_lost_its_marker_is_saved_anew(
    checkpoints: train.Checkpoints, told: list[str]
) -> None:
    (checkpoints.at(3) / manifest.COMMIT).unlink()
    checkpoints.save(3, TREE)
    checkpoints.wait()
    assert manifest.damage(checkpoints.at(3)) == []
    assert "checkpoint 3 is damaged; now " in told[0]
    assert manifest.beside(checkpoints.at(3), "damaged").exists()


def test_a_save_that_fails_at_its_end_is_no_step(
    checkpoints: train.Checkpoints, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        checkpoints.save(5, TREE)
        checkpoints.wait()
    assert "checkpoint 5 was NOT saved, training goes on; the last one is 3: OSError" in told[0]
    assert (checkpoints.steps(), checkpoints.failed) == ([3], 5)
    with monkeypatch.context() as broken:  # the name is given, and then something fails
        broken.setattr(manifest, "_settle", lambda f: full() if f == checkpoints.folder else None)
        checkpoints.save(7, TREE)
        checkpoints.wait()
    assert "checkpoint 7 was NOT saved, training goes on; the last one is 3: OSError" in told[1]


def test_a_small_file_is_replaced_or_left(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    manifest.put(path, "before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        manifest.put(path, "after")
    assert path.read_text() == "before"


def test_a_folder_that_cannot_be_read_is_not_called_empty(
    checkpoints: train.Checkpoints, told: list[str]
) -> None:
    checkpoints.folder.rename(checkpoints.folder.with_name("away"))
    checkpoints.folder.write_text("in the way")
    checkpoints.save(5, TREE)
    assert f"training goes on; {checkpoints.folder} cannot be read" in told[0]


def test_one_of_several_processes_that_fails_alone_ends(
    checkpoints: train.Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(checkpoints, "_shared", lambda number: number)
    monkeypatch.setattr(checkpoints, "_checkpointer", full)
    with pytest.raises(RuntimeError, match="process 0 could not save checkpoint 5, and others may"):
        checkpoints.save(5, TREE)
    monkeypatch.setattr(checkpoints, "_shared", lambda number: checkpoint._FAILED)
    checkpoints.save(6, TREE)  # process 0 told all: they skip it together
    assert (checkpoints.failed, checkpoints.busy()) == (6, False)


def test_a_last_state_that_is_not_saved_is_not_a_success(
    tmp_path: pathlib.Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def fails_at_first(folder: pathlib.Path, said: Any, write: Any = manifest.write) -> None:
        tries.append(folder.name)
        if len(tries) == 1:
            full()
        write(folder, said)

    monkeypatch.setattr(manifest, "write", fails_at_first)
    fit(tmp_path / "a", 2, tell=told.append)
    assert kept(tmp_path / "a") == [2]
    monkeypatch.setattr(manifest, "write", full)
    with pytest.raises(train.NotSaved) as ended:
        fit(tmp_path / "b", 2, tell=told.append)
    assert ended.value.code == train.UNSAVED == 74
    assert told[-1] == "step 2 could not be saved at the second try either: it is lost"
    assert "seconds/save" in (tmp_path / "b" / "metrics.jsonl").read_text()

    def stop(step: int) -> Any:
        if step == 2:
            os.kill(os.getpid(), faults.TERM)
        return batch_fn(step)

    with pytest.raises(train.NotSaved):  # not Stopped: nothing was saved to go on from
        fit(tmp_path / "c", 20, stop, tell=told.append)


def test_a_refused_start_changes_nothing(tmp_path: pathlib.Path) -> None:
    fit(tmp_path, 2, config={"rate": 1})
    before = (tmp_path / "run.json").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")  # as if it had ended before its first save
    with pytest.raises(ValueError, match=r"was made with another config:\n  rate: 2, was 1"):
        fit(tmp_path, 2, config={"rate": 2})
    manifest.beside(train.Checkpoints(tmp_path / "checkpoints").at(2), "damaged").mkdir(
        parents=True
    )
    with pytest.raises(ValueError, match="every checkpoint in"):
        fit(tmp_path, 2, config={"rate": 2}, allow_config_change=True)
    assert (tmp_path / "run.json").read_bytes() == before
    shutil.rmtree(tmp_path / "checkpoints")
    said: list[str] = []
    fit(tmp_path, 2, config={"rate": 2}, allow_config_change=True, tell=said.append)
    assert said == [f"{tmp_path}: changed since its start: rate: 2, was 1"]
    assert json.loads((tmp_path / "run.json").read_text())["config"] == {"rate": 2}


def test_a_folder_that_cannot_be_used_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    run = train.Run(tmp_path / "file")
    with (
        pytest.raises(ValueError, match=r"folder .*/file cannot be used: .*File exists"),
        run.opened(),
    ):
        pass


def test_processes_agree_on_what_makes_them_meet(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("jax_attn.train.run.agree", seen.append)
    fit(tmp_path, 2, save_every=3)
    when = {"save_every": 3, "save_minutes": 10.0, "best": None}
    asked = {"steps": 2, "eval_every": 0, "give_up_after": 10}
    assert seen[0].items() >= (when | asked).items()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--warmup=-5", "--warmup must be at least 0, got -5"),
        ("--clip=-1", "--clip must be above 0 and finite, got -1.0"),
        ("--learning_rate=inf", "--learning_rate must be above 0 and finite, got inf"),
        ("--weight_decay=-1", "--weight_decay must be at least 0 and finite, got -1.0"),
        ("--eval_every=-1", "--eval_every must be at least 0, got -1"),
    ],
)
def test_the_script_refuses_in_one_line(argument: str, message: str, capsys: Any) -> None:
    assert character_lm.main([argument, "--preset=quick"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1


def test_the_script_takes_no_evaluation_but_the_last() -> None:
    character_lm.check(character_lm.Config(eval_every=0), character_lm.Options())
