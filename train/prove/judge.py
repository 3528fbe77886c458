"""Compares the tensors and counters that the ranks recorded with the reference (train/prove/reference.py).

Each step starts from the ranks' state after the previous step. So a bound applies to one step. The comparisons follow
the computation. So the first failed comparison shows the origin of a fault:

    start          the state equals the initial or the saved state, bit for bit               judge_state.py
    forward        outputs of all parts, losses, tokens per expert                            judge_model.py
    backward       gradients of outputs and weights, from the last part to the first          judge_model.py
    reduction      sums of gradients over micro-batches and ranks                             judge_gradients.py
    update         gradient norm, master weights, moments, average of the weights, biases     judge_update.py
    validation     loss on held-out sequences                                                 judge_model.py
    checkpoint     the files contain the state after the checkpoint's step, bit for bit       judge_state.py

In precisions with rounding, single model parts (judge_parts.py) and dispatched rows (judge_rows.py) are compared first.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from cluster.run_files import step_name
from conf.run_paths import RunPaths
from conf.schema import Config
from train.checkpoint.manifest import read_manifest
from train.prove import reference_step
from train.prove.bounds import UNIT, Bound, chosen, coarsest
from train.prove.comparison import WHOLE_NUMBERS, Comparisons
from train.prove.evidence import EVIDENCE, Evidence, State, read_evidence
from train.prove.findings import ProofFindings, together
from train.prove.judge_gradients import judge_reduction, judge_totals
from train.prove.judge_loop import judge_loop
from train.prove.judge_model import WholeModel, chosen_by_ranks, judge_batch, judge_validation
from train.prove.judge_parts import judge_parts
from train.prove.judge_rows import judge_rows
from train.prove.judge_state import (
    Tally,
    given_state,
    judge_checkpoint,
    judge_drawn,
    judge_same,
    judge_tally,
    judge_weights,
    state_after,
    state_from_checkpoint,
)
from train.prove.judge_update import judge_biases, judge_update
from train.prove.layouts import PROOFS, RunPart, run_part, save_step, watched_steps
from train.prove.perturbed import PerturbedRuns, run_reference_step
from train.prove.reference import PlainModel
from train.prove.samples import Samples, initial_weights
from train.prove.step_parts import StepParts


def judge_all(config: Config, proofs: Sequence[str] | None = None, at_a_time: int = 1) -> ProofFindings:
    """Judges the checks `proofs` (None: all) after the ranks have ended.

    at_a_time: number of checks to judge at a time. Above 1, this process forks, so it must not have computed with
    torch.
    """
    given = [*PROOFS] if proofs is None else proofs
    if at_a_time == 1:
        return together([judge_pass(config, proof) for proof in given])
    with ProcessPoolExecutor(at_a_time, get_context("fork"), torch.set_num_threads, (1,)) as judges:
        return together(list(judges.map(partial(judge_pass, config), given)))


def judge_pass(config: Config, proof: str) -> ProofFindings:
    """Judges one check and returns the findings."""
    findings = ProofFindings()
    Judge(proof, PROOFS[proof](config), RunPaths(config).path / EVIDENCE, findings).judge()
    return findings


class Judge:
    """Judges one check."""

    def __init__(self, proof: str, config: Config, folder: Path, findings: ProofFindings):
        """config: the ranks' configuration. folder: folder with their recorded tensors."""
        self.at, self.job, self._folder = Comparisons(proof, config, findings), config, folder
        self.checkpoints = RunPaths(replace(config, name=f"{config.name}/{proof}")).checkpoints
        self.tally = Tally()
        self.losses: dict[int, float] = {}
        """Validation loss by step, in the run's first part."""
        self.run: RunPart | None = None
        """The part of the run that contains the current step."""

    def judge(self) -> None:
        """Judge all steps, up to an incomparable or non-finite state."""
        at, before, saved = self.at, None, None
        if at.proof == "loop":
            judge_loop(at, self._folder)
            return
        for part, step, ranks in read_evidence(self._folder, at.proof):
            self._enter(part, step, ranks)
            if at.proof == "tiles":
                before = self._judge_tiles(ranks, before)
                continue
            if part and step == 0 and saved is not None:
                before, self.tally = state_from_checkpoint(at.config, *saved)
            if step == 0:
                before = self._judge_start(ranks, before)
            else:
                before = self._judge_step(ranks, given_state(at.config) if before is None else before)
            if before is None or not self._is_finite(before):
                return
            if self.run is None:
                continue
            is_saved = part == 0 and step == save_step(at.config)
            saved = (before, self.tally) if is_saved else saved
            is_best, path = self._is_best(), self.checkpoints / step_name(step)
            if step == self.run.last:
                is_saved = part > 0 or step < self.job.steps  # otherwise the second part has overwritten the checkpoint
            if is_saved or (is_best and step < self.run.last):
                judge_checkpoint(at, path, before)
                if is_best is not None:
                    best = min(self.losses, key=self.losses.__getitem__)
                    at.compare("step of the best", path.name, read_manifest(path).meta["best"][0], best, WHOLE_NUMBERS)
        assert before is not None, f"no rank left evidence of pass {at.proof}"

    def _enter(self, part: int, step: int, ranks: list[Evidence]) -> None:
        at = self.at
        at.part, at.step, at.findings.device = part, step, ranks[0].info.device
        if at.proof in ("fp32", "recipe") and (self.run is None or self.run.number != part):
            self.run = run_part(self.job, part, len(ranks))
            at.run_as(self.run.config)
        if part == 1:
            at.findings.second_layout = f"{ranks[0].info.layout}, {len(ranks)} ranks"

    def _is_finite(self, state: State) -> bool:
        if all(tensor.isfinite().all() for tensor in state.values()):
            return True
        self.at.fail("state", "all weights", "values are not finite, so later steps cannot be compared", want=0.0)
        return False

    def _judge_tiles(self, ranks: list[Evidence], before: State | None) -> State:
        """Judge only single model parts and dispatched rows. Returns the next state."""
        at = self.at
        if at.step in watched_steps(at.config) and before is not None:
            self._judge_parts(ranks, before, reference_step.plan_step(at.values, at.step))
        return state_after(at.config, ranks)

    def _judge_parts(self, ranks: list[Evidence], before: State, plan: reference_step.PlainPlan) -> None:
        if not self.at.values.optim.index_warmup:  # in an index warm-up, rows of experts have no gradients
            judge_rows(self.at, ranks)
        batch = Samples(self.at.config).batch(plan.first_sample, plan.batch_size)
        judge_parts(StepParts(self.at, ranks, before, batch))

    def _judge_start(self, ranks: list[Evidence], before: State | None) -> State:
        at, is_first = self.at, before is None
        at.phase = "start" if is_first else "checkpoint"
        quantity = "state at the start" if is_first else "state from the checkpoint"
        got = judge_same(at, quantity, ranks, given_state(at.config) if before is None else before, own="biases")
        judge_tally(at, ranks, self.tally)
        judge_drawn(at, ranks)
        return got

    def _judge_step(self, ranks: list[Evidence], before: State) -> State | None:
        """Judge one step. Returns the next state; None ends the check."""
        at, exact = self.at, self.at.proof == "exact"
        plan = replace(reference_step.plan_step(at.values, at.step), first_sample=self.tally.samples)
        at.phase = "settings"
        for rank in ranks:
            for name, value in rank.info.plan.items():
                formula = Bound(1e-12, "a formula in fp64")
                at.compare("settings of the step", name, value, getattr(plan, name), formula, rank=rank)
        if not judge_batch(at, ranks, plan.batch_size):
            return None
        plain, samples = self._plain(before), Samples(at.config)
        if not exact:  # rounding may change a choice: use the ranks' experts and keys, which are judged later
            plain.choices = chosen_by_ranks(ranks, at.config.seq_len)
        want = run_reference_step(plain, samples, plan)
        unit = UNIT[coarsest(at.config) if at.is_rounded else "fp32"]
        near = None if at.is_rounded else 2 * chosen(at.proof, at.config).value
        perturbed = None if exact else PerturbedRuns(plain, samples, plan, unit, near)
        whole = WholeModel(at, ranks, want, perturbed, plan.batch_size)
        if at.is_rounded and at.step in watched_steps(at.config):
            self._judge_parts(ranks, before, plan)
        at.phase = "forward"
        whole.judge_forward()
        at.phase = "backward"
        if at.is_rounded:
            judge_totals(at, ranks)
        if self.run is not None and at.step == self.run.spoilt:
            return self.judge_skip(ranks, before, plan.batch_size)
        at.phase = "reduction"
        if not exact:
            judge_reduction(at, ranks)
        at.phase = "backward"
        whole.judge_backward()
        at.phase = "update"
        if exact:
            judge_biases(at, ranks, before, want.seen.loads, plan)
            return before
        self._count(ranks, plan.batch_size, True, "every step counts")
        after = judge_update(at, ranks, before, want.seen.loads, plan, self.tally.updates)
        if self.run is not None and at.step == self.run.last:
            judge_weights(at, ranks, after)
        self._judge_validation(ranks, after)
        return after

    def judge_skip(self, ranks: list[Evidence], before: State, batch_size: int) -> State:
        """Judge a skipped step. Only the position in the data may change."""
        self.at.phase = "update"
        self._count(ranks, batch_size, False, "a gradient that is not finite on one rank skips the step on all")
        after = judge_same(self.at, "state after a skipped step", ranks, before)
        self._judge_validation(ranks, after)
        return after

    def _count(self, ranks: list[Evidence], batch_size: int, applied: bool, why: str) -> None:
        for rank in ranks:
            got, want = float(rank.info.applied), float(applied)
            self.at.compare("applied updates", "all weights", got, want, Bound(0.0, why), rank=rank)
        self.at.acted("skipped steps", not applied)
        self.tally = self.tally.after(batch_size, applied)
        judge_tally(self.at, ranks, self.tally)

    def _is_best(self) -> bool | None:
        """Returns whether this step has the lowest validation loss so far; None if the check does not judge this."""
        if not self.at.config.checkpoint.keep_best or self.at.part or not self.losses:
            return None
        is_best = min(self.losses, key=self.losses.__getitem__) == self.at.step
        self.at.acted("checkpoint.keep_best, steps", is_best)
        return is_best

    def _judge_validation(self, ranks: list[Evidence], after: State) -> None:
        """Judge the validation loss, if the step has one."""
        if self.run is not None and (self.at.step == self.run.last or self.run.config.log.validate_every == 1):
            judge_validation(self.at, ranks, self._plain(after))
            self.losses[self.at.step] = ranks[0].info.validation_loss or math.inf

    def _plain(self, state: State) -> PlainModel:
        """Returns the reference model with these weights and, for an adapter, the frozen base weights."""
        config = self.at.config
        base = initial_weights(config) if config.adapter.on else {}
        masters = {name.removeprefix("master."): value for name, value in state.items() if name.startswith("master.")}
        weights = {}
        for name, master in ({name: weight.double() for name, weight in base.items()} | masters).items():
            rounded = master.bfloat16().double() if self.at.is_low else master
            weights[name] = rounded.clone().requires_grad_(name in masters)
        biases = {name.removeprefix("bias."): bias for name, bias in state.items() if name.startswith("bias.")}
        return PlainModel(self.at.values, weights, biases)
