"""Builds the kernels and the precision of a GPU or a CPU for the meta device, which needs no memory.

Functions with results of the same shapes replace kernels that exist only on GPUs.

torch's FakeTensorMode is not used: it takes 20 times as long as the meta device. Without CUDA, its GPU
tensors abort autograd.
"""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from conf.schema import Precision
from conf.thresholds import THRESHOLDS
from parallel.expert.build import build_wire
from parallel.expert.wire import Fp8Wire, Wire
from train.kernels.choice import build_kernels
from train.kernels.fp8.blackwell import BlackwellEngine, ScaledGroupedMatmuls
from train.kernels.fp8.formats import MX_TILE, TILE, Cast
from train.kernels.fp8.fp8 import Fp8Precision, cpu_engine
from train.kernels.fp8.groups import most_tiles
from train.kernels.fp8.hopper import (
    DeepGemmMatmuls,
    HopperEngine,
    TritonMatmuls,
    check_gpu_operands,
    has_mx_tiles,
    needs_deep_gemm,
)
from train.kernels.plain.high import HighPrecision
from train.kernels.precision import activation_dtype
from train.model.chosen_attention import ChosenInput, ChosenOutput
from train.model.indexer import AttentionTarget, IndexLoss, IndexVectors
from train.model.operations import Kernels
from train.model.sequence import SeenKeys


def _scaled_mm(a: Tensor, b: Tensor, *, output_dtype: torch.dtype, **scales: Any) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=output_dtype)


def _scaled_grouped_mm(a: Tensor, b: Tensor, *, offs: Tensor, output_dtype: torch.dtype, **scales: Any) -> Tensor:
    lead = () if b.dim() == 3 else (len(offs),)
    return a.new_empty(*lead, a.shape[0], b.shape[-1], dtype=output_dtype)


