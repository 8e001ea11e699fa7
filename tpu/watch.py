"""What to do next about a slice and its job: a pure function of what is seen.

`python -m tpu.run watch` looks, asks `next_action`, does it, and looks again. Nothing here has
effects, so every case is tested, and so are random histories: never two requests in flight, and
always an end, in a teardown or for a reason that is named.
"""

import dataclasses

WAITING = ("waiting", "creating", "deleting", "unknown")
INFRASTRUCTURE = (134, 137, 139)  # abort (JAX, when a peer is gone), kill, segmentation fault
STOPPED, DIVERGED = 75, 76


@dataclasses.dataclass(frozen=True)
class Cloud:
    """What is seen of the machines.

    Attributes:
      state: "absent", "waiting" for room, "creating", "active", "suspended" (the machines were
        taken; only the request is left), "failed", "deleting", or "unknown": it could not be asked.
      spot: whether the machines may be taken at any time.
      requested: a request was sent and nothing shows of it yet.
      ready: source and packages are on these machines.
      why: the provider's own words, where there are any.
      addresses: what ssh and peers call each worker, in order.
    """

    state: str
    spot: bool = False
    requested: bool = False
    ready: bool = False
    why: str = ""
    addresses: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Seen:
    """What is seen of the job, over all its workers.

    Attributes:
      state: "none", "running", "done", "stopped" (it saved: exit code 75), "diverged" (76),
        "infrastructure" (134, 137, 139, or lost with its machine), "user" (any other code), or
        "silent": a worker does not answer.
      why: a line that names the worker and its exit code.
      survivors: workers whose part still runs, or may.
      asked: somebody stopped it with `tpu.run stop`.
      quick: it stopped and saved within a minute of its start.
    """

    state: str
    why: str = ""
    survivors: int = 0
    asked: bool = False
    quick: bool = False

    @property
    def ended(self) -> bool:
        """Whether it ended, well or not; a worker that does not answer may still run."""
        return self.state not in ("none", "running", "silent")


@dataclasses.dataclass(frozen=True)
class Budget:
    """What was spent, and what may be.

    Attributes:
      hours, max_hours: since watching began; above the most, the job saves and all is torn down.
      retries, max_retries: starts after infrastructure failures on these machines.
      replaced, max_replaced: machines given back because they, or their request, failed.
      quick_stops, max_quick_stops: starts in a row after the job had stopped within a minute.
      silent_minutes, max_silent_minutes: how long a worker has not answered.
      request_minutes, max_request_minutes: how long a request that was sent does not show.
      idle_minutes, idle_teardown: minutes since the job ended, and after how many the machines are
        given back; below 0: never.
    """

    hours: float = 0.0
    max_hours: float = 24.0
    retries: int = 0
    max_retries: int = 3
    replaced: int = 0
    max_replaced: int = 2
    quick_stops: int = 0
    max_quick_stops: int = 3
    silent_minutes: float = 0.0
    max_silent_minutes: float = 10.0
    request_minutes: float = 0.0
    max_request_minutes: float = 10.0
    idle_minutes: float = 0.0
    idle_teardown: float = 0.0


@dataclasses.dataclass(frozen=True)
class Action:
    """What to do.

    Attributes:
      kind: "wait", "create", "delete" (and then create anew), "prepare" (sync, setup), "launch",
        "stop", or one of the two that end watching: "teardown", "end".
      why: the reason, a sentence for a person.
    """

    kind: str
    why: str


ENDS = ("teardown", "end")
_GRACE_HOURS = 0.25  # for a last save, before the machines go


