"""Machines by the TPU API: queued resources and their TPU VMs (v4, v5e, v5p, v6e).

`gcloud`'s own parser (version 528) takes the argument lists; tests drive them with a stand-in for
`gcloud`. Not run on a TPU.
"""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from typing import Any

from tpu.topology import Slice
from tpu.verbs import Command, Place, Reply, numbered
from tpu.watch import Cloud

STATES = {
    "ACCEPTED": "waiting",
    "WAITING_FOR_RESOURCES": "waiting",
    "CREATING": "creating",
    "PROVISIONING": "creating",
    "ACTIVE": "active",
    "SUSPENDING": "deleting",
    "DELETING": "deleting",
    "SUSPENDED": "suspended",
    "FAILED": "failed",
}
NODE_STATES = {
    "READY": "active",
    "CREATING": "creating",
    "STARTING": "creating",
    "REPAIRING": "creating",
    "RESTARTING": "creating",
    "STOPPED": "failed",
    "STOPPING": "failed",
    "DELETING": "deleting",
    "PREEMPTED": "suspended",
    "TERMINATED": "suspended",
}
# Nobody is there to be asked about a host's key when machines are made anew at night.
UNASKED = ("--quiet", "--strict-host-key-checking=no")


@dataclasses.dataclass(frozen=True)
class Queued:
    """Queued resources."""

    place: Place

    @property
    def nodes(self) -> list[str]:
        """Names of the TPU VMs: one for each slice."""
        name, slices = self.place.name, self.place.slice.slices
        return [name] if slices == 1 else [f"{name}-{i}" for i in range(slices)]

    @property
    def where(self) -> tuple[str, str]:
        return f"--zone={self.place.zone}", f"--project={self.place.project}"

    def _queue(self, verb: str, *words: str) -> tuple[str, ...]:
        return "gcloud", "compute", "tpus", "queued-resources", verb, *words, *self.where

    def _vm(self, verb: str, *words: str) -> tuple[str, ...]:
        return "gcloud", "compute", "tpus", "tpu-vm", verb, *words, *self.where

    def create(self) -> list[Command]:
        place, slices = self.place, self.place.slice.slices
        several = (f"--node-count={slices}", f"--node-prefix={place.name}")
        kind = {"on-demand": (), "spot": ("--spot",), "reserved": ("--reserved",)}[place.capacity]
        argv = self._queue(
            "create",
            place.name,
            *((f"--node-id={place.name}",) if slices == 1 else several),
            *shape_asked(place.slice),
            f"--runtime-version={place.slice.generation.runtime}",
            *kind,
            "--quiet",
        )
        return [Command(argv, f"ask for {place.slice.name}, {place.capacity}")]

    def look(self) -> list[Command]:
        shape = "--format=json"
        nodes = [
            Command(self._vm("describe", node, shape), f"see the TPU VM {node} and its addresses")
            for node in self.nodes
        ]
        name = self.place.name
        return [Command(self._queue("describe", name, shape), "see the request's state"), *nodes]

    def seen(self, replies: Sequence[Reply]) -> Cloud:
        spot = self.place.capacity == "spot"
        request, *nodes = replies
        if request.code:
            gone = not_found(request.err)
            return Cloud("absent" if gone else "unknown", spot, why="" if gone else last(request))
        said = read_json(request.out)
        if not isinstance(said, dict):
            return Cloud("unknown", spot, why="gcloud's reply cannot be read")
        found = said.get("state")
        found = found if isinstance(found, dict) else {}
        name = found.get("state", "")
        state = STATES.get(name, "unknown")
        why = ((found.get("failedData") or {}).get("error") or {}).get("message", name)
        if state != "active":
            return Cloud(state, spot, why=why or "a request without a state")
        addresses: list[str] = []
        for node, reply in zip(self.nodes, nodes, strict=True):
            if reply.code:
                gone = not_found(reply.err)
                return Cloud("suspended" if gone else "unknown", spot, why=f"{node}: {last(reply)}")
            vm = read_json(reply.out)
            vm = vm if isinstance(vm, dict) else {}
            state = NODE_STATES.get(vm.get("state", ""), "unknown")
            if state != "active":
                return Cloud(state, spot, why=f"{node}: {vm.get('state', 'cannot be read')}")
            ends = [end.get("ipAddress", "") for end in vm.get("networkEndpoints", [])]
            if len(ends) != self.place.hosts or not all(ends):
                why = f"{node} has {len(ends)} workers, {self.place.target} {self.place.hosts}"
                return Cloud("unknown", spot, why=why)
            addresses += ends
        return Cloud("active", spot, addresses=tuple(addresses))

    def send(self, cloud: Cloud, files: Sequence[str]) -> list[Command]:
        return [
            Command(
                self._vm("scp", *files, f"{node}:", "--worker=all", *UNASKED),
                f"copy to every worker of {node}",
            )
            for node in self.nodes
        ]

    def everywhere(self, cloud: Cloud, words: Sequence[str], why: str) -> list[Command]:
        # `--worker=all` alone: `gcloud` loses the exit codes of a list such as 1,3, and its
        # --output-directory writes to a folder called None (version 528).
        return [
            Command(
                self._vm(
                    "ssh",
                    node,
                    "--worker=all",
                    *UNASKED,
                    f"--command={shlex.join(numbered(words, f'--first={i * self.place.hosts}'))}",
                ),
                f"{why}, on every worker of {node}",
            )
            for i, node in enumerate(self.nodes)
        ]

    def delete(self) -> list[Command]:
        argv = self._queue("delete", self.place.name, "--force", "--quiet")
        return [Command(argv, "give back the request and its TPU VMs")]

    def remains(self) -> list[Command]:
        return [
            Command(self._queue("list", "--format=json"), "list what may still be asked for"),
            Command(self._vm("list", "--format=json"), "list what may still be paid for"),
        ]

    def left(self, replies: Sequence[Reply]) -> list[str]:
        requests, machines = (listed(reply) for reply in replies)
        left = [f"queued resource {name}" for name in requests if name == self.place.name]
        return left + [f"TPU VM {name}" for name in machines if name in self.nodes]


