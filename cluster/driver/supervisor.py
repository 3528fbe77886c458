"""The state machine that decides when to start, end and restart the ranks of a run.

    gathering --enough nodes--> running --all ended well--> done
        ^                          | a rank failed, a node is silent, no step for too long
        |                          v
        +---- ending <-------- judging        judging: probe every node of the attempt, let the others report, collect
        +---- stopping                        stacks; then name the cause (cluster/cause.py) and end all ranks

`handle(now, event)` returns actions and performs none. Decisions are made at the next tick. These rules hold:

    - An attempt starts only when no earlier rank is alive on an answering node. On a silent node, the agent ends the
      ranks when its lease is over (cluster/spawn.py).
    - Attempt numbers rise, also over launches. Ranks of earlier attempts cannot write checkpoints.
    - A restart first uses spare nodes. If there are too few, it uses the fastest layout that fits (shapes.py).
    - When nodes return, the run stops after the next checkpoint or complete copy in memory, and restarts with more
      ranks. When a node drains, the run writes a checkpoint at once and restarts without the node.
    - Every kind of cause has a budget of failures, which is reset when the run saves a later step. For lost nodes,
      each node has its own budget.
"""

from collections import Counter
from functools import partial

from cluster.cause import Cause, Kind
from cluster.clocks import HeldUp
from cluster.driver import messages as m
from cluster.driver.attempt import Attempt
from cluster.driver.diagnosis import give_up, no_node_comes, too_few
from cluster.driver.messages import DriverPhase, NodeHealth, NodeState
from cluster.driver.policy import Policy
from cluster.incident import warning_of
from cluster.patience import PATIENT_PHASES, Patience
from cluster.run_files import NONE, Age
from cluster.spawn import LEASE
from cluster.topology import Node, Placement, place
from conf.errors import EXIT_CRASH, EXIT_DIVERGED, EXIT_OK, EXIT_STOPPED, EXIT_USER
from conf.words import some_of

NAP = 0.25
"""If the driver runs no tick for longer than this fraction of a heartbeat, it counts as suspended in that time."""
SHOWN_NODES = 8
"""Maximum number of idle nodes that a sentence names."""


def _budgets(cause: Cause) -> list[tuple[Kind, str]]:
    """Return the budgets that a failure reduces, as (kind, name). The name is empty unless a node was lost."""
    return [(cause.kind, name) for name in cause.nodes] if cause.kind is Kind.node else [(cause.kind, "")]


