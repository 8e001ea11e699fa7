"""Tests of tpu.watch: a table of cases, and random histories of a cloud that misbehaves."""

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpu.watch import ENDS, INFRASTRUCTURE, Budget, Cloud, Seen, next_action
from tpu.workers import TERMINATED, Row, judge

READY = Cloud("active", ready=True)
SPOT = Cloud("active", spot=True, ready=True)
KILLED = Seen("infrastructure", "worker 1 ended with 137 (killed)")


def spent(value: Budget, **changed: float) -> Budget:
    return dataclasses.replace(value, **changed)


CASES = [
    # machines, job, budget, what to do, a part of the reason
    (Cloud("absent"), Seen("none"), {}, "create", "no machines"),
    (Cloud("absent"), Seen("running"), {}, "create", "no machines"),
    (Cloud("absent", requested=True), Seen("none"), {}, "wait", "does not show yet"),
    (Cloud("absent", requested=True), Seen("none"), {"request_minutes": 11}, "end", "vanished"),
    (Cloud("waiting", why="WAITING"), Seen("none"), {}, "wait", "WAITING"),
    (Cloud("creating"), Seen("none"), {}, "wait", "creating"),
    (Cloud("unknown", why="429"), Seen("running"), {}, "wait", "429"),
    (Cloud("deleting"), Seen("running"), {}, "wait", "deleting"),
    (Cloud("suspended", spot=True), Seen("running"), {}, "delete", "were taken"),
    (Cloud("suspended", spot=True), Seen("stopped"), {"replaced": 9}, "delete", "were taken"),
    (Cloud("suspended", why="repair"), Seen("running"), {}, "delete", "1 of 2"),
    (Cloud("failed", why="no room"), Seen("none"), {"replaced": 2}, "teardown", "no room"),
    (Cloud("active"), Seen("none"), {}, "prepare", "no source"),
    (Cloud("active"), Seen("none"), {"retries": 4}, "delete", "cannot be started"),
    (Cloud("active"), Seen("none"), {"retries": 4, "replaced": 2}, "teardown", "cannot be started"),
    (READY, Seen("none"), {}, "launch", "nothing runs"),
    (READY, Seen("running"), {}, "wait", "runs"),
    (SPOT, Seen("stopped"), {}, "launch", "same run"),
    (READY, Seen("stopped", asked=True), {}, "teardown", "by hand"),
    (READY, Seen("stopped", quick=True), {"quick_stops": 2}, "launch", "same run"),
    (READY, Seen("stopped", quick=True), {"quick_stops": 3}, "teardown", "4 times in a row"),
    (READY, Seen("stopped"), {"quick_stops": 3}, "launch", "same run"),
    (READY, KILLED, {}, "launch", "start 1 of 3"),
    (READY, dataclasses.replace(KILLED, survivors=3), {}, "stop", "others cannot go on"),
    (READY, KILLED, {"retries": 2}, "launch", "start 3 of 3"),
    (READY, KILLED, {"retries": 3}, "delete", "other machines, 1 of 2"),
    (READY, KILLED, {"retries": 3, "replaced": 2}, "teardown", "did not help"),
    (READY, Seen("silent", "no answer"), {"silent_minutes": 9}, "wait", "no answer"),
    (READY, Seen("silent", "no answer"), {"silent_minutes": 10}, "delete", "for 10 minutes"),
    (READY, Seen("user", "worker 0 ended with 1"), {}, "teardown", "worker 0 ended with 1"),
    (READY, Seen("user", "x", survivors=1), {}, "stop", "others cannot go on"),
    (READY, Seen("user", "x"), {"idle_teardown": 30}, "wait", "x; the machines go in 30 minutes"),
    (READY, Seen("user", "x"), {"idle_teardown": 30, "idle_minutes": 30}, "teardown", "x"),
    (READY, Seen("user", "x"), {"idle_teardown": -1}, "end", "are paid for"),
    (READY, Seen("diverged"), {}, "teardown", "diverged"),
    (READY, Seen("done"), {}, "teardown", "done"),
    (Cloud("absent"), Seen("done"), {}, "end", "done"),
    (READY, Seen("running"), {"hours": 24}, "stop", "--max-hours=24 are over: it saves"),
    (READY, Seen("stopped"), {"hours": 24}, "teardown", "--max-hours=24"),
    (READY, Seen("running"), {"hours": 24.3}, "teardown", "--max-hours=24"),
    (Cloud("waiting"), Seen("none"), {"hours": 25}, "teardown", "--max-hours=24"),
    (Cloud("absent"), Seen("none"), {"hours": 25}, "end", "--max-hours=24"),
]


