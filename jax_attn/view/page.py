"""One page that holds every attention map of a text, to be looked at in a browser."""

import base64
import hashlib
import html
import importlib.resources
import json
import math
import os
import pathlib
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from jax_attn.view.colors import ramp
from jax_attn.view.glyphs import check_strings, visible
from jax_attn.view.maps import Maps, check_statistic, largest_in_blocks, open_maps
from jax_attn.view.packing import POWER, deflate, error, pack_map
from jax_attn.view.summary import full_name, label, summarize_map

# Concatenated in this order.
_SCRIPTS = ("store.js", "heads.js", "map.js", "tokens.js", "main.js")

# Up to so many weights in all, each has 16 bits: the page stays below 6 MB.
_FEW = 2**21

_THUMBNAIL = 40
_LONGEST_TOKEN = 80

# Below this, what rows lack to a sum of 1 is rounding, and no sink.
_SINK = 1e-3


def attention_html(
    tokens: Sequence[str],
    weights_LNTS: Any,
    path: str | os.PathLike[str],
    *,
    key_tokens: Sequence[str] | None = None,
    statistics: Mapping[str, Any] | None = None,
    title: str = "Attention",
    q_offset: int | None = None,
    L: int | None = None,
    N: int | None = None,
) -> pathlib.Path:
    """Write a page on which every head can be looked at: one HTML file that needs nothing else.

    It shows all heads as thumbnails, sorted by a statistic if wanted, the map of one head, and the
    tokens with what each looks at and what looks at it; pointer and keyboard reach everything.
    Up to 2 million weights in all, what is shown differs from the weight by at most 0.003 % of its
    row's largest. Above, weights are kept to 8 bits: the difference is at most 0.6 % of the row's
    largest, and at most 3 % of the weight itself where it is above 1 % of that. 0 stays exactly 0,
    and rows may sum to less than 1. Maps are read one at a time; 12 layers x 12 heads x 512 tokens
    take 24 MB where the weights are noise, which does not compress.

    Args:
      tokens: the text of each query, any Unicode.
      weights_LNTS: probabilities, as `dense_weights` makes them; or a function
        `(layer, head) -> [T,S]`, called once for each head, which needs L and N.
      path: the file, replaced in one step once the page is whole; its folder must exist.
      key_tokens: the text of each key; left out, `tokens`, and T must equal S.
      statistics: name -> [L,N], shown beside those computed from the maps (entropy, largest weight,
        distance, weight on the first, the previous and the own position, on a sink if there is
        one); one of the same name, as in `dot_product_attention(observe=...)`, takes their place.
      title: heading of the page.
      q_offset: the position of query 0 among the keys. Default 0, and with key_tokens none, which
        leaves statistics of position out.
      L, N: layers and heads, where weights_LNTS is a function.
    Returns: the path.
    Raises: ValueError naming the argument, the axis letter and both sizes, or the layer, head and
      row that holds no probabilities; FileNotFoundError naming the folder. A page that stood there
      before stays as it was.
    Example:
      >>> import tempfile
      >>> weights_LNTS = np.tril(np.ones((1, 2, 3, 3))) / np.arange(1, 4)[:, None]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     page = attention_html(["the", " cat", " sat"], weights_LNTS, f"{folder}/cat.html")
      ...     print(page.name, "<!doctype html>" in page.read_text(encoding="utf-8"))
      cat.html True
    """
    maps = open_maps(weights_LNTS, L=L, N=N)
    queries = _shown("tokens", tokens)
    keys = queries if key_tokens is None else _shown("key_tokens", key_tokens)
    if not callable(weights_LNTS):
        _check_tokens(len(queries), len(keys), key_tokens is None, *weights_LNTS.shape[2:])
    if q_offset is None and key_tokens is None:
        q_offset = 0
    given: dict[str, np.ndarray] = {}
    for name, values_LN in (statistics or {}).items():
        if full_name(name) in given:
            raise ValueError(f"statistics: {name!r} and {full_name(name)!r} are one; leave one out")
        given[full_name(name)] = check_statistic(name, values_LN, maps)
    if not isinstance(title, str):
        raise ValueError(f"title must be a str, got {title!r}")
    if not isinstance(q_offset, int | np.integer | None):
        raise ValueError(f"q_offset must be an int or None, got {q_offset!r}")
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path must be that of a file, got {path!r}")
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: the folder {str(path.parent)!r} does not exist; make it")
    if path.is_dir():
        raise IsADirectoryError(f"path: {str(path)!r} is a folder; name a file in it")
    bits = 16 if maps.L * maps.N * len(queries) * len(keys) <= _FEW else 8
    facts = {
        "L": maps.L,
        "N": maps.N,
        "T": len(queries),
        "S": len(keys),
        "queries": queries,
        "keys": None if key_tokens is None else keys,
        "power": POWER,
        "levels": 2**bits - 1,
        "ramps": [base64.b64encode(ramp(dark=dark).tobytes()).decode() for dark in (False, True)],
    }
    texts = {
        "title": html.escape(title),
        "bits": str(bits),
        "error": _at_most(100 * error(bits)),
        "style": _resource("page.css"),
        "script": "".join(_resource(name) for name in _SCRIPTS),
    }
    texts |= {f"{name}_hash": _hash(texts[name]) for name in ("style", "script")}
    # Beside the page, so that the last step is a rename; opened plainly, so that it gets the rights
    # any new file gets.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            for part, text in _template():
                file.write(text.encode())
                if part == "maps":
                    facts |= _write_maps(file, maps, len(queries), len(keys), bits, q_offset, given)
                elif part == "facts":
                    file.write(_json(facts).encode())
                elif part:
                    file.write(texts[part].encode(errors="backslashreplace"))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _write_maps(
    file: BinaryIO,
    maps: Maps,
    T: int,
    S: int,
    bits: int,
    q_offset: int | None,
    given: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Write one block for each head; return thumbnails and statistics."""
    thumbnails, rows = [], []
    for layer in range(maps.L):
        for head in range(maps.N):
            weights_TS = maps.read(layer, head)
            if weights_TS.shape != (T, S):
                raise ValueError(
                    f"weights_LNTS({layer}, {head}) has (T, S) = {weights_TS.shape} but there are "
                    f"{T} tokens and {S} key tokens"
                )
            packed = base64.b64encode(pack_map(weights_TS, bits))
            number = layer * maps.N + head
            opening = f'<script type="application/octet-stream" id="map-{number}">'
            file.write(opening.encode() + packed + b"</script>\n")
            small_TS = largest_in_blocks(weights_TS, _THUMBNAIL, _THUMBNAIL)
            codes_TS = np.rint(255 * np.sqrt(np.minimum(small_TS, 1)))
            thumbnails.append(np.where(small_TS > 0, np.maximum(codes_TS, 1), 0).astype(np.uint8))
            rows.append(summarize_map(weights_TS, q_offset))
    own = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    if np.nanmax(own["sink_mass"], initial=0.0) < _SINK:
        del own["sink_mass"]
    return {
        "thumbnails": base64.b64encode(deflate(np.stack(thumbnails).tobytes())).decode(),
        "thumbnail_size": list(thumbnails[0].shape),
        "statistics": [
            {
                "title": label(name).title,
                "unit": label(name).unit,
                "about": label(name).about
                + (" Given with the page." if name in given else " Mean over queries."),
                "values": [float(x) if math.isfinite(x) else None for x in values.ravel()],
            }
            for name, values in {**own, **given}.items()
        ],
    }


def _shown(name: str, tokens: Sequence[str]) -> list[str]:
    shown = []
    for token in check_strings(name, tokens):
        text = visible(token)
        shown.append(text if len(text) <= _LONGEST_TOKEN else f"{text[: _LONGEST_TOKEN - 1]}…")
    if not shown:
        raise ValueError(f"{name} is empty; give one string for each position")
    return shown


def _check_tokens(queries: int, keys: int, same: bool, T: int, S: int) -> None:
    if queries != T:
        raise ValueError(f"tokens has T={queries} but weights_LNTS has T={T}; one for each query")
    if keys != S:
        if same:
            raise ValueError(f"weights_LNTS has T={T} but S={S}; give key_tokens, one for each key")
        raise ValueError(f"key_tokens has S={keys} but weights_LNTS has S={S}; one for each key")


def _at_most(bound: float) -> str:
    """Write a bound with one digit, rounded up."""
    digit = 10.0 ** math.floor(math.log10(bound))
    return f"{math.ceil(bound / digit) * digit:.1g}"


def _template() -> list[tuple[str, str]]:
    """The page in order, as (what to fill in after it, text) pairs."""
    pieces = re.split(r"\{\{(\w+)\}\}", _resource("page.html"))
    return list(zip([*pieces[1::2], ""], pieces[::2], strict=True))


def _resource(name: str) -> str:
    folder = importlib.resources.files("jax_attn.view")
    return (folder / name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it ends the element."""
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda found: escapes[found[0]], text)