class Supervisor:
    """The driver's state machine; the module docstring describes it."""

    def __init__(self, policy: Policy, now: float):
        self.policy = policy
        self.phase = DriverPhase.gathering
        self.nodes: dict[str, NodeState] = {}
        self.number = policy.first_attempt - 1
        self.attempt: Attempt | None = None
        self.saved = NONE
        """Attempt and step of the newest checkpoint."""
        self.held = NONE
        """Attempt and step of the newest complete copy in the answering nodes' memory."""
        self.failures: list[tuple[int, Cause]] = []
        self._spent = Counter[tuple[Kind, str]]()
        self._patience = Patience(policy.hang_after, policy.start_timeout, policy.kill_after, policy.timeout)
        self._out: list[m.SupervisorAction] = []
        self._held_up = HeldUp(NAP * policy.heartbeat, now)
        self._late_from = now
        """Time before which the supervisor does not count a silent node as lost."""
        self._deadline = now + policy.wait
        self._no_node_comes = False
        self._stop_why: str | None = None
        self._placed: tuple[tuple | None, Placement | None] = None, None
        """Inputs and result of the last search for a placement. Equal inputs reuse the result."""
        self._probing: set[str] = set()
        self._settled_at = self._probed_at = now
        self._failed_at: float | None = None
        self._named_by: float | None = None
        """Time until which the supervisor waits for stack traces of a run that is silent for too long, or None."""
        self._quiet_since = now
        """Time of the ranks' last progress before the judged failure."""
        self._again_until: int | None = None
        """Highest step that the current attempt repeats, or None."""
        self._reached = -1
        """Highest step that a rank of this launch worked on."""
        self._safe = -1
        """Highest step that this launch has saved."""

    @property
    def current(self) -> Attempt:
        """The newest attempt, even if it has ended. One must exist."""
        assert self.attempt is not None
        return self.attempt

    @property
    def answering(self) -> dict[str, Node]:
        """Nodes that answer, by id."""
        return {id: state.node for id, state in self.nodes.items() if state.health is NodeHealth.ok}

    @property
    def draining(self) -> set[str]:
        """Ids of draining nodes."""
        return {id for id, state in self.nodes.items() if state.draining}

    def handle(self, now: float, event: m.Event) -> list[m.SupervisorAction]:
        """Process one event. Returns actions in order. now: monotonic seconds."""
        self._out = []
        if self.phase is DriverPhase.done:
            return []
        match event:
            case m.NodeJoined(node):
                self._join(now, node)
            case m.NodeLost(node, why, returning, last):
                self._lose(node, NodeHealth.returning if returning else NodeHealth.gone, why)
                self._no_node_comes |= last
            case m.AgentBeat(node, number, ranks):
                self._beat(now, node, number, ranks)
            case m.NodeHeard(node):
                if node in self.nodes and self.nodes[node].health is NodeHealth.ok:
                    self.nodes[node].heard = now
            case m.NodeProbed(node):
                if node in self._probing:
                    self._probing.discard(node)
                    # A node that was held up gets as much time as the other nodes to report why its ranks failed.
                    self._settled_at = max(self._settled_at, now + self.policy.settle)
            case m.StacksPrinted(number, texts, rings):
                if self.attempt and number == self.number:
                    self.attempt.stacks |= texts
                    self.attempt.rings |= rings
            case m.StartFailed(number, node, text):
                self._start_failed(number, node, text)
            case m.CheckpointSaved(age):
                self._save(now, age)
            case m.CopyHeld(age):
                self._hold(now, age)
            case m.NodeDraining(node, why):
                self._drain(now, node, why)
            case m.StopAsked(why):
                self._ask_stop(now, why)
            case m.LayoutsPlanned():
                self._tell_limits()
            case m.Tick():
                self._tick(now)
                self._advance(now)
        return self._out

    # Events ---------------------------------------------------------------------------------------------------------

    def _join(self, now: float, node: Node) -> None:
        kind = "node_back" if node.id in self.nodes else "node_joined"
        self.nodes[node.id] = NodeState(node, now)
        self._note(kind, f"{node.name} ({node.address}, {node.devices} devices)", node=node.name)

    def _lose(self, id: str, health: NodeHealth, why: str) -> None:
        state = self.nodes.get(id)
        if state is None or state.health is NodeHealth.gone:
            return
        if state.health is NodeHealth.ok or health is NodeHealth.gone:
            self._note("node_lost", f"{state.node.name}: {why}", node=state.node.name)
        state.health, state.live = health, set()
        self._probing.discard(id)
        if self.attempt and id in self.attempt.ranks_of:
            self.attempt.lost.setdefault(id, why)

    def _beat(self, now: float, id: str, number: int, ranks: list) -> None:
        state = self.nodes.get(id)
        if state is None or state.health in (NodeHealth.gone, NodeHealth.returning):
            return
        state.heard = now
        live = {report.rank for report in ranks if not report.ended}
        current = self.attempt is not None and self.attempt.reaches(id)
        if current and number == self.number:
            state.live = live
            self._take(now, ranks)
            return
        if live:  # the node was asleep while the supervisor ended its attempt
            self._out.append(m.EndRanks(number, (id,)))
        elif state.health is NodeHealth.silent:
            self._join(now, state.node)
        # If `current` is true, the agent has not begun the attempt yet. The ranks count as alive since the order to
        # start.
        if not current:
            self.nodes[id].live = live

    def _take(self, now: float, ranks: list) -> None:
        attempt = self.current
        attempt.take(now, ranks)
        if self.phase is not DriverPhase.running or attempt.first_step is None:
            return
        if attempt.stepping and self._failed_at is not None:
            down, again = now - self._failed_at, attempt.count_repeated(self._reached)
            text = f"step {attempt.step} after {down:.1f} s; {again} steps were repeated"
            self._note("recovered", text, seconds=round(down, 2), steps_again=again)
            self._failed_at, self._again_until = None, self._reached if again else None
        if self._again_until is not None and attempt.step > self._again_until:
            self._note("caught_up", f"step {attempt.step}: the following steps are new", step=attempt.step)
            self._again_until = None
        self._reached = max(self._reached, attempt.step)

    def _start_failed(self, number: int, id: str, text: str) -> None:
        if self.attempt is None or number != self.number or not self.attempt.reaches(id):
            return
        name = self.nodes[id].node.name
        self.nodes[id].live = set()
        self.attempt.cause = Cause(Kind.start, f"{name} could not start its ranks: {text}", (), (name,), log=text)

    def _save(self, now: float, age: Age) -> None:
        if age <= self.saved:
            return
        self.saved = age
        self._got_on(age)
        self._note("checkpoint", f"step {age.step}", step=age.step)
        if self.phase is DriverPhase.running and self._could_grow():
            self._grow(now)

    def _hold(self, now: float, age: Age) -> None:
        news = age > self.held and age.attempt == self.number
        self.held = age
        self._got_on(age)
        if news and self.phase is DriverPhase.running and self._could_grow():
            self._grow(now)

    def _got_on(self, age: Age) -> None:
        """Reset the failure budgets if the run has saved a later step than any that this launch had saved before.

        age: attempt and step of the newest saved state.
        """
        if age.attempt >= self.policy.first_attempt and age.step > self._safe:
            self._safe = age.step
            self._spent.clear()

    def _drain(self, now: float, id: str, why: str) -> None:
        state = self.nodes.get(id)
        if state is None or state.draining:
            return
        state.draining, stops = True, self.phase is DriverPhase.running and id in self.current.ranks_of
        self._note("drain", f"{state.node.name}: {why}", node=state.node.name, stops=stops)
        if stops:
            going = f"{state.node.name} will be shut down; the run continues without it: {why}"
            self._stop_ranks(now, going) if self.current.step >= 0 else self._end_ranks(now)

    def _ask_stop(self, now: float, why: str) -> None:
        if self._stop_why is None:
            self._stop_why = why
            asked = self.phase is DriverPhase.running and self.current.step >= 0
            self._note("stop", why + ": the driver asks the answering ranks for a checkpoint" * asked)
            if self.phase is DriverPhase.running:
                self._stop_ranks(now, why) if asked else self._end_ranks(now)

    def _tell_limits(self) -> None:
        """Report if no layout would fit after the loss of one more node."""
        placement, shapes = self.current.placement, self.policy.shapes
        usable = [node for node in self._usable() if node.id != placement.nodes[0].id]
        if place(usable, shapes.pp, [shapes.own, *shapes.smaller], partial(shapes.allows, nodes=usable)) is None:
            text = "no layout can run without one of these nodes: after the loss of a node, the run waits for a replacement"
            self._note("limits", f"{text}; {shapes.why_nothing(usable)}")

    def _tick(self, now: float) -> None:
        if slept := self._held_up.since_last_look(now):
            self._forgive(now, slept)
        if now > self._late_from:
            self._lose_late(now)
        if self.phase is DriverPhase.running:
            self._name_stragglers()

    def _forgive(self, now: float, slept: float) -> None:
        """Extend all deadlines by the seconds for which this process slept."""
        for state in self.nodes.values():
            state.heard = min(state.heard + slept, now)
        if self.attempt:
            self.attempt.forgive(now, slept)
        self._deadline, self._probed_at = self._deadline + slept, self._probed_at + slept
        self._settled_at += slept

    def _lose_late(self, now: float) -> None:
        for id, state in self.nodes.items():
            late = now - state.heard
            if state.health is NodeHealth.ok and late > self.policy.heartbeat:
                self._lose(id, NodeHealth.silent, f"no answer for {late:.1f} s")
        heard = (state.heard for state in self.nodes.values() if state.health is NodeHealth.ok)
        self._late_from = min(heard, default=now) + self.policy.heartbeat

    def _name_stragglers(self) -> None:
        for slow in self.current.stragglers.new(self.policy.straggler_factor):
            name = self.current.names[slow.rank]
            text = (
                f"rank {slow.rank} on {name} works {slow.seconds:.3g} s per step, the median rank {slow.median:.3g} s "
                f"({slow.seconds / slow.median:.1f} times)"
            )
            self._note("straggler", text, rank=slow.rank, node=name, seconds=slow.seconds, median=slow.median)

    # Transitions ----------------------------------------------------------------------------------------------------

    def _advance(self, now: float) -> None:
        """Make every transition that the state allows at this time."""
        match self.phase:
            case DriverPhase.gathering:
                self._gather(now)
            case DriverPhase.running:
                self._run(now)
            case DriverPhase.judging:
                self._decide(now)
            case DriverPhase.ending:
                self._await_end(now)
            case DriverPhase.stopping:
                self._await_stop(now)
            case DriverPhase.done:
                pass

    def _gather(self, now: float) -> None:
        if self._stop_why is not None:
            self._finish(EXIT_STOPPED, f"between attempts: {self._stop_why}{self._left_alone()}; {self._newest()}")
            return
        last = self.failures[-1][1] if self.failures else None
        if self._no_node_comes:
            self._finish(EXIT_CRASH, no_node_comes(last, self.saved.step))
            return
        states = self.nodes.values()
        free = [state.node for state in states if state.usable and not state.live]
        hoped = any(state.health is NodeHealth.returning or state.live for state in states)
        first = self.attempt is None
        if (first or hoped) and now < self._deadline and sum(node.devices for node in free) < self.policy.world:
            return  # only the full layout may start now, and the free nodes are not enough for it
        found = self._place(free)
        if found and (found.shape == self.policy.shapes.own or (not first and (not hoped or now >= self._deadline))):
            self._start(now, found)
        elif now >= self._deadline:
            left = EXIT_STOPPED if any(state.draining for state in states) else EXIT_CRASH
            self._finish(EXIT_USER if first else left, too_few(self.policy, free, found, last, self.saved.step))

    def _start(self, now: float, placement: Placement) -> None:
        self.number += 1
        self.phase = DriverPhase.running
        if self.attempt is None or placement.shape != self.attempt.placement.shape:
            self._patience.forget_steps()
        saved = max(self.saved, self.held).step
        known = saved if self.policy.names_checkpoint else max(saved, 0)
        self.attempt = Attempt(self.number, placement, now, known, self._patience)
        for id, ranks in self.attempt.ranks_of.items():
            self.nodes[id].live = set(ranks)
        self._note(
            "attempt",
            f"attempt {self.number}: {self.policy.shapes.name(placement.shape)} on {len(placement.nodes)} nodes",
            pp=placement.pp,
            dp=placement.dp,
            ep=placement.ep,
            nodes=[node.name for node in placement.nodes],
            spares=[node.name for node in placement.spares],
        )
        if placement.shape != self.policy.shapes.own and placement.spares:
            self._tell_of_idle(placement)
        self._out.append(m.StartAttempt(self.number, placement))

    def _tell_of_idle(self, placement: Placement) -> None:
        names = [node.name for node in placement.spares]
        why = self.policy.shapes.why_idle(placement.shape, [*placement.nodes, *placement.spares])
        self._note("idle", f"{len(names)} nodes have no ranks ({some_of(names, SHOWN_NODES)}): {why}", nodes=names)

    def _run(self, now: float) -> None:
        attempt = self.current
        if attempt.broken:
            self._judge_failure(now)
        elif attempt.ended:
            self._leave(now)
        elif attempt.is_hung(now):
            self._hang(now)
        elif self._name_late(now):
            pass
        elif text := attempt.tell_quiet(now):
            self._note("quiet", text)
        elif not self.policy.saves and self._could_grow():
            self._grow(now)

    def _name_late(self, now: float) -> bool:
        """Warn about the ranks that block a run, if it is silent for too long. Returns whether it did anything."""
        attempt = self.current
        if attempt.is_late(now):
            attempt.name_late()
            attempt.look_again(attempt.silent_since)
            self._named_by = now + self.policy.stacks
            self._out.append(m.CollectStacks(self.number, attempt.reachable, native=False))
        elif (seconds := attempt.went_on()) is not None:
            attempt.hang_since = None
            if self._named_by is None:
                self._tell_went_on(seconds)
            self._named_by = None
        elif self._named_by is not None and attempt.is_settled(now, self._named_by):
            self._named_by = None
            cause = attempt.judge(now)
            text = warning_of(cause.text, attempt.seconds_left(now))
            self._note("late", text, ranks=list(cause.ranks), nodes=list(cause.nodes))
            if attempt.incident is not None:
                self._out.append(m.KeepIncident(self.number, attempt.incident))
        else:
            return False
        return True

    def _tell_went_on(self, seconds: float) -> None:
        self._note("went_on", f"the run makes progress again after {seconds:.0f} s", seconds=round(seconds, 2))
        self._out.append(m.PassIncident(seconds))

    def _hang(self, now: float) -> None:
        self.current.look_again(self.current.silent_since)
        self._failed_at = self.current.silent_since
        self._judge(now, self.policy.stacks)

    def _judge_failure(self, now: float) -> None:
        self.current.look_again(None)
        self._judge(now, self.policy.settle)

    def _leave(self, now: float) -> None:
        """Finish an attempt whose ranks have all ended without a failure."""
        if self._named_by is None and (seconds := self.current.over(now)) is not None:
            self._tell_went_on(seconds)
        if all(report.code == EXIT_OK for report in self.current.reports.values()):
            self._finish(EXIT_OK, "all steps are complete")
        elif self.phase is DriverPhase.stopping and self._stop_why is None:
            self._regroup(now)
        else:
            self._finish(EXIT_STOPPED, self._stop_why or "the ranks received a stop signal")

    def _newest(self) -> str:
        return f"step {self.saved.step} is saved" if self.saved > NONE else "there is no checkpoint"

    def _left_alone(self) -> str:
        """Return text that says what happens to unreachable ranks."""
        lost = self.attempt.lost if self.attempt else ()
        names = [
            state.node.name for id, state in self.nodes.items() if id in lost and state.health is NodeHealth.silent
        ]
        if not names:
            return ""
        lease = LEASE * self.policy.heartbeat
        return f"; ranks on {some_of(names, SHOWN_NODES)} cannot be reached: their agents end them {lease:.0f} s after this driver's last request, without a checkpoint"

    def _judge(self, now: float, settle: float) -> None:
        """Probe every node after a failure, and wait `settle` seconds for reports."""
        self.phase, self._quiet_since = DriverPhase.judging, min(now, self.current.moved)
        self._named_by = None
        if self._failed_at is None:
            self._failed_at = now
        self._probing = set(self.current.reachable)
        self._probed_at, self._settled_at = now + self.policy.probe + self._calls(), now + settle
        nodes, hangs = self.current.reachable, self.current.hang_since is not None
        self._out += [m.CollectStacks(self.number, nodes, native=hangs), m.ProbeLinks(nodes)]

    def _decide(self, now: float) -> None:
        if not self.current.is_settled(now, self._settled_at) or (self._probing and now < self._probed_at):
            return
        for id in sorted(self._probing):
            self._lose(id, NodeHealth.silent, f"no answer to a probe within {self.policy.probe:.0f} s")
        cause = self.current.cause = self.current.judge(now)
        self.failures.append((self.number, cause))
        self._spent.update(_budgets(cause))
        fields = {"cause": cause.kind.name, "ranks": list(cause.ranks), "nodes": list(cause.nodes), "log": cause.log}
        self._note("failure", cause.text, **fields, seconds=round(now - self._quiet_since, 2))
        if self.current.incident is not None:
            self._out.append(m.KeepIncident(self.number, self.current.incident))
        self._end_ranks(now)

    def _end_ranks(self, now: float) -> None:
        self.phase = DriverPhase.ending
        self._deadline = now + self.policy.kill + self._calls()
        self._out.append(m.EndRanks(self.number, self.current.reachable))

    def _calls(self) -> float:
        """Return the seconds that calls to all nodes of the attempt may take."""
        return len(self.current.reachable) / self.policy.calls

    def _await_end(self, now: float) -> None:
        stuck = [id for id in self.current.reachable if self.nodes[id].live]
        if stuck and now < self._deadline:
            return
        for id in stuck:  # SIGKILL does not end a process that waits in the kernel for a dead disk or device
            self._lose(id, NodeHealth.silent, f"its ranks are still alive after SIGKILL and {self.policy.kill:.0f} s")
        cause = self.current.cause
        if cause is None and self._stop_why is None:  # a node started to drain before the first step of the attempt
            self._regroup(now)
            return
        if cause is None:
            self._finish(EXIT_STOPPED, f"{self._stop_why}{self._left_alone()}; no step was completed")
            return
        spent = max(self._spent[budget] for budget in _budgets(cause))
        allowed = min(1, self.policy.restarts) if cause.kind is Kind.diverged else self.policy.restarts
        if cause.kind is Kind.user:
            self._finish(EXIT_USER, cause.text)
        elif self._stop_why is not None and self.saved > NONE:
            text = f"{self._stop_why}; meanwhile {cause.text}{self._left_alone()}; {self._newest()}"
            self._finish(EXIT_STOPPED, text)
        elif self._stop_why is not None or spent > allowed:
            code = EXIT_DIVERGED if cause.kind is Kind.diverged else EXIT_CRASH
            self._finish(code, give_up(cause, spent, allowed, self.failures, self.saved.step))
        else:
            self._regroup(now)

    def _regroup(self, now: float) -> None:
        """Start the next attempt: now, or when a node returns, or when enough nodes for a layout are available."""
        self.phase = DriverPhase.gathering
        enough = self._place(self._usable())
        self._deadline = now + (self.policy.return_wait if enough else self.policy.wait)
        self._gather(now)
        if self.phase is DriverPhase.gathering:
            what = "a node whose agent restarts" if enough else "nodes"
            self._note("waiting", f"for {what}, {self._deadline - now:.0f} s at most")

    def _stop_ranks(self, now: float, why: str, in_memory: bool = False) -> None:
        self.phase = DriverPhase.stopping
        self._deadline = now + self.policy.timeout
        self._out.append(m.StopRanks(self.number, self.current.reachable, why, in_memory))

    def _await_stop(self, now: float) -> None:
        attempt = self.current
        saves_until = attempt.alive + self.policy.timeout if attempt.doing in PATIENT_PHASES else now
        if attempt.broken:
            self._judge_failure(now)
        elif attempt.ended:
            self._leave(now)
        elif now >= max(self._deadline, saves_until) or attempt.is_hung(now):
            self._hang(now)
        else:
            self._name_late(now)

    def _could_grow(self) -> bool:
        has = self.current.placement.shape.micro_batches
        if has <= self.policy.shapes.own.micro_batches:
            return False
        found = self._place(self._usable())
        return found is not None and found.shape.micro_batches < has

    def _usable(self) -> list[Node]:
        return [state.node for state in self.nodes.values() if state.usable]

    def _grow(self, now: float) -> None:
        what = "copy in memory" if self.policy.copies else "checkpoint"
        self._note("grow", f"nodes came back: the run stops after this {what} and restarts with more ranks")
        self._stop_ranks(now, "nodes came back, and the run restarts with them", in_memory=self.policy.copies)

    def _place(self, nodes: list[Node]) -> Placement | None:
        shapes, near = self.policy.shapes, self.attempt.placement if self.attempt else None
        key = self.number, shapes.is_planned, tuple(sorted(node.id for node in nodes))
        if key != self._placed[0]:
            allowed = partial(shapes.allows, nodes=nodes)
            self._placed = key, place(nodes, shapes.pp, [shapes.own, *shapes.smaller], allowed, near)
        return self._placed[1]

    def _finish(self, code: int, text: str) -> None:
        self.phase = DriverPhase.done
        self._note("finish", text, code=code)
        self._out.append(m.FinishRun(code, text))

    def _note(self, kind: str, text: str, **fields) -> None:
        self._out.append(m.Note(self.number, kind, text, fields))
