"""All comparisons of speed with peers in one run:  python -m bench [--quick] [--out bench.json]

Prints tables and writes them, with every single measurement, to bench.json:

    step        a whole training step beside transformers and torchtitan (bench/train_step.py), on torchtitan's debug
                shape with 1 and 2 threads, and on a 300M-parameter DeepSeek-V3 shape without and with MTP: tokens/s,
                ratios, share of the measured matmul rate, peak memory, seconds from the command to the first step
    parts       MLA, MoE, loss and optimizer beside transformers and torch (bench/parts.py)
    layouts     a whole training step over 2 ranks (EP 2) and 4 (pp2 dp2, and with ep2) beside torchtitan's FSDP2 and
                DeepSpeed's AutoEP (bench/layouts.py), on torchtitan's debug shape with 1 thread per rank
    dispatch    an MoE layer over 2 ranks beside DeepSpeed's MoE and AutoEP (bench/dispatch.py)

All sides take turns in every round, at equal sizes and threads. Each side runs its matmuls in bf16 or fp32, whichever
is faster here in a few short rounds. The optimizers differ, see bench/train_step.py. The share of the matmul rate
compares the arithmetic of train/model/count.py (causal attention) with a large matmul in the same dtype, timed in the
same rounds. On first use, torchtitan is installed into a separate environment. A peer that cannot run is named with the
reason. megatron-core is missing because it does not run on CPU.

Takes about 20 minutes. --quick runs two short rounds, enough to see that everything works.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench.catalog import listed
from bench.layouts import LAYOUTS
from bench.layouts import measure as measure_layout
from bench.sides import SideResult, ratios
from bench.train_step import DTYPES, Case, compare

CASES = [Case("debug", threads=1), Case("debug", threads=2), Case("v3"), Case("v3", mtp=True)]
QUICK_CASES = [Case("debug"), Case("v3", mtp=True)]


class ProductRates:
    """Rates of a large matmul by dtype, timed once per round."""

    def __init__(self, case: Case):
        self._cases = {dtype: replace(case, dtype=dtype) for dtype in DTYPES}
        self.rates: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}

    def time(self) -> None:
        import torch

        from bench.train_step import torch_dtype
        from train.kernels.choice import build_kernels
        from train.metrics.peak import measured_peak

        for dtype, case in self._cases.items():
            torch.set_num_threads(case.threads)
            self.rates[dtype].append(measured_peak(torch.device("cpu"), torch_dtype(case), build_kernels("cpu")))


def step(case: Case, rounds: int, seconds: float) -> dict:
    """Measure and print one case."""
    from train.model.count import flops_per_token

    config = case.config()
    flops = flops_per_token(config.model, config.seq_len, mtp=case.mtp)
    products = ProductRates(case)
    results = compare(case, rounds, seconds, products.time)
    peaks = {dtype: statistics.median(rates) for dtype, rates in products.rates.items()}
    said = ", ".join(f"{peak / 1e9:.0f} in {dtype}" for dtype, peak in peaks.items())
    print(f"\nstep: {_title(case)}, {case.tokens} tokens; GFLOP/s of products: {said}")
    print(
        f"  {'':14}{'dtype':5}{'tokens/s':>9}{'range':>16}{'ours/peer':>11}{'products':>10}{'peak GB':>9}{'first step s':>14}"
    )
    found: dict[str, dict] = {}
    ours = results["ours"]
    for name, result in results.items():
        if isinstance(result, str):
            found[name] = {"cannot_run": result}
            print(f"  {name:14}cannot run: {result}")
            continue
        rate = statistics.median(result.rates)
        ratio = statistics.median(ratios(ours, result)) if isinstance(ours, SideResult) and result is not ours else None
        share = rate * flops / peaks[result.choice]
        found[name] = asdict(result) | {"median": rate, "ours_to_peer": ratio, "share_of_products": share}
        spread = f"{min(result.rates):.0f} to {max(result.rates):.0f}"
        print(
            f"  {name:14}{result.choice:5}{rate:9.0f}{spread:>16}{'' if ratio is None else f'{ratio:.2f}':>11}{share:>10.0%}"
            f"{result.peak_memory / 1e9:9.2f}{result.first_step:14.1f}",
            flush=True,
        )
    if case.mtp:
        print("  transformers  cannot run: it has no MTP")
    return {"case": asdict(case), "flops_per_token": flops, "products": products.rates, "sides": found}


def parts(case: Case, rounds: int) -> dict:
    """Measures the parts in a separate process, because the allocator must be tuned before torch starts."""
    from bench.parts import PartResult, show

    words = ["--shape", case.shape, "--threads", str(case.threads), "--rounds", str(rounds), "--json"]
    run = subprocess.run([sys.executable, "-m", "bench.parts", *words], stdout=subprocess.PIPE, text=True, check=True)
    results = json.loads(run.stdout)
    show(case, {name: PartResult(**fields) for name, fields in results.items()})
    return {"case": asdict(case), "parts": results}


def dispatch(rounds: int) -> dict:
    from bench.dispatch import measure, show

    times = measure(rounds)
    for dtype, layers in times.items():
        show(dtype, layers)
    return times


def _title(case: Case) -> str:
    return f"{case.shape}{' with MTP' if case.mtp else ''}, {case.threads} threads"


def machine() -> dict:
    """Describes the machine of this run, and how busy the machine was before the run."""
    versions = {}
    for package in ("torch", "transformers", "deepspeed"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    cpu = next((x.split(":")[1].strip() for x in _cpuinfo() if x.startswith("model name")), platform.machine())
    return {"cpu": cpu, "cores": os.cpu_count(), "load": os.getloadavg(), "versions": versions}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=listed(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two short rounds of fewer cases")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    rounds, seconds, part_rounds, dispatch_rounds = (2, 2.0, 3, 3) if options.quick else (7, 5.0, 15, 15)
    cases = QUICK_CASES if options.quick else CASES
    began, report = time.monotonic(), {"machine": machine(), "steps": [], "parts": [], "layouts": []}
    print("{cpu}, {cores} cores, load {load[0]:.1f}".format(**report["machine"]))
    for case in cases:
        report["steps"].append(step(case, rounds, seconds))
        _write(options.out, report)
    for shape in ("debug", "v3"):
        report["parts"].append(parts(Case(shape), part_rounds))
        _write(options.out, report)
    for layout in LAYOUTS:
        report["layouts"].append(measure_layout(layout, rounds, seconds, length=128 if options.quick else None))
        _write(options.out, report)
    print("\ndispatch: MoE layer over 2 ranks, ratio of the median to the first row, the trainer's way")
    report["dispatch"] = dispatch(dispatch_rounds)
    _write(options.out, report)
    print(f"\n{time.monotonic() - began:.0f} s; written to {options.out}")


def _write(path: Path, report: dict) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
