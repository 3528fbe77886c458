"""A simulated run: carries out the real supervisor's decisions, and answers like agents and ranks.

Its nodes exist only as numbers.

The clock advances in small steps while the supervisor waits for something, and jumps from one change to the next while
all ranks train. The supervisor treats a jump as a time in which its own process was delayed, and blames no node. One
rank represents all ranks, because all ranks step together. The supervisor's reports are recorded in the form of its
journal, and cluster/driver/time_split.py reads them.

A run that gave up is started again `Pace.relaunch` seconds after nodes for the whole layout are available.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.outages import Outage
from cluster.cause import RankReport
from cluster.driver import messages as m
from cluster.driver.messages import DriverPhase
from cluster.driver.policy import policy_of
from cluster.driver.shapes import Shapes
from cluster.driver.supervisor import Supervisor
from cluster.patience import STEP_PHASE
from cluster.run_files import NONE, Age
from cluster.topology import Node, Placement
from conf.errors import EXIT_STOPPED
from conf.schema import Config

SIMULATED_TICK = 0.25
"""Seconds between decisions while the supervisor waits for something; the real driver decides more often."""
HEARD_EVERY = 1.0
"""Seconds between answers of nodes to the pulse."""


@dataclass(frozen=True)
class Pace:
    """How long things take, in seconds."""

    step: float = 20.0
    """A step of the full layout. In a smaller layout, the step time grows with the number of micro-batches of the
    busiest rank."""
    start: float = 120.0
    """From the order to start until the end of the first step; the time to read the state is included."""
    stall: float = 0.1
    """Time that the training waits at each checkpoint, on disk or in memory."""
    write: float = 25.0
    """Time after this wait until a checkpoint on disk is complete."""
    send: float = 1.0
    """Time after the wait until a copy in memory is complete."""
    answer: float = 1.0
    """Time in which agents answer and end their ranks."""
    relaunch: float = 600.0
    """Time until somebody restarts a run that gave up."""


@dataclass(frozen=True)
class CopySet:
    """A copy of the state in the memory of nodes. Each node has its own part, and the part of the previous node in a
    ring."""

    age: Age
    ring: tuple[str, ...]
    lost: frozenset[str] = frozenset()
    """Nodes that were away at any time after this copy."""

    @property
    def whole(self) -> bool:
        pairs = zip(self.ring, (*self.ring[1:], self.ring[0]), strict=True)
        return not any(one in self.lost and other in self.lost for one, other in pairs)


class SimulatedSteps:
    """The steps of one attempt after its first step. base: the step at which the attempt resumed. period: seconds per
    step, stalls included."""

    def __init__(self, number: int, base: int, begin: float, period: float):
        self.number, self.base, self.begin, self.period = number, base, begin, period

    def done(self, now: float) -> int:
        """Number of completed steps at this time; the first step is complete at the beginning."""
        return self.base + 1 + int((now - self.begin) / self.period + 1e-9)

    def ends(self, step: int) -> float:
        """Time at which this step ends."""
        return self.begin + (step - self.base - 1) * self.period

    def newest(self, now: float, every: int, takes: float) -> Age | None:
        """The newest complete state at this time. A state is saved after every `every` steps, and is complete
        `takes` seconds later."""
        step = self.done(now - takes) // every * every if every and now - takes >= self.begin else 0
        return Age(self.number, step) if step > self.base else None


class SimulatedRun:
    """A simulated run, see the module docstring. outages: in the order of time, with nodes by index. seconds: length of
    the simulation."""

    def __init__(
        self,
        config: Config,
        shapes: Shapes,
        nodes: Sequence[Node],
        outages: Sequence[Outage],
        seconds: float,
        pace: Pace,
    ):
        self.config, self.shapes, self.nodes, self.seconds, self.pace = config, shapes, nodes, seconds, pace
        self.now, self.events = 0.0, list[dict[str, Any]]()
        self._changes = sorted(
            [(one.begin, one.node, False) for one in outages] + [(one.end, one.node, True) for one in outages]
        )
        self._next_change = 0
        self._up = {node.id: node for node in nodes}
        self._supervisor: Supervisor | None = None
        self._number, self._launch_at = 0, 0.0
        self._placement: Placement | None = None
        self._hurt = self._may_grow = False
        """Whether a node of the attempt was lost, and whether a node came back."""
        self._first_step_at = 0.0
        self._caught_up_at: float | None = None
        self._stretch: SimulatedSteps | None = None
        self.stalled = 0.0
        """Seconds of training that waited for checkpoints, weighted by the share of the ranks that waited."""
        self._reached = self._new_from = 0
        """The last step that began, and the first step of this attempt that no earlier attempt had done."""
        self._stalls = 0.0
        """Stall seconds per step."""
        self._saved = NONE
        self._copies: CopySet | None = None
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        """Answers that have not arrived yet: time of arrival, running number, and the function to call."""
        self._answers, self._heard_at = 0, 0.0

    @property
    def ended(self) -> bool:
        """Whether no driver runs at this time."""
        return self._supervisor is None

    def play(self) -> list[dict[str, Any]]:
        """Runs the simulation. Returns all events; their time is in seconds since the beginning."""
        while self.now < self.seconds:
            if self._supervisor is None:
                self._wait_for_launch()
            elif self._supervisor.phase is DriverPhase.running and not self._hurt:
                self._train()
            else:
                self._pass(self.now + SIMULATED_TICK)
                self._tell(m.Tick())
        self._count_stalls()
        return self.events

    # Time -----------------------------------------------------------------------------------------------------------

    def _pass(self, until: float) -> None:
        """Advance the clock to `until`, and apply all changes until then."""
        while self._due and self._due[0][0] <= until:
            self.now, _, happens = self._due.pop(0)
            happens()
        while self._next_change < len(self._changes) and self._changes[self._next_change][0] <= until:
            at, index, is_up = self._changes[self._next_change]
            self._next_change += 1
            self.now = max(self.now, at)
            self._return(self.nodes[index]) if is_up else self._lose(self.nodes[index])
        self.now = max(self.now, until)
        if self._supervisor is not None and self.now - self._heard_at >= HEARD_EVERY:
            self._hear()

    def _hear(self) -> None:
        self._heard_at = self.now
        for id in self._up:
            self._tell(m.NodeHeard(id))

    def _answer(self, after: float, happens: Callable[[], None]) -> None:
        self._answers += 1
        bisect.insort(self._due, (self.now + after, self._answers, happens))

    def _next(self) -> float:
        """Time of the next change of a node: it goes away or comes back."""
        return self._changes[self._next_change][0] if self._next_change < len(self._changes) else self.seconds

    def _wait_for_launch(self) -> None:
        """Wait until the run can be launched, which needs all nodes of the full layout."""
        if self.now < self._launch_at or sum(node.devices for node in self._up.values()) < self.config.parallel.world:
            waits_for = self._launch_at if self.now < self._launch_at else self._next()
            self._pass(min(self.seconds, waits_for))
            return
        self._supervisor = Supervisor(policy_of(self.config, self._number + 1, self.shapes), self.now)
        self._write("launch", 0, "", world=self.config.parallel.world)
        self._reached, self._due = 0, []
        for node in self._up.values():
            self._tell(m.NodeJoined(node))
        self._tell_states()
        self._tell(m.Tick())

    # Training -------------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        """Advance to the next change: the end of the first step, the end of repeated steps, a complete state from which
        the run may grow, or a change of a node."""
        change, stretch = min(self._next(), self.seconds), self._stretch
        first = self._first_step_at if stretch is None else math.inf
        caught_up = math.inf if self._caught_up_at is None else self._caught_up_at
        grows = self._grows_at(stretch) if stretch is not None and self._may_grow else math.inf
        until = max(self.now, min(change, first, caught_up, grows))
        if until >= change:
            self._jump(until)
            return
        self.now = until
        self._tell(m.Tick())
        self._hear()
        if until >= first:
            self._begin(until)
        elif until >= caught_up:
            self._caught_up_at = None
            self._beat(until)
        else:
            self._may_grow = False
            self._keep_states(until + 1e-3)
            self._tell_states()

    def _grows_at(self, stretch: SimulatedSteps) -> float:
        """Time at which the next state is complete from which the run may continue with more nodes."""
        saving = self.config.checkpoint
        every, takes = (saving.every_memory, self.pace.send) if saving.every_memory else (saving.every, self.pace.write)
        step = (stretch.done(max(stretch.begin, self.now - takes)) // every + 1) * every
        return stretch.ends(step) + takes

    def _count_stalls(self) -> None:
        """Add the stalls of the attempt that has ended."""
        self.stalled += self._stalls * max(0, self._reached - self._new_from)
        self._new_from = self._reached

    def _jump(self, until: float) -> None:
        """Jump to a change of nodes, and record what the run has done by then."""
        if self._stretch is not None and until >= self._stretch.begin:
            self._beat(max(self.now, self._stretch.ends(self._stretch.done(until))))
            self._keep_states(until)
            self._tell_states()
        self.now = until
        self._tell(m.Tick())
        self._hear()
        self._pass(until)

    def _begin(self, now: float) -> None:
        """The first step is done."""
        sup, placement = self._supervisor, self._placement
        assert sup is not None and placement is not None
        base, own = max(sup.current.saved, 0), self.shapes.own
        saving = self.config.checkpoint
        stalls = sum(self.pace.stall / every for every in (saving.every, saving.every_memory) if every)
        period = self.pace.step * placement.shape.micro_batches / own.micro_batches + stalls
        self._new_from, self._stalls = (
            max(base + 1, self._reached),
            stalls * placement.world / self.config.parallel.world,
        )
        self.now, self._stretch = now, SimulatedSteps(self._number, base, now, period)
        if self._reached > base + 1:
            self._caught_up_at = self._stretch.ends(self._reached)
        self._beat(now, base + 1)
        self._beat(now)
        self._write("first_step", self._number, f"step {base + 1}", seconds=self.pace.start)
        self._may_grow = placement.shape != own

    def _beat(self, now: float, step: int | None = None) -> None:
        """A rank reports which step it works on at this time."""
        assert self._stretch is not None and self._placement is not None
        self.now, seat = max(self.now, now), self._placement.seats[0]
        step = self._stretch.done(now) + 1 if step is None else step
        self._reached = max(self._reached, step)
        self._tell(m.AgentBeat(seat.node.id, self._number, [RankReport(seat.rank, step=step, phase=STEP_PHASE)]))

    # States ---------------------------------------------------------------------------------------------------------

    def _keep_states(self, now: float) -> None:
        """Record the newest checkpoint and the newest copy in memory that are complete at this time."""
        if self._stretch is None or self._placement is None:
            return
        saving = self.config.checkpoint
        self._saved = self._stretch.newest(now, saving.every, self.pace.write) or self._saved
        if age := self._stretch.newest(now, saving.every_memory, self.pace.send):
            self._hold(age)

    def _hold(self, age: Age) -> None:
        assert self._placement is not None
        self._copies = CopySet(age, tuple(node.id for node in self._placement.nodes))

    def _tell_states(self) -> None:
        self._tell(m.CheckpointSaved(self._saved))
        self._tell(m.CopyHeld(self._copies.age if self._copies is not None and self._copies.whole else NONE))

    # Nodes ----------------------------------------------------------------------------------------------------------

    def _lose(self, node: Node) -> None:
        """Remove a node with its ranks and its memory. The supervisor gets no more answers from it; a spare is listed
        as dead."""
        del self._up[node.id]
        if self._copies is not None:
            self._copies = dataclasses.replace(self._copies, lost=self._copies.lost | {node.id})
        if self._supervisor is None:
            return
        attempt = self._supervisor.attempt
        if attempt is not None and node.id in attempt.ranks_of:
            self._hurt = True
        else:
            self._tell(m.NodeLost(node.id, "the cluster lists it as dead"))

    def _return(self, node: Node) -> None:
        self._up[node.id] = node
        if self._supervisor is None:
            return
        self._tell(m.NodeLost(node.id, "the cluster lists it as dead"))
        self._tell(m.NodeJoined(node))
        self._may_grow = self._placement is not None and self._placement.shape != self.shapes.own

    # What the supervisor decides ------------------------------------------------------------------------------------

    def _tell(self, event: m.Event) -> None:
        if self._supervisor is not None:
            for action in self._supervisor.handle(self.now, event):
                self._do(action)

    def _do(self, action: m.SupervisorAction) -> None:
        match action:
            case m.StartAttempt(number, placement):
                self._count_stalls()
                self._number, self._placement, self._stretch = number, placement, None
                self._caught_up_at, self._first_step_at = None, self.now + self.pace.start
                self._hurt = any(node.id not in self._up for node in placement.nodes)
            case m.EndRanks(number, nodes):
                self._tell_states()
                self._answer(self.pace.answer, lambda: self._say_ended(number, nodes))
            case m.StopRanks(number, nodes, _, in_memory):
                self._stop(number, nodes, in_memory)
            case m.ProbeLinks(nodes):
                self._answer(self.pace.answer, lambda: self._say_probed(nodes))
            case m.Note(number, kind, text, fields):
                self._write(kind, number, text, **fields)
            case m.FinishRun():
                self._count_stalls()
                self._supervisor, self._launch_at = None, self.now + self.pace.relaunch

    def _say_probed(self, nodes: Sequence[str]) -> None:
        for id in nodes:
            if id in self._up:
                self._tell(m.NodeProbed(id))

    def _say_ended(self, number: int, nodes: Sequence[str]) -> None:
        """Agents report that they have no more ranks of the attempt."""
        for id in nodes:
            if id in self._up:
                self._tell(m.AgentBeat(id, number, []))

    def _stop(self, number: int, nodes: Sequence[str], in_memory: bool) -> None:
        """The ranks finish their step, save their state, and exit."""
        assert self._stretch is not None
        step = self._stretch.done(self.now) + 1
        takes = (
            self._stretch.ends(step) - self.now + self.pace.stall + (self.pace.send if in_memory else self.pace.write)
        )

        def leave() -> None:
            if self._hurt or self._supervisor is None or self._supervisor.number != number:
                return
            if in_memory:
                self._hold(Age(number, step))
            else:
                self._saved = Age(number, step)
            self._stretch, self._reached = None, step
            self._tell_states()
            for id in nodes:
                ranks = self._supervisor.current.ranks_of[id]
                self._tell(m.AgentBeat(id, number, [RankReport(rank, code=EXIT_STOPPED) for rank in ranks]))

        self._answer(takes, leave)

    def _write(self, kind: str, attempt: int, text: str, **fields: Any) -> None:
        self.events.append({"time": self.now, "kind": kind, "attempt": attempt, "text": text, **fields})
