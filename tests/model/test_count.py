"""Counts reproduce the published figures and the real model."""

import pytest

from conf.load import compose
from train.kernels.plain.plain_kernels import PlainKernels
from train.model.count import (
    attention_matmul_weights,
    checkpoint_bytes,
    count_parameters,
    flops_per_token,
    head_flops,
    layer_flops,
)
from train.model.deepseek import DeepSeekV3
from train.model.moe import Experts
from train.plan.memory.rank_memory import chunk_parts
from train.plan.memory.rank_weights import rank_weights, shards, state_bytes


def recipe(name: str):
    return compose(f"conf={name}", "data.path=somewhere").model


def test_deepseek_v3_has_671b_parameters_and_36_6b_active():
    counts = count_parameters(recipe("deepseek_v3"))
    assert round(counts.total / 1e9, 2) == 671.03
    assert round(counts.active_without_embedding / 1e9, 2) == 36.63
    assert round(counts.moe_block / 1e9 - counts.attention / 1e9, 2) == 11.32
    assert round(counts.expert / 1e6, 2) == 44.04
    assert round(counts.mtp / 1e9, 2) == 11.61


def test_16b_shape_has_15_706b_parameters():
    counts = count_parameters(recipe("deepseek_v3_16b"))
    assert round(counts.total / 1e9, 3) == 15.706
    assert round(counts.active_without_embedding / 1e9, 3) == 2.451


def test_a_checkpoint_has_masters_what_the_optimizer_keeps_and_the_average():
    config = compose("conf=tiny", "precision=bf16")
    counts, moments = count_parameters(config.model), 2 * config.precision.moment_bytes
    assert checkpoint_bytes(config) == (counts.total + counts.mtp) * (4 + moments)
    assert checkpoint_bytes(compose("conf=tiny", "precision=bf16", "optim.ema_decay=0.9")) == (
        (counts.total + counts.mtp) * (4 + moments + 4)
    )


@pytest.mark.parametrize(
    "words",
    [["optim=muon"], ["optim=muon", "model.mtp_depth=2", "precision=bf16"], ["conf=tiny_dsa", "optim=muon"], []],
)
def test_a_checkpoint_has_the_state_that_the_rule_of_each_weight_keeps(words):
    """Counted weight by weight, as one rank holds them."""
    config = compose("conf=tiny", *words)
    groups = shards(config, rank_weights(config, [chunk for rank in chunk_parts(config) for chunk in rank.values()]))
    elements = sum(group.elements for group in groups)
    assert checkpoint_bytes(config) == 4 * elements + state_bytes(config, groups, lambda group: group.elements)


def test_muon_keeps_one_moment_of_matrices():
    assert round(checkpoint_bytes(compose("conf=kimi_k2", "data.path=somewhere")) / 1e12, 2) == 6.16


def test_frozen_weights_have_no_third_product():
    model = recipe("deepseek_v3")
    attention, head, up = attention_matmul_weights(model), model.vocab_size * model.hidden, 3 * model.hidden
    for dense, width in ((True, model.dense_width), (False, (8 + 1) * model.expert_width)):
        whole, frozen = (layer_flops(model, 4096, dense, frozen=one) for one in (False, True))
        assert whole - frozen == 2 * (attention + up * width)
    assert head_flops(model) == 6 * head and head_flops(model, frozen=True) == 4 * head


def test_models_of_moonshot_have_their_sizes():
    """Moonlight's report counts neither embedding nor head. That of Kimi K2 says 1.04T and 32.6B, without a formula."""
    moonlight, kimi = (count_parameters(recipe(name)) for name in ("moonlight_16b", "kimi_k2"))
    embeddings = 2 * 163840 * 2048
    assert round((moonlight.total - embeddings) / 1e9, 2) == 15.29
    assert round((moonlight.active_without_embedding - embeddings / 2) / 1e9, 2) == 2.24
    assert round(kimi.total / 1e9) == 1026 and round(kimi.active_without_embedding / 1e9, 2) == 31.69


def test_flops_of_deepseek_v3_at_4096():
    config = recipe("deepseek_v3")
    assert round(flops_per_token(config, 4096) / 1e9, 1) == 249.8
    assert round(flops_per_token(config, 4096, mtp=True) / 1e9, 1) == 260.0
    # 432 against 385 TFLOP/s is the paper's ratio of full to causal attention
    full = flops_per_token(config, 4096, causal=False)
    assert full / flops_per_token(config, 4096) == pytest.approx(432 / 385, abs=2e-3)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v3_16b", "tiny", "moonlight_16b", "kimi_k2"])
def test_counts_equal_the_model_built(name):
    config = recipe(name)
    model = DeepSeekV3.whole(config, _Nothing(), seq_len=64, device="meta")
    counts = count_parameters(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) == counts.total + counts.mtp
    assert sum(n for name, n in sizes.items() if not name.startswith("mtp.")) == counts.total
    last = model.layers[str(config.layers - 1)]
    assert sum(p.numel() for p in last.parameters()) == counts.moe_block
    assert sum(p.numel() for p in last.attention.parameters()) == counts.attention
    assert sum(p.numel() for p in model.layers["0"].parameters()) == counts.dense_block
    experts = next(m for m in model.modules() if isinstance(m, Experts))
    assert sum(p.numel() for p in experts.parameters()) == counts.expert * config.experts


class _Nothing:
    """A precision for models that are only counted."""

    dtype, kernels = None, PlainKernels()
