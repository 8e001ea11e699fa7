"""Tests of tpu.doctor's self-test: faults planted in arithmetic, in the child, in the command."""

import json
import os
import pathlib
import pty
import re
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_attn
from tests.multi_process_test import finish, free_port
from tests.style_test import run_doctests
from tpu import ask, checks, doctor, facts, measure, oracle, rates, selftest, versions

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODULES = (ask, checks, doctor, facts, measure, oracle, rates, selftest, versions)
NAMES = [
    "versions", "environment", "chips in use", "coordinator", "devices", "matmul", "attention",
    "matmul rate", "memory bandwidth", "psum", "ppermute", "all-reduce bandwidth",
]  # fmt: skip
SIZES = {"matmul_size": 64, "stream_mib": 1, "reduce_mib": 1}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples_run(module: Any) -> None:
    path = pathlib.Path(module.__file__)
    with jax.numpy_rank_promotion("allow"):
        tried, failed = run_doctests(path.read_text(), vars(module), path.name)
    assert tried
    assert not failed, failed


# Arithmetic.


def worst(result: dict[str, Any]) -> float:
    return max(error["share"] for error in result["errors"])


def test_what_computes_right_is_within_bounds() -> None:
    for part in (selftest.matmul, selftest.attention, selftest.psum, selftest.ppermute):
        result = part({})
        assert worst(result) <= 1
        devices = 1 if part is selftest.attention else jax.local_device_count()
        assert len({error["where"] for error in result["errors"]}) == devices


def test_a_matmul_that_rounds_or_drops_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = jnp.matmul

    def rounding(p: jax.Array, q: jax.Array, **_: Any) -> jax.Array:
        # Not astype and back, which the compiler may leave out.
        y = real(p.astype(jnp.float32), q.astype(jnp.float32), precision="highest")
        return jax.lax.reduce_precision(y, 8, 7)

    def dropping(p: jax.Array, q: jax.Array, **_: Any) -> jax.Array:
        return real(p.astype(jnp.float32), q.astype(jnp.float32).at[0].set(0), precision="highest")

    for wrong in (rounding, dropping):
        monkeypatch.setattr(jnp, "matmul", wrong)
        errors = selftest.matmul({})["errors"]
        assert {e["what"] for e in errors if not e["share"] <= 1} == {"float32", "bfloat16"}


def test_an_attention_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = jax_attn.attention

    def rounded(params: Any, x: jax.Array, *, mask: Any) -> jax.Array:
        low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        return real(low, x.astype(jnp.bfloat16), mask=mask).astype(jnp.float32)

    def stopped(params: Any, x: jax.Array, *, mask: Any) -> jax.Array:
        return real(params | {"wk_DKH": jax.lax.stop_gradient(params["wk_DKH"])}, x, mask=mask)

    everything = {"y", "d x", "d wq", "d wk", "d wv", "d wo"}
    for wrong, what in ((rounded, everything), (stopped, {"d wk"})):
        monkeypatch.setattr(jax_attn, "attention", wrong)
        errors = selftest.attention({})["errors"]
        assert {e["what"] for e in errors if not e["share"] <= 1} == what


def test_collectives_that_lose_something_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    psum, ppermute = jax.lax.psum, jax.lax.ppermute
    monkeypatch.setattr(jax.lax, "psum", lambda x, axis: psum(x, axis) * (1 + 2.0**-20))
    assert worst(selftest.psum({})) > 1
    monkeypatch.setattr(jax.lax, "psum", lambda x, axis: psum(x, axis) * jnp.nan)
    assert not worst(selftest.psum({})) <= 1
    monkeypatch.setattr(jax.lax, "ppermute", lambda x, axis, ring: x)
    assert worst(selftest.ppermute({})) == float("inf")
    monkeypatch.setattr(
        jax.lax, "ppermute", lambda x, axis, ring: ppermute(x, axis, [(b, a) for a, b in ring])
    )
    assert worst(selftest.ppermute({})) == float("inf")


def test_the_oracle_is_its_own_derivative() -> None:
    rng = np.random.default_rng(0)
    sizes = {"wq_DNH": (3, 4, 5), "wk_DKH": (3, 2, 5), "wv_DKE": (3, 2, 7), "wo_NED": (4, 7, 3)}
    inputs = {name: rng.standard_normal(size) for name, size in sizes.items()}
    inputs["x"] = rng.standard_normal((2, 6, 3))
    dy = rng.standard_normal((2, 6, 3))
    _, gradients = oracle.attend(inputs, inputs["x"], dy)
    for name, value in inputs.items():
        direction, h = rng.standard_normal(value.shape), 1e-5
        ends = []
        for sign in (1, -1):
            moved = inputs | {name: value + sign * h * direction}
            ends.append((oracle.attend(moved, moved["x"], dy)[0]["y"] * dy).sum())
        slope = (gradients[name] * direction).sum()
        np.testing.assert_allclose((ends[0] - ends[1]) / (2 * h), slope, rtol=1e-6)


