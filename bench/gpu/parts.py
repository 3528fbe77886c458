"""The parts of the command: their names, their subjects, their time, and the modules of their checks."""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.gpu.line import Check
from bench.gpu.machine import Machine


@dataclass(frozen=True)
class BenchPart:
    """Checks that share a process. Its module has `checks(machine)`."""

    name: str
    title: str
    seconds: float
    """Most that it takes on a GPU."""

    def load(self) -> Callable[[Machine], list[Check]]:
        return importlib.import_module(f"bench.gpu.{self.name}").checks


PARTS = {
    name: BenchPart(name, title, seconds)
    for name, title, seconds in (
        ("environment", "What is installed, and whether it works together", 60),
        ("training", "The first steps of `python -m train`, and a resume", 165),
        ("kernels", "Every kernel against its reference", 60),
        ("cards", "Several cards joined by NCCL, beside one", 120),
        ("rates", "Rates of products, quantisers and FP8 layers, with clocks and power", 40),
        ("steps", "A whole step beside the CPU: loss, gradients, updated weights", 90),
        ("layers", "A layer of DeepSeek-V3 at full width: times and kernels", 60),
        ("memory", "Memory beside the plan", 65),
        ("waits", "Waits of the host and launches", 35),
        ("ranks", "Eight processes on one card, beside one", 180),  # all that its checks may take
        ("peers", "A training step beside torchtitan, transformers and TransformerEngine", 60),
        ("curve", "Sixty steps of tiny, beside the CPU", 70),
    )
}
"""In the order of what ends a first visit soonest. The last ones run if you give more minutes."""
MINUTES = 15
"""A visit."""


def fitting(names: Iterable[str], minutes: float) -> list[str]:
    """Those that get their time, in order; a part that does not fit leaves its time to shorter ones behind it."""
    left, found = 60 * minutes, []
    for name in names:
        if PARTS[name].seconds <= left:
            found.append(name)
            left -= PARTS[name].seconds
    return found
