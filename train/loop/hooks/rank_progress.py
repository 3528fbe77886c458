"""Writes each rank's phase and peak memory to a small file for the driver."""

import contextlib
import json
import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cluster.comm_ring import CommRing
from cluster.run_files import progress_path
from conf.disk import explain_disk_error
from conf.files import atomic_write_text, open_plain
from conf.words import say_note
from train.loop.live_run import LiveRun

SHOWN_PHASES = ("validation", "checkpoint")
"""Phases that the terminal shows. A rank is in these phases only between steps."""


class RankProgress:
    """Writes the file `cluster.run_files.progress_path`: step, phase, Unix time and measurements of the rank.

    phase: step, validation, checkpoint, or the name of a callback's hook method. sequences: number of sequences in the
    step, over all ranks. seconds: duration of the previous step. busy: `seconds` without waits for other ranks. Both
    durations are null at the start. memory: peak bytes of the rank's device, or of the process on a CPU.
    """

    def __init__(self, logs: Path, rank: int, device: torch.device, ring: CommRing | None = None):
        """ring: ring buffer that also receives the rank's phase."""
        self._path, self._device, self._ring = progress_path(logs, rank), device, ring
        self._refused, self._is_beside = False, False
        self._note: Callable[[str], None] = say_note

    def on_start(self, run: LiveRun) -> None:
        self._note = run.warn

    def on_phase(self, run: LiveRun, step: int, phase: str) -> None:
        if self._ring is not None:
            self._ring.enter(phase, step if phase == "data" else None)
        if phase == "data":
            self.say(run, "step", run.plan.batch_size)
        if phase in SHOWN_PHASES:
            self.say(run, phase)
        if run.writer is not None and (phase in SHOWN_PHASES or self._is_beside):
            run.writer.event(phase if phase in SHOWN_PHASES else None)
        self._is_beside = phase in SHOWN_PHASES

    def say(self, run: LiveRun, phase: str, sequences: int = 0) -> None:
        """Report the rank's phase, which is valid until the next report."""
        busy = None if run.seconds is None else run.engine.measure.step_work.busy
        self.write(run.step, phase, sequences, busy, run.seconds)

    def write(
        self,
        step: int,
        phase: str,
        sequences: int = 0,
        busy: float | None = None,
        seconds: float | None = None,
    ) -> None:
        """Replace the file atomically, so that a reader never sees a partial file."""
        news = {"step": step, "phase": phase, "time": time.time(), "sequences": sequences, "busy": busy}
        news |= {"seconds": seconds, "memory": peak_memory(self._device), "on_gpu": self._device.type == "cuda"}
        text = json.dumps(news | {"pid": os.getpid(), "host": platform.node()})
        try:
            atomic_write_text(self._path, text, durable=False)
        except OSError as error:
            self._write_over(text)
            if not self._refused:
                self._refused = True
                self._note(f"progress could not be written ({explain_disk_error(error)}); training continues")

    def _write_over(self, text: str) -> None:
        """Overwrite the old text in place, which works on a full disk too. If the file did not change, the driver would
        think that the rank hangs.

        A mix of the old and the new text is not valid JSON, so a reader ignores it.
        """
        with contextlib.suppress(OSError), open(self._path, "r+b", buffering=0, opener=open_plain) as file:
            size = os.fstat(file.fileno()).st_size
            file.write(text.encode().ljust(size))


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory in bytes: allocated CUDA memory, or the process's resident set size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
