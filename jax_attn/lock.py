"""A file that one process holds at a time, let go of by the kernel however that process ends."""

import contextlib
import fcntl
import pathlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def hold(path: pathlib.Path, taken: Exception) -> Iterator[None]:
    """Hold a file while the body runs.

    On a file system without locks (some network mounts) it is held against nobody, with a warning.

    Args:
      path: the file, made if it is not there, and left there with what it holds.
      taken: what is raised if another process holds it.
    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with hold(pathlib.Path(folder, ".lock"), RuntimeError("another process is at work")):
      ...         print("alone")
      alone
    """
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise taken from None
        except OSError as error:
            warnings.warn(
                f"{path} cannot be locked ({error}): see that no other process uses its folder",
                stacklevel=3,  # past contextlib, to who asked
            )
        yield
