"""Layers of DeepSeek-V3 at full width, forward and backward: times, memory, kernels, beside the published trace.

One dense layer and one expert layer (4 of 256 experts on this GPU, as with 64 expert-parallel ranks), one sequence of
4096 tokens, hidden 7168, recomputation as in the recipe, node-limited dispatch. There are no other ranks: instead of
the all-to-all, the dispatcher copies local rows to simulate those that a balanced group would send.

Times are medians by CUDA events; backward whole, and its two halves, inputs and weights, as zbv and dualpipev run them.
Operations as in train/model/count.py, without recomputation. Shares refer to this card's own rate of large bf16
matmuls, measured here; MFU refers to the maker's figure.

DeepSeek's trace (profile-data) differs: an H800 whose compute kernels had 112 of its 132 SMs, FP8, the forward of one
micro-batch overlapped with the backward of another; and its wall time hides an all-to-all over 64 GPUs, which is absent
here. Without a GPU, widths are divided by SHRINK.
"""

import gc
from functools import cache, partial

import torch

from bench.gpu.layer import PARTS, STEP, Layer, layer_config, peaks, times
from bench.gpu.line import Check, Finding, NotTried
from bench.gpu.machine import Machine
from bench.gpu.profiled import CLASSES, REST, kernels
from conf.errors import UserError
from train.kernels.choice import build_kernels
from train.metrics.peak import measured_peak, peak_flops
from train.model.count import layer_flops

TRACE = {
    "wall": 32.25, "weight gradients": 8.19, "grouped products": 5.73, "dense products": 4.71, "attention, inputs": 4.25,
    "attention, forward": 1.24, "casts": 4.17, "permutation": 1.27, "norms": 0.86, "SwiGLU": 0.47, "RoPE": 0.38,
    "dispatch forward, FP8": 4.35, "dispatch of gradients, FP8": 3.41, "two combines, bf16": 12.36, "notify and wait": 8.14,
}  # fmt: skip
"""ms of one forward and one backward of a MoE layer, 4096 tokens, 64 H800: wall, and sums of kernel times by piece, which
overlap."""
ABSENT = ("dispatch forward, FP8", "dispatch of gradients, FP8", "two combines, bf16", "notify and wait")
"""Pieces of the trace that need the other ranks."""
SHRINK = 32
ROUNDS = 20
PRODUCTS = ("grouped products", "dense products")
MOST_OF_PEAK = 1.05
"""A layer in bf16 cannot be faster than its products; FP8 can, by 2 at most."""


def checks(machine: Machine) -> list[Check]:
    precisions = ("bf16", "fp8", "fp8_ue8m0") if machine.on_gpu else ("bf16", "fp8")
    found = []
    for precision in precisions:
        for kind in ("dense", "MoE"):
            found.append(Check(f"{precision}, {kind} layer: times", partial(timed, machine, precision, kind)))
            found.append(Check(f"{precision}, {kind} layer: kernels", partial(by_kernels, machine, precision, kind)))
        found.append(Check(f"{precision}, MoE layer beside DeepSeek's trace", partial(traced, machine, precision)))
    return found


@cache
def product_rate(machine: Machine) -> float:
    """Of large bf16 products on this device, FLOP/s."""
    return measured_peak(machine.device, torch.bfloat16, build_kernels(machine.device.type))


def build(machine: Machine, precision: str, kind: str, dispatch: str = "node_limited") -> Layer:
    """Raises NotTried where the device lacks what the precision needs."""
    gc.collect()  # an earlier layer goes only then, and its memory would be counted
    config = layer_config(precision, dispatch, 1 if machine.on_gpu else SHRINK, machine.device)
    try:
        return Layer(config, kind == "dense", machine.device)
    except UserError as error:
        raise NotTried(f"precision={precision} cannot run here: {error.rule}; {error.cure}") from error


