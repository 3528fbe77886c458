"""The first kernel that computes attention right is taken, and what does not is named."""

import pytest
import torch

from conf.errors import UserError
from conf.load import compose
from conf.schema import Model
from train import attention_choice
from train.attention_choice import FusedAttention, own_choice, problem_of
from train.kernels import build_kernels, choose_kernels
from train.model.deepseek import DeepSeekV3
from train.model.init import initialise
from train.model.kernels import Kernels
from train.model.mla import MLA
from train.precision.high import HighPrecision

CPU = torch.device("cpu")


@pytest.fixture
def config(monkeypatch):
    """Chosen on the CPU, which stands for the GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    return compose("model.nope_head_dim=128", "model.rope_head_dim=64", "model.v_head_dim=128")


def fails(q, k, v, mask, scale):
    raise RuntimeError("cuDNN Frontend error: no plan\nmore")


def sees_all(q, k, v, mask, scale):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)


def no_number(q, k, v, mask, scale):
    return own_choice(q, k, v, mask, scale) * torch.nan


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("recipe", ["bf16", "fp32", "fp8"])
def test_right_values_pass_and_wrong_ones_are_named(config, masked, recipe):
    config = compose("model.nope_head_dim=128", "model.rope_head_dim=64", "model.v_head_dim=128", f"precision={recipe}")
    assert problem_of(own_choice, config, CPU, masked) is None
    assert "is wrong (its result is off by" in problem_of(sees_all, config, CPU, masked)
    assert "is wrong" in problem_of(no_number, config, CPU, masked)
    assert problem_of(fails, config, CPU, masked) == "fails (cuDNN Frontend error: no plan)"


def test_wrong_gradients_are_seen(config):
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    def wrong(q, k, v, mask, scale):
        return own_choice(q, Halved.apply(k), v, mask, scale)

    assert "dk is off by" in problem_of(wrong, config, CPU, masked=False)


def test_the_second_choice_is_named_in_a_note(config, monkeypatch):
    monkeypatch.setattr(attention_choice, "KERNELS", {"one": fails, "two": sees_all, "three": own_choice})
    kernel, [note] = attention_choice._first_that_works(config, CPU, masked=False)
    assert kernel is own_choice
    assert "over whole sequences is three: one fails (cuDNN Frontend" in note and "; two is wrong (" in note
    monkeypatch.setattr(attention_choice, "KERNELS", {"one": own_choice, "two": fails})
    assert attention_choice._first_that_works(config, CPU, masked=True) == (own_choice, [])


def test_where_none_works_the_run_is_refused(config, monkeypatch):
    monkeypatch.setattr(attention_choice, "KERNELS", {"one": fails})
    with pytest.raises(UserError, match=r"inside documents right on NVIDIA H100: one fails") as refused:
        attention_choice._first_that_works(config, CPU, masked=True)
    assert "data.mask_documents=false" in refused.value.cure


def test_a_cpu_has_the_models_own():
    kernels, notes = choose_kernels(compose(), CPU)
    assert type(kernels) is type(build_kernels("cpu")) and notes == []


def test_every_block_takes_the_core_that_it_is_given():
    """The MTP modules' too; results are those of the model's own."""
    used = []

    def kernel(q, k, v, mask, scale):
        used.append(None if mask is None else mask.shape)
        return own_choice(q, k, v, mask, scale)

    small = Model(vocab_size=64, hidden=32, layers=2, dense_layers=1, heads=2, q_rank=16, kv_rank=16, nope_head_dim=16,
                  rope_head_dim=8, v_head_dim=16, dense_width=64, expert_width=16, experts=4, top_k=2, groups=2,
                  top_groups=1, mtp_depth=1)  # fmt: skip
    tokens_BS = torch.randint(64, (2, 13), generator=torch.Generator().manual_seed(0))
    documents_BS = (torch.arange(13) > 6).int().expand(2, -1)
    losses = []
    for core in (Kernels().attention, FusedAttention(kernel, kernel)):
        kernels = Kernels()
        kernels.attention = core
        model = DeepSeekV3.whole(small, HighPrecision(torch.float32, kernels), seq_len=12, device="meta")
        initialise(model, 1)
        assert all(module._kernels.attention is core for module in model.modules() if isinstance(module, MLA))
        losses += [model(tokens_BS), model(tokens_BS, documents_BS=documents_BS)]
    torch.testing.assert_close(losses[:2], losses[2:])
    assert used == [None] * 3 + [(2, 1, 12, 12)] * 2 + [(2, 1, 11, 11)]
