"""tpu.plan through the TPU's compiler: what it says of steps that fit, do not, and are wrong."""

import importlib.util
import json
import pathlib
from typing import Any

import pytest

from tpu import plan

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: pip install 'jax[tpu]'",
    ),
]
CHIPS = "v5e-4"


def planned(tmp_path: pathlib.Path, status: int, *arguments: str) -> list[dict[str, Any]]:
    out = tmp_path / "plan.json"
    given = [f"--json={out}", f"--cache={tmp_path / 'cache'}", *arguments]
    assert plan.main(given) == status
    return json.loads(out.read_text())


def test_a_step_is_planned_and_kept(tmp_path: pathlib.Path, capsys: Any) -> None:
    arguments = ["--step=tests.planned_step:plan_step", f"--target={CHIPS}"]
    (first,) = planned(tmp_path, 0, *arguments, f"--picture={tmp_path / 'plan.png'}")
    assert first["fits"]
    assert not first["cached"]
    assert 0 < first["used"] < first["limit"]
    assert first["lint"] == []
    found = first["estimate"]
    assert 0 < found["least"] <= found["step"] <= found["most"]
    # 6 operations a weight and token, and attention's, which at this size is less than that again.
    weights, tokens = 3 * 12 * 512**2, 16 * 1024
    assert 6 * weights * tokens < first["model_flops"] < 2 * 6 * weights * tokens
    assert first["flops"] > first["model_flops"]  # one forward pass more, for remat
    assert 0 < found["mfu"] < 1
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    (again,) = planned(tmp_path, 0, *arguments)
    assert again["cached"]
    assert again["estimate"] == found
    capsys.readouterr()


def test_a_step_takes_longer_with_length_and_shorter_with_devices(tmp_path: pathlib.Path) -> None:
    step = "--step=tests.planned_step:plan_step"
    (base,) = planned(tmp_path, 0, step, f"--target={CHIPS}")
    (more,) = planned(tmp_path, 0, step, "--target=v5e-8")
    (longer,) = planned(tmp_path, 0, "--step=tests.planned_step:longer", f"--target={CHIPS}")
    assert more["estimate"]["step"] < base["estimate"]["step"]
    assert longer["estimate"]["step"] > 4 * base["estimate"]["step"]
    assert longer["model_flops"] > 4 * base["model_flops"]


def test_what_does_not_fit_is_said_with_what_would(tmp_path: pathlib.Path, capsys: Any) -> None:
    arguments = ["--step=tests.planned_step:too_large", f"--target={CHIPS}", "--batch=256"]
    (row,) = planned(tmp_path, 1, *arguments)
    assert not row["fits"]
    assert row["used"] > row["limit"]
    assert row["advice"].startswith("fits with remat='full'")
    assert "does not fit" in capsys.readouterr().out


def test_an_activation_that_travels_is_found(tmp_path: pathlib.Path) -> None:
    (row,) = planned(tmp_path, 0, "--step=tests.planned_step:gathers", f"--target={CHIPS}")
    said = [text for text in row["lint"] if "is no parameter" in text]
    assert said
    assert "all-gather of 33.6 MB over fsdp" in said[0]
    assert any("float32 factors" in text for text in row["lint"])


def test_what_cannot_be_planned_says_why(tmp_path: pathlib.Path) -> None:
    step = "--step=tests.planned_step:plan_step"
    (row,) = planned(tmp_path, 1, step, f"--target={CHIPS}", "--batch=7")
    assert "7" in row["refused"]
    (row,) = planned(tmp_path, 1, "--step=tests.planned_step:nothing", f"--target={CHIPS}")
    assert row["refused"].endswith("has no function nothing")
    (row,) = planned(tmp_path, 1, step, f"--target={CHIPS}", "--preset=x")
    assert "takes no preset" in row["refused"]
