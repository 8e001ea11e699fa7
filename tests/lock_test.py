"""Tests of jax_attn.lock: held against another process, let go of when that is killed."""

import errno
import fcntl
import pathlib
import subprocess
import sys

import pytest

from jax_attn.lock import hold

HOLDER = """
import pathlib, sys
from jax_attn.lock import hold
with hold(pathlib.Path(sys.argv[1]), RuntimeError("held")):
    print("holding", flush=True)
    sys.stdin.read()
"""


def holder(path: pathlib.Path) -> subprocess.Popen[str]:
    """Start a process that holds the file until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    return process


def test_a_file_that_another_process_holds_is_refused_until_that_is_killed(
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "lock"
    path.write_text("kept")
    with holder(path) as other:
        with pytest.raises(LookupError, match="taken"), hold(path, LookupError("taken")):
            pytest.fail("the body ran")
        other.kill()
    with hold(path, LookupError("taken")):
        pass
    assert path.read_text() == "kept"


def test_a_file_system_without_locks_is_said(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    ran = False
    with pytest.warns(UserWarning, match="No locks available"), hold(tmp_path / "a", KeyError()):
        ran = True
    assert ran


def test_the_body_s_own_error_passes_and_lets_go(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "lock"
    for _ in range(2):  # the second time shows that it was let go of
        with pytest.raises(BlockingIOError, match="own"), hold(path, LookupError("taken")):
            raise BlockingIOError("own")