def next_action(cloud: Cloud, job: Seen, budget: Budget) -> Action:
    """Choose what to do next.

    Args:
      cloud: the machines.
      job: the job.
      budget: what was spent and what may be.
    Returns: one action. "teardown" gives everything back, checks that, and ends watching.
    Example:
      >>> next_action(Cloud("suspended", spot=True), Seen("running"), Budget()).kind
      'delete'
      >>> next_action(Cloud("active", ready=True), Seen("stopped"), Budget())
      Action(kind='launch', why='it stopped and saved: the same run goes on')
      >>> next_action(Cloud("active", ready=True), Seen("user", "worker 1 ended with 1"), Budget())
      Action(kind='teardown', why='worker 1 ended with 1')
    """
    if budget.hours >= budget.max_hours:
        return _over(cloud, job, budget)
    if reason := ending(job, budget):
        return _idle(cloud, job, budget, reason)
    if cloud.state == "absent":
        if cloud.requested and budget.request_minutes >= budget.max_request_minutes:
            return Action("end", f"the request vanished{_because(cloud)}")
        if cloud.requested:
            return Action("wait", "the request does not show yet")
        return Action("create", "there are no machines")
    if cloud.state in WAITING:
        return Action("wait", f"the machines: {cloud.state}{_because(cloud)}")
    if cloud.state == "suspended" and cloud.spot:
        return Action("delete", "the spot machines were taken; they are asked for anew")
    if cloud.state in ("suspended", "failed"):
        return _replace(budget, f"the request {cloud.state}{_because(cloud)}")
    if not cloud.ready or job.state == "none":
        if budget.retries > budget.max_retries:
            return _replace(budget, f"the job cannot be started{_because(cloud)}")
        if not cloud.ready:
            return Action("prepare", "the machines have no source or packages yet")
        return Action("launch", "nothing runs yet")
    return _active(job, budget)


def _active(job: Seen, budget: Budget) -> Action:
    if job.state == "running":
        return Action("wait", job.why or "it runs")
    if job.state == "silent":
        if budget.silent_minutes >= budget.max_silent_minutes:
            return _replace(budget, f"{job.why} for {budget.silent_minutes:.0f} minutes")
        return Action("wait", job.why)
    if job.survivors:  # none may hold the TPU when the next start needs it
        return Action("stop", f"{job.why}; the others cannot go on without it")
    if job.state == "stopped":
        return Action("launch", "it stopped and saved: the same run goes on")
    if budget.retries < budget.max_retries:
        return Action("launch", f"{job.why}: start {budget.retries + 1} of {budget.max_retries}")
    return _replace(budget, f"{job.why}, after {budget.retries} more starts")


def _replace(budget: Budget, why: str) -> Action:
    if budget.replaced < budget.max_replaced:
        number = f"{budget.replaced + 1} of {budget.max_replaced}"
        return Action("delete", f"{why}: other machines, {number}")
    return Action("teardown", f"{why}, and {budget.replaced} replacements did not help")


def ending(job: Seen, budget: Budget) -> str:
    """Name why the job does not go on, if it does not.

    Example:
      >>> ending(Seen("stopped", "all saved and stopped", quick=True), Budget(quick_stops=3))
      'all saved and stopped within a minute of the start, 4 times in a row: it gets nowhere'
      >>> ending(Seen("stopped"), Budget(quick_stops=3))
      ''
    """
    if job.state == "done":
        return "the job is done"
    if job.state in ("user", "diverged"):
        return job.why or f"the job ended: {job.state}"
    if job.asked and job.ended:
        return "it was stopped by hand"
    if job.state == "stopped" and job.quick and budget.quick_stops >= budget.max_quick_stops:
        times = f"{budget.quick_stops + 1} times in a row"
        return f"{job.why} within a minute of the start, {times}: it gets nowhere"
    return ""


def _idle(cloud: Cloud, job: Seen, budget: Budget, reason: str) -> Action:
    if cloud.state == "absent" and not cloud.requested:
        return Action("end", reason)
    if job.survivors and cloud.state == "active":
        return Action("stop", f"{reason}; the others cannot go on without it")
    if budget.idle_teardown < 0:
        return Action("end", f"{reason}; the machines stay, and are paid for")
    if budget.idle_minutes >= budget.idle_teardown:
        return Action("teardown", reason)
    left = budget.idle_teardown - budget.idle_minutes
    return Action("wait", f"{reason}; the machines go in {left:.0f} minutes")


def _over(cloud: Cloud, job: Seen, budget: Budget) -> Action:
    reason = f"--max-hours={budget.max_hours:g} are over"
    if cloud.state == "absent" and not cloud.requested:
        return Action("end", reason)
    runs = cloud.state == "active" and (job.state == "running" or job.survivors > 0)
    if runs and budget.hours < budget.max_hours + _GRACE_HOURS:
        return Action("stop", f"{reason}: it saves first")
    return Action("teardown", reason)


def _because(cloud: Cloud) -> str:
    return f" ({cloud.why})" if cloud.why else ""
