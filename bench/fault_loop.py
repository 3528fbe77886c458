"""The plain training loop for every system of bench/faults.py: torch, gloo, an all-reduce of gradients, checkpoints.

One rank per process, with the environment of torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). After a restart, it
continues from the newest checkpoint in the shared folder. Each rank appends its events to FOLDER/steps.jsonl:

    {"kind": "start", "rank", "host", "pid", "born", "time", "step"}      in a group of ranks; step: where it resumes
    {"kind": "step", "rank", "host", "pid", "born", "time", "step"}       has finished this step; born: start of its
    process

If Sluice's agent started the rank, the loop also reports its progress, which is all that cluster/node/agent.py
requires.

    python -m bench.fault_loop FOLDER TIMEOUT [CONFIG]       TIMEOUT: seconds of a collective; CONFIG is not read
"""

import json
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

WIDTH = 256
STEP_SECONDS = 0.1
"""Seconds that each step waits. The wait stands for the work of a device, and does not use the cores."""
SAVE_EVERY = 10
"""Steps between checkpoints."""


class StepLog:
    """Appends to steps.jsonl. One write call writes one line, so that lines of several ranks never mix."""

    def __init__(self, folder: Path, rank: int):
        self._path = folder / "steps.jsonl"
        self._known = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "born": time.time()}

    def write(self, kind: str, step: int) -> None:
        line = json.dumps({"kind": kind, "step": step, "time": time.time()} | self._known)
        with self._path.open("ab", buffering=0) as file:
            file.write(line.encode() + b"\n")


def train(folder: Path, timeout: float) -> None:
    """Train until this process is killed. If the launcher has not created the process group, `timeout` applies to its
    collectives."""
    rank = int(os.environ["RANK"])
    record = StepLog(folder, rank)
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    optimizer = torch.optim.AdamW(model.parameters())
    step = _load(folder, model, optimizer)
    record.write("start", step)
    while True:
        step += 1
        _tell_agent(rank, step)
        time.sleep(STEP_SECONDS)
        _step(model, optimizer, torch.Generator().manual_seed(step * dist.get_world_size() + rank))
        record.write("step", step)
        if rank == 0 and step % SAVE_EVERY == 0:
            _save(folder, step, model, optimizer)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    x = torch.randn(32, WIDTH, generator=generator)
    (model(x) - x).square().mean().backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    dist.all_reduce(gradients)
    gradients /= dist.get_world_size()
    for parameter, mean in zip(
        model.parameters(), gradients.split([p.numel() for p in model.parameters()]), strict=True
    ):
        parameter.grad.copy_(mean.view_as(parameter))
    optimizer.step()
    optimizer.zero_grad()


def _save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Save a checkpoint. The manifest is written last; without it the checkpoint does not count."""
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path / "state.pt")
    (path / ".manifest").write_text(json.dumps({"attempt": int(os.environ.get("SLUICE_ATTEMPT", 1))}))
    (path / ".manifest").rename(path / "manifest.json")


def _load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint into the model. Returns its step; 0 if there is no checkpoint."""
    newest = max((folder / "checkpoints").glob("step_*/manifest.json"), default=None)
    if newest is None:
        return 0
    state = torch.load(newest.with_name("state.pt"), weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(newest.parent.name.removeprefix("step_"))


def _tell_agent(rank: int, step: int) -> None:
    if "SLUICE_LOGS" in os.environ:
        path = Path(os.environ["SLUICE_LOGS"]) / f"rank_{rank}.progress.json"
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({"step": step, "phase": "step", "time": time.time(), "busy": STEP_SECONDS}))
        fresh.rename(path)


def main() -> None:
    train(Path(sys.argv[1]), float(sys.argv[2]))


if __name__ == "__main__":
    main()
