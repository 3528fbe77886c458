"""One rank, top to bottom. `python -m train.worker CONFIG` is a rank that the driver started."""

import contextlib
import faulthandler
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from train.cpu import threads_of, tune_cpu

tune_cpu()  # before torch allocates anything

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from cluster.cause import Failure  # noqa: E402
from cluster.driver.copies import given_shelves  # noqa: E402
from cluster.launch import Place, given_attempt, given_meeting, given_run  # noqa: E402
from conf.disk import disk_errors, let_output_be_lost  # noqa: E402
from conf.errors import EXIT_CRASH, EXIT_USER, DiskFailed, UserError  # noqa: E402
from conf.schema import Config  # noqa: E402
from parallel.exchange import from_rank_0, refuse_pickles  # noqa: E402
from parallel.mesh import Layout, build_mesh, form_later  # noqa: E402
from parallel.store import open_sealed_store  # noqa: E402
from parallel.zero.engine import import_deepspeed  # noqa: E402
from train.attention_choice import choose_attention  # noqa: E402
from train.checkpoint.checkpointer import Checkpointer  # noqa: E402
from train.checkpoint.commit import next_attempt  # noqa: E402
from train.checkpoint.memory import MemoryCopies  # noqa: E402
from train.data.corpus import silent  # noqa: E402
from train.data.files import Progress  # noqa: E402
from train.data.prepare import prepare  # noqa: E402
from train.data.progress import show_progress  # noqa: E402
from train.explain import Explained, explained  # noqa: E402
from train.gpu import grow_segments, idle_gpu, probe_in_turn, record_collectives, usable_gpu  # noqa: E402
from train.loop.finish import finish  # noqa: E402
from train.loop.measure import Measure  # noqa: E402
from train.loop.resume import has_start, restore  # noqa: E402
from train.loop.state import State  # noqa: E402
from train.loop.step_work import StepWork  # noqa: E402
from train.loop.stop import StopRequest  # noqa: E402
from train.loop.trainer import Diverged, Flops, Overtaken, Trainer  # noqa: E402
from train.metrics.peak import peak_flops  # noqa: E402
from train.metrics.writer import open_writer  # noqa: E402
from train.model.count import flops_per_token  # noqa: E402
from train.native.model import choose, missed  # noqa: E402
from train.parallelize import parallelize  # noqa: E402
from train.precision.build import activation_dtype  # noqa: E402
from train.run_folder import RunPaths  # noqa: E402

T = TypeVar("T")
PREPARATION = timedelta(days=7)
"""Longest wait for data to be made: tokenising a large text takes longer than any collective of the training may."""


def preload() -> None:
    """Import what a rank needs once it knows its device, where that can only be the CPU; see cluster/node/standby.py."""
    if not torch.cuda.is_available():
        import_deepspeed(on_cuda=False)


def run_rank(config: Config, place: Place, failures: Path | None = None) -> int:
    """Train as one rank; returns the exit code. failures: see `guarded`."""
    stop = StopRequest()
    try:
        return guarded(place, failures, disk_errors(config)(lambda: _run_explained(config, place, stop)))
    finally:
        stop.close()


def guarded(place: Place, failures: Path | None, work: Callable[[], int]) -> int:
    """Do the work of a rank; an error becomes an exit code.

    failures: the folder where a driver looks for what its ranks say of their errors; it then reports them. None where
    nobody looks, in the only process of a run and under torchrun: errors are printed, and a UserError is raised.
    """
    # DeepSpeed still calls collectives by their old names.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # kill -USR1 PID shows where a rank hangs
    try:
        return work()
    except Exception as error:
        if failures is None and isinstance(error, UserError):
            raise
        return _report(error, place, failures)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _run_explained(config: Config, place: Place, stop: StopRequest) -> int:
    with explained(config, place.rank, RunPaths(config).path / "logs"):
        return _run(config, place, stop)


