"""Where the host waits for the GPU, and how many operations it launches, in one forward and backward of a layer.

The reference counts were made without a GPU, on a simulated driver that counts calls. Each wait in a row of a table
costs one more round trip here, and each launch costs the host some 4.5 us.
"""

from functools import partial

from bench.gpu.layer import launches, waits
from bench.gpu.layers import build
from bench.gpu.line import Check, Finding
from bench.gpu.machine import Machine

COUNTED = {
    ("bf16", "dense", "node_limited"): 67, ("bf16", "MoE", "node_limited"): 137, ("bf16", "MoE", "flat"): 149,
    ("fp8", "dense", "node_limited"): 138, ("fp8", "MoE", "node_limited"): 221,
}  # fmt: skip
"""GPU operations of a layer as of November 2026, forward and backward, counted without a GPU under torch 2.13."""
MADE_UP = "parallel/expert/stand_in.py"
"""Its waits are those of the rows that it makes up, and are not in a job."""
MOST_WAITS = 1
"""In a MoE layer: split sizes, which NCCL's all-to-all needs on the host."""
MORE_LAUNCHES = 1.25


def checks(machine: Machine) -> list[Check]:
    found = []
    for (precision, kind, dispatch), operations in COUNTED.items():
        name = f"{precision}, {kind} layer" + (f", {dispatch} dispatch" if kind == "MoE" else "")
        found.append(Check(name, partial(counted, machine, precision, kind, dispatch, operations)))
    return found


def counted(machine: Machine, precision: str, kind: str, dispatch: str, operations: int) -> Finding:
    machine.need_gpu("counting waits and launches")
    layer = build(machine, precision, kind, dispatch)
    layer.backward(layer.forward())  # the first of a process builds tables and kernels
    places, made = waits(layer), launches(layer)
    ours = sum(count for place, count in places.items() if not place.startswith(MADE_UP))
    allowed = 0 if kind == "dense" else MOST_WAITS
    total = sum(made.values())
    problems = []
    if ours > allowed:
        problems.append(f"the host waits {ours} times, {allowed} are known of")
    if not made["kernels"]:
        problems.append("the profiler saw no kernel")
    if total > MORE_LAUNCHES * operations:
        problems.append(f"{total} GPU operations")
    bound = (
        f"at most {allowed} waits outside the made-up dispatch, and at most {MORE_LAUNCHES:g} of the {operations} GPU operations "
        "that were counted without a GPU (torch's libraries may use more kernels for a product here)"
    )
    table = [["waits", "place"], *([count, place] for place, count in places.items())] if places else []
    return Finding(
        made | {"counted without a GPU": operations, "waits": ours}, bound, "; ".join(problems) or None, table
    )
