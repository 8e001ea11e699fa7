"""Tests of jax_attn.view: what a page holds, and the pictures. view_page_test.py opens pages."""

import html.parser
import json
import math
import pathlib
import subprocess
import sys
import unicodedata
from base64 import b64decode
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jax_attn import view
from jax_attn.view import colors, glyphs, maps, packing, summary

L, N, T, S = 2, 3, 7, 11
RNG = np.random.default_rng(0)
WORDS = ("the", " cat", " sat", "\n", " on", " a", " mat", " and", " slept", ".", "\t")
EVIL = (
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=\"window.hacked=1\">",
    "'\"&amp;<!--",
    "{{maps}}",
    "a\u202eb\u2028\ud800\x00",
    "猫🐈",
    "",
)  # fmt: skip


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).astype(np.float32)


def causal_LNTT() -> np.ndarray:
    logits_LNTT = 2 * np.random.default_rng(3).normal(size=(L, N, T, T))
    return softmax(np.where(np.tril(np.ones((T, T), bool)), logits_LNTT, -np.inf))


def cross_LNTS() -> np.ndarray:
    """Other keys than queries; one row fully masked, one with a sink."""
    weights_LNTS = softmax(2 * np.random.default_rng(4).normal(size=(L, N, T, S)))
    weights_LNTS[:, :, 2] = 0
    weights_LNTS[:, :, 3] *= 0.5
    return weights_LNTS


