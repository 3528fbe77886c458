"""Sets up a process as one rank: errors, device, process groups."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from cluster.cause import Failure, begin_work, end_work
from cluster.clocks import uptime
from cluster.interfaces import name_interface
from cluster.place import Place, given_meeting
from cluster.stacks import answer_requests
from conf.disk import explain_disk_error
from conf.errors import EXIT_CRASH, EXIT_STOPPED, EXIT_USER, RunEnded, StopInterrupt, UserError, causes
from conf.own_code import named_by
from conf.run_paths import RunPaths
from conf.schema import ROOT, Config
from conf.words import say
from parallel.exchange import is_timeout, patient_group, refuse_pickles
from parallel.layout import read_layout
from parallel.mesh import build_mesh, form_later
from parallel.signed_store import open_sealed_store
from train.data.prepare_progress import ReportProgress, show_progress, silent
from train.kernels.cpu.processor import threads_of
from train.kernels.deterministic import repeat_bits
from train.kernels.device import bind_to_numa_node, grow_segments, record_collectives, usable_gpu
from train.rank_parts import RankSetup

T = TypeVar("T")
PREPARATION = timedelta(days=7)
"""Longest wait for data preparation."""


def guarded(place: Place, failures: Path | None, work: Callable[[], int]) -> int:
    """Run the work of a rank. Return an exit code, even after an error or SystemExit.

    failures: folder for the errors of ranks. None: there is no driver; errors are printed, and a UserError is raised.
    """
    with _marked(place, failures):
        return _guarded(place, failures, work)


@contextmanager
def _marked(place: Place, failures: Path | None) -> Iterator[None]:
    """Returns a context manager that creates a marker file of this rank and removes it on exit.

    If the process dies, the file remains.
    """
    if failures is None:
        yield
        return
    try:
        begin_work(failures, place.rank)
    except OSError as error:
        say(
            f"the marker file of this rank could not be written ({explain_disk_error(error)}); the run continues",
            file=sys.stderr,
        )
    yield
    with suppress(OSError):  # a read-only disk stops the run anyway
        end_work(failures, place.rank)


def _guarded(place: Place, failures: Path | None, work: Callable[[], int]) -> int:
    # DeepSpeed still calls collectives by their old names.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    answer_requests(failures, place.rank)
    try:
        return work()
    except KeyboardInterrupt as error:
        if failures is None:
            raise
        if not isinstance(error, StopInterrupt):
            return _report(error, place, failures)
        if place.rank == 0:  # nothing else tells the user
            say("stopped before the first step; the same command resumes", file=sys.stderr)
        with suppress(OSError):  # the reason why other ranks fail
            words = "this rank alone received a stop signal, before it completed a step"
            Failure(place.rank, uptime(), "stopped", words, EXIT_STOPPED).write(failures)
        return EXIT_STOPPED
    except (Exception, SystemExit) as error:
        found = next((one for one in causes(error) if isinstance(one, (UserError, RunEnded))), error)
        if failures is None and isinstance(found, UserError):
            raise found from found.__cause__
        return _report(found, place, failures)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def set_up_rank(config: Config, place: Place) -> RankSetup:
    """Sets up this rank's device and process groups. Collective. Raises UserError."""
    device = choose_device(config, place)
    if not dist.is_initialized():  # an earlier engine of this process may have initialised it
        start_process_group(config, place, device)
    mesh = build_mesh(read_layout(config, place.local_world), timedelta(seconds=config.cluster.timeout))
    return RankSetup(device, mesh)


def choose_device(config: Config, place: Place) -> torch.device:
    """Chooses this rank's device and CPU cores, near its GPU."""
    wanted = config.cluster.device
    torch.set_num_threads(threads_of(config.cluster.threads, place.local_world))
    if config.cluster.deterministic:
        repeat_bits()
    if wanted != "cpu" and usable_gpu(wanted):
        grow_segments()
        device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        bind_to_numa_node(device)
        return device
    return torch.device("cpu")


def start_process_group(config: Config, place: Place, device: torch.device) -> None:
    """Start the default process group."""
    refuse_pickles()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    bound = device if device.type == "cuda" and place.world > 1 else None  # a single rank needs no communicator
    if bound is not None:
        record_collectives(RunPaths(config).path / "logs")  # the folder of a node's agent is removed
    timeout = timedelta(seconds=config.cluster.timeout)
    store: dist.Store | None = None  # None: torch uses torchrun's store
    meeting = given_meeting()
    if place.world == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = dist.HashStore()
    elif meeting is not None and meeting.file is not None:
        store = dist.FileStore(meeting.file, place.world)
        store.set_timeout(timeout)
    elif meeting is not None:
        store = open_sealed_store(place.rank, meeting.address, meeting.port, meeting.secret, timeout)
    elif place.local_world < place.world:  # torchrun started ranks on several nodes
        name_interface(os.environ["MASTER_ADDR"])
    dist.init_process_group(
        backend, store=store, rank=place.rank, world_size=place.world, timeout=timeout, device_id=bound
    )
    if bound is not None:
        form_later()


def in_turn(place: Place, make: Callable[[ReportProgress], T]) -> T:
    """Run `make` on one rank of every machine, and then on the other ranks."""
    with patient_group(PREPARATION) as everybody:
        if place.local_rank == 0:
            with show_progress() as progress:
                made = make(progress)
            dist.barrier(group=everybody)
            return made
        dist.barrier(group=everybody)
    return make(silent)


def _report(error: BaseException, place: Place, failures: Path | None) -> int:
    """Write the error for the driver, or print it if there is no driver."""
    expected = isinstance(error, (UserError, RunEnded))
    code = error.code if expected else EXIT_CRASH
    kind = "user" if code == EXIT_USER else "timeout" if is_timeout(error) else "crash"
    failure = Failure(place.rank, uptime(), kind, str(error), code, list(getattr(error, "ranks", ())))
    if not expected:
        _tell(failure, list(causes(error)))
    text = failure.headline or failure.message
    try:
        if failures is not None:
            failure.write(failures)
            return code
    except OSError as refused:
        text = f"{text}\n(the driver cannot read this: {refused})"
    who = "" if place.world == 1 else f"rank {place.rank}: "
    say("" if expected else failure.message, f"error: {who}{text}", sep="", file=sys.stderr)
    return code


def _tell(failure: Failure, chain: list[BaseException]) -> None:
    """Describe a failure by the error that occurred first.

    chain: the last error, then its causes, back to the first error.
    """
    first = chain[-1]
    frames = traceback.extract_tb(first.__traceback__)
    failure.headline = _first_line(first)
    if own := named_by(frames):
        failure.headline += f" ({own})"
    elif frames:
        path = Path(frames[-1].filename)
        path = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        failure.headline += f" ({path}:{frames[-1].lineno}, in {frames[-1].name})"
    became = [f"which became {_first_line(wrapper)}\n" for wrapper in reversed(chain[:-1])]
    failure.message = "".join([*traceback.format_exception(first, chain=False), *became])
    if became:
        failure.whole = "".join(traceback.format_exception(chain[0]))


def _first_line(error: BaseException) -> str:
    """Returns the type and the first line of an error."""
    words = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
