"""Low-rank pairs beside frozen weights, in one process."""

import pytest
import torch
from torch import Tensor

from conf.adapters import name_lora, target_of
from conf.load import compose
from tests.small import SMALL
from train.kernels.choice import build_kernels
from train.kernels.fp8.frozen_blocks import BLOCKS, draw_blocks, frozen_blocks, hold_in_blocks
from train.kernels.fp8.quantize import dequantize, quantize
from train.kernels.precision import activation_dtype, build_precision
from train.model.adapter import LoraWeights, add_adapters
from train.model.deepseek import DeepSeekV3
from train.model.init import draw_normal, initialise

ALL = "adapter.targets=[q_up,kv_up,down,out,routed,shared,dense,head]"
CPU = torch.device("cpu")


def build(*words: str, adapter: bool = True, b: float = 0.0, blocks: bool = False, seed: int = 1) -> DeepSeekV3:
    """b: standard deviation of B. blocks: the base is held in block FP8. seed: of the adapter."""
    given = ["data.path=none", "adapter=lora", "adapter.rank=8", "init_from=X", "optim.bias_speed=[{value: 0}]", ALL]
    config = compose(*SMALL, *given, *words)
    kernels = build_kernels("cpu", True)
    precision = build_precision(config.precision, CPU, kernels)
    model = DeepSeekV3.whole(
        config.model, precision, seq_len=24, device="meta", dtype=activation_dtype(config.precision)
    )
    if blocks:
        hold_in_blocks(model)
    initialise(model, 1, CPU)
    draw_blocks(model, 1)
    if adapter:
        add_adapters(model, config.adapter, kernels, seed)
    draw = torch.Generator().manual_seed(2)
    for name, param in model.named_parameters():
        if name.endswith("lora_B"):
            param.data.copy_(torch.randn(param.shape, generator=draw) * b)
    model.mtp_weight, model.step = 0.3, 1
    return model