@pytest.mark.parametrize(("cloud", "job", "changed", "kind", "why"), CASES)
def test_what_comes_next(
    cloud: Cloud, job: Seen, changed: dict[str, float], kind: str, why: str
) -> None:
    action = next_action(cloud, job, spent(Budget(), **changed))
    assert (action.kind, why in action.why) == (kind, True), action


@dataclasses.dataclass
class World:
    """A cloud and a job that may do anything, at any time, and what is asked of them."""

    chance: random.Random
    spot: bool
    budget: Budget
    cloud: str = "absent"
    ready: bool = False
    in_flight: int = 0
    job: Seen = dataclasses.field(default_factory=lambda: Seen("none"))

    def see(self) -> Cloud:
        # A request that was sent shows only later.
        shown = "absent" if self.in_flight else self.cloud
        if self.chance.random() < 0.1 and not self.in_flight:
            shown = "unknown"
        ready = self.ready and shown == "active"
        return Cloud(shown, self.spot, self.in_flight > 0, ready, why="words")

    def obey(self, kind: str) -> None:
        chance = self.chance.random()
        if kind == "create":
            assert self.cloud == "absent"
            assert not self.in_flight, "two requests in flight"
            self.in_flight, self.cloud, self.ready = 1, "waiting", False
        elif kind == "delete":
            assert self.cloud in ("suspended", "failed", "active")
            counts = not (self.cloud == "suspended" and self.spot)
            self.budget = spent(self.budget, retries=0, replaced=self.budget.replaced + counts)
            self.cloud, self.ready = "deleting", False
        elif kind == "prepare":
            assert self.cloud == "active"
            if chance < 0.7:
                self.ready, self.job = True, Seen("none")
            else:
                self.budget = spent(self.budget, retries=self.budget.retries + 1)
        elif kind == "launch":
            assert self.cloud == "active"
            assert self.ready
            assert not self.job.survivors, "started while a part still runs"
            again = self.job.state == "infrastructure"
            self.budget = spent(self.budget, retries=self.budget.retries + again)
            self.job = Seen("running")
        elif kind == "stop" and chance < 0.9:
            state = "stopped" if self.job.state == "running" else self.job.state
            self.job = dataclasses.replace(self.job, state=state, survivors=0)

    def pass_time(self) -> None:
        chance = self.chance.random
        hours = self.chance.choice((0.01, 0.2, 1.0))
        self.budget = spent(self.budget, hours=self.budget.hours + hours)
        if self.in_flight and chance() < 0.5:
            self.in_flight = 0
        moves = {
            "waiting": ("creating", "failed", "waiting"),
            "creating": ("active", "active", "failed"),
            "active": ("active",) * 9 + ("suspended", "failed"),
            "deleting": ("absent", "deleting"),
        }
        if not self.in_flight:
            self.cloud = self.chance.choice(moves.get(self.cloud, (self.cloud,)))
        if self.cloud == "active" and self.job.state == "running":
            ends = ("running",) * 4 + ("stopped", "infrastructure", "user", "diverged", "done")
            state = self.chance.choice((*ends, "silent"))
            left = self.chance.randrange(3) if state in ("infrastructure", "user") else 0
            self.job = Seen(state, "why", left, asked=state == "stopped" and chance() < 0.1)
        elif self.job.state == "silent" and chance() < 0.5:
            self.job = Seen("running")
        silent = 60 * hours + self.budget.silent_minutes if self.job.state == "silent" else 0
        self.budget = spent(self.budget, silent_minutes=silent)
        if self.job.ended:
            self.budget = spent(self.budget, idle_minutes=self.budget.idle_minutes + 60 * hours)


