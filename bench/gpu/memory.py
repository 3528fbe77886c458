"""Memory beside the plan: one rank of a job alone on the device (`mode=dry_run`), its peaks and permanent memory.

A job's rank runs at full width, with as many of its layers as the device holds; without a GPU, widths are divided.
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

TINY = ("conf=tiny",)
MIDDLE = ("conf=deepseek_v3_16b", "parallel.pp=4", "parallel.dp=8", "parallel.ep=8", "batch_size=64", "data.path=none")
LARGE = (
    "conf=deepseek_v3", "parallel.pp=16", "parallel.dp=64", "parallel.ep=64", "batch_size=1024", "optim.batch_ramp_start=1024",
    "parallel=single", "precision=bf16", "data.path=none",
)  # fmt: skip
CASES = {
    "DeepSeek-V3 16B, pp 4, ep 8, bf16": MIDDLE,
    "DeepSeek-V3 16B, pp 4, ep 8, fp8": (*MIDDLE, "precision=fp8"),
    "DeepSeek-V3, pp 16, ep 64, half the width, bf16": (*LARGE, "dry_run.shrink=2"),
    "tiny, one rank, bf16": TINY,
}
SMALL = ("batch_size=4", "micro_batch_size=4")
SMALL_CASES = {"tiny, one rank, bf16": (*TINY, *SMALL)}
ALLOWED = 0.08
SMALL_ALLOWED = 0.15
"""At a few MiB workspaces of libraries weigh more."""
STATE = 0.01
LIMIT = 60.0


def checks(machine: Machine) -> list[Check]:
    cases = CASES if machine.on_gpu else SMALL_CASES
    return [Check(name, partial(beside_plan, machine, overrides), LIMIT) for name, overrides in cases.items()]


def beside_plan(machine: Machine, overrides: tuple[str, ...]) -> Finding:
    if machine.on_gpu and "precision=fp8" in overrides:
        hopper(machine)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "train", "mode=dry_run", f"cluster.device={machine.device.type}", f"runs={folder}", "name=dry",
            "dry_run.steps=2", *overrides,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=machine.patience * LIMIT)
        if done.returncode:
            raise RuntimeError(last_words(done.returncode, done.stdout + done.stderr))
        return judge(json.loads((Path(folder) / "dry" / "dry_run.json").read_text()))


def judge(record: dict) -> Finding:
    """From a dry_run.json."""
    small = record["peak_bytes"]["planned"] < 2**30
    allowed = SMALL_ALLOWED if small else ALLOWED
    rows = {"peak": record["peak_bytes"]}
    rows |= {f"peak in {name}": one for name, one in record["phase_peak_bytes"].items() if one["measured"] is not None}
    rows |= record["item_bytes"]
    table, problems = [["MiB", "measured", "planned", "plan is off by"]], []
    for name, one in rows.items():
        measured, planned = one["measured"], one["planned"]
        off = planned / measured - 1 if measured else 0.0
        table.append([name, measured / 2**20, planned / 2**20, f"{off:+.1%}"])
        most = allowed if name == "peak" else STATE if name in ("weights", "master", "moments") else None
        if most is not None and not abs(off) <= most:
            problems.append(f"{name}: the plan is off by {off:+.1%}")
    figures = {
        "peak (GiB)": record["peak_bytes"]["measured"] / 2**30, "layers left out": record["layers_left_out"],
        "width divided by": record["shrink"], "step (s)": record["phase_seconds"]["step"]["measured"],
    }  # fmt: skip
    bound = (
        f"the peak within {allowed:.0%} of the plan, which counts tensors and not the workspaces of libraries; weights, master "
        f"weights and moments within {STATE:.0%}"
    )
    return Finding(figures, bound, "; ".join(problems) or None, table)
