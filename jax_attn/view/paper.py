"""What pictures for papers share: their sizes in inches and points, how they are saved."""

import os
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

# Importing Matplotlib takes half a second, so it waits until a picture is made.
if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Widths in inches that conferences print: one column, and the whole text.
COLUMN, TEXT = 3.3, 6.75
DOTS_PER_INCH = 300

# In points. Both fonts come with Matplotlib; the second has glyphs that the first lacks.
LABEL_SIZE, SMALL_SIZE = 8, 7
MONOSPACE = ["DejaVu Sans Mono", "DejaVu Sans"]
GRID, FAINT = "#d9dee3", "#57606a"


def positive(name: str, size: Any) -> float:
    """Check that a size is a number above 0.

    Args:
      name, size: the argument.
    Returns: the size.
    Raises: ValueError naming the argument.
    Example:
      >>> positive("width", 3)
      3.0
    """
    number = isinstance(size, int | float | np.number) and not isinstance(size, bool)
    if not number or not 0 < size < float("inf"):
        raise ValueError(f"{name} must be a number above 0, got {size!r}")
    return float(size)


def save(figure: "Figure", path: str | os.PathLike[str] | None) -> None:
    """Write a figure at the size it was made for.

    Args:
      figure: the figure.
      path: the file; its ending says the format (.png, .pdf, .svg). None writes nothing.
    Raises: FileNotFoundError naming the folder that is missing.
    Example:
      >>> from matplotlib.figure import Figure
      >>> save(Figure(), None)
    """
    if path is None:
        return
    folder = pathlib.Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"path: the folder {str(folder)!r} does not exist; make it")
    figure.savefig(path, dpi=DOTS_PER_INCH)
