"""What an update made of the state of a run, held against the reference: norm, masters, moments, average of the weights, biases,
and the loss on held-out sequences that the new weights have.
"""

import math

import torch
from torch import Tensor

from conf.schema import Optim
from train.prove import reference
from train.prove.bounds import UNIT, Bound, averaged
from train.prove.comparisons import Comparisons
from train.prove.evidence import Evidence
from train.prove.reference import PlainModel, Watched
from train.prove.samples import HELD_OUT, Samples

State = dict[str, Tensor]
"""Whole tensors by the name of their shards, fp64: master.NAME, exp_avg.NAME, exp_avg_sq.NAME, ema.NAME, bias.LAYER."""
QUANTITIES = {"master": "master weights", "exp_avg": "first moments", "exp_avg_sq": "second moments", "ema": "average of weights",
              "bias": "biases"}  # fmt: skip


ROUNDINGS = {"master": 4, "exp_avg": 32, "exp_avg_sq": 64, "ema": 2, "bias": 2}
"""Of fp32, at most, in what `update_roundings` and its like say that each is of. A gradient is multiplied by a factor of a norm that
may be off by 16 of them, and its square by that factor twice."""
STEP_ROUNDINGS = 8
"""How many times as many of them a step has as the weight that it is taken from: it is made of both moments."""
SMALLEST, SMALLEST_BF16 = 2.0**-126, 2.0**-133
"""What is smaller is rounded to steps of less than the format's precision, or to 0."""


class UpdateJudge(Comparisons):
    """Judges updates of one pass."""

    samples: Samples

    def _after(self, ranks: list[Evidence]) -> State:
        """The state, put together from the shards of all ranks."""
        return {name: tensor for name, tensor in assemble(ranks, "after").items() if not name.startswith("running.")}

    def _plain(self, before: State, choices: dict[str, Tensor] | None = None) -> PlainModel:
        weights = {}
        for name, master in under("master", before).items():
            rounded = master.bfloat16().double() if self.is_low else master
            weights[name] = rounded.clone().requires_grad_()
        return PlainModel(self.config, weights, under("bias", before), choices)

    def _judge_biases(self, ranks: list[Evidence], before: State, seen: Watched, speed: float) -> None:
        self.phase = "update"
        for rank in ranks:
            for name, bias in rank.of_kind("after"):
                layer = name.removeprefix("bias.")
                want = reference.move_bias(before[name], seen.loads[layer], speed)
                bound = Bound(4 * UNIT["fp64"], "two roundings of a sum in fp64")
                self._compare("biases", name, rank.info.rank, bias, want, bound)

    def _judge_update(self, ranks: list[Evidence], before: State, seen: Watched, plan: reference.PlainPlan) -> State:
        """The update of the gradients that the ranks had, which were judged by themselves."""
        self.phase = "update"
        reduced, after, optim, info = assemble(ranks, "reduced"), self._after(ranks), self.config.optim, ranks[0].info
        norm = float(reference.global_norm(reduced))
        fp32 = Bound(16 * UNIT["fp32"], "sums of squares in fp32 by rows, 16 x 2^-24")
        for rank in ranks:
            self._number("global norm", "all weights", rank.info.rank, rank.info.grad_norm, norm, fp32)
        factor = reference.clip_factor(norm, optim)
        self._number("applied updates", "all weights", None, float(info.applied), 1.0, Bound(0.0, "every step counts"))
        for rank in ranks:
            updates = float(rank.info.updates)
            self._number(
                "applied updates", "Adam's count", rank.info.rank, updates, self.step, Bound(0.0, "one a step")
            )
        self._same_names("state", after, before)
        want: State = {}
        rounded: State = {}
        for name, gradient in reduced.items():
            if f"master.{name}" not in after or f"master.{name}" not in before:
                continue
            names = [f"{kind}.{name}" for kind in ("master", "exp_avg", "exp_avg_sq")]
            held = [before[each] for each in names]
            decays, gradient = gradient.dim() >= 2, gradient * factor
            new = reference.adamw(optim, plan.lr, self.step, held[0], gradient, held[1], held[2], decays)
            want |= dict(zip(names, new, strict=True))
            rounded |= dict(zip(names, update_roundings(optim, plan.lr, self.step, held, gradient, new), strict=True))
            if decays:
                self._judge_decay(names[0], held[0], after[names[0]], new[0], rounded[names[0]])
            if optim.ema_decay:
                average = f"ema.{name}"
                want[average] = reference.average(before[average], after[names[0]], optim.ema_decay)
                moved = (want[average] - before[average]).abs()
                rounded[average] = UNIT["fp32"] * (torch.maximum(before[average].abs(), want[average].abs()) + moved)
        for layer, load in seen.loads.items():
            name = f"bias.{layer}"
            want[name] = reference.move_bias(before[name], load, plan.bias_speed)
            rounded[name] = UNIT["fp32"] * (torch.maximum(before[name].abs(), want[name].abs()) + plan.bias_speed)
        for name in want:
            if name in after:
                self._judge_moved(name, None, after[name], want[name], before[name], rounded[name])
        for rank in ranks:
            for name, bias in rank.of_kind("own"):
                self._judge_moved(name, rank.info.rank, bias.double(), want[name], before[name], rounded[name])
        if info.validation_loss is not None:
            self._judge_validation(ranks, after)
        return after

    def _judge_moved(
        self, name: str, rank: int | None, got: Tensor, want: Tensor, before: Tensor, rounded: Tensor
    ) -> None:
        kind = name.split(".", 1)[0]
        count = ROUNDINGS[kind]
        allowed, why = count * rounded + SMALLEST, f"{count} roundings of fp32, of each element by itself"
        if kind.startswith("exp_avg") and self.config.precision.moments == "bf16":
            allowed, why = allowed + UNIT["bf16"] / 2 * want.abs() + SMALLEST_BF16, f"{why}, and one of bf16"
        self._compare_moved(QUANTITIES[kind], name, rank, got, want, before, allowed, why)

    def _judge_decay(self, name: str, before: Tensor, got: Tensor, want: Tensor, rounded: Tensor) -> None:
        """The part of an error that is in proportion to the weights: a rounding of each weight by itself adds up to nothing, so that
        a decay shows that moves no weight by more than it is rounded.
        """
        square = before.square().sum().clamp_min(SMALLEST)
        error = float(((got - want) * before).sum() / square)
        own = float(rounded.square().sum().div(square).sqrt())
        bound = 1.25 * UNIT["fp32"] + 4 * own / before.numel() ** 0.5
        why = "the factor of the decay is rounded once to fp32, which moves all weights alike, and each weight once by itself"
        self._number("decay of weights", name, None, error, 0.0, Bound(bound, why), 1.0)

    def _judge_validation(self, ranks: list[Evidence], after: State) -> None:
        self.phase = "validation"
        bound = averaged(self.proof, self.config, HELD_OUT)
        batch = self.samples.batch(-HELD_OUT, HELD_OUT)
        with torch.no_grad():
            want = float(self._plain(after).losses(batch.tokens_BS, batch.documents_BS, with_mtp=False).main)
        for rank in ranks:
            self._number("held-out loss", "main_loss", rank.info.rank, rank.info.validation_loss, want, bound)


