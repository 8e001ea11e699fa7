"""Bootstrap: make one JAX program of the processes of a job, or say who did not come.

JAX's own start waits for all processes and, when one does not come, ends them without a Python
error. Here they first report to process 0 over a plain connection; those that are missing when the
time is up are named on every process that did come, with what to check.
"""

import os
import pathlib
import re
import socket
import time
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax._src import xla_bridge  # JAX has no public way to ask whether a backend is in use

COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TPU_PORT = 8476  # open between the hosts of a slice by default; JAX's own 8482 is not


class Processes(NamedTuple):
    """Hold which process of how many this one is.

    Attributes:
      index: from 0 to count - 1; process 0 writes files.
      count: processes of the job.
      source: where that was read from: "arguments", "environment", "SLURM", "Cloud TPU", or "none"
        for a process by itself, for which nothing was started.
    Example:
      >>> Processes(0, 1, "none").count
      1
    """

    index: int
    count: int
    source: str


def bootstrap(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    *,
    timeout_s: float = 300.0,
) -> Processes:
    """Join the processes of a job, before anything else uses JAX.

    Without arguments they are read from the first of these that is there: the variables
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; SLURM's of a job step with
    several tasks; Cloud TPU's, from variables or the machine's metadata.

    Args:
      coordinator: "host:port" of process 0, a free port there that the others can reach.
      count: processes of the job.
      index: of this process.
      timeout_s: how long to wait for the others.
    Returns: `Processes`. One process alone starts nothing: source "none", or count 1.
    Raises: ValueError naming the argument or variable that is missing or wrong; RuntimeError if JAX
      has been used already; TimeoutError naming the processes that did not come.
    Example:
      >>> bootstrap("localhost:8476", count=1, index=0)
      Processes(index=0, count=1, source='arguments')
    """
    if not timeout_s > 0:
        raise ValueError(f"bootstrap: timeout_s must be > 0, got {timeout_s!r}")
    given = {"coordinator": coordinator, "count": count, "index": index}
    if any(value is not None for value in given.values()):
        source, found = "arguments", given
    elif any(name in os.environ for name in (COORDINATOR, COUNT, INDEX)):
        names = {"coordinator": COORDINATOR, "count": COUNT, "index": INDEX}
        source = "environment"
        given = {names[what]: os.environ.get(names[what]) for what in names}
        found = dict(zip(names, given.values(), strict=True))
    elif _slurm_tasks(os.environ) > 1:
        source, found = "SLURM", _slurm(os.environ)
    elif (found := _cloud_tpu(os.environ)) is not None:
        source = "Cloud TPU"
    else:
        return Processes(0, 1, "none")
    missing = [name for name, value in given.items() if value is None]
    if source in ("arguments", "environment") and missing:
        raise ValueError(f"bootstrap: {', '.join(missing)} missing; give all of {', '.join(given)}")
    address = str(found["coordinator"])
    count, index = (
        _number(source, "count", found["count"]),
        _number(source, "index", found["index"]),
    )
    if count < 1:
        raise ValueError(f"bootstrap: count must be at least 1, got {count}")
    if not 0 <= index < count:
        raise ValueError(f"bootstrap: index must be from 0 to count={count} - 1, got {index}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"bootstrap: coordinator must be 'host:port' with a port below 65536, got {address!r}"
        )
    if count == 1:
        return Processes(0, 1, source)
    if jax.distributed.is_initialized():
        raise RuntimeError("bootstrap: the processes have been joined already; call it once")
    if xla_bridge.backends_are_initialized():
        raise RuntimeError(
            "bootstrap: JAX has been used already, by this process alone; call bootstrap before "
            "any array, key or device is made"
        )
    if index == 0:
        _gather(int(port), count, timeout_s)
    else:
        _report(host, int(port), index, count, timeout_s)
    jax.distributed.initialize(address, count, index, initialization_timeout=int(timeout_s) + 1)
    return Processes(index, count, source)


def _number(source: str, name: str, value: object) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise ValueError(f"bootstrap: {name} from {source} must be an int, got {value!r}") from None


def _slurm_tasks(env: Mapping[str, str]) -> int:
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        if name in env:
            return _number("SLURM", name, env[name])
    return 1


