"""Small faults that a callback of the recipe injects into a training rank. The product has no code for these faults.

`Saboteur` is the callback. At the end of the previous step it installs its faults on the affected ranks. The fault acts
in the next step and records its time in the run's folder. See bench/faults_named.py.
"""

import ctypes
import errno
import gc
import itertools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

STRIKES_AFTER = 6
"""Number of normal steps before the fault."""
LONG = 1e6
MEMORY_GROUPS, GROUP_PREFIX = Path("/sys/fs/cgroup/memory"), "faults-named-"
"""Folder of the control groups of version 1, and the prefix of the names of this benchmark's groups."""
_now = time.time
_step = [0]
"""The newest completed step."""
_strikes: list[Path] = []
"""File that records the time of the fault."""


class Saboteur:
    """The callback, see the module docstring. faults: for each faulty rank the name of a fault in FAULTS."""

    def __init__(self, faults: dict[int, str]):
        self._faults = {int(rank): name for rank, name in faults.items()}

    def on_step(self, run: Any, step: int, record: dict) -> None:
        _step[0] = step
        name = self._faults.get(run.rank)
        if name and step == (1 if name in EARLY else STRIKES_AFTER):
            _strikes.append(run.folder / f"struck_{run.rank}")
            FAULTS[name](run)


def strike() -> None:
    """Records that the fault happens now."""
    if not _strikes[0].exists():
        _strikes[0].write_text(str(_now()))


class NoWork:
    """Returned in place of the work of a collective that was left out."""

    def wait(self, *_: object) -> None:
        pass


def meddle(name: str, number: int, act: Callable) -> None:
    """Replaces the `number`-th call of a function of torch.distributed by `act`."""
    original, calls = getattr(dist, name), itertools.count(1)

    def meddled(*given: Any, **named: Any) -> Any:
        if next(calls) != number:
            return original(*given, **named)
        strike()
        return act(original, *given, **named)

    setattr(dist, name, meddled)


def skip(original: Callable, *given: Any, **named: Any) -> NoWork | None:
    return NoWork() if named.get("async_op") else None


def repeat(original: Callable, tensor: Any, *given: Any, **named: Any) -> Any:
    original(tensor.clone(), *given, **named)
    return original(tensor, *given, **named)


def resize(original: Callable, tensor: Any, *given: Any, **named: Any) -> Any:
    return original(torch.cat([tensor.flatten(), tensor.flatten()]), *given, **named)


def retype_to_half(original: Callable, tensor: Any, *given: Any, **named: Any) -> Any:
    return original(tensor.float(), *given, **named)


def retype(original: Callable, tensor: Any, *given: Any, **named: Any) -> Any:
    return original(tensor.to(torch.float64 if tensor.dtype == torch.int64 else torch.int64), *given, **named)


def delay(original: Callable, *given: Any, **named: Any) -> Any:
    time.sleep(LONG)


def swap_all_reduces(run: Any) -> None:
    """The next two all-reduces run in the wrong order."""
    original, kept = dist.all_reduce, []

    def first(_: Callable, *given: Any, **named: Any) -> None:
        kept.append((given, named))

    def meddled(*given: Any, **named: Any) -> Any:
        if not kept:
            strike()
            kept.append((given, named))
            return None
        dist.all_reduce = original
        result = original(*given, **named)
        early, keywords = kept[0]
        original(*early, **keywords)
        return result

    dist.all_reduce = meddled


def gather_instead(original: Callable, tensor: Any, *given: Any, **named: Any) -> None:
    group = named.get("group")
    dist.all_gather([torch.empty_like(tensor) for _ in range(dist.get_world_size(group))], tensor, group=group)


def in_forward(run: Any, act: Callable[[], Any], layer: int = -1) -> None:
    """Calls `act` at the next forward of a block."""
    block = list(run.chunks[0].layers.values())[layer]

    def enter(module: Any, given: tuple) -> None:
        handle.remove()
        strike()
        act()

    handle = block.register_forward_pre_hook(enter)


def in_backward(run: Any, act: Callable[[], Any]) -> None:
    block = list(run.chunks[0].layers.values())[-1]

    def leave(module: Any, given: tuple, output: Any) -> None:
        handle.remove()
        tensor = output[0] if isinstance(output, tuple) else output
        tensor.register_hook(lambda _: (strike(), act())[1])

    handle = block.register_forward_hook(leave)


def in_loader(act: Callable[[], Any]) -> None:
    """Calls `act` at the next sequence that the loader builds. Some earlier batches are already built."""
    from train.data import dataset

    original = dataset._Rows.of

    def of(rows: Any, row: int) -> Any:
        strike()
        act()
        return original(rows, row)

    dataset._Rows.of = of


def raise_error() -> None:
    raise RuntimeError("an error of the user's code")


def sleep_long() -> None:
    time.sleep(LONG)


def take_held_lock() -> None:
    lock = threading.Lock()
    threading.Thread(target=lambda: (lock.acquire(), time.sleep(LONG)), daemon=True).start()
    time.sleep(0.1)
    lock.acquire()


