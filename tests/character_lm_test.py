"""Tests of experiments.character_lm: a whole training script, stopped and started again."""

import json
import os
import pathlib
import signal
from typing import Any

import pytest

from experiments import bench_train, character_lm

TINY = ["--D=16", "--N=2", "--L=1", "--T=8", "--B=16", "--eval_every=2", "--eval_windows=16"]
TINY += ["--steps=4", "--warmup=1"]


def run(out: pathlib.Path, *arguments: str) -> int:
    """Run the script with TINY, but for what `arguments` gives anew."""
    given = {argument.split("=")[0]: argument for argument in [*TINY, f"--out={out}", *arguments]}
    return character_lm.main(list(given.values()))


@pytest.mark.long
def test_it_trains_saves_and_goes_on(tmp_path: pathlib.Path, capsys: Any) -> None:
    assert run(tmp_path, "--save-every=2", "--log_every=1", "--average=0.9", "--accumulate=2") == 0
    assert "4 steps made  held-out loss" in capsys.readouterr().out
    steps = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert steps == ["00000002", "00000004"]
    config = json.loads((tmp_path / "run.json").read_text())["config"]
    assert (config["D"], config["average"]) == (16, 0.9)
    more = ["--average=0.9", "--accumulate=2", "--steps=6"]
    assert run(tmp_path, *more) == 2
    assert "steps: 6, was 4\ngo on with the new one" in capsys.readouterr().err
    assert run(tmp_path, *more, "--allow-config-change", "--mesh=data=2,fsdp=4", "--strict") == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 2, 4, 6]
    capsys.readouterr()
    assert run(tmp_path, *more, "--allow-config-change", "--steps=5") == 0
    assert "6 steps made" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--mesh=data=3", "a mesh of data=3 is 3 but there are 8 devices; name sizes"),
        ("--mesh=rows=8", "a mesh looks like data=2,fsdp=2,model=2"),
        ("--profile=5", "--profile looks like START:STOP, got '5'"),
        ("--D=15", "--N=2 heads must divide --D=15 into even widths"),
        ("--dtype=float16", "--dtype must be float32 or bfloat16"),
        ("--B=9", "global_batch: B has B=9"),
        ("--data=nowhere.txt", "nowhere.txt"),
        ("--out=/dev/null/run", "folder /dev/null/run cannot be used: "),
    ],
)
def test_wrong_options_are_one_line(
    argument: str, message: str, tmp_path: pathlib.Path, capsys: Any
) -> None:
    assert run(tmp_path / "run", argument) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


def test_a_stop_asked_for_before_the_loop_is_a_stop(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = character_lm.data.load_text

    def asked_meanwhile(path: str | None, *, T: int) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return load(path, T=T)

    monkeypatch.setattr(character_lm.data, "load_text", asked_meanwhile)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path)
    assert stopped.value.code == 75


@pytest.mark.long
def test_the_peer_computes_the_same(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torch")
    arguments = ["--D=16", "--N=2", "--L=2", "--T=8", "--B=3", "--steps=9", "--chunk=3"]
    assert bench_train.main([*arguments, "--warmup=3", "--heldout=6", f"--out={tmp_path}"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    before, after = found["heldout_before"], found["heldout_after"]
    assert abs(before["jax_attn"] - before["PyTorch"]) < 1e-5
    assert abs(after["jax_attn"] - after["PyTorch"]) < 1e-4
    assert before["PyTorch"] - after["PyTorch"] > 1e-3
    assert (tmp_path / "train.png").stat().st_size > 10_000
