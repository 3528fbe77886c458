"""Rates of GEMMs at DeepSeek-V3's shapes, beside DeepGEMM's own figures; of our quantisers; of FP8 layers.

Published: DeepGEMM's README of March 2025, H800, 1x128 by 128x128, bf16 out. Without a GPU, none of this is tried.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu.kernels import BACKENDS, BLOCKS, TILES, hopper, lacks
from bench.gpu.line import Check, Finding, NotTried
from bench.gpu.machine import Machine
from bench.gpu.timing import median_seconds, watched_card
from conf.errors import UserError
from conf.load import compose
from train.kernels.fp8.hopper import PaddedOperand
from train.kernels.precision import build_precision

DENSE = {
    (4096, 2112, 7168): (1009, "q_down + kv_down"),
    (4096, 24576, 1536): (1125, "q_up"),
    (4096, 32768, 512): (751, "kv_up"),
    (4096, 7168, 16384): (1426, "attention out"),
    (4096, 4096, 7168): (1265, "expert w13, dense"),
    (4096, 7168, 2048): (1168, "expert w2, dense"),
}
"""(M, N, K): published TFLOP/s, what it is in V3."""
GROUPED = {
    (4, 8192, 4096, 7168): (1346, "w13"),
    (4, 8192, 7168, 2048): (1214, "w2"),
    (8, 4096, 4096, 7168): (1346, "w13"),
    (8, 4096, 7168, 2048): (1214, "w2"),
}
"""(experts, rows of each, N, K): published TFLOP/s, what it is in V3."""
LAYERS = {
    "bf16": ("precision=bf16",),
    "fp8": ("precision=fp8",),
    "fp8, DeepGEMM": ("precision=fp8", "precision.fp8.backend=deepgemm"),
}
ROUNDS = 10


def checks(machine: Machine) -> list[Check]:
    works = {
        "dense products in bf16": dense_bf16, "dense products in FP8": dense_fp8, "experts' products in bf16": grouped_bf16,
        **{f"experts' products in FP8 ({library})": partial(grouped_fp8, backend=backend) for backend, library in BACKENDS.items()},
        "quantisers": quantisers,
    }  # fmt: skip
    works |= {f"layers in {name}": partial(layers, recipe=given) for name, given in LAYERS.items()}
    return [Check(name, partial(with_clocks, work, machine)) for name, work in works.items()]


def with_clocks(work: Callable[[Machine], Finding], machine: Machine) -> Finding:
    """What the work finds, with the medians of clocks and power while it ran: a rate at half the clock is no slow kernel."""
    with watched_card(machine) as seen:
        found = work(machine)
    found.figures |= seen
    return found


def rates(machine: Machine, works: dict[str, Callable[[], object]], work: float) -> list[float]:
    """Of each, work per second in 1e12."""
    return [work / median_seconds(one, machine, ROUNDS) / 1e12 for one in works.values()]


def draw(machine: Machine, *shape: int) -> Tensor:
    return torch.randn(shape, device=machine.device).bfloat16()


def dense_bf16(machine: Machine) -> Finding:
    machine.need_gpu("this")
    table = [["M x N x K", "TFLOP/s", "product"]]
    for (M, N, K), (_, name) in DENSE.items():
        x, w = draw(machine, M, K), draw(machine, N, K)
        table.append([f"{M} x {N} x {K}", *rates(machine, {"": lambda x=x, w=w: x @ w.t()}, 2 * M * N * K), name])
    return Finding({}, table=table)


def dense_fp8(machine: Machine) -> Finding:
    engine = hopper(machine)
    table = [
        [
            "M x N x K", "forward", "by Triton", "with casts", "inputs' gradient", "weights' gradient",
            "added by Triton", "DeepGEMM, H800", "TFLOP/s of",
        ]
    ]  # fmt: skip
    for (M, N, K), (published, name) in DENSE.items():
        x, w, g = draw(machine, M, K), draw(machine, N, K), draw(machine, M, N)
        left, right = engine.operand(x, TILES), engine.operand(w, BLOCKS)
        g_left, w_right = engine.operand(g, TILES), engine.operand(w, BLOCKS, transposed=True)
        g_t, x_t = engine.operand(g, TILES, transposed=True), engine.operand(x, TILES, transposed=True)
        sums = torch.zeros(N, K, device=machine.device)
        one, all_rows = one_expert(right), engine.groups(torch.tensor([M], device=machine.device), M)
        works = {
            "forward": lambda a=left, b=right: engine.matmul(a, b, torch.bfloat16),
            "Triton": lambda a=left, b=one, groups=all_rows: engine.grouped(a, b, groups, torch.bfloat16),
            "casts": lambda x=x, w=w: engine.matmul(
                engine.operand(x, TILES), engine.operand(w, BLOCKS), torch.bfloat16
            ),
            "inputs": lambda a=g_left, b=w_right: engine.matmul(a, b, torch.bfloat16),
            "weights": lambda a=g_t, b=x_t: engine.matmul(a, b, torch.float32),
            "added": lambda a=g_t, b=x_t, sums=sums: engine.matmul(a, b, torch.float32, sums),
        }
        table.append([f"{M} x {N} x {K}", *rates(machine, works, 2 * M * N * K), published, name])
    return Finding({}, table=table)


def one_expert(weight: PaddedOperand) -> PaddedOperand:
    """A weight as that of a single expert, whose products are our kernels'."""
    return replace(weight, q=weight.q.unsqueeze(0), scale=weight.scale.unsqueeze(0))


