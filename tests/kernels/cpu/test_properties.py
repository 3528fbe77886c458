"""Every compiled function against torch's operations, on tensors with odd sizes and odd strides.

What is written is written into memory with marks around it, so that a value that strays is seen; around what is read
there is nothing a number.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import train.kernels.cpu.libraries as native
from conf.errors import UserError
from conf.schema import ROOT, Model, Optim
from train.kernels.cpu import compiled_matmuls, compiled_rows
from train.kernels.cpu.compiled_attention import CompiledAttention, _attention_kept, _most_kept
from train.kernels.cpu.compiled_rows import CompiledHeads
from train.kernels.cpu.cpp_function import Array, Kernel, Number, Parameter, Struct, Table, rows_of_table
from train.kernels.fp8 import compiled_engine
from train.kernels.fp8.compiled_casts import load_casts
from train.kernels.fp8.formats import E4M3, E5M2, E5M6, TILE, WHOLE_SIDE, Cast, unpack_e5m6
from train.kernels.fp8.groups import PaddedGroups
from train.kernels.fp8.quantize import QuantizedTensor, dequantize, quantize
from train.kernels.plain.heads import PlainHeads
from train.kernels.plain.plain_kernels import PlainKernels
from train.model.attention import AttentionInput
from train.model.rope import Rope
from train.model.sequence import Rectangle, SeenKeys
from train.optim.adamw import AdamW, UpdatePiece, _update, _update_compiled

SOURCES = sorted((ROOT / "train" / "kernels").glob("*/*.cpp"))
BF16, FP32 = torch.bfloat16, torch.float32
ROUNDING = 2**-8
"""Of a value: its rounding to bf16."""
SUM = 2**-19
"""Error of a sum in fp32 beside the sum of its absolute terms, which are some hundreds."""
Draw = Callable[[st.SearchStrategy], object]
counts = st.sampled_from([0, 1, 2, 3, 5, 17, 33, 70])
widths = st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 70])


# ---- every function has a property


def exported(path: Path) -> list[str]:
    """What the file hands to Python: functions after `extern "C" {`."""
    _, _, body = path.read_text().partition('extern "C" {')
    return re.findall(r"^\w[\w ]*[ *](\w+)\(", body, re.MULTILINE)


EXPORTED = [name for path in SOURCES for name in exported(path)]


def test_every_function_is_declared_once_and_has_a_property():
    assert sorted(EXPORTED) == sorted(kernel.name for kernel in Kernel.declared) == sorted(PROPERTIES)


@pytest.fixture(params=EXPORTED)
def name(request) -> str:
    """A function that can be built here: casts need a compiler, all others AVX2 too."""
    if request.param.endswith("_matrices"):
        try:
            load_casts()
        except UserError as error:
            pytest.skip(str(error))
    elif native.why_absent() is not None:
        pytest.skip(native.why_absent())
    return request.param


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_results_are_those_of_torchs_operations(name, data):
    torch.manual_seed(data.draw(st.integers(0, 2**16), "seed"))
    with marked() as called:
        PROPERTIES[name](data.draw)
    assert name in called


# ---- marks around what is written

MARK = 0x5A
MARGIN = 64
"""Bytes."""


@contextmanager
def marked() -> Iterator[set[str]]:
    """Inside, all that compiled code writes has marks around it. Yields the names of what was called."""
    called, real = set(), Kernel.__call__

    def call(kernel: Kernel, *given):
        called.add(kernel.name)
        given, checks = list(given), []
        for place, parameter in enumerate(taking(kernel._parameters)):
            if isinstance(parameter, Array) and parameter._out and given[place] is not None:
                given[place], check = with_marks(given[place])
                checks.append(check)
        result = real(kernel, *given)
        for check in checks:
            check()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "__call__", call)
        yield called


def taking(parameters: list[tuple[str, Parameter]]) -> Iterator[Parameter]:
    """Those that need an argument, in their order."""
    for _, parameter in parameters:
        if isinstance(parameter, Struct):
            yield from taking(parameter._parts)
        elif isinstance(parameter, Array | Number | Table):
            yield parameter


def with_marks(x: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """The same elsewhere, and what looks at the marks and copies the values back."""
    size = x.element_size()
    span = (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))) * size if x.numel() else 0
    room = torch.full((span + 2 * MARGIN,), MARK, dtype=torch.uint8)
    inside = room.view(x.dtype).as_strided(x.shape, x.stride(), MARGIN // size)
    inside.copy_(x)

    def check() -> None:
        x.copy_(inside)
        inside.view(torch.uint8 if size == 1 else {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).fill_(
            int.from_bytes([MARK] * size, "little")
        )
        assert (room == MARK).all(), "written outside of the tensor"

    return inside, check


# ---- tensors in memory


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape).to(dtype)


def apart(x: Tensor) -> Tensor:
    """Inside a larger tensor that is nothing a number."""
    filler = torch.nan if x.is_floating_point() else -1
    room = torch.full([size + 3 for size in x.shape], filler, dtype=x.dtype)
    return room[tuple(slice(1, 1 + size) for size in x.shape)].copy_(x)


def offset(x: Tensor) -> Tensor:
    """An odd number of values into its memory."""
    filler = torch.nan if x.is_floating_point() else -1
    return torch.full((x.numel() + 6,), filler, dtype=x.dtype)[3:-3].copy_(x.flatten()).view(x.shape)


WAYS = {
    "side by side": lambda x: x,
    "offset": offset,
    "apart": apart,
    "transposed": lambda x: apart(x.transpose(0, -1)).transpose(0, -1),
    "last two transposed": lambda x: apart(x.mT).mT if x.dim() > 1 else x,
    "every second": lambda x: torch.stack([x, torch.full_like(x, torch.nan if x.is_floating_point() else -1)], -1)[..., 0],
    "one row many times": lambda x: x[:1].expand_as(x) if x.shape[0] else x,
}  # fmt: skip


def placed(draw: Draw, x: Tensor) -> Tensor:
    return WAYS[draw(st.sampled_from(list(WAYS)))](x)


def close(ours: Tensor, exact: Tensor, size: Tensor | float = 0.0, factor: float = 1.0) -> None:
    """Off by the rounding of a result in bf16, and by factor * SUM of the sum of its absolute terms."""
    assert ours.shape == exact.shape
    rounding = ROUNDING * exact.abs() if ours.dtype == BF16 else 0
    assert ((ours.double() - exact).abs() <= rounding + factor * SUM * size + 1e-30).all()


# ---- norm, SwiGLU, order, heads


def norm_inputs(draw: Draw) -> tuple[Tensor, Tensor, float]:
    shape = draw(st.sampled_from([(), (2,), (2, 3)])), draw(counts), draw(widths)
    return (
        placed(draw, normal(*shape[0], *shape[1:])),
        placed(draw, normal(shape[2])),
        draw(st.sampled_from([1e-6, 1e-2])),
    )


def rms_norm_forward(draw: Draw) -> None:
    x, weight, eps = norm_inputs(draw)
    (y, rstd), (plain_x, plain_weight) = compiled_rows.rms_norm(x, weight, eps), (x.double(), weight.double())
    exact = (plain_x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    close(rstd, exact, exact)
    close(y, plain_x * exact * plain_weight, (plain_x * exact * plain_weight).abs())
    theirs = PlainKernels().rms_norm(x, weight, eps)
    assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in zip((y, rstd), theirs, strict=True))


def rms_norm_backward(draw: Draw) -> None:
    x, weight, eps = norm_inputs(draw)
    grad, needed = placed(draw, normal(*x.shape)), (draw(st.booleans()), draw(st.booleans()))
    _, rstd = compiled_rows.rms_norm(x, weight, eps)
    dx, dweight = compiled_rows.rms_norm_backward(grad, x, weight, rstd, *needed)
    assert (dx is not None, dweight is not None) == needed
    x, weight, grad, rstd = (t.double() for t in (x, weight, grad, rstd))
    if dx is not None:
        u = grad * weight
        slope = rstd.pow(3) * (u * x).mean(-1, keepdim=True)
        close(dx, u * rstd - x * slope, (u * rstd).abs() + x.abs() * rstd.pow(3) * (u * x).abs().mean(-1, keepdim=True))
    if dweight is not None:
        assert dweight.dtype == FP32
        terms = (grad * x * rstd).flatten(0, -2)
        close(dweight, terms.sum(0), terms.abs().sum(0))


def swiglu_inputs(draw: Draw) -> tuple[Tensor, Tensor | None]:
    rows, inner = draw(counts), draw(widths)
    gates = draw(st.sampled_from([None, FP32, BF16]))
    return placed(draw, 3 * normal(rows, 2 * inner)), gates and placed(draw, normal(rows, dtype=gates))


def gated(h: Tensor, gates: Tensor | None) -> Tensor:
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up * (1 if gates is None else gates[:, None])


def swiglu_forward(draw: Draw) -> None:
    h, gates = swiglu_inputs(draw)
    exact = gated(h.double(), gates if gates is None else gates.double())
    close(compiled_rows.swiglu(h, gates), exact, exact.abs())


def swiglu_backward(draw: Draw) -> None:
    h, gates = swiglu_inputs(draw)
    grad = placed(draw, normal(h.shape[0], h.shape[1] // 2))
    dh, dgates = compiled_rows.swiglu_backward(grad, h, gates)
    inputs = [t.double().requires_grad_() for t in (h, gates) if t is not None]
    exact = torch.autograd.grad(gated(*inputs, *[None] * (2 - len(inputs))), inputs, grad.double())
    close(dh, exact[0], exact[0].abs() + 1)  # silu's slope passes through zero
    assert (dgates is None) == (gates is None)
    if gates is not None:
        assert dgates.dtype == gates.dtype
        close(dgates, exact[1], (gated(h.double(), None) * grad.double()).abs().sum(-1))


def cross_entropy(draw: Draw) -> None:
    logits, scale = 4 * normal(draw(counts), draw(widths)), draw(st.sampled_from([None, 0.5, 1 / 300]))
    targets = torch.randint(logits.shape[1], logits.shape[:1])
    exact = logits.double().requires_grad_()
    sums, chosen = exact.logsumexp(-1), exact.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    slopes = torch.autograd.grad((sums - chosen).sum(), exact)[0].detach()
    ours = logits.clone()
    loss = compiled_rows.cross_entropy_of_logits(ours, targets, scale)
    assert loss.dtype == FP32 and loss.shape == ()
    close(loss, (sums - chosen).sum().detach(), (sums.abs() + chosen.abs() + logits.abs().amax(-1)).sum().detach())
    if scale is None:
        assert torch.equal(ours, logits)
    else:
        terms = torch.where(slopes < 0, slopes + 2, slopes)  # of a target: its share and one
        close(ours, slopes * scale, terms * scale)


def sort_by_expert(draw: Draw) -> None:
    tokens, experts = draw(counts), draw(st.sampled_from([1, 2, 3, 8, 64]))
    top_k = draw(st.integers(1, min(experts, 8)))
    chosen_TE = torch.rand(tokens, experts).argsort(-1)
    ids_TK = placed(draw, chosen_TE)[:, :top_k]  # as what takes the best of all leaves them
    pairs = zip(
        compiled_rows.sort_by_expert(ids_TK, experts), PlainKernels().sort_by_expert(ids_TK, experts), strict=True
    )
    assert all(torch.equal(ours, theirs) and ours.dtype == theirs.dtype for ours, theirs in pairs)


def best_keys(draw: Draw) -> None:
    rows, width = draw(counts), draw(widths)
    top_k = draw(st.integers(1, 2 * width))
    scores_TS = (torch.randn(rows, width + draw(st.integers(0, 3))) * 4).round() / 4  # some are equal
    scores_TS[: rows // 2, width // 2 :] = -torch.inf
    scores_TS = scores_TS[:, :width]
    assert torch.equal(compiled_rows.largest_keys(scores_TS, top_k), PlainKernels().best_keys(scores_TS, top_k))


def heads_inputs(draw: Draw) -> tuple[tuple[int, ...], Tensor, int]:
    batch, length, heads = draw(st.integers(1, 2)), draw(counts), draw(st.integers(1, 3))
    nope, rope, value = draw(widths), 2 * draw(widths), draw(widths)
    at_least = max(length, 1)
    return (
        (batch, length, heads, rope, value),
        Rope(Model(rope_head_dim=rope), at_least).table(length, torch.device("cpu")),
        nope,
    )


def heads_forward(draw: Draw) -> None:
    (B, T, H, R, V), rope_table, nope = heads_inputs(draw)
    given = [placed(draw, normal(*shape)) for shape in ((B, T, H, nope + R), (B, T, H, nope + V), (B, T, R))]
    for ours, theirs in zip(
        *(kind.apply(*given, rope_table, nope) for kind in (CompiledHeads, PlainHeads)), strict=True
    ):
        assert torch.equal(ours, theirs) and ours.is_contiguous()


def heads_backward(draw: Draw) -> None:
    (B, T, H, R, V), rope_table, nope = heads_inputs(draw)
    inputs = [normal(*shape).requires_grad_() for shape in ((B, T, H, nope + R), (B, T, H, nope + V), (B, T, R))]
    grads = [placed(draw, normal(B, H, T, width)) for width in (nope + R, nope + R, V)]
    results = []
    for kind in (CompiledHeads, PlainHeads):
        results.append(torch.autograd.grad(kind.apply(*inputs, rope_table, nope), inputs, grads))
    (*ours, shared), (*theirs, plain_shared) = results
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    off = (shared.double() - plain_shared.double()).abs()  # a sum over heads
    assert (off <= 2 * ROUNDING * plain_shared.double().abs() + 1e-5).all()


# ---- attention


def attention_inputs(draw: Draw) -> tuple[list[Tensor], list[tuple[int, int, int]]]:
    B, H, T = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 17, 33, 70, 131]))
    Q, V = draw(widths), draw(widths)
    drawn = [placed(draw, normal(B, H, T, width)) for width in (Q, Q, V, V)]
    if draw(st.booleans()):
        return drawn, [(b, 0, T) for b in range(B)]
    cut = draw(st.integers(0, T))
    return drawn, [(b, start, end) for b in range(B) for start, end in ((0, cut), (cut, T))]  # one may be empty


def attention_forward(draw: Draw) -> None:
    (q, k, v, dout), spans = attention_inputs(draw)
    B, _, T, Q = q.shape
    scale, core = Q**-0.5, CompiledAttention()
    given = AttentionInput(
        q, k, v, scale, SeenKeys([Rectangle(b, start, end, start, end, 0) for b, start, end in spans])
    )
    keep = draw(st.booleans())
    made = core.forward(given, keep)
    out, grads = made.out_BHTV, core.backward(dout, given, made)
    lone, lone_lse, largest, _ = core.forward(given, largest=True)  # keeps no probabilities
    assert torch.equal(lone, out) and torch.equal(lone_lse, made.lse_BHT)
    allowed, again = torch.zeros(B, 1, T, T, dtype=torch.bool), torch.zeros(B, 1, T, 1, dtype=torch.bool)
    for b, start, end in spans:
        allowed[b, :, start:end, start:end] = True
        again[b, :, start:end] = not keep or end - start > _most_kept(given)  # probabilities are computed again
    q, k, v, dout = (t.double() for t in (q, k, v, dout))
    scores = (q @ k.mT * scale).masked_fill(~allowed.tril(), -torch.inf)
    p, terms = scores.softmax(-1), scale * (q.abs() @ k.abs().mT)  # whose sums are in fp32, of up to 192 terms
    for ours, exact in ((made.lse_BHT, scores.logsumexp(-1)), (largest, scores.amax(-1))):
        assert ((ours.double() - exact).abs() <= 2**-16 * (1 + terms.amax(-1))).all()
    dp = dout @ v.mT
    ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
    means = (p * dp.abs()).sum(-1, keepdim=True)
    means += again * (dout * out.double()).abs().sum(-1, keepdim=True)  # there the sum is made of out, in bf16
    size = scale * p * (dp.abs() + means)
    bound = 4 * ROUNDING  # of every product and sum of absolute values: probabilities may be kept in bf16
    for ours, exact, most in (
        (out, p @ v, p @ v.abs()),
        (grads[0], ds @ k, size @ k.abs()),
        (grads[1], ds.mT @ q, size.mT @ q.abs()),
        (grads[2], p.mT @ dout, p.mT @ dout.abs()),
    ):
        assert ours.shape == exact.shape and ((ours.double() - exact).abs() <= bound * most + 1e-30).all()


def attention_kept(draw: Draw) -> None:
    """A row has whole panels of keys up to its diagonal, two vectors each."""
    panel = _attention_kept(rows_of_table([(0, 0, 1, 0)]), 1, 1)
    assert panel in (16, 32)
    lengths = draw(st.lists(st.sampled_from([0, 1, 16, 31, 33, 100]), max_size=5))
    heads, longest = draw(st.integers(1, 3)), draw(st.sampled_from([0, 31, 50, 100]))
    spans = rows_of_table((0, 0, length, 7) for length in lengths)
    places, sum_of_all = [], 0
    for length in lengths:
        places.append(sum_of_all if length <= longest else -1)
        if length <= longest:
            sum_of_all += heads * sum(panel * (row // panel + 1) for row in range(length))
    assert _attention_kept(spans, heads, longest) == sum_of_all
    assert list(spans[3::4]) == places


# ---- products


def products(draw: Draw) -> None:
    {"plain": plain_matmul, "experts": matmul_of_experts, "scaled": scaled_matmul}[
        draw(st.sampled_from(["plain", "experts", "scaled"]))
    ](draw)


def check_matmul(got: Tensor, left: Tensor, right: Tensor) -> None:
    left, right = left.double(), right.double()
    close(got, left @ right.mT, left.abs() @ right.mT.abs())


contractions = st.sampled_from([1, 2, 31, 127, 128, 129, 257, 300])


def plain_matmul(draw: Draw) -> None:
    contraction, dtype = draw(st.just(0) | contractions), draw(st.sampled_from([BF16, FP32]))
    left, right = (placed(draw, normal(draw(counts), contraction)) for _ in range(2))
    got = compiled_matmuls.matmul(left, right, dtype)
    assert got.dtype == dtype
    check_matmul(got, left, right)


def rows_of_experts(draw: Draw) -> list[int]:
    return draw(st.lists(st.sampled_from([0, 0, 1, 2, 13, 40]), min_size=1, max_size=5))


def matmul_of_experts(draw: Draw) -> None:
    rows, inputs, outputs = rows_of_experts(draw), draw(widths), draw(widths)
    x, dy = (placed(draw, normal(sum(rows), width)) for width in (inputs, outputs))
    weight = placed(draw, normal(len(rows), outputs, inputs))
    y, dx = compiled_matmuls.grouped(x, weight, rows), compiled_matmuls.grouped(dy, weight.mT, rows)
    dweight = compiled_matmuls.grouped_weight_gradient(dy.t(), x.t(), rows, torch.float32)
    assert dweight.dtype == FP32
    for expert, mine in enumerate(torch.arange(sum(rows)).split(rows)):
        check_matmul(y[mine], x[mine], weight[expert])
        check_matmul(dx[mine], dy[mine], weight[expert].t())
        check_matmul(dweight[expert], dy[mine].t(), x[mine].t())


BLOCKS = [(1, TILE), (TILE, TILE), (1, WHOLE_SIDE), (WHOLE_SIDE, WHOLE_SIDE)]


def scaled(draw: Draw, x: Tensor) -> tuple[Tensor | QuantizedTensor, Tensor]:
    """An operand and its values."""
    if draw(st.booleans()):
        return x, x
    operand = load_casts().split(x, Cast(draw(st.sampled_from([E4M3, E5M2])), draw(st.sampled_from(BLOCKS)), False))
    values = operand.q.double() * spread(operand)
    return QuantizedTensor(
        placed_apart(draw, operand.q), placed_apart(draw, operand.scale), operand.cast, operand.shape
    ), values


def placed_apart(draw: Draw, x: Tensor) -> Tensor:
    """Of the same values."""
    return WAYS[draw(st.sampled_from([way for way in WAYS if way != "one row many times"]))](x)


def spread(x: QuantizedTensor) -> Tensor:
    """The scale of every value."""
    rows, columns = x.cast.block
    wide = x.scale.double().repeat_interleave(rows, -2)[..., : x.shape[-2], :] if x.scale.numel() else x.q.double()
    return wide.repeat_interleave(columns, -1)[..., : x.shape[-1]] if x.scale.numel() else wide


def scaled_matmul(draw: Draw) -> None:
    contraction, dtype = draw(contractions), draw(st.sampled_from([BF16, FP32]))
    if draw(st.booleans()):
        (left, left_values), (right, right_values) = (
            scaled(draw, placed(draw, normal(1 + draw(counts), contraction))) for _ in range(2)
        )
        got = compiled_engine.scaled_matmul(left, right, dtype)
        return check_matmul(got, left_values, right_values)
    groups = PaddedGroups(torch.tensor(rows_of_experts(draw)))
    left, left_values = scaled(draw, normal(groups.rows, contraction))
    right, right_values = scaled(draw, normal(len(groups.counts), draw(widths), contraction))
    got = compiled_engine.scaled_grouped(left, right, groups, dtype)
    for expert, real in enumerate(groups.real()):
        check_matmul(got[real], left_values[real], right_values[expert])
    return None


def bf16_rate(draw: Draw) -> None:
    assert 0 <= native._bf16_rate() < 20


# ---- optimizer


flat = st.sampled_from([0, 1, 7, 8, 15, 16, 17, 4095, 4096, 4097, 9000])


def adamw(draw: Draw) -> None:
    size, count = draw(flat), draw(st.sampled_from([1, 2, 1000]))
    lr, decay, factor = (draw(st.sampled_from(some)) for some in ([1e-2, 0.0], [0.1, 0.0], [None, 0.3]))
    held = normal(size, dtype=FP32), normal(size, dtype=FP32), normal(size) / 10, normal(size).square() / 10
    group = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay}
    ours, plain = (UpdatePiece(*(offset(t) for t in held)) for _ in range(2))
    with torch.no_grad():
        _update_compiled(ours, group, count, factor)
        _update(plain, group, count, factor)
    torch.testing.assert_close(ours.weight, plain.weight, rtol=1e-6, atol=1e-7)
    for one, other in ((ours.exp_avg, plain.exp_avg), (ours.exp_avg_sq, plain.exp_avg_sq)):
        assert torch.equal(one, other)
    assert torch.equal(ours.grad, held[1])


def sum_of_squares(draw: Draw) -> None:
    x = offset(normal(draw(flat), dtype=FP32))
    exact = x.double().square().sum()
    optimizer = AdamW([torch.nn.Parameter(x)], Optim(), torch.bfloat16, compiled=True)
    torch.testing.assert_close(optimizer._sum_of_squares(x), exact, rtol=1e-6, atol=0)


# ---- casts


def cast_inputs(draw: Draw) -> tuple[Tensor, Cast]:
    shape = (
        *draw(st.sampled_from([(), (1,), (3,)])),
        draw(counts),
        draw(st.sampled_from([1, 2, 7, 127, 128, 129, 300])),
    )
    block = draw(st.sampled_from([*BLOCKS, (TILE, 1)]))
    x = torch.randn(shape) * torch.exp(3 * torch.randn(shape))
    cast = Cast(
        draw(st.sampled_from([E4M3, E5M2, E5M6])), block, draw(st.booleans()), draw(st.sampled_from([1e-4, 1e-12]))
    )
    return placed(draw, x.to(draw(st.sampled_from([BF16, FP32])))), cast


def same_codes(ours: QuantizedTensor, theirs: QuantizedTensor) -> bool:
    codes = [unpack_e5m6(x.q, x.shape[-1]) if x.cast.format.dtype is None else x.q.float() for x in (ours, theirs)]
    return torch.equal(*codes) and torch.equal(ours.scale, theirs.scale) and ours.q.shape == theirs.q.shape


def cast_matrices(draw: Draw) -> None:
    x, cast = cast_inputs(draw)
    reference = quantize(x, cast)
    assert same_codes(load_casts().quantize(x, cast), reference)
    split = load_casts().split(x, cast)
    assert torch.equal(split.scale, reference.scale)
    dtype = draw(st.sampled_from([BF16, FP32]))
    assert torch.equal(load_casts().fake_quantize(x, cast, dtype), dequantize(reference).to(dtype))
    codes = QuantizedTensor(
        placed_apart(draw, reference.q), placed_apart(draw, reference.scale), reference.cast, reference.shape
    )
    other = Cast(draw(st.sampled_from([E4M3, E5M6])), (TILE, 1), False)
    again = quantize(dequantize(reference), other)
    assert torch.equal(load_casts().fake_quantize(codes, other, dtype), dequantize(again).to(dtype))


def decode_matrices(draw: Draw) -> None:
    x, cast = cast_inputs(draw)
    reference = quantize(x, cast)
    codes = QuantizedTensor(
        placed_apart(draw, reference.q), placed_apart(draw, reference.scale), reference.cast, reference.shape
    )
    values, dtype = dequantize(reference), draw(st.sampled_from([BF16, FP32]))
    assert torch.equal(load_casts().dequantize(codes, dtype), values.to(dtype))
    assert torch.equal(load_casts().dequantize(load_casts().decoded(codes), dtype), values.to(dtype))


PROPERTIES = {
    one.__name__: one
    for one in (
        rms_norm_forward, rms_norm_backward, swiglu_forward, swiglu_backward, cross_entropy, sort_by_expert, best_keys,
        heads_forward, heads_backward, attention_kept, attention_forward, products, bf16_rate, adamw, sum_of_squares, cast_matrices, decode_matrices,
    )
} | {"attention_backward": attention_forward}  # fmt: skip
"""By the C++ function that each is about."""
