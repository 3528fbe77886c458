"""Whole ranks on the ghost: one that trains by itself as the command does, and single ranks of larger layouts.

A rank of a larger layout runs as mode=dry_run runs it: torch's fake process group moves nothing, stages make up what neighbours would
send, and the dispatcher makes up what arrives. DeepSpeed, schedules and optimizer are real. Losses mean nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from conf.errors import EXIT_OK
from conf.load import compose
from tests.ghost.log import Calls, recorded
from tests.ghost.stand_ins import even_experts
from tests.small import write_corpus
from train.__main__ import main
from train.dry_run import lone
from train.dry_run.assumed_rows import load_of
from train.dry_run.piece import choose_piece, choose_rank
from train.loop.layout_check import check_layout
from train.loop.training_engine import Engine
from train.plan.job import with_nodes

TINY = ("conf=tiny", "cluster.device=cuda", "seq_len=128", "batch_size=8", "micro_batch_size=1", "log.peak_flops=1e15")
EP4 = ("parallel.dp=4", "parallel.ep=4", "cluster.ranks_per_node=2")
PP2 = ("parallel.pp=2", "parallel.dp=2", "micro_batch_size=1")
LAYOUTS = {
    "ep 4, flat": EP4,
    "ep 4, node-limited": (*EP4, "parallel.dispatch=node_limited"),
    "pp 2, 1f1b": (*PP2, "parallel.schedule=1f1b"),
    "pp 2, 1f1b, offload": (*PP2, "parallel.schedule=1f1b", "model.offload=[layer]"),
    "pp 2, interleaved": (*PP2, "parallel.schedule=interleaved"),
    "pp 2, ep 2, zbv": (*PP2, "parallel.ep=2", "parallel.schedule=zbv"),
    "pp 2, ep 2, dualpipev": (*PP2, "parallel.ep=2", "parallel.schedule=dualpipev"),
    "dp 2, ZeRO 3": ("parallel.dp=2", "parallel.zero=3"),
}
"""The ranks that run, each the fullest of its layout."""
PRECISIONS = {"bf16": (), "fp8": ("precision=fp8", "parallel.wire=fp8")}


def train_alone(precision: str, folder: Path, *more: str) -> Calls:
    """`python -m train` for two steps, to its end: data, training, validation, checkpoint, report."""
    corpus, steps = write_corpus(folder / "corpus"), 2
    config = compose(
        *TINY, *PRECISIONS[precision][:1], f"steps={steps}", f"runs={folder}", f"name={precision}", f"data.path={corpus}",
        f"data.cache={folder / 'cache'}", "data.format=text", "data.workers=1", "model.vocab_size=320",
        "log.wandb=disabled", "log.validation_sequences=4", "log.sample_tokens=0", *more,
    )  # fmt: skip
    with even_experts(), each_call(Engine, "run") as found:
        code = main([config])
    assert code == EXIT_OK and len(found) == steps, f"exit code {code} after {len(found)} steps"
    assert (folder / precision / "checkpoints").is_dir()
    return found[-1]


def run_lone(layout: str, precision: str) -> Calls:
    """One rank of this layout; the calls of its last step."""
    config = with_nodes(
        compose(
            *TINY,
            "mode=dry_run",
            "dry_run.steps=1",
            "dry_run.rank=worst",
            *PRECISIONS[precision],
            *LAYOUTS[layout],
        )
    )
    check_layout(config)
    device, rank = torch.device("cuda", 0), choose_rank(config)
    piece = choose_piece(config, rank, load_of(config, rank), device)
    with even_experts(), each_call(Engine, "run") as found:
        lone.run_alone(piece, device)
    return found[-1]


@contextmanager
def each_call(owner: object, name: str) -> Iterator[list[Calls]]:
    """The calls of every run of this function, in a list that grows."""
    found, real = [], getattr(owner, name)

    def watched(*args, **options):
        with recorded() as calls:
            result = real(*args, **options)
        found.append(calls)
        return result

    setattr(owner, name, watched)
    try:
        yield found
    finally:
        setattr(owner, name, real)


def table(found: dict[str, Calls]) -> list[str]:
    """Lines to print."""
    lines = [f"{'a step of a rank of tiny':34}{'launches':>10}{'collectives':>13}{'waits':>7}"]
    for name, calls in found.items():
        lines.append(f"{name:34}{calls.launches:10d}{calls.kinds['collective']:13d}{calls.waits:7d}")
    return lines
