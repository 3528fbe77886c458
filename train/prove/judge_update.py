"""Judges an update: gradient norm, weights, moments, moving average of the weights, biases."""

import torch
from torch import Tensor

from train.prove import reference_muon, reference_step
from train.prove.bounds import EXACT, SMALLEST, UNIT, Bound
from train.prove.comparison import Comparisons, in_each
from train.prove.evidence import Evidence, State, assemble
from train.prove.judge_state import state_after
from train.prove.reference_step import PlainPlan
from train.prove.updates import UPDATES, WeightUpdate, update_of

QUANTITIES = {
    "master": "master weights",
    "ema": "average of weights",
    "bias": "biases",
    "exp_avg": "first moments",
    "exp_avg_sq": "second moments",
}
"""Names of the kinds of state in the findings."""
ROUNDINGS = {"master": 4, "ema": 2, "bias": 2}
"""Maximum number of fp32 roundings in one update."""
STATE_ROUNDINGS = {kind: count for formula in UPDATES.values() for kind, count in formula.roundings.items()}
SMALLEST_BF16 = 2.0**-133
"""The smallest positive bf16 number."""


def judge_update(
    at: Comparisons, ranks: list[Evidence], before: State, loads: dict[str, Tensor], plan: PlainPlan, number: int
) -> State:
    """Judge an update, and return the state after it."""
    reduced, after, optim = assemble(ranks, "reduced"), state_after(at.config, ranks), at.values.optim
    at.same_names("state", after, before)
    norm = float(reference_step.global_norm(reduced))
    sums = Bound(16 * UNIT["fp32"], "sums of squares in fp32 by rows, 16 x 2^-24")
    for rank in ranks:
        at.compare("global norm", "all weights", rank.info.grad_norm, norm, sums, rank=rank)
    clip, factors = reference_step.clip_factor(norm, optim), _row_factors(at, ranks)
    if optim.clip:
        at.acted("optim.clip, steps", clip < 1)
    clipped = {name: gradient * clip for name, gradient in reduced.items()}
    _judge_exact(at, ranks, before, clipped, plan, number)
    for name, gradient in clipped.items():
        if f"master.{name}" not in after or f"master.{name}" not in before:
            continue
        formula, state = update_of(at.values, name, gradient.dim())
        names = [f"{kind}.{name}" for kind in ("master", *state)]
        held = [before[each] for each in names]
        one = WeightUpdate(at.values, name, reference_step.rate_of(optim, name, plan.lr), number)
        new = formula.make(one, held[0], gradient, *held[1:])
        sizes = formula.size_roundings(one, held, gradient, new)
        if name in factors:
            rows = factors[name].view(-1, 1)
            new, sizes = (new[0] * rows, *new[1:]), [sizes[0] + UNIT["fp32"] * new[0].abs(), *sizes[1:]]
        elif reference_step.decays(optim, gradient):
            _judge_decay(at, names[0], held[0], after[names[0]], new[0], sizes[0])
        for each, want, size in zip(names, new, sizes, strict=True):
            _judge_moved(at, each, after, want, before, size)
        if optim.ema_decay:
            average = f"ema.{name}"
            want = reference_step.moving_average(before[average], after[names[0]], optim.ema_decay)
            _judge_moved(at, average, after, want, before, _size(before[average], want, want - before[average]))
    for layer, load_E in loads.items():
        name = f"bias.{layer}"
        want, speed = reference_step.move_bias(before[name], load_E, plan.bias_speed), torch.tensor(plan.bias_speed)
        for rank, holder in [(None, after), *((rank, dict(rank.of_kind("own"))) for rank in ranks)]:
            _judge_moved(at, name, holder, want, before, _size(before[name], want, speed), rank)
    return after


def judge_biases(
    at: Comparisons, ranks: list[Evidence], before: State, loads: dict[str, Tensor], plan: PlainPlan
) -> None:
    """Judge the biases in check `exact`, which updates nothing else."""
    bound = Bound(4 * UNIT["fp64"], "two roundings of a sum in fp64")
    for rank in ranks:
        for name, bias in rank.of_kind("after"):
            want = reference_step.move_bias(before[name], loads[name.removeprefix("bias.")], plan.bias_speed)
            at.compare("biases", name, bias, want, bound, rank=rank)