def timed(machine: Machine, precision: str, kind: str) -> Finding:
    layer = build(machine, precision, kind)
    model, seq_len, flops = layer.config.model, layer.config.seq_len, layer.flops()
    seconds = times(layer, ROUNDS if machine.on_gpu else 1)
    rate, peak = product_rate(machine), peak_flops(machine.device, torch.bfloat16, layer.kernels)
    share = flops[STEP] / seconds[STEP] / rate
    full = seq_len * layer_flops(model, seq_len, layer.dense, causal=False)
    most = MOST_OF_PEAK * (2 if precision.startswith("fp8") else 1)
    table = [["", "ms", "TFLOP/s", "of this card's products"]]
    for part in (STEP, *PARTS):
        table.append(
            [part, 1e3 * seconds[part], flops[part] / seconds[part] / 1e12, flops[part] / seconds[part] / rate]
        )
    figures = {
        "tokens": seq_len, "hidden": model.hidden, "products (TFLOP/s)": rate / 1e12, "share of products": share,
        "MFU, causal": flops[STEP] / seconds[STEP] / peak.flops, "MFU, in full": full / seconds[STEP] / peak.flops,
    }  # fmt: skip
    if not layer.dense:
        figures["rows of the experts"] = sum(layer.load.rows_L(seq_len))
    figures |= {f"peak in {phase} (GiB)": size / 2**30 for phase, size in peaks(layer).items()}
    problem = None if 0 < share <= most else f"{share:.2f} of the rate of products"
    return Finding(
        figures, f"a layer takes time, and reaches at most {most:g} of the rate of its products", problem, table
    )


def by_kernels(machine: Machine, precision: str, kind: str) -> Finding:
    layer = build(machine, precision, kind)
    seconds, by_phase = times(layer, 3 if machine.on_gpu else 1), kernels(layer)
    table = [["ms", *by_phase, "all"]]
    for name in (*(name for name, _ in CLASSES), REST):
        row = [1e3 * phase.get(name, 0.0) for phase in by_phase.values()]
        table.append([name, *row, sum(row)])
    sums = [1e3 * sum(phase.values()) for phase in by_phase.values()]
    table.append(["sum", *sums, sum(sums)])
    walls = [1e3 * seconds[part] for part in ("forward", "backward, inputs", "backward, weights")]
    table.append(["without the profiler", *walls, sum(walls)])
    return Finding({}, SEES, unseen(by_phase), table)


SEES = "the profiler sees products in every phase"


def unseen(by_phase: dict[str, dict[str, float]]) -> str | None:
    """Phases in which the profiler saw no product."""
    missing = [name for name, phase in by_phase.items() if not sum(phase.get(kind, 0.0) for kind in PRODUCTS)]
    return f"the profiler saw no product in {', '.join(missing)}" if missing else None


def traced(machine: Machine, precision: str) -> Finding:
    """Where both have a figure, they are no comparison of like with like: see above."""
    machine.need_gpu("a layer at full width")
    layer = build(machine, precision, "MoE")
    by_phase = kernels(layer)
    table = [["ms", "here", "trace of 64 H800, FP8, overlapped"], *beside_trace(by_phase, times(layer, 3))]
    return Finding({}, SEES, unseen(by_phase), [list(row) for row in table])


def pieces(by_phase: dict[str, dict[str, float]], seconds: dict[str, float]) -> dict[str, float]:
    """ms of this run under the names of the trace's pieces; RoPE and all else that no class knows under `rest`."""
    forward, inputs, weights = (by_phase[phase] for phase in ("forward", "inputs", "weights"))
    found = {"wall": seconds[STEP], "weight gradients": sum(weights.get(kind, 0.0) for kind in PRODUCTS)}
    found |= {kind: forward.get(kind, 0.0) + inputs.get(kind, 0.0) for kind in PRODUCTS}
    found |= {"attention, inputs": inputs.get("attention", 0.0), "attention, forward": forward.get("attention", 0.0)}
    for kind in ("casts", "permutation", "norms", "SwiGLU", REST):
        found[kind] = sum(phase.get(kind, 0.0) for phase in by_phase.values())
    return {piece: 1e3 * value for piece, value in found.items()}


def beside_trace(
    by_phase: dict[str, dict[str, float]], seconds: dict[str, float]
) -> list[tuple[str, float | None, float]]:
    """Piece, ms here (None for what needs other ranks), ms in the trace; RoPE stands beside all the rest."""
    ours = pieces(by_phase, seconds)
    present = [(piece, ours[piece], TRACE[piece]) for piece in TRACE if piece not in (*ABSENT, "RoPE")]
    rest = ("rest (trace: RoPE alone)", ours[REST], TRACE["RoPE"])
    return [*present, rest, *((piece, None, TRACE[piece]) for piece in ABSENT)]
