"""Runs every command of `python -m bench --help` at its smallest size, so that no command breaks unnoticed.

Their main functions run here, and the processes that they start come from the fork server of tests/ranks.py.
"""

import json
import multiprocessing
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch

from bench import faults
from bench.catalog import commands
from bench.driver import TARGETS
from bench.prove_rows import read_rows, world_of
from bench.sides import SideResult
from bench.train_step import Case
from conf.schema import ROOT
from tests import ranks, small
from tests.plan.time.test_rates import calibration

SMALLEST = {
    "context": "--tokens 32 --ranks 2",
    "decode": "--shape tiny --tokens 2 --prompt 4 --rounds 1",
    "dispatch": "--rounds 1 --tokens 16 --malloc plain",
    "fp8_cost": "--threads 1 --rounds 1",
    "fp8_loss": "--only rounding --steps 2 --out loss SMALL",
    "layouts": "--layouts ep2 --shape tiny --length 8 --rounds 1 --out layouts.json",
    "memory_cost": "--rounds 1 --only optimizer",
    "optimizer_cost": "--shape tiny --length 8 --rounds 1",
    "optimizer_loss": "--steps 1 --rates 1e-3 --seeds 1 --out loss SMALL",
    "owners": "--recipes moonlight_16b --ranks 8",
    "parity": "--steps 1 --set DATA --set batch_size=2 alone",
    "parts": "--threads 1 --rounds 1",
    "pictures": "RUN --out .",
    "plan_memory": "bf16",
    "plan_published": "--only H800",
    "plan_search": "--layouts 2 '4 H800 (tiny)'",
    "plan_time": "--calibration RATES --only 'one rank' --steps 4",
    "prove": "--rows ROW",
    "ring_cost": "--calls 100",
    "sparse_layer": "--shapes tiny --lengths 300 --parts",
    "train_step": "--shape tiny --length 8 --threads 1 --rounds 1",
    "weights_cost": "--shape tiny --rounds 1",
}
"""Arguments. SMALL and DATA stand for the settings of a small run and those of its data, RUN for its folder, RATES for rates,
ROW for the number of a row of one rank."""
ELSEWHERE = {
    "drill": "tests/bench/test_drill.py",
    "simulate": "tests/bench/test_simulate.py",
    "compile_kernels": "tests/bench/test_compile_kernels.py",
    "gpu": "tests/bench/gpu/test_dry.py",
    "faults_named": "tests/bench/test_faults_named.py",
    "growth": "tests/bench/test_growth.py",
    "hf_memory": "tests/hf/test_memory.py",
    "slow_runs": "tests/bench/test_slow_runs.py",
    "startup": "tests/bench/test_growth.py",
}
"""Tests that run the whole command."""
LARGE = {
    "driver": "Ray has to start, and a node counts as lost after 5 s: a slow test below",
    "faults": "needs root and three hosts, and a fault takes a minute",
    "traffic": "needs a CUDA build of torch, with which .ci/gpu counts the same layers",
}
"""Commands without a small form: they are imported, and read their arguments."""
RATES = {
    name: {"seconds": 1e-6, "flops": 1e11, "bandwidth": 1e10}
    for name in ("fprop_fp32", "grouped_fprop_fp32", "attention_forward", "attention_backward", "memory")
}


def test_no_command_is_left_out():
    tables = SMALLEST, ELSEWHERE, LARGE
    assert sorted(name for table in tables for name in table) == [command.name for command in commands()]
    for name, file in ELSEWHERE.items():
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text())


