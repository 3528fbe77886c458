"""A rank without torch: steps in lockstep with its peers over plain sockets, and keeps the contract of a real one.

    python fake_rank.py CONFIG

Faults, read from the run folder at every step, happen once: a file fault_RANK holds `crash`, `hang`, ... (drive.py writes it).
A step takes FAKE_STEP seconds. While there is a file `hold`, the last step is followed by more of them: a test that has seen what
it waited for lets the run end (drive.py), on a machine of any speed.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from omegaconf import OmegaConf

from cluster.cause import Failure
from cluster.clocks import uptime
from cluster.comm_ring import CommRing
from cluster.run_files import ring_path
from cluster.stacks import answer_requests

config = OmegaConf.load(sys.argv[1])
folder = Path(config.runs) / config.name
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
logs, attempt = Path(os.environ["SLUICE_LOGS"]), int(os.environ["SLUICE_ATTEMPT"])
address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
stop = []
STOPPING, ENDING = 1, 2


def meet() -> list[socket.socket]:
    """Rank 0 gets a socket to every other rank, the others one to rank 0."""
    if rank == 0:
        server = socket.create_server(address)
        peers = [server.accept()[0] for _ in range(world - 1)]
        server.close()
        return peers
    for _ in range(200):
        try:
            return [socket.create_connection(address, timeout=None)]
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"rank 0 timed out at {address}")


def all_reduce(peers: list[socket.socket], flags: int) -> int:
    """The flags that any rank has; raises when a peer is gone."""
    if rank == 0:
        for peer in peers:
            flags |= receive(peer)
        for peer in peers:
            peer.sendall(bytes([flags]))
        return flags
    peers[0].sendall(bytes([flags]))
    return receive(peers[0])


def receive(peer: socket.socket) -> int:
    data = peer.recv(1)
    if not data:
        raise ConnectionError("Connection closed by peer")
    return data[0]


def newest() -> int:
    return max((int(p.parent.name[5:]) for p in (folder / "checkpoints").glob("step_*/manifest.json")), default=0)


def save(step: int) -> None:
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    (path / ".manifest").write_text(json.dumps({"attempt": attempt}))
    (path / ".manifest").rename(path / "manifest.json")


def progress(step: int, busy: float) -> None:
    text = json.dumps({"step": step, "phase": "step", "time": time.time(), "busy": busy})
    (logs / f".{rank}").write_text(text)
    (logs / f".{rank}").rename(logs / f"rank_{rank}.progress.json")


def fault(step: int) -> None:
    path = folder / f"fault_{rank}"
    if not path.exists() or step < 3:
        return
    what = path.read_text()
    path.unlink()
    print("fault", what, flush=True)
    if what == "crash":
        raise RuntimeError("boom")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        time.sleep(1000)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)


def run() -> int:
    peers = meet()
    step = newest()
    ring = CommRing(ring_path(logs, rank), rank, world)
    group = ring.name_group("0", "all ranks", range(world))
    print(f"rank {rank} of {world} resumes at {step} with dp {config.parallel.dp}", flush=True)
    while True:
        progress(step + 1, 0.05)
        ring.enter("schedule", step + 1)
        time.sleep(float(os.environ.get("FAKE_STEP", "0.05")))
        fault(step)
        step += 1
        ending = rank == 0 and step >= config.steps and not (folder / "hold").exists()
        at = ring.begin(group, step, "all_reduce", "uint8", 1, 1, -1, ring.place("fake_rank.py", 1))
        ring.wait(at)
        flags = all_reduce(peers, STOPPING * bool(stop) | ENDING * ending)
        ring.end(at)
        if rank == 0 and (flags or step % config.checkpoint.every == 0):
            save(step)
        if flags:
            print(
                "stops as",
                (logs / "stop.txt").read_text() if (logs / "stop.txt").exists() else "a signal says",
                flush=True,
            )
            return 0 if flags & ENDING else 75


signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
answer_requests(logs, rank)
try:
    code = run()
except Exception as error:
    kind = "timeout" if "timed out" in str(error) else "crash"
    whole = "all that was raised from it"
    Failure(rank, uptime(), kind, f"{type(error).__name__}: {error}", 1, whole=whole).write(logs)
    code = 1
sys.exit(code)