def shape_asked(slice_: Slice) -> tuple[str, ...]:
    """Say what to ask for: a number of chips, or their shape where the number means another."""
    if ":" in slice_.name:
        return f"--type={slice_.generation.prefix}", f"--topology={slice_.topology}"
    return (f"--accelerator-type={slice_.accelerator_type}",)


def read_json(text: str) -> Any:
    """Read JSON; None where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def listed(reply: Reply) -> list[str]:
    """Return the last parts of the names in a list.

    Raises: ValueError where the list could not be had: then nothing is known.
    Example:
      >>> listed(Reply(0, '[{"name": "projects/p/locations/z/nodes/demo"}]'))
      ['demo']
    """
    rows = read_json(reply.out)
    if reply.code or not isinstance(rows, list):
        raise ValueError(last(reply))
    return [str(row.get("name", "")).rpartition("/")[2] for row in rows]


def not_found(text: str) -> bool:
    """Whether gcloud says that a thing is not there."""
    return "NOT_FOUND" in text or "was not found" in text


def last(reply: Reply) -> str:
    """Return the line that says what went wrong: gcloud's first ERROR, else the last line.

    Example:
      >>> last(Reply(1, "", "Updating...\\nERROR: (gcloud) no such zone\\n- try another"))
      'ERROR: (gcloud) no such zone - try another'
    """
    lines = [line.strip() for line in (reply.err or reply.out).splitlines() if line.strip()]
    for at, line in enumerate(lines):
        if line.startswith("ERROR:"):
            return " ".join(lines[at : at + 4])[:600]
    return lines[-1][:600] if lines else f"exit code {reply.code} and no word"
