"""Test Sluice on this GPU: every check and every timing that needs a card.

    python -m bench.gpu [--part NAME ...] [--minutes MINUTES] [--out FOLDER]

Takes about 15 minutes at most. With `--minutes 17` there is room for the last two parts. Before it starts, it says
which parts it leaves out. Writes gpu.json (verdict.schema.json describes it) and gpu.html, one page to read and to send
back. Every line passes, fails, or was not tried with the reason; the exit code is 1 if any line fails. The parts:

PARTS
Every part has its own processes and time limit, so that a crash or a hang affects only one check. Without a GPU it is a
dry check, and says so: the same code compares torch's CPU operations, instead of the GPU's, with the CPU's compiled
code, at small sizes.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from bench.gpu.line import FAIL, NOT_TRIED, Line
from bench.gpu.machine import PATIENCE
from bench.gpu.page import draw, shown
from bench.gpu.parts import MINUTES, PARTS, BenchPart, fitting
from bench.gpu.run import run_part
from bench.gpu.verdict import GpuVerdict, PartFound, software


def main() -> int:
    listed = "".join(f"    {part.name:13} {part.title} ({part.seconds:.0f} s)\n" for part in PARTS.values())
    parser = argparse.ArgumentParser(
        description=__doc__.replace("PARTS\n", f"{listed}\n"), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--part", nargs="+", choices=tuple(PARTS), default=list(PARTS), metavar="NAME", help="only these"
    )
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="cpu: a dry check in any case"
    )
    parser.add_argument(
        "--minutes", type=minutes, default=MINUTES, help=f"longest time, {MINUTES} unless you say otherwise"
    )
    parser.add_argument("--out", type=Path, default=Path("."), metavar="FOLDER", help="where gpu.json and gpu.html go")
    options = parser.parse_args()
    verdict = start(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = fitting(options.part, options.minutes)
    announce(options.part, chosen, options.minutes)
    deadline = time.monotonic() + 60 * options.minutes
    for name in options.part:
        if name in chosen:
            print(f"\n{PARTS[name].title}", flush=True)
            verdict.parts.append(run(PARTS[name], "cuda" if verdict.on_gpu else "cpu", deadline))
        else:
            verdict.parts.append(
                left_out(PARTS[name], f"it may take {clock(PARTS[name])} of {options.minutes:g} minutes")
            )
        write(verdict, options.out)
    verdict.complete = True
    write(verdict, options.out)
    counts = verdict.counts()
    print(f"\n{', '.join(f'{count} {kind}' for kind, count in counts.items())} in {verdict.seconds:.0f} s")
    print(f"written to {options.out / 'gpu.json'} and {options.out / 'gpu.html'}")
    if not verdict.on_gpu:
        print("dry check: no CUDA device, nothing of this ran on a GPU")
    return 1 if counts[FAIL] else 0


def start(wanted: str) -> GpuVerdict:
    """An empty verdict on the device at hand."""
    import torch

    on_gpu = wanted != "cpu" and torch.cuda.is_available()
    if wanted == "cuda" and not on_gpu:
        sys.exit("--device cuda: torch finds no CUDA device that it can use; without the option this is a dry check")
    verdict = GpuVerdict(on_gpu, torch.cuda.get_device_name(0) if on_gpu else "a CPU", software())
    print(f"{verdict.device}, torch {torch.__version__}")
    if not on_gpu:
        print("no CUDA device: dry check on the CPU at small sizes, nothing below runs on a GPU")
    return verdict


def minutes(word: str) -> float:
    """A positive number."""
    value = float(word)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{word} is no number of minutes above 0")
    return value


def clock(part: BenchPart) -> str:
    """Its time, for a person."""
    return f"{part.seconds / 60:.1f}"


def announce(asked: list[str], chosen: list[str], minutes: float) -> None:
    """What will be done and what will not, before it is begun."""
    seconds = sum(PARTS[name].seconds for name in chosen)
    print(f"{len(chosen)} of {len(asked)} parts, {seconds / 60:.1f} minutes at most")
    for name in asked:
        if name not in chosen:
            print(f"left out: {name}, which may take {clock(PARTS[name])} minutes: --part {name} runs it alone")


def left_out(part: BenchPart, why: str) -> PartFound:
    """A part that has no time."""
    return PartFound(part.name, part.title, 0.0, 0.0, [Line("all checks", NOT_TRIED, why)])


def run(part: BenchPart, device: str, deadline: float) -> PartFound:
    """The part, in its own time or in what is left of all."""
    began = time.monotonic()
    allowed = min(part.seconds * (1.0 if device == "cuda" else PATIENCE), deadline - began)
    if allowed <= 0:
        return left_out(part, "the minutes were over")
    lines = run_part(part.name, device, allowed, show)
    return PartFound(part.name, part.title, round(time.monotonic() - began, 1), round(allowed, 1), lines)


def show(line: Line) -> None:
    figures = ", ".join(f"{name} {shown(value)}" for name, value in line.figures.items())
    rest = "; ".join(text for text in (line.reason, figures) if text)
    print(f"  {line.verdict:10}{line.name}{': ' if rest else ''}{rest}", flush=True)


def write(verdict: GpuVerdict, folder: Path) -> None:
    (folder / "gpu.json").write_text(json.dumps(verdict.record(), indent=1, allow_nan=False) + "\n")
    (folder / "gpu.html").write_text(draw(verdict))


if __name__ == "__main__":
    sys.exit(main())
