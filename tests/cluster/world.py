"""A simulated cluster without processes: it carries out the supervisor's actions and answers as agents would."""

from dataclasses import dataclass, field
from functools import cache

from cluster.cause import Failure, RankReport
from cluster.driver import messages as m
from cluster.driver.journal import EVENT_KINDS
from cluster.driver.policy import Policy
from cluster.driver.shapes import Shapes
from cluster.driver.supervisor import Supervisor
from cluster.run_files import Age
from cluster.topology import Node
from conf.load import compose
from conf.schema import Config

STEP = 0.5
"""Simulated seconds between beats."""


@cache
def _recipe(*words: str) -> Config:
    return compose("batch_size=24", "micro_batch_size=1", *words)


def shapes_of(*words: str) -> Shapes:
    """The layouts of a run with 24 sequences a step."""
    return Shapes(_recipe(*words))


@dataclass
class Machine:
    node: Node
    up: bool = True
    linked: bool = True
    attempt: int = 0
    ranks: dict[int, RankReport] = field(default_factory=dict)
    lease_left: float = 10.0

    @property
    def live(self) -> set[int]:
        return {rank for rank, report in self.ranks.items() if not report.ended}

    def kill(self) -> None:
        for report in self.ranks.values():
            if not report.ended:
                report.code = -9


class World:
    """`steps` optimizer steps of one simulated second each, a checkpoint every `every`."""

    def __init__(
        self, nodes: int = 3, devices: int = 1, steps: int = 20, every: int = 5, words: tuple[str, ...] = (), **policy
    ):
        """words: of the recipe, whose layout has all devices if they do not say another."""
        self.now, self.steps, self.every = 100.0, steps, every
        self.machines = [Machine(Node(f"id{i}", f"n{i}", f"10.0.0.{i}", devices)) for i in range(nodes)]
        shapes = shapes_of(f"parallel.dp={nodes * devices}", *words)
        settings = {"shapes": shapes, "hang_after": 6.0, "start_timeout": 20.0} | policy
        self.supervisor = Supervisor(Policy(**settings), self.now)
        self.actions: list[m.SupervisorAction] = []
        self.finish: m.FinishRun | None = None
        self.starts: list[m.StartAttempt] = []
        self.hung: set[int] = set()
        self.sends_rings = True
        self.saved = 0
        for machine in self.machines:
            self.tell(m.NodeJoined(machine.node))
        self.tell(m.Tick())  # as at the end of a round of the driver

    def tell(self, event: m.Event) -> None:
        for action in self.supervisor.handle(self.now, event):
            assert not isinstance(action, m.Note) or action.kind in EVENT_KINDS, action.kind
            self.actions.append(action)
            self._do(action)

    def _do(self, action: m.SupervisorAction) -> None:
        reach = {machine.node.id: machine for machine in self.machines if machine.up and machine.linked}
        match action:
            case m.StartAttempt(number, placement):
                assert not self.starts or number > self.starts[-1].attempt
                assert not any(machine.live for machine in reach.values()), "two attempts alive"
                self.starts.append(action)
                self.hung = set()
                for id, seats in placement.by_node.items():
                    if id in reach:
                        reach[id].attempt = number
                        reach[id].ranks = {seat.rank: RankReport(seat.rank) for seat in seats}
            case m.EndRanks(number, nodes):
                for id in nodes:
                    if id in reach and reach[id].attempt <= number:
                        reach[id].kill()
            case m.StopRanks(number, nodes):
                for id in nodes:
                    if id in reach and reach[id].attempt == number:
                        for rank in reach[id].live - self.hung:
                            reach[id].ranks[rank].code = 75
                        self.saved = max(self.saved, self.step - 1)
            case m.ProbeLinks(nodes):
                for id in nodes:
                    if id in reach:
                        self.tell(m.NodeProbed(id))
            case m.CollectStacks(number, nodes):
                machines = [reach[id] for id in nodes if id in reach]
                stacks = {
                    rank: '  File "x.py", line 1 in all_reduce' for one in machines for rank in one.live - self.hung
                }
                rings = {rank: b"" for one in machines for rank in one.ranks if self.sends_rings}
                self.tell(m.StacksPrinted(number, stacks, rings))
            case m.FinishRun():
                self.finish = action

    @property
    def step(self) -> int:
        return max((report.step for machine in self.machines for report in machine.ranks.values()), default=0)

    def run(self, seconds: float) -> None:
        """Let time pass: ranks step together if all of them live and none hangs."""
        end = self.now + seconds
        while self.now < end and self.finish is None:
            self.now += STEP
            self._train()
            for machine in self.machines:
                machine.lease_left = 10.0 if machine.linked else machine.lease_left - STEP
                if machine.lease_left <= 0:
                    machine.kill()
                if machine.up and machine.linked:
                    ranks = [RankReport(**report.__dict__) for report in machine.ranks.values()]
                    self.tell(m.AgentBeat(machine.node.id, machine.attempt, ranks))
            self.tell(m.Tick())

    def _train(self) -> None:
        if not self.starts:
            return
        start = self.starts[-1]
        holders = [machine for machine in self.machines if machine.attempt == start.attempt and machine.linked]
        live = {rank: machine.ranks[rank] for machine in holders for rank in machine.live}
        if self.hung or len(live) < start.placement.world:
            for report in live.values():  # peers lose their connection and fail as well
                if report.rank not in self.hung and not self.hung:
                    report.failure = Failure(report.rank, self.now, "crash", "Connection closed by peer", 1)
                    report.code = 1
            return
        for report in live.values():
            report.phase = "step"
            report.step = self.saved + 1 if report.step < 0 else report.step + 1
            if report.step > self.steps:
                report.code = 0
        step = self.step - 1
        if step % self.every == 0 and step > self.saved:
            self.saved = step
            self.tell(m.CheckpointSaved(Age(start.attempt, step)))

    # Faults ---------------------------------------------------------------------------------------------------------

    def report_of(self, rank: int) -> RankReport | None:
        for machine in self.machines:
            if machine.up and machine.linked and rank in machine.live:
                return machine.ranks[rank]
        return None

    def kill_rank(self, rank: int, code: int = -9) -> None:
        if report := self.report_of(rank):
            report.code = code

    def power_off(self, index: int) -> None:
        machine = self.machines[index]
        machine.kill()
        machine.up, machine.ranks, machine.attempt = False, {}, 0

    def power_on(self, index: int) -> None:
        machine = self.machines[index]
        if not machine.up:
            machine.up = machine.linked = True
            self.tell(m.NodeLost(machine.node.id, "Ray marked it dead"))
            self.tell(m.NodeJoined(machine.node))

    def kill_agent(self, index: int) -> None:
        machine = self.machines[index]
        if machine.up and machine.linked:
            machine.kill()
            machine.ranks, machine.attempt = {}, 0
            self.tell(m.NodeLost(machine.node.id, "its agent died", returning=True))
            self.tell(m.NodeJoined(machine.node))

    # What was said --------------------------------------------------------------------------------------------------

    def notes(self, kind: str) -> list[m.Note]:
        return [action for action in self.actions if isinstance(action, m.Note) and action.kind == kind]