def _judge_exact(
    at: Comparisons, ranks: list[Evidence], before: State, clipped: State, plan: PlainPlan, number: int
) -> None:
    """Judge the updates of complete matrices that ranks repeated in fp64."""
    found, gradients = assemble(ranks, "exact"), assemble(ranks, "exact_gradient")
    fp64 = Bound(
        EXACT,
        "fp64 rounds by 1e-16, and Newton-Schulz amplifies this by at most about 1e5; relative to the largest change",
    )
    fp32 = Bound(32 * UNIT["fp32"], "the factor of clipping in fp32, and one rounding of the result")
    for name, gradient in gradients.items():
        formula, state = update_of(at.values, name, gradient.dim())
        at.compare("clipped gradients", name, gradient, clipped[name], fp32)
        names = [f"{kind}.{name}" for kind in ("master", *state)]
        held = [before[each] for each in names]
        made = formula.make(
            WeightUpdate(at.values, name, reference_step.rate_of(at.values.optim, name, plan.lr), number),
            held[0],
            gradient,
            *held[1:],
        )
        for each, new, old in zip(names, made, held, strict=True):
            at.compare("updates in fp64", each, found[each], new, fp64, scale=float((new - old).abs().max()) or 1.0)
    if at.proof == "fp32":
        whole = {name for name, clip in clipped.items() if update_of(at.values, name, clip.dim())[0].is_whole}
        at.same_names("updates in fp64", gradients, whole)


def _row_factors(at: Comparisons, ranks: list[Evidence]) -> State:
    """Returns optim.qk_clip's row factors, from the recorded attention scores."""
    found: State = {}
    for rank in ranks:
        for name, scores_H in rank.of_kind("scores"):
            if not any(key.startswith(f"{name}.") for key in found):
                at.acted("optim.qk_clip, heads", int((scores_H > at.values.optim.qk_clip).sum()), len(scores_H))
            found |= reference_muon.qk_factors(at.values, name, scores_H)
    return found


def _size(before: Tensor, after: Tensor, moved: Tensor) -> Tensor:
    """Returns the magnitude of one fp32 rounding error per element."""
    return UNIT["fp32"] * (torch.maximum(before.abs(), after.abs()) + moved.abs())


def _judge_moved(
    at: Comparisons, name: str, got: State, want: Tensor, before: State, rounded: Tensor, rank: Evidence | None = None
) -> None:
    """Judge a tensor that an update changed. rounded: magnitude of one rounding error per element."""
    if name not in got:
        return
    kind, moments = name.split(".", 1)[0], at.config.precision.moments
    count = (ROUNDINGS | STATE_ROUNDINGS)[kind]
    allowed, why = count * rounded + SMALLEST, f"{count} roundings of fp32, relative to each element"
    if kind in STATE_ROUNDINGS and moments == "bf16":
        allowed, why = allowed + UNIT["bf16"] * want.abs() + SMALLEST_BF16, f"{why}, and one rounding of bf16"
    quantity = QUANTITIES.get(kind, kind)
    at.compare(quantity, name, got[name], want, Bound(1.0, why), rank=rank, measure=in_each(allowed, before[name]))


def _judge_decay(at: Comparisons, name: str, before: Tensor, got: Tensor, want: Tensor, rounded: Tensor) -> None:
    """Judge weight decay by a mean over all elements. The mean shows an error that is smaller than one element's
    rounding error."""
    square = before.square().sum().clamp_min(SMALLEST)
    error = float(((got - want) * before).sum() / square)
    own = float(rounded.square().sum().div(square).sqrt())
    why = "the factor of the decay is rounded once to fp32, for all weights, and each weight is rounded once"
    bound = Bound(1.25 * UNIT["fp32"] + 4 * own / before.numel() ** 0.5, why)
    at.compare("decay of weights", name, error, 0.0, bound, scale=1.0)
