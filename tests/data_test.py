"""Tests of jax_attn.data: where text comes from, and which windows a step gets."""

import hashlib
import itertools
import pathlib
import re
import sysconfig

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_attn import data

BYTES = np.arange(251, dtype=np.uint8)

sizes = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(1, 41))


# The default text.


def test_default_text_is_large_utf8_and_keeps_a_tenth_or_so_out() -> None:
    text = data.load_text(T=127)
    assert 5e6 < text.train.size < 12e6
    assert 0.03 < text.heldout.size / text.train.size < 0.2
    for part in (text.train, text.heldout):
        content = part.tobytes()
        content.decode("utf-8")
        assert b"\r" not in content
        assert content.endswith(b"\n")
        assert not part.flags.writeable
    assert re.fullmatch(r"Python 3\.\d+\.\S+ standard library", text.name)


def stdlib_copy(root: pathlib.Path, files: list[str]) -> pathlib.Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"name = {name!r}\n")
    return root


def use_root(monkeypatch: pytest.MonkeyPatch, root: pathlib.Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(root)}.__getitem__)


FILES = [f"{package}module_{i}.py" for package in ("", "json/", "email/mime/") for i in range(23)]


def test_split_depends_on_relative_paths_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    one = stdlib_copy(tmp_path / "one", FILES)
    other = stdlib_copy(tmp_path / "another" / "deeper", FILES[::-1])
    link = tmp_path / "link"
    link.symlink_to(one, target_is_directory=True)
    texts = []
    for root in (one, other, link):
        use_root(monkeypatch, root)
        texts.append(data.load_text())
    assert len({text.sha256 for text in texts}) == 1
    assert len({text.heldout.tobytes() for text in texts}) == 1
    assert texts[0].train.size > texts[0].heldout.size > 0
    names = re.findall(r"'(.*?)'", texts[0].train.tobytes().decode())
    assert names == sorted(names)


def test_split_of_a_file_does_not_move_when_others_come_or_go(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    def heldout_names(files: list[str], root: str) -> set[str]:
        use_root(monkeypatch, stdlib_copy(tmp_path / root, files))
        return set(re.findall(r"'(.*?)'", data.load_text().heldout.tobytes().decode()))

    whole = heldout_names(FILES, "whole")
    less = heldout_names(FILES[::2], "less")
    assert less
    assert less == whole & set(FILES[::2])


def test_files_left_out_of_the_default_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    root = stdlib_copy(tmp_path, FILES)
    use_root(monkeypatch, root)
    before = data.load_text()
    left_out = ["test/test_os.py", "email/tests/a.py", "site-packages/numpy/b.py", "notes.txt"]
    left_out += ["__pycache__/c.py", "config-3.99-any/d.py", "_sysconfigdata__any.py"]
    stdlib_copy(root, left_out)
    (root / "latin.py").write_bytes(b"# \xe9\n")
    (root / "dangling.py").symlink_to(root / "nothing.py")
    assert data.load_text().sha256 == before.sha256
    stdlib_copy(root, ["found.py"])
    assert data.load_text().sha256 != before.sha256


def test_newlines_of_the_default_text_are_normalised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    root = stdlib_copy(tmp_path, FILES)
    use_root(monkeypatch, root)
    before = data.load_text()
    (root / FILES[3]).write_bytes(f"name = {FILES[3]!r}\r\n".encode())
    (root / FILES[5]).write_bytes(f"name = {FILES[5]!r}".encode())
    assert data.load_text().sha256 == before.sha256


def test_missing_standard_library_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    use_root(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=r"too little .* give the path of a UTF-8 text file"):
        data.load_text()


# A user's file.


def test_user_file_holds_out_its_last_lines(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "notes.txt"
    lines = [f"line {i} é\r\n" for i in range(101)]
    path.write_bytes("".join(lines).encode())
    text = data.load_text(path)
    content = "".join(lines).replace("\r\n", "\n").encode()
    assert text.train.tobytes() + text.heldout.tobytes() == content
    assert text.train.tobytes().endswith(b"\n")
    assert 0.1 <= text.heldout.size / len(content) <= 0.2
    assert text.name == "notes.txt"
    assert text.sha256 == hashlib.sha256(content).hexdigest()[:16]


def test_user_file_of_one_line_is_split_at_nine_tenths(tmp_path: pathlib.Path) -> None:
    (tmp_path / "line.txt").write_bytes(b"x" * 131)
    text = data.load_text(str(tmp_path / "line.txt"))
    assert (text.train.size, text.heldout.size) == (117, 14)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty; give a text file"),
        (b"abc\x00def", r"is not UTF-8 text \(byte 0x00 at offset 3\); .*iconv -t UTF-8"),
        (b"abcde\xff\x00", r"is not UTF-8 text \(byte 0xff at offset 5\)"),
        ("é".encode("latin-1"), r"is not UTF-8 text \(byte 0xe9 at offset 0\)"),
    ],
)
def test_bad_content_is_one_line(tmp_path: pathlib.Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        data.load_text(path)
    assert repr(str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_directory(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"two\\nlines.txt' does not exist; give the path"):
        data.load_text(tmp_path / "two\nlines.txt")
    with pytest.raises(ValueError, match=re.escape(f"{str(tmp_path)!r} is a directory; give one")):
        data.load_text(tmp_path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied"), "'a.txt' may not be read; change its permis"),
        (OSError(5, "Input/output error"), r"'a.txt' cannot be read \(Input/output error\); give"),
    ],
)
def test_unreadable_file(monkeypatch: pytest.MonkeyPatch, error: OSError, message: str) -> None:
    # Raised by hand: permissions do not stop a test that runs as root.
    def read_bytes(path: pathlib.Path) -> bytes:
        raise error

    monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
    with pytest.raises(ValueError, match=message):
        data.load_text("a.txt")


def test_file_too_short_for_a_window_names_the_part_and_both_sizes(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * 361)
    assert data.load_text(path, T=36).heldout.size == 37
    message = r"short.txt' has 37 held-out bytes but one window needs 65 \(T=64 and one more\); use"
    with pytest.raises(ValueError, match=message):
        data.load_text(path, T=64)
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"has 0 training bytes but one window needs 65"):
        data.load_text(path, T=64)


