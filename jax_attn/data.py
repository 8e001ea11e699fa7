"""Byte-level text, and training batches that are pure functions of (seed, step).

A token is one byte, so the vocabulary has V = 256 entries and no tokenizer is needed. There is no
iterator state: the batch of step 1000 is made without making the 999 before it, so a run can stop,
resume or move to other machines and still see the same data.
"""

import dataclasses
import hashlib
import operator
import os
import pathlib
import platform
import sysconfig

import numpy as np
import numpy.typing as npt

VOCABULARY = 256

# Held out: one file in ten of the default text, one tenth of a user's file.
_TENTHS = 10

# Kept out of the default text: tests and third-party packages, tables no person wrote, and packages
# that distributors often ship separately, which would make the text depend on what is installed.
_LEFT_OUT_DIRECTORIES = frozenset(
    {
        "__phello__",
        "__pycache__",
        "dist-packages",
        "distutils",
        "encodings",
        "ensurepip",
        "idle_test",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "tkinter",
        "turtledemo",
    }
)
# These two name the machine that built Python or are written by its administrator.
_LEFT_OUT_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """Hold one text, split into a part to train on and a part to evaluate on.

    Attributes:
      train: bytes to train on, uint8, one axis, read-only.
      heldout: bytes never trained on, uint8, one axis, read-only.
      name: what the text is; names the Python version when the text is Python's own source.
      sha256: first 16 hex digits of the SHA-256 of `train` followed by `heldout`: the fingerprint
        to record beside every number measured on this text.
    Example:
      >>> Text(np.zeros(7, np.uint8), np.zeros(3, np.uint8), "zeros", "01d448afd9280654").name
      'zeros'
    """

    train: npt.NDArray[np.uint8]
    heldout: npt.NDArray[np.uint8]
    name: str
    sha256: str


def load_text(path: str | os.PathLike[str] | None = None, *, T: int | None = None) -> Text:
    r"""Load a UTF-8 text file, or Python's own standard library when no file is given.

    The default needs no network: it is the standard library's `.py` files in the order of their
    relative paths, without tests, generated tables and separately packaged parts (about 8 MB).
    One file in ten is held out, chosen by a hash of its relative path alone. This text differs
    between Python versions: a number measured on it must name the version and `Text.sha256`.

    Of a user's file the last tenth is held out, extended back to the start of a line when a line
    starts in the tenth before it. Newlines become `\n` in either case.

    Args:
      path: a text file; None takes the standard library.
      T: window length that batches will be asked for; both parts must hold one window of T + 1
        bytes. None checks nothing here, `batch` and `windows` check again.
    Returns: the `Text`.
    Raises: ValueError, in one line that names the file and says what to do: the file is missing, a
      directory, unreadable, empty, not UTF-8 text, or too short for a window.
    Example:
      >>> text = load_text(T=64)
      >>> text.train.dtype, text.train.ndim, text.train.size > 8 * text.heldout.size
      (dtype('uint8'), 1, True)
    """
    if T is not None:
        T = _at_least("T", T, 1)
    if path is None:
        shown, name = "the standard library", f"Python {platform.python_version()} standard library"
        train, heldout = _read_standard_library()
    else:
        # repr keeps the message on one line whatever the path holds.
        shown, name = repr(os.fspath(path)), pathlib.Path(path).name
        train, heldout = _split_tail(_read_file(path))
    for part, held in (("training", train), ("held-out", heldout)):
        if T is not None and len(held) < T + 1:
            raise ValueError(
                f"{shown} has {len(held)} {part} bytes but one window needs {T + 1} "
                f"(T={T} and one more); use a longer text or a smaller T"
            )
    return Text(
        train=np.frombuffer(train, np.uint8),
        heldout=np.frombuffer(heldout, np.uint8),
        name=name,
        sha256=hashlib.sha256(train + heldout).hexdigest()[:16],
    )


