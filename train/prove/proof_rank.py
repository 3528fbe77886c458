"""Runs one rank of mode=prove, and records its evidence. The driver starts `python -m train.prove.proof_rank CONFIG
[PART]`. The checks are:

    exact      one step in fp64, with lowered thresholds (conf/thresholds.py); records gradients before any reduction
    loop       steps of a custom loop in fp64, in train/prove/loop_rank.py
    fp32       steps of the Trainer with DeepSpeed, one of them with a gradient that is not finite; a checkpoint, and a
               resume from it in another layout, with another batch size and lowered thresholds
    recipe     the steps of check fp32 in the recipe's precision
    tiles      two steps in the recipe's precision, with two tiles in every width
"""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import cast

import train.kernels.cpu.tuned  # noqa: F401  must be imported before torch allocates memory
from cluster.interrupts import leave  # before libraries, so that its exit handler runs after their handlers

# isort: split
import torch
from torch import Tensor

from cluster.launch import given_run
from cluster.place import Place
from cluster.run_files import step_name
from conf.disk import disk_errors
from conf.errors import EXIT_OK
from conf.micro_batches import share_of
from conf.run_paths import RunPaths
from conf.schema import BaseFormat, Config
from conf.thresholds import lowered
from parallel.exchange import from_rank_0
from parallel.layout import read_layout
from parallel.mesh import build_mesh
from parallel.shard import Shard
from parallel.update_result import Update
from parallel.zero.engine import Zero
from train.checkpoint.checkpointer import Checkpointer, SaveInFlight, SaveResult
from train.checkpoint.commit import Save, next_attempt
from train.data.batch import Batch
from train.data.prefetch import Prefetch
from train.data.prepare import PreparedData
from train.kernels.choice import build_kernels, choose_kernels
from train.kernels.plain.plain_attention import PlainAttention
from train.loop.hooks.copies_in_memory import CopiesInMemory
from train.loop.hooks.hook_list import build_hooks
from train.loop.hooks.skipped_steps import SkippedSteps
from train.loop.hooks.step_metrics import Flops
from train.loop.live_model import LiveModel
from train.loop.live_run import LiveRun
from train.loop.resume import find_start, restore
from train.loop.saver import Saver
from train.loop.state import RunState
from train.loop.stop import StopKind, StopRequest
from train.loop.trainer import Trainer
from train.loop.training_engine import Engine, StepOutcome
from train.metrics.names import Record
from train.model.deepseek import DeepSeekV3
from train.model.layers import PACKED
from train.model.moe import Experts
from train.optim.schedules import Schedules, StepPlan
from train.parallelize import build_rank_model, parallelize
from train.prove.bounds import is_rounded
from train.prove.double import in_double
from train.prove.evidence import EVIDENCE, Evidence, EvidenceWatch, StepInfo
from train.prove.exact_update import ExactUpdates
from train.prove.layouts import IN_FP64, PROOFS, RunPart, layout_name, run_parts, save_step, watched_steps
from train.prove.parts import PartsWatch
from train.prove.samples import ProofData, initial_biases, initial_weights
from train.rank import choose_device, guarded, start_process_group
from train.rank_parts import ParallelModel, RankModel, RankSetup

PARTS = (0, 1)
"""Parts of a run: before and after the resume."""


def run_rank(
    config: Config,
    place: Place,
    failures: Path | None = None,
    proofs: Sequence[str] | None = None,
    parts: Sequence[int] = PARTS,
) -> int:
    """Write this rank's evidence of the checks. Returns the exit code."""
    given = [*PROOFS] if proofs is None else proofs
    return guarded(place, failures, disk_errors(config)(lambda: _run(config, place, given, parts)))


def _run(config: Config, place: Place, proofs: Sequence[str], parts: Sequence[int]) -> int:
    device = choose_device(config, place)
    start_process_group(config, place, device)
    for proof in proofs:
        run_pass(proof, config, place, device, parts)
    return EXIT_OK


def run_pass(proof: str, config: Config, place: Place, device: torch.device, parts: Sequence[int] = PARTS) -> None:
    """Write the evidence of one check. Ranks must have a process group."""
    as_run = PROOFS[proof](config)
    if proof not in IN_FP64:
        prove_trained(proof, as_run, place, device, parts)
    elif 0 in parts:
        from train.prove.loop_rank import prove_loop  # imported here, because that module imports this one

        prove = prove_exact if proof == "exact" else prove_loop
        prove(as_run, place, device)


