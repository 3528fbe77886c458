"""The passes of a stage: every piece of work counts once, and what waits for a link is what parallel/ sends."""

import pytest

from conf.load import compose
from conf.schema import Rate
from train.plan.job import layout_of
from train.plan.time.rates import Rates
from train.plan.time.stages import PassTime, Stages
from train.plan.time.traffic import latent_bytes

EXPERTS = ("conf=tiny", "precision=bf16", "hardware=h800", "micro_batch_size=2", "batch_size=256", "parallel.dp=16",
           "parallel.ep=16", "parallel.pp=2", "parallel.schedule=zbv", "parallel.dispatch=node_limited", "model.layers=8")  # fmt: skip
WAYS = ("forward", "backward", "inputs", "weights")


def _stages(*words: str, **rates: Rate) -> Stages:
    config = compose(*words)
    return Stages(config, layout_of(config), Rates(dict(config.hardware.rates) | rates, "h800"))


def _computing(one: PassTime) -> float:
    return sum(segment.compute + segment.beside for segment in one.segments)


def _waits(one: PassTime) -> float:
    return sum(segment.transfer for segment in one.segments)


def test_all_work_of_a_pass_takes_its_time_once():
    """Also what an overlap splits into a part before an exchange and one behind it. Halves of a backward add up to it."""
    stages = _stages(*EXPERTS)
    for stage in range(4):
        made = stages.directions(stage)
        for way in WAYS:
            one = getattr(made, way)
            assert _computing(one) == pytest.approx(stages.rates.passes(one.work))
        assert _computing(made.inputs) + _computing(made.weights) == pytest.approx(_computing(made.backward))


def test_a_block_that_runs_again_sends_rows_to_its_experts_and_brings_none_back():
    """On a GPU one hop is on its way behind the other, and the last is waited for: across nodes and inside count together."""
    plain, again = (_stages(*EXPERTS, f"model.recompute=[{parts}]") for parts in ("", "layer"))
    (out,) = plain.exchange(plain.spread.row_bytes)
    rates, tokens = plain.rates.rates, 2 * 256 * plain.config.plan.imbalance * plain.spread.row_bytes
    ways = {
        where: rates[where].seconds + tokens * getattr(plain.spread, where) / rates[where].bandwidth
        for where in ("inside", "across")
    }
    assert out == pytest.approx(sum(ways.values())) and min(ways.values()) > 0
    stage, experts = 2, len(plain.layers[2])
    assert experts and plain.layers[stage].start >= plain.config.model.dense_layers
    first, second = plain.directions(stage), again.directions(stage)
    assert _waits(second.forward) == _waits(first.forward) > experts * out
    assert _waits(second.backward) - _waits(first.backward) == pytest.approx(experts * out)
    assert _waits(second.inputs) - _waits(first.inputs) == pytest.approx(experts * out)
    assert second.weights == first.weights


def test_shared_sequences_wait_for_the_latents_of_every_layer():
    """A gather forward; in backward another, as nobody keeps them, and the scatter of their gradients."""
    words = "conf=tiny", "precision=bf16", "hardware=h800", "micro_batch_size=2", "batch_size=32"
    stages = _stages(*words, "parallel.pp=2", "parallel.dp=2", "parallel.cp=2", inside=Rate(bandwidth=1e9))
    made, one = stages.directions(1), latent_bytes(stages.config) / 1e9
    layers = len(stages.layers[1]) + stages.config.model.mtp_depth
    for way, count in {"forward": 1, "backward": 2, "inputs": 2, "weights": 0}.items():
        waited = _computing(getattr(made, way)) - stages.rates.passes(getattr(made, way).work)
        assert waited == pytest.approx(count * layers * one, abs=1e-12)


def test_mtp_depths_have_one_target_less_each():
    stages = _stages(
        "conf=tiny", "precision=bf16", "hardware=h800", "micro_batch_size=2", "batch_size=32", "model.mtp_depth=2"
    )
    logits = sum(one.bytes for one in stages.directions(0).forward.work if one.kind == "loss") / 4
    config = stages.config
    assert logits == config.model.vocab_size * 2 * sum(config.seq_len - depth for depth in range(3))
