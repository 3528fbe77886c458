"""Every operation of a step for which the GPU has custom code, against the CPU.

Quantisers must agree in every bit. GEMMs of quantised operands are compared with the same operands multiplied in fp32.
Everything else is compared as described in bench/gpu/compare.py. Without a GPU, our Triton kernels run in Triton's
interpreter if it is installed; FP8 GEMMs are not tried.
"""

import importlib.util
import itertools
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor

from bench.gpu.compare import distances, judge, relative, seeded, three_sides, with_gradients
from bench.gpu.line import Check, Finding, NotTried
from bench.gpu.machine import DeviceSide, Machine
from conf.errors import UserError
from conf.load import compose
from conf.thresholds import lowered
from parallel.expert.permute import ExpertTargets, FanOut, collect, fan_out_with_entries, hits
from parallel.expert.wire import Fp8Wire
from train.kernels.choice import build_kernels
from train.kernels.fp8 import swiglu as plain_swiglu
from train.kernels.fp8.cast_rules import OperandRule
from train.kernels.fp8.cpu_engine import CpuEngine
from train.kernels.fp8.formats import E4M3, E5M2, E5M6, MX_TILE, TILE, Cast
from train.kernels.fp8.fp8 import Fp8Precision, load_gpu_engine
from train.kernels.fp8.groups import PaddedGroups
from train.kernels.fp8.hopper import HopperEngine
from train.kernels.fp8.quantize import dequantize, quantize
from train.kernels.plain.high import HighPrecision
from train.kernels.plain.plain_kernels import PlainKernels
from train.model.attention import AttentionInput
from train.model.layers import RMSNorm, swiglu
from train.model.loss import cross_entropy
from train.model.moe import LocalDispatcher
from train.model.rope import Rope
from train.model.router import Router
from train.model.sequence import Positions
from train.optim.adamw import AdamW

TILES, BLOCKS = OperandRule(E4M3, "1x128", False, 1e-4), OperandRule(E4M3, "128x128", False, 1e-4)
MATMUL = 5e-3
MATMUL_BOUND = (
    f"relative distance {MATMUL:g} from the same operands multiplied in fp32: rounding to bf16 makes 2e-3, and Hopper's tensor "
    "cores drop bits inside 128 products, about 1e-3; a scale in the wrong place makes 1e-1"
)
BITS_BOUND = "every value and every scale is that of the CPU, bit for bit: all divisions and roundings are IEEE"
SWIGLU_BOUND = (
    "exp may differ in its last bit, which flips one rounding in a thousand: 1e-3 of the norm in bf16, 3e-3 in FP8"
)
RAGGED = [300, 0, 1, 399]
"""Rows of experts: an idle one, a single row, and none whole tiles."""


def checks(machine: Machine) -> list[Check]:
    of_triton = {
        "quantize_tiles": tiles, "quantize_columns": columns, "quantize_columns by expert": columns_by_expert,
        "quantize_both": both, "quantize_blocks": blocks, "swiglu_tiles": swiglu_tiles, "swiglu_backward": swiglu_backward,
        "quantize_e5m6 and decode_e5m6": e5m6, "quantize_mx": tiles_of_32, "place_hits, collect and encode of dispatchers": dispatched,
    }  # fmt: skip
    of_fp8 = {
        "FP8 product, 1x128 by 128x128": partial(dense, transposed=False),
        "FP8 product, 1x128 by 1x128 (weight gradients)": partial(dense, transposed=True),
    }
    for backend, library in BACKENDS.items():
        of_fp8 |= {
            f"FP8 product added to a gradient ({library})": partial(
                dense, transposed=True, backend=backend, added=True
            ),
            f"FP8 product with each row's expert ({library})": partial(grouped, backend=backend),
            f"FP8 product over each expert's rows ({library})": partial(grouped_wgrad, backend=backend),
            f"FP8 product over each expert's rows, added ({library})": partial(
                grouped_wgrad, backend=backend, added=True
            ),
        }
    of_step = {
        "attention, heads of 192 and 128": attend,
        "attention inside documents": partial(attend, documents=True),
        "bf16 linear layer": linear,
        "bf16 experts": experts,
        "SwiGLU": eager_swiglu,
        "RMSNorm": norm,
        "heads and RoPE": heads,
        "tokens to experts and back": permutation,
        "head and cross-entropy": loss,
    }
    found = [Check(f"Triton kernel {name}", partial(work, machine)) for name, work in of_triton.items()]
    found += [Check(name, partial(work, machine), limit=90) for name, work in of_fp8.items()]
    found += [Check(name, partial(three_sides, machine, work)) for name, work in of_step.items()]
    found += [Check("router", partial(router, machine)), Check("AdamW, three updates", partial(adamw, machine))]
    found += [
        Check(f"FP8 layers, {name}", partial(layers, machine, given), limit=90) for name, given in RECIPES.items()
    ]
    return found


