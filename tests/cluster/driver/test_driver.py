"""Driver, agents and real rank processes on this machine, without Ray and without torch."""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.driver import driver as driver_module
from cluster.driver.checkpoints import claim_attempt, newest, written_since
from cluster.driver.driver import Driver
from cluster.driver.fleet import Reply
from cluster.driver.journal import Journal, read_events
from cluster.driver.time_split import split_time
from cluster.driver.view import View
from cluster.node.agent import Agent
from cluster.node.copy_store import Store
from cluster.node.preflight import gather_facts
from cluster.run_files import NONE, Age
from cluster.topology import Node
from conf.errors import EXIT_CRASH, EXIT_OK, EXIT_STOPPED, EXIT_USER
from conf.load import compose, write_config
from tests.cluster.drive import hold, let_end, once, set_fault
from tests.cluster.local_fleet import ForkingAgent, LocalFleet
from train.checkpoint.commit import AttemptFenced, Committer

RANK = Path(__file__).parents[1] / "fake_rank.py"


class Run:
    """A run of fake ranks: 4 nodes with one rank each by default."""

    def __init__(self, runs: Path, *overrides: str, nodes: int = 4, devices: int = 1, dp: int = 4):
        self.config = compose(
            f"runs={runs}",
            "name=run",
            "steps=30",
            "batch_size=12",
            "micro_batch_size=1",
            "checkpoint.every=5",
            "cluster=ray",
            "cluster.hang_after=30",  # a busy machine holds all ranks for seconds
            "cluster.heartbeat=2",
            f"parallel.dp={dp}",
            *overrides,
        )
        self.folder = runs / "run"
        self.folder.mkdir(exist_ok=True)
        write_config(self.config, str(self.folder / "config.yaml"))
        self.fleet = LocalFleet(nodes, devices, agent=ForkingAgent)
        view = View("run", self.folder / "metrics.jsonl", self.config.steps)
        root = str(RANK.parents[2])
        self.driver = Driver(self.config, self.folder, [str(RANK), "CONFIG"], self.fleet, root, False, view)

    def fault(self, rank: int, what: str) -> None:
        set_fault(self.folder, rank, what)

    def once(self, do, kind: str, **fields) -> None:
        """Call do() once the run has told this, from another thread."""
        once(self.folder, do, kind, **fields)

    def hold(self) -> None:
        """The run goes on until it is stopped, however fast its ranks are."""
        hold(self.folder)

    def hold_until(self, kind: str, **fields) -> None:
        """The run does not end before it has told this."""
        self.hold()
        self.once(lambda: let_end(self.folder), kind, **fields)

    def at_step(self, step: int, do) -> None:
        """Call do() once there is a checkpoint of this step, from another thread. What it does must not find the run at its end:
        let it hold.
        """

        def wait() -> None:
            while not (self.folder / "checkpoints" / f"step_{step:08d}").exists():
                time.sleep(0.05)
            do()

        threading.Thread(target=wait, daemon=True).start()

    def cut(self, node: str) -> None:
        """No question reaches the agent, and its ranks reach nobody."""
        self.fleet.deaf.add(node)
        for child in self.fleet.agents[node]._children.values():
            child.process.send_signal(signal.SIGSTOP)

    def heal(self, node: str) -> None:
        """Old questions arrive late."""
        self.fleet.deaf.discard(node)
        self.fleet.call(node, "ask", {})

    def run(self) -> int:
        try:
            self.finish = self.driver.run()
        finally:
            self.fleet.close()
        self.events = read_events(self.folder)
        return self.finish.code

    def kinds(self) -> list[str]:
        return [event["kind"] for event in self.events]

    def only(self, kind: str) -> dict:
        (event,) = [event for event in self.events if event["kind"] == kind]
        return event


@pytest.fixture(autouse=True)
def import_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(RANK.parents[2]))


