"""Machines by Compute Engine: managed instance groups (v5p, v6e, 7x). Experimental.

A group in bulk mode with a workload policy is one slice: its machines come together or not at all.
`gcloud`'s own parser (version 528) takes the argument lists, but for --target-size-policy-mode,
which is newer: a slice of several hosts needs a newer `gcloud`. Not run on a TPU, and less tried
than `tpu.cloud`.
"""

import dataclasses
import shlex
from collections.abc import Sequence

from tpu.cloud import UNASKED, last, listed, not_found, read_json
from tpu.verbs import Command, Place, Reply, numbered
from tpu.watch import Cloud

IMAGES = {"7x": "ubuntu-accel-2404-amd64-tpu-tpu7x"}
IMAGE = "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e"
GONE = ("STOPPING", "STOPPED", "SUSPENDING", "SUSPENDED", "TERMINATED")


@dataclasses.dataclass(frozen=True)
class Managed:
    """A managed instance group, its template, and the policy that makes it one slice."""

    place: Place

    @property
    def where(self) -> tuple[str, str]:
        return f"--zone={self.place.zone}", f"--project={self.place.project}"

    @property
    def region(self) -> str:
        return self.place.zone.rpartition("-")[0]

    def _group(self, verb: str, *words: str) -> tuple[str, ...]:
        words = (verb, self.place.name, *words, *self.where)
        return "gcloud", "compute", "instance-groups", "managed", *words

    def create(self) -> list[Command]:
        place = self.place
        name, project, region = place.name, f"--project={place.project}", self.region
        kind = {
            "on-demand": (),
            "spot": ("--provisioning-model=SPOT", "--instance-termination-action=DELETE"),
            "reserved": (
                "--provisioning-model=RESERVATION_BOUND",
                "--instance-termination-action=DELETE",
                "--reservation-affinity=specific",
                f"--reservation={place.reservation}",
            ),
        }[place.capacity]
        template = (
            *("gcloud", "compute", "instance-templates", "create", name),
            f"--machine-type={place.slice.machine_type}",
            f"--instance-template-region={region}",
            f"--image-family={IMAGES.get(place.slice.generation.name, IMAGE)}",
            "--image-project=ubuntu-os-accelerator-images",
            *("--boot-disk-size=200GB", "--maintenance-policy=TERMINATE"),
            "--scopes=cloud-platform",
            *(*kind, project, "--quiet"),
        )
        path = f"projects/{place.project}/regions/{region}"
        group = [
            f"--size={place.hosts}",
            f"--template={path}/instanceTemplates/{name}",
            "--default-action-on-vm-failure=do-nothing",
        ]
        commands = [Command(template, f"describe a host of {place.slice.name}, {place.capacity}")]
        if place.hosts > 1:
            policy = (
                *("gcloud", "compute", "resource-policies", "create", "workload-policy", name),
                *("--type=HIGH_THROUGHPUT", f"--accelerator-topology={place.slice.topology}"),
                *(f"--region={region}", project, "--quiet"),
            )
            commands.insert(0, Command(policy, "describe how the hosts are connected"))
            group += [
                "--target-size-policy-mode=bulk",
                f"--workload-policy={path}/resourcePolicies/{name}",
            ]
        made = self._group("create", *group, "--quiet")
        return [*commands, Command(made, f"ask for {place.hosts} hosts together")]

    def look(self) -> list[Command]:
        argv = self._group("list-instances", "--format=json")
        return [Command(argv, "see the machines of the group")]

    def seen(self, replies: Sequence[Reply]) -> Cloud:
        spot = self.place.capacity == "spot"
        (reply,) = replies
        if reply.code:
            gone = not_found(reply.err)
            return Cloud("absent" if gone else "unknown", spot, why="" if gone else last(reply))
        rows = read_json(reply.out)
        if not isinstance(rows, list):
            return Cloud("unknown", spot, why="gcloud's reply cannot be read")
        names = sorted(str(row.get("instance", "")).rpartition("/")[2] for row in rows)
        status = [str(row.get("instanceStatus", "")) for row in rows]
        acting = {str(row.get("currentAction", "NONE")) for row in rows}
        if any(state in GONE for state in status):
            return Cloud("suspended", spot, why=f"machines are {', '.join(sorted(set(status)))}")
        if acting & {"DELETING", "ABANDONING"}:
            return Cloud("deleting", spot, why=", ".join(sorted(acting)))
        if len(rows) == self.place.hosts and set(status) == {"RUNNING"} and acting == {"NONE"}:
            return Cloud("active", spot, addresses=tuple(names))
        errors = [
            error.get("message", "")
            for row in rows
            for error in ((row.get("lastAttempt") or {}).get("errors") or {}).get("errors", [])
        ]
        why = next(filter(None, errors), f"{status.count('RUNNING')} of {self.place.hosts} run")
        return Cloud("waiting", spot, why=why)

    def _each(self, cloud: Cloud) -> list[str]:
        # Sorted names: the order in which workers are numbered.
        if len(cloud.addresses) != self.place.hosts:
            raise ValueError(f"{len(cloud.addresses)} machines are known of {self.place.hosts}")
        return list(cloud.addresses)

    def send(self, cloud: Cloud, files: Sequence[str]) -> list[Command]:
        scp = ("gcloud", "compute", "scp", *files)
        return [
            Command((*scp, f"{machine}:", *UNASKED, *self.where), f"copy to {machine}")
            for machine in self._each(cloud)
        ]

    def everywhere(self, cloud: Cloud, words: Sequence[str], why: str) -> list[Command]:
        ssh = ("gcloud", "compute", "ssh")
        return [
            Command(
                (
                    *(*ssh, machine, *UNASKED, *self.where),
                    f"--command={shlex.join(numbered(words, f'--index={i}'))}",
                ),
                f"{why}, on {machine}",
            )
            for i, machine in enumerate(self._each(cloud))
        ]

    def delete(self) -> list[Command]:
        name, project = self.place.name, f"--project={self.place.project}"
        region, where = f"--region={self.region}", ("gcloud", "compute")
        commands = [
            Command(self._group("delete", "--quiet"), "give back the machines"),
            Command(
                (*where, "instance-templates", "delete", name, region, project, "--quiet"),
                "remove their description",
            ),
        ]
        if self.place.hosts > 1:
            policy = (*where, "resource-policies", "delete", name, region, project, "--quiet")
            commands.append(Command(policy, "remove how they are connected"))
        return commands

    def remains(self) -> list[Command]:
        name, project = self.place.name, f"--project={self.place.project}"
        groups = ("gcloud", "compute", "instance-groups", "managed", "list")
        machines = ("gcloud", "compute", "instances", "list")
        return [
            Command((*groups, f"--filter=name={name}", project, "--format=json"), "list groups"),
            Command(
                (*machines, f"--filter=name~^{name}-[a-z0-9]+$", project, "--format=json"),
                "list machines that may still be paid for",
            ),
        ]

    def left(self, replies: Sequence[Reply]) -> list[str]:
        groups, machines = (listed(reply) for reply in replies)
        left = [f"instance group {name}" for name in groups if name == self.place.name]
        return left + [f"machine {name}" for name in machines]
