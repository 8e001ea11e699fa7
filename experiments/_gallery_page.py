"""The page of `gallery`: one file with every question, verdict, table and figure, no scripts."""

import base64
import html
import json
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments._findings import WORDS, spread

CLASSES = {True: "holds", False: "fails", None: "open"}
SIGNS = {True: "✓", False: "✗", None: "?"}
PNG = b"\x89PNG\r\n\x1a\n"
# Characters that cannot be seen, or that turn the order of those beside them.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
MADE = (
    *("date", "device", "machine", "processor", "python", "jax", "jaxlib", "numpy", "flax"),
    "optax",
)

STYLE = """
:root { color-scheme: light dark; --page: light-dark(#fff, #12161c);
  --panel: light-dark(#f6f8fa, #1b2129); --line: light-dark(#d9dee3, #333c48);
  --text: light-dark(#1b1f24, #e6e9ed); --faint: light-dark(#57606a, #9aa5b1);
  --link: light-dark(#0b5cad, #79b8ff); --holds: light-dark(#116329, #56d364);
  --fails: light-dark(#b3261e, #ff8a80); --open: light-dark(#7d4e00, #e3b341) }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; margin: 0 auto;
  max-width: 68rem; padding: 1.5rem 1rem 4rem; color: var(--text); background: var(--page);
  overflow-wrap: anywhere }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6rem }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .2rem }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem }
p { margin: .3rem 0 } a { color: var(--link) } code, pre { font: .85rem/1.45 ui-monospace,
  "Cascadia Mono", Menlo, "DejaVu Sans Mono", monospace }
.faint, figcaption, dd { color: var(--faint); font-size: .9rem }
.count { font-size: 1.15rem }
.holds { color: var(--holds) } .fails { color: var(--fails) } .open { color: var(--open) }
.word { font-weight: 650; white-space: nowrap }
.index { list-style: none; padding: 0; margin: 1.2rem 0 0; display: grid; gap: .7rem;
  grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)) }
.index li { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem .8rem }
.index .word { font-size: .9rem } .word + .word { margin-left: .7rem }
section { border-top: 1px solid var(--line); margin-top: 2.6rem; padding-top: 1.6rem }
.verdicts { margin: 1rem 0; padding: 0; list-style: none }
.verdicts li { border-left: 4px solid; padding: .1rem 0 .1rem .8rem; margin: .7rem 0 }
.verdicts li span:not(.word) { color: var(--text) }
.verdicts dl { margin: 0 } .verdicts div { display: flex; gap: .5rem }
.verdicts dt { color: var(--faint); font-size: .9rem; flex: 0 0 5.2rem } .verdicts dd { margin: 0 }
figure { margin: 1.4rem 0 }
figure div { overflow-x: auto }
figure img { max-width: max(100%, 34rem); height: auto; background: #fff; border-radius: 4px;
  padding: 6px }
.wide { overflow-x: auto; border-bottom: 1px solid var(--line) }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; vertical-align: baseline;
  border-bottom: 1px solid var(--line); white-space: nowrap; unicode-bidi: isolate }
th { white-space: normal; font-weight: 600; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 7rem;
  max-width: 20rem; overflow-wrap: anywhere }
td small { color: var(--faint) }
.facts { margin: 1.2rem 0 0; font-size: .9rem; display: grid; gap: .15rem 1rem;
  grid-template-columns: max-content minmax(0, 1fr) }
.facts span { display: inline-block; max-width: 100% } /* lines end between arguments */
.facts dt { color: var(--faint) } .facts dd { margin: 0; color: var(--text) }
.trouble { border: 1px solid var(--fails); border-radius: 8px; margin: 1rem 0;
  padding: .6rem .9rem }
pre { background: var(--panel); padding: .7rem; white-space: pre-wrap; margin: .5rem 0 0 }
@media print {
  :root { color-scheme: light } body { font-size: 10.5pt; max-width: none; padding: 0 }
  .index a { text-decoration: none; color: inherit } .wide { overflow: visible }
  table { font-size: 7pt } th, td { padding-right: .5rem; white-space: normal }
  section { break-before: page; border: 0; margin: 0; padding: 0 }
  h2, h3 { break-after: avoid } figure, .verdicts li, tr { break-inside: avoid }
  figure img { max-height: 20cm; padding: 0 }
}
"""


class Entry(NamedTuple):
    """One experiment on the page: what it was to answer, how its run went, what it left."""

    name: str
    question: str
    command: str
    folder: pathlib.Path
    trouble: str = ""
    """Why there is no answer; "" if there is one."""
    output: str = ""
    """The end of what it printed, where it is of help."""
    summary: Mapping[str, Any] | None = None
    seconds: float = 0.0
    revision: str = ""
    reused: bool = False