@pytest.mark.slow
def test_a_run_ends_well_and_leaves_a_record(tmp_path):
    run = Run(tmp_path)
    run.hold_until("first_step")
    assert run.run() == EXIT_OK
    assert run.kinds()[0] == "launch" and run.kinds()[-1] == "finish"
    assert run.only("network")["pairs"] == 6 and run.only("attempt")["dp"] == 4
    assert "rank 3 of 4 resumes at 0" in (run.folder / "logs" / "rank_3.log").read_text()
    assert not (run.folder / ".preflight").exists()
    table = json.loads((run.folder / "ranks.json").read_text())
    assert (table["pp"], table["dp"], table["attempt"], table["phase"]) == (1, 4, 1, "done")
    assert [row[:2] for row in table["ranks"]] == [[0, "n0"], [1, "n1"], [2, "n2"], [3, "n3"]]
    record = split_time(run.events)
    assert record.attempts == 1 and record.nodes == 4 and 0 < record.share < 1


@pytest.mark.parametrize(
    ("what", "cause", "words"),
    [
        ("kill", "killed", "rank 2 on n2 ended by signal SIGKILL"),
        ("crash", "crash", "rank 2 on n2 failed: RuntimeError: boom"),
        ("hang", "hang", "rank 2 has not joined: others wait for it in all_reduce"),
        ("stop", "hang", "rank 2 is stopped (on n2)"),
    ],
)
def test_the_first_rank_to_fail_is_named_and_the_run_goes_on(tmp_path, what, cause, words):
    run = Run(tmp_path, *(["cluster.hang_after=5"] if cause == "hang" else []))
    run.fault(2, what)
    run.hold_until("recovered")
    assert run.run() == EXIT_OK, run.finish.text
    failure = run.only("failure")
    assert failure["cause"] == cause and words in failure["text"] and failure["ranks"] == [2]
    told = [
        event for event in run.events if event["kind"] == "incident"
    ]  # a hang has one of the warning too, if it came first
    incident = json.loads((run.folder / "logs" / f"incident_{len(told)}.json").read_text())
    assert len(told) <= 1 + (cause == "hang") and failure["nodes"] == ["n2"]
    assert all(incident["ranks"] == event["ranks"] == failure["ranks"] for event in told)
    assert (
        len(incident["by_rank"]) == 4
    )  # what all ranks did came to the driver from their nodes, also of one that is dead
    assert cause != "hang" or all(wait["for"] == [2] for wait in incident["waits"])
    log = (run.folder / "logs" / "rank_2.log").read_text()
    assert log.count("all that was raised from it") == (what == "crash")
    assert cause == "hang" or run.only("recovered")["seconds"] < 25  # a dead rank is no hang, which would take 30
    attempts = sorted((run.folder / "attempts").iterdir())
    assert [path.name for path in attempts] == ["00001.yaml", "00002.yaml"]


@pytest.mark.slow
def test_a_cut_node_is_left_out_and_taken_back(tmp_path):
    run = Run(tmp_path)
    run.at_step(5, lambda: run.cut("id1"))
    run.once(lambda: run.heal("id1"), "first_step", attempt=2)
    run.hold_until("attempt", attempt=3)
    assert run.run() == EXIT_OK, run.finish.text
    assert [event["dp"] for event in run.events if event["kind"] == "attempt"] == [4, 3, 4]
    assert "n1" in run.only("failure")["text"] and run.only("grow")
    assert "with dp 3" in (run.folder / "logs" / "rank_0.log").read_text()


@pytest.mark.slow
def test_a_dead_agent_is_started_again(tmp_path):
    run = Run(tmp_path)
    run.at_step(5, lambda: run.fleet.kill_agent("id2"))
    run.hold_until("attempt", attempt=2)
    assert run.run() == EXIT_OK, run.finish.text
    assert run.only("failure")["nodes"] == ["n2"]
    assert [event["dp"] for event in run.events if event["kind"] == "attempt"] == [4, 4]