def _run(config: Config, place: Place, stop: StopRequest) -> int:
    device = choose_device(config, place)
    start_process_group(config, place, device)
    ranks_per_node = config.cluster.ranks_per_node or place.local_world
    layout = Layout(config.parallel.pp, config.parallel.dp, config.parallel.ep, ranks_per_node)
    mesh = build_mesh(layout, timedelta(seconds=config.cluster.timeout))
    probe_in_turn(config, place, device)
    core, core_notes = choose_attention(config, device)
    data = in_turn(place, lambda progress: prepare(config, progress))
    paths = RunPaths(config)
    attempt = from_rank_0(lambda: given_attempt() or next_attempt(paths.checkpoints))
    checkpointer = Checkpointer(
        paths.checkpoints,
        rank=place.rank,
        world_size=place.world,
        attempt=attempt,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        asynchronous=config.checkpoint.asynchronous,
        timeout=config.cluster.timeout,
    )
    copies = None
    if given := given_shelves():
        copies = MemoryCopies(
            *given, rank=place.rank, world_size=place.world, attempt=attempt, timeout=config.cluster.timeout
        )
    is_filled = has_start(config, copies)
    parts = parallelize(config, mesh, device, restored=is_filled, core=core)
    measure = Measure(config.model, mesh, parts.chunks, device, StepWork(parts, mesh.layout))
    state = State(config, mesh, parts.zero, measure.routers, len(measure.layers))
    restored = restore(config, data, state, checkpointer, copies, is_filled)
    notes = restored.notes
    if copies is not None and (why := copies.require_room(state.shards())):
        copies, notes = None, [*notes, why]
    if device.type == "cpu" and activation_dtype(config.precision) == torch.bfloat16 and (why := missed()):
        notes = [*notes, why]
    if why := idle_gpu(config, device):
        notes = [*notes, why]
    notes = [*notes, *core_notes]
    if place.rank == 0:
        data.tokenizer.save(paths.path)
    flops = count_flops(config, device)
    started = time.monotonic()
    writer = (
        open_writer(config, paths.path, resumed_step=state.step, resumed=restored.resumed) if place.rank == 0 else None
    )
    with writer or contextlib.nullcontext():
        for note in [*data.notes, *notes, f"MFU is counted against {flops.label}"] if writer else []:
            writer.note(note)
        code = Trainer(
            config,
            mesh,
            parts,
            data,
            measure,
            state,
            checkpointer,
            copies,
            writer,
            stop,
            flops,
            device,
        ).run()
    if writer is not None:
        with disk_errors(config, kind=DiskFailed):
            finish(config, code, data.tokenizer, device, time.monotonic() - started, writer.wandb_run)
    return code


def choose_device(config: Config, place: Place) -> torch.device:
    """The device of this rank; on CPU also its share of the cores, and whether the model runs compiled code."""
    wanted = config.cluster.device
    if wanted != "cpu" and usable_gpu(wanted):
        grow_segments()
        device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    torch.set_num_threads(threads_of(config.cluster.threads, place.local_world))
    choose(config.cluster.compiled)
    return torch.device("cpu")


def start_process_group(config: Config, place: Place, device: torch.device) -> None:
    """The default group of all ranks, which meet where the driver said or torchrun has a store."""
    refuse_pickles()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    bound = device if device.type == "cuda" and place.world > 1 else None  # one rank needs no communicator
    if bound is not None:
        record_collectives(RunPaths(config).path / "logs")  # in the run's own folder: an agent's is removed
    timeout = timedelta(seconds=config.cluster.timeout)
    store: dist.Store | None = None  # torchrun's
    meeting = given_meeting()
    if place.world == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = dist.HashStore()
    elif meeting is not None and meeting.file is not None:
        store = dist.FileStore(meeting.file, place.world)
        store.set_timeout(timeout)
    elif meeting is not None:
        store = open_sealed_store(place.rank, meeting.address, meeting.port, meeting.secret, timeout)
    dist.init_process_group(
        backend, store=store, rank=place.rank, world_size=place.world, timeout=timeout, device_id=bound
    )
    if bound is not None:
        form_later()


def in_turn(place: Place, make: Callable[[Progress], T]) -> T:
    """The first rank of every machine makes what is not cached yet; the others find it."""
    patient = dist.new_group(backend="gloo", timeout=PREPARATION)
    if place.local_rank == 0:
        with show_progress() as progress:
            made = make(progress)
    dist.barrier(group=patient)
    dist.destroy_process_group(patient)
    return made if place.local_rank == 0 else make(silent)


def count_flops(config: Config, device: torch.device) -> Flops:
    """Operations per token, and the peak of this rank's device."""
    kept = Path(config.data.cache)
    peak = peak_flops(device, activation_dtype(config.precision), given=config.log.peak_flops, cache=kept)
    return Flops(
        causal=flops_per_token(config.model, config.seq_len),
        full=flops_per_token(config.model, config.seq_len, causal=False),
        peak=peak.flops,
        label=f"{peak.flops / 1e12:.3g} TFLOP/s per rank: {peak.label}",
    )


def _report(error: Exception, place: Place, failures: Path | None) -> int:
    """Leave the error where the driver finds it, or print it where there is none."""
    code = getattr(error, "code", EXIT_CRASH)
    kind = "user" if code == EXIT_USER else "timeout" if _is_timeout(error) else "crash"
    expected = isinstance(error, (UserError, Diverged, Overtaken, Explained))
    text = str(error) if expected else "".join(traceback.format_exception(error))
    began = list(error.ranks) if isinstance(error, Diverged) else []
    try:
        if failures is not None:
            Failure(place.rank, time.time(), kind, text, code, began).write(failures)
            return code
    except OSError as refused:
        text = f"{text}\n(the driver cannot read this, as {refused})"
    who = "" if place.world == 1 else f"rank {place.rank}: "
    print(f"error: {who}{text}", file=sys.stderr)
    return code


def _is_timeout(error: BaseException | None) -> bool:
    """gloo and NCCL raise plain errors when a peer does not answer in time, and the pipeline wraps them in its own."""
    while error is not None:
        if isinstance(error, RuntimeError) and "timed out" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def main() -> int:
    let_output_be_lost()
    config, place = given_run()
    return run_rank(config, place, RunPaths(config).logs)


if __name__ == "__main__":
    sys.exit(main())
