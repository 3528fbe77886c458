"""Stand-ins for the matmuls of Hopper and Blackwell GPUs: they check the contracts of cuBLASLt's, CUTLASS's and
DeepGEMM's kernels, and compute the result plainly.

They assert the shapes and strides that the real kernels read (torch 2.11's scaled_mm and scaled_grouped_mm, sgl-deep-gemm 0.1.5), so that a
test without a GPU sees a wrong layout. What the real ones leave unwritten is not a number here.
"""

import itertools
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


def mx_places(outer: int, tiles: int) -> Tensor:
    """Where in memory the scales (O, C / 32) of whole tiles lie."""
    row, column = torch.arange(outer)[:, None], torch.arange(4 * tiles)[None, :]
    block = row // 128 * tiles + column // 4
    return block * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4


def mx_values(q: Tensor, scale: Tensor) -> Tensor:
    """Dequantise (O, C), both multiples of 128, with scales in E8M0 as they lie in memory."""
    assert scale.dtype == torch.float8_e8m0fnu and scale.is_contiguous() and scale.numel() == q.numel() // 32
    exponents = scale.view(torch.uint8).flatten()[mx_places(q.shape[0], q.shape[1] // 128)].double()
    factors = torch.where(exponents == 255, torch.nan, 2 ** (exponents - 127))
    return (q.double() * factors.repeat_interleave(32, 1)).float()


def _check_mx(recipes: dict) -> None:
    assert recipes == {
        "scale_recipe_a": F.ScalingType.BlockWise1x32,
        "scale_recipe_b": F.ScalingType.BlockWise1x32,
        "swizzle_a": F.SwizzleType.SWIZZLE_32_4_4,
        "swizzle_b": F.SwizzleType.SWIZZLE_32_4_4,
    }


def scaled_grouped_mm(a, b, *, scale_a, scale_b, offs, output_dtype, **recipes):
    """torch.nn.functional.scaled_grouped_mm for 1x32 by 1x32, 2D by 3D and 2D by 2D."""
    _check_mx(recipes)
    assert output_dtype == torch.bfloat16 and offs.dtype == torch.int32 and offs.dim() == 1
    assert a.is_contiguous() and b.mT.is_contiguous() and a.dtype == b.dtype == torch.float8_e4m3fn
    assert a.shape[-1] % 16 == 0 and b.shape[-1] % 16 == 0 and b.shape[-2] % 16 == 0
    assert scale_a.dim() == scale_b.dim() == 2 and scale_a.shape[0] >= a.shape[0]
    parts = list(itertools.pairwise([0, *offs.tolist()]))
    if b.dim() == 3:
        (experts, inputs, outputs), per_row = b.shape, a.shape[1] // 32
        assert inputs == a.shape[1] and experts == len(offs)
        assert scale_b.shape == (experts, -(-outputs // 128) * 128 * -(-inputs // 128) * 4)
        out = torch.full((len(a), outputs), torch.nan, dtype=torch.bfloat16)
        before = 0  # scales of each group are padded to 128 rows
        for expert, (first, last) in enumerate(parts):
            whole = -(-(last - first) // 128) * 128
            scale = scale_a.flatten()[before * per_row : (before + whole) * per_row]
            left = mx_values(F.pad(a[first:last].float(), (0, 0, 0, whole - last + first)).to(a.dtype), scale)
            out[first:last] = (left[: last - first] @ mx_values(b[expert].mT, scale_b[expert]).t()).bfloat16()
            before += whole
        return out
    assert scale_b.shape[0] >= b.shape[1] and a.shape[1] == b.shape[0] and offs[-1] <= b.shape[0]
    out = torch.full((len(offs), a.shape[0], b.shape[1]), torch.nan, dtype=torch.bfloat16)
    for expert, (first, last) in enumerate(parts):
        assert first % 128 == last % 128 == 0, "else the scales of a group would be padded"
        if first < last:
            left, right = (
                mx_values(q[:, first:last], scale.flatten()[len(q) * first // 32 : len(q) * last // 32])
                for q, scale in ((a, scale_a), (b.t(), scale_b))
            )
            out[expert] = (left @ right.t()).bfloat16()
    return out


def scaled_mm(a, b, *, scale_a, scale_recipe_a, scale_b, scale_recipe_b, output_dtype, **swizzles):
    """torch.nn.functional.scaled_mm for 1x128 by 1x128 or 128x128, and for 1x32 by 1x32."""
    (m, k), n = a.shape, b.shape[1]
    assert a.stride() == (k, 1) and b.stride() == (1, k)
    if swizzles:
        _check_mx(swizzles | {"scale_recipe_a": scale_recipe_a, "scale_recipe_b": scale_recipe_b})
        return (mx_values(a, scale_a) @ mx_values(b.t(), scale_b).t()).to(output_dtype)
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
