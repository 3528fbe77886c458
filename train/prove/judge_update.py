"""What an update made of the state of a run, held against the reference: norm, masters, moments, average of the weights, biases,
and the loss on held-out sequences that the new weights have.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cluster.run_files import step_name
from conf.errors import UserError
from conf.schema import Config
from parallel.shard import whole
from train.checkpoint.read_shards import load_shards
from train.prove import reference_muon, reference_step
from train.prove.bounds import EXACT, UNIT, Bound, averaged
from train.prove.comparisons import Comparisons
from train.prove.evidence import Evidence
from train.prove.findings import ProofFindings
from train.prove.layouts import RunPart
from train.prove.reference import PlainModel, WatchedPass
from train.prove.samples import Samples, initial_weights
from train.prove.updates import UPDATES, WeightUpdate

State = dict[str, Tensor]
"""Whole tensors by the name of their shards, fp64: master.NAME, those of the optimizer's state, ema.NAME, bias.LAYER."""
QUANTITIES = {"master": "master weights", "ema": "average of weights", "bias": "biases"}
ROUNDINGS = {"master": 4, "ema": 2, "bias": 2}
"""Roundings of fp32, at most, in what is said below that each is of; those of the optimizer's state stand in train/prove/updates.py."""
STATE_ROUNDINGS = {kind: count for formula in UPDATES.values() for kind, count in formula.roundings.items()}
SMALLEST, SMALLEST_BF16 = 2.0**-126, 2.0**-133
"""What is smaller is rounded to steps of less than the format's precision, or to 0."""


@dataclass(frozen=True)
class Tally:
    """What a run has behind it."""

    updates: int = 0
    samples: int = 0
    skipped: int = 0


