"""Stop when asked: SIGTERM and Ctrl-C become one save at one step that all processes share."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax

STOPPED, DIVERGED = 75, 76  # exit codes: start me again; do not

_END = 0  # a byte that is no signal: ends the thread that listens


class Stopped(SystemExit):
    """A run that was asked to stop, and has saved: exit code 75, start it again to go on.

    Example:
      >>> Stopped(STOPPED).code
      75
    """


class Diverged(SystemExit, FloatingPointError):
    """A run whose updates stayed not finite: exit code 76. Also a FloatingPointError.

    Example:
      >>> Diverged("step 3: loss is nan").code
      76
    """

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.code = DIVERGED


class _Requests:
    """What was asked so far, by signals of this process."""

    stop = interrupted = False


_watching: _Requests | None = None  # by the outermost stop_requests


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Watch for SIGTERM and Ctrl-C while a run trains, or already while it is prepared.

    `fit` does so by itself where it has a run. Held around what a program does before that too, a
    stop asked for then is not lost: `fit` stops before its first step. With several processes hold
    it after `jax.distributed.initialize`.

    With several processes JAX hears SIGTERM on any one of them and names a step to all; here
    Ctrl-C only joins it. A second Ctrl-C ends the process at once, also while XLA compiles. Outside
    of the main thread, where Python cannot listen, nothing is watched.

    Returns: a context manager that yields `asked(step)`: whether to save after this step and stop;
      every process calls it with every step.
    Example:
      >>> with stop_requests() as asked:
      ...     os.kill(os.getpid(), signal.SIGTERM)
      ...     print(asked(3))
      True
    """
    global _watching
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    several = jax.process_count() > 1
    if _watching is not None:  # an outer one holds the handlers
        yield _asked(_watching, several)
        return
    requests = _watching = _Requests()

    def on_terminate(number: int, frame: object) -> None:
        requests.stop = True

    def on_interrupt(number: int, frame: object) -> None:
        requests.stop = True  # the rest is done by the thread

    def interrupted() -> None:
        if requests.interrupted:
            _end()
        requests.stop = requests.interrupted = True
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; Ctrl-C again stops without saving\n")
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    before = {signal.SIGINT: signal.signal(signal.SIGINT, on_interrupt)}
    if not several:  # with several, SIGTERM is JAX's: a handler here would silence it
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, on_terminate)
    try:
        with _listening({signal.SIGINT: interrupted}):
            yield _asked(requests, several)
    finally:
        _watching = None
        for number, handler in before.items():
            signal.signal(number, handler)


def _asked(requests: _Requests, several: bool) -> Callable[[int], bool]:
    if not several:
        return lambda step: requests.stop
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point


def _after_fork() -> None:
    # Ctrl-C reaches a forked child too, whose byte would count here as a second one.
    if _watching is not None:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def _listening(heard: dict[int, Callable[[], None]]) -> Iterator[None]:
    """Act on signals in a thread: Python's handlers wait while the main thread compiles."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)

    def listen() -> None:
        while (number := os.read(ours, 1)[0]) != _END:
            if number in heard:
                heard[number]()

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(theirs, bytes([_END]))
        thread.join()
        os.close(ours)
        os.close(theirs)


def _end() -> None:
    """End this process by SIGINT, from a thread, where signal.signal is not allowed."""
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h\n")  # the progress bar had hidden the cursor
    ctypes.CDLL(None).signal(signal.SIGINT, None)  # SIG_DFL
    os.kill(os.getpid(), signal.SIGINT)
