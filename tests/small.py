"""A run that takes seconds: every mechanism of the model, in a few thousand parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conf.schema import ROOT
from tests.ranks import run_module, start_module

MODEL = {
    "vocab_size": 320,
    "hidden": 32,
    "layers": 4,
    "dense_layers": 1,
    "heads": 2,
    "q_rank": 16,
    "kv_rank": 16,
    "nope_head_dim": 16,
    "rope_head_dim": 8,
    "v_head_dim": 16,
    "dense_width": 64,
    "expert_width": 16,
    "experts": 8,
    "top_k": 4,
    "groups": 4,
    "top_groups": 2,
    "mtp_depth": 1,
}
SMALL = [
    *(f"model.{key}={value}" for key, value in MODEL.items()),
    "precision=fp32",
    "steps=6",
    "seq_len=24",
    "batch_size=8",
    "micro_batch_size=2",
    "data.format=text",
    "data.workers=1",
    "optim.warmup_steps=2",
    "checkpoint.every=2",
    "checkpoint.keep=0",
    "cluster.threads=1",
    "cluster.device=cpu",
    "log.validation_sequences=6",
    "log.sample_tokens=8",
    "log.wandb=disabled",
    "log.peak_flops=1e11",
]
TEXT = "the expert routes every token to a few experts and the bias keeps the load even while the loss falls"


def write_corpus(folder: Path) -> Path:
    """Forty small text files."""
    folder.mkdir(exist_ok=True)
    words = TEXT.split()
    for number in range(40):
        lines = (" ".join(words[(number + 3 * line + word) % len(words)] for word in range(9)) for line in range(12))
        (folder / f"{number:02}.txt").write_text("\n".join(lines) + "\n")
    return folder


def arguments(tmp_path: Path, *more: str) -> list[str]:
    """Overrides of a small run with its data, cache and runs under tmp_path."""
    corpus = write_corpus(tmp_path / "corpus")
    return [*SMALL, f"data.path={corpus}", f"data.cache={tmp_path / 'cache'}", f"runs={tmp_path / 'runs'}", *more]


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}


def train(tmp_path: Path, *more: str, timeout: float = 120) -> subprocess.CompletedProcess:
    """`python -m train` with these overrides, to its end; its imports are the fork server's."""
    return run_module("train", arguments(tmp_path, *more), ROOT, environment(), timeout)


def train_in_shell(tmp_path: Path, *more: str) -> subprocess.CompletedProcess:
    """The same from nothing, as a user types it."""
    command = [sys.executable, "-m", "train", *arguments(tmp_path, *more)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)


class Started:
    """A run that a test signals while it trains; what it prints goes to one file."""

    def __init__(self, tmp_path: Path, *more: str):
        self._output = tmp_path / "output"
        command = "train", arguments(tmp_path, *more), ROOT, environment()
        self._process = start_module(*command, [self._output, self._output])
        self.pid = self._process.pid

    def end(self, timeout: float = 60) -> tuple[int | None, str]:
        """Wait for its end; returns its exit code, None if it goes on, and all that it printed."""
        self._process.join(timeout)
        return self._process.exitcode, self._output.read_text()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def metrics(tmp_path: Path, name: str) -> dict[int, dict]:
    """Records of a run by step."""
    lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record for record in map(json.loads, lines)}


def trajectory(tmp_path: Path, name: str) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of every step."""
    return {step: (record["loss"], record["grad_norm"]) for step, record in metrics(tmp_path, name).items()}
