"""The gallery: who takes part, what becomes of a run, and the page as a browser shows it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import _gallery_page as gallery_page
from experiments import gallery
from tests import browser

NASTY = "a <b>&amp; \"q\" 'q' </style><script>alert(1)</script> \u202e \ud800 \x00 é 漢"
LONG = "x" * 300
ENVIRONMENT = {"date": "2026-11-23", "device": "1 x cpu", "python": "3.13.0", "jax": "0.12.0"}


def verdict(holds: bool | None, statement: str = "it is so") -> dict[str, Any]:
    return {
        "statement": statement,
        "expected": "at least 0.5 (arXiv:0000.00000)",
        "measured": "0.6 [0.5, 0.7]",
        "holds": holds,
        "verdict": "not read",
    }


def plant(
    folder: Path, *verdicts: dict[str, Any], caption: str = "Loss.", file: str = "a.png"
) -> None:
    """Write what an experiment leaves behind."""
    folder.mkdir(parents=True, exist_ok=True)
    table = [
        {"model": f"model {i}", **{f"quantity {j}": [i + j / 7, i + j / 3] for j in range(9)}}
        for i in range(3)
    ]
    summary = {
        "question": "not read",
        "config": {},
        **ENVIRONMENT,
        "table": [*table, {"model": NASTY, "one more": 12345, "quantity 1": ["nan", "inf"]}],
        "verdicts": list(verdicts),
        "figures": [{"file": file, "caption": caption}],
        "seconds": 12.3,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    figure = Figure(figsize=(7, 3))
    figure.subplots().plot([0, 1, 0])
    figure.savefig(folder / "a.png", dpi=100)


def entry(folder: Path, name: str, **given: Any) -> gallery_page.Entry:
    made = gallery_page.Entry(
        name, f"Is {name} so?", f"python -m experiments.{name}", folder / name
    )
    return made._replace(**given)


def entries(folder: Path) -> list[gallery_page.Entry]:
    """One of each kind: good, bad, undecided and full of traps, failed, interrupted, not run."""
    plant(folder / "good", verdict(True), verdict(True))
    plant(folder / "bad", verdict(False), verdict(True))
    plant(folder / "open", verdict(None, NASTY), verdict(False, LONG), caption=f"{NASTY} {LONG}")
    made = [
        entry(
            folder,
            name,
            question=question,
            summary=gallery_page.read_summary(folder / name),
            seconds=72.0,
            revision="0123456789ab",
            reused=name == "good",
        )
        for name, question in (("good", "Is it?"), ("bad", "Was it?"), ("open", NASTY + LONG))
    ]
    return [
        *made,
        entry(folder, "failed", trouble="failed: exit status 1", output=f"Error: {NASTY}\n{LONG}"),
        entry(folder, "interrupted", trouble="interrupted", seconds=1.0),
        entry(folder, "later", trouble="not run"),
    ]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("gallery")
    facts = {"": "2026-11-23", "preset": "quick", "revision": "", "minutes": "1.2"}
    html = gallery_page.page(entries(folder), title=f"Answers {NASTY}", facts=facts)
    (folder / "gallery.html").write_text(html, encoding="utf-8")
    return folder, html


def test_the_page_asks_the_network_for_nothing(planted: tuple[Path, str]) -> None:
    html = planted[1]
    assert not re.search(
        r'<script|<link|<iframe|\bsrc="(?!data:)|\bsrc=[^"]|url\(|@import|https?:', html
    )
    assert html.count("data:image/png;base64,") == 3
    assert "<b>" not in html
    assert "\\u202e" in html
    assert "\\ud800" in html
    assert "漢" in html


def test_counts_are_of_all_verdicts(planted: tuple[Path, str]) -> None:
    html = planted[1]
    for words in ("✓ 3 hold<", "✗ 2 do not hold<", "? 1 undecided<", "3 of 6 without an answer"):
        assert words in html
    assert html.count("from an earlier run") == 1
    assert html.count("0123456789ab") == 3


def test_a_word_stands_beside_each_colour(planted: tuple[Path, str]) -> None:
    found = re.findall(r"<li class=(\w+)><span class=word>(.) ([^<]+)</span>", planted[1])
    words = {"holds": ("✓", "holds"), "fails": ("✗", "does not hold"), "open": ("?", "undecided")}
    assert [name for name, *_ in found] == ["holds", "holds", "fails", "holds", "open", "fails"]
    assert all(words[name] == (sign, word) for name, sign, word in found)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ([1.0, 2.0], "1.5 <small>[1, 2]</small>"),
        (["nan", 1.0], "1 <small>[1, 1], 1 of 2 not finite</small>"),
        ([0.25], "0.25"),
        (["a<", {}], "[&#x27;a&lt;&#x27;, {}]"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (True, "True"),
        (None, ""),
        ("<", "&lt;"),
    ],
)
def test_cells(value: Any, shown: str) -> None:
    assert gallery_page.cell(value) == shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": None}, "no list of objects 'table'"),
        ({"verdicts": [1]}, "no list of objects 'verdicts'"),
        ({"verdicts": [{}]}, "lacks 'statement'"),
        ({"verdicts": [verdict(True) | {"holds": 1}]}, "not true, false or null"),
        ({"figures": [{"file": "a.png"}]}, "lacks 'caption'"),
        ({"figures": [{"file": "b.png", "caption": ""}]}, "cannot be read"),
        ({"figures": [{"file": "../a.png", "caption": ""}]}, "not in the folder"),
        ({"figures": [{"file": "summary.json", "caption": ""}]}, "is no PNG"),
    ],
)
def test_a_summary_of_another_form_is_no_answer(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    plant(tmp_path, verdict(True))
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        gallery_page.read_summary(tmp_path)
    path.write_text("[" if change == {"table": None} else "[]")
    with pytest.raises(ValueError, match=r"summary\.json"):
        gallery_page.read_summary(tmp_path)


def test_those_that_define_find_take_part() -> None:
    known = gallery.participants()
    assert {"cat_on_the_mat", "recall", "scaling"} <= set(known)
    assert not {"gallery", "__main__", "_findings", "seed_shapes"} & set(known)


def test_a_change_of_what_is_imported_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "experiments"
    folder.mkdir()
    imports = (
        "from experiments import _b\nfrom experiments._c import x\nfrom jax_attn import data\n"
    )
    texts = {"a": imports, "_b": "from experiments import a, _d", "_c": "", "_d": "def", "_e": ""}
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    found = [path.stem for path in gallery.sources("a", folder)]
    assert found == ["_b", "_c", "_d", "a"]


def test_the_fingerprint_is_of_preset_sources_and_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = gallery.fingerprint("cat_on_the_mat", "quick")
    assert first == gallery.fingerprint("cat_on_the_mat", "quick")
    assert first != gallery.fingerprint("cat_on_the_mat", "default")
    assert first != gallery.fingerprint("gradient_step", "quick")
    monkeypatch.setenv("XLA_FLAGS", "--another")
    assert first != gallery.fingerprint("cat_on_the_mat", "quick")


def plan(folder: Path, name: str, code: str) -> gallery.Plan:
    """Plan a script in place of an experiment."""
    return gallery.Plan(name, f"Is {name} so?", ("python", "-c", code), folder / name, "1")


KINDS = {
    "raises": ("raise ValueError('no <b>')", "failed: exit status 1", "ValueError: no <b>"),
    "silent": ("print('done')", "failed: summary.json cannot be read", "done"),
    "killed": ("import os; os.kill(os.getpid(), 9)", "failed: ended by signal 9", ""),
    "stopped": ("import os; print('x'); os._exit(130)", "interrupted", "x"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_fails_is_said_and_leaves_nothing_to_keep(name: str, tmp_path: Path) -> None:
    code, trouble, output = KINDS[name]
    planned = plan(tmp_path, name, code)
    plant(planned.folder, verdict(True))  # of an earlier run
    (planned.folder / "run.json").write_text('{"fingerprint": "1", "seconds": 1, "revision": ""}')
    found, stopped = gallery.run(planned, lambda line: None)
    assert found.trouble.startswith(trouble)
    assert found.output.endswith(output)
    assert (found.summary, stopped) == (None, False)
    assert gallery.kept(planned) is None
    assert not list(planned.folder.glob("*.png"))


def test_ctrl_c_ends_the_experiment_and_is_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(line: str) -> None:
        if "began" in line:
            raise KeyboardInterrupt

    monkeypatch.setattr(gallery, "PATIENCE_S", (0.0, 20.0, 5.0))
    sleeps = "import time; print('began', flush=True); time.sleep(600)"
    found, stopped = gallery.run(plan(tmp_path, "sleeps", sleeps), interrupt)
    assert (found.trouble, stopped) == ("interrupted", True)
    assert found.output.splitlines()[-1] == "KeyboardInterrupt", "it was asked, not killed"

    todo = [plan(tmp_path, name, sleeps) for name in ("sleeps", "later")]
    monkeypatch.setattr(gallery, "plans", lambda cfg: todo)
    monkeypatch.setattr(gallery, "run", lambda planned, tell: (found, True))
    assert gallery.main([f"--out={tmp_path}"]) == 130
    assert "without an answer: sleeps, later" in capfd.readouterr().out
    html = (tmp_path / "gallery.html").read_text()
    assert "✗ interrupted" in html
    assert "✗ not run" in html


def test_runs_are_made_shown_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One that ends well and one that does not: the status says so, the page has both."""
    code = (
        f"import shutil; shutil.copytree({str(tmp_path / 'from')!r}, {str(tmp_path / 'well')!r}, "
    )
    code += "dirs_exist_ok=True)"
    plant(tmp_path / "from", verdict(True), verdict(None))
    todo = [plan(tmp_path, "well", code), plan(tmp_path, "raises", "raise SystemExit('no')")]
    monkeypatch.setattr(gallery, "plans", lambda cfg: todo)
    assert gallery.main([f"--out={tmp_path}"]) == 1
    said = capfd.readouterr()
    assert "[1/2] well: 1 hold, 0 do not, 1 undecided" in said.err
    assert "[2/2] raises: failed: exit status 1" in said.err
    assert "1 hold, 0 do not, 1 undecided; without an answer: raises" in said.out
    html = (tmp_path / "gallery.html").read_text()
    assert html.count("data:image/png") == 1
    assert "1 of 2 without an answer" in html
    assert not list(tmp_path.glob("*.partial"))

    todo.pop()
    ran = (tmp_path / "well" / "output.txt").stat().st_mtime_ns
    assert gallery.main([f"--out={tmp_path}", "--reuse"]) == 0
    assert "minutes, kept" in capfd.readouterr().err
    assert "from an earlier run" in (tmp_path / "gallery.html").read_text()
    todo[0] = todo[0]._replace(fingerprint="2")
    assert gallery.main([f"--out={tmp_path}", "--reuse"]) == 0
    assert (tmp_path / "well" / "output.txt").stat().st_mtime_ns > ran


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only=cat_on_the_mat,none"], "no experiment 'none'; there are"),
        (["--only=gallery"], "no experiment 'gallery'"),
        (["--preset=small"], "--preset must be one of quick, default, tpu"),
        (["--reuse=maybe"], "--reuse must be true or false"),
    ],
)
def test_wrong_values_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    try:
        status: Any = gallery.main([f"--out={tmp_path / 'out'}", *arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_made_elsewhere_is_not_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path / "recall", verdict(True))
    assert gallery.main([f"--out={tmp_path}", "--only=recall"]) == 2
    assert "is none of a gallery" in capsys.readouterr().err
    assert (tmp_path / "recall" / "summary.json").exists()


def test_a_preset_that_there_is_not_removes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path / "recall", verdict(True))
    (tmp_path / "recall" / "output.txt").write_text("a gallery's")
    assert gallery.main([f"--out={tmp_path}", "--only=recall", "--each=qiuck"]) == 2
    assert "--each must be one of quick, default, tpu, got 'qiuck'" in capsys.readouterr().err
    assert (tmp_path / "recall" / "summary.json").exists()
    assert gallery.main(["--out=", "--only=recall"]) == 2
    assert "--out must name a folder" in capsys.readouterr().err


