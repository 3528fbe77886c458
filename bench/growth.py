"""Growth of a training step's time, memory and arithmetic with the sizes of a run. On CPU, bf16.

    python -m bench.growth [--sweep experts finer length vocabulary dp ep] [--minutes 18] [--quick] [--out growth.json]

    experts      8 to 256 of width 128, top 4: the same GEMM work per token, more weights
    finer        8 to 256 with a total width of 16384, top 4 and none shared: the same weights, less GEMM work per token
    length       one sequence of 512 to 16384 tokens
    vocabulary   2048 to 129280
    dp, ep       1 to 8 ranks on gloo with equal tokens each (weak scaling); experts over all ranks for ep

The model is `tiny` (hidden 256, 4 layers, one of them dense) without MTP; a step is the trainer's own: forward,
backward, DeepSpeed's reduction, clipping, AdamW. One thread per rank. Ranks beyond the machine's cores wait for each
other, so there CPU seconds of a rank count as its time, and wall time is only shown.

Every cell runs in a new process in every round, so its peak memory is its own. Rounds over all cells repeat while there
are minutes left, and figures are medians of rounds.

    CPU, wall   ms of a step; fw+bw: forward and backward; update: reduction, clipping, AdamW, new weights
    GFLOP       per rank and step by train/model/count.py; attention: its part that grows with the square of the length
    state       bytes of weights, fp32 gradients, master weights and moments of a rank, all of which the update reads
    RSS         peak resident bytes, beyond those after all imports: tensors, oneDNN's data for every matmul shape that
                it has seen, and freed memory that the C library keeps
    tensors     peak bytes of live tensors
    plan        the prediction of mode=plan: state and activations

^ is the exponent relative to the previous row (log of the ratio over log of the ratio of sizes), `all` the exponent of
a line through all rows. A step is a sum of matmuls, attention (whose operations run at a lower rate) and memory-bound
work. So CPU time may grow like the fastest of the three, and tensors like the plan; a row that grows by more than SLACK
times that is marked MORE.

Takes about 18 minutes.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from bench.growth_cell import Arithmetic, Cell, Sample

SLACK = 1.15
"""Factor by which the time or memory of a row may grow beyond the growth that the arithmetic explains."""
EXPERTS_WIDTH = 16384
"""Total width of all experts of a layer in the sweep `finer`."""
LIMIT = 300.0
"""Maximum seconds of a cell."""

Sweep = dict[int, Cell]


def sweeps(quick: bool) -> dict[str, Sweep]:
    """The cells of every sweep, by size. quick: each sweep has only two small sizes and few steps."""
    experts = (8, 16) if quick else (8, 16, 32, 64, 128, 256)
    lengths = (64, 128) if quick else (512, 1024, 2048, 4096, 8192, 16384)
    words = (512, 1024) if quick else (2048, 8192, 32768, 129280)
    ranks = (1, 2) if quick else (1, 2, 4, 8)
    cell = Cell(length=64, steps=1) if quick else Cell()

    def wide(number: int) -> tuple[str, ...]:
        return f"model.experts={number}", f"model.expert_width={EXPERTS_WIDTH // number}", "model.shared_experts=0"

    return {
        "experts": {n: replace(cell, sequences=8, overrides=(f"model.experts={n}",)) for n in experts},
        "finer": {n: replace(cell, sequences=8, overrides=wide(n)) for n in experts},
        "length": {n: replace(cell, sequences=1, length=n, steps=2 if n > 4096 else cell.steps) for n in lengths},
        "vocabulary": {n: replace(cell, overrides=(f"model.vocab_size={n}",)) for n in words},
        "dp": {n: replace(cell, dp=n) for n in ranks},
        "ep": {n: replace(cell, dp=n, ep=n) for n in ranks},
    }


def measure(cell: Cell) -> Sample:
    """Runs the cell in new processes, one per rank. Returns the wall times of the slowest rank, the mean CPU time of
    the ranks, and the largest memory peaks.

    If a rank fails or does not end, raises RuntimeError with the last output of this rank.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(cell.threads), "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as store, tempfile.TemporaryFile() as errors:
        words = sys.executable, "-m", "bench.growth_cell", "run", json.dumps(asdict(cell))
        ranks = [
            subprocess.Popen([*words, str(rank), store], stdout=subprocess.PIPE, stderr=errors, env=environment)
            for rank in range(cell.dp)
        ]
        deadline = time.monotonic() + LIMIT
        try:
            said = [rank.communicate(timeout=max(0.1, deadline - time.monotonic()))[0] for rank in ranks]
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{cell} did not end within {LIMIT:.0f} s") from error
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        if any(rank.returncode for rank in ranks):
            errors.seek(0)
            raise RuntimeError(f"{cell}: {errors.read().decode(errors='replace').strip()[-2000:]}")
    samples = [Sample(**json.loads(line)) for line in said]
    slowest = max(samples, key=lambda sample: sample.step)
    peak, tensors = max(one.peak for one in samples), max(one.tensors for one in samples)
    return replace(slowest, cpu=statistics.mean(one.cpu for one in samples), peak=peak, tensors=tensors)


def count(cells: list[Cell]) -> list[Arithmetic]:
    """Counts the arithmetic in a separate process. A child process inherits its parent's peak memory, so the parent
    must stay small."""
    words = [sys.executable, "-m", "bench.growth_cell", "count", json.dumps([asdict(cell) for cell in cells])]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return [Arithmetic(**fields) for fields in json.loads(done.stdout)]