def batch(
    text_bytes: npt.NDArray[np.uint8],
    seed: int,
    step: int,
    *,
    B: int,
    T: int,
    rows: slice | range | None = None,
) -> npt.NDArray[np.int32]:
    """Cut B windows of T + 1 bytes at random places, as a pure function of (seed, step).

        start[b] = word b of Philox(key = (seed, step))  mod  (bytes - T)

    Row b depends on (text, T, seed, step, b) and on nothing else, so each host makes just its rows
    and a larger B keeps the rows of a smaller one. Only Philox's raw words are used: NumPy promises
    that stream for all versions, unlike the streams of `Generator`'s methods. The remainder's bias
    is below bytes / 2**64. Inputs are `[:, :-1]`, targets `[:, 1:]`.

    Args:
      text_bytes: uint8, one axis, at least T + 1 bytes; `Text.train`.
      seed: 0 <= seed < 2**64.
      step: 0 <= step < 2**64; the number of updates made so far.
      B: windows in the whole batch.
      T: inputs (and targets) in a window.
      rows: which of the B windows to make, for instance `slice(start, stop)`; None makes all.
    Returns: [B, T + 1] int32 in [0, 256), or [len(rows), T + 1].
    Raises: ValueError naming the argument and its value.
    Example:
      >>> text_bytes = np.arange(101, dtype=np.uint8)
      >>> whole = batch(text_bytes, 0, 3, B=5, T=7)
      >>> whole.shape, (whole[:, 1:] == whole[:, :-1] + 1).all().item()
      ((5, 8), True)
      >>> bool((batch(text_bytes, 0, 3, B=5, T=7, rows=slice(2, 5)) == whole[2:]).all())
      True
    """
    B, T = _at_least("B", B, 1), _at_least("T", T, 1)
    key = [_at_least(name, value, 0) for name, value in (("seed", seed), ("step", step))]
    for name, value in zip(("seed", "step"), key, strict=True):
        if value >= 2**64:
            raise ValueError(f"{name} must be below 2**64, got {value}")
    _check_text(text_bytes, T)
    if rows is not None and not isinstance(rows, slice | range):
        raise ValueError(f"rows must be a slice, a range or None, got {rows!r}")
    if isinstance(rows, range) and len(rows) and not 0 <= min(rows) <= max(rows) < B:
        raise ValueError(f"rows must lie in range(0, {B}), got {rows}")
    chosen = rows if isinstance(rows, range) else range(B)[rows or slice(None)]
    # Words before the first chosen row are drawn and dropped: nanoseconds each, and one code path.
    words = np.random.Philox(key=np.array(key, np.uint64)).random_raw(B)
    starts_B = (words % np.uint64(text_bytes.size - T)).astype(np.int64)
    return _cut(text_bytes, starts_B[np.array(chosen, np.int64)], T)


def windows(
    text_bytes: npt.NDArray[np.uint8], *, B: int, T: int, count: int
) -> npt.NDArray[np.int32]:
    """Cut `count` batches of evenly spaced windows that share no byte, for evaluation.

        start[i] = floor(i * (bytes - T - 1) / (count * B - 1)),   i = 0 ... count * B - 1

    The first window starts at the first byte; with more than one, the last ends at the last byte.
    Inputs are `[..., :-1]`, targets `[..., 1:]`.

    Args:
      text_bytes: uint8, one axis; `Text.heldout`.
      B: windows in a batch.
      T: inputs (and targets) in a window.
      count: batches.
    Returns: [count, B, T + 1] int32 in [0, 256).
    Raises: ValueError naming the argument and its value, or both sizes when the text is too short.
    Example:
      >>> windows(np.arange(11, dtype=np.uint8), B=1, T=2, count=3).tolist()
      [[[0, 1, 2]], [[4, 5, 6]], [[8, 9, 10]]]
    """
    B, T, count = _at_least("B", B, 1), _at_least("T", T, 1), _at_least("count", count, 1)
    _check_text(text_bytes, T)
    total = count * B
    if text_bytes.size < total * (T + 1):
        raise ValueError(
            f"text_bytes has {text_bytes.size} bytes but count={count} batches of B={B} windows of "
            f"T + 1 = {T + 1} need {total * (T + 1)}; use a longer text or fewer windows"
        )
    starts = np.arange(total, dtype=np.int64) * (text_bytes.size - T - 1) // max(total - 1, 1)
    return _cut(text_bytes, starts, T).reshape(count, B, T + 1)


def encode(text: str) -> npt.NDArray[np.int32]:
    """Turn a string into tokens: the bytes of its UTF-8 form.

    Args:
      text: any string without lone surrogates.
    Returns: [T] int32 in [0, 256); T is the number of bytes, not of characters.
    Raises: ValueError naming a character that UTF-8 cannot hold.
    Example:
      >>> encode("mat é").tolist()
      [109, 97, 116, 32, 195, 169]
    """
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)


def decode(tokens_T: npt.ArrayLike) -> str:
    """Turn tokens back into a string; bytes that are not UTF-8 become the replacement character.

    Args:
      tokens_T: [T] integers in [0, 256), a NumPy or JAX array or a list.
    Returns: the string.
    Raises: ValueError naming the shape, the dtype or the first token out of range.
    Example:
      >>> decode(encode("the mat")), decode([104, 105, 255])
      ('the mat', 'hi\ufffd')
    """
    tokens_T = np.asarray(tokens_T)
    if tokens_T.ndim != 1:
        raise ValueError(f"tokens_T must have one axis, got shape {tokens_T.shape}")
    if tokens_T.size == 0:
        return ""
    if not np.issubdtype(tokens_T.dtype, np.integer):
        raise ValueError(f"tokens_T must be integers, got dtype {tokens_T.dtype}")
    outside = tokens_T[(tokens_T < 0) | (tokens_T >= VOCABULARY)]
    if outside.size:
        raise ValueError(f"tokens_T must lie in [0, {VOCABULARY}), got {outside[0]}")
    return tokens_T.astype(np.uint8).tobytes().decode("utf-8", errors="replace")