# Batches.


def test_batch_golden() -> None:
    # These numbers are the data of every run made so far: if they change, old runs cannot resume.
    tokens = data.batch(BYTES, 7, 11, B=5, T=3)
    golden = [[10, 11, 12, 13], [128, 129, 130, 131], [57, 58, 59, 60]]
    golden += [[14, 15, 16, 17], [7, 8, 9, 10]]
    assert tokens.tolist() == golden
    assert tokens.dtype == np.int32
    large = data.batch(BYTES, 2**64 - 1, 2**63 + 5, B=2, T=1)
    assert large.tolist() == [[100, 101], [42, 43]]


@given(sizes, st.integers(1, 97))
@settings(max_examples=50, deadline=None)
def test_batch_is_a_pure_function_of_seed_and_step(size: tuple[int, int, int], T: int) -> None:
    seed, step, B = size
    first = data.batch(BYTES, seed, step, B=B, T=T)
    data.batch(BYTES, seed, (step + 1) % 2**64, B=B, T=T)
    assert first.shape == (B, T + 1)
    np.testing.assert_array_equal(data.batch(BYTES, seed, step, B=B, T=T), first)
    # Every window is a run of consecutive bytes of the text.
    np.testing.assert_array_equal(np.diff(first, axis=1), 1)
    np.testing.assert_array_equal(data.batch(BYTES, seed, step, B=B + 3, T=T)[:B], first)


@given(sizes, st.lists(st.integers(0, 41), max_size=5), st.integers(1, 7))
@settings(max_examples=50, deadline=None)
def test_shards_make_the_whole(size: tuple[int, int, int], cuts: list[int], stride: int) -> None:
    seed, step, B = size
    whole = data.batch(BYTES, seed, step, B=B, T=5)
    edges = [0, *sorted(min(cut, B) for cut in cuts), B]
    shards = [
        data.batch(BYTES, seed, step, B=B, T=5, rows=slice(a, b))
        for a, b in itertools.pairwise(edges)
    ]
    np.testing.assert_array_equal(np.concatenate(shards), whole)
    strided = data.batch(BYTES, seed, step, B=B, T=5, rows=range(0, B, stride))
    np.testing.assert_array_equal(strided, whole[::stride])
    reverse = data.batch(BYTES, seed, step, B=B, T=5, rows=range(B - 1, -1, -1))
    np.testing.assert_array_equal(reverse, whole[::-1])


def test_seeds_steps_and_rows_differ() -> None:
    text_bytes = np.frombuffer(np.random.default_rng(0).bytes(100_003), np.uint8)
    drawn = [data.batch(text_bytes, s, t, B=13, T=17) for s in range(5) for t in range(7)]
    # seed and step must not be interchangeable: (1, 2) is not (2, 1).
    assert len({row.tobytes() for tokens in drawn for row in tokens}) == 5 * 7 * 13


