"""Tests of how a plan is asked for and answered: the user's step, its errors, what is kept."""

import contextlib
import json
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from tpu import _plan_ask, _plan_child, plan
from tpu.topology import find

SLICE = find("v5e-4")


@pytest.fixture
def mine(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """The file of a user's step, which can be imported as `mine_to_plan`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    described = SimpleNamespace(devices=jax.devices()[:4])
    monkeypatch.setattr(_plan_child, "describe_slice", lambda _: described)
    yield tmp_path / "mine_to_plan.py"
    sys.modules.pop("mine_to_plan", None)


def answer(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the process answers, up to where it would need libtpu."""
    asked, answered = tmp_path / "request.json", tmp_path / "result.json"
    request = {"step": "mine_to_plan:plan_step", "mesh": {"fsdp": 4}, "options": {}}
    asked.write_text(json.dumps(request))
    monkeypatch.setattr(_plan_child, "plan", partial(_plan_child.build, slice_=SLICE))
    monkeypatch.setattr(sys, "argv", ["", str(asked), str(answered)])
    assert _plan_child.main() == 0
    return json.loads(answered.read_text())


STEP = """
import jax
def plan_step(mesh, batch=0):
    x = jax.ShapeDtypeStruct((24, 3), "float32")
    return jax.jit(lambda state, x: x), ({}, {"x": x, "y": x}), TOKENS
"""


@pytest.mark.parametrize("tokens", ["0", "-3", "'1024'", "True", "1.5", "None"])
def test_tokens_must_be_a_count(
    tokens: str, mine: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine.write_text(STEP.replace("TOKENS", tokens))
    said = answer(tmp_path, monkeypatch)["refused"]
    assert said.startswith("mine_to_plan:plan_step must return tokens a step as a whole number")
    assert said.endswith(f"got {tokens}")


def test_the_batch_is_known_from_what_is_returned(mine: pathlib.Path) -> None:
    mine.write_text(STEP.replace("TOKENS", "72"))
    request = {"step": "mine_to_plan:plan_step", "mesh": {"fsdp": 4}, "options": {}}
    built = _plan_child.build(request, SLICE)
    assert (built.tokens, built.batch, built.takes) == (72, 24, ["mesh", "batch"])
    given = {**request, "options": {"batch": 8, "remat": None}}
    assert _plan_child.build(given, SLICE).batch == 8


@pytest.mark.parametrize(
    ("text", "kind", "said", "line"),
    [
        ("def plan_step(mesh):\n    assert 1 == 2", "failed", "AssertionError: assert 1 == 2", 2),
        ("def plan_step(mesh):\n    raise NotImplementedError", "failed",
         "NotImplementedError: raise NotImplementedError", 2),
        ("import jax\njax.nothing", "failed", "AttributeError: ", 2),
        ("def plan_step(mesh):\n\n    int('x')", "refused", "invalid literal for int()", 3),
    ],
)  # fmt: skip
def test_an_error_of_the_step_says_where(
    text: str,
    kind: str,
    said: str,
    line: int,
    mine: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine.write_text(text)
    found = answer(tmp_path, monkeypatch)
    assert found[kind].startswith(said)
    assert found[kind].endswith(f"({mine}:{line})")
    assert "wrong" not in found


def test_a_function_that_there_is_not_is_a_wrong_argument(
    mine: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine.write_text("")
    mine.with_name("other.py").write_text("\ndef plan_step(mesh): ...")
    found = answer(tmp_path, monkeypatch)
    assert found["wrong"]
    assert found["refused"].endswith("has no function plan_step; beside it these have one: other")
    with pytest.raises(_plan_child.Wrong, match="No module named 'there_is_none'"):
        _plan_child.load("there_is_none:f")


def test_what_is_kept_is_read_or_made_again(tmp_path: pathlib.Path) -> None:
    kept = tmp_path / "a" / "b.json"
    facts = {"fits": False, "used": 3, "largest": [], "compile_s": 1.0}
    assert _plan_child.read_kept(kept) is None
    assert _plan_child.keep(kept, facts) == ""
    assert _plan_child.read_kept(kept) == {**facts, "cached": True}
    for text in ("{", "{}", "[]", '{"fits": true}'):
        kept.write_text(text)
        assert _plan_child.read_kept(kept) is None
        assert _plan_child.keep(kept, facts) == ""
    assert list(kept.parent.iterdir()) == [kept]
    assert "File exists" in _plan_child.keep(kept / "c.json", facts) or os.name != "posix"


def test_a_slice_is_asked_for_by_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def started(command: list[str], environment: dict[str, str]) -> Iterator[Any]:
        asked.append(json.loads(pathlib.Path(command[-2]).read_text()))
        pathlib.Path(command[-1]).write_text('{"fits": true}')
        yield SimpleNamespace(communicate=lambda timeout: ("", ""))

    monkeypatch.setattr(_plan_ask, "_started", started)
    slice_ = find("v4:4x4x16")
    assert _plan_ask.ask(plan.Config(step="a:b"), {}, slice_, {"fsdp": 256}) == {"fits": True}
    assert find(asked[0]["target"]) == slice_


def test_sigterm_ends_what_is_being_compiled(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    slow = tmp_path / "python"
    slow.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 20\n")
    slow.chmod(0o755)
    monkeypatch.setattr(_plan_ask.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(_plan_ask.sys, "executable", str(slow))
    monkeypatch.setattr(plan, "check", lambda cfg: [SLICE])
    missed: list[int] = []

    def kill() -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, _: missed.append(number))
    try:
        threading.Thread(target=kill, daemon=True).start()
        assert plan.main(["--step=a:b", "--target=v5e-4", "--limit_s=9"]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not missed
    for thread in threading.enumerate():  # one that was just starting ends by itself
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(10)
    assert not list(tmp_path.glob("tpu-plan-*"))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert "interrupted" in capsys.readouterr().err