@settings(max_examples=300)
@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([0.0, 30.0, -1.0]))
def test_any_history_ends_with_a_reason(seed: int, spot: bool, idle_teardown: float) -> None:
    world = World(random.Random(seed), spot, Budget(idle_teardown=idle_teardown))
    most = 30 * 100 + 10  # time passes by at least 0.01 h at each look
    for _ in range(most):
        seen = world.see()
        action = next_action(seen, world.job, world.budget)
        if action.kind in ENDS:
            break
        world.obey(action.kind)
        world.pass_time()
    else:
        raise AssertionError("it does not end")
    assert action.why
    if action.kind == "end":  # and nothing is paid for without being said
        paid = "are paid for" in action.why or "vanished" in action.why
        assert seen.state == "absent" or paid


ENDED = [
    # exit code and second of each worker; what it means, who is named
    ([(0, 5), (0, 5)], "done", "all"),
    ([(75, 5), (75, 6)], "stopped", "all"),
    ([(75, 5), (0, 6)], "stopped", "worker 0 saved and stopped, worker 1 ended with 0"),
    ([(1, 5), (134, 99)], "user", "worker 0"),
    ([(134, 9), (1, 5)], "user", "worker 1"),
    ([(134, 5), (1, 5)], "user", "worker 1"),
    ([(137, 5), (1, 5)], "infrastructure", "worker 0"),
    ([(137, 6), (134, 5)], "infrastructure", "worker 0 ended with 137"),  # noticed later
    ([(137, 7), (1, 6), (134, 5)], "infrastructure", "worker 0"),
    ([(1, 6), (137, 5), (134, 7)], "infrastructure", "worker 1"),
    ([(1, 5), (137, 9)], "user", "worker 0"),  # the others were killed for it
    ([(139, 5), (75, 4)], "infrastructure", "worker 0"),
    ([(76, 5), (76, 5)], "diverged", "worker 0"),
    ([(2, 5), (2, 5)], "user", "worker 0"),
    ([(127, 5), (0, 5)], "user", "worker 0 ended with 127 (the command was not found)"),
    ([(TERMINATED, 5), (137, 5)], "infrastructure", "worker 1"),
    ([(TERMINATED, 5), (1, 5)], "user", "worker 1"),
    ([(TERMINATED, 5), (134, 8)], "infrastructure", "worker 0"),
]


@pytest.mark.parametrize(("ends", "state", "named"), ENDED)
def test_the_part_that_ended_first_is_the_cause(
    ends: list[tuple[int, int]], state: str, named: str
) -> None:
    rows = [Row(i, "ended", code, second, attempt=1) for i, (code, second) in enumerate(ends)]
    seen = judge(rows)
    assert (seen.state, seen.why.startswith(named)) == (state, True), seen


@pytest.mark.parametrize("code", INFRASTRUCTURE)
def test_a_worker_that_died_makes_a_job_fail_while_others_run(code: int) -> None:
    rows = [Row(0, "running", attempt=1), Row(1, "ended", code, 5, attempt=1)]
    seen = judge(rows)
    assert (seen.state, seen.survivors) == ("infrastructure", 1)


def test_a_stop_is_quick_where_all_that_saved_ran_briefly() -> None:
    def quick(*seconds: int | None) -> bool:
        return judge(
            [Row(i, "ended", 75, 5, ran, attempt=1) for i, ran in enumerate(seconds)]
        ).quick

    assert quick(3, 59)
    assert not quick(3, 60)
    assert not quick(3, None)  # its worker.sh is an older one


def test_rows_that_are_not_of_one_start() -> None:
    running = Row(0, "running", attempt=2, beat=1)
    assert judge([running, Row(1, "running", attempt=2, beat=99)]).why.endswith("worker 1 for 99 s")
    assert judge([running, Row(1, "none")]).why == "worker 1 lost the job"
    assert judge([running, Row(1, "lost", attempt=2)]).state == "infrastructure"
    assert judge([running, Row(1, "ended", 0, 5, attempt=1)]).state == "infrastructure"
    assert judge([running, Row(1, "orphaned", attempt=2)]).survivors == 2
    assert judge([running, Row(1)]).state == "silent"
    assert judge([Row(0, "none"), Row(1, "none")]).state == "none"
