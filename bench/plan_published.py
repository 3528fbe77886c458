"""Planned speeds beside the published speeds of other teams' jobs. Needs no GPU.

    python -m bench.plan_published [--only WORDS]

For all jobs of bench/published_jobs.py, which names their sources, prints the planned speed over the published speed.
Rates come from published timings of kernels and links (conf/hardware), none from these jobs, so the planned times are
not fitted. Their errors give the intervals that a plan shows: of tuned programs, and of all kinds for this program, which
no GPU has timed. An interval has the mean error of its jobs in its middle, where every source counts once, and is as wide
as four of five jobs of a further source need (Student's t). "Held" is the share of jobs in intervals made without their
source. A job that the host binds is in no interval.

Then DeepSeek's own job, part by part (2048 H800, 14.8T tokens; ISCA paper 2505.09343, table 4, MPFT column; V3 report,
table 1), with its software: DeepGEMM and DeepEP as first released (February 2025, closest to the job and in the month
of its profile), experts in balance. 1F, 1B and 1W are "forward time, input backward time, and weight backward time" of
actions that run alone, so a whole backward counts as both. Three plans:

    DualPipe's order     its own (bench/dualpipe.py), 16 stages of 4 layers as in its profile; the last with one layer,
                         the MTP module and the head. In pairs, the kernels of layers are launched for the 112 SMs that
                         transfers leave, as in the profile; head and loss are not
    the trainer's split  the split of `mode=plan`: dualpipev, `1, 30 x 2, 0` layers: one rank has the whole last stage,
                         with head and MTP module
    the split it names   the faster split that the plan names

The assignment of layers to stages is not published. The trace of DeepSeek's profile (one layer, forward and backward in
a pair, 4096 tokens, EP 64) is no input, except for its 112 SMs, which the V3 report also states (3.2.2: 20 of 132 for
transfers); its pieces are compared one by one. There, GEMMs for weight gradients run on two streams: their time is the
time in which any of them runs (the sum is 8.19 ms). Transfer rates come from DeepEP's own test: alone on the device, 24
SMs (20 in the profile), counts known before, as for gradients. Nobody has published the time of a dispatch that first
gets its counts from the host, as the forward dispatch does. The last row is the same job with our software,
`conf=deepseek_v3`.

Experts are balanced in these plans, as they were forced to be in the jobs. A layout that ran for others may not fit in
this trainer, which keeps other tensors and does not split layers: `lacks` is the missing memory.

Takes about a minute.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bench.dualpipe import dualpipe_actions
from bench.published_jobs import DEEPSEEK, OURS, SIXTEEN, PublishedJob, published_jobs
from conf.load import compose
from conf.schema import Config
from parallel.pipeline.orders import Action
from parallel.pipeline.simulate import simulate
from parallel.pipeline.split import split_as_given
from train.model.count import flops_per_token
from train.plan.budget import RunPlan, make_plan
from train.plan.job import layout_of
from train.plan.report.plan_record import reserve_words, verdict
from train.plan.search.changes import with_changes
from train.plan.search.cures import find_split
from train.plan.time.passes import Segment, overlapped
from train.plan.time.rates import OURS_UNTIMED, TUNED, load_rates
from train.plan.time.stages import Stages
from train.plan.time.step_time import StepTime, plan_time

PUBLISHED = {
    "step (s)": 19.926,
    "1F (s)": 1.13,
    "1B (s)": 1.99,
    "1W (s)": 0.48,
    "1F1B (s)": 13.95,
    "bubble (s)": 2.06,
    "optimizer (s)": 0.29,
    "TFLOP/s a GPU, causal": 385,
    "TFLOP/s a GPU, full": 432,
    "MFU causal (%)": 38.94,
    "MFU full (%)": 43.73,
    "K GPU hours per T tokens": 180,
    "M GPU hours for 14.8T": 2.664,
}
TRACE = {
    "pair of one layer": 32.25,
    "Wgrad products": 6.87,
    "routed products, F and Dgrad": 5.73,
    "dense products, F, Dgrad, again": 4.71,
    "attention backward": 4.25,
    "attention forward": 1.24,
    "permute and unpermute": 1.27,
    "casts and transposes": 4.17,
    "norms, SwiGLU, RoPE": 1.71,
    "dispatch forward, FP8": 4.35,
    "dispatch of gradients, FP8": 3.41,
    "both combines, bf16": 12.36,
}


@dataclass
class Seconds:
    """Seconds of a step by the parts of table 4."""

    step: float
    by_kind: dict[str, float]
    """Seconds of F, I (backward of inputs) and W actions that run alone, and of pairs; means over the ranks. A full
    backward is split into I and W."""
    bubble: float
    update: float


def seconds_by_kind(lines: Sequence[Sequence[Action]], length: Callable[[Action], float]) -> dict[str, float]:
    """Seconds by the kinds of `Seconds`. length: returns the seconds of an action."""
    total: dict[str, float] = defaultdict(float)
    for action in (action for line in lines for action in line):
        kind, seconds = action.kind, length(action) / len(lines)
        if kind == "B":
            weights = length(action._replace(kind="W")) / len(lines)
            total["W"] += weights
            kind, seconds = "I", seconds - weights
        total[kind] += seconds
    return total


def own(step: StepTime) -> Seconds:
    by_kind = seconds_by_kind(step.actions, step.length)
    return Seconds(step.step_seconds, by_kind, step.bubble_seconds, step.update.seconds)


def in_dualpipe(config: Config, step: StepTime) -> Seconds:
    """The parts of the recipe's step in DualPipe's order. step: the planned step."""
    stages = Stages(config, layout_of(config), load_rates(config, alone=False))
    stages.layers = split_as_given(SIXTEEN)
    last, left = len(stages.layers) - 1, 1 - stages.taken

    def held(segments: list[Segment], head: int | None) -> list[Segment]:
        slow = [replace(one, compute=one.compute / left, beside=one.beside / left) for one in segments]
        if head is not None:
            slow[head] = segments[head]
        return slow

    def length(action: Action) -> float:
        if action.halves:
            forward, backward = action.halves
            return overlapped(
                held(stages.directions(forward.stage).forward.segments, -1 if forward.stage == last else None),
                held(stages.directions(backward.stage).backward.segments, 0 if backward.stage == last else None),
                0.0,
            ).seconds
        if action.kind in "IW":  # this trainer's W recomputes norms and SwiGLU; DeepSeek's W need not
            stage = max(1, action.stage)  # torch cannot split the first; the next has as many weights
            whole, inputs = (stages.elapsed(Action(kind, stage, 0)).seconds for kind in "BI")
            weights = whole - inputs
            return weights if action.kind == "W" else stages.elapsed(action._replace(kind="B")).seconds - weights
        return stages.elapsed(action).seconds

    lines = dualpipe_actions(stages.layout.pp, stages.micro_batches)
    found = simulate(lines, length, step.transfer_seconds)
    update = step.update.seconds + step.update.hidden  # no paper says that DeepSeek overlaps a part of the update
    return Seconds(found.makespan + update, seconds_by_kind(lines, length), found.bubble * found.makespan, update)


def figures(config: Config, seconds: Seconds) -> dict[str, float]:
    """Computes the published quantities from the parts of a step."""
    devices, tokens = layout_of(config).world, config.batch_size * config.seq_len
    rate = tokens / seconds.step / devices
    causal, full = (rate * flops_per_token(config.model, config.seq_len, mask) for mask in (True, False))
    hours_per_token = seconds.step * devices / 3600 / tokens
    peak = config.hardware.bf16_flops
    kinds = seconds.by_kind
    return {
        "step (s)": seconds.step,
        "1F (s)": kinds["F"],
        "1B (s)": kinds["I"],
        "1W (s)": kinds["W"],
        "1F1B (s)": kinds["FB"],
        "bubble (s)": seconds.bubble,
        "optimizer (s)": seconds.update,
        "TFLOP/s a GPU, causal": causal / 1e12,
        "TFLOP/s a GPU, full": full / 1e12,
        "MFU causal (%)": 100 * causal / peak,
        "MFU full (%)": 100 * full / peak,
        "K GPU hours per T tokens": hours_per_token * 1e12 / 1e3,
        "M GPU hours for 14.8T": hours_per_token * 14.8e12 / 1e6,
    }


def pieces(config: Config) -> dict[str, float]:
    """Milliseconds of one layer with experts, with forward and backward in a pair. Kernels run on the SMs that
    transfers leave free, as in the trace."""
    stages = Stages(config, layout_of(config), load_rates(config, alone=False))
    stage = next(s for s in range(1, len(stages.layers) - 1) if stages.layers[s].start >= config.model.dense_layers)
    layers, made = len(stages.layers[stage]), stages.directions(stage)
    halves = Action("F", stage, 0), Action("B", stage, 0)

    def milliseconds(wanted: Callable[[str], bool]) -> float:
        work = made.forward.work + made.backward.work
        return 1e3 * sum(stages.rates.of(one) for one in work if wanted(one.kind)) / layers / (1 - stages.taken)

    def product(*names: str) -> Callable[[str], bool]:
        return lambda kind: kind.rpartition("_")[0].removeprefix("triton_") in names

    transfers = [[one.transfer for one in way.segments if one.transfer] for way in (made.forward, made.backward)]
    sent = [1e3 * sum(each[place::2]) / layers for each in transfers for place in range(2)]  # dispatch and combine
    return {
        "pair of one layer": 1e3 * stages.elapsed(Action("FB", stage, 0, halves)).seconds / layers,
        "Wgrad products": milliseconds(product("wgrad", "grouped_wgrad")),
        "routed products, F and Dgrad": milliseconds(product("grouped_fprop", "grouped_dgrad")),
        "dense products, F, Dgrad, again": milliseconds(product("fprop", "dgrad")),
        "attention backward": milliseconds(lambda kind: kind == "attention_backward"),
        "attention forward": milliseconds(lambda kind: kind == "attention_forward"),
        "permute and unpermute": milliseconds(lambda kind: kind in ("permute", "collect")),
        "casts and transposes": milliseconds(lambda kind: kind == "cast"),
        "norms, SwiGLU, RoPE": milliseconds(lambda kind: kind.startswith(("norm", "swiglu", "heads"))),
        "dispatch forward, FP8": sent[0],
        "dispatch of gradients, FP8": sent[2],
        "both combines, bf16": sent[1] + sent[3],
    }


def show(title: str, published: dict[str, float], columns: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}")
    print(f"  {'':33}{'published':>10}" + "".join(f"{name:>24}" for name in columns))
    for name, value in published.items():
        cells = "".join(
            f"{column[name]:14.2f} ({100 * (column[name] / value - 1):+6.1f} %)" for column in columns.values()
        )
        print(f"  {name:33}{value:10.2f}{cells}")


def fits(plan: RunPlan) -> str:
    """Whether the layout fits in memory with this trainer."""
    return f"  (in this trainer the layout {verdict(plan)}; {reserve_words(plan.reserve)})"


@dataclass(frozen=True)
class PlannedJob:
    """A published job and its plan."""

    job: PublishedJob
    speed: float
    """Planned tokens per second and device."""

    @property
    def error(self) -> float:
        """log(published time / planned time). Above 0, the planned speed is too high."""
        return math.log(self.speed / self.job.tokens_per_second)


FOUR_OF_FIVE = 0.9
"""Quantile (0.9) at which an interval that is symmetric about the middle holds four of five values."""


def plan_jobs(only: str = "") -> list[PlannedJob]:
    """Plans the published jobs whose source or name contains `only`."""
    jobs = (job for job in published_jobs() if only in f"{job.source}: {job.name}")
    return [PlannedJob(job, plan_time(compose(*job.overrides)).tokens_per_second_per_gpu) for job in jobs]


def interval_of(jobs: Sequence[PlannedJob]) -> tuple[float, float]:
    """The interval of log(time / planned time) that is expected to hold four of five jobs of a new source."""
    from scipy.stats import t  # takes a second to import

    sources: dict[str, list[float]] = defaultdict(list)
    for one in jobs:
        sources[one.job.source].append(one.error)
    count, middle = len(sources), float(np.mean([np.mean(each) for each in sources.values()]))
    squares = sum(float(np.mean((np.array(each) - middle) ** 2)) for each in sources.values())
    half = float(t.ppf(FOUR_OF_FIVE, count - 1)) * math.sqrt(squares / (count - 1) * (1 + 1 / count))
    return middle - half, middle + half


def held_share(jobs: Sequence[PlannedJob]) -> float:
    """Share of the jobs that lie in an interval which was computed without the jobs of their source."""
    held = []
    for source in {one.job.source for one in jobs}:
        low, high = interval_of([one for one in jobs if one.job.source != source])
        held += [low <= one.error <= high for one in jobs if one.job.source == source]
    return float(np.mean(held))


def by_interval(jobs: Sequence[PlannedJob]) -> dict[str, list[PlannedJob]]:
    """The jobs of each interval that a plan shows, and the jobs of the other kinds."""
    kinds = {kind: [one for one in jobs if one.job.kind == kind] for kind in ("tuned", "untuned", "native")}
    return {OURS_UNTIMED: [one for one in jobs if one.job.kind != "host-bound"], TUNED: kinds.pop("tuned"), **kinds}


def show_jobs(jobs: Sequence[PlannedJob]) -> None:
    print(f"  {'tokens/s a device':67}{'kind':>11}{'published':>10}{'plan':>9}{'error of the time':>19}")
    for one in jobs:
        job, away = one.job, 100 * math.expm1(-one.error)
        print(
            f"  {job.source:29}{job.name:38}{job.kind:>11}{job.tokens_per_second:10.0f}{one.speed:9.0f}{away:+17.1f} %"
        )
    for name, some in by_interval(jobs).items():
        if len({one.job.source for one in some}) < 3:
            continue
        errors, (low, high) = [math.expm1(-one.error) for one in some], interval_of(some)
        print(
            f"  {name}: {len(some)} jobs, mean error {100 * np.mean(np.abs(errors)):.1f} %, bias {100 * np.mean(errors):+.1f} %; "
            f"JobInterval({low:.3f}, {high:.3f}, {len(some)}, {held_share(some):.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plan_published")
    parser.add_argument("--only", default="", metavar="WORDS", help="jobs whose source and name have these words")
    show_jobs(plan_jobs(parser.parse_args().only))
    config = compose(*DEEPSEEK)
    plan = make_plan(config)
    columns = {
        "DualPipe's order": figures(config, in_dualpipe(config, plan.step)),
        "the trainer's split": figures(config, own(plan.step)),
    }
    if (named := find_split(plan)) is not None:
        columns["the split it names"] = figures(config, own(plan_time(with_changes(config, split=named.layers))))
    show("DeepSeek-V3 on 2048 H800", PUBLISHED, columns)
    budget = plan.budget
    print(
        f"  (with the trainer's split, all {budget.tokens / 1e12:.1f}T tokens cost {budget.cost / 1e6:.2f} M USD at 2 an hour)"
    )
    print(fits(plan))
    ours = compose(*OURS)
    show("One layer of experts in a pair, ms", TRACE, {"its means": pieces(config), "ours": pieces(ours)})
    plan = make_plan(ours)
    show("DeepSeek-V3 on 2048 H800, by our means", PUBLISHED, {"the trainer's split": figures(ours, own(plan.step))})
    print(fits(plan))


if __name__ == "__main__":
    main()
