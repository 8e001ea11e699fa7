"""What every experiment shares: verdicts with three answers, and a folder of its own."""

import dataclasses
import json
import multiprocessing
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest

from experiments import __main__ as listing
from experiments import _character, _findings, gallery
from experiments._findings import Answer, Figure, gate, moot, positive, spread
from jax_attn import data, make_mesh

QUESTION = "Does it?"


def test_a_gate_has_three_answers() -> None:
    assert gate("x", [1.0, 2.0], least=1.0).holds is True
    assert gate("x", [1.0, 2.0], most=1.5).holds is None
    assert gate("x", [1.0, 2.0], most=0.5).holds is False
    assert gate("x", [np.nan, np.inf], least=0.0).holds is False
    with pytest.raises(ValueError, match="at least one value"):
        gate("x", [], least=0.0)
    with pytest.raises(ValueError, match="least or most"):
        gate("x", [1.0])


def test_one_seed_decides_identities_only() -> None:
    for value, side in ((5.0, "within"), (0.0, "outside")):
        made = gate("x", [value], least=1.0)
        assert made.holds is None
        assert made.measured.endswith(f"one seed decides nothing, it lies {side}")
    assert gate("x", [5.0], least=1.0, exact=True).holds is True
    assert gate("x", 0.0, least=1.0, whole=True).holds is False
    assert positive("x", [5.0]).holds is None


def test_a_difference_is_judged_by_the_interval_of_its_mean() -> None:
    """Of three seeds the interval is m +- 2.484 s: t = 4.303 of two degrees of freedom."""
    for mean, holds in ((2.5, True), (2.4, None), (-2.4, None), (-2.5, False)):
        made = positive("x", mean + np.array([-1.0, 0.0, 1.0]))
        assert made.holds is holds, made
    assert positive("x", [1.0, 1.0]).holds is True
    assert positive("x", [0.0, 0.0]).holds is None
    lost = positive("x", [1.0, 3.0, np.nan])
    assert lost.holds is None
    assert lost.measured == "2 [1, 3], 1 of 3 not finite; a seed without a number decides nothing"
    assert spread([np.nan, np.nan]) == "nan"
    with pytest.raises(ValueError, match="at least one"):
        positive("x", [])


def test_untrained_models_show_identities_only() -> None:
    verdicts = [gate("x", [1.0, 1.0], least=0.0), gate("y", [1.0], least=0.0, exact=True)]
    found = _findings.judged(Answer([], verdicts, [], untrained="not judged: too early"))
    assert [v.holds for v in found] == [None, True]
    assert found[0].measured == "1 [1, 1]; not judged: too early"
    assert _findings.judged(Answer([], verdicts, [])) == verdicts
    assert moot(verdicts[0], "why").values == (1.0, 1.0)


def test_a_character_model_is_trained_if_it_beats_pairs_of_bytes() -> None:
    ab = np.frombuffer(b"ab" * 300, np.uint8)
    text = data.Text(ab[:400], ab[400:], "ab", "")
    windows = ab[400:592].reshape(2, 12, 8).astype(np.int32)
    assert _character.untrained(text, windows, [0.0, 1e-4]) == ""
    for loss in ([0.0, 0.7], [np.nan, 0.0]):
        assert "pairs of bytes" in _character.untrained(text, windows, loss)
    assert _character.untrained(text, windows, []) == ""


# The folder of a run.


@dataclasses.dataclass(frozen=True)
class Config:
    """The smallest there is."""

    seeds: int = 2
    out: str = ""


def check(cfg: Config) -> jax.sharding.Mesh:
    return make_mesh(devices=jax.devices()[:1])


def find(cfg: Config, mesh: jax.sharding.Mesh, out: pathlib.Path) -> Answer:
    (out / "metrics.jsonl").write_text("{}")
    if cfg.seeds == 9:
        raise KeyboardInterrupt
    name = f"picture{cfg.seeds}.png"
    (out / name).write_bytes(b"PNG")
    row = {"model": "a", "loss": np.array([1.0, np.nan])}
    return Answer([row], [gate("x", [1.0, np.inf], least=0.0)], [Figure(name, "It.")])