BACKENDS = {"triton": "Triton", "deepgemm": "DeepGEMM"}
"""Values of precision.fp8.backend, and what they are called."""
RECIPES = {
    "precision=fp8": ("precision=fp8",),
    "precision=fp8, DeepGEMM": ("precision=fp8", "precision.fp8.backend=deepgemm"),
    "precision=fp8_ue8m0": ("precision=fp8_ue8m0",),
    "precision=mxfp8": ("precision=mxfp8",),
}


# Our Triton kernels


@cache
def triton_kernels(machine: Machine) -> ModuleType:
    """Compiled for the GPU, or interpreted (see `Machine.here`). Raises NotTried where triton is missing."""
    if importlib.util.find_spec("triton") is None:
        raise NotTried("triton is not installed (the CUDA builds of torch bring it)")
    if not machine.on_gpu:
        from bench.gpu.interpreter import repair

        repair()
    from train.kernels.fp8 import triton_quantize as triton_kernels

    return triton_kernels


def wide(machine: Machine, columns: int = 896) -> list[Tensor]:
    """Values over many orders of magnitude, with a row of zeros, in bf16 as recipes have them; where interpreted smaller, and in fp32 too."""
    rows, columns = (512, columns) if machine.on_gpu else (256, 128)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator) * torch.exp(3 * torch.randn(rows, columns, generator=generator))
    x[3] = 0
    return [x.bfloat16()] if machine.on_gpu else [x, x.bfloat16()]


def casts(machine: Machine, block: tuple[int, int]) -> list[Cast]:
    """Each kind of scale and each floor once, as compiling one takes a second; where interpreted, each format too."""
    return [Cast(E4M3, block, False, 1e-4), Cast(E4M3 if machine.on_gpu else E5M2, block, True, 1e-12)]


def said(cast: Cast) -> str:
    """The cast in few words."""
    block = "x".join(map(str, cast.block))
    return f"{cast.format.name} in {block}{', powers of two' if cast.pow2 else ''}, least {cast.floor:g}"


def bits(pairs: list[tuple[str, Tensor, Tensor]]) -> Finding:
    """Whether all pairs are equal; FP8 is compared by value, as its zero may have a sign."""
    wrong = []
    for name, ours, expected in pairs:
        differ = (ours.float().cpu() != expected.float()).sum().item()
        if ours.shape != expected.shape or differ:
            wrong.append(f"{name}: {differ} of {expected.numel()} differ")
    return Finding({"tensors": len(pairs)}, BITS_BOUND, "; ".join(wrong[:3]) or None)


def tiles(machine: Machine) -> Finding:
    kernels, pairs = triton_kernels(machine), []
    for x, cast in itertools.product(wide(machine), casts(machine, (1, TILE))):
        expected = quantize(x, cast)
        q, scale = kernels.quantize_tiles(x.to(machine.device), cast)
        pairs += [
            (f"{said(cast)} of {x.dtype}", q, expected.q),
            (f"scales, {said(cast)} of {x.dtype}", scale, expected.scale),
        ]
    return bits(pairs)


