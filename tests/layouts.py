"""Whole runs on several ranks, from the fork server, without the command line: for parity of layouts."""

import os
import tempfile
from pathlib import Path
from unittest import mock

from cluster.place import Place
from conf.load import compose, write_config
from conf.schema import Config
from tests.ranks import run_processes
from tests.small import arguments


def run_layout(tmp_path: Path, name: str, world: int, *more: str, timeout: float = 120.0) -> None:
    """Train a small run on `world` ranks, each in its own process; raises the first error of any rank."""
    overrides = arguments(tmp_path, f"name={name}", "log.progress=false", "log.sample_tokens=0", *more)
    train_on(compose(*overrides), world, timeout)


def train_on(config: Config, world: int, timeout: float = 120.0) -> None:
    """Any run, on ranks of the fork server."""
    folder = Path(config.runs) / config.name
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints").mkdir(exist_ok=True)
    write_config(config, str(folder / "config.yaml"))
    with tempfile.TemporaryDirectory() as scratch:
        store = f"{scratch}/store"
        run_processes(train_rank, str(folder / "config.yaml"), world, store, world_size=world, timeout=timeout)


def train_rank(rank: int, config_path: str, world: int, store: str) -> None:
    from conf.load import read_config
    from train.worker import run_rank

    os.environ |= {"SLUICE_STORE": store, "GLOO_SOCKET_IFNAME": "lo"}
    logs = Path(config_path).parent / "logs"
    with mock.patch("train.loop.finish.write_report", return_value="none"):  # a tenth of a small run, and of one rank
        code = run_rank(read_config(config_path), Place(rank, world, rank, world), logs)
    if code:
        error = logs / f"rank_{rank}.error.json"
        raise AssertionError(error.read_text() if error.exists() else f"exit code {code}")
