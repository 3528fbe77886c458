"""Several ranks on one card: does every layout give the losses of one rank on it?

NCCL takes one rank per card (bench/gpu/cards.py tries it if there are several cards). So tensors pass through the host
(bench/gpu/staged.py); model, dispatch, pipelines and ZeRO run on the card as in a job, in parallel processes.
"""

import tempfile
from functools import partial
from pathlib import Path

from bench.gpu.kernels import hopper
from bench.gpu.line import Check, Finding
from bench.gpu.machine import Machine
from bench.gpu.rank import Ranks, Task, losses

STEPS = 3
MODEL = (
    "conf=tiny",
    "model.layers=7",
    "seq_len=128",
    "batch_size=16",
    "micro_batch_size=2",
    "cluster.ranks_per_node=4",
)
SMALL = ("conf=tiny", "model.layers=3", "seq_len=64", "batch_size=4", "micro_batch_size=1", "cluster.ranks_per_node=1")
LAYOUTS = {
    "ep 8, node-limited dispatch, FP8 with FP8 rows on the wire": (
        8, "fp8", ("parallel.dp=8", "parallel.ep=8", "parallel.dispatch=node_limited", "parallel.wire=fp8"),
    ),
    "pp 2, dp 4, ep 4, DualPipeV": (
        8, "bf16", ("parallel.pp=2", "parallel.dp=4", "parallel.ep=4", "parallel.schedule=dualpipev", "micro_batch_size=1"),
    ),
}  # fmt: skip
SMALL_LAYOUTS = {"ep 2": (2, "bf16", ("parallel.dp=2", "parallel.ep=2"))}
LOSS = {"bf16": 1e-3, "fp8": 3e-3}
NORM = {"bf16": 5e-2, "fp8": 0.15}
LIMIT = 90.0
"""Seconds of a layout: nine processes import torch, take the card and build their kernels side by side."""


def checks(machine: Machine) -> list[Check]:
    layouts = LAYOUTS if machine.on_gpu else SMALL_LAYOUTS
    found = []
    for name, (ranks, precision, overrides) in layouts.items():
        found.append(Check(f"{ranks} ranks: {name}", partial(layout, machine, ranks, precision, overrides), LIMIT))
    return found


def layout(
    machine: Machine, ranks: int, precision: str, overrides: tuple[str, ...], backend: str = "staged"
) -> Finding:
    """Losses and gradient norms of a few steps beside those of one rank on the same device. backend: what joins the ranks."""
    if machine.on_gpu and precision == "fp8":
        hopper(machine)
    common, device = (*(MODEL if machine.on_gpu else SMALL), f"precision={precision}"), machine.device.type
    with tempfile.TemporaryDirectory() as folder:
        one = Ranks(Task(common, device, STEPS), Path(folder) / "one")
        many = Ranks(
            Task((*common, *overrides), device, STEPS, ranks=ranks, backend=backend, threads=1), Path(folder) / "many"
        )
        alone, together = (ranks.found(machine.patience * LIMIT) for ranks in (one, many))
    table, worst = [["step", "loss of one rank", "of all", "gradient norm of one rank", "of all"]], [0.0, 0.0]
    columns = losses(alone), losses(together), alone[0]["norms"], together[0]["norms"]
    for step, (a, b, c, d) in enumerate(zip(*columns, strict=True), 1):
        table.append([step, a, b, c, d])
        worst = [max(worst[0], abs(b / a - 1)), max(worst[1], abs(d / c - 1))]
    most = LOSS[precision], NORM[precision]
    good = worst[0] <= most[0] and worst[1] <= most[1]
    bound = (
        f"losses within {most[0]:g} and gradient norms within {most[1]:g} of one rank's: sums run in another order, a rounding in "
        "a bf16 moment or an FP8 cast may flip, and a token near a tie takes another expert"
    )
    problem = None if good else f"losses differ by {worst[0]:.1e}, gradient norms by {worst[1]:.1e}"
    return Finding({"losses apart": worst[0], "gradient norms apart": worst[1]}, bound, problem, table)