def update_roundings(
    optim: Optim, lr: float, update: int, before: list[Tensor], gradient: Tensor, new: tuple[Tensor, Tensor, Tensor]
) -> list[Tensor]:
    """What one rounding of fp32 is of each element of weight, mean and mean of squares: of the terms that are summed, as two of
    opposite signs may leave less than either is rounded by.
    """
    (weight, mean, _), unit, (beta1, beta2) = before, UNIT["fp32"], optim.betas
    terms = beta1 * mean.abs() + (1 - beta1) * gradient.abs()
    step = lr * terms / (1 - beta1**update) / ((new[2] / (1 - beta2**update)).sqrt() + optim.eps)
    size = torch.maximum(weight.abs(), new[0].abs())
    return [unit * (size + STEP_ROUNDINGS * step), unit * terms, unit * new[2]]


def under(kind: str, state: State) -> State:
    return {name.removeprefix(f"{kind}."): tensor for name, tensor in state.items() if name.startswith(f"{kind}.")}


def assemble(ranks: list[Evidence], kind: str) -> State:
    """Whole tensors, fp64, from the shards of all ranks. What no rank has is not a number."""
    found: State = {}
    for rank in ranks:
        for name, tensor in rank.of_kind(kind):
            offset, shape = rank.places[f"{kind}/{name}"]
            whole = found.setdefault(name, torch.full(shape, math.nan, dtype=torch.float64))
            whole.view(-1)[offset : offset + tensor.numel()] = tensor.double()
    return found
