"""Proofs on ranks of the fork server."""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.prove_rows import MICRO_BATCHES
from cluster.place import Place
from conf.load import compose, write_config
from conf.schema import Config
from tests.ranks import run_processes
from tests.small import SMALL

PROOF = [
    *SMALL,
    "batch_size=8",  # of what is not evenly shared; else as small_proof says
    "micro_batch_size=1",
    "steps=4",
    "model.init_std=0.02",
    "data.path=none",
    "optim.ema_decay=0.9",
]


def small_proof(tmp_path: Path, *overrides: str) -> Config:
    """A recipe that needs no shrinking, with its folder. A replica has two micro-batches, in a pipeline four, unless batch_size is given."""
    given = dict(one.split("=", 1) for one in overrides)
    if "batch_size" not in given and given.get("parallel.uneven") != "true":
        replicas = int(given.get("parallel.dp", 1))
        overrides = (f"batch_size={MICRO_BATCHES[int(given.get('parallel.pp', 1))][0] * replicas}", *overrides)
    config = compose(*PROOF, f"runs={tmp_path}", "name=proof", *overrides)
    shutil.rmtree(tmp_path / "proof", ignore_errors=True)
    (tmp_path / "proof" / "logs").mkdir(parents=True)
    write_config(config, str(tmp_path / "proof" / "config.yaml"))
    return config


def gather_evidence(
    config: Config,
    patch: Callable[[], None] | None = None,
    proofs: Sequence[str] | None = None,
    timeout: float = 300.0,
) -> None:
    """Let every rank leave its evidence of these passes. patch: called on every rank before it starts; a function of a module."""
    world = config.parallel.world
    path = str(Path(config.runs) / config.name / "config.yaml")
    with tempfile.TemporaryDirectory() as scratch:
        run_processes(prove_rank, path, world, f"{scratch}/store", patch, proofs, world_size=world, timeout=timeout)


def prove_rank(
    rank: int, path: str, world: int, store: str, patch: Callable[[], None] | None, proofs: Sequence[str] | None
) -> None:
    from conf.load import read_config
    from train.prove.proof_rank import run_rank

    os.environ |= {"SLUICE_STORE": store, "GLOO_SOCKET_IFNAME": "lo"}
    if patch is not None:
        patch()
    logs = Path(path).parent / "logs"
    code = run_rank(read_config(path), Place(rank, world, rank, world), logs, proofs)
    if code:
        error = logs / f"rank_{rank}.error.json"
        raise AssertionError(error.read_text() if error.exists() else f"exit code {code}")
