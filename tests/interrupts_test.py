"""Tests of jax_attn.train.interrupts: what SIGTERM and Ctrl-C ask for, and when it is heard."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jax_attn.train.interrupts import stop_requests

ROOT = pathlib.Path(__file__).parents[1]
BOTH = (signal.SIGINT, signal.SIGTERM)


def handlers() -> list[object]:
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    return [wakeup, *map(signal.getsignal, BOTH)]


@pytest.mark.parametrize("number", BOTH)
def test_signals_ask_and_handlers_come_back(number: int) -> None:
    before = handlers()
    with stop_requests() as asked:
        assert not asked(1)
        os.kill(os.getpid(), number)
        assert asked(2)
    assert before == handlers()


def test_what_was_asked_before_fit_is_known_in_fit() -> None:
    before = handlers()
    with stop_requests():
        os.kill(os.getpid(), signal.SIGTERM)
        with stop_requests() as asked:
            assert asked(0)
        assert before != handlers()
    assert before == handlers()
    with stop_requests() as asked:
        assert not asked(0)


# The main thread is in C for minutes and runs no handler, as while XLA compiles.
BUSY = """
import hashlib, sys
from jax_attn.train.interrupts import stop_requests
with stop_requests():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 500_000_000)
"""


def test_a_second_ctrl_c_ends_the_process_while_no_handler_can_run() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stderr is not None
        try:
            assert child.stdout.readline() == "ready\n"
            time.sleep(0.1)
            child.send_signal(signal.SIGINT)
            told = [child.stderr.readline() for _ in range(2)]
            assert "Ctrl-C again stops without saving" in told[1]
            child.send_signal(signal.SIGINT)
            assert child.wait(timeout=20) == -signal.SIGINT
        finally:
            child.kill()
