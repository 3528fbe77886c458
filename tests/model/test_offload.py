"""Activations that wait on the host leave the device, once each, and change no bit of a loss or a gradient."""

import dataclasses

import pytest
import torch

from conf.load import compose
from conf.schema import SELECTIVE
from parallel.pipeline.host_store import HostStore
from tests.model.test_deepseek import CONFIG
from tests.model.test_recompute import LiveBytes
from train.kernels.choice import build_kernels
from train.kernels.fp8.fp8 import Fp8Precision, cpu_engine
from train.kernels.plain.high import HighPrecision
from train.kernels.plain.plain_kernels import PlainKernels
from train.model.deepseek import DeepSeekV3
from train.model.init import initialise
from train.model.offload import OffloadedBlock

torch.set_num_threads(1)
CPU = torch.device("cpu")


def high(compiled: bool) -> HighPrecision:
    return HighPrecision(torch.bfloat16 if compiled else torch.float32, build_kernels("cpu", compiled))


def fp8() -> Fp8Precision:
    """Attention keeps its output here, which the packed one replaces."""
    section, kernels = compose("precision=fp8").precision.fp8, PlainKernels()
    return Fp8Precision(section, CPU, kernels, cpu_engine(section, kernels))


def run(precision, offload: list[str], recompute: list[str]) -> tuple[HostStore, int, dict[str, torch.Tensor]]:
    """The host, bytes alive on the device between forward and backward, and loss and gradients."""
    config = dataclasses.replace(
        CONFIG, offload=offload, recompute=recompute, hidden=128, vocab_size=8, mtp_depth=1, init_std=0.1, top_k=6
    )
    host = HostStore(CPU)
    options = {"seq_len": 64, "device": "meta", "host": host, "dtype": precision.dtype}
    model = DeepSeekV3.whole(config, precision, **options)
    initialise(model, 1, CPU)
    tokens_BS = torch.randint(8, (2, 65), generator=torch.Generator().manual_seed(0))
    model.mtp_weight = 0.3
    with LiveBytes() as live:
        loss = model(tokens_BS)
        host._let_go(host._leaving)  # as the end of the next action does
        kept = live.total() - host.taken_bytes
    loss.backward()
    return host, kept, {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", [[], SELECTIVE, ["layer:1"]])
@pytest.mark.parametrize("offload", [["layer"], ["attention"], ["ffn"], ["layer:1"]])
def test_less_stays_and_no_bit_changes(offload, recompute):
    _, everything, expected = run(high(compiled=False), [], recompute)
    host, less, found = run(high(compiled=False), offload, recompute)
    assert host.sent_bytes > 0.9 * (everything - less) > 0  # views of one storage go once
    assert host.sent_bytes < 1.001 * (everything - less)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("precision", [lambda: high(compiled=True), fp8], ids=["compiled", "fp8"])
def test_what_compiled_code_and_fp8_keep_goes_too(precision):
    _, everything, expected = run(precision(), [], SELECTIVE)
    host, less, found = run(precision(), ["layer"], SELECTIVE)
    assert host.sent_bytes == everything - less > 0
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_inputs_and_small_tensors_stay():
    host, stays = HostStore(CPU), torch.randn(64, 64, requires_grad=True)
    weight, small = torch.nn.Parameter(torch.randn(64, 64)), torch.randn(8, requires_grad=True)
    with OffloadedBlock(host, (stays, weight)):
        y = ((stays @ weight).exp() * small.exp().sum()).sin()
    assert host.sent_bytes == 2 * 64 * 64 * 4  # the result of exp, kept twice, and the input of sin
    y.sum().backward()
    assert stays.grad is not None and small.grad is not None


def test_the_same_tensor_is_sent_once_whatever_views_of_it_are_saved():
    host, x = HostStore(CPU), torch.randn(32, 64, requires_grad=True)
    with OffloadedBlock(host, (x,)):
        h = x.exp()
        y = (h[:16] @ h[16:].t()).sum() + (h.t() * h.view(64, 32)).sum()
    assert host.sent_bytes == 32 * 64 * 4
    expected = torch.autograd.grad(_again(x), x)[0]
    assert torch.equal(torch.autograd.grad(y, x)[0], expected)


def _again(x: torch.Tensor) -> torch.Tensor:
    h = x.exp()
    return (h[:16] @ h[16:].t()).sum() + (h.t() * h.view(64, 32)).sum()
