"""Offsets beyond 32 bits: the last program of every kernel, at sizes beyond 2**31 elements, in Triton's interpreter.

Large tensors are on the meta device and have no memory: the kernel gets an address of each that is far from all others, loads of it give zeros, and
what is stored there is dropped. Every address must lie in the tensor of its pointer, and one at the least beyond 2**31 elements. Kernels
that are not here: the router's sums and the lists of a dispatch, which would take 60 million tokens, AdamW's, which reads addresses from a table of int64,
and attention's largest scores (interpreted.py).
"""

import inspect
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from bench.gpu import interpreter as repaired
from parallel.expert import triton_dispatch
from train.kernels.fp8 import triton_matmuls, triton_quantize
from train.kernels.fp8.formats import E4M3, E5M6, Cast
from train.kernels.gpu import triton_grouped, triton_route, triton_rows
from train.model.operations import RoutingRule

BORDER = 2**31
APART = 1 << 50
"""Bytes between the addresses of large tensors; real ones lie below the first."""
ROWS, WIDE, EXPERTS = 800_000, 7168, 80
FP8, BF16 = E4M3.dtype, torch.bfloat16


def large(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def scales(outer: int, tiles: int) -> Tensor:
    return large(tiles, outer, dtype=torch.float32).t()


class Launches:
    """Stands in for the launches of the interpreter."""

    def __init__(self, monkeypatch):
        self.farthest, self._spans = 0, dict[int, tuple[str, int, int]]()
        builder = interpreter.InterpreterBuilder
        load = builder.create_masked_load

        def masked_load(made, pointers, mask, *rest):
            mine = self._held(pointers, mask)
            return load(made, pointers, interpreter.TensorHandle(mine, interpreter.tl.int1), *rest)

        monkeypatch.setattr(builder, "create_masked_load", masked_load)
        monkeypatch.setattr(
            builder, "create_masked_store", lambda made, pointers, value, mask, *rest: self._held(pointers, mask)
        )
        monkeypatch.setattr(
            interpreter.GridExecutor, "__call__", lambda executor, *given, **options: self._launch(executor, given)
        )

    def _held(self, pointers, mask) -> np.ndarray:
        """Which of the masked addresses have memory; all others are held against their tensors."""
        places, wanted = np.broadcast_arrays(pointers.data.astype(np.int64), mask.data.astype(bool))
        for base, (name, size, item) in self._spans.items():
            here = places[wanted & (abs(places - base) < APART // 2)]
            if here.size:
                first, last = int(here.min()) - base, int(here.max()) - base
                assert first >= 0 and last < size, f"{name}: bytes {first} to {last} of {size}"
                self.farthest = max(self.farthest, last // item)
        return wanted & (places < APART // 2)

    def _launch(self, executor, given) -> None:
        arguments, self._spans = {}, {}
        for name, one in inspect.getcallargs(executor.fn, *given).items():
            if isinstance(one, Tensor) and one.is_meta:
                base = (len(self._spans) + 1) * APART
                elements = 1 + sum((size - 1) * stride for size, stride in zip(one.shape, one.stride(), strict=True))
                self._spans[base] = name, elements * one.element_size(), one.element_size()
                one = SimpleNamespace(dtype=one.dtype, data_ptr=lambda base=base: base)
            arguments[name] = one if name in executor.constexprs else interpreter._implicit_cvt(one)
        scope, builder = interpreter._patch_lang(executor.fn), interpreter.interpreter_builder
        grid = (*executor.grid, 1, 1)[:3]
        builder.set_grid_dim(*grid)
        builder.set_grid_idx(*(size - 1 for size in grid))
        executor.fn(**arguments)
        scope.restore()


def calls() -> dict[str, Callable[[], object]]:
    x, h = large(ROWS, WIDE), large(ROWS, 4096)
    tiles, columns, blocks = (Cast(E4M3, block, False) for block in ((1, 128), (128, 1), (128, 128)))
    half = ROWS // 2 - ROWS // 2 % 128 + 1  # of each of two experts, so that no tile is left over
    ends = torch.tensor([half, 2 * half], dtype=torch.int32)
    two, weight, packed = (
        large(2 * half, WIDE),
        large(EXPERTS, 4096, WIDE),
        large(ROWS, WIDE // 2 * 3, dtype=torch.uint8),
    )
    weight_8, weight_scale = large(EXPERTS, 4096, WIDE, dtype=FP8), large(EXPERTS, 32, 56, dtype=torch.float32)
    one_row = torch.arange(1, EXPERTS + 1, dtype=torch.int32)
    left, right = (large(outer, 128 * EXPERTS, dtype=FP8) for outer in (4096, WIDE))
    long = large(4096, 128 * 5000, dtype=FP8)
    far, last_tile = (
        torch.tensor(ends, dtype=torch.int32) for ends in ([ROWS - 3, ROWS], [128 * 4999, 128 * 4999 + 1])
    )
    positions, heads = 87_488, 128
    q, kv, rope = large(1, positions, heads, 192), large(1, positions, heads, 256), large(1, positions, 64)
    table, turned = (
        large(positions, 32, 2, dtype=torch.float32),
        [large(1, heads, positions, w) for w in (192, 192, 128)],
    )
    tokens, rule = 8_400_000, RoutingRule(8, 8, 4, 2.5, 2)
    logits, eight, one = (large(1, tokens, n, dtype=torch.float32) for n in (256, 8, 1))
    ids = large(1, tokens, 8, dtype=torch.int64)
    sums = [large(1, tokens // 8, 256, dtype=t) for t in (torch.int32, torch.float32, torch.int32)]
    bias, places = torch.zeros(256), large(ROWS, 1, dtype=torch.int64)
    return {
        "tiles": lambda: triton_quantize.quantize_tiles(x, tiles),
        "e5m6": lambda: triton_quantize.quantize_e5m6(x, Cast(E5M6, (1, 128), True)),
        "decode": lambda: triton_quantize.decode_e5m6(packed, scales(ROWS, 56), ROWS),
        "columns": lambda: triton_quantize.quantize_columns(large(ROWS, WIDE, dtype=FP8), columns, scales(ROWS, 56)),
        "columns, packed": lambda: triton_quantize.quantize_columns(packed, columns, scales(ROWS, 56)),
        "columns of experts": lambda: triton_quantize.quantize_columns(two, columns, ends_E=ends),
        "both": lambda: triton_quantize.quantize_both(x, tiles, columns),
        "both of experts": lambda: triton_quantize.quantize_both(two, tiles, columns, ends),
        "blocks": lambda: triton_quantize.quantize_blocks(weight, blocks, False),
        "blocks, transposed": lambda: triton_quantize.quantize_blocks(weight, blocks, True),
        "one block, transposed": lambda: triton_quantize.quantize_blocks(x, blocks, True),
        "swiglu": lambda: triton_quantize.swiglu_tiles(h, large(ROWS, dtype=torch.float32), tiles, tiles),
        "swiglu_bwd": lambda: triton_quantize.swiglu_backward(
            large(ROWS, 4096, dtype=FP8), large(ROWS, dtype=torch.float32), h[:, :2048].contiguous(), scales(ROWS, 32)
        ),
        "mx": lambda: triton_quantize.quantize_mx(x, Cast(E4M3, (1, 32), True)),
        "mx, transposed": lambda: triton_quantize.quantize_mx(x.mT, Cast(E4M3, (1, 32), True)),
        "product": lambda: triton_matmuls.matmul(
            large(ROWS, WIDE, dtype=FP8), scales(ROWS, 56), weight_8[:1], weight_scale[:1], large(ROWS, 4096)
        ),
        "product of experts": lambda: triton_matmuls.matmul(
            large(EXPERTS, WIDE, dtype=FP8), scales(EXPERTS, 56), weight_8, weight_scale, large(EXPERTS, 4096), one_row
        ),
        "wgrad": lambda: triton_matmuls.wgrad(
            long, scales(4096, 5000), long, scales(4096, 5000), large(2, 4096, 4096, dtype=torch.float32), True, last_tile
        ),
        "wgrad of experts": lambda: triton_matmuls.wgrad(
            left, scales(4096, EXPERTS), right, scales(WIDE, EXPERTS), large(EXPERTS, 4096, WIDE, dtype=torch.float32), True,
            one_row,
        ),
        "wgrad, bf16": lambda: triton_grouped.grouped_weight_gradient(large(ROWS, 4096), x, far, None),
        "wgrad of many experts, bf16": lambda: triton_grouped.grouped_weight_gradient(
            large(EXPERTS, 4096), large(EXPERTS, WIDE), one_row, large(EXPERTS, 4096, WIDE, dtype=torch.float32)
        ),
        "model: swiglu": lambda: triton_rows.swiglu(h, None, large(ROWS, 2048)),
        "model: swiglu_bwd": lambda: triton_rows.swiglu_backward(large(ROWS, 2048), h, None, large(ROWS, 4096), None),
        "model: heads": lambda: triton_rows.heads(q[..., 128:], kv[..., :128], rope, table, large(1, positions, heads, 192)),
        "model: heads_bwd": lambda: triton_rows.heads_backward(*turned, table, q, kv, rope),
        "model: route": lambda: triton_route.route(logits, bias, rule, (logits, ids, eight, one, one), sums, False, True),
        "model: route_bwd": lambda: triton_route.route_backward(
            eight, (logits, ids, eight, one, one, bias[None]), logits, rule, 1e-4
        ),
        "dispatch: collect": lambda: triton_dispatch.sum_entries(x, places, x),
        "dispatch: encode": lambda: triton_dispatch.encode_rows(x, large(ROWS, WIDE + 56, dtype=torch.uint8), 1e-4),
    }  # fmt: skip


@pytest.mark.parametrize("name", calls())
def test_places_take_64_bits(name, monkeypatch):
    repaired.repair(monkeypatch.setattr)
    launches = Launches(monkeypatch)
    calls()[name]()
    assert launches.farthest >= BORDER
