"""Controls the engines of all ranks from one process; this is called a session.

    with train.session(config) as engine:
        engine.forward_backward(batch, "ppo", clip=0.2)
        engine.update()

A driver starts the ranks as processes, on this machine or on Ray (train/loop/session_rank.py). Rank 0 connects to the
controlling process and forwards every call to the other ranks. A key in the session's folder
authenticates the connection. Calls and answers are JSON and safetensors. Nothing is unpickled.

A refused call does not change the session. A call that fails on a rank ends the session.
"""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from operator import methodcaller
from pathlib import Path
from socket import create_server
from types import TracebackType
from typing import Any, NoReturn

import torch
from safetensors.torch import load, save
from torch import Tensor

from cluster.interfaces import ANYWHERE, address_to
from cluster.spawn import spawn
from conf.errors import UserError
from conf.files import open_lock, try_lock
from conf.load import write_config
from conf.run_paths import RunPaths
from conf.schema import Config
from parallel.update_result import Update
from train.data.batch import Batch, check_given_batch, require_mask
from train.loop.layout_check import check_layout
from train.loop.measure import MeasuredStep
from train.loop.stop import StopKind
from train.loop.training_engine import StepOutcome, StepTotal, total_of
from train.program import environment_of_children

SESSION_FOLDER, ADDRESS_FILE, OUTPUT = "session", "address.json", "output.log"
"""Names of the session's folder, address file, and output file."""
SESSION_LOOK_SECONDS = 0.2
"""Seconds between checks of the driver while waiting for an answer."""
SESSION_END_SECONDS = 20.0
"""Maximum seconds for the ranks to end before they are killed."""


class SessionFailed(RuntimeError):
    """The ranks of a session have failed. The text names the first failed rank and the cause."""


@contextmanager
def session(config: Config) -> "Iterator[Session]":
    """Start the ranks of a layout and control them from this process. Every rank opens an engine with `open_engine`.

    On exit, the context manager waits until all ranks have ended. Raises UserError for refused settings, and
    SessionFailed if a rank fails.
    """
    check_layout(config)
    folder = RunPaths(config).path / SESSION_FOLDER
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    lock = open_lock(folder / "lock")
    try:
        if not try_lock(lock):
            raise UserError("name", config.name, f"already has a session: {folder} is in use", "give another name=")
        # A session must not restart ranks: all updates would be lost.
        cluster = replace(config.cluster, restarts=0)
        with Session(replace(config, runs=str(folder.parent), name=folder.name, cluster=cluster), folder) as opened:
            yield opened
    finally:
        os.close(lock)


