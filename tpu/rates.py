"""What a self-test measured, judged: errors against their bounds, rates against the table.

All shares are of what `tpu.topology` says. None of these judgements has met a real TPU yet.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from tpu import topology
from tpu.checks import FAILED, OK, SKIPPED, WARNING, Row, merged

ABOVE = 1.1  # of the table: more than sources differ by; then the clock or the table is wrong
APART = 0.8  # of the fastest device of a host


def percent(share: float) -> str:
    """Write a share with two digits.

    Args:
      share: 1 is all.
    Returns: text.
    Example:
      >>> percent(0.4637), percent(0.0012), percent(2.0)
      ('46 %', '0.12 %', '200 %')
    """
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def numerics(name: str, result: Mapping[str, Any]) -> Row:
    """Judge results against float64.

    Args:
      name: of the row.
      result: from `tpu.selftest`: "bound" in words, and "errors", of which each has "what",
        "where" and "share", the largest error as a share of its bound.
    Returns: one row; FAILED where a share is not at most 1, and so where one is NaN.
    Example:
      >>> error = {"what": "float32", "where": "TPU_0", "share": float("nan")}
      >>> numerics("matmul", {"bound": "exact", "errors": [error]}).verdict
      'FAILED'
    """
    if "skipped" in result:
        return Row(name, SKIPPED, result["skipped"])
    errors = result["errors"]
    wrong = [e for e in errors if not e["share"] <= 1.0]
    values = {"bound": result["bound"], "errors": errors}
    if not errors:
        return Row(name, FAILED, "nothing came back to compare", "report this as a bug", values)
    where = len({e["where"] for e in errors})
    if wrong:
        listed = ", ".join(f"{e['what']} on {e['where']} × {e['share']:.3g}" for e in wrong[:4])
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        seen = f"error beyond its bound ({result['bound']}): {listed}{more}"
        do = "trust no result of this machine; run again, then replace the VM or the versions"
        return Row(name, FAILED, seen, do, values)
    worst = max(e["share"] for e in errors)
    seen = f"largest error {percent(worst)} of its bound ({result['bound']})" if worst else "exact"
    seen += f", {where} device{'s' * (where > 1)}"
    return Row(name, OK, seen, values=values)


def rate(
    name: str,
    result: Mapping[str, Any],
    peak: float | None,
    table: str,
    least_share: float,
    verdict: str = FAILED,
) -> Row:
    """Judge a rate: median and spread, the share of the table's, and devices that lag.

    Args:
      name: of the row.
      result: from `tpu.selftest`: "what", "unit", "scale" (so much a unit), "work" of a call and
        "seconds", a list of samples for each device.
      peak: the table's rate of a device; None where there is none.
      table: what the peak is of, or why there is none.
      least_share: the share of the peak below which the row has `verdict`.
    Returns: one row.
    Example:
      >>> result = dict(what="bf16", unit="TFLOP/s", scale=1e12, work=1e12)
      >>> result["seconds"] = {"TPU_0": [0.010, 0.011, 0.012]}
      >>> row = rate("matmul rate", result, 197e12, "v5e", 0.5)
      >>> row.verdict, row.seen
      ('FAILED', 'bf16: 90.9 TFLOP/s (83.3 to 100 in 3), 46 % of 197 (v5e)')
    """
    if "skipped" in result:
        return Row(name, SKIPPED, result["skipped"])
    by_device = {
        device: [result["work"] / s / result["scale"] for s in samples]
        for device, samples in result["seconds"].items()
    }
    medians = {device: statistics.median(rates) for device, rates in by_device.items()}
    slowest, fastest = min(medians, key=medians.__getitem__), max(medians.values())
    median, samples = medians[slowest], by_device[slowest]
    values: dict[str, Any] = {
        "unit": result["unit"],
        "median": median,
        "least": min(samples),
        "largest": max(samples),
        "samples": len(samples),
        "medians": medians,
        "share": None if peak is None else median * result["scale"] / peak,
        "table": None if peak is None else peak / result["scale"],
    }
    seen = f"{result['what']}: {median:.3g} {result['unit']} "
    seen += f"({min(samples):.3g} to {max(samples):.3g} in {len(samples)})"
    if len(medians) > 1:
        seen += f" on {slowest}, the slowest of {len(medians)}; fastest {fastest:.3g}"
    found = []
    if peak is None:
        seen += f", {table}"
    else:
        share = values["share"]
        seen += f", {percent(share)} of {values['table']:.4g} ({table})"
        if share < least_share:
            do = "see that nothing else runs; run again; if it stays: another VM"
            found.append((verdict, seen, do))
        elif share > ABOVE:
            do = "the clock or the table is wrong: report it, believe neither"
            found.append((WARNING, f"{seen}, more than there can be", do))
    if median < APART * fastest:
        do = f"see what else runs on {slowest}; if it stays slow: another VM"
        found.append((WARNING, seen if not found else f"{slowest} lags", do))
    return merged(name, found, seen, values)


def peaks(seen: Mapping[str, Any]) -> tuple[float | None, float | None, str]:
    """Find what the table says of a device.

    Args:
      seen: from `tpu.selftest`: "kind", JAX's name of the device.
    Returns: bf16 FLOP a second, bytes of memory a second, and the generation, or why there is none.
    Example:
      >>> peaks({"kind": "TPU v5 lite"})
      (197000000000000.0, 819000000000.0, 'v5e')
      >>> peaks({"kind": "cpu"})
      (None, None, 'no table for this device')
    """
    found = topology.of_kind(seen["kind"])
    if found is None:
        return None, None, "no table for this device"
    return found.device_bf16_flops, found.device_hbm_bytes_per_s, found.name


def links(seen: Mapping[str, Any]) -> tuple[float | None, str]:
    """Bound what a chip can send to others: all its links at once, one way each.

    An all-reduce has to send 2 (c - 1) / c times its bytes out of each of c chips, so the chip with
    the fewest links bounds it: one a dimension at the edge of a slice, two where the dimension is a
    ring. What XLA does may use fewer.

    Args:
      seen: from `tpu.selftest`: "kind", "coords" of every device, "slices".
    Returns: bytes a second, and what that is of; or None, and why.
    Example:
      >>> corners = [(x, y, 0) for x in range(2) for y in range(2)]
      >>> links({"kind": "TPU v5 lite", "coords": corners, "slices": 1})
      (90000000000.0, '2 links of v5e')
    """
    found = topology.of_kind(seen["kind"])
    if found is None:
        return None, "no table for this device"
    if seen["slices"] > 1:
        return None, "the network between slices is not in the table"
    coords = {tuple(place) for place in seen["coords"] or ()}
    if not coords:
        return None, "the devices do not say where they are"
    shape = tuple(max(axis) - min(axis) + 1 for axis in zip(*coords, strict=True))
    if len(coords) == 1:
        return None, "one chip has no links to compare with"
    if len(coords) != math.prod(shape):
        return None, f"the devices fill no box of {'x'.join(map(str, shape))} chips"
    shape = shape[: found.torus_dims]
    wrap = topology.Slice(found, shape).wrap
    number = sum(1 + ring for size, ring in zip(shape, wrap, strict=True) if size > 1)
    return number * found.ici_bytes_per_s, f"{number} link{'s' * (number > 1)} of {found.name}"