def middle(samples: list[Sample]) -> Sample:
    """Medians of all rounds."""
    columns = zip(*(asdict(sample).values() for sample in samples), strict=True)
    return Sample(*(statistics.median(column) for column in columns))


def exponent(sizes: list[float], values: list[float]) -> float:
    """Slope of a straight line fitted to log(value) over log(size)."""
    x, y = ([math.log(one) for one in column] for column in (sizes, values))
    return statistics.linear_regression(x, y).slope


COLUMNS = ("cpu", "step", "compute", "update", "flops", "attention", "state", "peak", "tensors", "planned")
"""Fields of Sample and Arithmetic for which an exponent is computed."""


def rows(sweep: Sweep, samples: dict[int, list[Sample]], arithmetic: dict[int, Arithmetic]) -> list[dict]:
    """One row for each measured size: figures, exponents relative to the row above, and whether a figure grew by more
    than SLACK allows."""
    found: list[dict] = []
    for size in sweep:
        if not samples[size]:
            continue
        row = {"size": size} | asdict(middle(samples[size])) | asdict(arithmetic[size]) | {"rounds": len(samples[size])}
        if found:
            above = found[-1]
            ends = [above["size"], size]
            row["exponents"] = {name: exponent(ends, [above[name], row[name]]) for name in COLUMNS}
            grown = {name: row[name] / above[name] for name in COLUMNS}
            row["more_time"] = grown["cpu"] > SLACK * max(grown["flops"], grown["attention"], grown["state"])
            row["more_memory"] = grown["tensors"] > SLACK * grown["planned"]
        found.append(row)
    return found


def overall(found: list[dict]) -> dict[str, float]:
    """Exponents through all rows."""
    return {name: exponent([row["size"] for row in found], [row[name] for row in found]) for name in COLUMNS}


HEADS = {
    "cpu": ("CPU ms", 1e3), "step": ("wall ms", 1e3), "compute": ("fw+bw ms", 1e3), "update": ("update ms", 1e3),
    "flops": ("GFLOP", 1e-9), "attention": ("attention", 1e-9), "state": ("state MB", 1e-6), "peak": ("RSS MB", 1e-6),
    "tensors": ("tensors MB", 1e-6), "planned": ("plan MB", 1e-6),
}  # fmt: skip


def show(name: str, found: list[dict]) -> None:
    print(f"\n{name:>8}" + "".join(f"{HEADS[column][0]:>11}{'^':>6}" for column in COLUMNS))
    for row in found:
        line = f"{row['size']:8d}"
        for column in COLUMNS:
            slope = f"{row['exponents'][column]:6.2f}" if "exponents" in row else f"{'':6}"
            line += f"{HEADS[column][1] * row[column]:11.1f}{slope}"
        print(line + "  MORE time" * row.get("more_time", False) + "  MORE memory" * row.get("more_memory", False))
    if len(found) > 1:
        print(f"{'all':>8}" + "".join(f"{'':11}{slope:6.2f}" for slope in overall(found).values()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = tuple(sweeps(quick=True))
    parser.add_argument("--sweep", nargs="+", choices=names, default=names)
    parser.add_argument("--minutes", type=float, default=18.0, help="no round starts that would end later")
    parser.add_argument("--rounds", type=int, default=5, help="at most")
    parser.add_argument("--quick", action="store_true", help="one round of two small sizes each")
    parser.add_argument("--out", type=Path, default=Path("growth.json"))
    options = parser.parse_args()
    began = time.monotonic()
    chosen = {name: sweep for name, sweep in sweeps(options.quick).items() if name in options.sweep}
    cells = list(dict.fromkeys(cell for sweep in chosen.values() for cell in sweep.values()))
    arithmetic = dict(zip(cells, count(cells), strict=True))
    samples: dict[Cell, list[Sample]] = {cell: [] for cell in cells}
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {len(cells)} cells", flush=True)
    for number in range(1 if options.quick else options.rounds):
        started = time.monotonic()
        for cell in cells:
            samples[cell].append(measure(cell))
        taken = time.monotonic() - started
        print(f"round {number + 1}: {taken:.0f} s", flush=True)
        _write(options.out, chosen, samples, arithmetic)
        if time.monotonic() - began + taken > 60 * options.minutes:
            break
    for name, found in _tables(chosen, samples, arithmetic).items():
        show(name, found)
    print(f"\n{time.monotonic() - began:.0f} s; written to {options.out}")


def _tables(chosen: dict[str, Sweep], samples: dict[Cell, list[Sample]], arithmetic: dict[Cell, Arithmetic]) -> dict:
    return {
        name: rows(sweep, *({size: by[cell] for size, cell in sweep.items()} for by in (samples, arithmetic)))
        for name, sweep in chosen.items()
    }


def _write(
    path: Path, chosen: dict[str, Sweep], samples: dict[Cell, list[Sample]], arithmetic: dict[Cell, Arithmetic]
) -> None:
    report = {"cores": os.cpu_count(), "load": os.getloadavg(), "sweeps": {}}
    for name, found in _tables(chosen, samples, arithmetic).items():
        report["sweeps"][name] = {"rows": found, "exponents": overall(found)}
        report["sweeps"][name]["samples"] = {
            size: [asdict(sample) for sample in samples[cell]] for size, cell in chosen[name].items()
        }
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
