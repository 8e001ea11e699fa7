"""Stop when asked: SIGTERM and Ctrl-C become one save at one step that all processes share."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax

STOPPED, DIVERGED = 75, 76  # exit codes: start me again; do not


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


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Watch for SIGTERM and Ctrl-C while a run trains.

    With several processes JAX hears SIGTERM on any one of them and names a step to all; here
    Ctrl-C only joins it. A second Ctrl-C ends the process at once. Outside of the main thread,
    where Python cannot listen, nothing is watched.

    Returns: a context manager that yields `asked(step)`: whether to save after this step and stop;
      every process calls it with every step.
    Example:
      >>> with stop_requests() as asked:
      ...     os.kill(os.getpid(), signal.SIGTERM)
      ...     print(asked(3))
      True
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    several = jax.process_count() > 1
    asked, interrupted = False, False

    def on_terminate(number: int, frame: object) -> None:
        nonlocal asked
        asked = True

    def on_interrupt(number: int, frame: object) -> None:
        nonlocal asked, interrupted
        if interrupted:
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # the progress bar had hidden the cursor
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        asked = interrupted = True
        os.write(2, b"\nstopping after this step; Ctrl-C again stops without saving\n")
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    before = {signal.SIGINT: signal.signal(signal.SIGINT, on_interrupt)}
    if not several:  # with several, SIGTERM is JAX's: a handler here would silence it
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, on_terminate)
    try:
        if several:
            from jax.experimental import multihost_utils

            yield multihost_utils.reached_preemption_sync_point
        else:
            yield lambda step: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
