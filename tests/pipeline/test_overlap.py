"""Lanes: order, hidden transfers, errors; and a whole DualPipeV step with overlap against one without."""

import random
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from conf.pipeline_schedules import SCHEDULES
from parallel.pipeline.orders import schedule_actions
from parallel.pipeline.overlap import Lanes, LaneStopped, yield_point
from parallel.pipeline.schedule import Pipeline
from tests.pipeline import toy
from tests.ranks import run_ranks

CPU = torch.device("cpu")


@pytest.fixture
def lanes():
    lanes = Lanes(CPU, timeout=5.0)
    yield lanes
    lanes.close()


def test_order_is_the_papers(lanes):
    """Two layers, as in the table of parallel/pipeline/overlap.py."""
    log = []

    def forward():
        for layer in "12":
            log.append(f"attn(F{layer}) dispatch(F{layer})>")
            yield_point()
            log.append(f"mlp(F{layer}) combine(F{layer})>")
            yield_point()
        return "F"

    def backward():
        for layer in "21":
            log.append(f"combine(B{layer})>")
            yield_point()
            log.append(f"mlp(B{layer}) dispatch(B{layer})>")
            yield_point()
            log.append(f"attn(B{layer})")
        return "B"

    assert lanes.run(forward, backward) == ("F", "B")
    assert log == [
        "combine(B2)>",
        "attn(F1) dispatch(F1)>",
        "mlp(B2) dispatch(B2)>",
        "mlp(F1) combine(F1)>",
        "attn(B2)",
        "combine(B1)>",
        "attn(F2) dispatch(F2)>",
        "mlp(B1) dispatch(B1)>",
        "mlp(F2) combine(F2)>",
        "attn(B1)",
    ]
    yield_point()  # outside of a pair: nothing


def test_unequal_lanes_and_one_at_a_time(lanes):
    running, seen = [0], []

    def lane(count, tag):
        for _ in range(count):
            running[0] += 1
            time.sleep(0.001)
            assert running[0] == 1
            running[0] -= 1
            seen.append(tag)
            yield_point()

    lanes.run(lambda: lane(5, "F"), lambda: lane(2, "B"))
    assert "".join(seen) == "BFBFFFF"
    seen.clear()
    lanes.run(lambda: lane(0, "F"), lambda: lane(3, "B"))
    assert "".join(seen) == "BBB"


@pytest.mark.parametrize("failing", ["forward", "backward"])
def test_error_in_one_lane_stops_the_other(lanes, failing):
    stopped = []

    def bad():
        yield_point()
        raise KeyError("mine")

    def good():
        try:
            while True:
                yield_point()
        except LaneStopped as error:
            stopped.append(error.__cause__)
            raise

    with pytest.raises(KeyError, match="mine") as caught:
        lanes.run(*((bad, good) if failing == "forward" else (good, bad)))
    assert stopped == [caught.value]
    assert lanes.run(lambda: 1, lambda: 2) == (1, 2)


def test_wait_is_bounded():
    lanes, release = Lanes(CPU, timeout=0.2), threading.Event()
    with pytest.raises(TimeoutError, match="backward lane did not end"):
        lanes.run(lambda: None, lambda: release.wait(5))
    release.set()
    lanes.close()


class _FakeAllToAll(torch.autograd.Function):
    """An exchange that takes `seconds` of nobody's compute, forward and backward, and passes values on."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        return _fly(x, seconds)

    @staticmethod
    def backward(ctx, grad):
        return _fly(grad, ctx.seconds), None


def _fly(x, seconds):
    arrival = threading.Event()
    timer = threading.Timer(seconds, arrival.set)  # begin
    timer.start()
    yield_point()
    arrival.wait()  # wait
    return x.clone()


class _Expert(nn.Module):
    """A layer with a dispatch and a combine; its products take `seconds`, backward twice that."""

    def __init__(self, flight, seconds):
        super().__init__()
        self.inner, self.flight, self.seconds = toy.ToyLayer(), flight, seconds

    def forward(self, x):
        x = _FakeAllToAll.apply(_Busy.apply(x, self.seconds), self.flight)
        x = self.inner(_Busy.apply(x, self.seconds))
        return _FakeAllToAll.apply(x, self.flight)


class _Busy(torch.autograd.Function):
    """Compute that keeps this lane from yielding: time that only a transfer can share."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(2 * ctx.seconds)
        return grad.clone(), None


