"""Attention's backward uses the output that the projection stores in E5M6 (paper 3.3.3), so this output is stored only
once."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch

from conf.load import compose
from tests.model.test_deepseek import CONFIG
from tests.model.test_recompute import LiveBytes
from train.kernels.fp8.formats import E5M6, Cast
from train.kernels.fp8.fp8 import Fp8Precision, cpu_engine
from train.kernels.fp8.quantize import dequantize, quantize
from train.kernels.plain.plain_kernels import PlainKernels
from train.model.attention import AttentionInput
from train.model.mla import MLA
from train.model.recompute import ReplaceableTensors
from train.model.rope import Rope
from train.model.sequence import Positions

torch.set_num_threads(1)
B, T = 2, 64


def run(patch: pytest.MonkeyPatch | None = None) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes kept by an MLA, and its gradients."""
    if patch is not None:
        patch.setattr(ReplaceableTensors, "replace", lambda *_: None)
    config = dataclasses.replace(CONFIG, hidden=128, heads=4, nope_head_dim=16, rope_head_dim=16, v_head_dim=32)
    fp8, kernels = compose("precision=fp8").precision.fp8, PlainKernels()
    precision = Fp8Precision(fp8, torch.device("cpu"), kernels, cpu_engine(fp8, kernels))
    mla = MLA(config, precision, Rope(config, T), dtype=torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in mla.parameters():
            weight.normal_(0, 0.2, generator=draw) if weight.dim() > 1 else weight.fill_(1)
    x = torch.randn(B, T, 128, generator=draw).bfloat16().requires_grad_()
    upstream = torch.randn(B, T, 128, generator=draw).bfloat16()
    with LiveBytes() as live:
        y = mla(x, nullcontext())
        kept = live.total()
    y.backward(upstream)
    return kept, {"x": x.grad} | {name: p.grad for name, p in mla.named_parameters()}


@pytest.mark.slow
def test_the_output_is_kept_once_and_what_it_has_no_part_in_stays(monkeypatch):
    """The rest of the gradients passes through casts to E4M3, which a small difference may decide anew: within half a step of it."""
    less, gradients = run()
    more, expected = run(monkeypatch)
    assert more - less == 2 * B * T * 4 * 32  # one bf16 copy
    for name, gradient in gradients.items():
        error = (gradient.float() - expected[name].float()).norm() / expected[name].float().norm()
        assert error < 2**-4, name
    assert torch.equal(gradients["out.weight"], expected["out.weight"])
    assert not torch.equal(gradients["q_up.weight"], expected["q_up.weight"])


def test_gradients_of_scores_are_off_by_the_rounding_of_one_sum():
    """Backward takes an output in one place, the sum of dO O that is subtracted from every dP of a row. E5M6 rounds by 2^-7 of
    a value at most, so dq of a row is off by at most scale 2^-7 (sum of |dO O|) (P |k|), and dv by nothing."""
    draw = torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(B, 4, T, 32, generator=draw).requires_grad_() for _ in range(4))
    scale, saved = 32**-0.5, ReplaceableTensors()
    given, kernels = AttentionInput(q, k, v, scale, Positions(T).seen[0]), PlainKernels()
    exact = torch.autograd.grad(kernels.attention(given), (q, v), upstream)
    with saved:
        out = kernels.attention(given)
    rounded = dequantize(quantize(out.detach().flatten(0, -2), Cast(E5M6, (1, 128), pow2=True)), torch.float32).view(
        out.shape
    )
    saved.replace(out, lambda: rounded)
    dq, dv = torch.autograd.grad(out, (q, v), upstream)
    with torch.no_grad():
        scores = (scale * q @ k.mT).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
        most = scale * 2**-7 * (upstream * out).abs().sum(-1, keepdim=True) * (scores.softmax(-1) @ k.abs())
    off = (dq - exact[0]).abs()
    assert (off <= most + 1e-5).all() and off.max() > 1e-3
    assert torch.equal(dv, exact[1])