def in_groups(config: Config, place: Place, device: torch.device) -> RankSetup:
    """Returns this rank's setup, with process groups for config's layout."""
    mesh = build_mesh(read_layout(config, place.local_world), timedelta(seconds=config.cluster.timeout))
    return RankSetup(device, mesh)


# Exact: the model, its pipeline and its dispatchers in fp64


def prove_exact(config: Config, place: Place, device: torch.device) -> None:
    """Runs check `exact`: one step without an optimizer. Writes its evidence."""
    rank, plan = in_groups(config, place, device), Schedules(config).plan(1)
    first, count = share_of(config, plan.batch_size, rank.mesh.dp_rank)
    batch = ProofData.of(config).train.batch(plan.first_sample + first, count)
    with exact_engine(config, rank, device) as (step, model, local):
        watch = EvidenceWatch(model.chunks)
        outcome = step.run(plan, batch)
    evidence = Evidence(info_of("exact", 0, config, rank, plan, outcome))
    add_scores(evidence, step, outcome)
    evidence.add_seen(watch.seen)
    local.give(evidence)
    for name, router in model.routers().items():
        evidence.add("after", f"bias.{name}", router.bias_E)
    evidence.write(RunPaths(config).path / EVIDENCE)


@contextmanager
def exact_engine(
    config: Config, rank: RankSetup, device: torch.device
) -> Iterator[tuple[Engine, RankModel, "LocalGradients"]]:
    """Yields an fp64 engine, its model, and its local gradients."""
    # Drawn before fp64 starts, because random numbers differ in fp64.
    weights, biases = initial_weights(config), initial_biases(config)
    with in_double(), lowered():
        kernels = build_kernels(
            device.type, config.cluster.compiled, PlainAttention()
        )  # a GPU's own kernels do not support fp64
        model = build_rank_model(config, rank.mesh, device, kernels, restored=True)
        fill_chunks(model.chunks, weights)
        fill_biases(model, biases)
        local = LocalGradients(model.chunks)
        parts = ParallelModel(model.chunks, model.pipeline, model.dispatcher, model.precision, model.share, local)
        yield Engine(config, parts, rank), model, local


def add_scores(evidence: Evidence, step: Engine, outcome: StepOutcome) -> None:
    """Add each layer's largest attention scores to the evidence, if recorded."""
    if step.clip is not None:
        for name, scores_H in zip(step.clip.layers, outcome.scores_LH, strict=True):
            evidence.add("scores", name, scores_H)


class LocalGradients(Zero):
    """Replaces ZeRO: gradients stay on their rank, and no weight changes."""

    def __init__(self, chunks: list[DeepSeekV3]):  # does not call ZeRO's constructor
        self._chunks = chunks

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        yield

    def set_lr(self, lr: float) -> None:
        """Does nothing, because no weight changes."""

    def scale_rows(self, factors: Mapping[str, Tensor]) -> None:
        """Does nothing, because no weight changes."""

    def step(self, valid: bool | Tensor = True) -> Update:
        return Update(0.0, bool(valid), [])

    def clear(self) -> None:
        """Delete the gradients, before another step."""
        for chunk in self._chunks:
            chunk.zero_grad(set_to_none=True)

    def give(self, evidence: Evidence) -> None:
        """Add the local gradients to the evidence, each with the index of its first element in the complete weight.

        Only experts have an index above 0.
        """
        done: set[int] = set()
        for chunk in self._chunks:
            for prefix, module in chunk.named_modules():
                for name, weight in module.named_parameters(recurse=False):
                    if id(weight) in done:
                        continue  # two chunks share this weight, such as an embedding
                    done.add(id(weight))
                    if not weight.requires_grad and weight.grad is None:
                        continue  # base weight of an adapter
                    first = module.local.start * weight[0].numel() if isinstance(module, Experts) else 0
                    gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                    evidence.add("local", f"{prefix}.{name}", gradient)
                    evidence.places[f"local/{prefix}.{name}"] = first, tuple(weight.shape)


