"""Every schedule against one process, on gloo ranks."""

import pytest
import torch

from parallel.pipeline.schedule import Pipeline, build_schedule
from parallel.pipeline.split import split_layers, stage_placement
from tests.pipeline import toy
from tests.ranks import run_ranks

LAYERS = 8
CPU = torch.device("cpu")


def _pipeline(rank: int, name: str, pp: int, tied: bool = False) -> tuple[Pipeline, list[toy.ToyChunk]]:
    placement = stage_placement(name, pp)
    stages = sum(len(ids) for ids in placement)
    layers = split_layers([1.0] * LAYERS, 1.0, 2.0, stages)
    whole = toy.whole_model(LAYERS, tied)
    chunks = toy.take(whole, layers, placement[rank])
    pipeline = build_schedule(name, chunks, placement[rank], stages, None, CPU, hidden=toy.HIDDEN, dtype=torch.float32)
    return pipeline, whole


def _tokens(seed: int, rows: int) -> torch.Tensor:
    return torch.randint(toy.VOCAB, (rows, toy.SEQ + 1), generator=torch.Generator().manual_seed(seed))


def _parity(rank: int, name: str, pp: int, numbers: list[int], tied: bool) -> None:
    pipeline, whole = _pipeline(rank, name, pp, tied)
    for step, micro_batches in enumerate(numbers):
        tokens_BS = _tokens(step, 2 * micro_batches)
        documents_BS = torch.arange(tokens_BS.numel(), dtype=torch.int32).reshape_as(tokens_BS) % 2 if step else None
        loss = pipeline.step(tokens_BS, documents_BS, micro_batches=micro_batches)
        expected = toy.reference(whole, tokens_BS, documents_BS, micro_batches)
        assert (loss is not None) == pipeline.has_last
        if loss is not None:
            assert not loss.requires_grad and loss.shape == ()
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        wanted, got = toy.gradients(whole), toy.gradients(pipeline.modules)
        assert got.keys() == {n for chunk in pipeline.modules for n, _ in chunk.named_parameters()}
        for key, grad in got.items():
            # Same sums over micro-batches, in another order.
            torch.testing.assert_close(grad, wanted[key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize(("name", "pp", "numbers"), [("1f1b", 1, [3, 1, 3]), ("1f1b", 2, [4, 2, 5]), ("1f1b", 4, [6])])
def test_gradients_equal_one_process(name, pp, numbers):
    run_ranks(_parity, name, pp, numbers, False, world_size=pp)
