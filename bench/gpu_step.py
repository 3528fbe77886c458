"""Layers of DeepSeek-V3 at full width on one GPU, forward and backward, beside the published trace of an H800.

    python -m bench.gpu_step [--precision bf16 fp8 fp8_ue8m0] [--dispatch node_limited] [--out gpu_step.json]

One dense layer and one of experts (4 of 256 on this GPU, as with 64 expert-parallel ranks), one sequence of 4096 tokens,
hidden 7168, recomputation as in the recipe. There are no other ranks: the dispatcher is the trainer's own, and instead of
the all-to-all it makes up the rows that a balanced group would send (parallel/expert/stand_in.py), a copy in this GPU's
memory. Prints for each precision

    ms, TFLOP/s, MFU    medians by CUDA events; backward whole, and its two halves, inputs and weights, as zbv and dualpipev
                        run them. Operations as in train/model/count.py, without what is computed again; MFU against the
                        maker's bf16 figure, attention counted causal, and in full
    peak memory         weights, gradients (fp32) and activations of the one layer
    waits               the lines where the host waits for the GPU, by torch's sync debug mode; lines of stand_in.py are not in a job
    kernels             time by class from torch's profiler, in forward and the two halves of backward

and beside the MoE layer the pieces of DeepSeek's published trace (profile-data; reference deepseek_v3.md 5.3). It differs:
an H800 whose compute kernels had 112 of its 132 SMs, FP8, the forward of one micro-batch overlapped with the backward of
another, and its wall time hides an all-to-all over 64 GPUs that is absent here.

A precision whose packages are missing is named, and the others still run. Without a GPU it is a dry check: one step of the
same code on the CPU at divided widths in bf16 and fp8; nothing then ran on a GPU, and no figure means anything.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch

from bench.gpu_step_kernels import CLASSES, REST, kernels
from bench.gpu_step_layer import PARTS, STEP, Layer, layer_config, peaks, times, waits
from conf.errors import UserError
from train.metrics.peak import Peak, peak_flops
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
CPU_SHRINK = 16
FULL_WIDTH = 7168
"""A smaller layer has no place beside the trace."""
PRODUCTS = ("grouped products", "dense products")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--precision", nargs="+", choices=("bf16", "fp8", "fp8_ue8m0"), help="default: all; on a CPU bf16, fp8"
    )
    parser.add_argument("--dispatch", choices=("flat", "node_limited", "deepep"), default="node_limited")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds on a GPU")
    parser.add_argument(
        "--shrink", type=int, help=f"divides widths and sequence; default 1 on a GPU, {CPU_SHRINK} on a CPU"
    )
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    precisions = options.precision or (["bf16", "fp8", "fp8_ue8m0"] if on_gpu else ["bf16", "fp8"])
    shrink, rounds = options.shrink or (1 if on_gpu else CPU_SHRINK), options.rounds if on_gpu else 1
    peak = peak_flops(device, torch.bfloat16)
    report = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "on_gpu": on_gpu,
        "torch": torch.__version__,
    }
    report |= {
        "shrink": shrink,
        "dispatch": options.dispatch,
        "peak_flops": peak.flops,
        "peak": peak.label,
        "trace_ms": TRACE,
    }
    print(f"{report['device']}, torch {torch.__version__}; MFU against {peak.flops / 1e12:.3g} TFLOP/s: {peak.label}")
    if not on_gpu:
        print(
            f"no CUDA device: dry check on the CPU, widths and sequence divided by {shrink}; nothing below ran on a GPU"
        )
    report["precisions"] = {}
    for name in precisions:
        report["precisions"][name] = _precision(name, options.dispatch, shrink, rounds, device, peak)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwritten to {options.out}")
    return 0 if any("error" not in found for found in report["precisions"].values()) else 2


def _precision(name: str, dispatch: str, shrink: int, rounds: int, device: torch.device, peak: Peak) -> dict:
    """Both layers in this precision, or the error that names what is missing."""
    found: dict = {}
    for kind in ("dense", "moe"):
        try:
            layer = Layer(layer_config(name, dispatch, shrink, device), kind == "dense", device)
        except UserError as error:
            print(f"\n{name} cannot run: {error}")
            return {"error": str(error)}
        found[kind] = measure(layer, rounds, peak)
        show(name, layer, found[kind])
    return found


def measure(layer: Layer, rounds: int, peak: Peak) -> dict:
    """All figures of a layer, seconds and bytes."""
    model, seq_len, flops = layer.config.model, layer.config.seq_len, layer.flops()
    seconds = times(layer, rounds)
    full = seq_len * layer_flops(model, seq_len, layer.dense, causal=False)
    return {
        "seconds": seconds,
        "flops": flops,
        "mfu_causal": flops[STEP] / seconds[STEP] / peak.flops,
        "mfu_full": full / seconds[STEP] / peak.flops,
        "peak_bytes": peaks(layer),
        "waits": waits(layer) if layer.device.type == "cuda" else None,
        "kernel_seconds": kernels(layer),
    }


def show(name: str, layer: Layer, found: dict) -> None:
    model, config = layer.config.model, layer.config
    what = f"dense layer, width {model.dense_width}"
    if not layer.dense:
        rows = sum(layer.load.rows_L(config.seq_len))
        experts = len(layer.load.per_token_L)
        what = f"MoE layer, {experts} of {model.experts} experts, {rows} rows, {config.parallel.dispatch} dispatch, {config.parallel.wire} wire"
    print(f"\n{name}, {what}; {config.seq_len} tokens, hidden {model.hidden}\n  {'':22}{'ms':>9}{'TFLOP/s':>9}")
    for part in (STEP, *PARTS):
        seconds = found["seconds"][part]
        print(f"  {part:22}{1e3 * seconds:9.2f}{found['flops'][part] / seconds / 1e12:9.3g}")
    print(f"  MFU {found['mfu_causal']:.1%} causal, {found['mfu_full']:.1%} in full", end="; ")
    print(", ".join(f"peak in {phase} {size / 2**30:.3g} GiB" for phase, size in found["peak_bytes"].items()))
    if found["waits"] is None:
        print("  waits for the device: only seen on a GPU")
    else:
        print(f"  waits for the device in one forward and backward: {sum(found['waits'].values())}")
        for place, times_there in found["waits"].items():
            print(f"    {times_there:4d}  {place}")
    _show_kernels(found["kernel_seconds"], found["seconds"])
    if not layer.dense and model.hidden == FULL_WIDTH:
        _show_trace(found["kernel_seconds"], found["seconds"])


def _show_kernels(by_phase: dict[str, dict[str, float]], seconds: dict[str, float]) -> None:
    print(f"  {'kernels, ms':22}" + "".join(f"{phase:>9}" for phase in by_phase) + f"{'all':>9}")
    for kind in (*(kind for kind, _ in CLASSES), REST):
        row = [1e3 * phase.get(kind, 0.0) for phase in by_phase.values()]
        print(f"  {kind:22}" + "".join(f"{value:9.2f}" for value in (*row, sum(row))))
    sums = [1e3 * sum(phase.values()) for phase in by_phase.values()]
    print(f"  {'sum':22}" + "".join(f"{value:9.2f}" for value in (*sums, sum(sums))))
    walls = [1e3 * seconds[part] for part in ("forward", "backward, inputs", "backward, weights")]
    print(f"  {'time without profiler':22}" + "".join(f"{value:9.2f}" for value in (*walls, sum(walls))))


def pieces(by_phase: dict[str, dict[str, float]], seconds: dict[str, float]) -> dict[str, float]:
    """ms of this run under the names of the trace's pieces; RoPE and all else that no class knows under `rest`."""
    forward, inputs, weights = (by_phase[phase] for phase in ("forward", "inputs", "weights"))
    found = {"wall": seconds[STEP], "weight gradients": sum(weights.get(kind, 0.0) for kind in PRODUCTS)}
    found |= {kind: forward.get(kind, 0.0) + inputs.get(kind, 0.0) for kind in PRODUCTS}
    found |= {"attention, inputs": inputs.get("attention", 0.0), "attention, forward": forward.get("attention", 0.0)}
    for kind in ("casts", "permutation", "norms", "SwiGLU", REST):
        found[kind] = sum(phase.get(kind, 0.0) for phase in by_phase.values())
    return {piece: 1e3 * value for piece, value in found.items()}


def _show_trace(by_phase: dict[str, dict[str, float]], seconds: dict[str, float]) -> None:
    print(f"  {'piece, ms':34}{'here':>9}{'trace, 64 H800, FP8, overlapped':>34}")
    ours = pieces(by_phase, seconds)
    for piece in (*(piece for piece in TRACE if piece not in (*ABSENT, "RoPE")), REST):
        published = TRACE["RoPE"] if piece == REST else TRACE[piece]
        note = " (RoPE alone)" if piece == REST else ""
        print(f"  {piece:34}{ours[piece]:9.2f}{published:14.2f}{note}")
    for piece in ABSENT:
        print(f"  {piece:34}{'not here':>9}{TRACE[piece]:14.2f}")


if __name__ == "__main__":
    sys.exit(main())