class Parsed(html.parser.HTMLParser):
    """A page as a browser's parser reads it: its elements, and the text of scripts by id."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: dict[str, str] = {}
        self.title = ""
        self._at = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.facts = json.loads(self.scripts["page"])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._at = dict(attrs).get("id") or tag

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["script"]:
            self.scripts[self._at] = self.scripts.get(self._at, "") + data
        elif self._at == "title":
            self.title += data

    def handle_endtag(self, tag: str) -> None:
        self._at = ""

    def map(self, number: int) -> np.ndarray:
        bits = round(math.log2(self.facts["levels"] + 1))
        packed = b64decode(self.scripts[f"map-{number}"])
        return packing.unpack_map(packed, self.facts["T"], self.facts["S"], bits)


# What the page holds.


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 9.0, 300.0])
def test_packed_maps_stay_within_the_stated_error(bits: int, sharpness: float) -> None:
    weights_TS = softmax(sharpness * RNG.normal(size=(T, 509)))
    weights_TS[1] *= 1e-30
    weights_TS[2] = 0
    weights_TS[:, 5] = 0
    read_TS = packing.unpack_map(packing.pack_map(weights_TS, bits), T, 509, bits)
    largest_T = weights_TS.max(-1, keepdims=True)
    assert (abs(read_TS - weights_TS) <= packing.error(bits) * largest_T).all()
    np.testing.assert_array_equal(read_TS == 0, weights_TS == 0)
    np.testing.assert_allclose(read_TS.max(-1), weights_TS.max(-1), rtol=1e-6)
    if bits == 8:  # what the docstring says of weights above 1 % of the largest
        some = weights_TS > 0.01 * largest_T
        assert (abs(read_TS - weights_TS)[some] <= 0.03 * weights_TS[some]).all()


def test_page_holds_every_map(tmp_path: pathlib.Path) -> None:
    weights_LNTS = cross_LNTS()
    path = view.attention_html(WORDS[:T], weights_LNTS, tmp_path / "a.html", key_tokens=WORDS)
    assert path == tmp_path / "a.html"
    parsed = Parsed(path)
    for number in range(L * N):
        wanted = weights_LNTS[divmod(number, N)]
        np.testing.assert_allclose(parsed.map(number), wanted, atol=packing.error(16))
    assert parsed.facts["keys"] == [glyphs.visible(word) for word in WORDS]
    (sink,) = [x for x in parsed.facts["statistics"] if x["title"] == "weight on sink"]
    np.testing.assert_allclose(sink["values"], 0.5 / (T - 1), rtol=1e-5)


def test_a_reader_and_a_device_array_give_the_same_page(tmp_path: pathlib.Path) -> None:
    weights_LNTT = causal_LNTT()
    calls = []

    def read(layer: int, head: int) -> Any:
        calls.append((layer, head))
        return jnp.asarray(weights_LNTT[layer, head])

    tokens = WORDS[:T]
    plain = view.attention_html(tokens, weights_LNTT, tmp_path / "plain.html")
    made = view.attention_html(tokens, read, tmp_path / "reader.html", L=L, N=N)
    device = view.attention_html(tokens, jnp.asarray(weights_LNTT), tmp_path / "device.html")
    assert plain.read_bytes() == made.read_bytes() == device.read_bytes()
    assert calls == [(layer, head) for layer in range(L) for head in range(N)]


def test_tokens_are_never_markup(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.html"
    plain = Parsed(view.attention_html(["x"] * T, causal_LNTT(), path, title="x"))
    statistics = {EVIL[0]: np.ones((L, N))}
    evil = Parsed(
        view.attention_html(EVIL, causal_LNTT(), path, title=EVIL[0], statistics=statistics)
    )
    assert evil.tags == plain.tags
    assert evil.title == EVIL[0]
    assert evil.facts["queries"] == [glyphs.visible(token) for token in EVIL]
    assert evil.facts["statistics"][-1]["title"] == EVIL[0]


def test_every_character_can_be_seen() -> None:
    for code in range(0x11000):
        shown = glyphs.visible(chr(code))
        assert len(shown.split()) == 1, hex(code)
        unseen = [c for c in shown if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zs", "Zl"}]
        assert not unseen, hex(code)
    assert glyphs.visible("👩\u200d🚀") == "👩\u200d🚀"
    assert glyphs.visible("\u0301a") == "◌\u0301a"


def test_given_statistics_replace_those_of_the_maps(tmp_path: pathlib.Path) -> None:
    given = {"distance": np.full((L, N), 8.0), "mine": np.full((L, N), np.nan)}
    path = view.attention_html(WORDS[:T], causal_LNTT(), tmp_path / "a.html", statistics=given)
    shown = {x["title"]: x["values"] for x in Parsed(path).facts["statistics"]}
    assert shown["distance"] == [8.0] * (L * N)
    assert shown["mine"] == [None] * (L * N)
    assert list(shown)[-1] == "mine"
    assert "weight on sink" not in shown


def test_statistics_match_their_definitions() -> None:
    weights_TS, q_offset = cross_LNTS()[1, 2].astype(np.float64), 3
    rows = []
    for t in (0, 1, 3, 4, 5, 6):  # row 2 is masked
        p_S, at = weights_TS[t], t + q_offset
        shares = [*p_S, 1 - p_S.sum()]
        rows.append(
            {
                "entropy": -sum(p * math.log(p) for p in shares if p > 0),
                "max_prob": max(p_S),
                "expected_distance": sum(p * (s - at) for s, p in enumerate(p_S)),
                "first_mass": p_S[0],
                "previous_mass": p_S[at - 1],
                "self_mass": p_S[at],
                "sink_mass": max(0, 1 - sum(p_S)),
            }
        )
    made = summary.summarize_map(weights_TS, q_offset)
    wanted = {name: np.mean([row[name] for row in rows]) for name in rows[0]}
    assert made == pytest.approx(wanted, abs=1e-6)
    assert "self_mass" not in summary.summarize_map(weights_TS, None)
    assert all(np.isnan(x) for x in summary.summarize_map(0 * weights_TS, 0).values())


@pytest.mark.parametrize(
    ("put", "says"),
    [
        (np.nan, "layer 1, head 2, row 4 has NaN at key 3"),
        (np.inf, "layer 1, head 2, row 4 has infinity at key 3"),
        (-0.25, "layer 1, head 2, row 4 has a negative weight at key 3: -0.25"),
        (2.0, "layer 1, head 2, row 4 sums to "),
    ],
)
def test_what_is_no_probability_is_named_and_the_old_page_stays(
    put: float, says: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "a.html"
    path.write_text("old")
    weights_LNTT = causal_LNTT()
    weights_LNTT[1, 2, 4, 3] = put
    with pytest.raises(ValueError, match=says):
        view.attention_html(WORDS[:T], weights_LNTT, path)
    with pytest.raises(ValueError, match=says):
        view.plot_heads(weights_LNTT)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_rows_of_16_bit_weights_may_round_above_one() -> None:
    thirds = jnp.full((1, 3), 1 / 3, jnp.bfloat16)
    assert float(thirds.astype(jnp.float32).sum()) > 1.001
    assert maps.checked(thirds, 0, 0).shape == (1, 3)
    with pytest.raises(ValueError, match=r"row 0 sums to 1\.002"):
        maps.checked(np.full((1, 3), 1.002 / 3), 0, 0)


def test_wrong_arguments_are_named(tmp_path: pathlib.Path) -> None:
    tokens, weights_LNTS, path = WORDS[:T], cross_LNTS(), tmp_path / "a.html"
    same_LNTT: Any = causal_LNTT()
    write: Any = view.attention_html
    for says, call in {
        "tokens has T=6 but weights_LNTS has T=7": lambda: write(tokens[1:], same_LNTT, path),
        "weights_LNTS has T=7 but S=11; give key_tokens": lambda: write(tokens, weights_LNTS, path),
        "key_tokens has S=7 but weights_LNTS has S=11": lambda: write(
            tokens, weights_LNTS, path, key_tokens=tokens
        ),
        r"tokens\[1\] must be a str, got int": lambda: write(["a", 3] * 4, same_LNTT, path),
        "tokens is empty": lambda: write([], same_LNTT, path),
        "weights_LNTS has N=0": lambda: write(tokens, same_LNTT[:, :0], path),
        "weights_LNTS needs rank 4": lambda: write(tokens, same_LNTT[0], path),
        "must be floating point, got int64": lambda: write(tokens, same_LNTT.astype(int), path),
        r"statistics: 'x' must be \[L, N\] = \(2, 3\)": lambda: write(
            tokens, same_LNTT, path, statistics={"x": np.ones((3, 2))}
        ),
        r"N \(query heads\) must be an int >= 1": lambda: write(tokens, lambda l, n: 0, path, L=2),
        r"weights_LNTS\(0, 0\) must return \[T, S\]": lambda: write(
            tokens, lambda l, n: 0, path, L=1, N=1
        ),
        r"weights_LNTS\(0, 0\) has \(T, S\) = \(7, 7\) but there are 5 tokens": lambda: write(
            tokens[:5], lambda l, n: same_LNTT[l, n], path, L=1, N=1
        ),
        "title must be a str, got None": lambda: write(tokens, same_LNTT, path, title=None),
        "path must be that of a file, got None": lambda: write(tokens, same_LNTT, None),
        "q_offset must be an int or None": lambda: write(tokens, same_LNTT, path, q_offset="a"),
        "statistics: .* are one; leave one out": lambda: write(
            tokens,
            same_LNTT,
            path,
            statistics={"distance": np.ones((2, 3)), "expected_distance": np.ones((2, 3))},
        ),
        "L=5 but weights_LNTS has L=2": lambda: write(tokens, same_LNTT, path, L=5),
    }.items():
        with pytest.raises(ValueError, match=says):
            call()
    with pytest.raises(FileNotFoundError, match=r"the folder '.*none' does not exist"):
        write(tokens, same_LNTT, tmp_path / "none" / "a.html")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write(tokens, same_LNTT, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_colour_scale_changes_lightness_by_equal_steps() -> None:
    for dark in (False, True):
        # Every 15th colour: neighbours differ by what 8 bits round.
        linear = ((colors.ramp(dark=dark)[::15] / 255.0 + 0.055) / 1.055) ** 2.4
        lightness = 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16
        steps = np.diff(lightness) * (1 if dark else -1)
        assert steps.min() > 3
        assert steps.max() < 1.7 * steps.min()


def test_importing_the_library_leaves_matplotlib_alone() -> None:
    code = "import sys, jax_attn.view; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parents[1])


# Pictures.


def shown_by(ax: Any, masked: float) -> np.ndarray:
    return np.ma.filled(ax.get_images()[0].get_array(), masked)


def test_a_grid_shows_every_map_and_names_it_once(tmp_path: pathlib.Path) -> None:
    weights_LNTS = cross_LNTS()
    path = tmp_path / "a.png"
    tokens = ["$x", " y_$", *WORDS[:5]]
    figure = view.plot_heads(weights_LNTS, path, tokens=tokens, key_tokens=WORDS)
    assert path.read_bytes().startswith(b"\x89PNG")
    *panels, bar = figure.axes
    for ax, weights_TS in zip(panels, weights_LNTS.reshape(L * N, T, S), strict=True):
        shown = shown_by(ax, -1)
        np.testing.assert_array_equal(shown, np.where(weights_TS == 0, -1, weights_TS))
        assert not ax.get_title()
    assert [text.get_text() for text in figure.texts] == ["head 0", "layer 0", "1", "2", "1"]
    labels = [text.get_text() for text in panels[0].get_yticklabels()]
    assert labels == [glyphs.visible(token) for token in tokens]
    assert not panels[1].get_yticklabels()
    assert not panels[N].get_xticklabels()
    assert bar.get_xlabel() == "weight"
    assert figure.get_size_inches()[0] == 6.75


def test_chosen_heads_are_read_alone_and_titled() -> None:
    calls = []

    def read(layer: int, head: int) -> np.ndarray:
        calls.append((layer, head))
        return causal_LNTT()[layer, head]

    values = {"entropy": np.arange(6.0).reshape(L, N), "$my$": -np.ones((L, N))}
    figure = view.plot_heads(read, heads=[(1, 2), (0, 1)], statistics=values, L=L, N=N, limit=0.5)
    assert calls == [(1, 2), (0, 1)]
    titles = [ax.get_title() for ax in figure.axes[:2]]
    assert titles[0] == "layer 1, head 2\nentropy 5 nats\n$my$ −1"
    assert titles[1].startswith("layer 0, head 1\nentropy 1 nats")
    assert figure.axes[0].get_images()[0].norm.vmax == 0.5
    figure.canvas.draw()


def test_a_shrunk_map_keeps_thin_lines() -> None:
    previous = np.eye(1999, k=-1, dtype=np.float32)
    figure = view.plot_heads(previous[None, None], width=3.3)
    shown = shown_by(figure.axes[0], 0)
    assert 100 < len(shown) < 500
    assert (np.diag(shown) == 1).all()
    assert shown.mean() < 3 / len(shown)
    np.testing.assert_array_equal(
        maps.largest_in_blocks(np.arange(35.0).reshape(5, 7), 2, 3), [[8, 10, 13], [29, 31, 34]]
    )


def test_pictures_refuse_what_has_no_room() -> None:
    weights_LNTT = causal_LNTT()
    heads: Any = view.plot_heads
    for says, call in {
        "tokens has T=6 but weights_LNTS has T=7": lambda: heads(weights_LNTT, tokens=WORDS[:6]),
        "leave .* points for a token": lambda: heads(weights_LNTT, tokens=WORDS[:7], width=1.2),
        r"heads: \(2, 0\) is no \(layer, head\) of L=2, N=3": lambda: heads(
            weights_LNTT, heads=[(2, 0)]
        ),
        "what stands above them needs 0.75": lambda: heads(
            weights_LNTT, heads=[(0, 0)] * 8, columns=8
        ),
        "columns must be an int >= 1": lambda: heads(weights_LNTT, columns=0),
        "limit must be a number above 0": lambda: heads(weights_LNTT, limit=-1),
        "heads is empty": lambda: heads(weights_LNTT, heads=[]),
        r"heads: 0 is no \(layer, head\)": lambda: heads(weights_LNTT, heads=[0, 1]),
        r"heads: \(0.7, 0\) is no": lambda: heads(weights_LNTT, heads=[(0.7, 0)]),
        r"tokens\[0\] must be a str": lambda: heads(weights_LNTT, tokens=range(7)),
    }.items():
        with pytest.raises(ValueError, match=says):
            call()


def test_training_shows_a_line_a_head_and_names_the_extremes(tmp_path: pathlib.Path) -> None:
    steps = [0, 10, 40]
    entropy_RLN = RNG.normal(size=(3, L, N))
    history = {"steps": steps, "entropy": entropy_RLN, "max_logit": entropy_RLN, "x": entropy_RLN}
    path = tmp_path / "a.pdf"
    figure = view.plot_statistic_over_training(history, path, statistics=["max_logit", "entropy"])
    assert path.read_bytes().startswith(b"%PDF")
    first, second = figure.axes
    assert (first.get_ylabel(), second.get_ylabel()) == ("largest logit", "entropy (nats)")
    lines = second.get_lines()
    assert len(lines) == L * N
    for i, line in enumerate(lines):
        np.testing.assert_array_equal(line.get_xdata(), steps)
        np.testing.assert_array_equal(line.get_ydata(), entropy_RLN[:, i // N, i % N])
    assert len({line.get_color() for line in lines}) == L
    named = {text.get_text() for text in second.texts}
    ends = [divmod(int(pick(entropy_RLN[-1])), N) for pick in (np.argmax, np.argmin)]
    assert named == {f"L{layer} H{head}" for layer, head in ends}
    many = view.plot_statistic_over_training({"steps": [5], "entropy": np.ones((1, 13, 1))})
    assert len(many.axes) == 2, "layers beyond the palette get a colour bar"


def test_training_names_what_does_not_fit() -> None:
    good = {"steps": [0, 1], "entropy": np.ones((2, L, N))}
    draw: Any = view.plot_statistic_over_training
    for says, history, names in (
        ("history needs 'steps', it has 'entropy'", {"entropy": good["entropy"]}, None),
        ("'steps' must be rising", good | {"steps": [1, 0]}, None),
        ("'steps' must be rising", good | {"steps": [0, np.nan]}, None),
        ("'entropy' holds 'mean'; take", good | {"entropy": {"mean": np.ones((2, L, N))}}, None),
        (r"must be \[steps, L, N\] with 2 steps", good | {"entropy": np.ones((3, L, N))}, None),
        ("'x' has N=2 but 'entropy' has N=3", good | {"x": np.ones((2, L, 2))}, None),
        ("'distance' is not in history", good, ["distance"]),
        ("statistics must be names", good, []),
    ):
        with pytest.raises(ValueError, match=says):
            draw(history, statistics=names)
