"""The passes of a stage: every piece of work counts once, and what waits for a link is what parallel/ sends."""

import pytest

from conf.load import compose
from conf.schema import Rate
from parallel.pipeline.orders import Action
from train.plan.job import layout_of
from train.plan.time.rates import Rates
from train.plan.time.stages import PassTime, Stages
from train.plan.time.traffic import latent_bytes
from train.plan.work_recorder import Work

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
    """Also what an overlap splits into a part before an exchange and one behind it. Halves of a backward add up to it, or a little more."""
    stages = _stages(*EXPERTS)
    for stage in range(4):
        made = stages.directions(stage)
        for way in WAYS:
            one = getattr(made, way)
            assert _computing(one) == pytest.approx(stages.rates.passes(one.work))
        halves, whole = _computing(made.inputs) + _computing(made.weights), _computing(made.backward)
        assert whole * (1 - 1e-9) <= halves < 1.1 * whole, "two passes look at some gradients twice"


@pytest.mark.parametrize("depth", [1, 2])
def test_the_first_stage_has_no_inputs_to_send_gradients_to_and_two_mtp_modules_are_not_split(depth):
    """As torch splits a backward, and parallel/pipeline/ with it (`backward_in_one_piece`)."""
    stages = _stages(*EXPERTS, f"model.mtp_depth={depth}")
    first, middle, last = (stages.directions(stage) for stage in (0, 1, 3))
    assert not first.inputs.segments and first.weights == first.backward
    assert 0 < _computing(middle.weights) < _computing(middle.backward)
    if depth == 1:
        assert 0 < _computing(last.weights) < _computing(last.backward)
    else:
        assert last.inputs == last.backward and not last.weights.segments


def test_the_busiest_rank_of_an_uneven_load_has_more_rows_to_send_and_to_multiply():
    even, uneven = (
        _stages(*EXPERTS, f"plan.imbalance={value}", across=Rate(), inside=Rate(bandwidth=1e9)) for value in (1, 1.5)
    )
    rows = [
        sum(work.flops for work in one.directions(2).forward.work if work.kind.startswith("grouped_"))
        for one in (even, uneven)
    ]
    assert rows[1] == pytest.approx(1.5 * rows[0]) and rows[0] > 0
    sent, more = (_waits(one.directions(2).forward) for one in (even, uneven))
    assert more == pytest.approx(1.5 * sent) and sent > 0


def test_a_block_that_runs_again_sends_rows_to_its_experts_and_brings_none_back():
    """On a GPU one hop is on its way behind the other, and the last is waited for: across nodes and inside count together."""
    plain, again = (_stages(*EXPERTS, f"model.recompute=[{parts}]") for parts in ("", "layer"))
    rates, tokens = plain.rates.rates, 2 * 256 * plain.config.plan.imbalance * plain.spread.row_bytes
    ways = {
        where: rates[where].seconds + tokens * getattr(plain.spread, where) / rates[where].bandwidth
        for where in ("inside", "across")
    }
    assert min(ways.values()) > 0
    out = sum(ways.values())
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


def test_what_waits_on_the_host_holds_a_pass_up_where_the_link_is_slower():
    """A link takes both ways at once: a forward waits for what it sends, a backward for what comes back, a pair for the longer."""
    words = *EXPERTS, "parallel.dispatch=flat", "model.offload=[layer]"
    slow, free = (_stages(*words, host=Rate(bandwidth=bandwidth)) for bandwidth in (1.0, 1e18))
    sent = slow.count_sent(2)
    assert sent > 0
    for kind in "FB":
        assert slow.elapsed(Action(kind, 2, 0)).seconds == pytest.approx(sent)
        assert free.elapsed(Action(kind, 2, 0)).seconds < 1


def test_a_rank_sends_its_latents_to_every_other_that_shares_the_sequence():
    config = compose("conf=tiny", "precision=bf16", "micro_batch_size=2", "batch_size=32", "parallel.cp=4")
    own = 2 * 256 // 4 * (config.model.kv_rank + config.model.rope_head_dim)
    assert latent_bytes(config) == 3 * own * 2


def test_work_takes_its_calls_its_operations_and_its_bytes():
    rates = Rates(
        {"memory": Rate(seconds=2.0, flops=10.0, bandwidth=100.0), "launch": Rate(seconds=0.5)}, "", {"passes": 3.0}
    )
    work = Work("memory", 50.0, 300.0, 4)
    assert rates.of(work) == 4 * 2 + 5 + 3
    assert rates.passes([work, work]) == 3 * 2 * 16 + 0.5 * 8, "of passes also what launches them takes"


def test_mtp_depths_have_one_target_less_each():
    stages = _stages(
        "conf=tiny", "precision=bf16", "hardware=h800", "micro_batch_size=2", "batch_size=32", "model.mtp_depth=2"
    )
    logits = sum(one.bytes for one in stages.directions(0).forward.work if one.kind == "loss") / 4
    config = stages.config
    assert logits == config.model.vocab_size * 2 * sum(config.seq_len - depth for depth in range(3))
