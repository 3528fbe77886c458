"""The first steps of `python -m train conf=tiny` in bf16 and FP8, and a resume from a checkpoint.

`mode=plan` runs first, so that the plan's memory can be compared with the run's. The resume must be bitwise equal: with
cluster.deterministic, a resumed run has the losses and gradient norms of an uninterrupted run.
"""

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from bench.gpu.kernels import hopper
from bench.gpu.line import Check, Finding
from bench.gpu.machine import Machine
from bench.gpu.words import last_words
from conf.schema import ROOT

STEPS, RESUMED = 20, 8
"""Of the run that is timed, and of those that are held against each other."""
SMALL = ("batch_size=4", "micro_batch_size=4", "seq_len=128", "log.validation_sequences=4")
"""Of a dry check, which takes as many steps as RESUMED."""
LIMIT = 75.0
PLANNED_SHARE = 1.25
"""Most of the planned memory: at a few hundred MiB libraries weigh more than tensors."""


def checks(machine: Machine) -> list[Check]:
    precisions = ("bf16", "fp8") if machine.on_gpu else ("bf16",)
    found = [Check(f"{STEPS} steps of tiny, {name}", partial(first_steps, machine, name), LIMIT) for name in precisions]
    return [*found, Check("tiny goes on from a checkpoint, bit by bit", partial(resumed, machine), LIMIT)]


def first_steps(machine: Machine, precision: str) -> Finding:
    if machine.on_gpu and precision == "fp8":
        hopper(machine)
    with tempfile.TemporaryDirectory() as folder:
        steps = STEPS if machine.on_gpu else RESUMED
        words = (f"precision={precision}", f"steps={steps}", "checkpoint.every=0")
        hardware = ("hardware=h100",) if machine.on_gpu else ("hardware=cpu",)
        if machine.on_gpu:
            train(machine, folder, "run", "mode=plan", *hardware, *words)
        lines = train(machine, folder, "run", *hardware, *words)
    return judge(lines, steps)


def resumed(machine: Machine) -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        words = ("cluster.deterministic=true", "precision=bf16", f"steps={RESUMED}", f"checkpoint.every={RESUMED // 2}")
        whole = train(machine, folder, "whole", *words)
        (start,) = (Path(folder) / "whole" / "checkpoints").glob(f"step_*{RESUMED // 2}")
        again = train(machine, folder, "again", f"resume={start}", *words)
    pairs = [[(line["step"], line["main_loss"], line["grad_norm"]) for line in lines] for lines in (whole, again)]
    table = [
        ["step", "loss", "loss after the resume"],
        *([a[0], a[1], b[1]] for a, b in zip(pairs[0][-len(pairs[1]) :], pairs[1], strict=False)),
    ]
    same = pairs[0][RESUMED // 2 :] == pairs[1]
    return Finding({"steps": len(pairs[1])}, "losses and gradient norms are those of the run that never stopped, bit by bit",
                   None if same else "the two runs differ", table)  # fmt: skip


def train(machine: Machine, folder: str, name: str, *words: str) -> list[dict]:
    """The lines of metrics.jsonl. RuntimeError with the end of what the run said, where it failed."""
    command = [
        sys.executable, "-m", "train", "conf=tiny", f"name={name}", f"runs={folder}", f"cluster.device={machine.device.type}",
        "log.wandb=disabled", "log.sample_tokens=0", *(() if machine.on_gpu else SMALL), *words,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=machine.patience * LIMIT
    )
    if done.returncode:
        raise RuntimeError(last_words(done.returncode, done.stdout + done.stderr))
    path = Path(folder) / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def judge(lines: list[dict], steps: int) -> Finding:
    """From the lines of metrics.jsonl."""
    if len(lines) != steps:
        return Finding({}, "", f"{len(lines)} of {steps} steps are recorded")
    later = sorted(line["step_seconds"] for line in lines[2:])
    last, planned = lines[-1], lines[-1].get("memory_predicted_bytes")
    figures = {
        "first step (s)": lines[0]["step_seconds"], "second step (s)": lines[1]["step_seconds"], "median of the others (s)": later[len(later) // 2],
        "kernels compiled after step 2": last.get("kernels_compiled"), "memory (MiB)": last["memory_bytes"] / 2**20,
        "planned (MiB)": planned and planned / 2**20, "first loss": lines[0]["main_loss"], "last loss": last["main_loss"],
    }  # fmt: skip
    problems = []
    if last.get("kernels_compiled"):
        problems.append(f"{last['kernels_compiled']} kernels are compiled after step 2")
    if not last["main_loss"] < lines[0]["main_loss"]:
        problems.append("the loss does not fall")
    if planned and not last["memory_bytes"] <= PLANNED_SHARE * planned:
        problems.append(f"memory is {last['memory_bytes'] / planned:.2f} of the plan")
    bound = f"the loss falls, no kernel is compiled after step 2, memory is at most {PLANNED_SHARE:g} of the plan"
    return Finding(figures, bound, "; ".join(problems) or None)