def grouped_bf16(machine: Machine) -> Finding:
    machine.need_gpu("this")
    table = [["experts x rows x N x K", "TFLOP/s", "product"]]
    for (E, rows, N, K), (_, name) in GROUPED.items():
        x, w = draw(machine, E * rows, K), draw(machine, E, N, K)
        ends = torch.arange(rows, (E + 1) * rows, rows, device=machine.device, dtype=torch.int32)[:E]
        works = {"": lambda x=x, w=w, ends=ends: F.grouped_mm(x, w.mT, offs=ends)}
        table.append([f"{E} x {rows} x {N} x {K}", *rates(machine, works, 2 * E * rows * N * K), name])
    return Finding({}, table=table)


def grouped_fp8(machine: Machine, backend: str) -> Finding:
    engine = hopper(machine, backend)
    head = ["forward", "with casts", "weights' gradient", "added to a sum", "DeepGEMM, H800", "TFLOP/s of"]
    table = [["experts x rows x N x K", *head]]
    for (E, rows, N, K), (published, name) in GROUPED.items():
        groups = engine.groups(torch.full((E,), rows, device=machine.device), E * rows)
        x, w, g = draw(machine, E * rows, K), draw(machine, E, N, K), draw(machine, E * rows, N)
        x, g = groups.pad(x), groups.pad(g)
        left, right = engine.operand(x, TILES), engine.operand(w, BLOCKS)
        g_t, x_t = (engine.operand(t, TILES, transposed=True, groups=groups) for t in (g, x))
        sums = torch.zeros(E, N, K, device=machine.device)
        works = {
            "forward": lambda a=left, b=right, groups=groups: engine.grouped(a, b, groups, torch.bfloat16),
            "casts": lambda x=x, w=w, groups=groups: engine.grouped(
                engine.operand(x, TILES), engine.operand(w, BLOCKS), groups, torch.bfloat16
            ),
            "weights": lambda a=g_t, b=x_t, groups=groups: engine.grouped_wgrad(a, b, groups, torch.float32),
            "added": lambda a=g_t, b=x_t, groups=groups, sums=sums: engine.grouped_wgrad(
                a, b, groups, torch.float32, sums
            ),
        }
        table.append([f"{E} x {rows} x {N} x {K}", *rates(machine, works, 2 * E * rows * N * K), published, name])
    return Finding({}, table=table)


def quantisers(machine: Machine) -> Finding:
    """Bytes read and written over time; the memory of an H100 moves about 3.35 TB/s."""
    engine = hopper(machine)
    x = draw(machine, 8192, 7168)
    kept = engine.keep(x, TILES.cast())
    h, gates = draw(machine, 8192, 4096), torch.rand(8192, device=machine.device)
    works = {
        "1x128": (lambda: engine.operand(x, TILES), 3 * x.numel()),
        "128x1, transposed": (lambda: engine.operand(x, TILES, transposed=True), 3 * x.numel()),
        "128x1 from 1x128": (lambda: engine.operand(kept, TILES, transposed=True), 2 * x.numel()),
        "128x128": (lambda: engine.operand(x, BLOCKS), 3 * x.numel()),
        "128x128, transposed": (lambda: engine.operand(x, BLOCKS, transposed=True), 3 * x.numel()),
        "SwiGLU and 1x128, h kept": (
            lambda: engine.swiglu(h, gates, TILES, TILES.cast()),
            3 * h.numel() + h.numel() // 2,
        ),
    }
    rows = [[name, *rates(machine, {"": work}, moved)] for name, (work, moved) in works.items()]
    return Finding({}, table=[["quantiser, 8192 x 7168", "TB/s"], *rows])


def layers(machine: Machine, recipe: tuple[str, ...]) -> Finding:
    """Forward and backward of a linear layer and of eight experts."""
    machine.need_gpu("this")
    try:
        precision = build_precision(compose(*recipe).precision, *machine.side(reference=False))
    except UserError as error:
        raise NotTried(lacks(error)) from error
    x, w = draw(machine, 4096, 7168).requires_grad_(), draw(machine, 7168, 7168).requires_grad_()
    rows, gates = draw(machine, 32768, 7168).requires_grad_(), torch.rand(32768, device=machine.device).requires_grad_()
    w13, w2 = draw(machine, 8, 4096, 7168).requires_grad_(), draw(machine, 8, 7168, 2048).requires_grad_()
    counts = torch.full((8,), 4096, device=machine.device)
    works = {
        "linear, 4096 x 7168 -> 7168": lambda: torch.autograd.grad(precision.linear(x, w), (x, w), x.detach()),
        "8 experts of 2048 on 4096 rows": lambda: torch.autograd.grad(
            precision.expert_ffn(rows, gates, w13, w2, counts), (rows, gates, w13, w2), rows.detach()
        ),
    }
    flops = (6 * 4096 * 7168 * 7168, 6 * 32768 * 3 * 7168 * 2048)
    table = [["forward and backward", "ms", "TFLOP/s"]]
    for (title, work), operations in zip(works.items(), flops, strict=True):
        seconds = median_seconds(work, machine, ROUNDS)
        table.append([title, 1e3 * seconds, operations / seconds / 1e12])
    return Finding({}, table=table)
