"""Compares a step of the complete model with the reference's step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from train.prove import reference
from train.prove.bounds import Bound, averaged, chosen, computed
from train.prove.comparison import WHOLE_NUMBERS, Comparisons, size_of
from train.prove.evidence import Evidence, assemble, calls_by_name, count_keys, depth_of, places_of
from train.prove.high_precision import choice_excess, key_excess
from train.prove.judge_gradients import sum_over_ranks
from train.prove.perturbed import PerturbedRuns, ReferenceStep
from train.prove.reference import PlainModel
from train.prove.samples import Samples

StepPart = Callable[[ReferenceStep], Tensor]
"""A function that selects one tensor of a reference step."""


@dataclass
class WholeModel:
    """The ranks' and the reference's results of one complete step."""

    at: Comparisons
    ranks: list[Evidence]
    want: ReferenceStep
    perturbed: PerturbedRuns | None
    """Perturbed runs of the reference; None for a check in fp64."""
    batch_size: int

    def judge_forward(self) -> None:
        """Judge outputs in order, then losses, tokens per expert, attention scores."""
        at, seen, made = self.at, self.want.seen, calls_by_name(self.ranks, "forward")
        for name, value in seen.values.items():
            if name.endswith((".biased", ".index")) or (name == "embedding" and name not in made):
                continue  # not recorded if two chunks have an embedding; a fault then shows in the next layer
            if name not in made:
                at.fail("outputs", name, "no rank computed it")
            for rank, number, got in made.get(name, ()):
                if name.endswith(".ids"):
                    self._judge_choice(name.removesuffix(".ids"), rank, number, got)
                elif name.endswith(".keys"):
                    self._judge_keys(name.removesuffix(".keys"), rank, number, got)
                else:
                    part = partial(self._output, name, rank, number, got.size(1) if name == "embedding" else None)
                    self._compare("outputs", name, rank, got, part, size_of(value, at.is_rounded))
        for rank in self.ranks:
            self._judge_losses(rank)
            for name, got in rank.of_kind("scores"):
                self._compare("attention scores", name, rank, got, lambda step, name=name: step.seen.scores[name])

    def judge_backward(self) -> None:
        """Judge gradients from the last part to the first."""
        at, came, wanted = self.at, calls_by_name(self.ranks, "backward"), self.want.gradients
        exact, shapes = at.proof == "exact", reference.trained_shapes(at.values)
        found = sum_over_ranks(self.ranks, shapes) if exact else assemble(self.ranks, "reduced")
        at.same_names("gradients of weights", found, wanted)
        for name in backward_order(list(wanted), list(came)):
            if name in wanted and name in found:
                self._compare(
                    "gradients of weights", name, None, found[name], lambda step, name=name: step.gradients[name]
                )
            for rank, number, got in came.get(name, ()):
                if (gradient := self.want.seen.values[name].grad) is not None:
                    scale = size_of(gradient * rank.info.dp * rank.info.cp, at.is_rounded)
                    part = partial(self._output_gradient, name, rank, number)
                    self._compare("gradients of outputs", name, rank, got, part, scale)

    def _compare(
        self,
        quantity: str,
        name: str,
        rank: Evidence | None,
        got: Tensor | float,
        part: StepPart,
        scale: float | None = None,
        bound: Bound | None = None,
    ) -> None:
        """Compare a rank's tensor with the tensor that `part` selects from the reference's step."""
        bound, widen = bound or computed(self.at.proof, self.at.config), partial(self._widen, part, self.at.is_rounded)
        self.at.compare(quantity, name, got, part(self.want), bound, rank=rank, scale=scale, widen=widen)

    def _widen(self, part: StepPart, by_norm: bool, bound: Bound, scale: float) -> Bound:
        if self.perturbed is None:
            return bound
        wider = self.perturbed.bound(part, part(self.want).detach(), scale, by_norm)
        return max(bound, wider, key=lambda one: one.value)

    def _output(self, name: str, rank: Evidence, number: int, count: int | None, step: ReferenceStep) -> Tensor:
        """Returns the reference's output for one micro-batch of a rank."""
        return self._here(step.seen.values[name], name, rank, number, count)

    def _output_gradient(self, name: str, rank: Evidence, number: int, step: ReferenceStep) -> Tensor:
        gradient = step.seen.values[name].grad
        assert gradient is not None
        return self._here(gradient * (rank.info.dp * rank.info.cp), name, rank, number)

    def _here(self, value: Tensor, name: str, rank: Evidence, number: int, count: int | None = None) -> Tensor:
        """Returns the elements of `value` that belong to a rank's micro-batch."""
        by_sample = value if value.size(0) == self.batch_size else value.unflatten(0, (self.batch_size, -1))
        return by_sample[rank.rows(number)][:, self._places(rank, name, count)]

    def _places(self, rank: Evidence, name: str, count: int | None) -> list[int]:
        """Returns the positions for which a rank has this output.

        count: number of recorded positions, including an embedding's extra positions for MTP modules. None: the
        positions that `places_of` returns.
        """
        config, info = self.at.config, rank.info
        here = places_of(info, config.seq_len, depth_of(name))
        if info.cp == 1 or count in (None, len(here)):
            return here
        size, last = config.seq_len // (2 * info.cp), config.seq_len - depth_of(name)
        ends = [(piece + 1) * size for piece in (info.cp_rank, 2 * info.cp - 1 - info.cp_rank)]
        return here + [t for end in ends for t in range(end, min(end + config.model.mtp_depth, last))]

    def _judge_choice(self, name: str, rank: Evidence, number: int, ids: Tensor) -> None:
        """Judge the chosen experts. Check `exact` requires the reference's experts. Other checks allow experts with
        equal scores, within rounding errors."""
        at = self.at
        bound = chosen(at.proof, at.config)
        if at.proof == "exact":
            want = self._output(f"{name}.ids", rank, number, None, self.want)
            at.compare("chosen experts", name, ids, want, bound, rank=rank, scale=1.0)
            return
        scores = partial(self._output, f"{name}.biased", rank, number, None)

        def widen(bound: Bound, _: float) -> Bound:
            """Returns a wider bound on the difference of two router scores: twice the bound on one score."""
            wider = self._widen(scores, False, Bound(bound.value / 2, bound.reason), 1.0)
            return Bound(2 * wider.value, wider.reason)

        excess = choice_excess(at.values.model, scores(self.want).flatten(0, -2), ids)
        at.compare("chosen experts", name, excess, 0.0, bound, rank=rank, scale=1.0, widen=widen)

    def _judge_keys(self, name: str, rank: Evidence, number: int, keys_BTK: Tensor) -> None:
        """Judge the keys that sparse attention chose.

        Check `exact` requires the reference's keys. Other checks require allowed keys of the right number, with the
        best scores within rounding errors.
        """
        at, chooser = self.at, self._chooser(name)
        index_of = partial(self._output, f"{chooser}.index", rank, number, None)
        index_BTS, want_BTS = index_of(self.want).detach(), self._output(f"{name}.keys", rank, number, None, self.want)
        got_BTS, top_k = count_keys(keys_BTK, index_BTS.size(-1)), at.config.model.sparse.top_k
        seen_BTS = index_BTS > -math.inf
        if at.proof != "exact":
            at.compare(
                "chosen keys", f"{name}, one by one", got_BTS, (got_BTS > 0) & seen_BTS, WHOLE_NUMBERS, rank=rank
            )
            counts = got_BTS.sum(-1), seen_BTS.sum(-1).clamp(max=top_k)
            at.compare("chosen keys", f"{name}, their number", *counts, WHOLE_NUMBERS, rank=rank)
        if at.proof == "exact" or chooser != name:
            at.compare("chosen keys", name, got_BTS, want_BTS, WHOLE_NUMBERS, rank=rank)
            return
        bound, scale = computed(at.proof, at.config), size_of(index_BTS[seen_BTS], False)

        def widen(bound: Bound, _: float) -> Bound:
            """Returns the bound on the error of an index score."""
            return self._widen(lambda step: index_of(step).nan_to_num(neginf=0.0), False, bound, scale)

        excess = key_excess(index_BTS, got_BTS > 0, top_k)
        at.compare("chosen keys", f"{name}, their scores", excess, 0.0, bound, rank=rank, scale=scale, widen=widen)

    def _chooser(self, name: str) -> str:
        """Returns the name of the attention layer whose indexer chose the keys of the layer `name`."""
        names = [key.removesuffix(".keys") for key in self.want.seen.values if key.endswith(".keys")]
        before = names[: names.index(name) + 1]
        return next(one for one in reversed(before) if f"{one}.index" in self.want.seen.values)

    def _judge_losses(self, rank: Evidence) -> None:
        at, info, seen = self.at, rank.info, self.want.seen
        bound = averaged(at.proof, at.config, int(info.plan["batch_size"]))
        for name in ("main_loss", "balance_loss", "index_loss"):
            got = getattr(info, name)
            part = name.removesuffix("_loss")
            self._compare("losses", name, rank, got, lambda step, part=part: getattr(step.seen, part), bound=bound)
        for depth, (got, _) in enumerate(zip(info.mtp_losses, seen.mtp, strict=True)):
            name = f"mtp_loss_{depth + 1}"
            self._compare("losses", name, rank, got, lambda step, depth=depth: step.seen.mtp[depth], bound=bound)
        for got, (name, want) in zip(info.loads, seen.loads.items(), strict=True):
            at.compare("loads", name, torch.tensor(got), want, WHOLE_NUMBERS, rank=rank)


