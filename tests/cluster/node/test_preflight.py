"""Checks before a start: which problem excludes a node, and which pair of nodes is named."""

import dataclasses
import threading
import time

import pytest

from cluster.clocks import SteadyClock
from cluster.driver import network
from cluster.driver.network import NetworkTest, rounds
from cluster.node.network_probe import BYTES, NetworkProbe, NodeLink, measure
from cluster.node.preflight import Preflight, Question, _digest_of_program, gather_facts
from cluster.topology import Node
from tests.cluster.local_fleet import LocalFleet

NODE = Node("id1", "n1", "10.0.0.1", 1)


@pytest.fixture
def preflight(tmp_path):
    (tmp_path / "config.yaml").write_text("steps: 1")
    return Preflight(tmp_path, False, SteadyClock())


def test_a_node_like_the_driver_may_hold_ranks(preflight, tmp_path):
    assert preflight.problem(NODE, gather_facts(preflight.question(NODE))) is None
    preflight.close()
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"python": "3.9.1"}, "python is 3.9.1"),
        ({"torch": "2.0.0"}, "install the same torch on every node"),
        ({"program": "abc"}, "install the same version of the program"),
        ({"recipe": "abc"}, "reads another config.yaml"),
        ({"clock": time.time() - 100}, "s off; start a time service"),
        ({"free_bytes": 1 << 20}, "1 MiB free for temporary files"),
        ({"storage": "cannot read /runs: No such file or directory"}, "set runs= to a folder that every node mounts"),
    ],
)
def test_a_node_that_differs_is_refused_with_the_cure(preflight, change, words):
    facts = dataclasses.replace(gather_facts(preflight.question(NODE)), **change)
    assert words in preflight.problem(NODE, facts)


@pytest.mark.parametrize("name", ["rank.py", "rows.cpp", "tiles.h"])
def test_another_source_of_any_language_is_another_program(tmp_path, monkeypatch, name):
    monkeypatch.setattr("cluster.node.preflight.ROOT", tmp_path)
    source = tmp_path / "train" / "native" / name
    source.parent.mkdir(parents=True)
    digests = set()
    for text in ("1", "2"):
        source.write_text(text)
        digests.add(_digest_of_program())
    assert len(digests) == 2


def test_a_folder_of_the_same_name_is_not_shared_storage(preflight, tmp_path):
    question = preflight.question(NODE)
    facts = gather_facts(question)
    (tmp_path / ".preflight" / NODE.id).unlink()  # the node wrote to a disk of its own
    assert "are not visible to the driver" in preflight.problem(NODE, facts)
    other = dataclasses.replace(question, folder=str(tmp_path / "elsewhere"))
    assert "cannot read" in gather_facts(other).storage


@pytest.mark.parametrize("count", [2, 3, 8, 9])
def test_every_pair_plays_once_and_nobody_twice_in_a_round(count):
    played = [pair for round in rounds(count) for pair in round]
    assert sorted(played) == [(a, b) for a in range(count) for b in range(a + 1, count)]
    for round in rounds(count):
        players = [player for pair in round for player in pair]
        assert len(players) == len(set(players))


def test_a_link_is_measured_and_a_closed_port_is_an_error():
    probe = NetworkProbe()
    port = probe.listen("127.0.0.1")
    link = measure("127.0.0.1", port)
    assert link.error is None and 0 < link.milliseconds < 1000 and link.gbit > BYTES * 8 / 5e9 / 10
    probe.close()
    assert measure("127.0.0.1", port).error


def test_a_node_measures_nobody_while_it_waits_to_be_measured():
    here, there = NetworkProbe(), NetworkProbe()
    ports, found = [probe.listen("127.0.0.1") for probe in (here, there)], []
    player = threading.Thread(target=lambda: found.extend(here.play([None, ("127.0.0.1", ports[1])])))
    player.start()
    player.join(0.3)
    assert player.is_alive() and not found
    assert [link.error for link in there.play([("127.0.0.1", ports[0]), None])] == [None]
    player.join(30)
    assert [link.error for link in found] == [None]
    here.close()
    there.close()


