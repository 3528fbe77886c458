"""What the ranks saw, held against the reference.

Every step is judged on its own: the reference starts from the state that the ranks had before it, which is what they were judged
to have after the step before. So differences do not grow from step to step, and each bound is that of one step; the steps
together are the run.

The order of the comparisons is that of the computation, so the first one that fails says where a fault begins:

    start          the state is that which the proof gave, or that which was saved, bit for bit
    forward        outputs of all parts, first to last; losses; loads
    backward       from the last part to the first: the gradient that comes back to a part, then those of its weights
    update         norm, masters, moments, average of the weights, biases; nothing of them in a step whose gradient is not finite
    validation     loss on held-out sequences
    checkpoint     what is on disk is the state of its step, bit for bit

Shapes as in train/prove/reference.py.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from conf.run_paths import RunPaths
from conf.schema import Config
from train.data.batch import Batch
from train.kernels.plain.plain_kernels import PlainKernels
from train.kernels.precision import build_precision
from train.model.adapter import add_adapters
from train.model.deepseek import DeepSeekV3
from train.model.init import initialise
from train.prove import reference, reference_step
from train.prove.bounds import UNIT, Bound, averaged, chosen, coarsest, computed
from train.prove.comparisons import size_of
from train.prove.evidence import EVIDENCE, Evidence, depth_of, places_of, read_evidence
from train.prove.findings import ProofFindings, together
from train.prove.high_precision import choice_excess
from train.prove.judge_high import WholeJudge
from train.prove.judge_parts import micro_batches
from train.prove.judge_reduction import ReductionJudge, sum_over_ranks
from train.prove.judge_update import State, Tally, UpdateJudge, assemble
from train.prove.judge_wire import WireJudge
from train.prove.layouts import PROOFS, passes_of, run_part, save_step, watched_steps
from train.prove.reference import WatchedPass
from train.prove.samples import initial_biases, initial_weights
from train.prove.shaken import ReferenceStep, ShakenRuns, run_shaken_step


def judge_all(config: Config, proofs: Sequence[str] | None = None, at_a_time: int = 1) -> ProofFindings:
    """These passes of a proof whose ranks have ended, or all of them. config: that which they read. at_a_time: more than 1 in forks of
    this process, which must not have computed.
    """
    given = passes_of(config) if proofs is None else proofs
    if at_a_time == 1:
        return together([judge_pass(config, proof) for proof in given])
    with ProcessPoolExecutor(at_a_time, get_context("fork"), torch.set_num_threads, (1,)) as judges:
        return together(list(judges.map(partial(judge_pass, config), given)))


def judge_pass(config: Config, proof: str) -> ProofFindings:
    """One of them."""
    findings = ProofFindings()
    Judge(proof, PROOFS[proof](config), RunPaths(config).path / EVIDENCE, findings).judge()
    return findings


class Judge(WireJudge, ReductionJudge, UpdateJudge):
    """Judges one pass."""

    def __init__(self, proof: str, config: Config, folder: Path, findings: ProofFindings):
        """config: as the ranks ran it."""
        super().__init__(proof, config, findings, RunPaths(replace(config, name=f"{config.name}/{proof}")).checkpoints)
        self.job, self.model = config, config.model
        self.steps = read_evidence(folder, proof)
        self.bound = computed(proof, config)

    def judge(self) -> None:
        if self.proof == "tiles":
            self._judge_tiles()
            return
        before: State | None = None
        saved: tuple[State, Tally] | None = None
        for number, step, ranks in self.steps:
            self._enter(number, step, ranks)
            if number and step == 0 and saved is not None:
                before, self.tally = self._reset(*saved)
            if step:
                before = self._judge_step(ranks, self._given() if before is None else before)
            else:
                before = self._judge_start(ranks, before)
            if before is None:
                return
            if self.proof == "exact":
                continue
            if not all(tensor.isfinite().all() for tensor in before.values()):
                self._fail(
                    "state", "all weights", None, math.nan, 0.0, "what is not finite says nothing of later steps"
                )
                return
            if number == 0 and step == save_step(self.config):
                saved = before, self.tally
                self._judge_written(before)
            elif (
                self.run is not None and step == self.run.last and (number or step < self.job.steps)
            ):  # else the second part wrote over it
                self._judge_written(before)
        assert before is not None, f"no rank left evidence of pass {self.proof}"

    def _reset(self, state: State, tally: Tally) -> tuple[State, Tally]:
        """What a run goes on with from a checkpoint: all of it, but for what another optimizer kept."""
        if self.job.optim.name == self.job.prove.first_optimizer or self.job.prove.first_optimizer is None:
            return state, tally
        fresh = self._given()
        kept = {name: tensor for name, tensor in state.items() if name.startswith(("master.", "bias.", "ema."))}
        return fresh | kept, replace(tally, updates=0)

    def _judge_tiles(self) -> None:
        """Single parts alone, with the weights that the ranks say they have."""
        before: State | None = None
        for number, step, ranks in self.steps:
            self.part, self.step, self.findings.device = number, step, ranks[0].info.device
            if step in watched_steps(self.config) and before is not None:
                plan = reference_step.plan_step(self.config, step)
                self._judge_parts(ranks, before, self.samples.batch(plan.first_sample, plan.batch_size))
            before = self._after(ranks)
        assert before is not None, f"no rank left evidence of pass {self.proof}"

    def _judge_parts(self, ranks: list[Evidence], before: State, batch: Batch) -> None:
        self._judge_wire(ranks)
        WholeJudge(self.proof, self.config, self.findings, ranks, before, batch).judge_all()

    def _enter(self, number: int, step: int, ranks: list[Evidence]) -> None:
        self.part, self.step = number, step
        self.findings.device = ranks[0].info.device
        if number == 1:
            self.findings.second_layout = f"{ranks[0].info.layout}, {len(ranks)} ranks"
        if self.proof != "exact" and (self.run is None or self.run.number != number):
            self.run = run_part(self.job, number, len(ranks))
            self.config = self.run.config
            self.bound = computed(self.proof, self.config)

    def _given(self) -> State:
        """What a proof starts from."""
        trained = reference.trained_shapes(self.config)
        weights = {name: weight.double() for name, weight in initial_weights(self.config).items() if name in trained}
        biases = {f"bias.{name}": bias.double() for name, bias in initial_biases(self.config).items()}
        state = {f"master.{name}": weight for name, weight in weights.items()} | biases
        for name, weight in weights.items():
            rule = self.config.optim.facts.choose_rule(name, weight.dim())
            state |= {f"{kind}.{name}": torch.zeros_like(weight) for kind in rule.state}
        if self.config.optim.ema_decay:
            state |= {f"ema.{name}": weight for name, weight in weights.items()}
        return state

    def _judge_start(self, ranks: list[Evidence], before: State | None) -> State:
        self.phase = "start" if before is None else "checkpoint"
        want = self._given() if before is None else before
        got = self._after(ranks)
        self._same_names("state", got, want)
        quantity = "state at the start" if before is None else "state from the checkpoint"
        for name in want:
            if name in got:
                self._compare(quantity, name, None, got[name], want[name], Bound(0.0, "bit for bit"))
        for rank in ranks:  # every rank's copy of the biases, not only the one that is saved
            for name, bias in rank.of_kind("own"):
                self._compare("biases", name, rank.info.rank, bias, want[name], Bound(0.0, "bit for bit"))
        self._judge_tally(ranks)
        if self.proof == "fp32" and (drawn := assemble(ranks, "drawn")):
            self._judge_drawn(drawn, ranks[0].info.device)
        return got

    def _judge_drawn(self, drawn: State, device: str) -> None:
        """The weights that a run would have begun with: in every layout those of the model in one piece."""
        plain = build_precision(self.config.precision, torch.device("cpu"), PlainKernels())
        whole = DeepSeekV3.whole(self.model, plain, seq_len=self.config.seq_len, device="meta")
        initialise(whole, self.config.seed, device)
        if self.config.adapter.on:
            add_adapters(whole, self.config.adapter, plain.kernels, self.config.seed)
        want = {name: weight.double().cpu() for name, weight in whole.named_parameters() if weight.requires_grad}
        self._same_names("initial weights", drawn, want)
        for name in want:
            self._compare("initial weights", name, None, drawn[name], want[name], Bound(0.0, "bit for bit"))

    def _judge_step(self, ranks: list[Evidence], before: State) -> State | None:
        """The state after it; None where nothing that follows can be compared."""
        plan = replace(reference_step.plan_step(self.config, self.step), first_sample=self.tally.samples)
        self.phase = "settings"
        for rank in ranks:
            for name, value in rank.info.plan.items():
                bound = Bound(1e-12, "a formula in fp64")
                self._number("settings of the step", name, rank.info.rank, value, getattr(plan, name), bound)
        if not self._has_the_batch(ranks, plan.batch_size):
            return None
        plain = self._plain(before, self._choices(ranks, plan.batch_size))
        self.want = run_shaken_step(plain, self.samples, plan)
        unit = UNIT[coarsest(self.config) if self.is_rounded else "fp32"]
        near = None if self.is_rounded else 2 * chosen(self.proof, self.config).value
        self.shaken = None if self.proof == "exact" else ShakenRuns(plain, self.samples, plan, unit, near)
        seen = self.want.seen
        if self.is_rounded and self.step in watched_steps(self.config) and not self.config.adapter.on:
            self._judge_parts(ranks, before, self.samples.batch(plan.first_sample, plan.batch_size))
        self._judge_forward(ranks, seen, plan.batch_size)
        if self.is_rounded:
            self._judge_totals(ranks)
        if self.run is not None and self.step == self.run.spoilt:
            return self._judge_skip(ranks, before, plan)
        if self.proof != "exact":
            self._judge_reduction(ranks)
        self._judge_backward(ranks, plan.batch_size)
        if self.proof == "exact":
            self._judge_biases(ranks, before, seen, plan.bias_speed)
            return before
        return self._judge_update(ranks, before, seen, plan)

    def _has_the_batch(self, ranks: list[Evidence], batch_size: int) -> bool:
        """Whether the shares of the ranks make up the batch: of another there is nothing to compare."""
        shares = {
            (rank.info.first, rank.info.first + micro_batches(rank) * rank.info.micro_batch_size) for rank in ranks
        }
        starts, ends = (sorted(side) for side in zip(*shares, strict=True))
        if [*starts, batch_size] == [0, *ends]:
            return True
        reason = "the ranks trained on other samples than those of the batch, each once"
        self._fail("samples of the step", "batch", None, ends[-1] - starts[0], batch_size, reason)
        return False

    def _places(self, rank: Evidence, name: str, count: int | None = None) -> list[int]:
        """Positions of a sequence that a rank has of an output. count: how many it has, if they may be more: embeddings reach behind
        every piece as far as MTP modules look.
        """
        info, last = rank.info, self.config.seq_len - depth_of(name)
        here = places_of(info, self.config.seq_len, depth_of(name))
        if info.cp == 1 or count is None or count == len(here):
            return here
        size = self.config.seq_len // (2 * info.cp)
        ends = [(piece + 1) * size for piece in (info.cp_rank, 2 * info.cp - 1 - info.cp_rank)]
        return here + [t for end in ends for t in range(end, min(end + self.model.mtp_depth, last))]

    def _choices(self, ranks: list[Evidence], batch_size: int) -> dict[str, Tensor] | None:
        """Where rounding may choose other experts: those that the ranks chose, which `_judge_choices` then looks at."""
        if self.proof == "exact":
            return None
        parts: dict[str, dict[int, Tensor]] = {}
        for rank in ranks:
            for name, number, ids in rank.calls_of_kind("forward"):
                if name.endswith(".ids"):
                    rows, places = rank.rows(number), self._places(rank, name)
                    ids_BTK = ids.view(rows.stop - rows.start, -1, ids.size(-1))
                    whole = ids.new_empty(len(ids_BTK), self.config.seq_len - depth_of(name), ids.size(-1))
                    whole = parts.setdefault(name.removesuffix(".ids"), {}).setdefault(rows.start, whole)
                    whole[:, places] = ids_BTK
        return {name: torch.cat([ids[first] for first in sorted(ids)]).flatten(0, 1) for name, ids in parts.items()}

    def _judge_forward(self, ranks: list[Evidence], seen: WatchedPass, batch_size: int) -> None:
        self.phase = "forward"
        made: dict[str, list[tuple[Evidence, int, Tensor]]] = {}
        for rank in ranks:
            for name, number, value in rank.calls_of_kind("forward"):
                made.setdefault(name, []).append((rank, number, value))
        for name in seen.values:
            if name.endswith(".biased"):
                continue
            if name not in made and name == "embedding":
                continue  # where one rank holds it for two stages; the layer behind it tells as much
            if name not in made:
                self._fail("outputs", name, None, math.nan, math.nan, "no rank has made it")
                continue
            if name.endswith(".ids"):
                self._judge_choices(name.removesuffix(".ids"), made[name], seen, batch_size)
                continue
            scale = size_of(seen.values[name], self.is_rounded)
            for rank, number, value in made[name]:
                rows = rank.rows(number)
                places = self._places(rank, name, value.size(1) if name == "embedding" else None)

                def part(
                    step: ReferenceStep, name: str = name, rows: slice = rows, places: list[int] = places
                ) -> Tensor:
                    return self._by_sample(step.seen.values[name], batch_size)[rows][:, places]

                self._compare_part("outputs", name, rank.info.rank, value, part, self.bound, scale)
        for rank in ranks:
            self._judge_losses(rank, seen)
            for name, got in rank.of_kind("scores"):
                self._compare_part(
                    "attention scores",
                    name,
                    rank.info.rank,
                    got,
                    lambda step, name=name: step.seen.scores[name],
                    self.bound,
                )

    def _by_sample(self, value: Tensor, batch_size: int) -> Tensor:
        """(B, ...) also where rows of all samples lie in one axis."""
        return value if value.size(0) == batch_size else value.unflatten(0, (batch_size, -1))

    def _judge_choices(self, name: str, made: list, seen: WatchedPass, batch_size: int) -> None:
        want = self._by_sample(seen.values[f"{name}.ids"], batch_size)
        bound = chosen(self.proof, self.config)
        for rank, number, ids in made:
            rows, places = rank.rows(number), self._places(rank, name)
            if self.proof != "exact":

                def scores(step: ReferenceStep, rows: slice = rows, places: list[int] = places) -> Tensor:
                    return self._by_sample(step.seen.values[f"{name}.biased"], batch_size)[rows][:, places]

                def widen(bound: Bound, _: float, scores: Callable[[ReferenceStep], Tensor] = scores) -> Bound:
                    """Two scores were compared, and each may be off."""
                    wider = self._widen(
                        scores, scores(self.want), Bound(bound.value / 2, bound.reason), 1.0, by_norm=False
                    )
                    return Bound(2 * wider.value, wider.reason)

                excess = choice_excess(self.model, scores(self.want).flatten(0, -2), ids)
                got, none = torch.tensor([excess]).double(), torch.zeros(1, dtype=torch.float64)
                self._compare("chosen experts", name, rank.info.rank, got, none, bound, 1.0, widen)
            else:
                self._compare("chosen experts", name, rank.info.rank, ids, want[rows][:, places], bound, 1.0)

    def _judge_losses(self, rank: Evidence, seen: WatchedPass) -> None:
        info, who = rank.info, rank.info.rank
        bound = averaged(self.proof, self.config, int(info.plan["batch_size"]))
        parts: dict[str, tuple[float, Callable[[ReferenceStep], Tensor]]] = {
            "main_loss": (info.main_loss, lambda step: step.seen.main),
            "balance_loss": (info.balance_loss, lambda step: step.seen.balance),
        }
        for depth, (got, _) in enumerate(zip(info.mtp_losses, seen.mtp, strict=True)):
            parts[f"mtp_loss_{depth + 1}"] = got, lambda step, depth=depth: step.seen.mtp[depth]
        for name, (got, part) in parts.items():
            self._compare_part("losses", name, who, torch.tensor(got, dtype=torch.float64), part, bound)
        for got, name in zip(info.loads, seen.loads, strict=True):
            want = seen.loads[name].double()
            self._compare("loads", name, who, torch.tensor(got).double(), want, Bound(0.0, "whole numbers"))

    def _judge_backward(self, ranks: list[Evidence], batch_size: int) -> None:
        self.phase = "backward"
        came: dict[str, list[tuple[Evidence, int, Tensor]]] = {}
        for rank in ranks:
            for name, number, value in rank.calls_of_kind("backward"):
                came.setdefault(name, []).append((rank, number, value))
        exact = self.proof == "exact"
        found = sum_over_ranks(ranks, reference.trained_shapes(self.config)) if exact else assemble(ranks, "reduced")
        gradients = self.want.gradients
        self._same_names("gradients of weights", found, gradients)
        for name in backward_order(list(gradients), list(came)):
            if name in gradients and name in found:

                def whole(step: ReferenceStep, name: str = name) -> Tensor:
                    return step.gradients[name]

                self._compare_part("gradients of weights", name, None, found[name], whole, self.bound)
            for rank, number, value in came.get(name, ()):
                gradient = self.want.seen.values[name].grad
                if gradient is None:
                    continue
                rows, times = rank.rows(number), rank.info.dp * rank.info.cp
                places = self._places(rank, name)

                def part(
                    step: ReferenceStep,
                    name: str = name,
                    rows: slice = rows,
                    times: int = times,
                    places: list[int] = places,
                ) -> Tensor:
                    gradient = step.seen.values[name].grad
                    assert gradient is not None
                    return self._by_sample(gradient * times, batch_size)[rows][:, places]

                scale = size_of(gradient * times, self.is_rounded)
                self._compare_part("gradients of outputs", name, rank.info.rank, value, part, self.bound, scale)


def backward_order(weights: list[str], outputs: list[str]) -> list[str]:
    """Names of weights and of outputs in the order in which their gradients are made: those of the last part come first, that of
    an output before those of the weights that made it.
    """
    place = {name: float(number) for number, name in enumerate(weights)}

    def after(output: str) -> tuple[float, int]:
        prefix = output.removesuffix(".gates") + "."
        inside = [number for name, number in place.items() if name.startswith(prefix)]
        return max(inside, default=-1.0) + 0.5, -len(output)

    order = sorted(
        [*((number, -math.inf, name) for name, number in place.items()), *((*after(name), name) for name in outputs)]
    )
    return [name for *_, name in reversed(order)]