@pytest.mark.slow
def test_the_plan_that_a_driver_starts_lets_a_run_go_on_with_a_smaller_ep(tmp_path):
    toy = ["model.hidden=32", "model.layers=2", "model.experts=8", "model.vocab_size=512", "seq_len=32"]
    run = Run(tmp_path, "parallel.ep=2", "steps=100000", *toy, nodes=2, dp=2)
    run.driver._planner = [sys.executable, "-m", "train.plan.smaller_layouts", str(run.folder / "config.yaml"), "cpu"]
    note = run.driver.view.note

    def follow(kind: str, text: str) -> None:
        note(kind, text)
        if kind == "recovered":
            os.kill(os.getpid(), signal.SIGTERM)

    def lose_a_node() -> None:
        while not run.driver.shapes.is_planned:
            time.sleep(0.1)
        run.fleet.power_off("id1")

    run.driver.view.note = follow
    threading.Thread(target=lose_a_node, daemon=True).start()
    assert run.run() == EXIT_STOPPED, run.finish.text
    assert [(event["dp"], event["ep"]) for event in run.events if event["kind"] == "attempt"] == [(2, 2), (1, 1)]


@pytest.mark.slow
def test_sigterm_saves_and_the_next_launch_goes_on_with_a_higher_attempt(tmp_path):
    run = Run(tmp_path)
    run.hold()
    run.at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run.run() == EXIT_STOPPED
    let_end(run.folder)
    again = Run(tmp_path)
    assert again.run() == EXIT_OK
    assert [event["attempt"] for event in again.events if event["kind"] == "attempt"] == [1, 2]
    assert "resumes at 0" not in (again.folder / "logs" / "rank_0.log").read_text().split("attempt 2")[1]


@pytest.mark.slow
def test_a_cause_that_stays_ends_the_run_with_a_diagnosis(tmp_path):
    run = Run(tmp_path, "cluster.restarts=1", "checkpoint.every=100", nodes=2, dp=2)
    run.driver.view.note = lambda kind, text: run.fault(1, "crash") if kind == "attempt" else None
    assert run.run() == EXIT_CRASH
    for words in ("rank 1 on n1 failed", "failure 2 of kind", "newest checkpoint: none", "what to do"):
        assert words in run.finish.text


@pytest.mark.slow
def test_ranks_in_reserve_that_cannot_start_break_no_attempt(tmp_path, monkeypatch):
    def warm(agent: Agent, *_) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(Agent, "warm", warm)
    run = Run(tmp_path, nodes=2, dp=2)
    run.hold_until("call_failed")
    assert run.run() == EXIT_OK, run.finish.text
    assert "failure" not in run.kinds() and run.kinds().count("attempt") == 1
    failed = [event for event in run.events if event["kind"] == "call_failed"]
    assert failed and failed[0]["text"].endswith("warm: OSError('no memory')")


def test_ranks_wait_in_reserve_on_every_node_also_on_one_that_joins_later(tmp_path):
    run = Run(tmp_path, nodes=3, dp=2)
    warmed, call = [], run.fleet.call

    def record(node: str, method: str, *arguments) -> None:
        if method == "warm":
            warmed.append((node, arguments[-1]))
        call(node, method, *arguments)

    run.fleet.call = record
    run.once(lambda: run.fleet._nodes.append(Node("id3", "n3", "127.0.0.1", 4)), "first_step")
    run.hold_until("node_joined", node="n3")  # the same round of the driver warms it
    assert run.run() == EXIT_OK, run.finish.text
    assert warmed == [("id0", 1), ("id1", 1), ("id2", 1), ("id3", 4)]


@pytest.mark.slow
def test_an_agent_that_cannot_start_is_a_node_refused_with_the_reason(tmp_path):
    run = Run(tmp_path, "cluster.wait=3", nodes=2, dp=2)
    call = run.fleet.call

    def fail(node: str, method: str, *arguments) -> None:
        if node == "id1":
            run.fleet._replies.put(Reply(node, method, error="no disk for its code", dead=True))
        else:
            call(node, method, *arguments)

    run.fleet.call = fail
    assert run.run() == EXIT_USER
    assert "refused: n1: its agent died: no disk for its code" in run.finish.text
    assert run.only("node_refused")["node"] == "n1", "one event, not one for every try"


