"""Triton kernels of attention over chosen keys. train/model/chosen_attention.py has the formulas.

Each program gathers latents of one query's keys into shared memory and multiplies them there. So global memory never
contains gathered latents, but only the attention probabilities of a block of queries.

Operands of matmuls are in the dtype of the queries. Sums are in fp32, and one program computes each sum. The module
needs triton.

Shapes as in train/kernels/plain/plain_chosen.py; W weights of each key: one for each head; in backward two for each
head.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.triton_types import constexpr, power_of_2_from, quick, with_options


@triton.jit
def _rows(ptr, row, real, rank: constexpr, width: constexpr, R: constexpr, E: constexpr):
    """Loads the latent part and the rope part of rows; 0 for rows that are not `real`."""
    c, e, at = tl.arange(0, R)[None, :], tl.arange(0, E)[None, :], ptr + row[:, None] * width
    latent = tl.load(at + c, real[:, None] & (c < rank), 0.0)
    return latent, tl.load(at + rank + e, real[:, None] & (e < width - rank), 0.0)


@triton.jit
def _chosen(latents_ptr, chosen_ptr, key, keys, rank: constexpr, width: constexpr, R: constexpr, E: constexpr):
    """Returns whether each chosen key exists, and the latent and rope parts of its row."""
    number = tl.load(chosen_ptr + key, key < keys, -1)
    latent, rope = _rows(latents_ptr, number, number >= 0, rank, width, R, E)
    return number >= 0, latent, rope


@triton.jit
def _products(a, a_rope, b, b_rope):
    return tl.dot(a_rope, tl.trans(b_rope), tl.dot(a, tl.trans(b), input_precision="ieee"), input_precision="ieee")


@quick
@triton.jit
def _chosen_lse_kernel(
    q_ptr, latents_ptr, chosen_ptr, lse_ptr, largest_ptr, heads, keys, scale,
    rank: constexpr, width: constexpr, R: constexpr, E: constexpr, H: constexpr, K: constexpr,
):  # fmt: skip
    query, head = tl.program_id(1).to(tl.int64), tl.program_id(0) * H + tl.arange(0, H)
    q, q_rope = _rows(q_ptr + query * heads * width, head, head < heads, rank, width, R, E)
    most, total = tl.full((H,), -float("inf"), tl.float32), tl.zeros((H,), tl.float32)
    for first in range(0, keys, K):
        key = first + tl.arange(0, K)
        there, latent, rope = _chosen(latents_ptr, chosen_ptr + query * keys, key, keys, rank, width, R, E)
        scores = tl.where(there[None, :], _products(q, q_rope, latent, rope) * scale, -float("inf"))
        now = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(now == -float("inf"), 0.0, now)  # no key so far
        total = total * tl.exp(most - base) + tl.sum(tl.exp(scores - base[:, None]), 1)
        most = now
    tl.store(lse_ptr + query * heads + head, most + tl.log(tl.where(total > 0, total, 1.0)), head < heads)
    tl.store(largest_ptr + query * heads + head, most, head < heads)


@quick
@triton.jit
def _chosen_weights_kernel(
    q_ptr, latents_ptr, chosen_ptr, lse_ptr, mean_ptr, weights_ptr, shares_ptr, heads, keys, scale,
    gradients: constexpr, rank: constexpr, width: constexpr, R: constexpr, E: constexpr, H: constexpr, K: constexpr,
):  # fmt: skip
    query, key = tl.program_id(1).to(tl.int64), tl.program_id(0) * K + tl.arange(0, K)
    there, latent, rope = _chosen(latents_ptr, chosen_ptr + query * keys, key, keys, rank, width, R, E)
    rows, shares = 2 * heads if gradients else heads, tl.zeros((K,), tl.float32)
    for first in range(0, heads, H):
        head = first + tl.arange(0, H)
        real, at = head < heads, weights_ptr + query * keys * rows + (key[:, None] * rows + head[None, :])
        q, q_rope = _rows(q_ptr + query * rows * width, head, real, rank, width, R, E)
        lse = tl.load(lse_ptr + query * heads + head, real, float("inf"))
        p = tl.exp(_products(latent, rope, q, q_rope) * scale - lse[None, :])
        p, here = tl.where(there[:, None], p, 0.0), (key < keys)[:, None] & real[None, :]
        tl.store(at + (rows - heads), p.to(q.dtype), here)
        if gradients:
            du, _ = _rows(q_ptr + query * rows * width, heads + head, real, rank, width, R, E)
            mean = tl.load(mean_ptr + query * heads + head, real, 0.0)
            ds = p * (tl.dot(latent, tl.trans(du), input_precision="ieee") - mean[None, :]) * scale
            tl.store(at, ds.to(q.dtype), here)
        else:
            shares += tl.sum(p, 1)
    if not gradients:
        tl.store(shares_ptr + query * keys + key, shares / heads, key < keys)


@quick
@triton.jit
def _chosen_sums_kernel(
    weights_ptr, latents_ptr, chosen_ptr, out_ptr, rows, keys,
    rank: constexpr, width: constexpr, R: constexpr, E: constexpr, H: constexpr, K: constexpr,
):  # fmt: skip
    query, row = tl.program_id(1).to(tl.int64), tl.program_id(0) * H + tl.arange(0, H)
    c, e, real = tl.arange(0, R)[None, :], tl.arange(0, E)[None, :], (row < rows)[:, None]
    out, out_rope = tl.zeros((H, R), tl.float32), tl.zeros((H, E), tl.float32)
    for first in range(0, keys, K):
        key = first + tl.arange(0, K)
        _, latent, rope = _chosen(latents_ptr, chosen_ptr + query * keys, key, keys, rank, width, R, E)
        at = weights_ptr + query * keys * rows + (key[:, None] * rows + row[None, :])
        weights = tl.trans(tl.load(at, (key < keys)[:, None] & (row < rows)[None, :], 0.0))
        out = tl.dot(weights, latent, out, input_precision="ieee")
        out_rope = tl.dot(weights, rope, out_rope, input_precision="ieee")
    at = out_ptr + query * rows * width + row[:, None] * width
    tl.store(at + c, out.to(latents_ptr.dtype.element_ty), real & (c < rank))
    tl.store(at + rank + e, out_rope.to(latents_ptr.dtype.element_ty), real & (e < width - rank))


def log_sums(
    q_CHX: Tensor, latents_SX: Tensor, chosen_CK: Tensor, lse_CH: Tensor, largest_CH: Tensor, rank: int, scale: float
) -> None:
    """Writes log-sum-exps and the largest of the scaled scores."""
    tensors = q_CHX, latents_SX, chosen_CK, lse_CH, largest_CH
    _launch(_chosen_lse_kernel, tensors, q_CHX.size(1), (scale,), (), rank, 64)


def weights(
    rows_CWX: Tensor,
    latents_SX: Tensor,
    chosen_CK: Tensor,
    lse_CH: Tensor,
    mean_CH: Tensor | None,
    weights_CKW: Tensor,
    shares_CK: Tensor | None,
    rank: int,
    scale: float,
) -> None:
    """Writes attention probabilities p and their means over heads. If `mean_CH` is given, writes along the axis W first
    ds of all heads, then p of all heads.

    rows_CWX: q; with `mean_CH`, q and then du (`PlainChosen.attend_backward`).
    """
    tensors = (
        lse_CH,
        lse_CH if mean_CH is None else mean_CH,
        weights_CKW,
        weights_CKW if shares_CK is None else shares_CK,
    )
    heads, gradients = lse_CH.size(1), mean_CH is not None
    _launch(
        _chosen_weights_kernel, (rows_CWX, latents_SX, chosen_CK, *tensors), heads, (scale,), (gradients,), rank, 32
    )


def sum_latents(weights_CKW: Tensor, latents_SX: Tensor, chosen_CK: Tensor, out_CWX: Tensor, rank: int) -> None:
    """Writes the sums of latents, each multiplied by its weight."""
    _launch(_chosen_sums_kernel, (weights_CKW, latents_SX, chosen_CK, out_CWX), weights_CKW.size(2), (), (), rank, 64)


def _launch(
    kernel: Any, tensors: tuple[Tensor, ...], heads: int, numbers: tuple, constants: tuple, rank: int, block: int
) -> None:
    """Launches a kernel. block: largest number of heads in a block; Hopper multiplies 64 rows at a time."""
    (queries, keys), (positions, width) = tensors[2].shape, tensors[1].shape
    large = tensors[0].dtype != torch.bfloat16 or rank > 512  # rows of which 64 do not fit into shared memory twice
    assert positions * width < 2**31, "places of latents are 32 bits wide"
    assert all(one.is_contiguous() for one in tensors[3:]), "results and numbers of each head are contiguous"
    H, K = (16, 16) if large else (min(block, max(16, power_of_2_from(heads))), 64)
    sizes = (max(16, power_of_2_from(one)) for one in (rank, width - rank))
    parts = triton.cdiv(keys, K) if kernel is _chosen_weights_kernel else triton.cdiv(heads, H)
    last = heads, keys, *numbers, *constants, rank, width, *sizes, H, K
    with_options(kernel[parts, queries], num_warps=8, num_stages=1 if large else 2)(
        *(one.contiguous() for one in tensors[:3]), *tensors[3:], *last
    )