def tiles_of_32(machine: Machine) -> Finding:
    """As it is and transposed; scales are bytes, which lie as the tensor cores read them."""
    kernels, pairs, cast = triton_kernels(machine), [], Cast(E4M3, (1, MX_TILE), True, 1e-4)
    for x, turned in itertools.product(wide(machine), (False, True)):
        on_device, values = x.to(machine.device), x.mT if turned else x
        q, scale = kernels.quantize_mx(on_device.mT if turned else on_device, cast)
        expected, (rows, columns) = quantize(values, cast), values.shape
        blocks = scale.view(torch.uint8).cpu().view(rows // 128, columns // 128, 32, 4, 4)
        exponents = blocks.permute(0, 3, 2, 1, 4).reshape(rows, columns // MX_TILE)
        what = f"{x.dtype}{', transposed' if turned else ''}"
        pairs += [(what, q, expected.q), (f"scales, {what}", exponents, expected.scale.log2() + 127)]
    return bits(pairs)


def columns(machine: Machine) -> Finding:
    kernels, pairs = triton_kernels(machine), []
    kept = Cast(E4M3, (1, TILE), False, 1e-4)
    for x, cast in itertools.product(wide(machine), casts(machine, (TILE, 1))):
        held, on_device = quantize(x, kept), x.to(machine.device)
        q_8, scale_8 = kernels.quantize_tiles(on_device, kept)
        for what, given, values in (
            (x.dtype, (on_device, cast), x),
            ("FP8", (q_8, cast, scale_8), dequantize(held)),
        ):
            q, scale = kernels.quantize_columns(*given)
            expected = quantize(values, cast)
            pairs += [
                (f"{said(cast)} of {what}", q.mT, expected.q),
                (f"scales, {said(cast)} of {what}", scale.mT, expected.scale),
            ]
    return bits(pairs)


def columns_by_expert(machine: Machine) -> Finding:
    """q lies flat, one transposed matrix per expert after the other."""
    kernels, pairs = triton_kernels(machine), []
    for x, cast in itertools.product(wide(machine), casts(machine, (TILE, 1))):
        rows = [len(x) - 128, 0, 128]
        q, scale = kernels.quantize_columns(x.to(machine.device), cast, None, rows)
        expected = quantize(x, cast)
        flat = torch.cat([part.mT.flatten() for part in expected.q.float().split(rows)])
        pairs += [
            (f"{said(cast)} of {x.dtype}", q, flat),
            (f"scales, {said(cast)} of {x.dtype}", scale.mT, expected.scale),
        ]
    return bits(pairs)


def both(machine: Machine) -> Finding:
    """Of rows as they are, and of experts' rows, each expert's columns in whole tiles."""
    kernels, pairs = triton_kernels(machine), []
    for x, cast in itertools.product(wide(machine), casts(machine, (1, TILE))):
        counts, turned = torch.tensor([len(x) - 130, 0, 130]), replace(cast, block=(TILE, 1))
        ends, padded = counts.cumsum(0, dtype=torch.int32).to(machine.device), PaddedGroups(counts).pad(x)
        for name, given, columns_of in (("", (), x), (" by expert", (ends,), padded)):
            ours = kernels.quantize_both(x.to(machine.device), cast, turned, *given)
            rows, columns = quantize(x, cast), quantize(columns_of, turned)
            name = f"{said(cast)} of {x.dtype}{name}"
            pairs += [(f"rows, {name}", ours[0][0], rows.q), (f"scales of rows, {name}", ours[0][1], rows.scale)]
            real = len(columns_of)
            pairs += [
                (f"columns, {name}", ours[1][0][:, :real].mT, columns.q),
                (f"scales of columns, {name}", ours[1][1][:, : real // TILE].mT, columns.scale),
            ]
    return bits(pairs)


def blocks(machine: Machine) -> Finding:
    kernels, pairs = triton_kernels(machine), []
    for x, cast in itertools.product(wide(machine), casts(machine, (TILE, TILE))):
        stack = torch.stack([x, 3 * x])
        expected = quantize(stack, cast)
        for transposed in (False, True):
            q, scale = kernels.quantize_blocks(stack.to(machine.device), cast, transposed)
            q, scale = (q.mT, scale.mT) if transposed else (q, scale)
            name = f"{said(cast)} of {x.dtype}{', transposed' if transposed else ''}"
            pairs += [(name, q, expected.q), (f"scales, {name}", scale, expected.scale)]
    return bits(pairs)


def swiglu_inputs(machine: Machine) -> tuple[Tensor, Tensor, Tensor]:
    """h (P, 2F), gates (P,), gradient of the output (P, F), on the CPU."""
    rows, width = (1024, 2048) if machine.on_gpu else (128, 256)
    draw = seeded(3, torch.device("cpu"), torch.bfloat16)
    h, da = draw(rows, 2 * width, grad=False), draw(rows, width, grad=False)
    return h, torch.rand(rows, generator=torch.Generator().manual_seed(4)), da


def swiglu_tiles(machine: Machine) -> Finding:
    kernels, (h, gates, _), pairs = triton_kernels(machine), swiglu_inputs(machine), {}
    for pow2 in (False, True):
        cast = Cast(E4M3, (1, TILE), pow2, 1e-4)
        made, _ = kernels.swiglu_tiles(h.to(machine.device), gates.to(machine.device), cast, cast)
        q, scale = (t.cpu() for t in made)
        expected = quantize(plain_swiglu.forward(h, gates), cast)
        ours = q.float() * scale.repeat_interleave(TILE, 1)
        pairs[said(cast)] = relative(ours, dequantize(expected)), 3e-3
    return within(pairs, SWIGLU_BOUND)


def swiglu_backward(machine: Machine) -> Finding:
    kernels, (h, gates, da), pairs = triton_kernels(machine), swiglu_inputs(machine), {}
    on_device = [t.to(machine.device) for t in (h, gates, da)]
    kept = Cast(E4M3, (1, TILE), False, 1e-4)
    q, scale = kernels.quantize_tiles(on_device[0], kept)
    ours = kernels.swiglu_backward(q, *on_device[1:], scale)
    plain = plain_swiglu.backward(dequantize(quantize(h, kept)), gates, da)
    for what, one, expected in zip(("a", "dh", "dgates"), ours, plain, strict=True):
        pairs[what] = relative(one, expected), 1e-3
    return within(pairs, SWIGLU_BOUND)


def within(pairs: dict[str, tuple[float, float]], bound: str) -> Finding:
    """Relative distances by name, each with its own bound."""
    wrong = [f"{name}: {distance:.1e}" for name, (distance, most) in pairs.items() if not distance <= most]
    table = [["tensor", "distance", "allowed"], *([name, *pair] for name, pair in pairs.items())]
    return Finding({}, bound, "; ".join(wrong) or None, table)


def e5m6(machine: Machine) -> Finding:
    """Attention outputs wait for backward in 12 bits."""
    kernels, pairs, cast = triton_kernels(machine), [], Cast(E5M6, (1, TILE), True)
    for x in wide(machine):
        q, scale = kernels.quantize_e5m6(x.to(machine.device), cast)
        expected = quantize(x, cast)
        pairs += [(f"of {x.dtype}", q, expected.q), (f"scales of {x.dtype}", scale, expected.scale)]
        values = kernels.decode_e5m6(q, scale, len(x))
        pairs.append((f"values of {x.dtype}", values, dequantize(expected)))
    return bits(pairs)


def dispatched(machine: Machine) -> Finding:
    """Which copies are made of which tokens, their sums, and the bytes of the FP8 wire."""
    triton_kernels(machine)  # NotTried without triton
    from parallel.expert import triton_dispatch

    tokens = 700 if machine.on_gpu else 140
    ids = torch.rand(tokens, 64, generator=torch.Generator().manual_seed(4)).topk(8).indices
    wanted = ExpertTargets(16, 1, 16)
    copies = int(hits(ids, wanted).sum())
    *fan, entries = triton_dispatch.place_hits(ids.to(machine.device), *wanted, copies)
    expected, expected_entries = fan_out_with_entries(ids, wanted, copies)
    pairs = [*zip(FanOut._fields, fan, expected, strict=True), ("entries", entries, expected_entries)]
    in_order = triton_dispatch.place_entries(ids.to(machine.device), 64), PlainKernels().sort_by_expert(ids, 64)
    pairs += zip(("order", "way back", "tokens", "counts"), *in_order, strict=True)
    for x in wide(machine):
        wire, rows = Fp8Wire(), x[:8].to(machine.device)
        coded = torch.empty(8, wire.row_bytes(x.shape[1], x.dtype), dtype=torch.uint8, device=machine.device)
        triton_dispatch.encode_rows(rows, coded, wire.activation_floor)
        pairs.append((f"wire of {x.dtype}", coded, wire.encode(x[:8])))
        sources = torch.arange(copies) % len(x)
        out = torch.empty(tokens, x.shape[1], dtype=x.dtype, device=machine.device)
        triton_dispatch.collect(x[sources].to(machine.device), fan[1], fan[2], out)
        summed = collect(x[sources].float(), expected).to(x.dtype)
        pairs.append((f"sums of {x.dtype}", out, summed))
    return bits(pairs)


# Products in FP8


@cache
def hopper(machine: Machine, backend: str = "triton") -> HopperEngine:
    """The engine of a training step. Raises NotTried with what it lacks."""
    machine.need_gpu("the FP8 product")
    try:
        return load_gpu_engine(compose("precision=fp8", f"precision.fp8.backend={backend}").precision.fp8)
    except UserError as error:
        raise NotTried(lacks(error)) from error


def lacks(error: UserError) -> str:
    """Why FP8 is not tried; whether that is a fault of the machine is said once, among the environment."""
    return f"precision=fp8 cannot run here: {error.rule}; {error.cure}"


def dense(machine: Machine, transposed: bool, backend: str = "triton", added: bool = False) -> Finding:
    engine, cpu, pairs = hopper(machine, backend), CpuEngine(), {}
    right = TILES if transposed else BLOCKS
    for M, N, K in ((256, 384, 640), (1000, 576, 7168), (512, 2112, 1536)):
        draw = seeded(1, torch.device("cpu"), torch.bfloat16)
        x, w = (draw(K, size, grad=False) if transposed else draw(size, K, grad=False) for size in (M, N))
        operands = [
            [side.operand(t.to(device), rule, transposed=transposed) for t, rule in ((x, TILES), (w, right))]
            for side, device in ((engine, machine.device), (cpu, torch.device("cpu")))
        ]
        expected = cpu.matmul(*operands[1], torch.float32)
        into = expected.to(machine.device) if added else None  # what is added to is as large
        for dtype in (
            (torch.float32,) if added else (torch.bfloat16, torch.float32) if transposed else (torch.bfloat16,)
        ):
            ours = engine.matmul(*operands[0], dtype, into)
            pairs[f"{M} x {N} x {K}, {dtype}"] = relative(ours, 2 * expected if added else expected), MATMUL
    return within(pairs, MATMUL_BOUND)


def grouped(machine: Machine, backend: str) -> Finding:
    engine, cpu, pairs = hopper(machine, backend), CpuEngine(), {}
    for N, K in ((1024, 1792), (1792, 512)):
        draw = seeded(5, torch.device("cpu"), torch.bfloat16)
        rows, weight = draw(sum(RAGGED), K, grad=False), draw(len(RAGGED), N, K, grad=False)

        def matmul(side, device, dtype, rows=rows, weight=weight):
            groups = side.groups(torch.tensor(RAGGED).to(device), len(rows))
            left = side.operand(groups.pad(rows.to(device)), TILES)
            return groups.unpad(side.grouped(left, side.operand(weight.to(device), BLOCKS), groups, dtype))

        expected = matmul(cpu, torch.device("cpu"), torch.float32)
        for tiles, sizes in {"": nullcontext(), ", large tiles": lowered()}.items():
            with sizes:
                pairs[f"{N} x {K}{tiles}"] = (
                    relative(matmul(engine, machine.device, torch.bfloat16), expected),
                    MATMUL,
                )
    return within(pairs, MATMUL_BOUND)


def grouped_wgrad(machine: Machine, backend: str, added: bool = False) -> Finding:
    engine, cpu, pairs = hopper(machine, backend), CpuEngine(), {}
    for O, N in ((1024, 1792), (1792, 512)):
        draw = seeded(6, torch.device("cpu"), torch.bfloat16)
        grads, rows = draw(sum(RAGGED), O, grad=False), draw(sum(RAGGED), N, grad=False)

        def matmul(side, device, into=None, grads=grads, rows=rows):
            groups = side.groups(torch.tensor(RAGGED).to(device), len(rows))
            left, right = (
                side.operand(groups.pad(t.to(device)), TILES, transposed=True, groups=groups) for t in (grads, rows)
            )
            return side.grouped_wgrad(left, right, groups, torch.float32, into)

        expected = matmul(cpu, torch.device("cpu"))
        ours = matmul(engine, machine.device, expected.to(machine.device) if added else None)
        expected *= 2 if added else 1
        pairs[f"{O} x {N}"] = relative(ours, expected), MATMUL
        pairs[f"{O} x {N}, the idle expert"] = ours[RAGGED.index(0)].abs().max().item(), 0.0
    return within(pairs, MATMUL_BOUND + "; an expert without rows has a gradient of zero")


def layers(machine: Machine, overrides: tuple[str, ...]) -> Finding:
    """A linear layer, the output projection and ragged experts, forward and backward, beside emulation and fp32.

    Without a GPU torch's emulation is held to the compiled one.
    """
    cpu, plain = torch.device("cpu"), () if machine.on_gpu else ("precision.fp8.compiled=false",)
    fp8, here = (compose(*overrides, *more).precision.fp8 for more in ((), plain))
    try:
        precision = Fp8Precision(here, *machine.side(reference=False))
    except UserError as error:
        raise NotTried(f"{overrides[0]} cannot run here: {error.rule}; {error.cure}") from error
    kernels = build_kernels("cpu")
    exact = run_layers(HighPrecision(torch.float32, kernels), cpu, torch.float32)
    same = run_layers(Fp8Precision(fp8, cpu, kernels), cpu, torch.bfloat16)
    return judge(distances(run_layers(precision, machine.device, torch.bfloat16), same, exact))


def run_layers(precision, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    draw = seeded(2, device, dtype)
    x, w, rows = draw(300, 1536), draw(576, 1536, scale=0.025), draw(sum(RAGGED), 512)
    w13, w2 = draw(4, 512, 512, scale=0.044), draw(4, 512, 256, scale=0.0625)
    gates = torch.rand(sum(RAGGED), generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()
    found = {}
    for kind in ("dense", "output"):
        made = with_gradients({"y": precision.linear(x, w, kind)}, {"x": x, "w": w}, draw)
        found |= {f"{kind} {name}": value for name, value in made.items()}
    y = precision.expert_ffn(rows, gates, w13, w2, torch.tensor(RAGGED, device=device))
    made = with_gradients({"y": y}, {"rows": rows, "gates": gates, "w13": w13, "w2": w2}, draw)
    return found | {f"experts {name}": value for name, value in made.items()}


# What a step does beside, by torch's operations or its libraries


def attend(side: DeviceSide, dtype: torch.dtype, documents: bool = False) -> dict[str, Tensor]:
    draw, T = seeded(7, side.device, dtype), 512
    q, k, v = (draw(2, 4, T, width) for width in (192, 192, 128))
    documents_BT = torch.zeros(2, T, dtype=torch.int64)
    documents_BT[0, 200:], documents_BT[1, 33:] = 1, 1
    documents_BT[1, 300:] = 2
    seen = Positions(T, documents_BT if documents else None).seen[0]
    out = side.kernels.attention(AttentionInput(q, k, v, 192**-0.5, seen))
    return with_gradients({"out": out}, {"q": q, "k": k, "v": v}, draw)


def linear(side: DeviceSide, dtype: torch.dtype) -> dict[str, Tensor]:
    draw = seeded(8, side.device, dtype)
    x, w = draw(384, 1024), draw(640, 1024, scale=0.03)
    return with_gradients({"y": HighPrecision(dtype, side.kernels).linear(x, w)}, {"x": x, "w": w}, draw)


def experts(side: DeviceSide, dtype: torch.dtype) -> dict[str, Tensor]:
    draw = seeded(9, side.device, dtype)
    rows, w13, w2 = draw(sum(RAGGED), 256), draw(4, 512, 256, scale=0.06), draw(4, 256, 256, scale=0.06)
    gates = torch.rand(sum(RAGGED), generator=torch.Generator().manual_seed(3)).to(side.device).requires_grad_()
    y = HighPrecision(dtype, side.kernels).expert_ffn(rows, gates, w13, w2, torch.tensor(RAGGED, device=side.device))
    return with_gradients({"y": y}, {"rows": rows, "gates": gates, "w13": w13, "w2": w2}, draw)


def eager_swiglu(side: DeviceSide, dtype: torch.dtype) -> dict[str, Tensor]:
    draw = seeded(10, side.device, dtype)
    h = draw(300, 1024)
    gates = torch.rand(300, generator=torch.Generator().manual_seed(3)).to(side.device).requires_grad_()
    return with_gradients({"a": swiglu(h, gates, side.kernels)}, {"h": h, "gates": gates}, draw)


def norm(side: DeviceSide, dtype: torch.dtype) -> dict[str, Tensor]:
    draw = seeded(11, side.device, dtype)
    module = RMSNorm(768, 1e-6, False, side.kernels, device=side.device, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(1 + draw(768, scale=0.1, grad=False))
    x = draw(300, 768)
    return with_gradients({"y": module(x)}, {"x": x, "weight": module.weight}, draw)


def heads(side: DeviceSide, dtype: torch.dtype) -> dict[str, Tensor]:
    draw, model = seeded(12, side.device, dtype), compose("conf=deepseek_v3", "data.path=none").model
    q, kv, k_rope = draw(2, 256, 4, 192), draw(2, 256, 4, 256), draw(2, 256, 64)
    table = Rope(model, 256).table(256, side.device)
    outputs = dict(zip(("q", "k", "v"), side.kernels.to_heads(q, kv, k_rope, table, 128), strict=True))
    return with_gradients(outputs, {"q": q, "kv": kv, "rope key": k_rope}, draw)


def permutation(side: DeviceSide, dtype: torch.dtype) -> dict[str, Tensor]:
    draw = seeded(13, side.device, dtype)
    x, gates = draw(300, 256), draw(300, 6).float()
    ids = torch.rand(300, 32, generator=torch.Generator().manual_seed(3)).topk(6).indices.to(side.device)
    dispatcher = LocalDispatcher(32, side.kernels)
    routed = dispatcher.dispatch(x, ids, gates)
    y = dispatcher.combine(routed.rows_RD * 2, routed)
    return with_gradients({"y": y, "gates by row": routed.gates_R}, {"x": x}, draw)


def loss(side: DeviceSide, dtype: torch.dtype) -> dict[str, Tensor]:
    draw = seeded(14, side.device, dtype)
    hidden, head = draw(300, 256), draw(2048, 256, scale=0.06)
    targets = torch.randint(2048, (300,), generator=torch.Generator().manual_seed(3)).to(side.device)
    value = cross_entropy(hidden, head, targets, 300, 128, side.kernels)
    return {"loss": value} | with_gradients({"scaled": value * 1.0}, {"hidden": hidden, "head": head}, draw)


def router(machine: Machine) -> Finding:
    """On equal inputs: gates by value, experts by number. Scores are fp32 sums, so a near tie may fall the other way."""
    model = compose("conf=deepseek_v3", "data.path=none").model
    model = replace(model, hidden=512)
    sides = []
    for reference in (True, False):
        device, kernels = machine.side(reference)
        draw = seeded(15, device, torch.bfloat16)
        module = Router(model, kernels, device=device, dtype=torch.bfloat16)
        with torch.no_grad():
            module.weight.copy_(draw(model.experts, 512, scale=0.02, grad=False))
        module.balance_weight = 1e-2
        x = draw(2, 256, 512)
        gates, ids = module(x, nullcontext())
        grads = torch.autograd.grad(gates, (x, module.weight), draw(*gates.shape, grad=False).float())
        sides.append([t.cpu() for t in (gates, ids, module.load_E, module.balance_loss, *grads)])
    (gates, ids, load, balance, dx, dw), (gates2, ids2, load2, balance2, dx2, dw2) = sides
    moved = (ids != ids2).any(1).float().mean().item()
    pairs = {
        "tokens with another expert": (moved, 0.01), "gates": (relative(gates2, gates), 1e-3 + 0.5 * moved),
        "load": (relative(load2, load), 1e-3 + moved), "balance loss": (relative(balance2, balance), 1e-3),
        "d x": (relative(dx2, dx), 4e-3 + moved), "d weight": (relative(dw2, dw), 4e-3 + moved),
    }  # fmt: skip
    bound = "one token in a hundred may take another expert, where two scores are equal but for the order of fp32 sums"
    return within(pairs, bound)


def adamw(machine: Machine) -> Finding:
    """Of equal gradients, so that the optimizer's arithmetic alone is compared."""
    config, results = compose(), []
    for reference in (True, False):
        device, kernels = machine.side(reference)
        draw = seeded(16, device, torch.float32)
        param = torch.nn.Parameter(draw(100_003, scale=0.02, grad=False))
        group = {"params": [param], "weight_decay": 0.1, "lr": 1e-3}
        optimizer = AdamW.make([group], config, kernels.parts)
        for step in range(3):
            param.grad = draw(100_003, scale=1e-3, grad=False)
            optimizer.step()
            optimizer.updates = step + 1
        results.append(param.detach().cpu())
    worst = (results[0] - results[1]).abs().max().item()
    bound = "2e-5 at a rate of 1e-3: a bf16 moment may round the other way, 2^-8 of an update, in each of three"
    return Finding({"largest difference": worst}, bound, None if worst <= 2e-5 else f"{worst:.1e}")
