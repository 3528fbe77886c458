"""Stand-ins for the products of Hopper GPUs: the contracts of cuBLASLt's and DeepGEMM's kernels, checked and computed plainly.

They assert the shapes and strides that the real kernels read (torch 2.11's scaled_mm, sgl-deep-gemm 0.1.5), so that a test
without a GPU sees a wrong layout.
"""

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F


def _tiles(q: Tensor, scale: Tensor) -> Tensor:
    """Dequantise (O, C) with scales (O, C / 128)."""
    assert scale.shape == (q.shape[0], q.shape[1] // 128) and scale.dtype == torch.float32
    return q.float() * scale.repeat_interleave(128, 1)


def _blocks(q: Tensor, scale: Tensor) -> Tensor:
    """Dequantise (O, C) with scales (O / 128, C / 128)."""
    assert scale.shape == (q.shape[0] // 128, q.shape[1] // 128)
    return q.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)


def scaled_mm(a, b, *, scale_a, scale_recipe_a, scale_b, scale_recipe_b, output_dtype):
    """torch.nn.functional.scaled_mm for 1x128 by 1x128 or 128x128."""
    (m, k), n = a.shape, b.shape[1]
    assert a.stride() == (k, 1) and b.stride() == (1, k)
    assert scale_recipe_a is F.ScalingType.BlockWise1x128 and scale_a.stride() == (1, m)
    left = _tiles(a, scale_a)
    if scale_recipe_b is F.ScalingType.BlockWise1x128:
        assert scale_b.stride() == (1, n)
        right = _tiles(b.t(), scale_b)
    else:
        padded = -(-k // 512) * 4
        assert scale_b.shape == (padded, n // 128) and scale_b.stride() == (1, padded)
        right = _blocks(b.t(), scale_b.t()[:, : k // 128])
    return (left @ right.t()).to(output_dtype)


def _by_column(scale: Tensor) -> bool:
    """Whether DeepGEMM takes the scales as they are; it compiles a transposition for others, one per number of tiles."""
    return scale.stride() == (1, scale.shape[0])


def _m_grouped(a, b, d, layout, *, recipe_a, recipe_b, disable_ue8m0_cast):
    assert recipe_a == (1, 128) and recipe_b == (128, 128) and disable_ue8m0_cast
    assert layout.dtype == torch.int32 and layout.shape == (a[0].shape[0],) and d.dtype == torch.bfloat16
    assert a[0].is_contiguous() and _by_column(a[1]) and b[0].is_contiguous() and b[1].is_contiguous()
    left = _tiles(*a)
    for tile in range(0, len(layout), 128):
        expert = layout[tile]  # the kernel reads one expert per block of 128 rows
        d[tile : tile + 128] = (left[tile : tile + 128] @ _blocks(b[0][expert], b[1][expert]).t()).bfloat16()


def _k_grouped(a, b, d, ks, ks_tensor, c, *, recipe):
    assert recipe == (1, 1, 128) and d.dtype == c.dtype == torch.float32
    assert _by_column(a[1]) and _by_column(b[1])
    assert ks_tensor.tolist() == ks and ks_tensor.dtype == torch.int32 and all(k % 128 == 0 for k in ks)
    start = 0
    for expert, k in enumerate(ks):
        if k == 0:
            continue  # the kernel does not write here

        def part(operand, outer, start=start, k=k):
            q, scale = operand
            flat = q[start * outer : (start + k) * outer].view(outer, k)
            return _tiles(flat, scale[:, start // 128 : (start + k) // 128])

        d[expert] = c[expert] + part(a, d.shape[1]) @ part(b, d.shape[2]).t()
        start += k


deep_gemm = SimpleNamespace(m_grouped_fp8_gemm_nt_contiguous=_m_grouped, k_grouped_fp8_gemm_nt_contiguous=_k_grouped)
