"""The planner beside what others have published of their own jobs. Needs no GPU.

    python -m bench.plan_published

DeepSeek's job (2048 H800, 14.8T tokens; ISCA paper 2505.09343, table 4, MPFT column; V3 report, table 1) is mapped to
pp 16, dp 128, ep 64, dualpipev, deepep with an FP8 wire, 120 micro-batches of one sequence. DualPipe puts 16 stages on 16
ranks, each twice; DualPipeV puts 32 stages on them, each once: the same work and bubble a rank. Which layers they gave to
which stage is not published, and this trainer wants at least one layer beside head and MTP in the last stage, so there are two
plans: with the trainer's own split, and with equally long stages, as if the map were perfect.

NVIDIA's job (1024 H100, Megatron Bridge 25.09, FP8, forced balance: 1297 tokens/s a GPU and 338 TFLOP/s, or 330 with blocks of
128x128, which is this recipe) uses tensor parallelism, which is not here: mapped to pp 8, dp 128, ep 64, interleaved with 2
stages a rank, batch 8192.

Both ran kernels of DeepGEMM's rate, so that is the backend here. Every rate comes from published timings of kernels (conf/hardware), none from these tables. The trace of DeepSeek's profile
(one layer, forward and backward in a pair, 4096 tokens, EP 64) is not an input either; its pieces are compared one by one.

Experts are balanced in these plans, as NVIDIA forces them to be. A layout that ran for others may not fit in this trainer, which keeps
other tensors and does not split layers: each table ends with the plan's verdict on that.

Takes about 10 seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass

from conf.load import compose
from conf.schema import Config
from parallel.pipeline.orders import Action, schedule_actions
from parallel.pipeline.simulate import simulate
from train.model.count import flops_per_token
from train.plan.budget import RunPlan, make_plan
from train.plan.job import layout_of
from train.plan.report.plan_record import reserve_words, verdict
from train.plan.time.rates import load_rates
from train.plan.time.stages import Stages
from train.plan.time.step_time import StepTime, plan_time

DEEPSEEK = (
    "conf=deepseek_v3", "data.path=none", "precision=fp8", "hardware=h800", "parallel.pp=16", "parallel.dp=128",
    "parallel.ep=64", "parallel.schedule=dualpipev", "parallel.dispatch=deepep", "parallel.wire=fp8", "plan.imbalance=1",
    "precision.fp8.backend=deepgemm",
)  # fmt: skip
NVIDIA = (
    "conf=deepseek_v3", "data.path=none", "precision=fp8", "hardware=h100", "parallel.pp=8", "parallel.dp=128",
    "parallel.ep=64", "parallel.schedule=interleaved", "parallel.dispatch=deepep", "parallel.wire=bf16", "batch_size=8192",
    "optim.batch_ramp_start=null", "optim.batch_ramp_steps=0", "plan.imbalance=1",
    "precision.fp8.backend=deepgemm",
)  # fmt: skip
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
    "Wgrad products": 8.19,
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
    """A step by its parts, as table 4 has them."""

    step: float
    by_kind: dict[str, float]
    bubble: float
    update: float


def even(config: Config) -> Seconds:
    """The step if all stages were as long as their mean."""
    layout = layout_of(config)
    stages = Stages(config, layout, load_rates(config, alone=False))
    actions = schedule_actions(config.parallel.schedule, layout.pp, stages.sizes.micro_batches)
    all_actions = [action for line in actions for action in line]
    ids = range(len(stages.layers))
    mean = {kind: sum(stages.elapsed(Action(kind, stage, 0)).seconds for stage in ids) / len(ids) for kind in "FBIW"}
    mean["I"] = mean["B"] - mean["W"]  # stage 0 does all of its backward in W
    pairs = {tuple(half.stage for half in one.halves): one for one in all_actions if one.halves}
    if pairs:
        mean["FB"] = sum(stages.elapsed(pair).seconds for pair in pairs.values()) / len(pairs)
    result = simulate(actions, lambda action: mean[action.kind])
    by_kind = {kind: sum(mean[kind] for one in all_actions if one.kind == kind) / layout.pp for kind in mean}
    update = plan_time(config).update.seconds
    return Seconds(result.makespan + update, by_kind, result.bubble * result.makespan, update)


def own(step: StepTime) -> Seconds:
    return Seconds(step.step_seconds, step.action_seconds, step.bubble_seconds, step.update.seconds)


def figures(config: Config, seconds: Seconds) -> dict[str, float]:
    """The published quantities from a step's parts."""
    devices, tokens = layout_of(config).world, config.batch_size * config.seq_len
    rate = tokens / seconds.step / devices
    causal, full = (rate * flops_per_token(config.model, config.seq_len, mask) for mask in (True, False))
    hours_per_token = seconds.step * devices / 3600 / tokens
    peak = config.hardware.bf16_flops
    kinds = {kind: seconds.by_kind.get(kind, 0.0) for kind in ("F", "B", "I", "W", "FB")}
    return {
        "step (s)": seconds.step,
        "1F (s)": kinds["F"],
        "1B (s)": kinds["B"] + kinds["I"],
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
    """Milliseconds of one layer of experts, forward and backward in a pair."""
    stages = Stages(config, layout_of(config), load_rates(config, alone=False))
    stage = next(s for s in range(1, len(stages.layers) - 1) if stages.layers[s].start >= config.model.dense_layers)
    layers, made, spread = len(stages.layers[stage]), stages.directions(stage), stages.spread
    halves = Action("F", stage, 0), Action("B", stage, 0)

    def milliseconds(wanted: Callable[[str], bool]) -> float:
        work = made.forward.work + made.backward.work
        return 1e3 * sum(stages.rates.of(one) for one in work if wanted(one.kind)) / layers

    def product(*names: str) -> Callable[[str], bool]:
        return lambda kind: kind.rpartition("_")[0] in names

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
        "dispatch forward, FP8": 1e3 * stages.exchange(spread.row_bytes),
        "dispatch of gradients, FP8": 1e3 * stages.exchange(spread.gradient_bytes),
        "both combines, bf16": 1e3 * (stages.exchange(spread.high_bytes) + stages.exchange(spread.high_gradient_bytes)),
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
    """Whether this trainer could run the layout."""
    return f"  (in this trainer the layout {verdict(plan)}; {reserve_words(plan.reserve)})"


def main() -> None:
    config = compose(*DEEPSEEK)
    plan = make_plan(config)
    columns = {
        "even stages": figures(config, even(config)),
        "the trainer's split": figures(config, own(plan.step)),
    }
    show("DeepSeek-V3 on 2048 H800", PUBLISHED, columns)
    budget = plan.budget
    print(
        f"  (with the trainer's split, all {budget.tokens / 1e12:.1f}T tokens cost {budget.cost / 1e6:.2f} M USD at 2 an hour)"
    )
    print(fits(plan))
    show("One layer of experts in a pair, ms", TRACE, {"plan": pieces(config)})
    config = compose(*NVIDIA)
    plan = make_plan(config)
    mapped = {"even stages": even(config), "the trainer's split": own(plan.step)}
    rates = {
        name: {"tokens/s a GPU": config.batch_size * config.seq_len / one.step / layout_of(config).world}
        for name, one in mapped.items()
    }
    show("NVIDIA's DeepSeek-V3 on 1024 H100", {"tokens/s a GPU": 1297 * 330 / 338}, rates)
    print("  (their figure for blocks of 128x128; 1297 with their other FP8 recipe)")
    print(fits(plan))


if __name__ == "__main__":
    main()