def read_summary(folder: pathlib.Path) -> dict[str, Any]:
    """Read the summary.json of a run, and check all that the page shows of it.

    Args:
      folder: of the run.
    Returns: the summary.
    Raises: ValueError: it is missing or has another form; a figure is missing or no PNG.
    """
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"summary.json cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"summary.json is no JSON: {error}") from None
    forms = {"table": {}, "verdicts": dict.fromkeys(("statement", "expected", "measured"), str),
             "figures": dict.fromkeys(("file", "caption"), str)}  # fmt: skip
    if not isinstance(found, dict):
        raise ValueError("summary.json is no object")
    for part, keys in forms.items():
        rows = found.get(part)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"summary.json has no list of objects {part!r}")
        for row in rows:
            if wrong := [key for key, kind in keys.items() if not isinstance(row.get(key), kind)]:
                raise ValueError(f"summary.json: a row of {part!r} lacks {wrong[0]!r}")
    for verdict in found["verdicts"]:
        if not isinstance(verdict.get("holds", ""), bool | None):
            raise ValueError("summary.json: a verdict's 'holds' is not true, false or null")
    for figure in found["figures"]:
        picture(folder, figure["file"])
    return found


def picture(folder: pathlib.Path, file: str) -> bytes:
    """Read a figure that lies in a folder."""
    if pathlib.PurePath(file).name != file:
        raise ValueError(f"figure {file!r} is not in the folder of the run")
    try:
        content = (folder / file).read_bytes()
    except OSError as error:
        raise ValueError(f"figure {file!r} cannot be read: {error.strerror}") from None
    if not content.startswith(PNG):
        raise ValueError(f"figure {file!r} is no PNG")
    return content


def counts(entries: Iterable[Entry]) -> Counter[bool | None]:
    """Count verdicts: True holds, False does not, None undecided."""
    return Counter(v["holds"] for e in entries if e.summary for v in e.summary["verdicts"])


def page(entries: Sequence[Entry], *, title: str, facts: Mapping[str, str]) -> str:
    """Make the page.

    Args:
      entries: in the order to show them.
      title: of the page.
      facts: of the whole, shown at the top.
    Returns: HTML that asks the network for nothing.
    """
    troubled = [entry for entry in entries if entry.trouble]
    said = counts(entries)
    total = " ".join(
        f'<span class="word {CLASSES[holds]}">{SIGNS[holds]} {said[holds]} {word}</span>'
        for holds, word in ((True, "hold"), (False, "do not hold"), (None, "undecided"))
    )
    missing = "".join(
        f'<li><a href="#{entry.name}">{entry.name}</a>: {text(entry.trouble)}' for entry in troubled
    )
    if missing:
        missing = (
            f"<div class=trouble><p class='word fails'>{len(troubled)} of {len(entries)} without "
            f"an answer</p><ul>{missing}</ul></div>"
        )
    told = " · ".join(f"{text(name)} {text(value)}" for name, value in facts.items() if value)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{policy}">'
        f"<title>{text(title)}</title><meta name=viewport content='width=device-width'>"
        f"<style>{STYLE}</style><h1>{text(title)}</h1>"
        f"<p class=count>{total}</p><p class=faint>{told}</p><p class=faint>{_reading(entries)}</p>"
        f"{missing}"
        f"<ul class=index>{''.join(map(_card, entries))}</ul>"
        f"{''.join(map(_section, entries))}\n"
    )


def _reading(entries: Iterable[Entry]) -> str:
    """Say how numbers are to be read, and which runs are of one seed."""
    how = (
        "Numbers are the mean of seeds [least, largest]. A verdict holds if every seed says so, "
        "and of a difference if the 95 % interval of its mean does; one seed decides identities "
        "alone, and models that have not learned enough decide nothing."
    )
    found = [entry for entry in entries if entry.summary]
    single = [entry.name for entry in found if entry.summary and _seeds(entry.summary) == 1]
    if single:
        how += f" Of one seed, {len(single)} of {len(found)}: {', '.join(single)}."
    if any(entry.summary and entry.summary.get("preset") == "quick" for entry in found):
        how += " Quick presets are small, and show that things run, not what is true at any size."
    return text(how)


def _seeds(summary: Mapping[str, Any]) -> Any:
    config = summary.get("config")
    return config.get("seeds") if isinstance(config, dict) else None


