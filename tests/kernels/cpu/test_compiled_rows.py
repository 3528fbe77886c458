"""The compiled norm, SwiGLU and split into heads beside torch's operations, and beside the formulas in fp64."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import train.kernels.cpu.libraries as native
from conf.schema import Model
from train.kernels.cpu import compiled_rows
from train.kernels.cpu.compiled_kernels import CompiledKernels
from train.kernels.cpu.cpp_function import Kernel
from train.kernels.plain.heads import PlainHeads
from train.kernels.plain.high import HighPrecision
from train.kernels.plain.plain_kernels import PlainKernels
from train.model.layers import FFN, RMSNorm, _RMSNorm, swiglu
from train.model.rope import Rope, rotate

pytestmark = pytest.mark.skipif(native.why_absent() is not None, reason=native.why_absent() or "")
KERNELS = CompiledKernels(matmuls=True)
EPS = 1e-6
ROUNDING = 2**-7
"""Of a value: two bf16 numbers are neighbours, so that they may be roundings of two fp32 numbers that differ in the last bit."""
BITS = 2.5e-3
"""Of the norm of a result in bf16: its own rounding, 1.7e-3 on average over the numbers between two powers of two."""


class Case(NamedTuple):
    function: Callable
    """Of the kernels and the inputs."""
    formula: Callable
    """In fp64."""
    inputs: list[Tensor]
    grads: list[Tensor]
    """Of the outputs."""


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def norm(rows: int, width: int) -> Case:
    def formula(x, weight):
        return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight

    inputs = [draw(1, rows, width), draw(width)]
    return Case(
        lambda kernels, x, weight: _RMSNorm.apply(x, weight, EPS, kernels), formula, inputs, [draw(1, rows, width)]
    )


def gated(rows: int, inner: int, with_gates: bool) -> Case:
    def formula(h, gates=None):
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up * (1 if gates is None else gates[:, None])

    inputs = [4 * draw(rows, 2 * inner), *([draw(rows, dtype=torch.float32)] if with_gates else [])]
    return Case(lambda kernels, h, gates=None: swiglu(h, gates, kernels), formula, inputs, [draw(rows, inner)])


def heads(batch: int, length: int, count: int, nope: int, rope: int, value: int) -> Case:
    table = Rope(Model(rope_head_dim=rope), max(length, 1)).table(length, torch.device("cpu"))

    def turn(x):
        a, b, cos, sin = x[..., ::2], x[..., 1::2], table.real[:, None].double(), table.imag[:, None].double()
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    def formula(q, kv, shared):
        key = turn(shared[:, :, None]).expand(-1, -1, count, -1)
        q, k = torch.cat([q[..., :nope], turn(q[..., nope:])], -1), torch.cat([kv[..., :nope], key], -1)
        return q.transpose(1, 2), k.transpose(1, 2), kv[..., nope:].transpose(1, 2)

    inputs = [draw(batch, length, count, nope + width) for width in (rope, value)] + [draw(batch, length, rope)]
    grads = [draw(batch, count, length, width) for width in (nope + rope, nope + rope, value)]
    return Case(lambda kernels, *given: kernels.to_heads(*given, table, nope), formula, inputs, grads)


CASES = {
    "norm": lambda: norm(70, 96),
    "norm of an odd width": lambda: norm(131, 37),
    "norm of one row": lambda: norm(1, 16),
    "norm of many rows": lambda: norm(4100, 16),  # more than 64 parts of 64; work for two threads
    "norm of no rows": lambda: norm(0, 24),
    "swiglu": lambda: gated(33, 48, False),
    "swiglu of an odd width": lambda: gated(9, 19, False),
    "swiglu with gates": lambda: gated(350, 48, True),  # work for two threads
    "swiglu with gates, odd": lambda: gated(7, 5, True),
    "swiglu of no rows": lambda: gated(0, 16, True),
    "heads": lambda: heads(2, 150, 5, 32, 16, 32),  # work for two threads
    "heads of odd widths": lambda: heads(1, 21, 2, 13, 6, 7),
    "heads of one position": lambda: heads(1, 1, 1, 1, 2, 1),
    "heads of many pairs": lambda: heads(1, 9, 5, 128, 64, 128),
    "heads of no positions": lambda: heads(1, 0, 2, 8, 4, 8),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    torch.manual_seed(0)
    return CASES[request.param]()


def both_ways(function: Callable, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients; those of bf16 weights in fp32, as they are kept."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    for t in inputs:
        if t.dim() == 1 and t.dtype == torch.bfloat16:
            t.grad_dtype = torch.float32
    out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    return [*(t.detach() for t in out), *torch.autograd.grad(out, inputs, grads)]


def test_results_and_gradients_are_those_of_the_formula(case):
    got = both_ways(partial(case.function, KERNELS), case.inputs, case.grads)
    exact = both_ways(case.formula, *([t.double() for t in some] for some in (case.inputs, case.grads)))
    for ours, expected in zip(got, exact, strict=True):
        bound = BITS if ours.dtype == torch.bfloat16 else 1e-6
        assert ours.shape == expected.shape and (ours - expected).norm() <= bound * expected.norm()


def test_results_are_those_of_torchs_operations(case):
    """But for the last bits of fp32, where sums have another order and exp another polynomial."""
    got = both_ways(partial(case.function, KERNELS), case.inputs, case.grads)
    plain = both_ways(partial(case.function, PlainKernels()), case.inputs, case.grads)
    for ours, theirs in zip(got, plain, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        off = (ours.double() - theirs.double()).abs()
        if ours.dtype == torch.bfloat16:
            assert (off <= ROUNDING * theirs.abs() + 1e-5).all()  # where terms cancel, fp32's own error shows
            assert (off == 0).double().mean() > 0.98 or not off.numel()
        else:
            assert off.norm() <= 3e-6 * theirs.norm()  # over 4100 rows torch's sum is the less exact one


@pytest.mark.parametrize("sizes", [(2, 37, 3, 32, 16, 32), (1, 21, 2, 13, 6, 7)], ids=str)
def test_heads_are_those_of_torchs_operations_to_the_bit(sizes):
    """All but the gradient of the shared rope key, a sum over heads."""
    torch.manual_seed(0)
    case = heads(*sizes)
    table = Rope(Model(rope_head_dim=sizes[4]), sizes[1]).table(sizes[1], torch.device("cpu"))
    table, nope = table * 1.3, sizes[3]  # as under YaRN with an attention_factor
    ours = both_ways(lambda *given: KERNELS.to_heads(*given, table, nope), case.inputs, case.grads)
    plain = both_ways(lambda *given: PlainHeads.apply(*given, table, nope), case.inputs, case.grads)
    assert all(torch.equal(a, b) for a, b in zip(ours[:5], plain[:5], strict=True))
    assert torch.equal(ours[0][:, :, :, nope:], rotate(case.inputs[0][..., nope:], table).transpose(1, 2).bfloat16())


def test_memory_between_rows_is_not_read(case):
    """Inputs and gradients that lie apart in memory, with nothing a number around them."""

    def apart(t: Tensor) -> Tensor:
        room = torch.full([size + 3 for size in t.shape], torch.nan, dtype=t.dtype)
        inside = room[tuple(slice(1, 1 + size) for size in t.shape)]
        return inside.copy_(t)

    def transposed(t: Tensor) -> Tensor:
        return apart(t.transpose(0, -1)).transpose(0, -1)

    given = case.inputs, case.grads
    side_by_side = both_ways(partial(case.function, KERNELS), *given)
    for placed in (apart, transposed):
        strided = both_ways(partial(case.function, KERNELS), *([placed(t) for t in some] for some in given))
        assert all(torch.equal(a, b) for a, b in zip(side_by_side, strided, strict=True))


def test_threads_change_no_bit(case):
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(both_ways(partial(case.function, KERNELS), case.inputs, case.grads))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_meta_tensors_take_what_real_ones_take(case):
    """The rope table of `heads` stays real: what counts is where the activations are."""
    real = both_ways(partial(case.function, KERNELS), case.inputs, case.grads)
    meta = both_ways(
        partial(case.function, KERNELS), *([t.to("meta") for t in some] for some in (case.inputs, case.grads))
    )
    for a, b in zip(real, meta, strict=True):
        assert b.is_meta and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize("needed", [0, 1])
def test_a_norm_makes_the_gradients_that_are_wanted(needed):
    torch.manual_seed(0)
    case = norm(70, 40)
    inputs = [t.requires_grad_() for t in case.inputs]
    inputs[1].grad_dtype = torch.float32
    both = torch.autograd.grad(case.function(KERNELS, *inputs), inputs, case.grads)
    (one,) = torch.autograd.grad(case.function(KERNELS, *inputs), inputs[needed], case.grads)
    inputs[1 - needed].requires_grad_(False)
    (alone,) = torch.autograd.grad(case.function(KERNELS, *inputs), inputs[needed], case.grads)
    assert torch.equal(one, both[needed]) and torch.equal(alone, both[needed])


def test_what_is_not_finite_stays_so():
    h = torch.tensor([[torch.nan, torch.inf, 1e30, -300.0, 0.0, 1, 1, 1, 1, 1]]).bfloat16().requires_grad_()
    out = swiglu(h, None, KERNELS)
    assert out[0, 0].isnan() and out[0, 1].isinf() and out[0, 2] == h[0, 2] and out[0, 3:].tolist() == [0, 0]
    (dh,) = torch.autograd.grad(out, h, torch.ones_like(out))
    assert dh[0, 0].isnan() and dh[0, 2:5].tolist() == [1, 0, 0.5]
    x = torch.tensor([[1, torch.inf], [1, torch.nan]]).bfloat16()
    assert _RMSNorm.apply(x, torch.ones(2).bfloat16(), EPS, KERNELS)[:, 1].isnan().all()


def test_what_is_made_again_has_the_same_bits():
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        factory = {"dtype": torch.bfloat16}
        normed, ffn = (
            RMSNorm(40, EPS, recompute, KERNELS, **factory),
            FFN(40, 24, HighPrecision(torch.bfloat16, KERNELS), recompute, **factory),
        )
        parameters = [*normed.parameters(), *ffn.parameters()]
        for parameter in parameters:
            torch.nn.init.normal_(parameter)
        x = draw(50, 40).requires_grad_()
        y = ffn(*normed.with_remake(x))
        results.append([y, *torch.autograd.grad(y, [x, *parameters], draw(50, 40))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_model_takes_it_where_it_can_and_may(monkeypatch):
    called = []
    monkeypatch.setattr(Kernel, "__call__", lambda kernel, *rest: called.append(kernel.name))
    x, weight = draw(4, 32), draw(32)
    _RMSNorm.apply(x, weight, EPS, KERNELS), swiglu(x, None, KERNELS)
    assert called == ["rms_norm_forward", "swiglu_forward"]
    _RMSNorm.apply(x.float(), weight.float(), EPS, KERNELS), swiglu(x.float(), None, KERNELS)
    _RMSNorm.apply(x, weight.float(), EPS, KERNELS)
    _RMSNorm.apply(x, weight, EPS, PlainKernels()), swiglu(x, None, PlainKernels())
    assert len(called) == 2


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(0, 2, 4), (1, 1, 1), (37, 3, 8), (500, 8, 64)])
def test_rows_come_in_the_order_of_a_stable_sort(tokens, top_k, experts):
    ids_TK = torch.randint(experts, (tokens, top_k))
    ids_TK[ids_TK == 1] = 0  # an expert without rows, where there are two
    pairs = zip(
        compiled_rows.sort_by_expert(ids_TK, experts), PlainKernels().sort_by_expert(ids_TK, experts), strict=True
    )
    assert all(torch.equal(ours, expected) for ours, expected in pairs)


@pytest.mark.parametrize("wrong", [-1, 4, 2**40])
def test_an_expert_that_is_none_is_refused(wrong):
    with pytest.raises(AssertionError, match=r"expert ids must be in \[0, 4\)"):
        compiled_rows.sort_by_expert(torch.tensor([[0, 1], [2, wrong]]), 4)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_the_loss_of_what_is_not_finite_is_torchs(broken):
    """No number, with the gradient of its row, but for a logit that no exponential is above."""
    logits, targets = draw(3, 21), torch.tensor([4, 20, 0])
    logits[1, 7] = broken
    given = [logits.clone() for _ in range(2)]
    ours, theirs = (
        kernels.cross_entropy(one, targets, 1.0) for kernels, one in zip((KERNELS, PlainKernels()), given, strict=True)
    )
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    torch.testing.assert_close(*given, equal_nan=True)


@pytest.mark.parametrize("target", [-1, 21])
def test_a_target_that_is_no_column_is_an_error(target):
    with pytest.raises(AssertionError, match=r"targets must be in \[0, 21\)"):
        compiled_rows.cross_entropy_of_logits(draw(2, 21), torch.tensor([0, target]), None)


@pytest.mark.parametrize("rows, width, k", [(3, 1, 4), (5, 40, 7), (64, 3000, 256), (2, 70, 70)])
def test_the_best_keys_are_those_of_torch(rows, width, k):
    """Equal scores among them, 0 and -0, and keys that are not seen; also of rows that are a part of wider ones."""
    scores = torch.randn(rows, width + 3)
    scores[:, ::3] = (scores[:, ::3] * 4).round() / 4
    scores[:, 1::4] *= 0
    scores[: rows // 2, width // 2 :] = -torch.inf
    scores = scores[:, :width]
    assert torch.equal(KERNELS.best_keys(scores, k), PlainKernels().best_keys(scores, k))
