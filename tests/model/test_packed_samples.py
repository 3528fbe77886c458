"""Samples that share a sequence give what they give one at a time: losses, gradients, loads and balance losses, also of MTP depths.

In fp64 to 1e-12, which leaves room for sums in another order alone; the three cases of Megatron-Bridge's issue 2952 in fp32 to 1e-6.
"""

import dataclasses

import pytest
import torch

from tests.model.test_deepseek import CONFIG
from train.kernels.choice import build_kernels
from train.kernels.plain.high import HighPrecision
from train.kernels.plain.plain_attention import PlainAttention
from train.model.deepseek import DeepSeekV3
from train.model.init import initialise
from train.prove.double import in_double

LENGTHS = [7, 1, 9, 2, 3, 12, 5]
"""Tokens of samples: one that has no position, some that are too short for MTP modules."""
ROWS = [[0, 1, 2], [3, 4, 5, 6]]


def make_samples(lengths: list[int], vocabulary: int = 50) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens, and which of them are supervised: in one sample the first, in one all, in one the last alone."""
    draw = torch.Generator().manual_seed(3)
    found = []
    for number, length in enumerate(lengths):
        tokens = torch.randint(vocabulary, (length,), generator=draw)
        learnt = torch.rand(length, generator=draw) < 0.5
        if number % 3 == 2:
            learnt = torch.arange(length) == length - 1
        found.append((tokens, learnt | (torch.full((length,), number % 3 == 1))))
    return found


def pack(samples, rows: list[list[int]], length: int):
    """Rows of `length` tokens, filled up with token 0."""
    tokens_BS = torch.zeros(len(rows), length, dtype=torch.int64)
    documents_BS = torch.full((len(rows), length), -1, dtype=torch.int32)
    supervised_BS = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, numbers in enumerate(rows):
        at = 0
        for place, number in enumerate(numbers):
            tokens, learnt = samples[number]
            part = slice(at, at + len(tokens))
            tokens_BS[row, part], documents_BS[row, part], supervised_BS[row, part] = tokens, place, learnt
            at += len(tokens)
    return tokens_BS, documents_BS, supervised_BS


def build(config, dtype: torch.dtype, core=None) -> DeepSeekV3:
    model = DeepSeekV3.whole(config, HighPrecision(dtype, build_kernels("cpu", False, core)), seq_len=24, dtype=dtype)
    initialise(model, seed=0, device="cpu")
    return model


def targets_of(samples) -> int:
    return sum(int(learnt[1:].sum()) for _, learnt in samples)


def train(model: DeepSeekV3, batches, divisor: float, alpha: float) -> dict[str, torch.Tensor]:
    """Losses and counts summed over batches, and gradients. Each batch is a micro-batch whose samples weigh as they do in all."""
    model.zero_grad()
    model.losses.clear()
    model.mtp_weight, model.loss_divisor = 0.3, divisor
    for router in model.routers().values():
        router.clear()
    for tokens_BS, documents_BS, supervised_BS in batches:
        for router in model.routers().values():
            router.balance_weight = alpha * len(tokens_BS)
        model(tokens_BS, documents_BS=documents_BS, supervised_BS=supervised_BS).sum().backward()
    found = {"main": model.losses.main} | {f"mtp {k}": loss for k, loss in enumerate(model.losses.mtp)}
    for name, router in model.routers().items():
        found |= {f"load {name}": router.load_E.clone(), f"balance {name}": router.balance_loss.clone()}
        found[f"score {name}"] = router.score_E.clone()
    return found | {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("depths", [0, 1, 3])
@pytest.mark.parametrize("recompute", [[], ["norm", "mla_up", "swiglu", "layer"]])
def test_packed_equals_apart(depths, recompute):
    samples = make_samples(LENGTHS)
    divisor = float(targets_of(samples))
    with in_double():
        model = build(
            dataclasses.replace(CONFIG, mtp_depth=depths, recompute=recompute), torch.float64, PlainAttention()
        )
        apart = [pack([sample], [[0]], len(sample[0])) for sample in samples if len(sample[0]) > 1 + depths]
        short = [pack([sample], [[0]], 2 + depths) for sample in samples if len(sample[0]) <= 1 + depths]
        want = train(model, [*apart, *short], divisor, 0.05)
        got = train(model, [pack(samples, ROWS, 24)], divisor, 0.05)
    assert want.keys() == got.keys()
    for name, value in want.items():
        assert value.abs().sum() > 0, name
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


def test_what_fills_up_changes_nothing():
    """Another token, and more of it: the same bits of losses and counts but for the order of sums."""
    samples = make_samples(LENGTHS)
    with in_double():
        model = build(dataclasses.replace(CONFIG, mtp_depth=2), torch.float64, PlainAttention())
        batch = pack(samples, ROWS, 24)
        want = train(model, [batch], 9.0, 0.05)
        tokens_BS, documents_BS, supervised_BS = pack(samples, ROWS, 30)
        tokens_BS[documents_BS < 0] = 17
        got = train(model, [(tokens_BS, documents_BS, supervised_BS)], 9.0, 0.05)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


def test_a_micro_batch_without_a_supervised_token_has_a_loss_of_0_and_a_whole_graph():
    (tokens, _), *_ = make_samples([9])
    nothing = torch.zeros(9, dtype=torch.bool)
    model = build(CONFIG, torch.float32)
    found = train(model, [pack([(tokens, nothing)], [[0]], 9)], 5.0, 0.0)
    assert found["main"] == 0 and found["mtp 0"] == 0
    assert all(weight.grad is not None and not weight.grad.any() for weight in model.parameters())


@pytest.mark.parametrize(
    ("equal", "depths"), [(True, 0), (False, 0), (False, 1)], ids=["three equal", "three different", "with MTP"]
)
def test_the_cases_of_megatron_bridge_2952(equal, depths):
    """Packed they had a loss of 0.0347 there, and 0.572 apart."""
    samples = make_samples([8, 8, 8])
    samples = samples[:1] * 3 if equal else samples
    model = build(dataclasses.replace(CONFIG, mtp_depth=depths), torch.float32)
    divisor = float(targets_of(samples))
    apart = train(model, [pack([sample], [[0]], 8) for sample in samples], divisor, 0.0)
    packed = train(model, [pack(samples, [[0, 1, 2]], 24)], divisor, 0.0)
    for name in ["main", *(f"mtp {k}" for k in range(depths))]:
        assert abs(packed[name] - apart[name]) < 1e-6, name
    for name, weight in model.named_parameters():
        torch.testing.assert_close(packed[name], apart[name], rtol=1e-4, atol=1e-6)
        assert weight.grad.any()
