"""Times of FP8 products and quantisers on a Hopper GPU, for bench/gpu_fp8.py."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from conf.load import compose
from train.precision.formats import E4M3
from train.precision.fp8 import Fp8Precision
from train.precision.groups import Groups
from train.precision.high import HighPrecision
from train.precision.hopper import HopperEngine
from train.precision.recipe import OperandRule

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
TILES, BLOCKS = OperandRule(E4M3, "1x128", False, 1e-4), OperandRule(E4M3, "128x128", False, 1e-4)


def seconds(function: Callable[[], object], repeats: int = 20) -> float:
    """Median time on the GPU, the level-2 cache emptied before every call."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    for _ in range(3):
        function()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2] / 1e3


def dense(engine: HopperEngine) -> None:
    print(
        f"\n{'dense M x N x K':24s} {'bf16':>7s} {'fp8':>7s} {'+ casts':>8s} {'dgrad':>7s} {'wgrad':>7s} {'DeepGEMM':>9s}  TFLOP/s"
    )
    for (m, n, k), (published, name) in DENSE.items():
        x, w, g = (torch.randn(shape, device="cuda").bfloat16() for shape in ((m, k), (n, k), (m, n)))
        flops = 2 * m * n * k / 1e12
        left, right = engine.operand(x, TILES), engine.operand(w, BLOCKS)
        g_left, w_right = engine.operand(g, TILES), engine.operand(w, BLOCKS, transposed=True)
        g_t, x_t = engine.operand(g, TILES, transposed=True), engine.operand(x, TILES, transposed=True)
        times = (
            seconds(lambda x=x, w=w: x @ w.t()),
            seconds(lambda a=left, b=right: engine.product(a, b, torch.bfloat16)),
            seconds(
                lambda x=x, w=w: engine.product(engine.operand(x, TILES), engine.operand(w, BLOCKS), torch.bfloat16)
            ),
            seconds(lambda a=g_left, b=w_right: engine.product(a, b, torch.bfloat16)),
            seconds(lambda a=g_t, b=x_t: engine.product(a, b, torch.float32)),
        )
        bf16, fp8, casts, dgrad, wgrad = (flops / time for time in times)
        print(
            f"{f'{m} x {n} x {k}':24s} {bf16:7.0f} {fp8:7.0f} {casts:8.0f} {dgrad:7.0f} {wgrad:7.0f} {published:9d}  {name}"
        )


def grouped(engine: HopperEngine) -> None:
    print(
        f"\n{'experts x M x N x K':24s} {'bf16':>7s} {'fp8':>7s} {'+ casts':>8s} {'wgrad':>7s} {'DeepGEMM':>9s}  TFLOP/s"
    )
    for (experts, rows, n, k), (published, name) in GROUPED.items():
        groups = Groups.of(torch.full((experts,), rows))
        x = torch.randn(experts * rows, k, device="cuda").bfloat16()
        w = torch.randn(experts, n, k, device="cuda").bfloat16()
        g = torch.randn(experts * rows, n, device="cuda").bfloat16()
        ends = torch.arange(rows, (experts + 1) * rows, rows, device="cuda", dtype=torch.int32)[:experts]
        flops = 2 * experts * rows * n * k / 1e12
        left, right = engine.operand(x, TILES), engine.operand(w, BLOCKS)
        g_t = engine.operand(g, TILES, transposed=True, groups=groups)
        x_t = engine.operand(x, TILES, transposed=True, groups=groups)
        times = (
            seconds(lambda x=x, w=w, ends=ends: F.grouped_mm(x, w.mT, offs=ends)),
            seconds(lambda a=left, b=right, groups=groups: engine.grouped(a, b, groups, torch.bfloat16)),
            seconds(
                lambda x=x, w=w, groups=groups: engine.grouped(
                    engine.operand(x, TILES), engine.operand(w, BLOCKS), groups, torch.bfloat16
                )
            ),
            seconds(lambda a=g_t, b=x_t, groups=groups: engine.grouped_wgrad(a, b, groups, torch.float32)),
        )
        bf16, fp8, casts, wgrad = (flops / time for time in times)
        title = f"{experts} x {rows} x {n} x {k}"
        print(f"{title:24s} {bf16:7.0f} {fp8:7.0f} {casts:8.0f} {wgrad:7.0f} {published:9d}  {name}")


def quantisers(engine: HopperEngine) -> None:
    """Bytes read and written over time; the memory of an H100 moves about 3.35 TB/s."""
    print(f"\n{'quantiser, 8192 x 7168':32s} {'TB/s':>6s}")
    x = torch.randn(8192, 7168, device="cuda").bfloat16()
    kept = engine.keep(x, TILES.cast())
    h, gates = torch.randn(8192, 4096, device="cuda").bfloat16(), torch.rand(8192, device="cuda")
    works = {
        "1x128": (lambda: engine.operand(x, TILES), 3 * x.numel()),
        "128x1, transposed": (lambda: engine.operand(x, TILES, transposed=True), 3 * x.numel()),
        "1x128 FP8 to 128x1": (lambda: engine.operand(kept, TILES, transposed=True), 2 * x.numel()),
        "128x128": (lambda: engine.operand(x, BLOCKS), 3 * x.numel()),
        "SwiGLU and 1x128": (lambda: engine.swiglu(h, gates, TILES), 2 * h.numel() + h.numel() // 2),
        "tensor": (lambda: engine.operand(x, OperandRule(E4M3, "tensor", False, 1e-4)), 3 * x.numel()),
    }
    for name, (work, moved) in works.items():
        print(f"{name:32s} {moved / seconds(work) / 1e12:6.2f}")


def layers() -> None:
    """Forward and backward of whole layers, FP8 beside bf16."""
    device = torch.device("cuda")
    precisions = {
        "bf16": HighPrecision(torch.bfloat16),
        "fp8": Fp8Precision(compose("precision=fp8").precision.fp8, device),
    }
    x = torch.randn(4096, 7168, device=device).bfloat16().requires_grad_()
    w = torch.randn(7168, 7168, device=device).bfloat16().requires_grad_()
    rows = torch.randn(32768, 7168, device=device).bfloat16().requires_grad_()
    gates = torch.rand(32768, device=device).requires_grad_()
    w13 = torch.randn(8, 4096, 7168, device=device).bfloat16().requires_grad_()
    w2 = torch.randn(8, 7168, 2048, device=device).bfloat16().requires_grad_()
    counts = torch.full((8,), 4096, device=device)
    print(f"\n{'layer, forward + backward':32s} {'bf16 ms':>8s} {'fp8 ms':>8s}")
    works = {
        "linear 4096 x 7168 -> 7168": lambda p: torch.autograd.grad(p.linear(x, w), (x, w), x.detach()),
        "8 experts of 2048 on 4096 rows": lambda p: torch.autograd.grad(
            p.expert_ffn(rows, gates, w13, w2, counts), (rows, gates, w13, w2), rows.detach()
        ),
    }
    for name, work in works.items():
        bf16, fp8 = (seconds(lambda p=p, work=work: work(p)) * 1e3 for p in precisions.values())
        print(f"{name:32s} {bf16:8.2f} {fp8:8.2f}")
