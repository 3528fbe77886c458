"""A process as one rank: what becomes of its errors, its device, where it meets the others, and the groups they work in."""

import faulthandler
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from cluster.cause import Failure
from cluster.launch import Place, given_meeting
from conf.errors import EXIT_CRASH, EXIT_USER, RunEnded, UserError
from conf.schema import Config
from parallel.exchange import patient_group, refuse_pickles
from parallel.mesh import Mesh, build_mesh, form_later, read_layout
from parallel.store import open_sealed_store
from train.cpu import threads_of
from train.data.corpus import silent
from train.data.files import Progress
from train.data.progress import show_progress
from train.gpu import grow_segments, probe_in_turn, record_collectives, usable_gpu
from train.run_folder import RunPaths

T = TypeVar("T")
PREPARATION = timedelta(days=7)
"""Longest wait for data to be made: tokenising a large text takes longer than any collective of the training may."""


@dataclass(frozen=True)
class RankSetup:
    """Where a rank computes, and with whom."""

    device: torch.device
    mesh: Mesh


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


def set_up_rank(config: Config, place: Place) -> RankSetup:
    """The device of this rank, found able to compute, and its groups. Collective over all ranks; raises UserError."""
    device = choose_device(config, place)
    start_process_group(config, place, device)
    mesh = build_mesh(read_layout(config, place.local_world), timedelta(seconds=config.cluster.timeout))
    probe_in_turn(config, place, device)
    return RankSetup(device, mesh)


def choose_device(config: Config, place: Place) -> torch.device:
    """The device of this rank; on CPU also its share of the cores."""
    wanted = config.cluster.device
    if wanted != "cpu" and usable_gpu(wanted):
        grow_segments()
        device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    torch.set_num_threads(threads_of(config.cluster.threads, place.local_world))
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
    with patient_group(PREPARATION) as everybody:
        if place.local_rank == 0:
            with show_progress() as progress:
                made = make(progress)
        dist.barrier(group=everybody)
    return made if place.local_rank == 0 else make(silent)


def _report(error: Exception, place: Place, failures: Path | None) -> int:
    """Leave the error where the driver finds it, or print it where there is none."""
    expected = isinstance(error, (UserError, RunEnded))
    code = error.code if expected else EXIT_CRASH
    kind = "user" if code == EXIT_USER else "timeout" if _is_timeout(error) else "crash"
    text = str(error) if expected else "".join(traceback.format_exception(error))
    began = list(error.ranks) if isinstance(error, RunEnded) else []
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
