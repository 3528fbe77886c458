"""One agent and its ranks: contract, output, stacks, standby, lease, and no process that outlives them."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from cluster import private_folder
from cluster.cause import NATIVE_HEAD
from cluster.node import agent as agent_module
from cluster.node.agent import Agent, Answer, Order, scratch_prefix
from cluster.spawn import lives

ROOT = str(Path(__file__).parents[3])


@pytest.fixture
def agent():
    agent = Agent(lease=30.0)
    yield agent
    agent.close()


def order(body: str, attempt: int = 1, ranks: int = 2) -> Order:
    pairs = [(10 + i, i) for i in range(ranks)]
    return Order(attempt, pairs, ["-c", body], {"WORLD_SIZE": "20", "MASTER_PORT": "1"}, "127.0.0.1", ROOT)


def until(agent: Agent, condition, seconds: float = 60) -> Answer:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = agent.ask({})
        if condition(answer):
            return answer
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {answer}")


def ended(answer: Answer) -> bool:
    return all(report.ended for report in answer.ranks)


def test_the_contract_of_a_rank(agent):
    names = "RANK LOCAL_RANK LOCAL_WORLD_SIZE WORLD_SIZE MASTER_PORT GLOO_SOCKET_IFNAME SLUICE_ATTEMPT"
    agent.start(order(f"import os; print(*[os.environ[n] for n in {names.split()}])"))
    answer = until(agent, ended)
    assert answer.output == {10: b"10 0 2 20 1 lo 1\n", 11: b"11 1 2 20 1 lo 1\n"}
    assert agent.ask({10: 3, 11: 100}).output == {10: b"0 2 20 1 lo 1\n"}


def test_the_interfaces_that_a_user_named_win(agent, monkeypatch):
    """On the node before the driver's, which comes with the order, before that of the node's address."""
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    asked = order("import os; print(os.environ['GLOO_SOCKET_IFNAME'], os.environ['NCCL_SOCKET_IFNAME'])", ranks=1)
    asked.environment.update(GLOO_SOCKET_IFNAME="eth9", NCCL_SOCKET_IFNAME="eth9")
    agent.start(asked)
    assert until(agent, ended).output == {10: b"eth9 ib0\n"}


def test_a_rank_that_vanished_shows_its_last_words(agent):
    agent.start(order("import os; print('about to die', flush=True); os.kill(os.getpid(), 9)", ranks=1))
    (report,) = until(agent, ended).ranks
    assert report.code == -9 and report.bad and report.log_tail == "about to die\n"


def test_stacks_come_from_ranks_that_can_give_them_and_kill_no_other(agent):
    body = """
import os, time, faulthandler, signal
if os.environ["RANK"] == "10":
    stacks = open(os.readlink("/proc/self/fd/1").replace(".log", ".stacks"), "a")
    faulthandler.register(signal.SIGUSR1, stacks)
print("ready", flush=True)
time.sleep(60)
"""
    agent.start(order(body))
    until(agent, lambda answer: len(answer.output) == 2)
    agent.ask_stacks(1, native=True)
    answer = until(agent, lambda answer: answer.stacks or any(report.state for report in answer.ranks))
    assert list(answer.stacks) == [10] and "line 7 in <module>" in answer.stacks[10]
    assert answer.stacks[10].partition(NATIVE_HEAD)[2].strip(), "native threads, or why not"
    assert not agent.ask({}).stacks, "told once"
    assert not any(report.ended for report in answer.ranks)


def test_stacks_are_told_once_they_are_whole(agent, tmp_path):
    """Of a part one would read that the rank waits for nobody."""
    body = f"""
import os, pathlib, signal, time
def show(*_):
    for text in ("Thread 0x1 (most recent call first):\\n  File 'a', line 1 in _bootstrap\\n",
                 "Current thread 0x2 (most recent call first):\\n", "  File 'b', line 2 in all_reduce\\n", "  File 'b', line 3 in <module>\\n"):
        print(text, end="", flush=True)
        print(text, end="", flush=True, file=stacks)
        while not pathlib.Path({str(tmp_path / "go")!r}).exists():
            time.sleep(0.01)
    print("and on", flush=True)
