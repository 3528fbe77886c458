"""A rank without torch: steps in lockstep with its peers over plain sockets, and keeps the contract of a real one.

    python fake_rank.py CONFIG

Faults, read from the run folder at every step, happen once: a file `fault_RANK` holds `crash`, `hang`, `exit 3`, ...
A step takes FAKE_STEP seconds until there is a file `hurry`: a test that has seen what it waited for lets the run end.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from omegaconf import OmegaConf

from cluster.cause import Failure

config = OmegaConf.load(sys.argv[1])
folder = Path(config.runs) / config.name
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
logs, attempt = Path(os.environ["SLUICE_LOGS"]), int(os.environ["SLUICE_ATTEMPT"])
address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
stop = []


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


def all_reduce(peers: list[socket.socket], flag: bool) -> bool:
    """Whether any rank says yes; raises when a peer is gone."""
    mine = bytes([flag])
    if rank == 0:
        said = [receive(peer) for peer in peers]
        answer = bytes([any([flag, *said])])
        for peer in peers:
            peer.sendall(answer)
        return bool(answer[0])
    peers[0].sendall(mine)
    return receive(peers[0])


def receive(peer: socket.socket) -> bool:
    data = peer.recv(1)
    if not data:
        raise ConnectionError("Connection closed by peer")
    return bool(data[0])


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
    print(f"rank {rank} of {world} resumes at {step} with dp {config.parallel.dp}", flush=True)
    while step < config.steps:
        progress(step + 1, 0.05)
        if not (folder / "hurry").exists():
            time.sleep(float(os.environ.get("FAKE_STEP", "0.05")))
        fault(step)
        stopping = all_reduce(peers, bool(stop))
        step += 1
        if rank == 0 and (stopping or step == config.steps or step % config.checkpoint.every == 0):
            save(step)
        if stopping:
            return 75
    return 0


signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
faulthandler.register(signal.SIGUSR1, all_threads=True)
try:
    code = run()
except Exception as error:
    kind = "timeout" if "timed out" in str(error) else "crash"
    Failure(rank, time.time(), kind, f"{type(error).__name__}: {error}", 1).write(logs)
    code = 1
sys.exit(code)
