"""Sixty steps of `tiny` with `python -m train` on the device and on the CPU; losses side by side.

Both runs continue from a checkpoint that the CPU wrote after one step, because a GPU draws other weights from the same
seed. Both have the same batches. Roundings differ from the first step on, and training amplifies differences: two bf16
runs that sum in another order differed by up to 1.2 % (train/docs/fp8.md). Losses are smoothed as in the paper's
appendix B.1 before the comparison.
"""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

from bench.gpu.kernels import hopper
from bench.gpu.line import Check, Finding, NotTried
from bench.gpu.machine import Machine
from bench.gpu.words import last_words
from conf.schema import ROOT

STEPS, EVERY = 60, 6
SIZE = ("batch_size=8", "micro_batch_size=8")
SMALL_STEPS = 12
SMALL = ("batch_size=4", "micro_batch_size=4", "seq_len=128", "optim.warmup_steps=2", "log.validation_sequences=4")
"""Of a dry check."""
DECAY = 0.9
ALLOWED = 0.025
FIRST = {"bf16": 1e-3, "fp8": 4e-3}
LEARNS = 0.85
"""The last loss over the first, at most; it was 0.6 on a CPU."""
LIMIT = 100.0


def checks(machine: Machine) -> list[Check]:
    return [Check(f"tiny, {name}", partial(curve, machine, name), LIMIT) for name in precisions(machine)]


def precisions(machine: Machine) -> tuple[str, ...]:
    """A dry check has no time for FP8."""
    return ("bf16", "fp8") if machine.on_gpu else ("bf16",)


def curve(machine: Machine, precision: str) -> Finding:
    if machine.on_gpu and precision == "fp8":
        hopper(machine)
    steps = STEPS if machine.on_gpu else SMALL_STEPS
    ours, cpu = (losses(runs(machine) / f"{precision}-{side}") for side in ("here", "there"))
    return beside(ours, cpu, steps - 1, FIRST[precision], machine.on_gpu)


@cache
def runs(machine: Machine) -> Path:
    """The folder of all runs, which go on together once the first step is taken."""
    folder = tempfile.mkdtemp(prefix="sluice-curve-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    steps, size = (STEPS, SIZE) if machine.on_gpu else (SMALL_STEPS, SMALL)
    seconds, common = machine.patience * LIMIT, (f"runs={folder}", *size)
    finish(start("first", "cluster.device=cpu", *common, "steps=1"), seconds)
    threads = max(1, (os.cpu_count() or 1) // 2)
    common = (*common, f"steps={steps}", f"resume={folder}/first", f"cluster.threads={threads}")
    here = f"cluster.device={machine.device.type}", f"cluster.compiled={str(machine.on_gpu).lower()}"
    sides = {"here": here, "there": ("cluster.device=cpu",)}
    started = [
        start(f"{precision}-{side}", f"precision={precision}", *words, *common)
        for precision in precisions(machine)
        for side, words in sides.items()
        if not (precision == "fp8" and lacks_fp8(machine))
    ]
    for process in started:
        finish(process, seconds)
    return Path(folder)


def lacks_fp8(machine: Machine) -> bool:
    try:
        hopper(machine)
    except NotTried:
        return True
    return False


def start(name: str, *overrides: str) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "train", "conf=tiny", f"name={name}", "checkpoint.every=0", "log.wandb=disabled",
        "log.sample_tokens=0", *overrides,
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"NO_COLOR": "1"},
    )  # fmt: skip


def finish(process: subprocess.Popen, seconds: float) -> None:
    """RuntimeError with the end of what the run said, where it failed."""
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    if process.returncode:
        raise RuntimeError(last_words(process.returncode, said))


def losses(folder: Path) -> list[float]:
    """The main loss of every step."""
    return [json.loads(line)["main_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def beside(ours: list[float], cpu: list[float], steps: int, first: float, whole: bool) -> Finding:
    """A verdict on two curves from step 2 on. whole: of a run long enough to have learned something."""
    problems = [f"{len(one)} of {steps} steps have a loss" for one in (ours, cpu) if len(one) != steps]
    if problems:
        return Finding({}, "", "; ".join(problems))
    differences = [a / b - 1 for a, b in zip(smooth(ours), smooth(cpu), strict=True)]
    worst = max(range(steps), key=lambda step: abs(differences[step]))
    table = [["step", "device", "CPU", "smoothed, apart"]]
    for step in sorted({0, *range(EVERY - 1, steps, EVERY)}):
        table.append([step + 2, ours[step], cpu[step], f"{differences[step]:+.2%}"])
    if not abs(ours[0] / cpu[0] - 1) <= first:
        problems.append(f"the first losses are {ours[0] / cpu[0] - 1:+.2%} apart")
    if not abs(differences[worst]) <= ALLOWED:
        problems.append(f"at step {worst + 2} the smoothed losses are {differences[worst]:+.2%} apart")
    if whole and not ours[-1] <= LEARNS * ours[0]:
        problems.append(f"the loss went from {ours[0]:.2f} to {ours[-1]:.2f} only")
    bound = (
        f"the first loss within {first:g} (roundings cancel in a mean over thousands of tokens), every smoothed one within "
        f"{ALLOWED:.1%} (two runs in bf16 on a CPU were up to 1.2 % apart)"
    )
    if whole:
        bound += f", the last at most {LEARNS:g} of the first"
    figures = {"largest difference": abs(differences[worst]), "last loss": ours[-1], "last loss on the CPU": cpu[-1]}
    return Finding(figures, bound, "; ".join(problems) or None, table)


def smooth(values: list[float]) -> list[float]:
    """Moving averages."""
    average, result = values[0], []
    for value in values:
        average = DECAY * average + (1 - DECAY) * value
        result.append(average)
    return result
