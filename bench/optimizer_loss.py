"""Held-out loss of AdamW and Muon on the same data, against tokens and time, each at its own best rate.

    python -m bench.optimizer_loss [--shape tiny] [--steps 60] [--rates 2e-3,4e-3,8e-3] [--muon-rates 2e-3,4e-3,8e-3]
                                   [--seeds 1,2,3] [--out runs/optimizer_loss] [key=value ...]

For the first seed, each optimizer is trained once at every rate. The rate with the lowest final held-out loss is its
best rate, at which the other seeds are trained. Every run is a `python -m train` in its own run folder; a complete run
is not repeated. Writes loss.json and loss.svg to --out: means over the seeds, and the smallest and largest value as a
band. Time is steps times the median core-seconds of a step over all runs of that optimizer, which other work hardly
changes.

Takes about 40 minutes on one core.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from bench.train_step import SHAPES

OPTIMIZERS = ("adamw", "muon")
COLOURS = {"adamw": "#4269d0", "muon": "#ff725c"}
POINTS = 6
"""Number of validations in a run."""


class TrainedRun(NamedTuple):
    """Measurements of a run."""

    tokens: list[int]
    held_out: list[float]
    """Held-out loss at each validation."""
    seconds: list[float]
    """Core-seconds of every step except the first, which compiles. If the run has only one step, those of this step."""


class CoreClock:
    """A callback that records after every step how many core-seconds the process has used."""

    FILE = "core_seconds.txt"

    def on_step(self, run, step: int, record: dict) -> None:
        """The run calls this after each step."""
        with (run.folder / self.FILE).open("a") as file:
            file.write(f"{time.process_time()}\n")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", choices=tuple(SHAPES), default="tiny")
    arguments.add_argument("--steps", type=int, default=60)
    arguments.add_argument("--rates", type=lambda text: text.split(","), default=["2e-3", "4e-3", "8e-3"])
    arguments.add_argument("--muon-rates", type=lambda text: text.split(","), help="those of --rates by default")
    arguments.add_argument("--seeds", type=lambda text: text.split(","), default=["1", "2", "3"])
    arguments.add_argument("--out", type=Path, default=Path("runs/optimizer_loss"))
    options, overrides = arguments.parse_known_args()
    first, *others = options.seeds
    tried = {"adamw": options.rates, "muon": options.muon_rates or options.rates}
    found, rates = {}, {}
    for optimizer in OPTIMIZERS:
        swept = {rate: train(optimizer, rate, first, options, overrides) for rate in tried[optimizer]}
        best = min(swept, key=lambda rate: swept[rate].held_out[-1])
        for rate, run in swept.items():
            print(f"{optimizer:8s} rate {rate:>6s}  seed {first}  held-out loss {run.held_out[-1]:.4f}", flush=True)
        rates[optimizer] = best
        found[optimizer] = [swept[best], *(train(optimizer, best, seed, options, overrides) for seed in others)]
    per_step = {
        name: statistics.median(second for run in runs for second in run.seconds) for name, runs in found.items()
    }
    for name, runs in found.items():
        last = [run.held_out[-1] for run in runs]
        print(
            f"{name:8s} at {rates[name]}: {statistics.mean(last):.4f} ({min(last):.4f} to {max(last):.4f}) after "
            f"{runs[0].tokens[-1]} tokens, {per_step[name]:.2f} core-seconds a step"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    kept = {name: [run._asdict() for run in runs] for name, runs in found.items()}
    record = {"rates": rates, "step_seconds": per_step, "runs": kept}
    (options.out / "loss.json").write_text(json.dumps(record))
    (options.out / "loss.svg").write_text(draw(found, per_step, rates))


def train(optimizer: str, rate: str, seed: str, options: argparse.Namespace, overrides: list[str]) -> TrainedRun:
    """Trains with an optimizer, a learning rate and a seed."""
    name = f"{optimizer}_{rate}_{seed}"
    metrics = options.out / name / "metrics.jsonl"
    if len(read(metrics)) < options.steps:
        sizes = [f"model.{key}={'null' if value is None else value}" for key, value in SHAPES[options.shape].items()]
        depth = [] if options.shape == "tiny" else ["model.mtp_depth=0"]
        words = ["conf=tiny", f"name={name}", f"runs={options.out}", f"seed={seed}", f"steps={options.steps}"]
        words += [f"optim.lr={rate}", f"optim={optimizer}", *sizes, *depth, "checkpoint.every=0", "log.sample_tokens=0"]
        words += [
            "log.wandb=disabled",
            "callbacks=[{_target_: bench.optimizer_loss.CoreClock}]",
            f"log.validate_every={max(1, options.steps // POINTS)}",
            *overrides,
        ]
        run_forked(words)
    records, clock = read(metrics), [float(line) for line in (metrics.parent / CoreClock.FILE).read_text().split()]
    measured = [record for record in records if "validation_loss" in record]
    return TrainedRun(
        [record["tokens"] for record in measured],
        [record["validation_loss"] for record in measured],
        [later - earlier for earlier, later in pairwise(clock)] or clock,
    )


def run_forked(words: list[str]) -> None:
    """Runs `python -m train` with these arguments in a fork, so that all imports are already done."""
    import train.worker  # noqa: F401
    from parallel.zero.deepspeed_patches import import_deepspeed

    import_deepspeed(on_cuda=False)
    process = multiprocessing.get_context("fork").Process(target=_run, args=(words,))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"python -m train {' '.join(words)} ended with exit code {process.exitcode}")


def _run(words: list[str]) -> None:
    from conf.load import compose
    from train.__main__ import do

    sys.exit(do(compose(*words), alone=True))


def read(metrics: Path) -> list[dict]:
    """The record of every step."""
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def draw(
    found: dict[str, list[TrainedRun]], per_step: dict[str, float], rates: dict[str, str], width: int = 860
) -> str:
    """Returns an SVG with two plots: the losses over tokens, and the losses over time."""
    height, panel = 360, (width - 130) // 2
    top, bottom = 40, height - 50
    every = [loss for runs in found.values() for run in runs for loss in run.held_out]
    low, high = min(every), max(every)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]

    def y(loss: float) -> float:
        return bottom - (bottom - top) * (loss - low) / ((high - low) or 1.0)

    for number, unit in enumerate(("million tokens", "core-seconds")):
        left = 50 + number * (panel + 60)
        curves = {}
        for name, runs in found.items():
            tokens = runs[0].tokens
            steps = [(len(runs[0].seconds) + 1) * count / tokens[-1] for count in tokens]
            curves[name] = [step * per_step[name] for step in steps] if number else [count / 1e6 for count in tokens]
        right = max(max(along) for along in curves.values())
        for mark in range(5):
            loss, along = low + (high - low) * mark / 4, right * mark / 4
            parts.append(
                f'<line x1="{left}" x2="{left + panel}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" stroke="#ddd"/>'
                f'<text x="{left - 5}" y="{y(loss) + 4:.1f}" text-anchor="end" fill="#555">{loss:.2f}</text>'
                f'<text x="{left + panel * mark / 4:.1f}" y="{bottom + 16}" text-anchor="middle" fill="#555">{along:.3g}</text>'
            )
        parts.append(f'<text x="{left + panel / 2}" y="{height - 12}" text-anchor="middle" fill="#555">{unit}</text>')
        for place, (name, runs) in enumerate(found.items()):
            xs = [left + panel * along / right for along in curves[name]]
            by_point = list(zip(*(run.held_out for run in runs), strict=True))
            above = [f"{x:.1f},{y(max(losses)):.1f}" for x, losses in zip(xs, by_point, strict=True)]
            below = [f"{x:.1f},{y(min(losses)):.1f}" for x, losses in zip(xs, by_point, strict=True)]
            mean = [f"{x:.1f},{y(statistics.mean(losses)):.1f}" for x, losses in zip(xs, by_point, strict=True)]
            parts.append(f'<polygon points="{" ".join(above + below[::-1])}" fill="{COLOURS[name]}" opacity="0.2"/>')
            parts.append(f'<polyline points="{" ".join(mean)}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>')
            if number:
                parts.append(
                    f'<text x="{left + panel - 110}" y="{top + 14 + 18 * place}" fill="{COLOURS[name]}">{name}, rate {rates[name]}</text>'
                )
    parts.append(f'<text x="50" y="{top - 18}" fill="#555">held-out loss, mean and range of {len(runs)} seeds</text>')
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    main()