@pytest.mark.parametrize("name", LARGE)
def test_a_large_command_reads_its_arguments(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        import_module(f"bench.{name}").main()
    assert "--help" in capsys.readouterr().out


class OneStep:
    """In place of a Side: its ranks take their first step and no other."""

    def __init__(self, command: list[str], tokens: int, *, ranks: int = 1, threads: int = 1, limit: float = 0.0):
        self._tokens, self.choice, self.tried = tokens, "", {}
        with tempfile.TemporaryDirectory() as folder:
            shared = small.environment() | {"WORLD_SIZE": str(ranks), "BENCH_STORE": f"file://{folder}/store"}
            said = [[Path(folder, f"{rank}.{name}") for name in ("stdout", "stderr")] for rank in range(ranks)]
            started = [
                start(command[2:], shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, said[rank])
                for rank in range(ranks)
            ]
            for process in started:
                process.join(120)
            answers = [out.read_text().splitlines() for out, _ in said]
            errors = said[0][1].read_text()
        assert all(len(lines) == 2 for lines in answers), errors
        self.first_step, self._peak = (max(float(lines[place]) for lines in answers) for place in (0, 1))

    def turn(self, seconds: float) -> tuple[float, float]:
        return self._tokens / seconds, seconds

    def peak_memory(self) -> float:
        return self._peak

    def kill(self) -> None:
        pass


def start(words: list[str], environment: dict[str, str], outputs: list[Path]):
    return ranks.start_module(words[0], words[1:], ROOT, environment, outputs)


def smaller(settings: list[str]) -> dict[str, object]:
    """Sizes that are no arguments; a layout of one rank, as others begin with the imports of theirs. settings: of a small run."""
    return {
        "bench.fp8_cost.LINEAR": ((16, 128, 128),),
        "bench.fp8_cost.EXPERTS": ((16, 2, 4, 128, 128),),
        "bench.fp8_cost.MODELS": (("tiny", [one for one in settings if one.startswith("model.")]),),
        "bench.parity.LAYOUTS": {"alone": ["parallel.dp=1"]},
        "bench.plan_time.BASE": (*settings, "hardware=cpu"),
    }


run_in_shell = subprocess.run


def run(command: list[str], **options):
    """In place of subprocess.run."""
    if command[:2] != [sys.executable, "-m"]:
        return run_in_shell(command, **options)
    done = ranks.run_module(command[2], command[3:], Path.cwd(), options.get("env") or small.environment())
    if options.get("check"):
        assert done.returncode == 0, done.stderr
    return done


def no_torchtitan(_: Path) -> Path:
    raise RuntimeError("it is downloaded")


@pytest.fixture
def from_fork_server(monkeypatch):
    """Processes of commands begin with imports that are done."""
    threads = torch.get_num_threads()
    multiprocessing.forkserver.ensure_running()
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: ranks.CONTEXT)
    monkeypatch.setattr(
        torch.multiprocessing, "spawn", lambda work, args, nprocs: ranks.run_processes(work, *args, world_size=nprocs)
    )
    monkeypatch.setattr(subprocess, "run", run)
    for module in ("layouts", "memory_cost", "train_step"):
        monkeypatch.setattr(f"bench.{module}.Side", OneStep)
    monkeypatch.setattr("bench.pictures.take", lambda page, *_: print(f"{page.name}: {page.stat().st_size} bytes"))
    monkeypatch.setattr("bench.train_step.environment", no_torchtitan)
    monkeypatch.setattr("bench.layouts.sides_of", lambda _: ["ours", "torchtitan", "autoep2"])
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """Of a run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    done = small.train(folder, "steps=2", "name=a")
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "a"


@pytest.fixture
def call(monkeypatch, tmp_path, run_folder, from_fork_server, capfd):
    """The command as from a shell in a folder of its own; returns what it printed."""

    def called(name: str, arguments: str, missed: bool = False) -> str:
        settings = [one for one in small.arguments(tmp_path) if not one.startswith(("runs=", "steps="))]
        data = [one for one in settings if one.startswith(("data.", "model.vocab_size"))]
        words = arguments.replace("--set DATA", " ".join(f"--set {one}" for one in data))
        words = words.replace("SMALL", " ".join(settings)).replace("RUN", str(run_folder))
        words = words.replace("RATES", calibration(tmp_path / "rates.json", rates_alone=RATES))
        words = words.replace("ROW", str([world_of(row) for row in read_rows()].index(1)))
        monkeypatch.setattr("sys.argv", [name, *shlex.split(words)])
        monkeypatch.chdir(tmp_path)
        with mock.patch("train.kernels.cpu.processor.tune_cpu"):
            for constant, value in smaller(settings).items():
                monkeypatch.setattr(constant, value)
            code = import_module(f"bench.{name}").main()
        assert missed or not code
        return capfd.readouterr().out

    return called


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_a_command_runs(name, call):
    said = call(name, SMALLEST[name])
    assert [line for line in said.splitlines() if "cannot run" in line and "it is downloaded" not in line] == []
    assert said


@pytest.mark.slow
def test_all_comparisons_in_one_run(call, monkeypatch):
    """The order of things in `python -m bench`; what it calls runs above."""

    def compare(case: Case, rounds: int, seconds: float, between: Callable) -> dict[str, SideResult | str]:
        between()
        return {
            "ours": SideResult([20.0], 1.0, 2, choice="bf16"),
            "transformers": SideResult([10.0], 1.0, 2, choice="fp32"),
            "torchtitan": "it is downloaded",
        }

    monkeypatch.setattr("bench.__main__.compare", compare)
    monkeypatch.setattr("bench.__main__.QUICK_CASES", [Case("tiny", threads=1)])
    for part in ("dispatch", "measure_layout", "parts"):
        monkeypatch.setattr(f"bench.__main__.{part}", lambda *_, **__: {})
    said = call("__main__", "--quick --out all.json")
    assert "ours" in said and "torchtitan    cannot run: it is downloaded" in said
    report = json.loads(Path("all.json").read_text())
    assert report["steps"][0]["sides"]["transformers"]["ours_to_peer"] == 2


@pytest.mark.slow
def test_a_driver_of_two_nodes(call):
    """Whether a target is missed depends on the machine."""
    said = call("driver", "--nodes 2 --hosts 1 --window 1", missed=True)
    assert TARGETS.keys() <= json.loads(said.splitlines()[0]).keys()


def test_faults_are_summed_up(tmp_path, capsys):
    trials = [
        {"outcome": "recovered", "start": 3.0, "detected": 1.0, "next_step": next_step, "steps_lost": 2, "load": 0.1}
        for next_step in (2.0, 4.0, 3.0)
    ]
    ended = {"outcome": "no step in 120 s", "start": None, "detected": None, "next_step": None, "steps_lost": None}
    results = {("sluice", "rank_kill"): trials, ("torchrun", "rank_kill"): [ended]}
    faults.show(results)
    faults._write(tmp_path / "faults.json", results)
    said = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert said[0] == ["rank_kill", "sluice", "3.0", "1.0", "3.0", "2", "3", "recovered"]
    assert said[1][:6] == ["rank_kill", "torchrun", "-", "-", "-", "-"]
    assert json.loads((tmp_path / "faults.json").read_text())["cells"]["rank_kill"]["sluice"]["next_step"] == 3.0
