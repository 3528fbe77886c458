"""The driver's loop: it queries the agents, and carries out the supervisor's decisions."""

import contextlib
import dataclasses
import os
import random
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from cluster.clocks import HeldUp, SteadyClock
from cluster.driver import messages as m
from cluster.driver.checkpoints import claim_attempt, newest, written_since
from cluster.driver.copies import Copies
from cluster.driver.fleet import Fleet, FleetLost, Reply, call_agent
from cluster.driver.journal import Journal, RankTable
from cluster.driver.messages import DriverPhase, NodeHealth
from cluster.driver.network import NetworkTest
from cluster.driver.policy import policy_of
from cluster.driver.pulse_sender import Pulse
from cluster.driver.shapes import Shapes, with_shape
from cluster.driver.supervisor import NAP, Supervisor
from cluster.driver.view import View
from cluster.driver.vitals import Vitals
from cluster.incident import keep_incident, pass_incident
from cluster.interfaces import NAMES
from cluster.interrupts import handled
from cluster.node.agent import Agent, Answer, Order
from cluster.node.copy_store import OpenedCopy
from cluster.node.preflight import Preflight
from cluster.run_files import NONE, Age
from cluster.spawn import spawn
from cluster.topology import Node, Placement, StageShape
from conf.disk import explain_disk_error, naming
from conf.errors import EXIT_OK, EXIT_STOPPED, EXIT_USER
from conf.load import write_config
from conf.own_code import targets_of
from conf.schema import Config

NEWS_SECONDS = 0.25
"""Seconds that rank 0's agent waits for news before it answers; other agents wait at least as long."""
ANSWERS = 150
"""Maximum answers per second from all agents together. With more agents, each waits longer for news."""
LONGEST_PATIENCE = 30.0
"""Maximum seconds that an agent waits for news; without UDP answers, half a heartbeat."""
TICK_EVERY = 0.05
"""Minimum seconds between two ticks, at which the supervisor decides."""
LOOK_EVERY = 1.0
"""Seconds between checks of the node list and of the checkpoints."""
HELD_BACK = 2.0
"""Seconds until a node with a locked copy folder is checked again."""
REFUSED_SECONDS = 10.0
"""Seconds until a refused node is checked again."""