def test_the_slow_and_the_unreachable_pair_are_named():
    fleet = LocalFleet(nodes=4, devices=1)
    try:
        test = NetworkTest(fleet.nodes(), {}, fleet, 0.0)
        ids = [node.id for node in fleet.nodes()]
        test._links = {(a, b): NodeLink("x", 0.1, 10.0) for i, a in enumerate(ids) for b in ids[i + 1 :]}
        test._links["id0", "id3"] = NodeLink("x", 0.1, 1.0)
        test._links["id1", "id2"] = NodeLink("127.0.0.1", error="timed out")
        verdict = test._verdict()
    finally:
        fleet.close()
    assert "slow: n0 - n3 1 Gbit/s" in verdict.text and len(verdict.slow) == 1
    assert verdict.unreachable == ["n1 cannot reach n2 (127.0.0.1): timed out"]


@pytest.mark.parametrize(
    ("gbit", "milliseconds", "is_slow"),
    [(10.0, 0.1, False), (4.0, 0.1, False), (3.0, 0.1, True), (10.0, 1.0, False), (10.0, 1.2, True)],
)
def test_a_link_is_slow_by_a_third_of_the_median_or_a_millisecond_more(gbit, milliseconds, is_slow):
    fleet = LocalFleet(nodes=3, devices=1)
    try:
        test = NetworkTest(fleet.nodes(), {}, fleet, 0.0)
        test._links = {pair: NodeLink("x", 0.1, 10.0) for pair in (("id0", "id1"), ("id0", "id2"))}
        test._links["id1", "id2"] = NodeLink("x", milliseconds, gbit)
        assert bool(test._verdict().slow) == is_slow
    finally:
        fleet.close()


def test_nobody_waits_longer_for_a_network_test_than_its_rounds_take(monkeypatch):
    turns = {}
    monkeypatch.setattr(network, "call_agent", lambda fleet, id, method, given: turns.update({id: given}))
    nodes = [Node(f"id{i}", f"n{i}", "127.0.0.1", 1) for i in range(4)]
    test = NetworkTest(nodes, {node.id: 1 for node in nodes}, None, now=100.0)
    assert all(len(given) == 3 for given in turns.values()), "also those in which a node is measured by another"
    assert sum(turn is not None for given in turns.values() for turn in given) == 6
    end = 100.0 + 5.0 * (2 + 3)  # three rounds of four nodes
    assert test.advance(end - 0.1) is None
    verdict = test.advance(end)
    assert (
        len(verdict.unreachable) == 6
        and "n0 cannot reach n3 (127.0.0.1): no result before the time limit" in verdict.unreachable
    )


@pytest.mark.parametrize("count", [3, 6])
def test_a_whole_network_test_between_agents(count, tmp_path):
    fleet = LocalFleet(count, devices=1)
    try:
        for node in fleet.nodes():
            question = Question(str(tmp_path), "", node.id, 1, False, node.address, tests_network=True)
            fleet.call(node.id, "facts", question)
        ports = {reply.node: reply.value.test_port for reply in fleet.replies(1.0)}
        test, verdict = NetworkTest(fleet.nodes(), ports, fleet, time.monotonic()), None
        deadline = time.monotonic() + 60
        while verdict is None and time.monotonic() < deadline:
            for reply in fleet.replies(0.05):
                test.take(reply)
            verdict = test.advance(time.monotonic())
    finally:
        fleet.close()
    assert verdict.pairs == count * (count - 1) // 2 and not verdict.unreachable


def test_a_node_without_a_port_is_named_at_once():
    fleet = LocalFleet(2, devices=1)
    verdict = NetworkTest(fleet.nodes(), {"id0": 1, "id1": 0}, fleet, 0.0).advance(0.0)
    assert verdict.unreachable == ["n0 cannot reach n1 (127.0.0.1): the node opened no port for the test"]