def test_the_work_of_what_is_timed() -> None:
    n = jax.device_count()
    for part, work in (
        (measure.matmul_rate, 2 * measure.CHAIN * 64**3),
        (measure.memory_bandwidth, 2 * 2**20),
        (measure.all_reduce_bandwidth, 2 * (n - 1) / n * 2**20),
    ):
        result = part(SIZES)
        assert result["work"] == work
        for samples in result["seconds"].values():
            assert len(samples) == measure.ROUNDS
            assert min(samples) > 0


# The child.


def answers(script: str, parts: list[str], limit_s: float = 60.0) -> dict[str, dict[str, Any]]:
    """Ask a child that runs a script; in it, `parts` is what it is asked for."""
    start = (
        "import json, os, sys, time\n"
        "parts = json.loads(sys.argv[1])['parts']\n"
        "def say(**answer): print(json.dumps(answer), flush=True)\n"
    )
    command = [sys.executable, "-c", start + script]
    return dict(ask.ask(parts, {}, limit_s, lambda text: None, command))


def test_a_part_that_hangs_or_crashes_does_not_take_the_others_along() -> None:
    script = """
for part in parts:
    say(doing=part)
    if part == "b": print("noise", file=sys.stderr); time.sleep(600)
    if part == "d": print("Fatal: why", file=sys.stderr, flush=True); os.abort()
    say(part=part, result={"is": part})
"""
    got = answers(script, list("abcde"), limit_s=3.0)
    assert list(got) == list("abcde")
    assert [got[p]["result"]["is"] for p in "ace"] == ["a", "c", "e"]
    assert got["b"]["late"] == "no answer within 3 s while b: it was killed; it said last: noise"
    assert got["d"]["error"].startswith("the process ended while d: SIGABRT")
    assert "Fatal: why" in got["d"]["error"]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("say(doing='starting the devices'); time.sleep(600)", "while starting the devices"),
        ("say(doing='importing JAX'); sys.exit(3)", "ended while importing JAX: exit code 3"),
        ("say(fatal='ImportError: x')", "ImportError: x"),
        ("print('{\"doing\": ', flush=True); os._exit(1)", "ended while starting: exit code 1"),
    ],
)
def test_a_child_that_does_not_start_is_asked_once(script: str, said: str) -> None:
    got = answers(script, ["devices", "matmul"], limit_s=3.0)
    assert list(got) == ["devices"]
    assert said in str(got["devices"])


def test_a_child_that_cannot_be_started_is_said() -> None:
    ((part, answer),) = ask.ask(["devices", "psum"], {}, 5.0, print, ["/no/such/program"])
    assert part == "devices"
    assert answer["error"] == "no process could be started: No such file or directory"


# The whole command.