def _slurm(env: Mapping[str, str]) -> dict[str, object]:
    """Read a job step's variables; all tasks derive the same port from the job's number."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    # "node[007-015,020],other1": the first node is node007.
    first = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    if first is None or "SLURM_PROCID" not in env or "SLURM_JOB_ID" not in env:
        raise ValueError(
            "bootstrap: SLURM_NTASKS is above 1 but SLURM_PROCID, SLURM_JOB_ID or "
            "SLURM_STEP_NODELIST is missing; start the processes with srun"
        )
    port = 61440 + int(env["SLURM_JOB_ID"]) % 4096
    return {
        "coordinator": f"{''.join(part or '' for part in first.groups())}:{port}",
        "count": env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"],
        "index": env["SLURM_PROCID"],
    }


def _cloud_tpu(env: Mapping[str, str]) -> dict[str, object] | None:
    """Read the hosts of a slice from variables (GKE) or the machine's metadata (a TPU VM)."""
    if "TPU_WORKER_HOSTNAMES" in env and "TPU_WORKER_ID" in env:
        hosts, index, slices = env["TPU_WORKER_HOSTNAMES"], env["TPU_WORKER_ID"], env
    elif env.get("TPU_SKIP_MDS_QUERY") is None and any(
        pathlib.Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0")
    ):
        machine = env.get("GCE_METADATA_IP", "metadata.google.internal")
        try:
            hosts = _metadata(machine, "worker-network-endpoints")
            index = _metadata(machine, "agent-worker-number")
            written = re.findall(r"^(\w+): *'?([^'\n]*)'?$", _metadata(machine, "tpu-env"), re.M)
        except OSError:  # a machine elsewhere that has such a device
            return None
        slices = dict(written) | dict(env)
    else:
        return None
    # Either "host,host" or "name:id:address,...".
    workers = [worker.split(":")[-1] for worker in hosts.split(",")]
    first = slices.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]
    count = len(workers) * int(slices.get("MEGASCALE_NUM_SLICES") or 1)
    before = len(workers) * int(slices.get("MEGASCALE_SLICE_ID") or 0)
    return {
        "coordinator": f"{first.split(':')[0]}:{TPU_PORT}",
        "count": count,
        "index": before + _number("Cloud TPU", "TPU_WORKER_ID", index),
    }


def _metadata(machine: str, name: str) -> str:
    request = urllib.request.Request(
        f"http://{machine}/computeMetadata/v1/instance/attributes/{name}",
        headers={"Metadata-Flavor": "Google"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


def _gather(port: int, count: int, timeout_s: float) -> None:
    """On process 0: wait until every other process has reported, then let all go on."""
    deadline = time.monotonic() + timeout_s
    came: dict[int, socket.socket] = {}
    problem = ""
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise ValueError(
            f"bootstrap: port {port} cannot be opened on process 0 ({error.strerror}); stop the "
            f"run that has it, or choose another port"
        ) from None
    with server:
        while len(came) < count - 1 and not problem:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
                connection.settimeout(min(5.0, max(deadline - time.monotonic(), 0.001)))
                said = connection.recv(64)
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue  # one that connects and says nothing
                missing = [str(i) for i in range(1, count) if i not in came]
                problem = (
                    f"bootstrap: of {count} processes {', '.join(missing)} did not come within "
                    f"{timeout_s:g} s; check that they run, that their logs show no error, and "
                    f"that they reach process 0 at port {port}"
                )
                continue
            except OSError:
                continue
            who = re.fullmatch(rb"jax_attn (\d+) (\d+)\n", said)
            if who is None:  # a port scanner, a health check
                connection.close()
                continue
            index, its_count = int(who[1]), int(who[2])
            if its_count != count:
                problem = f"bootstrap: process {index} says count={its_count}, process 0 {count}"
            elif index in came or not 0 < index < count:
                problem = f"bootstrap: two processes say that they are process {index}"
            came[-1 if problem else index] = connection
    for connection in came.values():
        with connection:
            connection.sendall(problem.encode() or b"go")
    if problem:
        raise TimeoutError(problem) if "did not come" in problem else ValueError(problem)


def _report(host: str, port: int, index: int, count: int, timeout_s: float) -> None:
    """On the others: report to process 0, as soon as it is there, and wait for its word."""
    deadline = time.monotonic() + timeout_s
    answer = b""
    while not answer and time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                connection.sendall(f"jax_attn {index} {count}\n".encode())
                # Process 0 may have started later than this one: its time is up later.
                connection.settimeout(max(deadline - time.monotonic(), 0.001) + timeout_s)
                answer = connection.recv(1024)
        except OSError:  # not there yet
            time.sleep(0.2)
    if not answer:
        raise TimeoutError(
            f"bootstrap: process 0 did not answer at {host}:{port} within {timeout_s:g} s; check "
            f"that it runs, that this is its address, and that no firewall closes the port"
        )
    if answer != b"go":
        problem = answer.decode()
        raise TimeoutError(problem) if "did not come" in problem else ValueError(problem)