@pytest.mark.slow
def test_a_full_disk_at_the_order_to_start_costs_an_attempt_not_the_driver(tmp_path, monkeypatch):
    run = Run(tmp_path, nodes=2, dp=2)
    write, refusals = run.driver._attempt_config, [OSError(28, "No space left on device", str(tmp_path / "full"))]

    def write_or_refuse(number: int, dp: int) -> Path:
        if refusals:
            raise refusals.pop()
        return write(number, dp)

    monkeypatch.setattr(run.driver, "_attempt_config", write_or_refuse)
    assert run.run() == EXIT_OK, run.finish.text
    assert "No space left on device" in run.only("failure")["text"] and "the disk at" in run.only("failure")["text"]


@pytest.mark.slow
def test_a_node_whose_old_agent_lives_on_is_asked_again_until_that_one_has_ended(tmp_path, monkeypatch):
    """As after the death of a raylet: a new one starts, and the agent of the old one still holds the copies."""
    monkeypatch.setattr("cluster.node.copy_store._take_lock.__defaults__", (0.5,))  # seconds of patience
    run = Run(tmp_path, "checkpoint.every_memory=2", f"checkpoint.memory_folder={tmp_path}", nodes=2, dp=2)
    old = Store(Path(run.driver.copies.folder_on(run.fleet._nodes[1])), "token", "127.0.0.1", lambda: 0)
    run.once(lambda: old.close(False), "node_refused")
    assert run.run() == EXIT_OK, run.finish.text
    refusal = run.only("node_refused")["text"]
    assert "another agent of this run holds" in refusal and "set checkpoint.memory_folder" not in refusal
    assert run.only("attempt")["dp"] == 2 and not run.driver._refused