def run(*options: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tpu.doctor", *options]
    return subprocess.run(
        command, cwd=ROOT, env=environment(env), capture_output=True, text=True, timeout=240
    )


def environment(changes: dict[str, str] | None = None) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"} | (changes or {})


def fake_jax(folder: pathlib.Path, source: str) -> dict[str, str]:
    (folder / "jax").mkdir()
    (folder / "jax/__init__.py").write_text(source)
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


def test_two_hosts_join_and_are_examined(tmp_path: pathlib.Path) -> None:
    env = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tpu.doctor", "--preset=quick", f"--json={tmp_path}/{i}.json"],
            cwd=ROOT, env=environment(env | {"JAX_PROCESS_ID": str(i)}), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    for i, (code, out, errors) in enumerate(finish(*children)):
        assert code == 0, out + errors
        assert out.splitlines()[-1] == "healthy"
        assert "doctor: matmul rate ..." in errors
        report = json.loads((tmp_path / f"{i}.json").read_text())
        rows = {row["name"]: row for row in report["rows"]}
        assert list(rows) == NAMES
        assert report["healthy"] is True
        assert f"4 × cpu, 2 here, process {i} of 2" in rows["devices"]["seen"]
        assert rows["psum"]["verdict"] == rows["ppermute"]["verdict"] == "ok"
        for name in doctor.RATES:
            assert "no table for this device" in rows[name]["seen"]
            values = rows[name]["values"]
            assert 0 < values["least"] <= values["median"] <= values["largest"]
            assert values["share"] is None


def test_a_start_that_hangs_is_said_and_is_not_healthy(tmp_path: pathlib.Path) -> None:
    env = fake_jax(tmp_path, "import time; time.sleep(600)")
    done = run("--limit_s=2", f"--json={tmp_path}/d.json", env=env)
    assert done.returncode == 1, done.stderr
    assert re.search(r"FAILED +devices +no answer within 2 s while importing JAX", done.stdout)
    assert done.stdout.splitlines()[-1] == "NOT healthy: devices"
    report = json.loads((tmp_path / "d.json").read_text())
    assert [row["name"] for row in report["rows"]] == NAMES
    assert {row["verdict"] for row in report["rows"][5:]} == {"unavailable"}
    assert report["healthy"] is False


def test_a_jax_that_cannot_be_imported_is_said(tmp_path: pathlib.Path) -> None:
    env = fake_jax(tmp_path, "raise RuntimeError('jaxlib is version 1, but jax needs 2\\nx')")
    done = run("--rates=false", env=env)
    assert done.returncode == 1
    assert "RuntimeError: jaxlib is version 1, but jax needs 2\n" in done.stdout
    assert re.search(r"skipped +matmul rate +--rates=false", done.stdout)


def test_the_child_ends_when_the_doctor_is_killed(tmp_path: pathlib.Path) -> None:
    said = tmp_path / "pid"
    source = (
        f"import os, time; open({str(said)!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "tpu.doctor"], cwd=ROOT, env=environment(fake_jax(tmp_path, source)),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as parent:  # fmt: skip
        until = time.monotonic() + 60
        while not (said.exists() and said.read_text().endswith(" ")) and time.monotonic() < until:
            time.sleep(0.05)
        child = int(said.read_text())
        os.kill(child, 0)  # it is there
        parent.kill()
    while time.monotonic() < until:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("it is still there")


def test_interrupted_is_one_line(tmp_path: pathlib.Path) -> None:
    env = environment(fake_jax(tmp_path, "import time; time.sleep(600)"))
    with subprocess.Popen(
        [sys.executable, "-m", "tpu.doctor"], cwd=ROOT, env=env, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as parent:  # fmt: skip
        assert parent.stderr is not None
        while "importing JAX" not in parent.stderr.readline():
            pass
        parent.send_signal(signal.SIGINT)
        assert parent.stderr.read() == "interrupted\n"
    assert parent.returncode == 130


def test_a_terminal_of_60_columns_gets_a_table(tmp_path: pathlib.Path) -> None:
    env = environment(fake_jax(tmp_path, "raise ImportError('no')")) | {"TERM": "xterm"}
    env |= {"COLUMNS": "60", "LINES": "50"}
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tpu.doctor"]
    child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b""
    while True:
        try:
            read = os.read(ours, 65536)
        except OSError:  # how a terminal whose other side has closed ends, on Linux
            break
        if not read:
            break
        text += read
    os.close(ours)
    assert child.wait(60) == 1
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode())
    table = plain[plain.index("check") :]
    assert b"\x1b[1;31mFAILED" in text
    assert all(len(line.rstrip()) <= 60 for line in table.splitlines())
    assert table.rstrip().endswith("NOT healthy: devices")


def test_an_output_that_nobody_reads_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "tpu.doctor", "--rates=false"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr == "error: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--expect=v9-4", "no such TPU"),
        ("--expct=v5e-4", "did you mean --expect?"),
        ("--coordinator=here", "--coordinator must look like HOST:8476"),
        ("--coordinator=here:70000", "below 65536"),
        ("--limit_s=0", "--limit_s must be a number above 0, got 0"),
        ("--limit_s=inf", "--limit_s must be a number above 0, got inf"),
        ("--least_share=-1", "--least_share"),
        ("--matmul_size=-1", "--matmul_size must be at least 0"),
        ("--json=no/such/folder/x", "--json must be a file in a folder that exists"),
    ],
)
def test_wrong_usage(option: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = doctor.main([option])
    except SystemExit as ended:
        code = ended.code
    out, errors = capsys.readouterr()
    assert (code, out) == (2, "")
    assert re.fullmatch(f"error: .*{re.escape(says)}.*\n", errors)


def test_nothing_is_lost_where_json_cannot_be_written(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "d.json"
    path.write_text("before")
    doctor._write(path, "after")
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="cannot be written"):
        doctor._write(tmp_path / "gone" / "d.json", "x")
    assert doctor._finite({"a": [float("nan"), (1.0,)]}) == {"a": ["nan", [1.0]]}


def test_the_doctor_imports_no_jax() -> None:
    code = "import sys, tpu.doctor as d; d._parse(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