def test_presets_reach_the_experiments(tmp_path: Path) -> None:
    (planned,) = gallery.plans(gallery.Config(only="recall", each="default", out=str(tmp_path)))
    assert planned.command == (
        *("python", "-m", "experiments.recall", "--preset=default"),
        f"--out={tmp_path / 'recall'}",
    )
    assert planned.question.endswith("?")


@pytest.mark.long
def test_a_real_experiment(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.gallery", "--only=cat_on_the_mat"]
    done = subprocess.run(
        [*command, f"--out={tmp_path}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Does &quot;mat&quot; need attention" in (tmp_path / "gallery.html").read_text()


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    if not browser.binary():
        pytest.skip(f"no browser: none of {', '.join(browser.BINARIES)} is on PATH")
    with browser.browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_it_fits_the_window(
    tab: browser.Page, planted: tuple[Path, str], tmp_path: Path, width: int, dark: bool
) -> None:
    tab.complaints.clear()
    tab.window(width, 900, dark=dark)
    tab.open(planted[0] / "gallery.html")
    assert tab.complaints == []
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    # What is wider than the window scrolls in a box of its own.
    outside = tab.evaluate(
        """[...document.querySelectorAll("body *")]
        .filter(e => !e.closest(".wide, figure div"))
        .filter(e => e.getBoundingClientRect().right > innerWidth)
        .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert outside == []
    assert tab.evaluate("document.querySelector('.wide').clientWidth") < width
    loaded = "[...document.images].map(i => i.complete && i.naturalWidth)"
    assert tab.evaluate(loaded) == [700] * 3
    tab.screenshot(tmp_path / "page.png", whole=True)
    seen = matplotlib.image.imread(tmp_path / "page.png")[..., :3]
    assert seen.shape[1] == width
    background = seen[5, 5]
    assert (background.mean() < 0.3) == dark
    drawn = (np.abs(seen - background) > 0.2).any(-1)
    bands = np.array_split(drawn, 20)
    assert all(band.mean() > 0.002 for band in bands), "no part is blank"
    colours = {"holds": 3, "fails": 2, "open": 1}
    for name, count in colours.items():
        found = tab.evaluate(f"document.querySelectorAll('.verdicts .{name}').length")
        assert found == count


def test_links_lead_to_their_experiments(tab: browser.Page, planted: tuple[Path, str]) -> None:
    tab.open(planted[0] / "gallery.html")
    targets = "[...document.links].map(a => !!document.querySelector(a.getAttribute('href')))"
    assert tab.evaluate(targets) == [True] * 9  # six cards, and three without an answer