def test_windows_start_everywhere_equally_often() -> None:
    T = 6
    text_bytes = np.arange(T + 29, dtype=np.uint8)
    starts = np.concatenate([data.batch(text_bytes, 3, t, B=29, T=T)[:, 0] for t in range(300)])
    counts = np.bincount(starts, minlength=29)
    assert counts.size == 29
    # Chi-square with 28 degrees of freedom: 56.9 is exceeded once in 1,000 seeds.
    assert np.sum((counts - 300) ** 2 / 300) < 56.9


def test_one_window_that_just_fits() -> None:
    tokens = data.batch(BYTES[:8], 0, 0, B=3, T=7)
    assert tokens.tolist() == [list(range(8))] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": 0}, "B must be at least 1, got 0"),
        ({"B": 2.5}, "B must be an integer, got 2.5"),
        ({"T": -3}, "T must be at least 1, got -3"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 2**64}, r"seed must be below 2\*\*64, got 18446744073709551616"),
        ({"step": -7}, "step must be at least 0, got -7"),
        ({"step": 2**64}, r"step must be below 2\*\*64"),
        ({"T": 251}, r"text_bytes has 251 bytes but one window needs 252 \(T=251 and one more\)"),
        ({"text_bytes": BYTES.astype(np.int32)}, "must be a NumPy array of uint8, got int32"),
        ({"text_bytes": b"abc"}, "must be a NumPy array of uint8, got bytes"),
        ({"text_bytes": BYTES[None]}, r"must have one axis, got shape \(1, 251\)"),
        ({"rows": range(3, 6)}, r"rows must lie in range\(0, 5\), got range\(3, 6\)"),
        ({"rows": range(-1, 2)}, r"rows must lie in range\(0, 5\)"),
        ({"rows": [0, 1]}, r"rows must be a slice, a range or None, got \[0, 1\]"),
    ],
)
def test_batch_rejects(change: dict, message: str) -> None:
    arguments = {"text_bytes": BYTES, "seed": 0, "step": 0, "B": 5, "T": 3} | change
    with pytest.raises(ValueError, match=message):
        data.batch(**arguments)


# Evaluation windows.


@given(st.integers(1, 7), st.integers(1, 11), st.integers(1, 5), st.integers(0, 53))
@settings(max_examples=50, deadline=None)
def test_windows_are_disjoint_and_evenly_spaced(B: int, T: int, count: int, spare: int) -> None:
    total = B * count
    length = total * (T + 1) + spare
    # Positions modulo a prime far above T + 1: no two windows in a row hold the same bytes.
    text_bytes = (np.arange(length) % 241).astype(np.uint8)
    got = data.windows(text_bytes, B=B, T=T, count=count)
    assert got.shape == (count, B, T + 1)
    assert got.dtype == np.int32
    starts = [i * (length - T - 1) // max(total - 1, 1) for i in range(total)]
    expected = [text_bytes[start : start + T + 1].tolist() for start in starts]
    assert got.reshape(total, T + 1).tolist() == expected
    gaps = np.diff(starts)
    assert (gaps >= T + 1).all()
    assert total == 1 or starts[-1] + T + 1 == length
    assert total < 3 or gaps.max() - gaps.min() <= 1


def test_windows_rejects() -> None:
    message = r"has 251 bytes but count=3 batches of B=5 windows of T \+ 1 = 17 need 255"
    with pytest.raises(ValueError, match=message):
        data.windows(BYTES, B=5, T=16, count=3)
    with pytest.raises(ValueError, match="one window needs 252"):
        data.windows(BYTES, B=1, T=251, count=1)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        data.windows(BYTES, B=5, T=16, count=0)


# Strings.


@given(st.text())
def test_decode_inverts_encode(text: str) -> None:
    tokens_T = data.encode(text)
    assert tokens_T.dtype == np.int32
    assert tokens_T.tolist() == list(text.encode())
    assert data.decode(tokens_T) == text


def test_decode_replaces_what_is_not_utf8_and_rejects_what_is_no_byte() -> None:
    assert data.decode([97, 0xC3, 98]) == "a\ufffdb"
    assert data.decode([]) == ""
    with pytest.raises(ValueError, match=r"must lie in \[0, 256\), got 256"):
        data.decode([97, 256])
    with pytest.raises(ValueError, match=r"must lie in \[0, 256\), got -1"):
        data.decode([-1])
    with pytest.raises(ValueError, match="must be integers, got dtype float64"):
        data.decode([1.0])
    with pytest.raises(ValueError, match=r"must have one axis, got shape \(1, 2\)"):
        data.decode([[1, 2]])
    with pytest.raises(ValueError, match="surrogates"):
        data.encode("\ud800")