@pytest.mark.slow
def test_a_node_whose_clock_is_off_is_taken_once_it_is_right(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.driver.driver.Driver._refuse.__defaults__", (0.5,))  # seconds until the next check
    off = iter([3600.0, 3600.0])

    def gather_off(question):
        facts = gather_facts(question)
        return replace(facts, clock=facts.clock + next(off, 0.0)) if question.node == "id1" else facts

    monkeypatch.setattr("cluster.node.agent.gather_facts", gather_off)
    run = Run(tmp_path, nodes=2, dp=2)
    assert run.run() == EXIT_OK, run.finish.text
    assert "n1: its clock is 3600.0 s off" in run.only("node_refused")["text"], "told once"
    assert run.only("attempt")["dp"] == 2 and not run.driver._refused


def test_a_memory_folder_that_no_node_has_ends_the_launch_at_once(tmp_path):
    absent = tmp_path / "absent"
    run = Run(tmp_path, "checkpoint.every_memory=2", f"checkpoint.memory_folder={absent}", nodes=2, dp=2)
    began = time.monotonic()
    assert run.run() == EXIT_USER
    assert time.monotonic() - began < run.config.cluster.wait / 2
    assert f"no node has checkpoint.memory_folder = {absent}" in run.finish.text
    assert f"the folder {absent} does not exist; create it on every node" in run.finish.text


def test_a_node_whose_agent_starts_at_the_second_try_is_not_refused(tmp_path):
    run = Run(tmp_path, nodes=2, dp=2)
    run.fleet._replies.put(Reply("id1", "facts", error="killed", dead=True))
    assert run.run() == EXIT_OK, run.finish.text
    assert run.only("attempt")["dp"] == 2 and not run.driver._refused


def test_a_node_lost_just_before_the_order_to_start_breaks_the_attempt_not_the_driver(tmp_path):
    run = Run(tmp_path, "checkpoint.every_memory=2", f"checkpoint.memory_folder={tmp_path}", nodes=2, dp=2)
    call = run.fleet.call

    def lose_a_node(node: str, method: str, *arguments) -> None:
        if method == "free_port":
            run.fleet.call = call
            run.fleet.kill_agent("id1")
        call(node, method, *arguments)

    run.fleet.call = lose_a_node
    assert run.run() == EXIT_OK, run.finish.text
    assert run.only("failure")["nodes"] == ["n1"] and run.kinds().count("attempt") == 2
    assert not (run.folder / "attempts" / "00001.yaml").exists(), "no rank of the broken attempt was started"


def test_a_late_answer_for_an_attempt_that_is_over_names_no_port(tmp_path):
    run = Run(tmp_path, "steps=5", nodes=2, dp=2)
    ports, call = [], run.fleet.call

    def answer_late(node: str, method: str, *arguments) -> None:
        if method == "free_port":
            run.fleet._replies.put(Reply("id1", method, 1))
        if method == "start":
            ports.append(arguments[0].environment["MASTER_PORT"])
        call(node, method, *arguments)

    run.fleet.call = answer_late
    assert run.run() == EXIT_OK, run.finish.text
    assert len(set(ports)) == 1 and ports[0] != "1"


def test_however_many_nodes_are_there_each_is_asked_within_its_heartbeat(tmp_path):
    run = Run(tmp_path, nodes=1, dp=1)
    asked = []
    run.fleet.call = lambda node, method, *arguments: asked.append((node, arguments))
    for count, least, most in ((10, 0.25, 0.25), (120, 0.4, 1.2), (4000, 1.0, 1.0)):
        run.driver._known = {f"id{i}": None for i in range(count)}
        run.driver._ask("id3")
        node, (offsets, attempt, patience) = asked.pop()
        assert (node, offsets, attempt) == ("id3", {}, 0) and least <= patience <= most
    run.fleet.close()


def test_nodes_that_answer_the_pulse_are_asked_seldom_and_told_apart_from_one_that_does_not(tmp_path, monkeypatch):
    """Agents answer after 30 s here, and a node counts as lost after 2."""
    monkeypatch.setattr(driver_module, "ANSWERS", 0.05)
    run = Run(tmp_path, "steps=100000", nodes=4, dp=3)
    run.fleet.pulse, call, patience, take = True, run.fleet.call, [], run.driver._take_answer

    def note(node: str, method: str, *arguments) -> None:
        assert method != "probe", "the pulse tells which nodes live"
        if method == "ask" and node != "id0":  # rank 0 is there
            patience.append(arguments[2])
        call(node, method, *arguments)

    def lose(node: str) -> None:
        run.fleet.deaf.add(node)
        run.fleet.agents[node]._echo.close()

    def kill_rank(node: str) -> None:
        (child,) = run.fleet.agents[node]._children.values()
        os.kill(child.process.pid, signal.SIGKILL)
        run.driver._take_answer = wake_and_take

    def wake_and_take(node: str, answer) -> None:
        """The driver was held up, and hears of the rank before it hears a pulse again."""
        if any(report.code == -signal.SIGKILL for report in answer.ranks):
            run.driver.clock = lambda: time.monotonic() + 3
        take(node, answer)

    def follow(kind: str, text: str) -> None:
        show(kind, text)
        if kind == "recovered":
            next(then)()

    then = iter([lambda: kill_rank("id1"), lambda: setattr(run.driver, "_stop", "seen enough")])
    show, run.driver.view.note, run.fleet.call = run.driver.view.note, follow, note
    run.at_step(20, lambda: lose("id2"))
    assert run.run() == EXIT_STOPPED, run.finish.text
    first, second = [event for event in run.events if event["kind"] == "failure"]
    assert first["nodes"] == ["n2"] and "no answer for 2." in first["text"]
    assert second["text"].startswith("rank 1 on n1 ended by signal SIGKILL")
    assert max(patience) == driver_module.LONGEST_PATIENCE and [
        e["node"] for e in run.events if e["kind"] == "node_lost"
    ] == ["n2"]


@pytest.mark.slow
def test_many_nodes_that_do_not_answer_the_pulse_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(driver_module, "ANSWERS", 0.1)
    run = Run(tmp_path, "steps=10", nodes=2, dp=2)
    assert run.run() == EXIT_OK
    assert run.only("no_pulse")["nodes"] == ["n0", "n1"]


@pytest.mark.slow
def test_nodes_that_give_way_to_other_work_are_named_once(tmp_path, monkeypatch):
    def facts(agent: Agent, question):
        return replace(found := real(agent, question), niceness=found.niceness + (question.node != "id0") * 15)

    real = Agent.facts
    monkeypatch.setattr(Agent, "facts", facts)
    run = Run(tmp_path, "steps=20", nodes=3, dp=3)
    run.fault(1, "kill")
    assert run.run() == EXIT_OK and len([event for event in run.events if event["kind"] == "attempt"]) == 2
    event = run.only("priority")
    assert event["nodes"] == ["n1", "n2"] and "RAY_worker_niceness=0" in event["text"]


def test_the_newest_checkpoint_is_that_of_the_latest_attempt(tmp_path):
    def write(step: int, text: str) -> Path:
        path = tmp_path / "checkpoints" / f"step_{step:08d}" / "manifest.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    assert newest(tmp_path) == NONE and not written_since(tmp_path, 1)
    write(100, '{"attempt": 1}')
    assert newest(tmp_path) == Age(1, 100) and not written_since(tmp_path, 2)
    write(50, '{"attempt": 2}')
    write(55, '{"attempt": 2}')
    assert newest(tmp_path) == Age(2, 55) and written_since(tmp_path, 2)
    write(110, '{"attempt": 3')
    assert newest(tmp_path) == Age(2, 55), "a manifest that is damaged tells no age"
    path = tmp_path / "checkpoints" / "step_00000100"
    path.rename(path.with_name(".step_00000100.old"))
    write(100, '{"attempt": 2}')
    assert newest(tmp_path) == Age(2, 100), "a later attempt wrote the same step"


def test_the_number_of_an_attempt_that_started_no_rank_is_not_given_again(tmp_path):
    Journal(tmp_path, print).write("attempt", 12, "attempt 12: stopped before the order to start")
    assert claim_attempt(tmp_path, 10.0) == 13


def test_a_copied_run_without_hidden_files_gets_a_number_after_its_checkpoints(tmp_path):
    manifest = tmp_path / "checkpoints" / "step_00000004" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"attempt": 5}')
    assert claim_attempt(tmp_path, 10.0) == 6


