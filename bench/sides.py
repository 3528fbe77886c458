"""Sides of a speed comparison: each is a separate set of processes, one per rank, and the sides take turns.

A side starts its ranks with one command line. A rank finds RANK and WORLD_SIZE in its environment, as from torchrun,
and in BENCH_STORE the init_method of its ranks' rendezvous. `serve` is the body of a rank: it takes one step, then as
many as each line on its input asks for. Between two requests a rank only waits for input, so a waiting side takes no
time from the working side.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

WARM_STEPS = 3
LIMIT = 600.0
"""Maximum seconds until a side answers."""
TRIAL = 1.0
"""Seconds of each turn from which `fastest` chooses."""
TRIALS = 3
"""Number of turns of each variant. The variants take turns, so that a short disturbance of the machine does not decide
the choice."""


@dataclass
class SideResult:
    """The result of one side of a case."""

    rates: list[float]
    """Tokens per second, by round."""
    first_step: float
    peak_memory: int
    """Peak resident bytes of the side's largest rank."""
    cpu_seconds: list[float] = field(default_factory=list)
    """CPU seconds of one step, over all ranks and threads, by round. Other work on the machine changes them less than
    the rates."""
    choice: str = ""
    """Name of the variant that `fastest` chose."""
    tried: dict[str, float | str] = field(default_factory=dict)
    """All variants: tokens per second of a short turn, or why the variant cannot run."""


class Side:
    """Ranks that train on request. If they cannot, raises RuntimeError with the output of the first rank that failed.

    command: starts a rank. tokens: tokens of a step over all ranks. limit: maximum seconds until the first step, and
    for the warm-up steps.
    """

    def __init__(self, command: list[str], tokens: int, *, ranks: int = 1, threads: int = 1, limit: float = LIMIT):
        self.choice, self.tried = "", {}
        self._tokens = tokens
        self._folder = tempfile.TemporaryDirectory()
        started = time.time()
        shared = os.environ | {
            "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo",
            "BENCH_STORE": f"file://{self._folder.name}/store",
        }  # fmt: skip
        self.processes = []
        for rank in range(ranks):
            with self._errors(rank).open("w") as errors:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                    )
                )
        try:
            self.first_step: float = max(self._answers(limit)) - started
            """Seconds from the start of the processes to the end of their first step."""
            self._steps(WARM_STEPS - 1, limit)
        except BaseException:
            self.kill()
            raise

    def turn(self, seconds: float) -> tuple[float, float]:
        """Runs steps for about this time. Returns the tokens per second, and the CPU seconds of a step."""
        return self._steps(max(1, round(seconds / self._step_seconds)))

    def peak_memory(self) -> int:
        """Ends the processes. Returns the peak resident bytes of the largest process."""
        for process in self.processes:
            process.stdin.close()
        peak = max(self._answers())
        for process in self.processes:
            process.wait()
        return peak

    def kill(self) -> None:
        """Kill the processes."""
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        self._folder.cleanup()

    def _steps(self, number: int, limit: float = LIMIT) -> tuple[float, float]:
        for process in self.processes:
            process.stdin.write(f"{number}\n")
            process.stdin.flush()
        seconds, cpu = zip(*self._answers(limit), strict=True)
        self._step_seconds = max(seconds) / number
        return self._tokens / self._step_seconds, sum(cpu) / number

    def _answers(self, limit: float = LIMIT) -> list:
        """Returns one answer of every rank."""
        found, deadline = {}, time.monotonic() + limit
        waiting = {process.stdout: rank for rank, process in enumerate(self.processes)}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RuntimeError(f"ranks {sorted(waiting.values())} did not answer within {limit:.0f} s")
            for stream in ready:
                rank = waiting.pop(stream)
                line = stream.readline()
                if not line:
                    raise RuntimeError(self._last_words(rank))
                found[rank] = json.loads(line)
                if isinstance(found[rank], str):
                    raise RuntimeError(found[rank])
        return [found[rank] for rank in range(len(self.processes))]

    def _errors(self, rank: int) -> Path:
        return Path(self._folder.name) / f"{rank}.errors"

    def _last_words(self, rank: int) -> str:
        """The last output of a rank that ended without an answer."""
        code = self.processes[rank].wait()
        said = self._errors(rank).read_text(errors="replace").strip().splitlines()
        return said[-1] if said else f"exit code {code}"