@torch.no_grad()
def fill_chunks(chunks: list[DeepSeekV3], weights: dict[str, Tensor]) -> None:
    """Copy the proof's weights into chunks whose weights are not sharded."""
    for chunk in chunks:
        for prefix, module in chunk.named_modules():
            for name, weight in module.named_parameters(recurse=False):
                value = weights[f"{prefix}.{name}"]
                if isinstance(module, Experts):
                    value = value[module.local.start : module.local.stop]
                if weight.dtype == torch.uint8:
                    getattr(module, PACKED[name]).round(value)
                else:
                    weight.copy_(value)


def fill_biases(model: RankModel, biases: dict[str, Tensor]) -> None:
    """Copy the proof's biases into the routers of this rank."""
    for name, router in model.routers().items():
        router.bias_E.copy_(biases[name])


# Trained: Sluice's Trainer, DeepSpeed and checkpoints


def prove_trained(proof: str, config: Config, place: Place, device: torch.device, parts: Sequence[int]) -> None:
    """Trains, saves a checkpoint, and resumes in another layout."""
    config = replace(config, name=f"{config.name}/{proof}")
    for folder in (RunPaths(config).checkpoints, RunPaths(config).logs):
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint = RunPaths(config).checkpoints / step_name(save_step(config))
    for part in run_parts(proof, config, place.world, parts):
        resume = str(checkpoint) if part.number else part.config.resume
        with lowered() if part.number else nullcontext():
            _train(proof, replace(part, config=replace(part.config, resume=resume)), place, device)


def _train(proof: str, part: RunPart, place: Place, device: torch.device) -> None:
    config = part.config
    rank, paths = in_groups(config, place, device), RunPaths(config)
    data = cast("PreparedData", ProofData.of(config))  # ProofData has everything that a run needs
    kernels, _ = choose_kernels(config, device)
    attempt = from_rank_0(lambda: next_attempt(paths.checkpoints))
    checkpointer = _LateCheckpointer(
        paths.checkpoints,
        rank=place.rank,
        world_size=place.world,
        attempt=attempt,
        keep=0,
        timeout=config.cluster.timeout,
        staging=int(config.checkpoint.staging_bytes),
    )
    parts = parallelize(config, rank.mesh, device, kernels, restored=part.number > 0)
    in_memory = CopiesInMemory(None)
    hooks = build_hooks(config, rank, parts, Flops(0.0, 0.0, 1.0, ""), in_memory, None)
    if proof == "tiles":  # a faulty part may overflow; the run must go on, so that the judge can name the part
        hooks = [hook for hook in hooks if not isinstance(hook, SkippedSteps)]
    state = RunState(config, rank.mesh, parts, hooks)
    start = Evidence(StepInfo(proof, part.number, 0, place.rank, layout_name(config), device.type))
    if config.adapter.on:
        fill_base(config, state)
        state.base = {"path": "drawn", "fingerprint": "drawn"}
    if part.number == 0:
        for name, shard in state.zero.shards().items():
            if name.startswith("master.") and proof == "fp32":
                start.add_shard("drawn", name.removeprefix("master."), shard)
        fill_state(config, state, parts)
    else:
        restore(config, data, state, checkpointer, None, find_start(config, None))
    live = LiveModel(config, rank, parts.chunks, state)
    saver, engine = Saver(config, checkpointer), Engine(config, parts, rank, live)
    run = LiveRun(config, rank, parts, state, data, engine, saver, None, hooks)
    trainer = _ProvenTrainer(run, _Stop(), in_memory)
    trainer.prove(rank, part, start)
    parts.zero.engine.destroy()


@torch.no_grad()
def fill_state(config: Config, state: RunState, parts: ParallelModel) -> None:
    """Copy the proof's weights and biases into this rank."""
    weights = initial_weights(config)
    for name, shard in state.zero.shards(copies=True).items():
        kind, weight = name.split(".", 1)
        if kind == "master":
            _fill(shard, weights[weight])
        else:
            shard.local.zero_()
    fill_biases(parts, initial_biases(config))
    state.zero.finish_load(0)
    for hook in state.keepers:
        hook.restore(None)


@torch.no_grad()
def fill_base(config: Config, state: RunState) -> None:
    """Copy the proof's weights and biases into an adapter's frozen base weights and router biases."""
    given = {f"master.{name}": weight for name, weight in initial_weights(config).items()}
    given |= {f"bias.{name}": bias for name, bias in initial_biases(config).items()}

    def fill(wanted: dict[str, Shard]) -> None:
        for name, shard in wanted.items():
            _fill(shard, given[name])

    state.fill_base(fill)


def _fill(shard: Shard, whole: Tensor) -> None:
    shard.local.copy_(whole.flatten()[shard.offset : shard.offset + shard.local.numel()])


class _Stop(StopRequest):
    """Replaces the handler of stop signals. The proof decides when the run stops."""

    def __init__(self) -> None:
        self.signal, self.has_stepped = None, False


class _LateCheckpointer(Checkpointer):
    """A checkpointer that imitates a slow disk. It writes a copied state only at the next save or at the end of
    training.

    A checkpoint with values from a later step is thus detected. If a checkpoint is copied in several parts, training
    waits for it, so it is written at once.
    """

    def __init__(self, *arguments, **settings) -> None:
        super().__init__(*arguments, **settings)
        self._may_write: dict[Save, threading.Event] = {}

    def save(self, step: int, shards: dict[str, Shard], meta: dict) -> float:
        self._release()
        self._may_write[Save(step, self._serial)] = threading.Event()
        return super().save(step, shards, meta)

    def finish(self, required: bool = False) -> list[SaveResult]:
        self._release()
        return super().finish(required)

    def _release(self) -> None:
        for event in self._may_write.values():
            event.set()

    def _write(self, flight: SaveInFlight) -> str | None:
        if not flight.buffers.in_pieces:
            self._may_write[flight.save].wait()
        return super()._write(flight)


class _ProvenTrainer(Trainer):
    """Sluice's Trainer that also writes evidence of every step."""

    def prove(self, rank: RankSetup, part: RunPart, start: Evidence) -> None:
        """Train and write each step's evidence. start: evidence for the initial state."""
        self._rank, self._proof, self._part = rank, start.info.proof, part
        self._folder = RunPaths(self.run.config).path.parent / EVIDENCE
        watched = self._proof == "tiles" or is_rounded(self._proof, self.run.config)
        self._watch = EvidenceWatch(self.run.parts.chunks, sent=watched)
        self._parts_watch = PartsWatch(self.run.parts.chunks, self.run.parts.precision) if watched else None
        needs_whole = self._proof == "fp32" and self.run.config.optim.facts.matrices.is_whole
        self._exact = ExactUpdates(self.run.config, self.run.parts.zero) if needs_whole else None
        self.run.engine = _WatchedStep(self.run.engine, self.run.parts.zero, self._saw, part.last)
        self._validation_loss: float | None = None
        self.leave_state(start)
        self.run.hooks = [*self.run.hooks, self]
        self.train()

    def leave_state(self, evidence: Evidence) -> None:
        """Add the rank's state to the evidence, and write it."""
        info, state = evidence.info, self.run.state
        info.updates, info.samples, info.skipped = state.zero.client.updates, state.samples, state.skipped
        for name, shard in self.run.state.shards().items():
            # In check `tiles`, the evidence needs only weights and biases.
            if self._proof != "tiles" or name.startswith(("master.", "bias.")):
                evidence.add_shard("after", name, shard)
        for name, router in self.run.parts.routers().items():
            evidence.add("own", f"bias.{name}", router.bias_E)
        evidence.write(self._folder)

    def on_step(self, run: LiveRun, step: int, record: Record) -> None:
        self._validation_loss = record.get("validation_loss")

    def _step(self, plan: StepPlan, batches: Prefetch) -> StopKind:
        self._watch.clear()
        is_watched = plan.step in watched_steps(self.run.config)
        self._watch.keeps_sent = is_watched
        if self._parts_watch is not None:
            self._parts_watch.clear()
            self._parts_watch.is_on = is_watched
        if self._exact is not None:
            self._exact.clear()
        self._watch.spoils = plan.step == self._part.spoilt and self._rank.mesh.rank == self._rank.mesh.layout.world - 1
        stop = super()._step(plan, batches)
        outcome, gradients = self._outcome
        info = info_of(self._proof, self._part.number, self.run.config, self._rank, plan, outcome)
        info.validation_loss = self._validation_loss
        compiles = getattr(
            self.run.parts.precision.kernels, "compiles_matmul", None
        )  # without this method, torch's matmuls compute, and they round to bf16
        info.sums_in_fp32 = compiles is not None and compiles(torch.empty(0, dtype=torch.bfloat16))
        evidence = Evidence(info)
        add_scores(evidence, self.run.engine, outcome)
        if self._proof == "fp32" and plan.step == self._part.last:
            self._add_weights(evidence)
        if is_watched or self._proof != "tiles":
            evidence.add_seen(self._watch.seen)
            if self._parts_watch is not None:
                evidence.add_seen(self._parts_watch.seen)
            gradients.give(evidence)
        if self._exact is not None:
            self._exact.give(evidence)
        self.leave_state(evidence)
        return stop

    def _add_weights(self, evidence: Evidence) -> None:
        """Add `Engine.weights` to rank 0's evidence. All ranks must call it."""
        if self.run.config.adapter.base is BaseFormat.fp8:
            return  # with an FP8 base, the engine does not return complete weights
        for name, weight in self.run.engine.weights():
            if self._rank.mesh.rank == 0:
                evidence.add("weights", name, weight)

    def _saw(self, outcome: StepOutcome, gradients: "_Gradients") -> None:
        self._outcome, self._watch.is_open = (outcome, gradients), False


class _Gradients:
    """This rank's local gradients, and its shard of reduced gradients."""

    def __init__(self) -> None:
        self.reduced: dict[str, Shard] = {}
        self._local: dict[str, Shard] = {}
        self._sizes: dict[str, Shard] = {}

    def add_local(self, name: str, gradient: Shard) -> None:
        """Record a local gradient before its reduction, summed over micro-batches."""
        held = self._local.get(name)
        if held is None:
            self._local[name] = replace(gradient, local=gradient.local.clone())
            return
        size = self._sizes.setdefault(name, replace(held, local=held.local.double().abs()))
        size.local += gradient.local.abs()
        held.local = held.local + gradient.local.double()

    def give(self, evidence: Evidence) -> None:
        for kind, shards in (("local", self._local), ("sizes", self._sizes), ("reduced", self.reduced)):
            for name, shard in shards.items():
                evidence.add_shard(kind, name, shard)


class _WatchedStep(Engine):
    """An engine that copies gradients before reduction and before the update."""

    def __init__(self, step: Engine, zero: Zero, saw: Callable[[StepOutcome, _Gradients], None], last: int):
        vars(self).update(vars(step))  # takes over the state of the given engine
        self._zero, self._saw, self._last = zero, saw, last

    def run(
        self, plan: StepPlan, batch: Batch, *, stopping: StopKind = StopKind.none, on_phase=lambda _: None
    ) -> StepOutcome:
        gradients = _Gradients()
        self._zero.observer, self._zero.local_observer = gradients.reduced.update, gradients.add_local
        stop = StopKind.on_disk if plan.step == self._last else StopKind.none
        outcome = super().run(plan, batch, stopping=stop, on_phase=on_phase)
        # The run repeats a skipped step to find the cause. The repeated step must not add evidence.
        self._zero.observer = self._zero.local_observer = None
        self._saw(outcome, gradients)
        return outcome


def info_of(proof: str, part: int, config: Config, rank: RankSetup, plan: StepPlan, outcome: StepOutcome) -> StepInfo:
    measured, mesh = outcome.measured, rank.mesh
    return StepInfo(
        proof=proof,
        part=part,
        step=plan.step,
        rank=mesh.rank,
        layout=layout_name(config),
        device=rank.device.type,
        dp=mesh.layout.dp,
        dp_rank=mesh.dp_rank,
        first=share_of(config, plan.batch_size, mesh.dp_rank)[0],
        cp=mesh.layout.cp,
        cp_rank=mesh.cp_rank,
        ep=mesh.layout.ep,
        ep_ranks_per_node=mesh.layout.ep_ranks_per_node,
        dispatch=config.parallel.dispatch,
        micro_batch_size=config.micro_batch_size,
        plan={name: value for name, value in asdict(plan).items() if name != "step"},
        main_loss=measured.main_loss,
        mtp_losses=measured.mtp_losses,
        balance_loss=measured.balance_loss,
        index_loss=measured.index_loss,
        loads=measured.loads_LE.tolist(),
        grad_norm=outcome.update.grad_norm,
        applied=outcome.update.applied,
    )


def main() -> int:
    config, place = given_run()
    parts = [int(part) for part in sys.argv[2:]] or PARTS
    return run_rank(config, place, RunPaths(config).logs, parts=parts)


if __name__ == "__main__":
    sys.exit(leave(main()))
