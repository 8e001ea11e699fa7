"""What would fit where a plan does not: rematerialisation, or else the largest batch."""

from collections.abc import Callable
from typing import Any

Attempt = Callable[[dict[str, Any]], dict[str, Any]]


def what_fits(attempt: Attempt, facts: dict[str, Any], rows: int, options: dict[str, Any]) -> str:
    """Find what would fit: full rematerialisation, or else the largest batch, by bisection.

    Args:
      attempt: compiles with other options of the step's function, and returns the facts.
      facts: of the plan that does not fit: `takes`, the parameters of that function, and `batch`.
      rows: batches are multiples of this.
      options: of the plan that does not fit.
    Returns: a line of advice.
    """
    takes, batch, changed = facts["takes"], facts["batch"], {}
    said = ""
    if "remat" in takes and options.get("remat") != "full":
        changed, said = {"remat": "full"}, "remat='full' and "
        first = attempt(changed)
        if why := _why(first):
            return f"whether it fits with remat='full' is not known: {why}"
        if first["fits"]:
            return f"fits with remat='full': {first['used'] / 2**30:.1f} GiB"
    if "batch" not in takes:
        also = "also not with remat='full'; " if changed else ""
        more = "`batch`" if "remat" in takes else "`batch` and `remat`"
        return f"{also}give the step's function {more} to be told what would fit"
    if not batch:
        return "the batch is not known: give --batch to search for the largest that fits"
    low, high = 0, -(-batch // rows)  # in rows of each device
    while high - low > 1:
        middle = (low + high) // 2
        tried = attempt({**changed, "batch": middle * rows})
        if why := _why(tried):
            known = f"fits with {said}batch {low * rows}; " if low else ""
            return f"{known}whether batch {middle * rows} fits is not known: {why}"
        low, high = (middle, high) if tried["fits"] else (low, middle)
    if not low:
        after = ", with remat='full'" if changed else ""
        return f"not even a batch of {rows} fits{after}: take more devices"
    return f"fits with {said}batch {low * rows}, and not with {high * rows}"


def _why(facts: dict[str, Any]) -> str:
    """Why an attempt has no answer, if it has none."""
    return facts.get("refused") or facts.get("failed") or ""