@pytest.mark.parametrize(
    "line", ["[]", "7", '{"attempt": 3}', '{"attempt": "3", "kind": "x", "text": "", "time": 0}', "[" * 9999]
)
def test_files_that_no_driver_wrote_do_not_stop_a_launch(tmp_path, line):
    (tmp_path / "events.jsonl").write_text(f"{line}\n")
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "copy of 00003.yaml").touch()
    (tmp_path / "attempts" / "00004.yaml").touch()
    assert claim_attempt(tmp_path, 10.0) == 5


def test_a_new_launch_shuts_out_ranks_of_the_one_before_that_have_not_begun(tmp_path):
    Committer(tmp_path / "checkpoints", attempt=1, world_size=1, timeout=10.0).enter(0)
    assert claim_attempt(tmp_path, 10.0) == 2
    with pytest.raises(AttemptFenced, match="attempt 2 of this run has started"):
        Committer(tmp_path / "checkpoints", attempt=1, world_size=1, timeout=10.0).enter(0)
    Committer(tmp_path / "checkpoints", attempt=2, world_size=1, timeout=10.0).enter(0)


@pytest.mark.slow
def test_every_attempt_has_a_secret_of_its_own_that_no_file_holds(tmp_path):
    run = Run(tmp_path, "steps=12", nodes=2, dp=2)
    run.fault(1, "crash")
    secrets, call = [], run.fleet.call

    def listen(node: str, method: str, *arguments) -> None:
        if method == "start":
            secrets.append(arguments[0].environment["SLUICE_STORE_SECRET"])
        call(node, method, *arguments)

    run.fleet.call = listen
    assert run.run() == EXIT_OK, run.finish.text
    assert len(secrets) == 4 and len(set(secrets)) == 2, "the same for all ranks of an attempt"
    assert all(len(bytes.fromhex(secret)) == 32 for secret in secrets)
    written = b"".join(path.read_bytes() for path in run.folder.rglob("*") if path.is_file())
    assert not any(secret.encode() in written for secret in secrets)


