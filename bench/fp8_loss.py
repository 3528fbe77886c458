"""Loss of FP8 training against bf16 on the same seed and data, smoothed as in the paper (appendix B.1).

    python -m bench.fp8_loss [--conf tiny] [--steps 1000] [--only fp8,tensor] [--seeds 1,2,3] [--out runs/fp8_loss]
    [key=value ...]

Runs `python -m train` once per recipe and seed, one after another, each in its own run folder. A complete run is not
repeated, and an interrupted run resumes. Then it writes loss.json and loss.svg to --out: the relative difference of the
moving averages (decay 0.9) of the losses, per step, averaged over the seeds. Prints its largest and last value, and its
mean from step 100 on with the standard error over the seeds. Two runs of a small model differ by more than the effect
of FP8, even if both are bf16, so several seeds are needed to see it. The paper's bound is 0.25 %.

    fp8, fp8_ue8m0, mxfp8   the recipes of conf/precision
    tensor           one scale per tensor, everywhere
    block            gradients in 128x128 blocks, which made the paper's model diverge (B.2)
    rounding         bf16 in micro-batches of 4: the same arithmetic summed in another order, for the noise of a run
                     itself

Takes about 7 runs of 1000 steps.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

OPERANDS = ("activation", "weight", "gradient", "attention_output", "dispatched")
RECIPES = {
    "bf16": ["precision=bf16"],
    "rounding": ["precision=bf16", "micro_batch_size=4"],
    "fp8": ["precision=fp8"],
    "fp8_ue8m0": ["precision=fp8_ue8m0"],
    "mxfp8": ["precision=mxfp8"],
    "tensor": ["precision=fp8", *(f"precision.fp8.{operand}=e4m3/tensor/fp32" for operand in OPERANDS)],
    "block": ["precision=fp8", "precision.fp8.gradient=e4m3/128x128/fp32"],
}
BASE = "bf16"
DECAY = 0.9
BOUND = 0.0025
SETTLED = 100
"""First step that counts in the mean of the difference."""
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#a463f2")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--conf", default="tiny")
    arguments.add_argument("--steps", type=int, default=1000)
    arguments.add_argument("--out", type=Path, default=Path("runs/fp8_loss"))
    arguments.add_argument("--only", default="fp8,fp8_ue8m0,tensor,block", help="recipes, separated by commas")
    arguments.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[1])
    options, overrides = arguments.parse_known_args()
    names = [BASE, *options.only.split(",")]
    if unknown := set(names) - RECIPES.keys():
        arguments.error(f"--only: no recipe {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    losses = {name: [train(name, seed, options, overrides) for seed in options.seeds] for name in names}
    smooth = {name: [moving_average(loss) for loss in of_seeds] for name, of_seeds in losses.items()}
    by_seed = {
        name: [relative(*pair) for pair in zip(smooth[name], smooth[BASE], strict=True)]
        for name in names
        if name != BASE
    }
    difference = {name: [statistics.mean(at) for at in zip(*of, strict=True)] for name, of in by_seed.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    found = {"seeds": options.seeds, "loss": losses, "relative_difference": difference}
    (options.out / "loss.json").write_text(json.dumps(found))
    (options.out / "loss.svg").write_text(draw(difference))
    print(
        f"{'recipe':12s} {'largest':>9s} {'at step':>8s} {'last':>9s}  "
        f"mean from step {SETTLED} on (of all where there are fewer), seeds: {len(options.seeds)}"
    )
    for name, values in difference.items():
        step = max(range(len(values)), key=lambda i, values=values: abs(values[i]))
        mean, error = settled(by_seed[name])
        spread = "" if math.isnan(error) else f" +- {error:.3%}"
        print(f"{name:12s} {values[step]:9.3%} {step + 1:8d} {values[-1]:9.3%}  {mean:.3%}{spread}")


def settled(by_seed: list[list[float]]) -> tuple[float, float]:
    """Mean of the difference from step SETTLED on, and its standard error over the seeds (not a number for one)."""
    means = [statistics.mean(values[SETTLED:] or values) for values in by_seed]
    error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else math.nan
    return statistics.mean(means), error


def train(recipe: str, seed: int, options: argparse.Namespace, overrides: list[str]) -> list[float]:
    """Trains a recipe with a seed. Returns the main loss of every step."""
    name = f"{recipe}_{seed}"
    metrics = options.out / name / "metrics.jsonl"
    if len(read(metrics)) < options.steps:
        command = [sys.executable, "-m", "train", f"conf={options.conf}", f"name={name}", f"runs={options.out}"]
        command += [f"seed={seed}"]
        command += [f"steps={options.steps}", "log.sample_tokens=0", *overrides, *RECIPES[recipe]]
        subprocess.run(command, check=True)
    losses = read(metrics)
    if len(losses) < options.steps:
        raise SystemExit(f"{metrics} holds {len(losses)} of {options.steps} steps")
    return losses[: options.steps]


def read(metrics: Path) -> list[float]:
    """main_loss of every step. If a resume repeated a step, its later value."""
    if not metrics.exists():
        return []
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    by_step = {record["step"]: record["main_loss"] for record in records}
    return [by_step[step] for step in sorted(by_step)]


def moving_average(values: list[float]) -> list[float]:
    average, result = values[0], []
    for value in values:
        average = DECAY * average + (1 - DECAY) * value
        result.append(average)
    return result


def relative(values: list[float], base: list[float]) -> list[float]:
    return [value / other - 1 for value, other in zip(values, base, strict=True)]


def draw(difference: dict[str, list[float]], width: int = 720, height: int = 360) -> str:
    """Returns an SVG: the differences in per cent over the steps, with the paper's bound."""
    left, right, top, bottom = 60, width - 110, 20, height - 40
    steps = max(len(values) for values in difference.values())
    limit = 1.1 * max([2 * BOUND, *(abs(value) for values in difference.values() for value in values)])

    def x(step: int) -> float:
        return left + (right - left) * step / steps

    def y(value: float) -> float:
        return (top + bottom) / 2 - (bottom - top) / 2 * value / limit

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for value, dash in ((0.0, ""), (BOUND, "4 3"), (-BOUND, "4 3")):
        parts.append(
            f'<line x1="{left}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#888" stroke-dasharray="{dash}"/>'
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end" fill="#555">{value:.2%}</text>'
        )
    for number, (name, values) in enumerate(difference.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{x(step + 1):.1f},{y(value):.1f}" for step, value in enumerate(values))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="{right + 8}" y="{top + 14 + 18 * number}" fill="{colour}">{name}</text>')
    parts.append(
        f'<text x="{(left + right) / 2}" y="{height - 10}" text-anchor="middle" fill="#555">step, 1 to {steps}</text>'
    )
    parts.append(
        f'<text x="{left}" y="{top - 6}" fill="#555">loss against bf16, moving averages with decay {DECAY}</text>'
    )
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    main()
