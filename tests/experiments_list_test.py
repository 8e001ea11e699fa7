"""`python -m experiments` answers without importing anything it lists."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import __main__ as listing

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "_shared.py").write_text("")
    (tmp_path / "broken.py").write_text("def")
    (tmp_path / "silent.py").write_text("raise SystemExit('imported')")
    (tmp_path / "focus.py").write_text(
        '"""Does [attention] focus?\n\nCommand: python -m experiments.focus\n'
        'Minutes: 2;\n  5 busy\n"""\n'
    )
    return tmp_path


def test_reads_question_command_and_minutes(folder: Path) -> None:
    broken, focus, silent = listing.find(folder)
    assert focus == (
        "focus",
        "Does [attention] focus?",
        "2; 5 busy",
        "python -m experiments.focus",
        "",
    )
    assert silent == ("silent", "(no docstring)", "", "", "")
    assert broken.question.startswith("(cannot be read: ")


def test_last_verdicts_are_counted(folder: Path, tmp_path: Path) -> None:
    (summary := tmp_path / "runs" / "focus" / "summary.json").parent.mkdir(parents=True)

    def said(text: str) -> str:
        summary.write_text(text)
        return listing.find(folder, tmp_path / "runs")[1].last

    held = [{"holds": value} for value in (True, False, None, True)]
    told = json.dumps({"verdicts": held, "date": "2026-11-22"})
    assert said(told) == "default: 2 hold, 1 do not, 1 undecided, 2026-11-22"
    assert said(told.replace("verdicts", "claims")) == said(told)
    for other in ("focus/quick", "gallery/focus"):
        (path := tmp_path / "runs" / other / "summary.json").parent.mkdir(parents=True)
        path.write_text(json.dumps({"verdicts": [{"holds": False}], "date": "2026-11-23"}))
    both = "default: 2 hold, 1 do not, 1 undecided, 2026-11-22; quick: 1 do not, 2026-11-23; "
    assert said(told) == both + "gallery: 1 do not, 2026-11-23"
    for other in ("focus/quick", "gallery/focus"):
        (tmp_path / "runs" / other / "summary.json").unlink()
    assert said("{}") == ""
    for broken in ("", "[]", '{"verdicts": [1]}', '{"verdicts": 1}'):
        assert said(broken).endswith("focus/summary.json cannot be read)")


def test_plain_lines_align(folder: Path) -> None:
    head, *lines = listing.plain(listing.find(folder)).splitlines()
    column = head.index("question")
    assert len(lines) == 3
    assert lines[1][column:] == "Does [attention] focus?"
    assert all(line[column - 2 : column] == "  " for line in lines)


@pytest.mark.parametrize("columns", ["1", "7", "41", "200"])
def test_table_fits_any_terminal(
    folder: Path,
    columns: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    listing.table(listing.find(folder))
    shown = capsys.readouterr().out
    assert shown
    assert ("Does [attention] focus?" in shown) == (columns in ("41", "200"))


def test_unknown_argument_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.main(["--al"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown argument '--al'")
    assert error.count("\n") == 1


def test_every_experiment_says_what_it_asks_and_costs() -> None:
    for row in listing.find():
        assert all(row[:4]), f"experiments/{row.name}.py needs a question, Command: and Minutes:"


def test_runs_without_jax() -> None:
    script = "import runpy, sys\ntry: runpy.run_module('experiments', run_name='__main__')\n"
    script += "except SystemExit as stop: assert not stop.code\nassert 'jax' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("experiment")
