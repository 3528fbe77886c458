"""A slow rank says that it worked longer than the others, though those waited for it all the time."""

import time
from pathlib import Path

import pytest

from tests.layouts import run_layout, train_rank

SLOW, DELAY = 1, 0.09
"""The rank, and seconds that each of its attentions takes longer."""


def train_slow_rank(rank: int, config_path: str, world: int, store: str) -> None:
    from train.loop.hooks.rank_progress import RankProgress
    from train.model.mla import MLA

    forward, write = MLA.forward, RankProgress.write

    def slowly(self, *arguments, **keywords):
        time.sleep(DELAY)
        return forward(self, *arguments, **keywords)

    def write_down(self, step: int, phase: str, sequences: int = 0, busy: float | None = None, *more) -> None:
        write(self, step, phase, sequences, busy, *more)
        if step >= 3 and busy is not None:
            with (Path(config_path).parent / f"busy_{rank}").open("a") as file:
                print(busy, file=file)

    if rank == SLOW:
        MLA.forward = slowly
    RankProgress.write = write_down
    train_rank(rank, config_path, world, store)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.dp=2", "parallel.ep=2", "parallel.dispatch=flat"],
        ["parallel.dp=2", "parallel.ep=2", "parallel.dispatch=node_limited", "cluster.ranks_per_node=1"],
        ["parallel.pp=2"],
        ["parallel.pp=2", "parallel.schedule=dualpipev", "model.layers=8", "micro_batch_size=1", "batch_size=4"],
    ],
    ids=["flat", "node_limited", "1f1b", "dualpipev"],
)
def test_waits_for_a_slow_rank_do_not_count_as_work(tmp_path, layout, monkeypatch):
    monkeypatch.setattr("tests.layouts.train_rank", train_slow_rank)
    once = ["checkpoint.every=0", "log.validate_every=0", "log.validation_sequences=2"]
    run_layout(tmp_path, "slow", 2, "steps=5", *once, *layout)
    files = [tmp_path / "runs" / "slow" / f"busy_{rank}" for rank in (SLOW, 1 - SLOW)]
    slow, fast = (
        min(map(float, file.read_text().split())) for file in files
    )  # of three steps, one of which a busy machine may hold up
    assert slow > 2 * fast, (slow, fast)