def join_dead_thread() -> None:
    thread = threading.Thread(target=lambda: time.sleep(LONG), daemon=True)
    thread.start()
    thread.join()


def wait_for_event() -> None:
    threading.Event().wait()


def read_dead_pipe() -> None:
    reader, _ = os.pipe()
    os.read(reader, 1)


def wait_for_process() -> None:
    import subprocess

    subprocess.run(["sleep", "1000"], check=False)


def loop_in_python() -> None:
    while True:
        pass


def loop_in_c() -> None:
    re.match(r"(a+)+$", "a" * 60 + "b")


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def read_nowhere() -> None:
    ctypes.string_at(0)


def leave(code: int) -> Callable[[], None]:
    return lambda: os._exit(code)


def poison(kind: str) -> Callable[[Any], None]:
    """From the next step on, a number is not finite."""

    def install(run: Any) -> None:
        strike()
        block = list(run.chunks[0].layers.values())[-1]
        if kind == "weight":
            with torch.no_grad():
                next(param for param in block.parameters() if param.dim() == 2 and param.numel()).view(-1)[3] = float(
                    "nan"
                )
        elif kind == "output":
            block.register_forward_hook(lambda module, given, output: output * float("nan"))
        else:
            block.register_full_backward_hook(
                lambda module, given, output: tuple(g * float("inf") if g is not None else g for g in given)
            )

    return install


def flip_bit(run: Any) -> None:
    """Flips one bit of one weight on this replica."""
    strike()
    block = list(run.chunks[0].layers.values())[-1]
    weight = next(param for param in block.parameters() if param.dim() == 2 and param.numel())
    whole = {2: torch.int16, 4: torch.int32}[weight.element_size()]
    with torch.no_grad():
        weight.view(whole).view(-1)[5] ^= 1 << 3


def flip_state(name: str) -> Callable[[Any], None]:
    """Flips one bit of one master weight or moment, after an update."""

    def install(run: Any) -> None:
        strike()
        optimizer = next(one for one in gc.get_objects() if isinstance(one, torch.optim.Optimizer) and one.state)
        flat = optimizer.param_groups[0]["params"][0]
        tensor = flat if name == "master" else optimizer.state[flat][name]
        whole = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
        with torch.no_grad():
            tensor.view(whole).view(-1)[7] ^= 1 << 3

    return install


def drop_message(keep: Callable[[Any], bool]) -> Callable[[Any], None]:
    """Leaves out one send or receive of a pipeline."""

    def install(run: Any) -> None:
        original = dist.batch_isend_irecv

        def meddled(operations: list) -> list:
            left = [operation for operation in operations if keep(operation)]
            if len(left) < len(operations):
                dist.batch_isend_irecv = original
                strike()
            return original(left) if left else []

        dist.batch_isend_irecv = meddled

    return install


def resize_message(run: Any) -> None:
    original = dist.batch_isend_irecv

    def meddled(operations: list) -> list:
        for operation in operations:
            if operation.op is dist.isend:
                dist.batch_isend_irecv = original
                strike()
                operation.tensor = operation.tensor.flatten()[: operation.tensor.numel() // 2].contiguous()
        return original(operations)

    dist.batch_isend_irecv = meddled


def die_in_helper(run: Any) -> None:
    """A thread of user code ends the process."""
    threading.Thread(target=lambda: (strike(), os._exit(1)), daemon=True).start()


def run_out_of_memory() -> None:
    """Takes too much memory in a separate control group, as a batch system creates it. The kernel kills the process."""
    group = MEMORY_GROUPS / f"{GROUP_PREFIX}{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(64 << 20))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    kept = []
    while True:
        kept.append(b"x" * (1 << 20))


def set_clock(seconds: float) -> Callable[[Any], None]:
    """The clock of this process is wrong by so many seconds."""

    def install(run: Any) -> None:
        time.time = lambda: _now() + seconds

    return install


def hang_in_saves(run: Any) -> None:
    """From now on, writing a checkpoint to the disk hangs."""

    def wait(file: Any) -> None:
        strike()
        time.sleep(LONG)

    os.fsync = wait


def refuse_saves(run: Any) -> None:
    """On this rank, the disk refuses every checkpoint, and also the file that would report this failure."""
    from train.checkpoint import commit
    from train.checkpoint.staging import StagingBuffers

    def refuse(*given: Any, **_: Any) -> None:
        strike()
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(given[-1]))

    StagingBuffers.write = commit.atomic_write_text = refuse


def fail_by_wrong_clock(run: Any) -> None:
    """The clock of this process is set an hour ahead, and then the process fails."""
    set_clock(3600.0)(run)
    in_forward(run, raise_error)


def raise_interrupt() -> None:
    raise KeyboardInterrupt