def _overlapped_step(rank: int, pp: int) -> None:
    placement, stages, micro_batches = SCHEDULES["dualpipev"].place_stages(pp), 2 * pp, 2 * pp + 1
    layers = [range(i, i + 1) for i in range(stages)]
    tokens_BS = torch.randint(toy.VOCAB, (micro_batches, toy.SEQ + 1), generator=torch.Generator().manual_seed(1))
    results = {}
    for overlap in (False, True):
        chunks = toy.take(toy.whole_model(stages), layers, placement[rank])
        for chunk in chunks:
            for key in chunk.layers:
                expert = _Expert(flight=0.012, seconds=0.006)
                expert.inner.load_state_dict(chunk.layers[key].state_dict())
                chunk.layers[key] = expert
        pipeline = Pipeline(
            "dualpipev",
            chunks,
            placement[rank],
            stages,
            None,
            CPU,
            hidden=toy.HIDDEN,
            dtype=torch.float32,
            overlap=overlap,
        )
        pipeline.step(tokens_BS, micro_batches=micro_batches)
        loss = pipeline.step(tokens_BS, micro_batches=micro_batches)
        results[overlap] = (toy.gradients(chunks), loss, pipeline.timeline.newest())
    (plain, plain_loss, plain_record), (overlapped, overlapped_loss, record) = results[False], results[True]
    assert plain.keys() == overlapped.keys() and all(torch.equal(plain[k], overlapped[k]) for k in plain)
    assert plain_loss is None or torch.equal(plain_loss, overlapped_loss)
    pairs = [a for a in record.actions if a.kind == "FB"]
    planned = [a for a in schedule_actions("dualpipev", pp, micro_batches)[rank] if a.kind == "FB"]
    assert [(a.stage, a.micro_batch) for a in pairs] == [(a.stage, a.micro_batch) for a in planned]
    # One pair: 4 transfers of 12 ms and 36 ms of compute, 84 ms in a row. Overlapped, all but the ends of the
    # transfers lie under compute: 2 x (6 | 12) + 2 x 12 + ... about 50 ms.
    forwards = [a.seconds for a in plain_record.actions if a.kind == "F"]
    backwards = [a.seconds for a in plain_record.actions if a.kind == "B"]
    in_a_row = min(forwards) + min(backwards)
    assert min(a.seconds for a in pairs) < 0.8 * in_a_row, (sorted(a.seconds for a in pairs), in_a_row)


@pytest.mark.parametrize("pp", [1, 2])
def test_dualpipev_hides_transfers_and_changes_no_bit(pp):
    run_ranks(_overlapped_step, pp, world_size=pp)


class _AllToAll(torch.autograd.Function):
    """A real asynchronous exchange over the expert group, forward and backward."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    def backward(ctx, grad):
        return _exchange(grad, ctx.group), None


def _exchange(x, group):
    flat = x.reshape(-1).contiguous()
    received = torch.empty_like(flat)
    work = dist.all_to_all_single(received, flat, group=group, async_op=True)
    yield_point()
    work.wait()
    return received.view_as(x)


class _ExchangeLayer(nn.Module):
    """Two exchanges around a product; ranks are slow at different times, which must not change any order."""

    def __init__(self, inner, group, rng):
        super().__init__()
        self.inner, self.group, self.rng = inner, group, rng

    def forward(self, x):
        time.sleep(0.003 * self.rng.random())
        x = _AllToAll.apply(x, self.group)
        x = _Busy.apply(self.inner(x), 0.003 * self.rng.random())
        return _AllToAll.apply(x, self.group)


def _expert_peers(rank: int) -> None:
    alone = [dist.new_group([r]) for r in range(2)][rank]
    tokens_BS = torch.randint(toy.VOCAB, (12, toy.SEQ + 1), generator=torch.Generator().manual_seed(rank))
    results = []
    for overlap in (False, True):
        chunks = toy.take(toy.whole_model(5), [range(2), range(2, 5)], [0, 1])
        for chunk in chunks:
            for key, layer in chunk.layers.items():
                chunk.layers[key] = _ExchangeLayer(layer, dist.group.WORLD, random.Random(rank))
        pipeline = Pipeline(
            "dualpipev", chunks, [0, 1], 2, alone, CPU, hidden=toy.HIDDEN, dtype=torch.float32, overlap=overlap
        )
        results.append((pipeline.step(tokens_BS, micro_batches=6), toy.gradients(chunks)))
        assert any(action.kind == "FB" for action in pipeline.timeline.newest().actions) == overlap
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(grad, results[1][1][key]) for key, grad in results[0][1].items())


def test_expert_peers_issue_collectives_in_one_order():
    """A pipeline of one on each of two expert-parallel ranks: unequal lanes, real collectives, no bit changes."""
    run_ranks(_expert_peers, world_size=2)
