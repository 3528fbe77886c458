"""Every schedule against one process, on gloo ranks."""

import pytest
import torch

from conf.errors import UserError
from conf.pipeline_schedules import SCHEDULES, check_schedule
from parallel.pipeline.orders import schedule_actions
from parallel.pipeline.schedule import Pipeline
from parallel.pipeline.split import split_layers
from parallel.pipeline.timeline import StepRecord
from tests.pipeline import toy
from tests.ranks import run_ranks

LAYERS = 10
CPU = torch.device("cpu")


def _pipeline(rank: int, name: str, pp: int, tied: bool = False) -> tuple[Pipeline, list[toy.ToyChunk]]:
    """name: with the number of stages of a rank behind it, where that is not the schedule's own."""
    name, _, virtual = name.partition(" ")
    placement = SCHEDULES[name].place_stages(pp, int(virtual or 2))
    stages = sum(len(ids) for ids in placement)
    layers = split_layers([1.0] * LAYERS, 1.0, 2.0, placement)
    whole = toy.whole_model(LAYERS, tied)
    chunks = toy.take(whole, layers, placement[rank])
    pipeline = Pipeline(name, chunks, placement[rank], stages, None, CPU, hidden=toy.HIDDEN, dtype=torch.float32)
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


def _evaluation(rank: int, name: str, pp: int) -> None:
    pipeline, whole = _pipeline(rank, name, pp)
    for micro_batches in (1, 5):
        tokens_BS = _tokens(micro_batches, 2 * micro_batches)
        loss = pipeline.evaluate(tokens_BS, micro_batches=micro_batches)
        assert (loss is not None) == pipeline.has_last
        if loss is not None:
            expected = toy.reference(whole, tokens_BS, None, micro_batches)
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        assert not toy.gradients(pipeline.modules) and all(chunk.training for chunk in pipeline.modules)
    pipeline.step(_tokens(0, 8), micro_batches=8)
    assert len(toy.gradients(pipeline.modules)) == sum(1 for c in pipeline.modules for _ in c.parameters())


def _evaluations(rank: int, names: list[str], pp: int) -> None:
    for name in names:
        _evaluation(rank, name, pp)


@pytest.mark.parametrize(
    ("names", "pp"), [(["1f1b"], 1), (["1f1b", "interleaved", "interleaved 3"], 2), (["zbv", "dualpipev"], 4)]
)
def test_evaluation(names, pp):
    run_ranks(_evaluations, names, pp, world_size=pp)


def _parities(rank: int, pp: int, cases: list[tuple[str, list[int], bool]]) -> None:
    for name, numbers, tied in cases:
        _parity(rank, name, pp, numbers, tied)


@pytest.mark.parametrize(
    ("pp", "cases"),
    [
        (1, [("1f1b", [3, 1, 3], False), ("zbv", [3], False), ("dualpipev", [2, 5], True)]),
        (2, [("1f1b", [4, 2, 5], False), ("interleaved", [4, 2], False), ("zbv", [4, 1], True)]),
        (2, [("interleaved 3", [4, 3], False), ("interleaved 4", [2, 8], False)]),
        (2, [("dualpipev", [4, 7, 4], True)]),
        (4, [("1f1b", [6], False), ("interleaved", [8], False), ("interleaved 3", [10], False)]),
        (4, [("zbv", [9], False), ("dualpipev", [9], False)]),
    ],
)
def test_gradients_equal_one_process(pp, cases):
    """Several steps with changing numbers of micro-batches; True: the last chunk shares the first one's embedding."""
    run_ranks(_parities, pp, cases, world_size=pp)


def _static_and_frugal(rank: int) -> None:
    """No extra forward to infer shapes, no receive buffer that outlives its action, no loss that keeps its graph."""
    pipeline, _ = _pipeline(rank, "zbv", 2)
    calls = []
    for chunk in pipeline.modules:
        chunk.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        pipeline.step(_tokens(0, 8), micro_batches=4)
    assert len(calls) == 2 * 2 * 4 and len(pipeline._schedules) == 1
    (schedule,) = pipeline._schedules.values()
    for stage in schedule._stages:
        infos = [i for table in (stage.args_recv_info, stage.grad_recv_info) for row in table.values() for i in row]
        assert all(getattr(i, "buffer", None) is None or i.buffer.is_meta for i in infos)
        assert not stage.fwd_cache and not stage.output_chunks
    record = pipeline.timeline.newest()
    planned = schedule_actions("zbv", 2, 4)[rank]
    assert [(a.kind, a.stage, a.micro_batch) for a in record.actions] == [
        (a.kind, a.stage, a.micro_batch) for a in planned
    ]
    assert 0 < record.busy < record.span and record.bubble == 1 - record.busy / record.span
    assert StepRecord().bubble == 0


def test_static_and_frugal():
    run_ranks(_static_and_frugal, world_size=2)


@pytest.mark.parametrize(
    ("name", "pp", "micro_batches", "layers", "message"),
    [
        (
            "zbv",
            4,
            8,
            5,
            r"parallel.pp = 4 with parallel.schedule=zbv(.|\n)*8 stages(.|\n)*use parallel.schedule=1f1b or parallel.pp <= 3",
        ),
        ("1f1b", 4, 3, 8, r"batch_size = 3 micro-batches(.|\n)*at least 4"),
        ("dualpipev", 4, 7, 8, r"batch_size = 7 micro-batches(.|\n)*at least 8"),
        ("interleaved", 2, 5, 8, r"batch_size = 5 micro-batches(.|\n)*2 rounds"),
        (
            "interleaved 4",
            4,
            8,
            11,
            r"virtual_stages=4(.|\n)*16 stages(.|\n)*use parallel.virtual_stages <= 3 or parallel.schedule=1f1b without "
            r"parallel.virtual_stages or parallel.pp <= 3 or model.layers >= 14",
        ),
        ("interleaved 3", 2, 4, 3, r"use parallel.virtual_stages <= 2 or parallel.schedule=1f1b \w"),
        ("interleaved", 4, 8, 2, r"use parallel.schedule=1f1b or parallel.pp <= 2 or model.layers >= 6"),
        ("interleaved", 3, 3, 1, r"use parallel.schedule=1f1b or model.layers >= 4"),
        ("interleaved", 3, 1, 1, r"use parallel.pp <= 1 or model.layers >= 4"),
    ],
)
def test_check_names_the_cure(name, pp, micro_batches, layers, message):
    with pytest.raises(UserError, match=message):
        name, _, virtual = name.partition(" ")
        check_schedule(name, pp, micro_batches, layers, int(virtual or 2))