def _at_least(name: str, value: int, least: int) -> int:
    """Return `value` as an int, or raise naming the argument."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def _check_text(text_bytes: npt.NDArray[np.uint8], T: int) -> None:
    """Raise unless `text_bytes` is a byte array that holds one window."""
    if not isinstance(text_bytes, np.ndarray) or text_bytes.dtype != np.uint8:
        got = getattr(text_bytes, "dtype", type(text_bytes).__name__)
        raise ValueError(f"text_bytes must be a NumPy array of uint8, got {got}")
    if text_bytes.ndim != 1:
        raise ValueError(f"text_bytes must have one axis, got shape {text_bytes.shape}")
    if text_bytes.size < T + 1:
        raise ValueError(
            f"text_bytes has {text_bytes.size} bytes but one window needs {T + 1} "
            f"(T={T} and one more); use a longer text or a smaller T"
        )


def _cut(
    text_bytes: npt.NDArray[np.uint8], starts_B: npt.NDArray[np.int64], T: int
) -> npt.NDArray[np.int32]:
    """Gather the windows of T + 1 bytes that begin at `starts_B`."""
    every = np.lib.stride_tricks.sliding_window_view(text_bytes, T + 1)
    return every[starts_B].astype(np.int32)


def _unix_newlines(content: bytes) -> bytes:
    return content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _read_file(path: str | os.PathLike[str]) -> bytes:
    """Read one UTF-8 text file; every way this can fail becomes a one-line ValueError."""
    shown = repr(os.fspath(path))
    try:
        content = pathlib.Path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{shown} does not exist; give the path of a UTF-8 text file") from None
    except IsADirectoryError:
        raise ValueError(f"{shown} is a directory; give one text file inside it") from None
    except PermissionError:
        raise ValueError(f"{shown} may not be read; change its permissions or owner") from None
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ValueError(f"{shown} cannot be read ({why}); give another text file") from None
    if not content:
        raise ValueError(f"{shown} is empty; give a text file with something in it")
    # A NUL byte is valid UTF-8, but means a binary file (or UTF-16).
    at = content.find(b"\0")
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start if at < 0 else min(at, error.start)
    if at >= 0:
        raise ValueError(
            f"{shown} is not UTF-8 text (byte {content[at]:#04x} at offset {at}); "
            "give a text file, or convert this one with iconv -t UTF-8"
        )
    return _unix_newlines(content)


def _split_tail(content: bytes) -> tuple[bytes, bytes]:
    """Split off the last tenth, or a little more to begin it at the start of a line."""
    latest = len(content) * (_TENTHS - 1) // _TENTHS
    earliest = len(content) * (_TENTHS - 2) // _TENTHS
    cut = content.rfind(b"\n", earliest, latest) + 1 or latest
    return content[:cut], content[cut:]


def _is_heldout(relative: str) -> bool:
    """Decide from the relative path alone, so that no other file can move this one across."""
    digest = hashlib.sha256(relative.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % _TENTHS == 0


def _standard_library_files(root: pathlib.Path) -> list[str]:
    """List the relative POSIX paths of the default text's files, sorted."""
    found: list[str] = []
    for directory, below, files in os.walk(root):
        below[:] = [
            d for d in below if d not in _LEFT_OUT_DIRECTORIES and not d.startswith("config-")
        ]
        for file in files:
            full = pathlib.Path(directory, file)
            # is_file: a distribution may leave a dangling link behind.
            if full.suffix == ".py" and not file.startswith(_LEFT_OUT_PREFIXES) and full.is_file():
                found.append(full.relative_to(root).as_posix())
    return sorted(found)


def _read_standard_library() -> tuple[bytes, bytes]:
    """Return the training and the held-out bytes of Python's own source."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for relative in _standard_library_files(root):
        content = (root / relative).read_bytes()
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        content = _unix_newlines(content)
        if content and not content.endswith(b"\n"):
            content += b"\n"
        parts[_is_heldout(relative)].append(content)
    train, heldout = (b"".join(part) for part in parts)
    if not train or not heldout:
        raise ValueError(
            f"{str(root)!r} holds too little of Python's standard library as .py files; "
            "give the path of a UTF-8 text file instead"
        )
    return train, heldout