def judge_batch(at: Comparisons, ranks: list[Evidence], batch_size: int) -> bool:
    """Returns whether all ranks' sequences form the batch; records a mismatch."""
    shares = {(rank.info.first, rank.info.first + rank.micro_batches() * rank.info.micro_batch_size) for rank in ranks}
    starts, ends = (sorted(side) for side in zip(*shares, strict=True))
    if [*starts, batch_size] == [0, *ends]:
        return True
    reason = "the ranks did not train on each sample of the batch exactly once"
    at.fail("samples of the step", "batch", reason, ends[-1] - starts[0], batch_size)
    return False


def judge_validation(at: Comparisons, ranks: list[Evidence], plain: PlainModel) -> None:
    """Judge the validation loss with the weights after the step."""
    at.phase, count = "validation", at.config.log.validation_sequences
    with torch.no_grad():
        want = plain.losses(Samples(at.config).batch(-count, count), trains=False).main
    for rank in ranks:
        got = math.nan if rank.info.validation_loss is None else rank.info.validation_loss
        at.compare("held-out loss", "main_loss", got, want, averaged(at.proof, at.config, count), rank=rank)


def chosen_by_ranks(ranks: list[Evidence], seq_len: int) -> dict[str, Tensor]:
    """Returns the choices of all ranks for the complete batch:

    ROUTER            chosen experts (N, K)
    ATTENTION.keys    mask (B, T, T), True where a query attends to a key
    """
    found: dict[str, Tensor] = {}
    for name, calls in calls_by_name(ranks, "forward").items():
        if name.endswith((".ids", ".keys")):
            wholes: dict[int, Tensor] = {}
            for rank, number, ids in calls:
                rows, depth = rank.rows(number), depth_of(name)
                ids_BTK = ids.view(rows.stop - rows.start, -1, ids.size(-1))
                empty = ids.new_empty(len(ids_BTK), seq_len - depth, ids.size(-1))
                wholes.setdefault(rows.start, empty)[:, places_of(rank.info, seq_len, depth)] = ids_BTK
            ids_BTK = torch.cat([wholes[first] for first in sorted(wholes)])
            is_key = name.endswith(".keys")
            found[name.removesuffix(".ids")] = (
                count_keys(ids_BTK, ids_BTK.size(1)) > 0 if is_key else ids_BTK.flatten(0, 1)
            )
    return found


def backward_order(weights: list[str], outputs: list[str]) -> list[str]:
    """Returns the names of weights and outputs in backward order."""
    place = {name: float(number) for number, name in enumerate(weights)}

    def after(output: str) -> tuple[float, int]:
        prefix = output.removesuffix(".gates") + "."
        inside = [number for name, number in place.items() if name.startswith(prefix)]
        return max(inside, default=-1.0) + 0.5, -len(output)

    order = sorted(
        [*((number, -math.inf, name) for name, number in place.items()), *((*after(name), name) for name in outputs)]
    )
    return [name for *_, name in reversed(order)]