def gather_every_third_step(leaves_out: bool) -> Callable[[Any], None]:
    """All ranks gather a value in every third step. With leaves_out, one rank stops doing this after some steps."""

    def install(run: Any) -> None:
        original, done = run.chunks[0].forward, [_step[0]]

        def forward(*given: Any, **named: Any) -> Any:
            if _step[0] % 3 == 0 and _step[0] not in done:
                done.append(_step[0])
                if leaves_out and len(done) > 6:
                    strike()
                else:
                    dist.all_gather([torch.zeros(3) for _ in range(dist.get_world_size())], torch.ones(3))
            return original(*given, **named)

        run.chunks[0].forward = forward

    return install


def keep_other_version(run: Any) -> None:
    """This rank has another version of the code: it sums every tensor a second time, in half precision."""
    original = dist.all_reduce

    def twice(tensor: Any, *given: Any, **named: Any) -> Any:
        strike()
        original(
            tensor.to(torch.float16 if tensor.is_floating_point() else tensor.dtype),
            *given,
            **named | {"async_op": False},
        )
        return original(tensor, *given, **named)

    dist.all_reduce = twice


def _forward(act: Callable[[], Any]) -> Callable[[Any], None]:
    return lambda run: in_forward(run, act)


def _meddle(name: str, act: Callable, number: int = 1) -> Callable[[Any], None]:
    return lambda run: meddle(name, number, act)


FAULTS: dict[str, Callable[[Any], None]] = {
    "loader_sleep": lambda run: in_loader(sleep_long),
    "loader_pipe": lambda run: in_loader(read_dead_pipe),
    "loader_error": lambda run: in_loader(raise_error),
    "loader_killed": lambda run: in_loader(kill(signal.SIGKILL)),
    "sleep_before": _meddle("all_reduce", delay),
    "sleep_before_exchange": _meddle("all_to_all_single", delay),
    "sleep_in_forward": _forward(sleep_long),
    "sleep_in_backward": lambda run: in_backward(run, sleep_long),
    "lock": _forward(take_held_lock),
    "join": _forward(join_dead_thread),
    "event": _forward(wait_for_event),
    "pipe": _forward(read_dead_pipe),
    "process": _forward(wait_for_process),
    "loop": _forward(loop_in_python),
    "loop_in_c": _forward(loop_in_c),
    "skip": _meddle("all_reduce", skip),
    "skip_later": _meddle("all_reduce", skip, 2),
    "skip_exchange": _meddle("all_to_all_single", skip, 3),
    "skip_gather": _meddle("all_gather_into_tensor", skip),
    "repeat": _meddle("all_reduce", repeat),
    "swap": swap_all_reduces,
    "size": _meddle("all_reduce", resize),
    "type": _meddle("all_reduce", retype),
    "type_of_half": _meddle("all_reduce", retype_to_half),
    "other": _meddle("all_reduce", gather_instead),
    "stop": _forward(kill(signal.SIGSTOP)),
    "killed": _forward(kill(signal.SIGKILL)),
    "bus_error": _forward(kill(signal.SIGBUS)),
    "illegal": _forward(kill(signal.SIGILL)),
    "terminated": _forward(lambda: (signal.signal(signal.SIGTERM, signal.SIG_DFL), kill(signal.SIGTERM)())),
    "interrupt": _forward(raise_interrupt),
    "abort": _forward(os.abort),
    "segfault": _forward(read_nowhere),
    "exit_0": _forward(leave(0)),
    "exit_2": _forward(leave(2)),
    "exit_3": _forward(leave(3)),
    "exit_7": _forward(leave(7)),
    "exit_75": _forward(leave(75)),
    "sys_exit": _forward(lambda: sys.exit(0)),
    "error": _forward(raise_error),
    "error_in_backward": lambda run: in_backward(run, raise_error),
    "helper_exits": die_in_helper,
    "nan_weight": poison("weight"),
    "nan_output": poison("output"),
    "inf_gradient": poison("gradient"),
    "flip": flip_bit,
    "flip_master": flip_state("master"),
    "flip_moment": flip_state("exp_avg_sq"),
    "out_of_memory": _forward(run_out_of_memory),
    "clock_ahead": set_clock(3600.0),
    "clock_behind": set_clock(-3600.0),
    "disk_slow": lambda run: in_loader(lambda: time.sleep(30)),
    "disk_dead": hang_in_saves,
    "disk_refuses": refuse_saves,
    "clock_error": fail_by_wrong_clock,
    "periodic": gather_every_third_step(False),
    "periodic_left_out": gather_every_third_step(True),
    "version": keep_other_version,
    "slow": lambda run: (strike(), run.chunks[0].norm.register_forward_pre_hook(lambda *_: time.sleep(0.05))),
    "link_cut": lambda run: strike(),
    "link_lossy": lambda run: strike(),
    "link_slow": lambda run: strike(),
    "send_left_out": drop_message(lambda operation: operation.op is not dist.isend),
    "receive_left_out": drop_message(lambda operation: operation.op is not dist.irecv),
    "send_of_half": resize_message,
}
EARLY = {"clock_ahead", "clock_behind", "periodic", "periodic_left_out", "version"}
"""Faults that exist from the first step on."""