class Driver:
    """Runs one launch of a run on a fleet of nodes.

    arguments: command line of a rank, after the interpreter. A file with the attempt's layout replaces the last
        argument, a configuration file
    rank_folder: working folder of the ranks; None if Ray copies the code to the nodes
    planner: command that writes layouts.json (cluster/driver/shapes.py). The driver appends cpu or cuda to it, and
        starts it when the run has begun to train
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        arguments: list[str],
        fleet: Fleet,
        rank_folder: str | None,
        gpus: bool,
        view: View,
        clock: Callable[[], float] = time.monotonic,
        planner: Sequence[str] = (),
    ):
        self.config, self.folder, self.arguments = config, folder, arguments
        self.fleet, self.rank_folder, self.view, self.clock = fleet, rank_folder, view, clock
        self.journal = Journal(folder, lambda text: view.note("disk", text))
        self.first = claim_attempt(folder, config.cluster.timeout)
        self.shapes = Shapes(config, folder)
        self.supervisor = Supervisor(policy_of(config, self.first, self.shapes), clock())
        self.pulse = Pulse(config.cluster.heartbeat)
        targets = [*targets_of(config).values()]
        self.preflight = Preflight(folder, gpus, SteadyClock(), self.pulse.key, targets)
        self.copies = Copies(folder, config.checkpoint.memory_folder, self.first)
        self._planner = [*planner, "cuda" if gpus else "cpu"] if planner else []
        self._planning: subprocess.Popen | None = None
        self._limits_told = False
        self.vitals, self._rank_table = Vitals(), RankTable(folder)
        self._finish: m.FinishRun | None = None
        self._known: dict[str, Node] = {}
        """All listed nodes, by id, also those that failed the checks."""
        self._overdue: dict[str, float] = {}
        """Deadline for the answer of each node's agent. After this deadline, UDP answers are no sign of life."""
        self._ask_later: set[str] = set()
        """Nodes that the driver asks for news only after the next check of all nodes."""
        self._released: set[str] = set()
        """Draining nodes whose agents the driver has ended."""
        self._probed_from = 0
        """Number of the newest UDP question when the supervisor asked for a probe. Answers to earlier questions do not
        count.
        """
        self._starting: tuple[int, Placement] | None = None
        self._network: NetworkTest | None = None
        self._test_ports: dict[str, int] = {}
        """Port of each node for the network test before the first attempt."""
        self._refused: dict[str, str] = {}
        self._check_again: dict[str, float] = {}
        """Time of the next check of each refused node, by id."""
        self._without_folder: set[str] = set()
        """Nodes that have no folder for copies."""
        self._started_at = clock()
        self._first_step: int | None = None
        self._offsets: dict[int, int] = {}
        self._logged: set[int] = set()
        """Ranks of the current attempt whose logs contain the full text of their failure."""
        self._looked, self._ticked = -LOOK_EVERY, -TICK_EVERY
        self._held_up, self._slept = HeldUp(NAP * config.cluster.heartbeat, clock()), 0.0
        self._stop: str | None = None

    def run(self) -> m.FinishRun:
        """Run the loop until the run ends. Returns exit code and reason."""
        self.journal.write("launch", 0, f"{self.config.name}", world=self.config.parallel.world)
        try:
            with handled(self._signalled, signal.SIGTERM, signal.SIGINT), self.view:
                while self._finish is None:
                    self._round()
                self._fetch_last_words()
                self._drop_copies(self._finish.code)
        finally:
            self.preflight.close()
            self.pulse.close()
            if self._planning is not None:
                self._planning.kill()
                self._planning.wait()
        return self._finish

    def _signalled(self, number: int, _) -> None:
        if self._stop is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop = signal.Signals(number).name

    def _round(self) -> None:
        if self._stop is not None:
            self._tell(m.StopAsked(self._stop))
        if self.clock() - self._looked >= LOOK_EVERY:
            self._looked = self.clock()
            self._look()
        self._feel_pulse()
        for reply in self.fleet.replies(0.05):
            self._take(reply)
        if self._network is not None and self._starting is not None:
            self._test_network(self._network, *self._starting)
        if self.clock() - self._ticked < TICK_EVERY:
            return  # the code below visits all nodes, which is too slow to do after each answer
        self._ticked = self.clock()
        # If no attempt is running, the supervisor may soon need the age of the copies.
        if self.supervisor.phase is not DriverPhase.running:
            self._look_at_copies()
        self._tell(m.Tick())
        self.view.update(self.supervisor)
        self._rank_table.update(self.supervisor, self._ticked)

    def _feel_pulse(self) -> None:
        """Ask nodes by UDP whether they are alive. The agents answer, so a stuck agent is noticed."""
        now, states = self._awake(), self.supervisor.nodes
        judging = self.supervisor.phase is DriverPhase.judging
        # Take the answers to the last questions before the driver asks new questions.
        for id, number in self.pulse.answers(now):
            if now < self._overdue.get(id, now):
                self._tell(m.NodeHeard(id))
            if judging and number > self._probed_from:
                self._tell(m.NodeProbed(id))
        self.pulse.ask(now, lambda id: id in states and states[id].health is NodeHealth.ok)

    def _awake(self) -> float:
        """Return the time of a clock that stops while the driver is held up. Deadlines of answers use this clock."""
        now = self.clock()
        self._slept += self._held_up.since_last_look(now)
        return now - self._slept

    def _test_network(self, test: NetworkTest, number: int, placement: Placement) -> None:
        verdict = test.advance(self.clock())
        if verdict is None:
            return
        self._network = None
        fields = {"pairs": verdict.pairs, "median_gbit": verdict.median_gbit, "slow": verdict.slow}
        self._note("network", verdict.text, **fields)
        if verdict.unreachable:
            self._tell(m.StartFailed(number, placement.seats[0].node.id, "\n".join(verdict.unreachable)))
        else:
            call_agent(self.fleet, placement.seats[0].node.id, Agent.free_port)

    def _look(self) -> None:
        """Check the nodes and the checkpoints."""
        self._tell(m.CheckpointSaved(newest(self.folder)))
        self._look_at_copies()
        if not self._limits_told and self.shapes.is_planned and self.supervisor.phase is DriverPhase.running:
            self._limits_told = True
            self._tell(m.LayoutsPlanned())
        try:
            listed = {node.id: node for node in self.fleet.nodes()}
            draining = self.fleet.draining()
        except FleetLost as error:
            if self._stop is None:
                self._stop = str(error)
            return
        states = self.supervisor.nodes
        returning = {id for id, state in states.items() if state.health is NodeHealth.returning}
        for id in (set(self._known) | returning) - set(listed):
            node = self._forget(id) if id in self._known else states[id].node
            back = self.fleet.describe_return(node)
            why = f"the cluster lists it as dead; {back}" if back else "the Ray that this run started on it has ended"
            self._tell(m.NodeLost(id, why, last=not back))
        for id, node in listed.items():
            if id not in self._known and id not in self._released:
                self._known[id] = node
                self._check_again[id] = self.clock()
        for id in [id for id, due in self._check_again.items() if self.clock() >= due]:
            del self._check_again[id]
            if id in self._known:
                tests_network = self.supervisor.attempt is None
                call_agent(self.fleet, id, Agent.facts, self.preflight.question(self._known[id], tests_network))
        for id, why in draining.items():
            self._tell(m.NodeDraining(id, why))
        for id in self._ask_later & set(self._known):
            self._ask(id)
        self._ask_later.clear()

    def _forget(self, id: str) -> Node:
        """Remove a node, whose agent has ended or will end, from all records. Returns the node."""
        self.copies.forget(id)
        self.pulse.forget(id)
        self._overdue.pop(id, None)
        return self._known.pop(id)

    def _look_at_copies(self) -> None:
        held = self.copies.newest(self.supervisor.answering)
        self._tell(m.CopyHeld(Age(held.attempt, held.step) if held else NONE))

    def _ask(self, id: str) -> None:
        """Ask an agent for its news, unless such a question is pending."""
        now, heartbeat, ranks = self._awake(), self.config.cluster.heartbeat, self._ranks_on(id)
        longest = NEWS_SECONDS if 0 in ranks else LONGEST_PATIENCE if self.pulse.hears(id, now) else heartbeat / 2
        # At the start of an attempt, the driver asks all agents at the same time. The random factor spreads their
        # answers.
        spread = random.uniform(0.5, 1.5)
        patience = min(max(NEWS_SECONDS, spread * len(self._known) / ANSWERS), longest)
        self._overdue[id] = now + patience + heartbeat
        call_agent(self.fleet, id, Agent.ask, self._offsets_on(id), self.supervisor.number, patience)

    def _ranks_on(self, id: str) -> list[int]:
        return self.supervisor.attempt.ranks_of.get(id, []) if self.supervisor.attempt else []

    def _offsets_on(self, id: str) -> dict[int, int]:
        """Return the number of output bytes that the driver has, by rank."""
        return {rank: self._offsets[rank] for rank in self._ranks_on(id) if rank in self._offsets}

    def _take(self, reply: Reply) -> None:
        if reply.node not in self._known:
            return
        if reply.dead:
            self._tell(m.NodeLost(reply.node, f"its agent died: {reply.error}", returning=True))
            node = self._forget(reply.node)  # the next check starts a new agent, if the node is still listed
            if node.id not in self.supervisor.nodes:
                self._refuse(node, f"its agent died: {reply.error}")
        elif reply.is_of(Agent.facts):
            self._check_facts(self._known[reply.node], reply)
        elif reply.is_of(Agent.open_memory):
            self._take_store(self._known[reply.node], reply)
        elif reply.is_of(Agent.ask):
            if reply.error is None:
                self._take_answer(reply.node, reply.value)
                if reply.node in self._known:  # otherwise the driver has released the node
                    self._ask(reply.node)
            else:
                self._note("call_failed", f"{self._known[reply.node].name}: {reply.method}: {reply.error}")
                self._ask_later.add(reply.node)
        elif reply.is_of(Agent.probe):
            self._tell(m.NodeProbed(reply.node))
        elif reply.is_of(Agent.network):
            if self._network is not None:
                self._network.take(reply)
        elif reply.is_of(Agent.free_port):
            self._send_orders(reply)
        elif reply.error is not None and reply.is_of(Agent.start):
            self._tell(m.StartFailed(self.supervisor.number, reply.node, f"{reply.method}: {reply.error}"))
        elif reply.error is not None:  # for example, a reserve process did not start; the attempt does not need it
            name = self._known[reply.node].name
            self._note("call_failed", f"{name}: {reply.method}: {reply.error}", node=name, method=reply.method)

    def _check_facts(self, node: Node, reply: Reply) -> None:
        problem = reply.error or self.preflight.problem(node, reply.value)
        if problem is None:
            node = self._known[node.id] = dataclasses.replace(node, device_bytes=reply.value.device_bytes)
            self.pulse.know(node.id, reply.value.pulse)
            self.vitals.know(node, self.preflight.ahead(node, reply.value), reply.value.niceness)
            self._test_ports[node.id] = reply.value.test_port
        if problem is not None:
            self._refuse(node, problem)
        elif self.config.checkpoint.every_memory:
            self._open_memory(node)
        else:
            self._admit(node)

    def _open_memory(self, node: Node) -> None:
        call_agent(self.fleet, node.id, Agent.open_memory, self.copies.folder_on(node), self.copies.token, node.address)

    def _take_store(self, node: Node, reply: Reply) -> None:
        opened = OpenedCopy(problem=reply.error) if reply.error is not None else reply.value
        if opened.port:
            self.copies.note_port(node.id, opened.port)
            self._admit(node)
            return
        self._refuse(
            node, f"cannot store copies of the state: {opened.problem}", HELD_BACK if opened.passes else REFUSED_SECONDS
        )
        if opened.absent:
            self._without_folder.add(node.id)
            # If all known nodes lack the folder, further nodes will lack it too.
            if self._without_folder >= set(self._known):
                self._do(m.FinishRun(EXIT_USER, f"no node has checkpoint.memory_folder = {self.copies.base}"))

    def _admit(self, node: Node) -> None:
        self._refused.pop(node.name, None)
        self._tell(m.NodeJoined(node))
        if len(self._known) < ANSWERS * NEWS_SECONDS:
            self._ask(node.id)
        else:
            # At the next check, the node will have answered a UDP question, so its agent may then wait longer for news.
            self._ask_later.add(node.id)
        if self.supervisor.phase is DriverPhase.running and self._first_step is not None:
            self._warm([node])

    def _refuse(self, node: Node, problem: str, again: float = REFUSED_SECONDS) -> None:
        """Exclude a node until a later check passes, and report the problem once. again: seconds until the check."""
        self._check_again[node.id] = self.clock() + again
        if node.name not in self._refused:
            self._note("node_refused", f"{node.name}: {problem}", node=node.name)
        self._refused[node.name] = problem

    def _take_answer(self, node: str, answer: Answer) -> None:
        number, attempt = self.supervisor.number, self.supervisor.attempt
        if answer.attempt == number and attempt is not None:
            for rank, piece in answer.output.items():
                if rank not in self._offsets:
                    self.journal.output(rank, f"---- attempt {number} on {attempt.names[rank]} ----\n".encode())
                self._offsets[rank] = self._offsets.get(rank, 0) + len(piece)
                self.journal.output(rank, piece)
                if rank == 0:
                    self.view.output(piece)
            self._log_wholes(answer)
        self.copies.take(node, answer.held)
        for kind, text in self.vitals.take(self._known[node], answer):
            self._note(kind, text, node=self._known[node].name)
        self._tell(m.AgentBeat(node, answer.attempt, answer.ranks))
        if answer.leaving:
            self._tell(m.NodeDraining(node, "its agent was told to end"))
        if answer.stacks or answer.rings:
            self._tell(m.StacksPrinted(answer.attempt, answer.stacks, answer.rings))
        if attempt is not None and attempt.stepping and self._first_step is None:
            self._first_step = attempt.step
            seconds = self.clock() - self._started_at
            self._note("first_step", f"step {attempt.step} {seconds:.1f} s after the start order", seconds=seconds)
            self._tell_of_pulse()
            self._warm(self.supervisor.answering.values())
            self._plan_layouts()

    def _log_wholes(self, answer: Answer) -> None:
        """Write the full text of each failure to the rank's log. The rank printed a part of it."""
        failures = [report.failure for report in answer.ranks if report.failure and report.rank not in self._logged]
        for failure in failures:
            self._logged.add(failure.rank)
            self.journal.output(failure.rank, failure.whole.encode())

    def _tell_of_pulse(self) -> None:
        """Report the nodes without UDP answers, if they slow the driver down."""
        nodes, now = self.supervisor.answering, self._awake()
        without = [node.name for id, node in nodes.items() if not self.pulse.hears(id, now)]
        if without and len(nodes) / ANSWERS > self.config.cluster.heartbeat / 2:
            text = (
                f"{len(without)} of {len(nodes)} nodes do not answer by UDP, for example {without[0]}: the driver checks them through Ray instead, "
                "which is slower; allow UDP between this machine and these nodes"
            )
            self._note("no_pulse", text, nodes=without)

    def _tell_of_priority(self) -> None:
        """Name the nodes on which other processes have priority over the ranks."""
        # A Ray that this run started has the priority of this process. On a Ray cluster, a submitted job has the
        # priority that Ray gives to all its workers.
        if low := self.vitals.low(os.nice(0) if self.config.cluster.address is None else 0):
            name, niceness = next(iter(low.items()))
            where = name + (f" and {len(low) - 1} more" if len(low) > 1 else "")
            text = (
                f"ranks run at nice {niceness} on {where}: other processes there have priority, so ranks may look slow or lost; "
                "start Ray there with RAY_worker_niceness=0"
            )
            self._note("priority", text, nodes=list(low))

    def _plan_layouts(self) -> None:
        """Start the planner for smaller layouts, unless an earlier launch of the run has made the plan."""
        if self._planner and self._planning is None and self.shapes.smaller and not self.shapes.is_planned:
            self._planning = spawn(self._planner, dict(os.environ), subprocess.DEVNULL)

    def _warm(self, nodes: Iterable[Node]) -> None:
        """Start reserve processes on these nodes, from which the ranks of a later attempt can start."""
        if self.config.cluster.standby:
            for node in nodes:
                seats = self.supervisor.current.ranks_of.get(node.id, ())
                call_agent(
                    self.fleet, node.id, Agent.warm, self.arguments, self.rank_folder, len(seats) or node.devices
                )

    def _tell(self, event: m.Event) -> None:
        for action in self.supervisor.handle(self.clock(), event):
            self._do(action)

    def _do(self, action: m.SupervisorAction) -> None:
        match action:
            case m.StartAttempt(number, placement):
                self._let_go()
                self._starting = number, placement
                self._tell_of_priority()
                self._started_at, self._first_step, self._offsets = self.clock(), None, {}
                self._logged.clear()
                if number == self.first and len(placement.nodes) > 1:
                    self._network = NetworkTest(placement.nodes, self._test_ports, self.fleet, self.clock())
                else:
                    call_agent(self.fleet, placement.seats[0].node.id, Agent.free_port)
            case m.EndRanks(number, nodes):
                self._starting = self._network = None
                for id in nodes:
                    call_agent(self.fleet, id, Agent.end, number)
            case m.StopRanks(number, nodes, why, in_memory):
                for id in nodes:
                    call_agent(self.fleet, id, Agent.stop, number, in_memory, why)
            # Nodes that answer UDP questions are probed by the next UDP question. A call to each of thousands of nodes
            # would take too long.
            case m.ProbeLinks(nodes):
                self._probed_from, now = self.pulse.number, self._awake()
                self.pulse.hurry()
                for id in nodes:
                    if not self.pulse.hears(id, now):
                        call_agent(self.fleet, id, Agent.probe)
            case m.CollectStacks(number, nodes, native):
                for id in nodes:
                    call_agent(self.fleet, id, Agent.ask_stacks, number, native)
            case m.Note(number, kind, text, fields):
                self.journal.write(kind, number, text, **fields)
                self.view.note(kind, text)
            case m.KeepIncident(_, incident):
                screen = keep_incident(self.folder / "logs", incident, partial(self._note, "incident"))
                self._note("incident", screen, ranks=incident["ranks"], fault=incident["fault"])
            case m.PassIncident(seconds):
                with contextlib.suppress(OSError):  # the disk is full; the event contains the text
                    pass_incident(self.folder / "logs", seconds)
            case m.FinishRun(code, text):
                refused = "".join(f"\n  refused: {name}: {why}" for name, why in self._refused.items())
                self._finish = m.FinishRun(code, text + (refused if code != EXIT_OK else ""))

    def _let_go(self) -> None:
        """End the agents of draining nodes, which no longer run ranks."""
        for id in self.supervisor.draining & set(self._known):
            self._forget(id)
            self._released.add(id)
            self.fleet.release(id)
            self._tell(m.NodeLost(id, "released, because it will be shut down"))

    def _send_orders(self, reply: Reply) -> None:
        if (
            self._starting is None or reply.node != self._starting[1].seats[0].node.id
        ):  # the answer belongs to an attempt that is over
            return
        number, placement = self._starting
        self._starting = None
        # The attempt has lost a node, so it is about to end. The lost node's copies could not be named in the orders.
        if self.supervisor.current.lost:
            return
        if reply.error is not None:
            self._tell(m.StartFailed(number, reply.node, reply.error))
            return
        try:
            arguments = [*self.arguments[:-1], str(self._attempt_config(number, placement.shape))]
            copies = self._tell_of_copies(number, placement)
        except OSError as error:  # for example, the disk of the run folder is full
            self._tell(
                m.StartFailed(
                    number, reply.node, f"the driver cannot send orders to the ranks: {explain_disk_error(error)}"
                )
            )
            return
        shared = copies | {
            "WORLD_SIZE": str(placement.world),
            "MASTER_ADDR": placement.seats[0].node.address,
            "MASTER_PORT": str(reply.value),
            "SLUICE_STORE_SECRET": secrets.token_hex(32),
            "SLUICE_FOLDER": os.getcwd(),
        }
        # PYTHONSAFEPATH keeps a rank from importing packages from its working folder.
        if safe := os.environ.get("PYTHONSAFEPATH"):
            shared["PYTHONSAFEPATH"] = safe
        shared |= {name: os.environ[name] for name in NAMES if name in os.environ}
        for id, seats in placement.by_node.items():
            ranks = [(seat.rank, seat.local_rank) for seat in seats]
            order = Order(number, ranks, arguments, shared, seats[0].node.address, self.rank_folder)
            call_agent(self.fleet, id, Agent.start, order)

    def _tell_of_copies(self, number: int, placement: Placement) -> dict[str, str]:
        """Return the environment variables that tell the ranks about copies in memory; empty if the run keeps no
        copies."""
        if not self.config.checkpoint.every_memory:
            return {}
        full_size, auto = placement.shape == self.shapes.own, self.config.resume == "auto"
        shelves = self.copies.shelves(placement, self.supervisor.answering, full_size, auto)
        return self.copies.write(number, shelves)

    def _drop_copies(self, code: int) -> None:
        """Drop the copies in memory if the run did not fail and the checkpoint on disk is as new as the copies."""
        saved = newest(self.folder)
        safe = saved > NONE and saved >= self.supervisor.held
        if self.config.checkpoint.every_memory and code in (EXIT_OK, EXIT_STOPPED) and safe:
            for id in self._known:
                call_agent(self.fleet, id, Agent.drop_memory)

    def _attempt_config(self, number: int, shape: StageShape) -> Path:
        """Write an attempt's configuration file, with its layout, and with resume=auto if this launch has written a
        checkpoint.
        """
        config = self.config if shape == self.shapes.own else with_shape(self.config, shape)
        if written_since(self.folder, self.first):
            config = dataclasses.replace(config, resume="auto")
        path = self.folder / "attempts" / f"{number:05d}.yaml"
        path.parent.mkdir(exist_ok=True)
        with naming(path):
            write_config(config, str(path))
        return path

    def _note(self, kind: str, text: str, **fields) -> None:
        self.journal.write(kind, self.supervisor.number, text, **fields)
        self.view.note(kind, text)

    def _fetch_last_words(self) -> None:
        """Fetch the output that the ranks wrote since the last answer."""
        attempt = self.supervisor.attempt
        if attempt is None:
            return
        waiting, quiet = {id for id in attempt.reachable if id in self._known}, 0
        for id in waiting:
            call_agent(self.fleet, id, Agent.last_words, self._offsets_on(id), attempt.number)
        # The loop ends after 20 polls in a row without an answer, some 2 s. With a time limit, a process that is held
        # up would lose the answers that arrive meanwhile.
        while waiting and quiet < 20:
            replies = self.fleet.replies(0.1)
            quiet += not replies
            for reply in replies:
                if reply.is_of(Agent.last_words):
                    waiting.discard(reply.node)
                    if reply.error is None and not reply.dead:
                        self._take_answer(reply.node, reply.value)