@pytest.mark.slow
def test_a_driver_that_is_held_up_at_its_end_hears_what_ranks_printed_last(tmp_path):
    run = Run(tmp_path, "steps=5", nodes=2, dp=2)
    call, take, late, heard = run.fleet.call, run.driver._take_answer, [], set()
    run.driver.clock = lambda: time.monotonic() + 100.0 * len(late)

    def hold_up(node: str, method: str, *arguments) -> None:
        if method == "last_words":
            late.append(node)
        call(node, method, *arguments)

    def hear(node: str, answer) -> None:
        take(node, answer)
        heard.update([node] if late else [])

    run.fleet.call, run.driver._take_answer = hold_up, hear
    assert run.run() == EXIT_OK, run.finish.text
    assert heard == {"id0", "id1"}


def test_a_port_that_others_take_is_named(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:

        def free_port(agent: Agent) -> int:
            return taken.getsockname()[1]

        monkeypatch.setattr(Agent, "free_port", free_port)
        run = Run(tmp_path, "cluster.restarts=1", nodes=2, dp=2)
        assert run.run() == EXIT_CRASH
    assert "rank 0 on n0 failed: OSError: [Errno 98] Address already in use" in run.finish.text
    assert len(run.finish.text.splitlines()) < 20


@pytest.mark.slow
def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    run = Run(tmp_path, nodes=1, devices=2, dp=2)
    assert run.run() == EXIT_OK
    assert not list(scratch.iterdir())
    assert json.loads((run.folder / "events.jsonl").read_text().splitlines()[-1])["code"] == EXIT_OK


@pytest.mark.slow
def test_a_node_that_is_about_to_go_costs_a_checkpoint_and_no_failure(tmp_path):
    run = Run(tmp_path)
    run.at_step(5, lambda: run.fleet.leaving.update(id2="preempted"))
    run.hold_until("attempt", attempt=2)
    assert run.run() == EXIT_OK, run.finish.text
    assert [event["dp"] for event in run.events if event["kind"] == "attempt"] == [4, 3]
    assert run.only("drain")["node"] == "n2" and "preempted" in run.only("drain")["text"]
    assert "failure" not in run.kinds() and "id2" not in run.fleet.agents
    log = (run.folder / "logs" / "rank_0.log").read_text()
    assert int(re.search(r"resumes at (\d+) with dp 3", log)[1]) > 5, "a checkpoint is written at once"


@pytest.mark.slow
def test_spares_take_the_place_of_a_node_that_is_told_to_end(tmp_path):
    run = Run(tmp_path, nodes=5)
    run.at_step(5, lambda: setattr(run.fleet.agents["id0"], "_leaving", True))
    run.hold_until("attempt", attempt=2)
    assert run.run() == EXIT_OK, run.finish.text
    attempts = [event for event in run.events if event["kind"] == "attempt"]
    assert [event["dp"] for event in attempts] == [4, 4]
    assert attempts[1]["nodes"] == ["n4", "n1", "n2", "n3"], "the others stay where they were"


@pytest.mark.slow
def test_without_the_head_the_run_saves_and_stops_and_the_next_launch_resumes(tmp_path):
    run = Run(tmp_path)
    run.hold()
    run.at_step(5, lambda: setattr(run.fleet, "headless", True))
    assert run.run() == EXIT_STOPPED and run.finish.text == "the head has not answered"
    assert "stops as the head has not answered" in (run.folder / "logs" / "rank_0.log").read_text(), "one reason"
    assert "failure" not in run.kinds()
    let_end(run.folder)
    again = Run(tmp_path)
    assert again.run() == EXIT_OK, again.finish.text
    assert "resumes at 0" not in (again.folder / "logs" / "rank_0.log").read_text().split("attempt 2")[1]
