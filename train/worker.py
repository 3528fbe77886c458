"""Runs one rank. The driver starts it as `python -m train.worker CONFIG`."""

import sys
import time
from contextlib import nullcontext
from pathlib import Path

import train.kernels.cpu.tuned  # noqa: F401  before torch allocates anything
from cluster.interrupts import leave  # before other libraries; cluster/interrupts.py gives the reason

# isort: split
import torch

from cluster.driver.copies import given_shelves
from cluster.launch import given_run
from cluster.patience import patience_of
from cluster.place import Place, given_attempt, given_place
from cluster.self_watch import SelfWatch
from cluster.stacks import answer_requests
from conf.disk import disk_errors, let_output_be_lost
from conf.errors import EXIT_OK, DiskFailed
from conf.run_paths import RunPaths
from conf.schema import Config
from parallel.exchange import RankNotes, from_rank_0
from parallel.links import notes_on_links, try_links
from parallel.zero.deepspeed_patches import import_deepspeed
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.commit import next_attempt
from train.checkpoint.memory_copies import MemoryCopies
from train.checkpoint.run_folder import held_by_rank_0
from train.data.prepare import prepare
from train.kernels.choice import choose_kernels, choose_matmuls
from train.kernels.cpu.processor import cpu_name
from train.kernels.device import idle_gpu
from train.kernels.gpu_check import probe_in_turn
from train.kernels.precision import activation_dtype
from train.loop.finish import finish_run
from train.loop.hooks.copies_in_memory import CopiesInMemory
from train.loop.hooks.device_errors import raise_explained
from train.loop.hooks.hook_list import build_hooks
from train.loop.hooks.step_metrics import Flops
from train.loop.hooks.written_text import sample
from train.loop.live_run import LiveRun
from train.loop.record import RankRecorder, recorded
from train.loop.resume import find_start, restore
from train.loop.saver import Saver
from train.loop.state import RunState
from train.loop.stop import StopRequest
from train.loop.trainer import Trainer
from train.loop.training_engine import Engine
from train.metrics.origin import record_machine
from train.metrics.peak import peak_flops
from train.model.count import flops_per_token
from train.model.operations import Kernels
from train.optim.schedules import Schedules
from train.parallelize import parallelize
from train.rank import guarded, in_turn, set_up_rank
from train.show.wandb_sink import sample_table
from train.show.writer import open_writer


def preload() -> None:
    """Import DeepSpeed early on a CPU; see cluster/node/standby.py."""
    if not torch.cuda.is_available():
        import_deepspeed(on_cuda=False)


def run_rank(config: Config, place: Place, failures: Path | None = None) -> int:
    """Train as one rank. Returns the exit code. failures: see train.rank.guarded."""
    stop = StopRequest()
    try:
        return guarded(place, failures, disk_errors(config)(lambda: _run_explained(config, place, stop, failures)))
    finally:
        stop.close()


def _run_explained(config: Config, place: Place, stop: StopRequest, failures: Path | None) -> int:
    """Train as one rank, explain errors, record communication.

    failures: see train.rank.guarded; None without a driver.
    """
    paths, driven = RunPaths(config), failures is not None
    watch = SelfWatch(paths.logs, place, patience_of(config.cluster), ends=given_place() is not None)
    logs = failures or paths.logs
    if not driven and given_place() is not None:
        answer_requests(logs, place.rank)  # a comparison of ranks reads this rank's answers from this folder
    with (
        held_by_rank_0(paths) if place.rank == 0 else nullcontext(),
        nullcontext() if driven else watch,
        raise_explained(config, place.rank, paths.path / "logs"),
        recorded(logs, place) as record,
    ):
        return _run(config, place, stop, record)