class Session:
    """Has the methods of `Engine`. A batch contains the shares of all data-parallel ranks, in rank order. Returned
    values are for all ranks together.
    """

    def __init__(self, config: Config, folder: Path):
        self._config, self._folder = config, folder
        self.step = 0
        """Number of completed steps."""
        self._link: Connection | None = None
        self._driver: subprocess.Popen | None = None
        self._is_reading = False
        """Whether some answers of `weights` have not been read yet."""

    def forward_backward(
        self,
        batch: Batch,
        loss: str | Callable[..., Tensor] = "cross_entropy",
        *,
        last: bool = True,
        total: StepTotal | None = None,
        terms: Collection[str] | None = None,
        **settings: float,
    ) -> None:
        """See `Engine.forward_backward`. loss: name, import path, or importable function."""
        name = loss if isinstance(loss, str) else _import_path(loss)
        more = {"loss": name, "last": last, "total": total, "terms": None if terms is None else [*terms]}
        tensors = self._plain(batch)
        require_mask(batch)
        self._call("forward_backward", {**more, "settings": settings}, tensors)

    def update(self, step: int | None = None, *, lr: float | None = None) -> StepOutcome:
        """See `Engine.update`."""
        said, tensors = self._call("update", {"step": step, "lr": lr})
        self.step = said["step"]
        measured = MeasuredStep(**said["measured"], **tensors, stop=StopKind.none)
        return StepOutcome(measured, Update(**said["update"]), torch.empty(0))

    def discard(self) -> None:
        """See `Engine.discard`."""
        self._call("discard", {})

    def logprobs(self, batch: Batch) -> Tensor:
        """See `Engine.logprobs`."""
        return self._call("logprobs", {}, self._plain(batch))[1]["logprobs"]

    def count(self, batches: Sequence[Batch]) -> StepTotal:
        """See `Engine.count`."""
        return total_of(batches)

    def save(self, folder: Path | str) -> Path:
        """See `Engine.save`."""
        return Path(self._call("save", {"folder": str(Path(folder).expanduser().absolute())})[0]["path"])

    def load(self, path: Path | str) -> None:
        """See `Engine.load`."""
        self.step = self._call("load", {"path": str(Path(path).expanduser().absolute())})[0]["step"]

    def weights(
        self, *, merged: bool = True, stacked: bool = False, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.weights`. Read all tensors, or stop the iteration, before you call another method."""
        named = None if dtype is None else str(dtype).removeprefix("torch.")
        with self._whole_call():
            self._send("weights", {"merged": merged, "stacked": stacked, "dtype": named})
        said: dict[str, Any] = {"done": False}
        self._is_reading = True
        try:
            while not said["done"]:
                with self._whole_call():
                    said, tensors = self._answer()
                yield from tensors.items()
        except GeneratorExit:  # the caller leaves the loop early: read the remaining answers
            with self._whole_call():
                while not said["done"] and self._link is not None:
                    said, _ = self._answer()
            raise
        finally:
            self._is_reading = False

    # Start and end of the ranks

    def __enter__(self) -> "Session":
        try:
            self._start()
        except BaseException:
            self._end(at_once=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(at_once=error is not None)

    def _start(self) -> None:
        config_path = self._folder / "config.yaml"
        write_config(self._config, str(config_path))
        cluster = self._config.cluster
        host = address_to(ANYWHERE) if cluster.backend == "ray" and cluster.address else "127.0.0.1"
        key = secrets.token_bytes(32)
        with create_server((host, 0)) as server, open(self._folder / OUTPUT, "wb") as output:
            server.settimeout(SESSION_LOOK_SECONDS)
            address = {"host": host, "port": server.getsockname()[1], "key": key.hex()}
            (self._folder / ADDRESS_FILE).unlink(missing_ok=True)
            os.close(os.open(self._folder / ADDRESS_FILE, os.O_CREAT | os.O_EXCL, 0o600))
            (self._folder / ADDRESS_FILE).write_text(json.dumps(address))
            command = [sys.executable, "-m", "train.loop.session_rank", str(config_path)]
            self._driver = spawn(command, os.environ | environment_of_children(), output)
            while self._link is None:
                with suppress(TimeoutError, AuthenticationError, EOFError, ConnectionError):
                    link = Connection(server.accept()[0].detach())
                    deliver_challenge(link, key)
                    answer_challenge(link, key)
                    self._link = link
                if self._link is None:
                    self._require_ranks()
        (self._folder / ADDRESS_FILE).unlink()
        self.step = self._answer()[0]["step"]

    def _call(self, method: str, said: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> tuple[dict, dict]:
        with self._whole_call():
            self._send(method, said, tensors)
            return self._answer()

    def _plain(self, batch: Batch) -> dict[str, Tensor]:
        """Returns copies of a batch's tensors by name. Raises UserError.

        Copies are needed, because safetensors refuses tensors that share memory.
        """
        check_given_batch(batch, self._config.model.vocab_size)
        named = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name != "tensors"}
        named |= {f"tensors.{name}": tensor for name, tensor in batch.tensors.items()}
        return {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in named.items()
            if tensor is not None
        }

    @contextmanager
    def _whole_call(self) -> Iterator[None]:
        """End the session if a call is interrupted, for example by Ctrl-C."""
        try:
            yield
        except UserError:
            raise
        except BaseException:
            self._end(at_once=True)
            raise

    def _send(self, method: str, said: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        if self._link is None:
            raise UserError(
                "session", method, "the session has ended", "open a new session: with train.session(config)"
            )
        if self._is_reading:
            rule = "comes while weights() still has tensors"
            raise UserError("session", method, rule, "read all of them first, as dict(engine.weights())")
        try:  # arguments may be numbers of NumPy or torch
            text = json.dumps({"method": method, **said}, default=methodcaller("item"))
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(method, error, "needs arguments that are numbers or text", "convert them") from None
        with suppress(ConnectionError):  # if rank 0 has ended, `_answer` finds the reason
            self._link.send_bytes(text.encode())
            self._link.send_bytes(save(tensors or {}))

    def _answer(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Returns the answer of rank 0. Raises UserError."""
        assert self._link is not None
        try:
            while not self._link.poll(SESSION_LOOK_SECONDS):
                self._require_ranks()
            said, tensors = json.loads(self._link.recv_bytes()), load(self._link.recv_bytes())
        except (EOFError, ConnectionError):
            self._fail()
        if refused := said.get("refused"):
            raise UserError(*refused)
        return said, tensors

    def _require_ranks(self) -> None:
        assert self._driver is not None
        if self._driver.poll() is not None:
            self._fail()

    def _fail(self) -> NoReturn:
        """Raise SessionFailed with the driver's output, because the ranks have ended."""
        driver, self._driver = self._driver, None
        if self._link is not None:
            self._link.close()
            self._link = None
        assert driver is not None
        with suppress(subprocess.TimeoutExpired):
            driver.wait(SESSION_END_SECONDS)
        _kill(driver)
        said = (self._folder / OUTPUT).read_text(errors="replace").strip()
        raise SessionFailed(said[-8000:] or f"the ranks ended with exit code {driver.returncode}; logs: {self._folder}")

    def _end(self, at_once: bool) -> None:
        """Wait for the end of the ranks. at_once: send SIGTERM first."""
        if self._link is not None:
            self._link.close()  # rank 0 ends when the connection closes
            self._link = None
        driver, self._driver = self._driver, None
        if driver is None:
            return
        if at_once:
            driver.terminate()
        with suppress(subprocess.TimeoutExpired):
            driver.wait(SESSION_END_SECONDS)
        _kill(driver)


def _kill(driver: subprocess.Popen) -> None:
    """Kill the driver. The operating system then kills the driver's ranks."""
    if driver.poll() is None:
        driver.kill()
        driver.wait()


def batch_of(tensors: dict[str, Tensor]) -> Batch:
    """Builds a batch from the tensors that the rank received."""
    per_token = {name.removeprefix("tensors."): tensor for name, tensor in tensors.items() if "." in name}
    return Batch(**{name: tensor for name, tensor in tensors.items() if "." not in name}, tensors=per_token)


def _import_path(loss: Callable[..., Tensor]) -> str:
    path = f"{loss.__module__}.{getattr(loss, '__qualname__', '<locals>')}"
    if loss.__module__ == "__main__" or "<" in path:
        rule = "must be a function of a module that the ranks can import"
        raise UserError("loss", path, rule, "move it into a module, and give its import path")
    return path
