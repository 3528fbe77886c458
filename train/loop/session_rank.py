"""Runs the ranks of a session (train/loop/session.py).

`python -m train.loop.session_rank CONFIG` is the driver of the ranks. Rank 0 receives calls from the controlling
process. Every rank first checks the complete batch, so all ranks refuse the same calls.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import train.kernels.cpu.tuned  # noqa: F401  before torch allocates anything
from cluster.interrupts import leave  # before other libraries; cluster/interrupts.py gives the reason

# isort: split
import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from cluster.comm_ring import got_on
from cluster.launch import given_run, launch
from cluster.place import Place, given_place
from conf.disk import disk_errors
from conf.errors import EXIT_OK, UserError
from conf.load import read_config
from conf.run_paths import RunPaths
from conf.schema import Config
from parallel.exchange import patient_group
from train.data.batch import Batch
from train.loop.open_engine import open_engine
from train.loop.record import recorded
from train.loop.session import ADDRESS_FILE, batch_of
from train.loop.training_engine import Engine, StepTotal
from train.rank import PREPARATION, guarded

IDLE_SECONDS = 5.0
"""Seconds between reports of progress while a rank waits for calls."""
SessionAnswer = tuple[dict[str, Any], dict[str, Tensor]]
"""An answer of rank 0: JSON values, and tensors by name."""


class SessionRank:
    """Executes the calls of a session on one rank."""

    def __init__(self, config: Config, engine: Engine, link: Connection | None, group: dist.ProcessGroup):
        """link: connection to the controlling process, only on rank 0.

        group: process group of all ranks, with a long timeout.
        """
        self._config, self._engine, self._link, self._group = config, engine, link, group
        self._sharing = config.parallel.dp
        self._calls: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], SessionAnswer]] = {
            "forward_backward": self._forward_backward,
            "update": self._update,
            "discard": self._discard,
            "logprobs": self._logprobs,
            "save": self._save,
            "load": self._load,
            "weights": self._weights,
        }

    def serve(self) -> None:
        """Execute calls until the controlling process closes the session or ends."""
        self._say({"step": self._engine.step})
        while said := self._broadcast(self._receive):
            tensors = load(self._broadcast(self._receive))
            order = json.loads(said)
            method = order.pop("method")
            try:
                answer = self._calls[method](order, tensors)
            except UserError as error:
                if self._engine.has_failed and self._engine.mesh.layout.world > 1:
                    raise  # only this rank failed, and other ranks wait for it
                given = [error.field, str(error.value), error.rule, error.cure]
                self._say({"refused": given})
            else:
                self._say(*answer)

    def _forward_backward(self, order: dict[str, Any], tensors: dict[str, Tensor]) -> SessionAnswer:
        batch, total = self._share(batch_of(tensors)), order["total"]
        more = {"last": order["last"], "terms": order["terms"], **order["settings"]}
        self._engine.forward_backward(batch, order["loss"], total=None if total is None else StepTotal(*total), **more)
        return {}, {}

    def _update(self, order: dict[str, Any], _: dict[str, Tensor]) -> SessionAnswer:
        outcome = self._engine.update(order["step"], lr=order["lr"])
        measured = {name: value for name, value in vars(outcome.measured).items() if name != "stop"}
        tensors = {name: measured.pop(name) for name in ("loads_LE", "biases_LE")}
        return {"step": self._engine.step, "measured": measured, "update": asdict(outcome.update)}, tensors

    def _discard(self, *_: Any) -> SessionAnswer:
        self._engine.discard()
        return {}, {}

    def _logprobs(self, _: dict[str, Any], tensors: dict[str, Tensor]) -> SessionAnswer:
        batch, mesh = batch_of(tensors), self._engine.mesh
        mine, found_BS = self._share(batch), torch.zeros(batch.tokens_BS.shape)
        values_BS, rows = self._engine.logprobs(mine), len(mine.tokens_BS)
        if mesh.pp_rank == 0 and mesh.cp_rank == 0:
            found_BS[mesh.dp_rank * rows : (mesh.dp_rank + 1) * rows] = values_BS
        dist.all_reduce(found_BS, group=self._group)
        return {}, {"logprobs": found_BS}

    def _save(self, order: dict[str, Any], _: dict[str, Tensor]) -> SessionAnswer:
        return {"path": str(self._engine.save(Path(order["folder"])))}, {}

    def _load(self, order: dict[str, Any], _: dict[str, Tensor]) -> SessionAnswer:
        self._engine.load(Path(order["path"]))
        return {"step": self._engine.step}, {}

    def _weights(self, order: dict[str, Any], _: dict[str, Tensor]) -> SessionAnswer:
        dtype = None if order["dtype"] is None else getattr(torch, order["dtype"])
        for name, tensor in self._engine.weights(merged=order["merged"], stacked=order["stacked"], dtype=dtype):
            self._say({"done": False}, {name: tensor.cpu().contiguous()})
        return {"done": True}, {}

    def _share(self, batch: Batch) -> Batch:
        """Returns this rank's rows of a batch, and checks all rows."""
        rows, least = len(batch.tokens_BS), self._sharing * self._config.micro_batch_size
        if rows % least or not rows:
            rule = f"must be a multiple of {least}: micro_batch_size={self._config.micro_batch_size} on each of {self._sharing} data-parallel ranks"
            raise UserError("batch.tokens_BS", f"{rows} sequences", rule, "add padding sequences with document -1")
        self._engine.check(batch, rows // least)
        size = rows // self._sharing
        return batch.take(slice(self._engine.mesh.dp_rank * size, (self._engine.mesh.dp_rank + 1) * size))

    def _receive(self) -> bytes:
        """Returns the next message, on rank 0; empty after the session's end."""
        assert self._link is not None
        try:
            while not self._link.poll(IDLE_SECONDS):
                got_on()  # ranks that wait for a call must not count as hung
            return self._link.recv_bytes()
        except (EOFError, ConnectionError):
            return b""

    def _say(self, said: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        if self._link is not None:
            self._link.send_bytes(json.dumps(said).encode())
            self._link.send_bytes(save({name: tensor.contiguous() for name, tensor in (tensors or {}).items()}))

    def _broadcast(self, make: Callable[[], bytes]) -> bytes:
        """Returns on every rank the result of `make` on rank 0."""
        data = make() if self._link is not None else b""
        length = torch.tensor([len(data)])
        dist.broadcast(length, 0, group=self._group)
        if not int(length):
            return b""
        text = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8)
            if data
            else torch.empty(int(length), dtype=torch.uint8)
        )
        dist.broadcast(text, 0, group=self._group)
        return text.numpy().tobytes()


def run_rank(config: Config, place: Place) -> int:
    """Run one rank until the session ends; returns the exit code."""
    logs = RunPaths(config).logs
    return guarded(place, logs, disk_errors(config)(lambda: _run(config, place, logs)))


def _run(config: Config, place: Place, logs: Path) -> int:
    link = None
    if place.rank == 0:
        address = json.loads((RunPaths(config).path / ADDRESS_FILE).read_text())
        link = Client((address["host"], address["port"]), authkey=bytes.fromhex(address["key"]))
    with recorded(logs, place) as record:
        engine = open_engine(config, place)
        record.name_groups(engine.mesh)
        with patient_group(PREPARATION) as group:
            SessionRank(config, engine, link, group).serve()
    return EXIT_OK


def main() -> int:
    if given_place() is not None:
        return run_rank(*given_run())
    config = read_config(sys.argv[1])
    command = [sys.executable, "-m", "train.loop.session_rank", sys.argv[1]]
    return launch(config, RunPaths(config).path, command, run_rank, alone=False)


if __name__ == "__main__":
    sys.exit(leave(main()))
