"""The model on the meta device as if it were on a GPU or a CPU: the same operations, no memory and no values.

Code that asks a tensor where it is, or that waits for numbers, is answered here; kernels that only exist on GPUs are
stood in for by what they return. Everything else is torch's own shape arithmetic.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.schema import Fp8, Precision
from train.model.kernels import Kernels
from train.precision.build import activation_dtype
from train.precision.formats import TILE, Cast
from train.precision.fp8 import Fp8Precision, cpu_engine
from train.precision.high import HighPrecision
from train.precision.hopper import HopperEngine
from train.precision.products import Engine


@contextmanager
def shadow(kind: str, rows: Sequence[int]) -> Iterator[None]:
    """Inside, meta tensors behave as those of a device of this kind do; other tensors are left alone.

    rows: how many rows each expert gets, the one thing that code waits for; the list may change. torch's own hook for such answers, a
    function mode, does not reach into autograd's passes, so the attributes themselves are exchanged for the time being.
    """
    fakes = [
        (torch.Tensor, "is_cuda", property(_meta_or(torch.Tensor.is_cuda.__get__, lambda _: kind == "cuda"))),
        (torch.Tensor, "data_ptr", _meta_or(torch.Tensor.data_ptr, _address)),
        (torch.Tensor, "tolist", _meta_or(torch.Tensor.tolist, lambda _: list(rows))),
        (F, "grouped_mm", _meta_or(F.grouped_mm, _grouped_mm)),
    ]
    if kind == "cuda":
        fakes += [
            (F, "scaled_dot_product_attention", _meta_or(F.scaled_dot_product_attention, _attention)),
            (F, "scaled_mm", _meta_or(F.scaled_mm, _scaled_mm)),
        ]
    with ExitStack() as stack:
        for owner, name, fake in fakes:
            stack.enter_context(_exchanged(owner, name, fake))
        yield


@contextmanager
def _exchanged(owner: object, name: str, fake: object) -> Iterator[None]:
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, fake)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:  # it was inherited
            delattr(owner, name)


def _meta_or(real: Callable, fake: Callable) -> Callable:
    """The fake for a meta tensor as first argument, else the real one."""
    return lambda tensor, *args, **kwargs: (fake if tensor.is_meta else real)(tensor, *args, **kwargs)


def _address(tensor: Tensor) -> int:
    """Tells tensors apart as an address does."""
    return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()


def _grouped_mm(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
    """torch's own for meta tensors takes bf16 only."""
    return a.new_empty(*([len(offs)] if b.dim() == 2 else []), a.shape[0], b.shape[-1])


def _scaled_mm(a: Tensor, b: Tensor, *, output_dtype: torch.dtype, **scales: Any) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=output_dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
    """A fused kernel: it keeps q, k, v, its output and one fp32 per query and head."""
    scale, causal = rest.get("scale"), rest.get("is_causal", False)
    out, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, 0.0, causal, scale=scale)
    return out


def shadow_precision(
    precision: Precision, kind: str, kernels: Kernels, recompute_swiglu: bool
) -> HighPrecision | Fp8Precision:
    """`build_precision` without the device."""
    if precision.fp8 is None:
        return HighPrecision(activation_dtype(precision), kernels, recompute_swiglu)
    return Fp8Precision(precision.fp8, torch.device("meta"), kernels, shadow_engine(precision.fp8, kind, kernels))


def shadow_engine(fp8: Fp8, kind: str, kernels: Kernels) -> Engine:
    """The engine of the device, with kernels that return tensors of the right size."""
    if kind == "cpu":
        return cpu_engine(fp8, kernels, meta=True)
    engine = HopperEngine.__new__(HopperEngine)  # its constructor asks for a GPU and for packages
    engine._kernels, engine._deep_gemm = _KERNELS, _DEEP_GEMM
    return engine


def _tiles(x_RC: Tensor, cast: Cast, in_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    rows, columns = x_RC.shape
    scale = x_RC.new_empty(columns // TILE, rows, dtype=torch.float32)
    return torch.empty_like(x_RC, dtype=cast.format.dtype), scale.t()


def _columns(
    x_RC: Tensor, cast: Cast, in_scale: Tensor | None = None, groups: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    rows, columns = x_RC.shape
    q = x_RC.new_empty(columns * rows, dtype=cast.format.dtype)
    scale = x_RC.new_empty(rows // TILE, columns, dtype=torch.float32).t()
    return (q.view(columns, rows) if groups is None else q), scale


def _blocks(x_RC: Tensor, cast: Cast, transposed: bool) -> tuple[Tensor, Tensor]:
    x_RC = x_RC.mT if transposed else x_RC
    *lead, outer, inner = x_RC.shape
    scale = x_RC.new_empty(*lead, outer // TILE, inner // TILE, dtype=torch.float32)
    return x_RC.new_empty(x_RC.shape, dtype=cast.format.dtype), scale


def _swiglu_tiles(h_P2F: Tensor, gates_P: Tensor, cast: Cast) -> tuple[Tensor, Tensor]:
    return _tiles(h_P2F[:, : h_P2F.shape[1] // 2], cast)


def _swiglu_backward(h_P2F: Tensor, gates_P: Tensor, da_PF: Tensor, in_scale: Tensor | None = None) -> tuple:
    a_PF = torch.empty_like(da_PF, dtype=torch.bfloat16)
    return a_PF, torch.empty_like(h_P2F, dtype=torch.bfloat16), torch.empty_like(gates_P)


_KERNELS = SimpleNamespace(
    quantize_tiles=_tiles,
    quantize_columns=_columns,
    quantize_blocks=_blocks,
    swiglu_tiles=_swiglu_tiles,
    swiglu_backward=_swiglu_backward,
)
"""In place of train/precision/triton_kernels.py."""

_DEEP_GEMM = SimpleNamespace(
    m_grouped_fp8_gemm_nt_contiguous=lambda *args, **kwargs: None,
    k_grouped_fp8_gemm_nt_contiguous=lambda *args, **kwargs: None,
)
"""Its kernels write into tensors that the engine made."""