def meta_kernels(kind: str, compiled: bool) -> Kernels:
    """Returns the kernels of a kind of device (cuda or cpu) for the meta device.

    Sparse attention runs only for the last blocks of queries, which need the most memory.
    """
    kernels = build_kernels(kind, compiled)
    choose, learn = kernels.choose_keys, kernels.index_loss
    attend, back, learn_chosen = kernels.attend_chosen, kernels.attend_chosen_backward, kernels.chosen_index_loss

    def learn_last(index: IndexVectors, seen: SeenKeys, target: AttentionTarget, weight_BT: Tensor) -> IndexLoss:
        keys, own, first = deque(target.blocks(), 1).pop()
        target = replace(target, blocks=lambda: iter([(keys, last_blocks(own), first)]))
        return learn(index, last_blocks(seen), target, weight_BT)

    def attend_last(given: ChosenInput) -> ChosenOutput:
        q, K = given.q_BTHQ, given.chosen_BTK.size(2)
        width = given.weight_YC.size(0) // q.size(2) - given.nope
        sizes = q.size(2), q.size(2), K
        out = q.new_empty(*q.shape[:3], width)
        made = ChosenOutput(out, *(q.new_empty(*q.shape[:2], size, dtype=torch.float32) for size in sizes))
        attend(given._replace(q_BTHQ=_last(q), chosen_BTK=_last(given.chosen_BTK)))
        return made

    def attend_last_backward(
        dout_BTHV: Tensor, given: ChosenInput, out_BTHV: Tensor, lse_BTH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, last = torch.empty_like(given.q_BTHQ), given._replace(q_BTHQ=_last(given.q_BTHQ))
        last = last._replace(chosen_BTK=_last(given.chosen_BTK))
        _, dlatents, dweight = back(_last(dout_BTHV), last, _last(out_BTHV), _last(lse_BTH))
        return dq, dlatents, dweight

    def learn_last_chosen(index: IndexVectors, chosen_BTK: Tensor, shares_BTK: Tensor, weight_BT: Tensor) -> IndexLoss:
        q, k, w = index
        grads = [torch.empty(one.shape, device=one.device) for one in (q, w)]
        given = _last(chosen_BTK), _last(shares_BTK), _last(weight_BT)
        loss, (_, dk, _) = learn_chosen(IndexVectors(_last(q), k, _last(w)), *given)
        dq, dw = (grad.to(of.dtype) for grad, of in zip(grads, (q, w), strict=True))
        return IndexLoss(loss, IndexVectors(dq, dk, dw))

    kernels.choose_keys = lambda index, seen, top_k: choose(index, last_blocks(seen), top_k)
    kernels.index_loss, kernels.chosen_index_loss = learn_last, learn_last_chosen
    kernels.attend_chosen, kernels.attend_chosen_backward = attend_last, attend_last_backward
    return kernels


def _last(rows_BTX: Tensor) -> Tensor:
    """Cuts a tensor (B, T, X) to the rows of the last block of queries."""
    return rows_BTX[:, -THRESHOLDS.attention_queries :]


def last_blocks(seen: SeenKeys) -> SeenKeys:
    """Cuts `seen` to the last rectangle (queries by keys), and cuts this rectangle to its last queries.

    The result has at most four blocks of queries.
    """
    last = seen.rectangles[-1]
    first = max(last.first_query, last.last_query - 4 * THRESHOLDS.attention_queries)
    return SeenKeys([last._replace(first_query=first, before=last.before + first - last.first_query)])


def meta_wire(name: str, quantized: bool, kind: str) -> Wire:
    """Returns a wire (format of rows sent to experts) for the meta device."""
    wire = build_wire(name, quantized)
    if isinstance(wire, Fp8Wire) and kind == "cuda":
        wire.widen = Tensor.float
    return wire


def meta_precision(
    precision: Precision,
    kind: str,
    kernels: Kernels,
    recompute_swiglu: bool,
    making: Callable[[], AbstractContextManager] = nullcontext,
) -> HighPrecision | Fp8Precision:
    """Returns the object that computes the matmuls of a kind of device (cuda or cpu) on the meta device."""
    if precision.fp8 is None:
        return HighPrecision(activation_dtype(precision), kernels, recompute_swiglu)
    if kind == "cpu":
        engine = cpu_engine(precision.fp8, kernels, meta=True)
    else:
        check_gpu_operands(precision.fp8)
        matmuls = DeepGemmMatmuls(_DEEP_GEMM) if needs_deep_gemm(precision.fp8) else TritonMatmuls(_MATMULS)
        engine = HopperEngine(_KERNELS, matmuls, _scaled_mm)
        if has_mx_tiles(precision.fp8):
            engine = BlackwellEngine(_KERNELS, ScaledGroupedMatmuls(_scaled_grouped_mm), _scaled_mm)
    return Fp8Precision(precision.fp8, torch.device("meta"), kernels, engine, making)


def _tiles(x_RC: Tensor, cast: Cast) -> tuple[Tensor, Tensor]:
    return cast.empty_tiles(x_RC, _whole(x_RC.shape[0]), x_RC.shape[1])


def _e5m6(x_RC: Tensor, cast: Cast) -> tuple[Tensor, Tensor]:
    rows, columns = _whole(x_RC.shape[0]), x_RC.shape[1]
    scale = x_RC.new_empty(columns // TILE, rows, dtype=torch.float32)
    return x_RC.new_empty(rows, columns // 2 * 3, dtype=torch.uint8), scale.t()


def _columns(
    x_RC: Tensor,
    cast: Cast,
    in_scale: Tensor | None = None,
    flat: list[int] | None = None,
    ends_E: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows, columns = most_tiles(len(x_RC), 1 if ends_E is None else len(ends_E)) * TILE, x_RC.shape[1]
    if x_RC.dtype == torch.uint8:
        columns = columns // 3 * 2
    q = x_RC.new_empty(columns * rows, dtype=cast.format.dtype)
    scale = x_RC.new_empty(rows // TILE, columns, dtype=torch.float32).t()
    return (q.view(columns, rows) if flat is None else q), scale


def _both(x_RC: Tensor, cast: Cast, cast_t: Cast, ends_E: Tensor | None = None) -> tuple:
    return _tiles(x_RC, cast), _columns(x_RC, cast_t, ends_E=ends_E)


def _again(x_RC: Tensor, cast: Cast, cast_t: Cast) -> tuple[Tensor, Tensor]:
    return _columns(x_RC, cast_t)


def _decode_e5m6(q: Tensor, scale: Tensor, rows: int) -> Tensor:
    return q.new_empty(rows, q.shape[1] // 3 * 2, dtype=torch.bfloat16)


def _whole(rows: int) -> int:
    """Rounds a number of rows up to whole tiles."""
    return -(-rows // TILE) * TILE


def _blocks(x_RC: Tensor, cast: Cast, transposed: bool) -> tuple[Tensor, Tensor]:
    x_RC = x_RC.mT if transposed else x_RC
    *lead, outer, inner = x_RC.shape
    scale = x_RC.new_empty(*lead, outer // TILE, inner // TILE, dtype=torch.float32)
    return x_RC.new_empty(x_RC.shape, dtype=cast.format.dtype), scale


def _mx(
    x_RC: Tensor,
    cast: Cast,
    in_scale: Tensor | None = None,
    ends_E: Tensor | None = None,
    gates_R: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    *lead, rows, columns = x_RC.shape
    whole, inner = _whole(rows), _whole(columns if gates_R is None else columns // 2)
    if ends_E is not None:
        inner = most_tiles(columns + len(ends_E), len(ends_E)) * TILE
    scale = x_RC.new_empty(*lead, whole, inner // MX_TILE, dtype=torch.float8_e8m0fnu)
    return x_RC.new_empty(*lead, whole, inner, dtype=cast.format.dtype), scale.flatten(-2) if lead else scale


def _swiglu_tiles(h_P2F: Tensor, gates_P: Tensor, cast: Cast, cache: Cast) -> tuple:
    rows, width = len(h_P2F), h_P2F.shape[1] // 2
    return cast.empty_tiles(h_P2F, rows, width), cache.empty_tiles(h_P2F, rows, 2 * width)


def _swiglu_backward(h_P2F: Tensor, gates_P: Tensor, da_PF: Tensor, in_scale: Tensor) -> tuple:
    a_PF = torch.empty_like(da_PF, dtype=torch.bfloat16)
    dh_P2F = a_PF.new_empty(len(a_PF), 2 * a_PF.shape[1])
    return a_PF, dh_P2F, torch.empty_like(gates_P)


_KERNELS = SimpleNamespace(
    quantize_tiles=_tiles,
    quantize_e5m6=_e5m6,
    decode_e5m6=_decode_e5m6,
    quantize_columns=_columns,
    quantize_both=_both,
    quantize_again=_again,
    quantize_blocks=_blocks,
    swiglu_tiles=_swiglu_tiles,
    swiglu_backward=_swiglu_backward,
    quantize_mx=_mx,
)
"""Replaces train/kernels/fp8/triton_quantize.py."""

_MATMULS = SimpleNamespace(
    matmul=lambda left, left_scale, right, right_scale, out, ends=None: out,
    wgrad=lambda left, left_scale, right, right_scale, out, added, ends=None: out,
)
"""Replaces train/kernels/fp8/triton_matmuls.py. Returns `out`, which the FP8 engine has allocated."""

_DEEP_GEMM = SimpleNamespace(
    m_grouped_fp8_gemm_nt_contiguous=lambda *args, **kwargs: None,
    k_grouped_fp8_gemm_nt_contiguous=lambda *args, **kwargs: None,
)
"""Replaces DeepGEMM. The FP8 engine has allocated the results."""
