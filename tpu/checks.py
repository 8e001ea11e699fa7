"""Checks of a machine, each a pure function from facts to one row of the doctor's table."""

import dataclasses
import re
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from tpu import topology
from tpu.facts import LOCK, Facts

OK, WARNING, FAILED = "ok", "warning", "FAILED"
UNAVAILABLE, SKIPPED = "unavailable", "skipped"


@dataclasses.dataclass(frozen=True)
class Row:
    """One check: what was seen, or why nothing was, and what to do about it."""

    name: str
    verdict: str
    """One of ok, warning, FAILED, unavailable, skipped."""
    seen: str
    do: str = ""
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Numbers, for scripts."""


@dataclasses.dataclass(frozen=True)
class Variable:
    """A variable of the environment that must not be set on a machine with, or without, TPUs."""

    names: tuple[str, ...]
    on_tpu: bool | None
    """None: on any machine."""
    values: str
    """Which values, as a pattern for the whole of it."""
    verdict: str
    why: str
    launcher_sets: bool = False
    """Right where a launcher says the hosts in TPU_WORKER_HOSTNAMES, as Kubernetes does."""


VARIABLES = (
    Variable(
        ("TPU_SKIP_MDS_QUERY",), True, r".*", FAILED,
        "JAX does not ask the machine which slice it is part of", True,
    ),
    Variable(
        ("ALLOW_MULTIPLE_LIBTPU_LOAD",), True, r"1|true|yes", FAILED,
        "a second process takes chips that are in use and crashes, instead of saying so",
    ),
    Variable(
        ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"), True, r"(?!.*(tpu|proxy)).+", FAILED,
        "JAX leaves the TPU unused",
    ),
    Variable(
        ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"), False, r".*tpu.*", WARNING,
        "no TPU chip is seen on this machine's PCI bus",
    ),
    Variable(
        (
            "TPU_PROCESS_BOUNDS", "TPU_CHIPS_PER_PROCESS_BOUNDS", "TPU_HOST_BOUNDS",
            "TPU_CHIPS_PER_HOST_BOUNDS", "TPU_PROCESS_ADDRESSES", "TPU_PROCESS_PORT",
            "CLOUD_TPU_TASK_ID", "TPU_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS",
            "TPU_VISIBLE_DEVICE_PATHS",
        ),
        True, r".*", FAILED,
        "left over from a run with several processes on a host: it hides chips, or hosts wait for "
        "others that never come", True,
    ),
    Variable(
        ("TPU_LIBRARY_PATH",), True, r".+", WARNING,
        "another libtpu is loaded than the one whose version is checked here",
    ),
    Variable(
        ("LIBTPU_INIT_ARGS", "XLA_FLAGS"), None, r".*_dump_\w*to=.*", WARNING,
        "every compilation writes files, which takes time and disk",
    ),
    Variable(
        ("JAX_DISABLE_JIT", "JAX_DEBUG_NANS", "JAX_LOG_COMPILES"), None, r"1|true|on|yes", WARNING,
        "for debugging: programs run slower",
    ),
)  # fmt: skip


def environment(facts: Facts) -> Row:
    """Look for variables that must not be set, and a setting of the kernel that slows a start.

    Which matter depends on the machine: what a planner on a laptop sets is wrong on a TPU VM, and
    what is left over on a VM is right in a container whose launcher set it.

    Args:
      facts: `environ`, `chips`, `hugepages`.
    Returns: one row.
    Example:
      >>> environment(Facts(chips=("v5e",), environ={"JAX_PLATFORMS": "cpu"})).do
      'unset JAX_PLATFORMS'
      >>> environment(Facts(environ={"JAX_PLATFORMS": "cpu"})).verdict
      'ok'
    """
    found, launched = [], bool(facts.environ.get("TPU_WORKER_HOSTNAMES"))
    for rule in VARIABLES:
        if rule.on_tpu not in (None, facts.tpu) or (rule.launcher_sets and launched):
            continue
        for name in rule.names:
            value = facts.environ.get(name)
            if value is not None and re.fullmatch(rule.values, value, re.I | re.S):
                shown = value if len(value) <= 60 else f"{value[:59]}…"
                found.append((rule.verdict, f"{name}={shown}: {rule.why}", f"unset {name}"))
    if facts.tpu and facts.hugepages not in ("", "always"):
        seen = f"transparent hugepages are {facts.hugepages!r}: programs start and stop slowly"
        do = "sudo sh -c 'echo always > /sys/kernel/mm/transparent_hugepage/enabled'"
        found.append((WARNING, seen, do))
    machine = f"{len(facts.chips)} TPU chips" if facts.tpu else "no TPU chips"
    return merged("environment", found, f"nothing set that hurts a machine with {machine}")


def in_use(facts: Facts) -> Row:
    """Say which process has the chips or libtpu's lock, and what to do; nothing is touched.

    Args:
      facts: `chips`, `holders`, `hidden`, `lock`.
    Returns: one row.
    Example:
      >>> in_use(Facts()).verdict
      'skipped'
    """
    name, values = "chips in use", {"holders": [dataclasses.asdict(h) for h in facts.holders]}
    by = "; ".join(f"process {h.pid} ({h.command}) has {', '.join(h.paths)}" for h in facts.holders)
    if facts.holders and facts.tpu:
        pids = " ".join(str(holder.pid) for holder in facts.holders)
        do = f"if it should not run: kill {pids}, on every host of the slice; leave its lock file"
        return Row(name, FAILED, by, do, values)
    if facts.holders:
        return Row(name, OK, f"{by}; this machine has no TPU, so it keeps none", values=values)
    hidden = f"; {facts.hidden} processes of other users could not be looked into"
    hidden = hidden if facts.hidden else ""
    if facts.lock == "foreign":
        seen = f"/{LOCK} is left over from another user, and nobody is seen to have it{hidden}"
        do = f"sudo lsof -w /{LOCK}; if that shows nothing on any host: sudo rm /{LOCK}"
        return Row(name, FAILED if facts.tpu else WARNING, seen, do, values)
    if not facts.tpu:
        return Row(name, SKIPPED, "no TPU chip on this machine's PCI bus", values=values)
    if facts.lock:
        seen = f"/{LOCK} is left over, and nobody is seen to have it{hidden}"
        do = f"if JAX says that the TPU is in use, once none runs on any host: rm /{LOCK}"
        return Row(name, WARNING, seen, do, values)
    return Row(name, OK, f"nobody is seen to have them{hidden}", values=values)


def reach(address: str, limit_s: float) -> str:
    """Try to connect, in bounded time, the look-up of the name included.

    Args:
      address: "host:port".
      limit_s: seconds.
    Returns: "connected", "refused", "silent", "unknown name", or the system's error.
    Example:
      >>> reach("127.0.0.1:1", 5.0)
      'refused'
    """
    host, _, port = address.rpartition(":")
    said = ["silent"]

    def connect() -> None:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=limit_s):
                said[0] = "connected"
        except TimeoutError:
            pass
        except ConnectionRefusedError:
            said[0] = "refused"
        except socket.gaierror:
            said[0] = "unknown name"
        except OSError as error:
            said[0] = error.strerror or str(error)

    # The system's look-up of a name knows no time limit of ours.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(limit_s)
    return said[0]


def coordinator(address: str, outcome: str, limit_s: float) -> Row:
    """Judge what `reach` said of process 0's port.

    Args:
      address: "host:port", or "" where none was asked for.
      outcome: what `reach` returned.
      limit_s: that it waited at most.
    Returns: one row.
    Example:
      >>> coordinator("t-0:8476", "refused", 5.0).seen
      't-0:8476: the host answers, nothing listens at the port'
    """
    if not address:
        return Row("coordinator", SKIPPED, "no --coordinator=host:port given")
    port = address.rpartition(":")[2]
    seen, do = {
        "connected": ("something listens there", ""),
        "refused": (
            "the host answers, nothing listens at the port",
            "start process 0 first: it listens only while it runs; then see that both say the port",
        ),
        "silent": (
            f"no answer within {limit_s:g} s",
            f"see that the host runs, and that a firewall rule opens port {port} between the hosts "
            "(8476 is open between the hosts of a slice by default, JAX's own 8482 is not)",
        ),
        "unknown name": (
            "no such host name",
            "see its address: gcloud compute tpus tpu-vm describe, or TPU_WORKER_HOSTNAMES",
        ),
    }.get(outcome, (outcome, "see that this host has a route to it"))
    verdict = OK if outcome == "connected" else FAILED
    return Row("coordinator", verdict, f"{address}: {seen}", do, {"outcome": outcome})


def expected(expect: str, environ: Mapping[str, str]) -> tuple[topology.Slice | None, str]:
    """Find the slice that the devices are compared with.

    Args:
      expect: a name for `tpu.topology.find`, or "" to take TPU_ACCELERATOR_TYPE, if it is set.
      environ: variables of the environment; MEGASCALE_NUM_SLICES says how many slices there are.
    Returns: the slice, or None, and where it was read from, or why there is none.
    Raises: ValueError: `expect` is no slice.
    Example:
      >>> found, source = expected("", {"TPU_ACCELERATOR_TYPE": "v5litepod-16"})
      >>> found.name, source
      ('v5e-16', 'TPU_ACCELERATOR_TYPE')
    """
    if expect:
        return topology.find(expect), "--expect"
    name = environ.get("TPU_ACCELERATOR_TYPE", "")
    if not name:
        return None, "nothing was expected: give --expect=v5e-16, for example"
    try:
        found = topology.find(name)
        number = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    except ValueError as error:
        return None, f"nothing to compare with: TPU_ACCELERATOR_TYPE: {error}"
    return dataclasses.replace(found, slices=number), "TPU_ACCELERATOR_TYPE"


def devices(seen: Mapping[str, Any], facts: Facts, want: topology.Slice | None, source: str) -> Row:
    """Compare the devices that JAX sees with the chips of the machine and of the slice.

    Args:
      seen: from `tpu.selftest`: platform, kind, local, total, index, processes.
      facts: `chips`.
      want, source: from `expected`.
    Returns: one row.
    Example:
      >>> one = dict(platform="cpu", kind="cpu", local=1, total=1, index=0, processes=1)
      >>> devices(one, Facts(chips=("v5e",)), None, "none given").verdict
      'FAILED'
    """
    found, have = [], f"{seen['total']} × {seen['kind']}"
    if seen["processes"] > 1:
        have += f", {seen['local']} here, process {seen['index']} of {seen['processes']}"
    if facts.tpu and seen["platform"] != "tpu":
        do = "see the rows versions, environment and chips in use"
        text = f"JAX runs on {seen['platform']}, but the machine has {len(facts.chips)} TPU chips"
        found.append((FAILED, text, do))
    elif facts.tpu:
        # No 7x was seen yet: on the bus one of its two devices may count by itself.
        kind = next(g for g in topology.GENERATIONS if g.name == facts.chips[0])
        there = len(facts.chips) * kind.devices_per_chip
        if seen["local"] not in (len(facts.chips), there):
            text = f"JAX sees {seen['local']} devices here, the machine's chips have {there}"
            found.append((FAILED, text, "see the row environment; then replace the VM"))
    if want is not None and seen["kind"] != want.generation.kind:
        text = f"{source} says {want.name}, whose devices are {want.generation.kind}"
        found.append((FAILED, text, "run this on that machine, or correct what is expected"))
    elif want is not None and seen["total"] != want.devices:
        text = f"{source} says {want.name}, which has {want.devices} devices"
        hosts = want.hosts * want.slices
        do = f"start this on all {hosts} hosts at once" if hosts > 1 else "correct --expect"
        found.append((FAILED, text, do))
    elif want is not None:
        have += f", all of {want.name}"
    if want is None:
        have += f"; {source}"
    if found:
        found = [(found[0][0], f"{have}; {found[0][1]}", found[0][2]), *found[1:]]
    return merged("devices", found, have, dict(seen))


def merged(
    name: str,
    found: Sequence[tuple[str, str, str]],
    fine: str,
    values: Mapping[str, Any] | None = None,
) -> Row:
    """Make one row of what was found, the worst one's verdict.

    Args:
      name: of the row.
      found: verdict, what was seen and what to do, of each finding.
      fine: what to say where nothing was found.
      values: numbers for scripts.
    Returns: the row.
    Example:
      >>> merged("it", [(WARNING, "a", "do a"), (FAILED, "b", "do b")], "all well").seen
      'a; b'
    """
    if not found:
        return Row(name, OK, fine, values=values or {})
    worst = FAILED if any(verdict == FAILED for verdict, _, _ in found) else WARNING
    do = dict.fromkeys(do for _, _, do in found)
    return Row(name, worst, "; ".join(s for _, s, _ in found), "; ".join(do), values or {})