def run(out: pathlib.Path, *argv: str) -> int:
    presets: dict[str, dict[str, Any]] = {"default": {}, "quick": {"seeds": 3}}
    return _findings.run(QUESTION, Config, presets, [f"--out={out}", *argv], check, find)


def test_a_summary_says_where_its_numbers_are_from(tmp_path: pathlib.Path) -> None:
    assert run(tmp_path, "--preset=quick") == 0
    made = json.loads((tmp_path / "summary.json").read_text())
    assert made["question"] == QUESTION
    assert made["preset"] == "quick"
    assert made["command"] == (
        f"python -m experiments.experiment_verdicts_test --out={tmp_path} --preset=quick"
    )
    assert {"revision", "processor", "jaxlib", "numpy", "text", "config"} <= made.keys()
    assert made["table"] == [{"model": "a", "loss": [1.0, "nan"]}]
    assert made["verdicts"][0]["values"] == [1.0, "inf"]
    assert made["verdicts"][0]["verdict"] == "undecided"


def test_an_earlier_answer_does_not_outlive_a_new_run(tmp_path: pathlib.Path, capsys: Any) -> None:
    (tmp_path / "mine.png").write_bytes(b"PNG")
    assert run(tmp_path) == 0
    assert run(tmp_path, "--seeds=9") == 130
    assert "metrics.jsonl has what was measured" in capsys.readouterr().err
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"mine.png", "metrics.jsonl", _findings.MARK}, "the caller's picture stays"


def test_what_is_not_its_own_is_refused(tmp_path: pathlib.Path, capsys: Any) -> None:
    (tmp_path / "metrics.jsonl").write_text("dear")
    (tmp_path / "file").write_text("dear")
    assert run(tmp_path) == 2
    assert "holds a run of something else; name another folder" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "dear"
    (tmp_path / _findings.MARK).write_text("flow")
    assert run(tmp_path) == 2
    assert "holds a run of flow; name another folder" in capsys.readouterr().err
    assert run(tmp_path / "file") == 2
    assert capsys.readouterr().err.endswith("file is a file; name a folder\n")
    assert (tmp_path / "file").read_text() == "dear"


def hold(out: pathlib.Path, ready: Any, done: Any) -> None:
    with _findings._own(out, "experiment_verdicts_test"):
        ready.set()
        done.wait(60)


def test_two_runs_do_not_share_a_folder(tmp_path: pathlib.Path, capsys: Any) -> None:
    spawn = multiprocessing.get_context("spawn")
    ready, done = spawn.Event(), spawn.Event()
    other = spawn.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    try:
        assert ready.wait(60)
        assert run(tmp_path) == 2
        assert "another process is writing to" in capsys.readouterr().err
    finally:
        done.set()
        other.join()
    assert run(tmp_path) == 0


@pytest.mark.parametrize("name", gallery.participants())
def test_every_experiment_has_a_folder_for_each_preset(name: str) -> None:
    module = __import__(f"experiments.{name}", fromlist=["Config"])
    assert module.Config().out == f"runs/{name}"
    assert module.PRESETS["default"] == {}
    for preset in ("quick", "tpu"):
        assert module.PRESETS[preset]["out"] == f"runs/{name}/{preset}"


@pytest.mark.parametrize(
    "path", sorted((gallery.ROOT / "experiments" / "results").glob("*.json")), ids=lambda p: p.stem
)
def test_published_results_are_of_the_experiment_as_it_asks_today(path: pathlib.Path) -> None:
    made = json.loads(path.read_text(encoding="utf-8"))
    asked = listing.read(gallery.ROOT / "experiments" / f"{path.stem}.py")
    module = __import__(f"experiments.{path.stem}", fromlist=["Config"])
    made["config"].pop("out", None)
    default = dataclasses.asdict(module.Config())
    assert made["question"] == asked.question
    assert made["preset"] == "default"
    assert made["config"] == {name: x for name, x in default.items() if name != "out"}
    assert {"date", "device", "machine", "processor", "jax", "python"} <= made.keys()
    assert re.fullmatch("[0-9a-f]{12}", made["revision"]), "files that were committed"
    assert made["verdicts"]
    assert all(v["values"] for v in made["verdicts"])
    assert all(v["verdict"] == _findings.WORDS[v["holds"]] for v in made["verdicts"])
