"""Tests of the page of jax_attn.view in a browser: what is seen, by pointer and by keyboard."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jax_attn import view
from jax_attn.view import colors, glyphs, packing, page
from tests import browser
from tests.view_test import EVIL, WORDS, L, N, T, causal_LNTT, cross_LNTS

TOKENS = WORDS[:T]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    if not browser.binary():
        pytest.skip(f"no browser: none of {', '.join(browser.BINARIES)} is on PATH")
    with browser.browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def tab(started: browser.Page) -> Iterator[browser.Page]:
    """The browser; a test that leaves an error or a request in its console has failed."""
    started.complaints.clear()
    started.window(1400, 900)
    yield started
    assert started.complaints == []


def show(tab: browser.Page, folder: pathlib.Path, weights_LNTS: Any = None, **given: Any) -> None:
    weights_LNTS = causal_LNTT() if weights_LNTS is None else weights_LNTS
    tokens = given.pop("tokens", TOKENS)
    tab.open(view.attention_html(tokens, weights_LNTS, folder / "a.html", **given))
    tab.settle()


def select(tab: browser.Page, name: str, value: Any) -> None:
    element = f"document.getElementById('{name}')"
    tab.evaluate(f"{element}.value = '{value}', {element}.dispatchEvent(new Event('change'))")
    tab.settle()


def all_of(selector: str, what: str) -> str:
    """JavaScript for a property of every element that a selector finds."""
    return f"[...document.querySelectorAll('{selector}')].map(e => e.{what})"


def text(tab: browser.Page, selector: str) -> str:
    return tab.evaluate(f"document.querySelector('{selector}').textContent")


def center(tab: browser.Page, selector: str) -> tuple[float, float]:
    """Where an element is, brought into the window."""
    box = tab.evaluate(
        f"(e => (e.scrollIntoView({{block: 'nearest'}}), e.getBoundingClientRect().toJSON()))"
        f"(document.querySelector({json.dumps(selector)}))"
    )
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def token(index: int, flow: str = "queries") -> str:
    return f"#{flow} [data-index='{index}']"


def readout(tab: browser.Page) -> tuple[int, int, float]:
    """The query, the key and the weight that the page says are under the pointer."""
    q, k = (int(text(tab, f"#{name} small")) for name in ("query", "key"))
    return q, k, float(text(tab, "#value").replace("−", "-"))


def find_color(tab: browser.Page, rgb: np.ndarray) -> tuple[float, float]:
    """The middle of all pixels of the map that have one colour, in the window."""
    found = tab.evaluate(
        """(([r, g, b]) => {
          const map = document.getElementById("map");
          const copy = new OffscreenCanvas(map.width, map.height);
          const paper = copy.getContext("2d", { willReadFrequently: true });
          paper.drawImage(map, 0, 0);
          const { data, width } = paper.getImageData(0, 0, map.width, map.height);
          let [n, x, y] = [0, 0, 0];
          for (let i = 0; i < data.length; i += 4)
            if (data[i] === r && data[i + 1] === g && data[i + 2] === b)
              (n++, (x += (i / 4) % width), (y += Math.floor(i / 4 / width)));
          const box = map.getBoundingClientRect();
          return [n, box.x + x / n, box.y + y / n];
        })("""
        f"{rgb.tolist()})"
    )
    assert found[0] > 100, f"{found[0]} pixels have the colour {rgb}"
    return found[1], found[2]


def order(tab: browser.Page) -> list[int]:
    return [int(name.removeprefix("head-")) for name in tab.evaluate(all_of("#heads .head", "id"))]


def test_it_shows_every_head_and_the_first_map(tab: browser.Page, tmp_path: pathlib.Path) -> None:
    show(tab, tmp_path, title="A cat")
    assert tab.evaluate("document.title") == "A cat"
    assert text(tab, "#facts") == "2 layers × 3 heads · 7 tokens"
    assert order(tab) == list(range(L * N))
    drawn = """[...document.querySelectorAll("#heads canvas")].map((c) =>
      new Set(new Uint32Array(c.getContext("2d").getImageData(0, 0, c.width, c.height).data.buffer))
      .size)"""
    assert min(tab.evaluate(drawn)) > 10
    assert text(tab, "#map-title") == "Layer 0, head 0"
    # Before anybody points at anything it tells of the last query.
    q, k, weight = readout(tab)
    row = causal_LNTT()[0, 0, T - 1]
    assert (q, k, weight) == (T - 1, row.argmax(), pytest.approx(row.max(), abs=1e-4))


@pytest.mark.parametrize("bits", [8, 16])
def test_the_cell_under_the_pointer_tells_its_weight(
    tab: browser.Page, tmp_path: pathlib.Path, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bits == 8:
        monkeypatch.setattr(page, "_FEW", 0)
    show(tab, tmp_path)
    select(tab, "colour", "root")
    for number in (0, 4):
        tab.click(*center(tab, f"#head-{number}"))
        weights_TT = causal_LNTT()[divmod(number, N)]
        levels = 2**bits - 1
        codes = np.rint(levels * np.cbrt(weights_TT / weights_TT.max(-1, keepdims=True)))
        known = weights_TT.max(-1, keepdims=True) * (codes / levels) ** 3
        shades = np.floor(255 * np.sqrt(known) + 0.5).astype(int)
        alone = [(q, k) for q, k in np.argwhere(weights_TT) if (shades == shades[q, k]).sum() == 1]
        assert len(alone) > 10
        for q, k in alone:
            # Where the picture has the colour of this cell's weight, the page must name this cell.
            tab.mouse("Moved", *find_color(tab, colors.ramp()[shades[q, k]]))
            # What the file has lost, and the digits that the page then leaves out.
            bound = 1.5 * packing.error(bits) * float(weights_TT[q].max()) + 5e-5
            assert readout(tab) == (q, k, pytest.approx(weights_TT[q, k], abs=bound))
    # The pointer gone, what was kept is back.
    tab.mouse("Moved", 5, 5)
    assert readout(tab)[0] == T - 1


def test_a_token_shows_where_it_looks_and_what_looks_at_it(
    tab: browser.Page, tmp_path: pathlib.Path
) -> None:
    show(tab, tmp_path)
    select(tab, "colour", "root")
    weights_TT = causal_LNTT()[0, 0]
    backgrounds = all_of("#queries .token", "style.backgroundColor")

    def colored(weights_T: np.ndarray) -> list[str]:
        shades = colors.ramp()[np.floor(255 * np.sqrt(weights_T) + 0.5).astype(int)]
        return [
            f"rgb({r}, {g}, {b})" if weight else ""
            for (r, g, b), weight in zip(shades, weights_T, strict=True)
        ]

    for i in (2, 5):
        tab.mouse("Moved", *center(tab, token(i)))
        assert tab.evaluate(backgrounds) == colored(weights_TT[i])
        assert readout(tab)[:2] == (i, weights_TT[i].argmax())
        for name, ends in (("out", weights_TT[i]), ("in", weights_TT[:, i])):
            listed = [int(i) for i in tab.evaluate(all_of(f"#{name} small", "textContent"))]
            assert listed == [j for j in np.argsort(-ends, kind="stable") if ends[j] > 0][:6]
    tab.click(*center(tab, "#directions label:last-child"))
    tab.mouse("Moved", *center(tab, token(1)))
    assert tab.evaluate(backgrounds) == colored(weights_TT[:, 1])
    assert readout(tab)[:2] == (weights_TT[:, 1].argmax(), 1)


def test_heads_sort_by_a_statistic(tab: browser.Page, tmp_path: pathlib.Path) -> None:
    own = np.array([[3.0, -1.0, 2.0], [np.nan, 7.0, 0.5]])
    show(tab, tmp_path, statistics={"mine": own})
    entropy_LN = [
        [-sum(p * np.log(p) for p in w_TT.ravel() if p > 0) / T for w_TT in w_NTT]
        for w_NTT in causal_LNTT()
    ]
    select(tab, "order", 0)
    assert order(tab) == list(np.argsort(-np.ravel(entropy_LN)))
    options = tab.evaluate(all_of("#order option", "textContent"))
    assert options[:2] == ["layer, head", "entropy"]
    select(tab, "order", options.index("mine") - 1)
    assert order(tab) == [4, 0, 2, 5, 1, 3]
    assert text(tab, "#head-4 b") == "7.00"
    tab.click(*center(tab, "#turn"))
    assert order(tab) == [1, 5, 2, 0, 4, 3], "a head without a value is last either way"
    select(tab, "order", "")
    assert order(tab) == list(range(L * N))


def test_everything_can_be_done_by_keyboard(tab: browser.Page, tmp_path: pathlib.Path) -> None:
    show(tab, tmp_path)
    focused = "document.activeElement.id || document.activeElement.dataset.index"

    def tab_to(wanted: str) -> None:
        for _ in range(40):
            tab.key("Tab")
            if tab.evaluate(focused) == wanted:
                outline = "getComputedStyle(document.activeElement).outlineStyle"
                assert tab.evaluate(outline) == "solid", f"the focus on {wanted} is not seen"
                return
        raise AssertionError(f"Tab does not reach {wanted}")

    tab_to("head-0")
    for name, head in (("ArrowRight", 1), ("ArrowDown", 4), ("ArrowLeft", 3), ("ArrowUp", 0)):
        tab.key(name)
        assert tab.evaluate(focused) == f"head-{head}"
        assert text(tab, "#map-title") == f"Layer {head // N}, head {head % N}"
        assert tab.evaluate(all_of("#heads [aria-selected=true]", "id")) == [f"head-{head}"]
    tab.key("]", "]")
    assert text(tab, "#map-title") == "Layer 0, head 1"
    weights_TT = causal_LNTT()[0, 1]
    tab_to("map")
    q, k, _ = readout(tab)
    for name, by_q, by_k in (("ArrowUp", -1, 0), ("ArrowLeft", 0, -1), ("ArrowUp", -1, 0)):
        tab.key(name)
        q, k = q + by_q, max(k + by_k, 0)
        assert readout(tab) == (q, k, pytest.approx(weights_TT[q, k], abs=1e-4))
    tab_to(str(q))
    for name in ("ArrowLeft", "ArrowLeft", "ArrowRight", "Home", "ArrowRight"):
        q = {"ArrowLeft": q - 1, "ArrowRight": q + 1, "Home": 0}[name]
        tab.key(name)
        assert tab.evaluate(focused) == str(q)
        assert readout(tab)[:2] == (q, weights_TT[q].argmax())


def test_whatever_takes_the_focus_has_a_name(tab: browser.Page, tmp_path: pathlib.Path) -> None:
    show(tab, tmp_path)
    tab.send("Accessibility.enable")
    nodes = tab.send("Accessibility.getFullAXTree")["nodes"]
    tab.send("Accessibility.disable")
    names = {"focusable": 0, "option": 0}
    for node in nodes:
        role = node.get("role", {}).get("value")
        can = any(x["name"] == "focusable" for x in node.get("properties", []))
        if can and role not in ("RootWebArea", "MenuListPopup"):
            assert node["name"]["value"], node
            names["focusable"] += 1
        names["option"] += role == "option"
    assert names["focusable"] > 15
    assert names["option"] >= L * N + T


def test_tokens_that_are_markup_stay_text(tab: browser.Page, tmp_path: pathlib.Path) -> None:
    show(tab, tmp_path, tokens=EVIL, title=EVIL[0], statistics={EVIL[1]: np.ones((L, N))})
    for i in range(T):
        tab.mouse("Moved", *center(tab, token(i)))
    shown = tab.evaluate(all_of("#queries .token", "textContent"))
    assert shown == [glyphs.visible(word) for word in EVIL]
    assert tab.evaluate("window.hacked === undefined && document.images.length === 0")
    assert text(tab, "h1") == EVIL[0]
    # Even if markup got in, the page's policy lets no other script run.
    tab.evaluate("document.body.append(Object.assign(document.createElement('script'), "
                 "{textContent: 'window.hacked = 1'}))")  # fmt: skip
    assert tab.evaluate("window.hacked === undefined")
    assert any("Content Security Policy" in complaint for complaint in tab.complaints)
    tab.complaints.clear()


def test_other_keys_masked_rows_and_sinks(tab: browser.Page, tmp_path: pathlib.Path) -> None:
    show(tab, tmp_path, cross_LNTS(), key_tokens=WORDS)
    weights_TS = cross_LNTS()[0, 0]
    tab.mouse("Moved", *center(tab, token(2)))
    assert text(tab, "#verb") == "looks at nothing"
    assert text(tab, "#out .nothing")
    tab.mouse("Moved", *center(tab, token(3)))
    best = weights_TS[3].argmax()
    assert readout(tab) == (3, best, pytest.approx(weights_TS[3, best], abs=1e-4))
    tab.mouse("Moved", *center(tab, token(8, "keys")))
    assert readout(tab)[:2] == (weights_TS[:, 8].argmax(), 8)
    assert not tab.evaluate("document.getElementById('directions').checkVisibility()")


def test_zoom_keeps_cells_under_the_pointer(tab: browser.Page, tmp_path: pathlib.Path) -> None:
    size = 211
    weights_TT = np.full((size, size), 0.001, np.float32)
    weights_TT[150, 60] = 0.7
    show(tab, tmp_path, weights_TT[None, None], tokens=["x"] * size)
    tab.evaluate("document.getElementById('map').focus()")
    spot = tab.evaluate("document.getElementById('map').getBoundingClientRect().toJSON()")
    at = spot["x"] + 0.3 * spot["width"], spot["y"] + 0.6 * spot["height"]
    tab.click(*at)
    kept = readout(tab)[:2]
    for _ in range(3):  # by the wheel, the cell under the pointer stays there
        tab.wheel(*at, by=-200, modifiers=2)
        tab.mouse("Moved", *at)
        assert readout(tab)[:2] == kept
    assert tab.evaluate("document.getElementById('map').classList.contains('zoomed')")
    tab.key("0", "0")
    assert not tab.evaluate("document.getElementById('map').classList.contains('zoomed')")
    for _ in range(4):
        tab.key("+", "+")
    for _ in range(200):
        q, k, _ = readout(tab)
        if (q, k) == (150, 60):
            break
        step_q = "ArrowDown" if q < 150 else "ArrowUp"
        tab.key(step_q if q != 150 else "ArrowRight" if k < 60 else "ArrowLeft")
    assert readout(tab) == (150, 60, pytest.approx(0.7, abs=0.005))
    tab.key("ArrowRight")
    shade = 255  # 0.7 is beyond the limit that fits a head whose middle row has 0.001
    tab.mouse("Moved", *find_color(tab, colors.ramp()[shade]))
    assert readout(tab)[:2] == (150, 60)


@pytest.mark.parametrize("width", [360, 420, 800, 1100, 1900])
def test_no_window_is_too_narrow(tab: browser.Page, tmp_path: pathlib.Path, width: int) -> None:
    tab.window(width, 800)
    tokens = [*TOKENS[:-1], "an_identifier_that_is_rather_long" * 2]
    show(tab, tmp_path, tokens=tokens, title="A_title_without_any_space_" * 4)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.evaluate("document.getElementById('map').clientWidth") > 250


def test_the_dark_scheme_is_dark(tab: browser.Page, tmp_path: pathlib.Path) -> None:
    tab.window(1400, 900, dark=True)
    show(tab, tmp_path)
    select(tab, "colour", "root")
    find_color(tab, colors.ramp(dark=True)[255])  # the first query looks at itself alone
    rgb = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    assert max(tab.evaluate(rgb)) < 60
    tab.click(*center(tab, "#scheme"))
    assert min(tab.evaluate(rgb)) > 200
    find_color(tab, colors.ramp()[255])
