"""What every experiment writes beside its numbers: the environment and a self-contained page."""

import base64
import datetime
import html
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import jax
import matplotlib.figure
import numpy as np
import optax

ROOT = pathlib.Path(__file__).resolve().parent.parent

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1f24; background: #fff }
h1 { font-size: 1.7rem; line-height: 1.2 } h2 { font-size: 1.15rem; margin-top: 2.5rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid #d9dee3 }
th:first-child, td:first-child { text-align: left }
figure { margin: 1.5rem 0 } figure img { max-width: 100% } figcaption { color: #57606a }
dl dt { margin-top: .9rem } dl dd { margin-left: 0; color: #57606a }
.holds { color: #116329; font-weight: 600 } .fails { color: #b3261e; font-weight: 600 }
pre { background: #f6f8fa; padding: 1rem; overflow-x: auto; white-space: pre-wrap }
footer { margin-top: 3rem; color: #57606a; font-size: .85rem }
"""


def environment() -> dict[str, Any]:
    """Name what numbers depend on: versions, device, date."""
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "numpy": np.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "machine": f"{platform.machine()}, {_cpus()} CPU cores",
        "processor": _processor(),
    }


def revision() -> str:
    """Name the revision of the sources, and whether files differ from it; "" without one."""
    said = []
    for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"]):
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *command],
                capture_output=True,
                text=True,
                check=True,
                timeout=20,
            )
        except (OSError, subprocess.SubprocessError):
            return ""
        said.append(done.stdout.strip())
    return f"{said[0]} and changed files" if said[1] else said[0]


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """Name the processor, as far as the system says."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", pathlib.Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor()


def save(figure: matplotlib.figure.Figure, path: pathlib.Path) -> pathlib.Path:
    """Write a figure as PNG, sharp enough for paper."""
    figure.savefig(path, dpi=160, bbox_inches="tight")
    return path


def write_html(
    path: pathlib.Path,
    *,
    title: str,
    intro: str,
    summary: Mapping[str, Any],
    figures: Sequence[tuple[pathlib.Path, str]],
    sample: str,
) -> None:
    """Write one page that holds everything, pictures included, and asks the network for nothing."""
    esc = html.escape
    rows = "".join(
        f"<tr><td>{esc(row['model'])}<td>{row['parameters']:,}<td>{row['bits_per_byte']:.3f}"
        f"<td>{row['min']:.3f}<td>{row['max']:.3f}"
        for row in summary["table"]
    )
    claims = "".join(
        f"<dt><span class={'holds' if claim['holds'] else 'fails'}>{esc(claim['name'])} "
        f"{esc(claim['verdict'])}</span> · {esc(claim['statement'])}"
        f"<dd>{esc(claim['measured'])}"
        for claim in summary["claims"]
    )
    pictures = "".join(
        f'<figure><img alt="{esc(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode(picture.read_bytes()).decode()}"><figcaption>{esc(caption)}'
        f"</figcaption></figure>"
        for picture, caption in figures
    )
    options = " ".join(
        f"--{key}={value}" for key, value in summary["config"].items() if value != ""
    )
    made = ", ".join(
        f"{key} {summary[key]}" for key in ("date", "python", "jax", "device", "machine")
    )
    path.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{esc(title)}</title>"
        f'<meta name=viewport content="width=device-width"><style>{STYLE}</style>'
        f"<h1>{esc(title)}</h1><p>{esc(intro)}</p>"
        f"<h2>Held-out bits per byte after training</h2>"
        f"<table><tr><th>model<th>parameters<th>mean<th>min<th>max{rows}</table>"
        f"<p>{summary['config']['seeds']} seeds; text: {esc(summary['text']['name'])}, "
        f"fingerprint {esc(summary['text']['sha256'])}.</p>"
        f"<h2>What was measured</h2>{pictures}"
        f"<h2>The claims</h2><dl>{claims}</dl>"
        f"<h2>What the full model writes</h2><pre>{esc(sample)}</pre>"
        f"<footer>{esc(options)}<br>{esc(made)}; {summary['seconds']:.0f} s.</footer>",
        encoding="utf-8",
    )