def _options(config: Any, within: str = "") -> list[str]:
    """Write a config as options of the command line."""
    if not isinstance(config, dict):
        return []
    made = []
    for name, value in config.items():
        if isinstance(value, dict):
            made += _options(value, f"{within}{name}.")
        elif value != "" and name != "out":
            shown = str(value).lower() if isinstance(value, bool) else value
            made.append(f"{within}{name}={shown}")
    return made


def text(value: Any) -> str:
    """Escape a value for HTML; characters that cannot be seen become escapes."""
    shown = UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", str(value))
    return html.escape(shown)


def cell(value: Any) -> str:
    """Show a value of a table: seeds as mean and ends, numbers with four digits."""
    if isinstance(value, list):
        try:
            mean, _, ends = spread(value).partition(" ")
        except (TypeError, ValueError):
            return text(value)
        return f"{text(mean)} <small>{text(ends)}</small>" if ends else text(mean)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else text(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _badges(entry: Entry) -> str:
    """Say in words and colours what became of an experiment."""
    said = counts([entry])
    words = {True: "hold" if said[True] > 1 else "holds", False: "do not" if said[False] > 1 else
             "does not", None: "undecided"}  # fmt: skip
    badges = [
        f'<span class="word {CLASSES[holds]}">{SIGNS[holds]} {said[holds]} {words[holds]}</span>'
        for holds in WORDS
        if said[holds]
    ]
    if entry.trouble:
        badges = [f"<span class='word fails'>✗ {text(entry.trouble)}</span>"]
    return " ".join(badges) or "<span class=faint>no verdicts</span>"


def _card(entry: Entry) -> str:
    minutes = f" · {_minutes(entry)}" if entry.seconds else ""
    return (
        f'<li><a href="#{entry.name}">{text(entry.question)}</a>'
        f"<p class=faint>{entry.name}{minutes}</p><p>{_badges(entry)}</p>"
    )


def _section(entry: Entry) -> str:
    parts = [f'<section id="{entry.name}"><h2>{text(entry.question)}</h2><p>{_badges(entry)}</p>']
    if entry.output:
        parts.append(f"<p class=faint>It ended with:</p><pre>{text(entry.output)}</pre>")
    if entry.summary:
        parts += [_verdicts(entry), _figures(entry), _table(entry.summary["table"])]
    parts.append(_facts(entry))
    return "".join(parts) + "</section>"


def _verdicts(entry: Entry) -> str:
    assert entry.summary
    rows = "".join(
        f"<li class={CLASSES[v['holds']]}><span class=word>{SIGNS[v['holds']]} "
        f"{WORDS[v['holds']]}</span> <span>{text(v['statement'])}</span><dl>"
        f"<div><dt>measured<dd>{text(v['measured'])}</div>"
        f"<div><dt>expected<dd>{text(v['expected'])}</div></dl>"
        for v in entry.summary["verdicts"]
    )
    return f"<ul class=verdicts>{rows}</ul>" if rows else ""


def _figures(entry: Entry) -> str:
    assert entry.summary
    made = []
    for figure in entry.summary["figures"]:
        content, caption = picture(entry.folder, figure["file"]), text(figure["caption"])
        width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
        image = base64.b64encode(content).decode()
        made.append(
            f"<figure><div tabindex=0 role=region aria-label=figure>"
            f'<img alt="{caption}" width={width} height={height} '
            f'src="data:image/png;base64,{image}"></div>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return "".join(made)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Make a table that scrolls in itself where the window is narrow."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        return ""
    head = "".join(f"<th scope=col>{text(name)}" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{cell(row.get(name))}" for name in names) for row in rows)
    return (
        "<div class=wide role=region aria-label='table of numbers' tabindex=0><table><thead><tr>"
        f"{head}<tbody>{body}</table></div>"
    )


def _facts(entry: Entry) -> str:
    words = " ".join(f"<span>{text(word)}</span>" for word in entry.command.split())
    facts = {"command": f"<code>{words}</code>"}
    if entry.seconds:
        kept = ", from an earlier run of the same code" if entry.reused else ""
        facts["took"] = _minutes(entry) + kept
    if entry.summary:
        made = (f"{name} {entry.summary[name]}" for name in MADE if entry.summary.get(name))
        facts["measured on"] = text(", ".join(made))
        options = (f"<span>{text(word)}</span>" for word in _options(entry.summary.get("config")))
        facts["config"] = " ".join(options)
    if entry.revision:
        facts["revision"] = text(entry.revision)
    rows = "".join(f"<dt>{name}<dd>{value}" for name, value in facts.items() if value)
    return f"<dl class=facts>{rows}</dl>"


def _minutes(entry: Entry) -> str:
    return f"{entry.seconds / 60:.1f} minutes"
