"""What an update made of the state of a run, held against the reference: norm, masters, moments, average of the weights, biases,
and the loss on held-out sequences that the new weights have.
"""

import math

import torch
from torch import Tensor

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
                self._compare("biases", name, rank.info.rank, bias, want, self._bias_bound())

    def _judge_own_biases(self, ranks: list[Evidence], want: State) -> None:
        """Every rank's copy of the biases, not only the one that is saved."""
        for rank in ranks:
            for name, bias in rank.of_kind("own"):
                self._compare("biases", name, rank.info.rank, bias, want[name], self._bias_bound())

    def _bias_bound(self) -> Bound:
        unit = UNIT["fp64" if self.proof == "exact" else "fp32"]
        return Bound(4 * unit, "two roundings of a sum")

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
        want: State = {}
        for name, gradient in reduced.items():
            names = [f"{kind}.{name}" for kind in ("master", "exp_avg", "exp_avg_sq")]
            new = reference.adamw(
                optim, plan.lr, self.step, before[names[0]], gradient * factor, before[names[1]], before[names[2]],
                gradient.dim() >= 2,
            )  # fmt: skip
            want |= dict(zip(names, new, strict=True))
            if optim.ema_decay:
                want[f"ema.{name}"] = reference.average(before[f"ema.{name}"], after[names[0]], optim.ema_decay)
        for layer, load in seen.loads.items():
            want[f"bias.{layer}"] = reference.move_bias(before[f"bias.{layer}"], load, plan.bias_speed)
        self._same_names("state", after, want)
        bounds = self._update_bounds(plan.lr)
        for name in want:
            if name in after:
                kind = name.split(".", 1)[0]
                self._compare(QUANTITIES[kind], name, None, after[name], want[name], bounds[kind])
        self._judge_own_biases(ranks, want)
        if info.validation_loss is not None:
            self._judge_validation(ranks, after)
        return after

    def _update_bounds(self, lr: float) -> dict[str, Bound]:
        moments = "bf16" if self.config.precision.moments == "bf16" else "fp32"
        fp32 = Bound(64 * UNIT["fp32"], "some ten roundings of fp32, each element by itself: 64 x 2^-24")
        moment = (
            fp32 if moments == "fp32" else Bound(1.5 * UNIT["bf16"], "moments are kept in bf16: rounded once, 2^-8")
        )
        return {"master": fp32, "ema": fp32, "exp_avg": moment, "exp_avg_sq": moment, "bias": self._bias_bound()}

    def _judge_validation(self, ranks: list[Evidence], after: State) -> None:
        self.phase = "validation"
        bound = averaged(self.proof, self.config, HELD_OUT)
        batch = self.samples.batch(-HELD_OUT, HELD_OUT)
        with torch.no_grad():
            want = float(self._plain(after).losses(batch.tokens_BS, batch.documents_BS, with_mtp=False).main)
        for rank in ranks:
            self._number("held-out loss", "main_loss", rank.info.rank, rank.info.validation_loss, want, bound)


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