class UpdateJudge(Comparisons):
    """Judges updates of one pass."""

    def __init__(self, proof: str, config: Config, findings: ProofFindings, checkpoints: Path):
        """checkpoints: folder of those that the ranks wrote."""
        super().__init__(proof, config, findings)
        self.samples = Samples(config)
        self.tally = Tally()
        self.run: RunPart | None = None
        """To which the step belongs."""
        self._checkpoints = checkpoints

    def _after(self, ranks: list[Evidence]) -> State:
        """The state, put together from the shards of all ranks."""
        found = {name: tensor for name, tensor in assemble(ranks, "after").items() if not name.startswith("running.")}
        if self.config.adapter.on:  # the biases belong to the base, which is not saved
            found |= {name: bias.double() for rank in ranks for name, bias in rank.of_kind("own")}
        return found

    def _plain(self, before: State, choices: dict[str, Tensor] | None = None) -> PlainModel:
        weights = {}
        masters = under("master", before)
        for name, master in (self._base() | masters).items():
            rounded = master.bfloat16().double() if self.is_low else master
            weights[name] = rounded.clone().requires_grad_(name in masters)
        return PlainModel(self.config, weights, under("bias", before), choices)

    def _base(self) -> State:
        """What an adapter is trained beside, which no step moves; without one nothing."""
        if not self.config.adapter.on:
            return {}
        return {
            name: weight.double() for name, weight in initial_weights(self.config).items()
        }  # pairs are in the state

    def _judge_biases(self, ranks: list[Evidence], before: State, seen: WatchedPass, speed: float) -> None:
        self.phase = "update"
        for rank in ranks:
            for name, bias in rank.of_kind("after"):
                layer = name.removeprefix("bias.")
                want = reference_step.move_bias(before[name], seen.loads[layer], speed)
                bound = Bound(4 * UNIT["fp64"], "two roundings of a sum in fp64")
                self._compare("biases", name, rank.info.rank, bias, want, bound)

    def _judge_update(
        self, ranks: list[Evidence], before: State, seen: WatchedPass, plan: reference_step.PlainPlan
    ) -> State:
        """The update of the gradients that the ranks had, which were judged by themselves."""
        self.phase = "update"
        reduced, after, optim = assemble(ranks, "reduced"), self._after(ranks), self.config.optim
        norm = float(reference_step.global_norm(reduced))
        fp32 = Bound(16 * UNIT["fp32"], "sums of squares in fp32 by rows, 16 x 2^-24")
        for rank in ranks:
            self._number("global norm", "all weights", rank.info.rank, rank.info.grad_norm, norm, fp32)
        factor = reference_step.clip_factor(norm, optim)
        self._judge_applied(ranks, 1.0, "every step counts")
        self._count(ranks, plan, updates=1)
        self._same_names("state", after, before)
        self._judge_exact(ranks, before, {name: gradient * factor for name, gradient in reduced.items()}, plan)
        factors = self._row_factors(ranks)
        want: State = {}
        rounded: State = {}
        for name, gradient in reduced.items():
            if f"master.{name}" not in after or f"master.{name}" not in before:
                continue
            rule = optim.facts.choose_rule(name, gradient.dim())
            formula, kinds = UPDATES[rule.formula], ("master", *rule.state)
            names = [f"{kind}.{name}" for kind in kinds]
            held = [before[each] for each in names]
            gradient = gradient * factor
            lr = reference_step.rate_of(optim, name, plan.lr)
            one = WeightUpdate(self.config, name, lr, self.tally.updates)
            new = formula.make(one, held[0], gradient, *held[1:])
            sizes = formula.size_roundings(one, held, gradient, new)
            if name in factors:
                rows = factors[name].view(-1, 1)
                new, sizes = (new[0] * rows, *new[1:]), [sizes[0] + UNIT["fp32"] * new[0].abs(), *sizes[1:]]
            want |= dict(zip(names, new, strict=True))
            rounded |= dict(zip(names, sizes, strict=True))
            if reference_step.decays(optim, gradient) and name not in factors:
                self._judge_decay(names[0], held[0], after[names[0]], new[0], rounded[names[0]])
            if optim.ema_decay:
                average = f"ema.{name}"
                want[average] = reference_step.moving_average(before[average], after[names[0]], optim.ema_decay)
                moved = (want[average] - before[average]).abs()
                rounded[average] = UNIT["fp32"] * (torch.maximum(before[average].abs(), want[average].abs()) + moved)
        for layer, load_E in seen.loads.items():
            name = f"bias.{layer}"
            want[name] = reference_step.move_bias(before[name], load_E, plan.bias_speed)
            rounded[name] = UNIT["fp32"] * (torch.maximum(before[name].abs(), want[name].abs()) + plan.bias_speed)
        for name in want:
            if name in after:
                self._judge_moved(name, None, after[name], want[name], before[name], rounded[name])
        for rank in ranks:
            for name, bias in rank.of_kind("own"):
                self._judge_moved(name, rank.info.rank, bias.double(), want[name], before[name], rounded[name])
        self._judge_validation(ranks, after)
        return after

    def _judge_exact(
        self, ranks: list[Evidence], before: State, clipped: State, plan: reference_step.PlainPlan
    ) -> None:
        """The updates that the ranks made in fp64 of the same gradients. clipped: those, as the reference clips them."""
        found, gradients, optim = assemble(ranks, "exact"), assemble(ranks, "exact_gradient"), self.config.optim
        fp64 = Bound(
            EXACT, "fp64 rounds by 1e-16, and Newton-Schulz multiplies that by some 1e5 at most; of the largest change"
        )
        fp32 = Bound(32 * UNIT["fp32"], "the factor of clipping in fp32, and one rounding of the product")
        for name, gradient in gradients.items():
            rule = optim.facts.choose_rule(name, gradient.dim())
            self._compare("clipped gradients", name, None, gradient, clipped[name], fp32)
            names = [f"{kind}.{name}" for kind in ("master", *rule.state)]
            held = [before[each] for each in names]
            one = WeightUpdate(self.config, name, plan.lr, self.tally.updates)
            for each, new, old in zip(
                names, UPDATES[rule.formula].make(one, held[0], gradient, *held[1:]), held, strict=True
            ):
                moved = float((new - old).abs().max()) or 1.0
                self._compare("updates in fp64", each, None, found[each], new, fp64, moved)
        whole = {name for name in clipped if optim.facts.choose_rule(name, clipped[name].dim()).is_whole}
        if self.proof == "fp32":
            self._same_names("updates in fp64", gradients, whole)

    def _row_factors(self, ranks: list[Evidence]) -> State:
        """Factors of the rows of weights that the limit of attention scores scales, from the scores that the ranks acted on."""
        found: State = {}
        for rank in ranks:
            for name, scores_H in rank.of_kind("scores"):
                found |= reference_muon.qk_factors(self.config, name, scores_H)
        return found

    def _judge_skip(self, ranks: list[Evidence], before: State, plan: reference_step.PlainPlan) -> State:
        """A step in which one rank had a gradient that is not finite: on every rank it moves nothing but the position in the data."""
        self.phase = "update"
        self._judge_applied(ranks, 0.0, "a gradient that is not finite on one rank skips the step on all")
        self._count(ranks, plan, skipped=1)
        after, same = self._after(ranks), Bound(0.0, "bit for bit")
        self._same_names("state", after, before)
        for name in [name for name in before if name in after]:
            self._compare("state after a skipped step", name, None, after[name], before[name], same)
        for rank in ranks:
            for name, bias in rank.of_kind("own"):
                self._compare("state after a skipped step", name, rank.info.rank, bias, before[name], same)
        self._judge_validation(ranks, after)
        return after

    def _judge_applied(self, ranks: list[Evidence], want: float, why: str) -> None:
        for rank in ranks:
            self._number(
                "applied updates", "all weights", rank.info.rank, float(rank.info.applied), want, Bound(0.0, why)
            )

    def _count(self, ranks: list[Evidence], plan: reference_step.PlainPlan, updates: int = 0, skipped: int = 0) -> None:
        held = self.tally
        self.tally = Tally(held.updates + updates, held.samples + plan.batch_size, held.skipped + skipped)
        self._judge_tally(ranks)

    def _judge_tally(self, ranks: list[Evidence]) -> None:
        """What every rank says that the run has behind it."""
        exact, held = Bound(0.0, "whole numbers"), self.tally
        for rank in ranks:
            info, who = rank.info, rank.info.rank
            self._number("applied updates", "Adam's count", who, float(info.updates), held.updates, exact)
            self._number("position in the data", "samples", who, float(info.samples), held.samples, exact)
            self._number("skipped steps", "the run", who, float(info.skipped), held.skipped, exact)

    def _judge_written(self, state: State) -> None:
        """The checkpoint of this step on disk."""
        self.phase = "checkpoint"
        path = self._checkpoints / step_name(self.step)
        own = {name for name in state if not (self.config.adapter.on and name.startswith("bias."))}
        found = {name: torch.full_like(tensor, math.nan) for name, tensor in state.items() if name in own}
        try:
            load_shards(path, {name: whole(tensor) for name, tensor in found.items()})
        except (OSError, UserError) as error:
            self._fail("state in a checkpoint", path.name, None, math.nan, math.nan, str(error))
            return
        for name, tensor in found.items():
            self._compare("state in a checkpoint", name, None, tensor, state[name], Bound(0.0, "bit for bit"))

    def _judge_moved(
        self, name: str, rank: int | None, got: Tensor, want: Tensor, before: Tensor, rounded: Tensor
    ) -> None:
        kind = name.split(".", 1)[0]
        count = (ROUNDINGS | STATE_ROUNDINGS)[kind]
        allowed, why = count * rounded + SMALLEST, f"{count} roundings of fp32, of each element by itself"
        if kind in STATE_ROUNDINGS and self.config.precision.moments == "bf16":
            allowed, why = allowed + UNIT["bf16"] * want.abs() + SMALLEST_BF16, f"{why}, and one of bf16"
        quantity = (QUANTITIES | dict(self.config.optim.facts.meanings))[kind]
        self._compare_moved(quantity, name, rank, got, want, before, allowed, why)

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
        """Judge a validation where it is time for one: after the last step of each part."""
        self.phase, count = "validation", self.config.log.validation_sequences
        if self.run is None or self.step != self.run.last:
            return
        bound = averaged(self.proof, self.config, count)
        batch = self.samples.batch(-count, count)
        with torch.no_grad():
            want = float(self._plain(after).losses(batch, with_mtp=False).main)
        for rank in ranks:
            got = math.nan if rank.info.validation_loss is None else rank.info.validation_loss
            self._number("held-out loss", "main_loss", rank.info.rank, got, want, bound)


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
