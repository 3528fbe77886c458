"""Where the time of a pair of passes through two layers of experts goes on an H800, line by line.

    python -m bench.pair_budget

A forward and a backward of one layer each, run together as dualpipev does: DeepSeek-V3, 4096 tokens, experts over 64 devices. In milliseconds:

    trace        DeepSeek's published profile: measured by them (bench/plan_published.py)
    before       as examined on 2026-11-28, with the second hop of node_limited waited for where it started: estimated
    now          the plan of `conf=deepseek_v3 hardware=h800`: work counted from the model, times rates from published timings of kernels
                 (conf/hardware/h800.yaml), in the plan's order of events: estimated
    held         the same with `precision.fp8.hold_weights=true`, for which that layout lacks memory
    deepep       the same with `parallel.dispatch=deepep`
    model        the routed products and those of Wgrad at the rates of bench/fp8_model.py, from kernels that never wait to such that
                 wait in every step: estimated; the others are lines of `now`

Nothing here was measured on a device of ours.

Takes about a minute.
"""

from collections import defaultdict
from collections.abc import Sequence

from bench.fp8_model import SHAPES, WGRAD, Constants, ProductLoop, ProductSizes, fit, our_loops, tflops
from bench.plan_published import TRACE
from bench.published_jobs import OURS
from conf.load import compose
from parallel.pipeline.orders import Action
from train.plan.job import layout_of
from train.plan.time.rates import load_rates
from train.plan.time.stages import Stages

ROUTED, DENSE, WEIGHTS, ATTENTION = "routed Fprop, Dgrad", "dense Fprop, Dgrad", "Wgrad", "attention"
ROWS, WAITED, WALL = "casts, permutation, norms, SwiGLU, RoPE, sums", "transfers waited for", "wall"
SLOWED = "slower beside transfers"
BEFORE = {ROUTED: 7.8, DENSE: 3.8, WEIGHTS: 7.7, ATTENTION: 5.4, ROWS: 7.8, SLOWED: 0.7, WAITED: 8.1, WALL: 41.0}
"""What the host and gaps took stands as slower."""


def line_of(kind: str) -> str:
    """Of a kind of work, where it stands."""
    name = kind.removeprefix("triton_")
    if "wgrad" in name:
        return WEIGHTS
    if name.startswith("grouped"):
        return ROUTED
    if name.startswith(("fprop", "dgrad")):
        return DENSE
    return ATTENTION if name.startswith("attention") else ROWS


def budget(*words: str) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds by line, and TFLOP by line, of the recipe with these words."""
    config = compose(*OURS, *words)
    stages = Stages(config, layout_of(config), load_rates(config, alone=False))
    stage = next(s for s in range(1, len(stages.layers) - 1) if stages.layers[s].start >= config.model.dense_layers)
    layers, made = len(stages.layers[stage]), stages.directions(stage)
    took, tera = defaultdict(float), defaultdict(float)
    for work in made.forward.work + made.backward.work:
        took[line_of(work.kind)] += 1e3 * stages.rates.of(work) / layers
        tera[line_of(work.kind)] += work.flops / 1e12 / layers
    halves = Action("F", stage, 0), Action("B", stage, 0)
    elapsed = stages.elapsed(Action("FB", stage, 0, halves))
    computed, wall, waited = sum(took.values()), 1e3 * elapsed.seconds / layers, 1e3 * elapsed.exposed / layers
    return took | {SLOWED: wall - computed - waited, WAITED: waited, WALL: wall}, tera


def by_the_model(
    now: dict[str, float],
    tera: dict[str, float],
    loops: dict[str, ProductLoop],
    free: Constants,
) -> dict[str, float]:
    """The lines with our kernels' products at the rates of the model."""

    def rate(sizes: Sequence[ProductSizes], dense: str, grouped: str) -> float:
        seconds = sum(
            one.groups * one.m * one.n * one.k / tflops(loops[grouped if one.groups > 1 else dense], one, free)
            for one in sizes
        )
        return sum(one.groups * one.m * one.n * one.k for one in sizes) / seconds

    found = dict(now)
    found[ROUTED] = 1e3 * tera[ROUTED] / rate(SHAPES[4:], "product", "product of experts")
    found[WEIGHTS] = 1e3 * tera[WEIGHTS] / rate(WGRAD, "wgrad, added", "wgrad of experts, added")
    found[WALL] += found[ROUTED] + found[WEIGHTS] - now[ROUTED] - now[WEIGHTS]
    return found


def main() -> None:
    trace = {
        ROUTED: TRACE["routed products, F and Dgrad"],
        DENSE: TRACE["dense products, F, Dgrad, again"],
        WEIGHTS: TRACE["Wgrad products"],
        ATTENTION: TRACE["attention forward"] + TRACE["attention backward"],
        ROWS: sum(TRACE[name] for name in ("permute and unpermute", "casts and transposes", "norms, SwiGLU, RoPE")),
        WALL: TRACE["pair of one layer"],
    }
    now, tera = budget()
    free, loops = fit(), our_loops()
    columns = {
        "trace": trace, "before": BEFORE, "now": now,
        "held": budget("precision.fp8.hold_weights=true")[0], "deepep": budget("parallel.dispatch=deepep")[0],
        "model, never": by_the_model(now, tera, loops, free._replace(wait=0)), "waits": by_the_model(now, tera, loops, free),
    }  # fmt: skip
    print(f"{'ms':46}" + "".join(f"{name:>13}" for name in columns))
    for line in BEFORE:
        print(
            f"{line:46}"
            + "".join(f"{column[line]:13.1f}" if line in column else f"{'':13}" for column in columns.values())
        )


if __name__ == "__main__":
    main()
