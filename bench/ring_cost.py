"""Cost of recording a rank's communication, and of summing bits, as events per step x cost per event / step time.

    python -m bench.ring_cost [--calls 20000] [--runs FOLDER ...]

The cost of an event is the difference in CPU time between calls of a method of torch's groups with and without the
recorder. The method itself does nothing, so the difference contains no message and no other work; the minimum of five
rounds counts. The costs of a pipeline action and of a phase are printed beside it. For each run folder, from its rings
and metrics.jsonl: events per step of the rank with the most, median seconds of a step, and the share.

The sum of a tensor's bits (train/loop/hooks/replicas.py), on which log.replicas_every and log.state_every are based,
has a cost per call and a cost per byte.

Takes about 20 seconds.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from cluster.comm_ring import CommRing, read_traces
from cluster.run_files import ring_path
from conf.errors import EXIT_OK
from conf.words import say
from parallel.comm_recorder import CommRecorder
from train.loop.hooks.replicas import sum_of_bits

ROUNDS = 5


def cost_of_one(calls: int) -> dict[str, float]:
    """CPU seconds of recording a collective with its wait, an action, and a phase."""
    with tempfile.TemporaryDirectory() as folder:
        ring = CommRing(ring_path(Path(folder), 0), 0, 1)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            group, tensor, work = dist.group.WORLD, torch.zeros(8), _NoWait()
            with mock.patch.object(dist.ProcessGroup, "allreduce", lambda *_: work):
                bare = _seconds(calls, lambda: group.allreduce([tensor]).wait())
                with CommRecorder(ring).recording():
                    seen = _seconds(calls, lambda: group.allreduce([tensor]).wait())
        finally:
            dist.destroy_process_group()
        empty = _seconds(calls, lambda: None)
        action = _seconds(calls, lambda: ring.act("F", 1, 2)) - empty
        return {
            "collective": seen - bare,
            "action": action,
            "phase": _seconds(calls, lambda: ring.enter("data")) - empty,
        }


def cost_of_sum(calls: int) -> tuple[float, float]:
    """CPU seconds of the sum of bits for a small tensor, and for one byte of a large tensor."""
    small, large = torch.ones(16), torch.ones(4_000_000)
    per_call = _seconds(calls, lambda: sum_of_bits(small))
    return per_call, _seconds(1, lambda: sum_of_bits(large)) / (large.numel() * large.element_size())


class _NoWait:
    """A completed work of a collective."""

    def wait(self) -> None:
        pass


def _seconds(calls: int, call: Callable[[], object]) -> float:
    """CPU seconds of a call: the minimum over some rounds."""
    rounds = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(calls):
            call()
        rounds.append((time.process_time() - began) / calls)
    return min(rounds)


def share_of_run(folder: Path, cost: dict[str, float]) -> tuple[int, float, float]:
    """Returns the events per step, the seconds of a step, and the share of the step that recording takes. The estimate
    counts one action and one phase for each event; there are fewer.
    """
    events = 0
    for trace in read_traces(folder / "logs").values():
        counts = Counter(record.step for record in trace.records if 0 < record.step < trace.step)
        events = max(events, *counts.values(), 0) if counts else events
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    seconds = statistics.median(json.loads(line)["step_seconds"] for line in lines)
    return events, seconds, events * sum(cost.values()) / seconds


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="run folders")
    given = parser.parse_args(words)
    cost = cost_of_one(given.calls)
    say(", ".join(f"{what} {1e6 * seconds:.2f} us" for what, seconds in cost.items()))
    call, byte = cost_of_sum(given.calls)
    say(f"sum of bits {1e6 * call:.2f} us and 1 s for {1e-9 / byte:.1f} GB")
    for folder in given.runs:
        events, seconds, share = share_of_run(folder, cost)
        say(f"{folder.name}: {events} events in a step of {seconds:.3g} s: {share:.3%}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