def _run(config: Config, place: Place, stop: StopRequest, record: RankRecorder) -> int:
    rank = set_up_rank(config, place)
    device, mesh = rank.device, rank.mesh
    # Use the longer timeout until the first step is done: a rank may load slowly.
    mesh.wait_at_most(max(config.cluster.timeout, config.cluster.start_timeout))
    link_notes = []
    if device.type == "cuda" and place.world > 1:
        link_notes = notes_on_links(
            *try_links(mesh, config.parallel.dispatch_facts, place.local_world, device), config.hardware.rates
        )
    probe_in_turn(config, place, device)
    record.name_groups(mesh)
    paths = RunPaths(config)
    attempt = from_rank_0(lambda: given_attempt() or next_attempt(paths.checkpoints))
    checkpointer = Checkpointer(
        paths.checkpoints,
        rank=place.rank,
        world_size=place.world,
        attempt=attempt,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        timeout=config.cluster.timeout,
        staging=int(config.checkpoint.staging_bytes),
        notes=RankNotes() if place.world > 1 else None,
    )
    copies = None
    if given := given_shelves():
        copies = MemoryCopies(
            *given, rank=place.rank, world_size=place.world, attempt=attempt, timeout=config.cluster.timeout
        )
    start = find_start(config, copies)
    matmuls = from_rank_0(lambda: choose_matmuls(config, device, start.compiled_matmuls()))
    kernels, kernel_notes = choose_kernels(config, device, matmuls)
    data = in_turn(place, lambda progress: prepare(config, progress))
    is_filled = start.has_weights or config.init_from is not None
    parts = parallelize(config, mesh, device, kernels, restored=is_filled)
    flops = count_flops(config, device, kernels)
    in_memory = CopiesInMemory(copies)
    hooks = build_hooks(config, rank, parts, flops, in_memory, record.ring)
    state = RunState(config, mesh, parts, hooks)
    state.compiled_matmuls = matmuls
    restored = restore(config, data, state, checkpointer, copies, start)
    notes = [*link_notes, *data.notes, *restored.notes]
    if state.step < config.steps:
        samples = Schedules(config).samples
        if why := data.train.repeats(state.samples + samples[-1] - samples[state.step]):
            notes.append(why)
    if copies is not None and (why := copies.require_room(state.shards())):
        in_memory.give_up()
        notes.append(why)
    if why := idle_gpu(config, device):
        notes.append(why)
    if place.rank == 0:
        data.save_words(paths.path)
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        record_machine(paths.path, gpu or cpu_name(), place.world, gpu is not None)
    started = time.monotonic()
    writer = (
        open_writer(config, paths.path, resumed_step=state.step, resumed=restored.resumed) if place.rank == 0 else None
    )
    text = None
    with writer or nullcontext():
        if writer is not None:
            for note in (*notes, *kernel_notes, f"the base of MFU is {flops.label}"):
                writer.note(note)
        saver, engine = Saver(config, checkpointer), Engine(config, parts, rank)
        run = LiveRun(config, rank, parts, state, data, engine, saver, writer, hooks)
        trainer = Trainer(run, stop, in_memory)
        record.watch_parts(parts)
        code = trainer.train()
        seconds = time.monotonic() - started
        if writer is not None and code == EXIT_OK:
            with disk_errors(config, kind=DiskFailed):
                text = sample(config, data.tokenizer, device)
            if text is not None:
                writer.show(sample_table(state.step, text))
    if writer is not None and not trainer.goes_on:
        with disk_errors(config, kind=DiskFailed):
            finish_run(config, code, seconds, writer.wandb_run, text)
    return code


def count_flops(config: Config, device: torch.device, kernels: Kernels) -> Flops:
    """Returns the FLOPs per token, and the device's peak FLOP/s."""
    kept = Path(config.data.cache)
    peak = peak_flops(device, activation_dtype(config.precision), kernels, given=config.log.peak_flops, cache=kept)
    return Flops(
        causal=flops_per_token(config.model, config.seq_len, frozen=config.adapter.on),
        full=flops_per_token(config.model, config.seq_len, causal=False, frozen=config.adapter.on),
        peak=peak.flops,
        label=f"{peak.flops / 1e12:.3g} TFLOP/s per rank: {peak.label}",
    )


def main() -> int:
    let_output_be_lost()
    config, place = given_run()
    return run_rank(config, place, RunPaths(config).logs)


if __name__ == "__main__":
    sys.exit(leave(main()))
