"""The limit of attention scores: which rows are scaled, that scores come down to it, and which passes count."""

import pytest
import torch

from conf.load import compose
from parallel.context import LoneContext
from parallel.shard import FlatShard, FlatWeight, Sharing
from tests.small import MODEL
from train.kernels.choice import build_kernels
from train.kernels.precision import build_precision
from train.model.deepseek import DeepSeekV3
from train.model.init import initialise
from train.optim.qk_clip import QKClip

SMALL = [f"model.{key}={value}" for key, value in MODEL.items()]
CONFIG = compose("precision=fp32", *SMALL, "seq_len=24")
LIMIT = 0.02


def build(*more: str, share: LoneContext | None = None) -> tuple[DeepSeekV3, QKClip]:
    config, device = compose("precision=fp32", *SMALL, "seq_len=24", *more), torch.device("cpu")
    precision = build_precision(config.precision, device, build_kernels("cpu", False), False)
    model = DeepSeekV3.whole(config.model, precision, seq_len=config.seq_len, device="cpu", share=share)
    initialise(model, 0, device)
    return model, QKClip([model], config.model, LIMIT, lambda scores: None)


def largest(model: DeepSeekV3, clip: QKClip) -> torch.Tensor:
    clip.clear()
    tokens = torch.randint(0, CONFIG.model.vocab_size, (2, 25), generator=torch.Generator().manual_seed(1))
    for half in tokens.split(1):  # two micro-batches
        model(half, tokens_BS=half).sum().backward()
    return clip.largest()


def test_the_scores_of_a_head_come_down_to_the_limit_and_no_others_change():
    """To 1e-5. What comes into the first layer stays, so that its scores are multiplied by eta alone."""
    model, clip = build()
    scores_LH = largest(model, clip)
    LH = len(clip.layers), CONFIG.model.heads
    assert scores_LH.shape == LH and clip.layers[-1] == "mtp.0.block.attention"
    limit = clip.limit = float(scores_LH[0].mean())  # one head of the first layer is above
    with torch.no_grad():
        for name, factors_R in clip.factors(scores_LH).items():
            if name.startswith("layers.0."):
                dict(model.named_parameters())[name].mul_(factors_R.unsqueeze(1))
    torch.testing.assert_close(largest(model, clip)[0], scores_LH[0].clamp(max=limit), rtol=1e-5, atol=0)


def test_the_rows_of_keys_and_queries_alone_have_factors():
    clip = build()[1]
    nope, rope, value = CONFIG.model.nope_head_dim, CONFIG.model.rope_head_dim, CONFIG.model.v_head_dim
    scores_LH = torch.full((len(clip.layers), 2), LIMIT / 2)
    scores_LH[1, 1] = 4 * LIMIT
    factors = clip.factors(scores_LH)
    assert {name.rpartition(".attention.")[2] for name in factors} == {"q_up.weight", "kv_up.weight"}
    untouched, half = [1.0] * (nope + rope), [0.5] * nope + [0.25] * rope
    assert factors["layers.1.attention.q_up.weight"].tolist() == untouched + half
    assert factors["layers.1.attention.kv_up.weight"].tolist() == [1.0] * (nope + value) + [0.5] * nope + [1.0] * value
    assert all(ones.eq(1).all() for name, ones in factors.items() if not name.startswith("layers.1."))


@pytest.mark.slow
@pytest.mark.parametrize("share", [None, LoneContext(2, 0)], ids=["alone", "shared"])
def test_a_pass_that_trains_nothing_does_not_count(share):
    model, clip = build(share=share)
    assert largest(model, clip).isfinite().all()
    clip.clear()
    tokens = torch.zeros(1, 25, dtype=torch.int64)
    with torch.no_grad():
        model.eval()(tokens, tokens_BS=tokens)
    assert clip.largest().eq(-torch.inf).all()


@pytest.mark.slow
def test_a_pass_that_is_repeated_counts_once():
    model, clip = build()
    wanted = largest(model, clip)
    again, clip = build("model.recompute=[layer,norm,mla_up]")
    torch.testing.assert_close(largest(again, clip), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("first", [0, 5, 12])
def test_a_shard_scales_the_rows_of_which_it_has_a_part(first):
    """Of a weight of 4 rows and 3 columns, which another rank's shard begins or ends."""
    elements = range(first, min(first + 7, 12))
    weight = FlatWeight(torch.nn.Parameter(torch.empty(4, 3)), (4, 3), [elements, range(0)], 2 - first)
    shard = FlatShard(None, [weight], Sharing(2, 0), None, ["w"])
    flat, factors = torch.ones(9), torch.tensor([2.0, 3.0, 5.0, 7.0])
    shard.scale_rows(flat, {"w": factors})
    wanted = factors.repeat_interleave(3)[elements.start : elements.stop].tolist()
    assert flat.tolist() == [1.0, 1.0, *wanted, *[1.0] * (7 - len(elements))]
