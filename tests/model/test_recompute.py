"""Recomputation keeps less and changes no gradient."""

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conf.schema import SELECTIVE, Recompute
from tests.model.test_deepseek import CONFIG
from train.kernels.choice import build_kernels
from train.kernels.plain.high import HighPrecision
from train.model.deepseek import DeepSeekV3
from train.model.init import initialise
from train.model.recompute import RecomputedOutputs

torch.set_num_threads(1)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made inside that are alive; unlike saved-tensor hooks it sees what custom functions keep."""

    def __init__(self):
        super().__init__()
        self._storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        return out

    def total(self) -> int:
        return sum(nbytes for storage, nbytes in self._storages.values() if storage() is not None)


def run(recompute: list[Recompute]) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes alive between forward and backward, and the gradients."""
    # a wide block in place of a wide vocabulary: the loss keeps gradients of the head that are no activations
    config = dataclasses.replace(CONFIG, recompute=recompute, vocab_size=8, mtp_depth=1, init_std=0.1, top_k=6)
    precision = HighPrecision(torch.float32, build_kernels("cpu"), Recompute.swiglu in recompute)
    model = DeepSeekV3.whole(config, precision, seq_len=64, device="meta")
    initialise(model, 1)
    tokens_BS = torch.randint(8, (2, 65), generator=torch.Generator().manual_seed(0))
    model.mtp_weight = 0.3
    with LiveBytes() as live:
        loss = model(tokens_BS)
        kept = live.total()
    loss.backward()
    return kept, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("what", list(Recompute))
def test_each_kind_saves_memory_and_keeps_gradients_bit_for_bit(what):
    everything, expected = run([])
    less, gradients = run([what])
    all_of_them, _ = run(list(Recompute))
    assert less < 0.97 * everything
    assert all_of_them <= less if what == Recompute.layer else all_of_them < less
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize(("what", "share"), [(SELECTIVE, 0.75), (["layer:1"], 0.9), (list(Recompute), 0.4)])
def test_kinds_together_save_more(what, share):
    everything, expected = run([])
    least, gradients = run(what)
    assert least < share * everything
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_one_call_serves_all_readers_and_a_second_backward_calls_again():
    calls = []
    source = torch.arange(4.0)

    def square():
        calls.append(1)
        return source * source

    weight = torch.ones(4, requires_grad=True)
    y = square()
    calls.clear()
    with RecomputedOutputs(square, (), y):
        out = (weight * y).sum() + (weight.view(2, 2) * y.view(2, 2).t()).sum()
    del y
    first = torch.autograd.grad(out, weight, retain_graph=True)[0]
    assert len(calls) == 1
    second = torch.autograd.grad(out, weight)[0]
    assert len(calls) == 2
    assert torch.equal(first, torch.tensor([0.0, 1 + 4, 4 + 1, 18]))
    assert torch.equal(first, second)
