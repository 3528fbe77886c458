"""Several cards joined by NCCL: does every layout give the losses of one rank, and how fast are links and exchanges?

Each rank has its own card. An NCCL error fails its line. With one card, none of this is tried.
"""

import tempfile
from functools import partial
from pathlib import Path

import torch

from bench.gpu.line import Check, Finding, NotTried
from bench.gpu.machine import Machine
from bench.gpu.rank import Task, run_ranks
from bench.gpu.ranks import MODEL, SMALL, layout
from parallel.links import LinkRate, notes_on_links

NCCL = "cpu:gloo,cuda:nccl"
LAYOUTS = {
    "ep 2": ("parallel.dp=2", "parallel.ep=2"),
    "pp 2": ("parallel.pp=2", "parallel.dp=1", "parallel.schedule=1f1b"),
    "dp 2": ("parallel.dp=2",),
}
LIMIT = 45.0


def checks(machine: Machine) -> list[Check]:
    found = [Check("links and exchanges", partial(links, machine), LIMIT)]
    return found + [
        Check(f"2 cards: {name}", partial(together, machine, words), LIMIT) for name, words in LAYOUTS.items()
    ]


def cards(machine: Machine) -> int:
    """Raises NotTried for one alone; in a dry check two ranks stand in."""
    count = torch.cuda.device_count() if machine.on_gpu else 2
    if count < 2:
        raise NotTried("NCCL joins cards, and this machine has one")
    return count


def together(machine: Machine, words: tuple[str, ...]) -> Finding:
    cards(machine)
    return layout(machine, 2, "bf16", words, NCCL if machine.on_gpu else "gloo")


def links(machine: Machine) -> Finding:
    """What a run tries before it reads data (parallel/links.py), over all cards."""
    count, model = cards(machine), MODEL if machine.on_gpu else SMALL
    words = (
        *model,
        f"parallel.dp={count}",
        f"parallel.ep={count}",
        f"cluster.ranks_per_node={count}",
        f"batch_size={4 * count}",
    )
    backend = NCCL if machine.on_gpu else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        task = Task(words, machine.device.type, steps=0, ranks=count, backend=backend, links=True, threads=1)
        first, *_ = run_ranks(task, Path(folder) / "links", machine.patience * LIMIT)
    found = [LinkRate(kind, tuple(ranks), rate) for kind, ranks, rate in first["links"]]
    said = notes_on_links(first["names"], found, {})
    table = [["kind", "ranks", "GB/s"], *([one.kind, str(one.ranks), one.bytes_per_second / 1e9] for one in found)]
    bound = "every link carries what is sent, and none is below half of the median of its kind"
    return Finding({"cards": count}, bound, "; ".join(said[1:]) or None, table)