def fastest(starts: Mapping[str, Callable[[float], Side]]) -> Side:
    """Chooses among sides that do the same work in several variants. Each variant takes a few short turns, and the one
    with the fastest turn is returned; the others are ended.

    starts: functions that start a variant, by name. Their argument is the maximum seconds until the side answers. After
    the first variant, this limit is one and a half times the time that an earlier variant took to its first step, plus
    ten seconds. Raises RuntimeError if no variant can run.
    """
    sides: dict[str, Side] = {}
    tried: dict[str, float | str] = {}
    limit = LIMIT
    try:
        for name, start in starts.items():
            try:
                sides[name] = start(limit)
                limit = min(limit, 10 + 1.5 * sides[name].first_step)
            except RuntimeError as error:
                tried[name] = str(error)
        turns: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(TRIALS):
            for name in list(turns):
                try:
                    turns[name].append(sides[name].turn(TRIAL)[0])
                except RuntimeError as error:
                    tried[name] = str(error)
                    del turns[name]
        if not turns:
            raise RuntimeError(next(iter(tried.values())))
        rates = {name: max(each) for name, each in turns.items()}
        choice = max(rates, key=lambda name: rates[name])
        best = sides.pop(choice)
        best.choice, best.tried = choice, tried | rates
        return best
    finally:
        for side in sides.values():
            side.kill()


def take_turns(
    starts: dict[str, Callable[[], Side]], rounds: int, seconds: float, between: Callable[[], None] = lambda: None
) -> dict[str, SideResult | str]:
    """Runs all sides in turns. Returns the result by name, or why a side cannot run. `between` is called once per
    round."""
    sides: dict[str, Side] = {}
    failed: dict[str, SideResult | str] = {}
    try:
        for name, start in starts.items():
            try:
                sides[name] = start()
            except RuntimeError as error:
                failed[name] = str(error)
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(rounds):
            between()
            for name, side in sides.items():
                turns[name].append(side.turn(seconds))
        done = {}
        for name, side in sides.items():
            rates, cpu = (list(column) for column in zip(*turns[name], strict=True))
            done[name] = SideResult(rates, side.first_step, side.peak_memory(), cpu, side.choice, side.tried)
        return done | failed
    finally:
        for side in sides.values():
            side.kill()


def ratios(ours: SideResult, peer: SideResult) -> list[float]:
    """The ratio of our rate to the peer's rate, for every round."""
    return [a / b for a, b in zip(ours.rates, peer.rates, strict=True)]


def cpu_ratio(ours: SideResult, peer: SideResult) -> float:
    """The peer's CPU time of a step divided by ours. It is above 1 if ours takes less."""
    return statistics.median(b / a for a, b in zip(ours.cpu_seconds, peer.cpu_seconds, strict=True))


def serve(build: Callable[[], Callable[[], object]], device: str = "cpu") -> None:
    """Runs one rank. It reports the end of its first step. It answers each requested number of steps with the seconds
    and CPU seconds that they took. At the end it reports its peak memory. If it cannot run, it reports why and ends.

    Output of libraries goes to stderr, because stdout is for answers. device: the device whose memory is reported. On a
    GPU, the step itself must wait until the GPU has finished.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: object) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        step = build()
        step()
        answer(time.time())
        for line in sys.stdin:
            began, cpu = time.perf_counter(), time.process_time()
            for _ in range(int(line)):
                step()
            answer((time.perf_counter() - began, time.process_time() - cpu))
        import torch

        from train.loop.hooks.rank_progress import peak_memory

        answer(peak_memory(torch.device(device)))
    except Exception as error:
        answer(f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise
