"""The picture of `recall`: accuracy over training, with an MLP and without."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments._curves import name_ends

ALONE = " alone"  # what the name of a model without MLP ends in
COLORS = {
    **{"attention": "#0072B2", "frozen": "#D55E00", "static": "#CC79A7"},
    **{"none": "#009E73", "fixed": "#E69F00"},
}


def figure(
    titles: Mapping[str, str],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    V: int,
    pairs: int,
) -> Figure:
    """Draw accuracy over steps, a line a seed, models named where their best seed ends.

    Args:
      titles: by model; the names of those without MLP end in `ALONE`.
      rows: measurements by model.
      V: vocabulary; half of it are values.
      pairs: in a row of the data.
    Returns: the figure.
    """
    made = Figure(figsize=(10, 3.7), layout="constrained")
    left, right = made.subplots(1, 2, sharey=True)
    steps = [row["step"] for row in next(iter(rows.values()))]
    for axes, alone in ((left, False), (right, True)):
        ends = []
        for name, title in titles.items():
            kind = name.removesuffix(ALONE)
            if (kind != name) != alone:
                continue
            lines: dict[str, tuple[str, Any]] = {title: ("accuracy", "-")}
            if name == "fixed":
                lines["the fixed rows themselves"] = ("own", (0, (3, 1.5)))
            for label, (key, style) in lines.items():
                values = np.array([row[key] for row in rows[name]])
                axes.plot(steps, values, color=COLORS[kind], ls=style, lw=1.2, alpha=0.8)
                ends.append((float(values[-1].max()), label, COLORS[kind]))
        for guess, of in ((2 / V, "any value"), (1 / pairs, "a value of the row")):
            axes.axhline(guess, color="#57606a", lw=0.8, ls=(0, (4, 3)))
            below = guess - 0.04 if guess > 0.1 else guess + 0.025  # off the lines that lie on it
            axes.text(steps[-1] / 2, below, f"guess: {of}", fontsize=7, color="#57606a")
        axes.set(xlim=(0, steps[-1]), ylim=(-0.02, 1.03), xlabel="step")
        axes.set_title("without MLP" if alone else "with MLP", fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        name_ends(axes, ends)
    left.set_ylabel("share of questions answered, fresh rows")
    return made
