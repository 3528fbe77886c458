"""Initial values depend on the seed and the names, not on the layout."""

import dataclasses

import torch

from conf.schema import Model
from tests.model.test_deepseek import CONFIG
from train.kernels.choice import build_kernels
from train.kernels.plain.high import HighPrecision
from train.model import init
from train.model.deepseek import DeepSeekV3
from train.model.init import initialise

torch.set_num_threads(1)


def build(config: Model, seed: int | None = 1, **parts) -> DeepSeekV3:
    parts = {"layers": range(config.layers), "has_embedding": True, "has_head": True, "device": "meta"} | parts
    model = DeepSeekV3(config, HighPrecision(torch.float32, build_kernels("cpu")), seq_len=8, **parts)
    initialise(model, seed)
    return model


def test_a_rank_draws_what_one_process_draws():
    whole = build(CONFIG).state_dict()
    part = build(CONFIG, layers=range(1, 3), has_embedding=False, local_experts=range(4, 8)).state_dict()
    assert "layers.0.attention_norm.weight" not in part and "embedding.weight" in part  # the table that MTP needs
    for name, tensor in part.items():
        expected = whole[name][4:8] if ".experts." in name else whole[name]
        assert torch.equal(tensor, expected), name


def test_weights_that_a_checkpoint_fills_are_not_drawn(monkeypatch):
    """They are no numbers, so that one that stays by mistake is seen; biases and counters are 0 all the same."""
    monkeypatch.setattr(init, "draw_normal", None)
    model = build(CONFIG, seed=None)
    assert all(param.isnan().all() for param in model.parameters())
    assert all((buffer == 0).all() for buffer in model.buffers() if buffer.dtype != torch.complex64)


def test_values():
    model = build(dataclasses.replace(CONFIG, init_std=0.006))
    weights = torch.cat([p.flatten() for name, p in model.named_parameters() if "norm" not in name])
    gains = torch.cat([p.flatten() for name, p in model.named_parameters() if "norm" in name])
    assert abs(weights.std().item() / 0.006 - 1) < 0.02 and abs(weights.mean().item()) < 1e-4
    assert (gains == 1).all()
    assert all(router.bias_E.abs().sum() == 0 for router in model.routers().values())


def test_seed_name_and_expert_all_matter():
    model, other = build(CONFIG, 1), build(CONFIG, 2)
    w13 = model.layers["1"].moe.experts.w13
    assert not torch.equal(w13, other.layers["1"].moe.experts.w13)
    assert not torch.equal(w13, model.layers["2"].moe.experts.w13)
    assert not torch.equal(w13[0], w13[1])


def test_bf16_weights_are_the_rounded_fp32_ones():
    exact, rounded = build(CONFIG), build(CONFIG, dtype=torch.bfloat16)
    for a, b in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)


def test_memory_that_is_there_stays():
    """Engines hold views of parameters: initialise fills them in place."""
    model = build(CONFIG, device="cpu")
    addresses = [p.data_ptr() for p in model.parameters()]
    initialise(model, 7)
    assert addresses == [p.data_ptr() for p in model.parameters()]
