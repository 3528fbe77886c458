"""The same weights give the same logits, loss and gradients as transformers' DeepseekV3ForCausalLM, in fp32."""

import random

import pytest
import torch

from conf.load import compose
from conf.schema import Model, Recompute, Yarn
from tests.model import parity
from train.kernels.choice import build_kernels
from train.kernels.plain.high import HighPrecision
from train.model.deepseek import DeepSeekV3

torch.set_num_threads(1)


def random_config(seed: int) -> tuple[Model, int]:
    """A small model with odd sizes, and a length. transformers always sums the best 2 experts of a group, and takes 1e-6 in
    the norms of latents."""
    draw = random.Random(seed)
    groups = draw.choice([1, 1, 2, 4])
    top_groups = draw.randint(1, groups)
    experts = groups * draw.choice([2, 3, 4]) if groups > 1 else draw.choice([4, 5, 7])
    top_k = draw.randint(2, experts // groups * top_groups)
    layers = draw.randint(1, 3)
    config = Model(
        vocab_size=draw.choice([37, 64, 101]),
        hidden=4 * draw.randint(5, 12),
        layers=layers,
        dense_layers=draw.randint(0, layers),
        heads=draw.randint(1, 3),
        q_rank=draw.choice([None, 12, 20]),
        kv_rank=draw.choice([8, 11]),
        nope_head_dim=draw.choice([7, 12]),
        rope_head_dim=draw.choice([2, 6, 8]),
        v_head_dim=draw.choice([5, 10, 24]),
        dense_width=draw.choice([18, 30]),
        expert_width=4 * draw.randint(2, 4),
        experts=experts,
        shared_experts=draw.randint(1, 2),
        top_k=top_k,
        groups=groups,
        top_groups=top_groups,
        route_scale=draw.choice([1.0, 2.5]),
        mtp_depth=0,
        group_top_k=2,
        norm_eps=draw.choice([1e-6, 1e-5, 1e-3]),
        latent_norm_eps=1e-6,
        yarn=Yarn(
            factor=draw.choice([1.0, 8.0]),
            original_seq_len=draw.choice([4, 8, 4096]),
            truncate=draw.choice([True, False]),
            mscale=draw.choice([0.0, 0.7, 1.0]),
            attention_factor=draw.choice([1.0, 1.3]),
        ),
        recompute=draw.sample(list(Recompute), draw.randint(0, 3)),
        loss_chunk=draw.choice([5, 1000]),
    )
    return config, draw.randint(2, 23)


@pytest.mark.parametrize("seed", range(24))
def test_logits_and_gradients_equal_transformers(seed):
    torch.manual_seed(seed)
    config, seq_len = random_config(seed)
    theirs = parity.transformers_model(config, seq_len)
    parity.randomise(theirs, 0.15)
    ours = DeepSeekV3.whole(config, HighPrecision(torch.float32, build_kernels("cpu")), seq_len=seq_len)
    parity.load(ours, theirs)
    tokens_BS = torch.randint(config.vocab_size, (2, seq_len + 1))

    expected = theirs(tokens_BS[:, :-1]).logits
    torch.testing.assert_close(ours.eval().logits(tokens_BS[:, :-1]), expected, atol=1e-5, rtol=0)

    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), tokens_BS[:, 1:].flatten())
    expected_loss.backward()
    loss = ours.train()(tokens_BS)
    loss.backward()
    assert loss.shape == (1,)
    torch.testing.assert_close(loss[0], expected_loss, atol=1e-5, rtol=0)
    zeros = {name: torch.zeros_like(p) for name, p in theirs.named_parameters()}  # experts that no token chose
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    biases = {name: b for name, b in theirs.named_buffers() if name.endswith("e_score_correction_bias")}
    gradients = parity.to_ours(zeros | gradients | biases, config)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_tiny_recipe_equals_transformers():
    torch.manual_seed(0)
    config = compose("conf=tiny", "model.mtp_depth=0", "model.vocab_size=128").model
    theirs = parity.transformers_model(config, 64)
    parity.randomise(theirs, 0.04)
    ours = DeepSeekV3.whole(config, HighPrecision(torch.float32, build_kernels("cpu")), seq_len=64)
    parity.load(ours, theirs)
    tokens_BT = torch.randint(config.vocab_size, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(tokens_BT), theirs(tokens_BT).logits, atol=1e-5, rtol=0)