def loss(model: DeepSeekV3) -> Tensor:
    return model(torch.randint(0, 320, (2, 25), generator=torch.Generator().manual_seed(0)))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_a_fresh_adapter_changes_nothing_and_alone_has_gradients(precision):
    model = build(f"precision={precision}")
    got = loss(model)
    assert got.item() == loss(build(f"precision={precision}", adapter=False)).item()
    got.backward()
    learns = {name for name, param in model.named_parameters() if param.grad is not None}
    assert learns == {name for name, _ in model.named_parameters() if name.endswith(("lora_A", "lora_B"))}
    assert all(model.get_parameter(name).grad.any() == name.endswith("lora_B") for name in learns), "A waits for B"


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["precision=fp32", "model.recompute=[layer]"], ["precision=bf16"], ["precision=fp8", "model.hidden=160", "model.dense_width=200"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_blocks_give_what_a_base_that_was_rounded_to_them_gives(words):
    """Widths of 160 and 200 have two blocks, the second cut short."""
    packed, rounded = build(*words, b=0.1, blocks=True), build(*words, b=0.1)
    held = dict(frozen_blocks(packed))
    assert held.keys() == {name for name, _ in rounded.named_parameters() if target_of(name) not in (None, "head")}
    for name, blocks in held.items():
        weight = rounded.get_parameter(name)
        x = weight.float()
        if weight.dtype == torch.bfloat16:  # drawn again, as bf16 has rounded it already
            x = torch.empty(weight.shape)
            keys = [f"1/{name}"] if blocks.experts is None else [f"1/{name}/{index}" for index in blocks.experts]
            for key, matrix in zip(keys, x.view(-1, *x.shape[-2:]), strict=True):
                draw_normal(matrix, key, rounded.config.init_std)
        assert (x - quantize(x, BLOCKS).q.float()).abs().max() > 0
        weight.data.copy_(dequantize(quantize(x, BLOCKS)))
        assert blocks.data.nbytes < 1.1 * weight.numel() + 32 * len(blocks.data.view(-1, blocks.matrix_bytes))
    got, want = loss(packed), loss(rounded)
    assert got.item() == want.item()
    got.backward()
    want.backward()
    for name, param in rounded.named_parameters():
        if param.grad is not None:
            assert torch.equal(packed.get_parameter(name).grad, param.grad), name


def test_pairs_are_what_their_product_added_to_the_weight_is():
    model = build(b=0.1)
    want, params = loss(model), dict(model.named_parameters())
    assert abs(want.item() - loss(build(adapter=False)).item()) > 1e-3
    with torch.no_grad():
        for name, weight in params.items():
            if target_of(name):
                scale = 32 / 8
                weight += scale * torch.cat([params[b] @ params[a] for a, b in name_lora(name)], -2)
        for name, param in params.items():
            if name.endswith("lora_B"):
                param.zero_()
    torch.testing.assert_close(loss(model), want, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_dropout_follows_from_the_step_and_is_in_no_evaluation(monkeypatch):
    plain, model = build(b=0.1), build("adapter.dropout=0.3", b=0.1)
    first = loss(model).item()
    assert first != loss(plain).item() and first == loss(model).item()
    again = build("adapter.dropout=0.3", "model.recompute=[layer]", b=0.1)
    loss(model).backward()
    loss(again).backward()
    for name, param in model.named_parameters():
        if param.grad is not None:
            torch.testing.assert_close(again.get_parameter(name).grad, param.grad, rtol=1e-4, atol=1e-6)
    model.step = 2
    assert loss(model).item() != first
    with torch.no_grad():
        assert loss(model.eval()).item() == loss(plain.eval()).item()


def test_a_fresh_pair_is_drawn_as_peft_draws_it():
    """A uniform in +-1 / sqrt(inputs), of every pair and expert by itself and by the seed; B at 0."""
    fresh, other = build(), build(seed=2)
    drawn = {name: param.detach() for name, param in fresh.named_parameters() if name.endswith("lora_A")}
    for name, a in drawn.items():
        bound = a.size(-1) ** -0.5
        assert 0.9 * bound < a.max() <= bound and -bound <= a.min() < -0.9 * bound, name
        assert not fresh.get_parameter(name.replace("lora_A", "lora_B")).any(), name
    matrices = [*drawn.values(), *(other.get_parameter(name).detach() for name in drawn)]
    rows = [row[0, :16].tolist() for a in matrices for row in a.view(-1, *a.shape[-2:])]
    assert len({tuple(row) for row in rows}) == len(rows)


def test_every_pair_step_and_seed_drops_other_inputs():
    x = torch.randn(64, 640)

    def dropped(model: DeepSeekV3, layer: str, step: int) -> Tensor:
        model.step = step
        return model.layers[layer].attention.q_up.added._drop(x)[0] == 0

    first, second = build("adapter.dropout=0.3"), build("adapter.dropout=0.3", seed=2)
    mask = dropped(first, "0", 1)
    assert torch.equal(mask, dropped(first, "0", 1))
    for other in (dropped(first, "1", 1), dropped(first, "0", 2), dropped(second, "0", 1)):
        assert abs((mask & other).double().mean() - 0.09) < 0.01, "as often as chance would have it"


def test_the_share_that_is_dropped():
    pairs, x = build("adapter.dropout=0.3").layers["0"].attention.q_up.added, torch.randn(512, 640)
    assert isinstance(pairs, LoraWeights)
    dropped, _ = pairs._drop(x)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], x[kept] / 0.7)
    for axis in (0, 1):
        shares = 1 - kept.double().mean(axis)
        assert abs(shares.mean() - 0.3) < 0.005 and 0.7 < shares.std() / (0.21 / x.size(axis)) ** 0.5 < 1.3
    both = (~kept[:, :-1] & ~kept[:, 1:]).double().mean()
    assert abs(both - 0.09) < 0.005, "neighbours have nothing to do with one another"
