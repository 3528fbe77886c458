"""Storages go to the host and come back as they were, when the order of actions says so, in pages that are used again."""

import pytest
import torch

from conf.thresholds import THRESHOLDS
from parallel.pipeline.host_store import ALIGNMENT, HostStore, page_bytes, reads
from parallel.pipeline.orders import Action, schedule_actions
from parallel.pipeline.simulate import what_runs

CPU = torch.device("cpu")
SIZES = (THRESHOLDS.host_page_bytes + 5, 17, 3 * THRESHOLDS.host_page_bytes - 1000)


def storages(seed: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (size,), dtype=torch.uint8, generator=draw) for size in SIZES]


def test_storages_come_back_as_they_were_across_pages():
    store = HostStore(CPU)
    batches = [store.send(storages(seed)) for seed in range(4)]
    assert [piece.tensor is None for batch in batches for piece in batch] == 9 * [True] + 3 * [False]
    aligned = sum(-(-size // ALIGNMENT) * ALIGNMENT for size in SIZES)
    assert (
        store.taken_bytes
        == 4 * page_bytes(SIZES, "cpu")
        == 4 * -(-aligned // THRESHOLDS.host_page_bytes) * THRESHOLDS.host_page_bytes
    )
    assert store.sent_bytes == 4 * sum(SIZES)
    for seed in reversed(range(4)):
        assert all(map(torch.equal, (piece.fetched() for piece in batches[seed]), storages(seed)))


def test_a_graph_that_falls_without_a_backward_gives_its_pages_back():
    store = HostStore(CPU)
    for _ in range(3):
        sent = [store.send(storages(0)) for _ in range(4)]
        del sent
    assert store.taken_bytes <= 5 * page_bytes(SIZES, "cpu")  # the last one is still on its way when the next four come


@pytest.mark.parametrize(
    ("name", "pp", "one_piece", "virtual"),
    [
        *((name, 2, (), 2) for name in ("1f1b", "interleaved", "zbv", "dualpipev")),
        ("interleaved", 2, (), 3),
        ("zbv", 2, (3,), 2),  # two MTP modules
        ("zbv", 1, (0, 1), 2),  # ZeRO 3
        ("dualpipev", 1, (0, 1), 2),
    ],
)
def test_every_schedule_finds_the_first_of_what_it_reads_on_the_device(name, pp, one_piece, virtual):
    """Two batches a forward: when a backward begins the newer one is there, and the older one not yet. A second step takes no more
    memory of the host."""
    micro_batches, taken = 8, []
    for rank in range(pp):
        store = HostStore(CPU)
        actions = schedule_actions(name, pp, micro_batches, virtual)[rank]
        for step in range(2):
            store.start(actions, one_piece)
            _walk(store, actions, one_piece, step)
            taken.append(store.taken_bytes)
    assert taken[0::2] == taken[1::2]


def _walk(store: HostStore, actions: list[Action], one_piece: tuple[int, ...], step: int) -> None:
    waiting: dict[tuple[int, int], list] = {}
    for action in actions:
        if not what_runs(action, action.stage in one_piece):
            continue
        forward = next((part for part in action.halves or (action,) if part.kind == "F"), None)
        with store.acting(*action[:3]):
            for key in reads(action, one_piece):
                older, newer = waiting.pop(key)
                assert all(piece.tensor is not None for piece in newer), action
                assert all(piece.tensor is None for piece in older), action
                for number, batch in enumerate((newer, older)):
                    seed = hash((step, *key, 1 - number)) % 2**31
                    assert all(map(torch.equal, (piece.fetched() for piece in batch), storages(seed)))
            if forward is not None:
                seeds = [hash((step, *forward[1:3], number)) % 2**31 for number in range(2)]
                waiting[forward[1:3]] = [store.send(storages(seed)) for seed in seeds]
    assert not waiting
