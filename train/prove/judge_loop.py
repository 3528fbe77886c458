"""Compares a custom loop in check `loop` with the reference: log-probabilities, losses, tokens per expert, gradients
and biases.

Losses are divided by the tokens of the complete step. So the reference runs all calls of a step as one batch.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from train.data.batch import Batch
from train.prove import reference, reference_step
from train.prove.bounds import EXACT, UNIT, Bound
from train.prove.comparison import WHOLE_NUMBERS, Comparisons
from train.prove.evidence import Evidence, read_evidence
from train.prove.judge_gradients import sum_over_ranks
from train.prove.judge_model import backward_order
from train.prove.loop_steps import LOOP_STEPS, LoopStep, counting, loop_batches, loop_experts
from train.prove.recipe_values import Values
from train.prove.reference_losses import PlainCall, PolicyModel
from train.prove.samples import initial_biases, initial_weights

FP64 = Bound(1e-11, "fp64 rounds by 1e-16, and sums of any order stay far below")
WITH_LORA = Bound(EXACT, "fp64 rounds by 1e-16, and A and B of unit size enlarge it")


def judge_loop(at: Comparisons, folder: Path) -> None:
    """Judge the steps of check `loop`. folder: the ranks' evidence."""
    LoopJudge(at).judge([ranks for *_, ranks in read_evidence(folder, at.proof)])


class LoopJudge:
    """Judges the steps of check `loop` for one layout."""

    def __init__(self, at: Comparisons):
        self._at = at
        trained = reference.trained_shapes(at.values)
        self._weights = {
            name: weight.double().requires_grad_(name in trained) for name, weight in initial_weights(at.config).items()
        }
        self._biases = {name: bias.double() for name, bias in initial_biases(at.config).items()}
        self._batches = [*loop_batches(at.config)]
        self._experts_BTLK = loop_experts(at.config, self._batches[0])

    def judge(self, steps: Sequence[list[Evidence]]) -> None:
        """Judge all steps. steps: for each step, what all ranks recorded."""
        at = self._at
        assert len(steps) == len(LOOP_STEPS), "a rank left no evidence of a step"
        at.findings.device, at.phase = steps[0][0].info.device, "forward"
        for number, (step, ranks) in enumerate(zip(LOOP_STEPS, steps, strict=True), 1):
            at.step = number
            self._judge_step(step, ranks)

    def _judge_logprobs(self, step: LoopStep, ranks: list[Evidence]) -> None:
        """Judge the log-probabilities that ranks requested between forward_backward calls."""
        batch = self._batches[0]
        want_BT = self._plain([batch], replayed=True, with_balance=False).logprobs(batch)
        assert batch.documents_BS is not None
        counts_BT = counting(batch.documents_BS)
        for rank in ranks:
            got_BT = rank.tensors["logprobs/replayed"][:, 1:]
            mine = slice(rank.info.first, rank.info.first + len(got_BT))
            self._compare(
                "log-probabilities",
                step,
                "replayed experts",
                got_BT[counts_BT[mine]],
                want_BT[mine][counts_BT[mine]],
                rank,
            )

    def _judge_step(self, step: LoopStep, ranks: list[Evidence]) -> None:
        at = self._at
        plan = reference_step.plan_step(at.values, min(at.step, at.config.steps))
        batches = self._batches[: len(step.calls)]
        plain = self._plain(batches, step.replayed, step.has("balance"))
        rows = at.config.batch_size
        plain.calls = [
            PlainCall(call.losses, slice(place * rows, (place + 1) * rows)) for place, call in enumerate(step.calls)
        ]
        seen = reference.gradients(plain, _joined(batches), plan.mtp_weight if step.has("mtp") else 0.0)
        at.phase = "forward"
        if len(step.calls) > 1:
            self._judge_logprobs(step, ranks)
        for rank in ranks:
            self._compare("losses", step, "main_loss", rank.info.main_loss, seen.main, rank)
            for depth, (got, want) in enumerate(zip(rank.info.mtp_losses, seen.mtp, strict=True), 1):
                self._compare("losses", step, f"mtp_loss_{depth}", got, want, rank)
            self._compare("losses", step, "balance_loss", rank.info.balance_loss, seen.balance, rank)
            for got, (name, want) in zip(rank.info.loads, seen.loads.items(), strict=True):
                at.compare("loads", f"{name} by {step.name}", torch.tensor(got), want, WHOLE_NUMBERS, rank=rank)
        at.phase = "backward"
        trained = {name: weight for name, weight in self._weights.items() if weight.requires_grad}
        found = sum_over_ranks(ranks, reference.trained_shapes(at.values))
        at.same_names("gradients of weights", found, trained)
        for name in backward_order([name for name in trained if name in found], []):
            gradient = trained[name].grad
            want = torch.zeros_like(trained[name]) if gradient is None else gradient
            self._compare("gradients of weights", step, name, found[name], want)
            trained[name].grad = None
        at.phase = "update"
        for name, bias in self._biases.items():
            if step.has("biases"):
                self._biases[name] = reference_step.move_bias(bias, seen.loads[name], plan.bias_speed)
            for rank in ranks:
                if (got_E := rank.tensors.get(f"after/bias.{name}")) is not None:
                    bound = Bound(4 * UNIT["fp64"], "two roundings of a sum in fp64")
                    at.compare("biases", f"{name} by {step.name}", got_E, self._biases[name], bound, rank=rank)

    def _compare(
        self,
        quantity: str,
        step: LoopStep,
        name: str,
        got: Tensor | float,
        want: Tensor,
        rank: Evidence | None = None,
    ) -> None:
        bound = WITH_LORA if self._at.config.adapter.on else FP64
        self._at.compare(quantity, f"{name} by {step.name}", got, want, bound, rank=rank)

    def _plain(self, batches: list[Batch], replayed: bool, with_balance: bool) -> PolicyModel:
        """Returns the reference model for a step. batches: one per call."""
        values = self._at.values
        if not with_balance:
            values = Values(values, optim=Values(values.optim, balance_loss=0.0))
        choices = {}
        if replayed:
            ids_BTLK = self._experts_BTLK.clamp_min(0)  # -1 becomes 0: at these positions any expert is right
            for number, name in enumerate(reference.layers_with_experts(values.model)[: ids_BTLK.size(2)]):
                choices[f"{name}.moe.router"] = ids_BTLK[:, :, number].flatten(0, 1)
        plain = PolicyModel(values, self._weights, self._biases, choices)
        plain.made = []
        plain.tensors_BT = {name: tensor[:, 1:].double() for name, tensor in _joined(batches).tensors.items()}
        return plain


def _joined(batches: list[Batch]) -> Batch:
    """Joins the rows of all batches into one batch."""
    first = batches[0]
    assert all(one.documents_BS is not None and one.supervised_BS is not None for one in batches)
    fields = {
        name: torch.cat([getattr(one, name) for one in batches])
        for name in ("tokens_BS", "documents_BS", "supervised_BS")
    }
    tensors = {name: torch.cat([one.tensors[name] for one in batches]) for name in first.tensors}
    return replace(first, tensors=tensors, **fields)
