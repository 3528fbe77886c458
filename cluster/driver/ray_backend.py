"""The Ray backend: connects to a Ray cluster or starts Ray on this machine, and runs an agent on each node as a Ray
actor.

Only this file imports ray. Ray transports the calls to agents and lists the nodes. Each agent is pinned to its node,
and reserves all devices of the node.
"""

import collections
import contextlib
import logging
import os
import queue
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

import psutil

from cluster.driver.driver import Driver
from cluster.driver.fleet import WAITING, FleetLost, Reply
from cluster.driver.view import View
from cluster.interrupts import cut_short
from cluster.node.agent import Agent
from cluster.private_folder import PrivateFolder
from cluster.spawn import LEASE, lives
from cluster.topology import Node
from conf.errors import EXIT_CRASH, EXIT_OK, EXIT_STOPPED, UserError, first_line
from conf.schema import ROOT, Config
from conf.words import say

OBJECT_STORE = 100 << 20
"""Bytes of Ray's object store. Sluice sends no tensor through Ray."""
CONNECT_LIMIT = 5
"""Maximum seconds to connect to cluster.address."""
CONNECT_TRIES = "8"
"""Maximum number of tries to connect to a reachable head, one per second."""
HEAD_START = "60"
"""If this run starts Ray: maximum seconds until Ray's head must be ready. Ray's default is 30."""
HEAD_LIMIT = 1
"""Maximum seconds to connect to Ray's head during the run."""
CLOSE_LIMIT = 3
"""Seconds in which agents may clean up before they are killed."""
CALLS_AT_ONCE = 32
"""Maximum calls and answers in one round of the loop (20 ms). After each round, the driver checks the clock and the UDP
questions.
"""
CALLS_WHEN_SILENT = 20
"""Calls per round if MOST_OUT calls are pending without an answer."""
MOST_OUT = 256
"""Maximum number of pending calls, because thousands would slow down every call."""
RAYLET = "raylet"
"""Name of Ray's process on a node."""
SHIPPED = ["conf", "train", "parallel", "cluster"]


def run_ray(config: Config, folder: Path, command: list[str], planner: Sequence[str] = ()) -> int:
    """Run all ranks on Ray. Returns the exit code of the run.

    command: command of one rank, with the configuration file last. planner: see cluster/driver/driver.py.
    """
    assert command[0] == sys.executable, "agents start their own interpreter"
    folder = folder.absolute()
    fleet = RayFleet(config)
    try:
        view = View(config.name, folder / "metrics.jsonl", config.steps)
        here = None if fleet.ships else os.getcwd()
        finish = Driver(config, folder, command[1:], fleet, here, fleet.gpus, view, planner=planner).run()
    finally:
        fleet.close()
    if finish.code not in (EXIT_OK, EXIT_STOPPED):
        say(f"error: {finish.text}\n  events: {folder / 'events.jsonl'}\n  logs: {folder / 'logs'}", file=sys.stderr)
    elif finish.code == EXIT_STOPPED:
        say(f"stopped: {finish.text}")
    return finish.code


class RayAbsent(UserError):
    """Ray did not start on this machine."""

    code = EXIT_CRASH

    def __init__(self, why: str):
        super().__init__(
            "cluster",
            "ray",
            f"Ray could not be started on this machine, in two attempts: {why}",
            "repeat the command when this machine is less busy (`uptime`, `free -h`, and `df -h /tmp` for Ray's folder), or use "
            "cluster=local, which needs no Ray",
        )