stacks = open(os.readlink("/proc/self/fd/1").replace(".log", ".stacks"), "a")
signal.signal(signal.SIGUSR1, show)
print("ready", flush=True)
while True: time.sleep(1)
"""
    agent.start(order(body, ranks=1))
    until(agent, lambda answer: answer.output)
    agent.ask_stacks(1)
    assert "_bootstrap" in until(agent, lambda answer: b"_bootstrap" in answer.output.get(10, b"")).output[10].decode()
    assert not agent.ask({}).stacks
    (tmp_path / "go").touch()
    assert "in all_reduce" in until(agent, lambda answer: answer.stacks).stacks[10]


def test_a_question_waits_for_news_and_the_end_of_a_rank_is_news(agent):
    agent.start(order("import sys; print('here', flush=True); sys.stdin.read(); import time; time.sleep(60)"))
    until(agent, lambda answer: len(answer.output) == 2)
    began = time.monotonic()
    assert not ended(agent.ask({}, 1, patience=0.5)) and time.monotonic() - began >= 0.5
    threading.Timer(0.5, agent.end, [1]).start()
    assert any(report.ended for report in agent.ask({}, 1, patience=60).ranks)
    until(agent, ended)
    assert time.monotonic() - began < 30, "long before its patience was over"


def test_why_a_rank_failed_is_news_before_it_has_ended(agent):
    """Else its victims, which end at once, would be all that the driver knows while this one closes its connections."""
    words = (
        "import os, pathlib, time; from cluster.cause import Failure; logs = pathlib.Path(os.environ['SLUICE_LOGS']); "
    )
    program = words + "Failure(10, time.time(), 'crash', 'broke', 1).write(logs); time.sleep(60)"
    agent.start(order(program, ranks=1))
    answer = agent.ask({}, 1, patience=50)
    assert answer.ranks[0].failure.message == "broke" and not answer.ranks[0].ended


def test_that_ranks_began_as_ordered_is_news_of_rank_0_alone(agent):
    agent.start(order("import time; time.sleep(60)"))
    assert not agent._has_news(0.0)
    agent.end(1)
    deadline = time.monotonic() + 60
    while not (all(child.process.poll() is not None for child in agent._children.values())):
        assert time.monotonic() < deadline
    assert agent._has_news(0.0), "its ranks ended"
    agent.start(Order(2, [(0, 0)], ["-c", "import time; time.sleep(60)"], {"WORLD_SIZE": "1"}, "127.0.0.1"))
    assert agent._has_news(0.0)
    agent.ask({})
    assert not agent._has_news(0.0)


def test_output_of_another_attempt_than_the_question_is_about_is_kept_back(agent):
    agent.start(order("print('words')", attempt=2, ranks=1))
    until(agent, ended)
    assert agent.ask({10: 3}, attempt=1).output == {} and agent.ask({10: 3}, attempt=2).output == {10: b"ds\n"}


def test_old_orders_do_nothing_and_a_kill_fences(agent):
    agent.start(order("import time; time.sleep(60)", attempt=3))
    agent.end(2)
    agent.stop(2)
    assert not ended(agent.ask({}))
    agent.end(3)
    assert [report.code for report in until(agent, ended).ranks] == [-9, -9]
    agent.end(5)
    with pytest.raises(AssertionError):
        agent.start(order("pass", attempt=5))


@pytest.mark.slow
def test_a_rank_on_its_way_out_does_not_die_of_a_late_order_to_stop(agent):
    body = """
        import os, signal, sys, time
        signal.signal(signal.SIGTERM, (lambda *_: sys.exit(75)) if os.environ["RANK"] == "10" else signal.SIG_DFL)
        print("ready", flush=True)
        time.sleep(5 if os.environ["RANK"] == "11" else 60)
        sys.exit(75)
    """
    agent.start(order(textwrap.dedent(body)))
    until(agent, lambda answer: len(answer.output) == 2)
    agent.stop(1)
    assert [report.code for report in until(agent, ended).ranks] == [75, 75]


def test_a_rank_that_lets_its_handler_go_when_the_order_to_stop_is_on_its_way_has_stopped(agent, monkeypatch):
    monkeypatch.setattr(agent_module, "handles", lambda pid, number: True)  # a moment ago
    agent.start(order("print('ready', flush=True); import time; time.sleep(60)"))
    until(agent, lambda answer: len(answer.output) == 2)
    agent.stop(1)
    assert [report.code for report in until(agent, ended).ranks] == [75, 75]


def test_rank_0_finds_why_it_is_asked_to_stop(agent):
    body = """
        import os, pathlib, signal, sys, time
        def stop(*_):
            print(pathlib.Path(os.environ["SLUICE_LOGS"], "stop.txt").read_text(), flush=True)
            sys.exit(75)
        signal.signal(signal.SIGTERM, stop)
        print("ready", flush=True)
        time.sleep(60)
    """
    agent.start(Order(1, [(0, 0)], ["-c", textwrap.dedent(body)], {"WORLD_SIZE": "1"}, "127.0.0.1"))
    until(agent, lambda answer: answer.output)
    agent.stop(1, why="n2 is about to go")
    assert [report.code for report in until(agent, ended).ranks] == [75]
    assert agent.ask({}).output == {0: b"ready\nn2 is about to go\n"}


def test_an_agent_that_nobody_asks_kills_its_ranks():
    agent = Agent(lease=1.0)
    agent.start(order("import time; time.sleep(60)"))
    children = [child.process for child in agent._children.values()]
    assert [child.wait(50) for child in children] == [-9, -9]
    agent.close()


def test_a_standby_becomes_a_rank(agent, tmp_path):
    (tmp_path / "toy_rank.py").write_text(
        "import os, sys\nready = False\ndef preload():\n    global ready\n    ready = True\n"
        "def main():\n    print(os.environ['RANK'], os.getpid(), sys.argv[1], ready, flush=True)\n    return 7\n"
        "if __name__ == '__main__':\n    sys.exit(main())\n"
    )
    arguments, folder = ["-m", "toy_rank", "config.yaml"], str(tmp_path)
    agent.warm(arguments, folder, 1)
    (standby,) = agent._standbys["toy_rank", folder]
    agent.start(Order(1, [(0, 0), (1, 1)], arguments, {"WORLD_SIZE": "2"}, "127.0.0.1", folder))
    answer = until(agent, ended)
    assert [report.code for report in answer.ranks] == [7, 7]
    assert answer.output[0].split() == [b"0", str(standby.pid).encode(), b"config.yaml", b"True"]
    assert answer.output[1].split()[::3] == [b"1", b"False"] and not agent._standbys["toy_rank", folder]


def test_a_new_agent_removes_the_scratch_of_a_killed_one(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(private_folder, "FRESH", 600.0)
    (tmp_path / f"{scratch_prefix()}dead").mkdir()
    alive = Agent(lease=30.0)
    alive.start(order("import time; time.sleep(60)"))
    Agent(lease=30.0)
    assert len(list(tmp_path.iterdir())) == 2, "what was just made may not be locked yet"
    monkeypatch.setattr(private_folder, "FRESH", 0.0)
    Agent(lease=30.0)
    assert list(tmp_path.iterdir()) == [alive._scratch.path]
    alive.close()


def test_no_rank_outlives_a_killed_agent(tmp_path):
    code = """
import os, sys, time
from cluster.node.agent import Agent, Order
agent = Agent(30.0)
agent.start(Order(1, [(0, 0)], ["-c", "import time; time.sleep(60)"], {"WORLD_SIZE": "1"}, "127.0.0.1", None))
agent.warm(["-m", "json.tool"], None, 1)
(standby,) = agent._standbys["json.tool", None]
print(agent._children[0].process.pid, standby.pid, flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    pids = [int(word) for word in process.stdout.readline().split()]
    assert all(lives(pid) for pid in pids)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 50  # before the rank would end by itself
    while any(lives(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(lives(pid) for pid in pids)