class RayFleet:
    """The agents of all nodes as Ray actors, by node id."""

    _raylet: int | None = None
    """Process id of this run's own raylet (Ray's process), or None."""

    def __init__(self, config: Config):
        _settings(embedded=config.cluster.address is None)
        import ray.exceptions

        self._ray = ray
        self._config = config
        self._folder: PrivateFolder | None = None
        """Folder of this run's own Ray, or None."""
        self._sweeper: subprocess.Popen | None = None
        """Process that cleans up this run's own Ray when the driver is killed."""
        self.ships = config.cluster.address is not None and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ
        """Whether Ray must copy the program to the nodes. For a submitted job, Ray has already copied the program."""
        if config.cluster.address is None:
            self._start_embedded()
        else:
            self._join(config.cluster.address)
        self._head = ray.get_runtime_context().gcs_address
        self._head_seen, self._headless = time.monotonic(), False
        self._listed: list[Node] = []
        self.gpus = config.cluster.device != "cpu" and any(node["Resources"].get("GPU") for node in ray.nodes())
        self._actors: dict[str, Any] = {}
        self._resources: dict[str, dict[str, float]] = {}
        """Resources of every node that has been listed, by node id."""
        self._named: set[str] = set()
        """Ids of the nodes whose names come from a Ray label."""
        self._next: collections.deque[tuple[Any, str, str, tuple]] = collections.deque()
        """Calls not yet made, as (actor, node, method, arguments)."""
        self._out = 0
        """Number of pending calls; calls of WAITING methods do not count."""
        self._look: Future | None = None
        """Pending question to Ray's head, asked at `_look_began`, or None."""
        self._look_began = 0.0
        self._leaving: dict[str, str] = {}
        self._taken = 0
        """Number of answers that the driver took in the last round."""
        self._done: queue.SimpleQueue[tuple[str, str, Future]] = queue.SimpleQueue()
        """Finished calls, as (node, method, outcome). A thread of Ray adds them."""

    def _start_embedded(self) -> None:
        """Start Ray on this machine, in at most two tries, because a busy machine may exceed Ray's time limit."""
        try:
            self._try_embedded()
        except Exception as error:  # Ray raises many kinds of exception
            say(
                f"note: Ray could not be started on this machine ({first_line(error)}); trying once more",
                file=sys.stderr,
            )
            try:
                self._try_embedded()
            except Exception as again:
                raise RayAbsent(first_line(again)) from again

    def _try_embedded(self) -> None:
        # Ray lets every user of the machine enter its folder, which contains its sockets. So Ray's folder is created
        # inside a folder that no other user can enter.
        self._folder = PrivateFolder("sluice-ray-", Path("/tmp"))  # the path of TMPDIR may be too long for a socket
        words = [sys.executable, "-m", "cluster.node.sweep_ray", str(self._folder.path)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._sweeper = subprocess.Popen(words, stdin=subprocess.PIPE, cwd=ROOT, start_new_session=True, **quiet)
        try:
            # Agents import packages from the folder in which Ray starts. This must be the program's folder, because the
            # user's folder may contain packages with the same names.
            with contextlib.chdir(ROOT):
                self._ray.init(
                    _temp_dir=str(self._folder.path / "ray"),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                    object_store_memory=OBJECT_STORE,
                    _node_ip_address="127.0.0.1",
                )
            self._raylet = next((each.pid for each in _started(self._folder.path) if each.name() == RAYLET), None)
        except BaseException:
            self._ray.shutdown()
            _kill_started(self._folder.path)
            self._remove_folder()
            raise

    def _join(self, address: str) -> None:
        environment: dict[str, Any] = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
        if self.ships:
            environment |= {"working_dir": str(ROOT), "excludes": _excludes()}
        _require_answer(address)
        with _stderr_in_file() as said:
            try:
                self._ray.init(
                    address=address, runtime_env=environment, log_to_driver=False, logging_level=logging.CRITICAL
                )
            except Exception as error:
                said.seek(0)
                raise _explain(address, f"{error}\n{said.read().decode(errors='replace')}") from error

    def nodes(self) -> list[Node]:
        # If Ray's process on this machine has ended, Ray's head would notice it only many seconds later.
        if self._raylet is not None and not lives(self._raylet):
            return []
        is_new = self._look is None and self._head_answers()
        if is_new:
            self._look, self._look_began = _in_thread(lambda: (self._list(), self._list_draining())), time.monotonic()
        if self._look is not None:  # the head may have died or hung just after it answered
            silent = time.monotonic() - self._look_began
            is_last = silent > CONNECT_LIMIT  # this process itself may have been held up while the answer waited
            try:
                self._listed, self._leaving = self._look.result(HEAD_LIMIT if is_new or is_last else 0)
                self._look, self._headless = None, False
            except TimeoutError as error:
                self._headless = True
                if is_last:
                    text = f"Ray's head at {self._head} has not answered for {silent:.0f} s, so the nodes are unknown"
                    raise FleetLost(text) from error
        return self._listed

    def _list(self) -> list[Node]:
        found = []
        for entry in self._ray.nodes():
            if not entry["Alive"]:
                continue
            labels, resources = entry.get("Labels") or {}, entry["Resources"]
            self._resources[entry["NodeID"]] = resources
            devices = self._devices(resources)
            if devices:
                name = labels.get("train/node") or entry["NodeManagerHostname"]
                if "train/node" in labels:
                    self._named.add(entry["NodeID"])
                address = entry["NodeManagerAddress"]
                found.append(Node(entry["NodeID"], name, address, devices, labels.get("train/rack", "")))
        return found

    def _head_answers(self) -> bool:
        """Whether a process listens at the address of Ray's head. Raises FleetLost after CONNECT_LIMIT seconds without
        one, because calls of Ray would then end this process.
        """
        try:
            _connect(self._head, HEAD_LIMIT)
            self._headless, self._head_seen = False, time.monotonic()
        except OSError as error:
            self._headless, silent = True, time.monotonic() - self._head_seen
            if silent > CONNECT_LIMIT:
                raise FleetLost(f"Ray's head at {self._head} has not answered for {silent:.0f} s: {error}") from error
        return not self._headless

    def describe_return(self, node: Node) -> str:
        if self._config.cluster.address is None:
            return ""
        labels = [f"train/rack={node.rack}"] * bool(node.rack) + [f"train/node={node.name}"] * (node.id in self._named)
        given = f" --labels={','.join(labels)}" * bool(labels)
        command = f"ray start --address={self._head}{given}"
        return f"Ray does not take a dead node back; run `{command}` on the node to join again"

    def release(self, node: str) -> None:
        if actor := self._actors.pop(node, None):
            self._ray.kill(actor)

    def draining(self) -> dict[str, str]:
        return {} if self._headless else self._leaving

    def _list_draining(self) -> dict[str, str]:
        # No public function of Ray returns the draining nodes, and `ray.nodes()` does not contain them.
        from ray._private.state import state

        found: dict[str, str] = {}
        for node, deadline in state.get_draining_nodes().items():
            left = f", {deadline / 1000 - time.time():.0f} s left" if deadline else ""
            found[node] = f"Ray will shut it down{left}"
        return found

    def _devices(self, resources: dict[str, float]) -> int:
        cluster, parallel = self._config.cluster, self._config.parallel
        if cluster.ranks_per_node:
            return cluster.ranks_per_node
        if self.gpus:
            return int(resources.get("GPU", 0))
        if cluster.address is None:  # all ranks share this machine, as with cluster=local
            return parallel.world
        return int(resources.get("CPU", 0))

    def call(self, node: str, method: str, *arguments: Any) -> None:
        if node not in self._actors:
            self._actors[node] = self._new_actor(node)
        self._next.append((self._actors[node], node, method, arguments))

    def _make_calls(self, count: int) -> None:
        for _ in range(min(count, len(self._next))):
            actor, node, method, arguments = self._next.popleft()
            group = method if method in WAITING else None
            self._out += group is None
            reference = getattr(actor, method).options(concurrency_group=group).remote(*arguments)
            reference.future().add_done_callback(
                lambda outcome, node=node, method=method: self._done.put((node, method, outcome))
            )

    def _new_actor(self, node: str) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return (
            self._ray.remote(concurrency_groups=dict.fromkeys(WAITING, 1))(Agent)  # pyrefly: ignore[unexpected-keyword]  Ray documents it
            .options(
                num_cpus=0,
                num_gpus=int(self._resources[node].get("GPU", 0)) if self.gpus else 0,
                max_restarts=0,
                enable_task_events=False,  # Ray records no event for each call, because nobody opens its dashboard
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(LEASE * self._config.cluster.heartbeat, own_process=True)
        )

    def replies(self, timeout: float) -> list[Reply]:
        # Many nodes may not answer, so that the maximum number of calls is pending. In that case, make one call for
        # each answer of the last round, or a few calls if there was no answer.
        self._make_calls(min(CALLS_AT_ONCE, max(MOST_OUT - self._out, self._taken or CALLS_WHEN_SILENT)))
        found: list[Reply] = []
        with contextlib.suppress(queue.Empty):  # take the first answer and all others that are ready
            found.append(self._reply(*self._done.get(timeout=timeout)))
            while len(found) < CALLS_AT_ONCE:
                found.append(self._reply(*self._done.get_nowait()))
        self._taken = len(found)
        self._out -= sum(reply.method not in WAITING for reply in found)
        return found

    def _reply(self, node: str, method: str, outcome: Future) -> Reply:
        try:
            return Reply(node, method, outcome.result())
        except self._ray.exceptions.RayTaskError as error:
            return Reply(node, method, error=f"{type(error.cause).__name__}: {error.cause}")
        except self._ray.exceptions.RayError as error:
            self._actors.pop(node, None)
            return Reply(node, method, error=str(error).strip().splitlines()[0], dead=True)

    def close(self) -> None:
        self._make_calls(len(self._next))
        ends = [actor.close.remote() for actor in self._actors.values()]
        if ends:
            self._ray.wait(ends, num_returns=len(ends), timeout=CLOSE_LIMIT)
        if self._headless:  # the calls below would wait for the head; agents that get no question end their ranks
            cut_short()
            return
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._ray.shutdown()
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self._sweeper is not None:
            self._sweeper.kill()
            self._sweeper.communicate()
        if self._folder is not None:
            self._folder.remove()


def _settings(embedded: bool) -> None:
    """Set the environment variables that Ray reads when imported or started."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if embedded:
        # By default Ray starts a worker for every core, and each start takes half a second. A run needs only one agent
        # per node.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        os.environ.setdefault(
            "RAY_worker_niceness", "0"
        )  # Ray's default niceness is 15, with which other processes would slow down the ranks and their agent
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", HEAD_START)
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # this makes Ray listen on loopback only, also on Linux
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # other users of the machine can also connect to loopback
        os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
        return
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", CONNECT_TRIES)
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    home = Path.home() / ".ray" / "auth_token"
    if mode == "token" and not ({"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ) or home.exists()):
        raise UserError(
            "RAY_AUTH_TOKEN",
            "not set",
            "a cluster that other machines can reach must require a token, because every client can run code",
            "start Ray on every node, and this command, with the same RAY_AUTH_MODE=token and RAY_AUTH_TOKEN; "
            "set RAY_AUTH_MODE=disabled if the cluster has no token",
        )


def _kill_started(folder: Path) -> None:
    """Kill the processes that a failed start of Ray has left."""
    for child in _started(folder):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _started(folder: Path) -> list[psutil.Process]:
    """Return this process's children whose command line names this folder."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [child] if any(str(folder) in word for word in child.cmdline()) else []
    return found


def _require_answer(address: str) -> None:
    """Raise UserError if no process listens at the address within CONNECT_LIMIT seconds."""
    if address == "auto":
        return
    try:
        _connect(address, CONNECT_LIMIT)
    except (OSError, ValueError) as error:
        raise UserError(
            "cluster.address",
            address,
            f"must be HOST:PORT of a running Ray (`ray start --head` prints it): {error}",
            "start Ray there, open the port, or omit cluster.address to start Ray on this machine",
        ) from error


def _in_thread(call: Callable[[], Any]) -> Future:
    """Run a call in a daemon thread and return its future."""
    outcome: Future = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


def _connect(address: str, limit: float) -> None:
    """Raise OSError if nothing listens at HOST:PORT, ValueError for other addresses."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=limit).close()


@contextlib.contextmanager
def _stderr_in_file() -> Iterator[IO[bytes]]:
    """Capture stderr, where Ray's native code repeats its errors, in a file."""
    with tempfile.TemporaryFile() as file:
        terminal = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def _explain(address: str, text: str) -> UserError:
    """Return an error that explains why Ray rejected the connection."""
    text = text.strip()
    if "AuthToken" in text or "Unauthenticated" in text:
        return UserError(
            "RAY_AUTH_TOKEN",
            "(not shown)",
            f"Ray at {address} does not accept it",
            "start this command with the cluster's token (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN)",
        )
    return UserError("cluster.address", address, text.splitlines()[0], "see `ray status`")


def _excludes() -> list[str]:
    """Return patterns of files outside the program, which Ray must not copy."""
    return [f"/{path.name}" for path in ROOT.iterdir() if path.name not in SHIPPED]
