"""Triton kernels of sparse attention for all pairs of query and key: the scores of an indexer (train/model/indexer.py has
the formula), and the mean of the attention probabilities over the heads, which an indexer learns to predict.

Each program computes one tile of queries and keys, for all heads, so the products of the heads stay in registers. The
module needs triton.

Shapes as in train/model/indexer.py; C queries of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.triton_types import constexpr, with_options

M, N = 64, 128
"""Number of queries and number of keys of a tile."""


@triton.jit
def _index_scores_kernel(
    q_ptr, k_ptr, w_ptr, out_ptr, queries, keys, q_c, q_h, k_s, w_c, heads, width,
    I: constexpr, M: constexpr, N: constexpr,
):  # fmt: skip
    query = tl.program_id(0) * M + tl.arange(0, M)
    key = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    column = tl.arange(0, I)
    real, seen, inside = query < queries, key < keys, column < width
    k = tl.load(k_ptr + key[None, :] * k_s + column[:, None], seen[None, :] & inside[:, None], 0.0)
    total = tl.zeros((M, N), tl.float32)
    for head in range(heads):
        q = tl.load(q_ptr + query[:, None] * q_c + head * q_h + column[None, :], real[:, None] & inside[None, :], 0.0)
        w = tl.load(w_ptr + query * w_c + head, real, 0.0)
        total += tl.maximum(tl.dot(q, k, input_precision="ieee"), 0.0) * w[:, None]
    tl.store(out_ptr + query[:, None].to(tl.int64) * keys + key[None, :], total, real[:, None] & seen[None, :])


@triton.jit
def _mean_attention_kernel(
    q_ptr, k_ptr, lse_ptr, out_ptr, queries, keys, q_h, q_c, k_h, k_s, lse_h, heads, width, scale,
    Q: constexpr, M: constexpr, N: constexpr,
):  # fmt: skip
    query = tl.program_id(0) * M + tl.arange(0, M)
    key = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    column = tl.arange(0, Q)
    real, seen, inside = query < queries, key < keys, column < width
    q_at = q_ptr + query[:, None] * q_c + column[None, :]
    k_at = k_ptr + key[None, :] * k_s + column[:, None]
    lse_at = lse_ptr + query
    total = tl.zeros((M, N), tl.float32)
    for _ in range(heads):
        q = tl.load(q_at, real[:, None] & inside[None, :], 0.0)
        k = tl.load(k_at, seen[None, :] & inside[:, None], 0.0)
        lse = tl.load(lse_at, real, 0.0)
        total += tl.exp(tl.dot(q, k, input_precision="ieee") * scale - lse[:, None])
        q_at, k_at, lse_at = q_at + q_h, k_at + k_h, lse_at + lse_h
    out_at = out_ptr + query[:, None].to(tl.int64) * keys + key[None, :]
    tl.store(out_at, total / heads, real[:, None] & seen[None, :])


def fused_mean_attention(q_HCQ: Tensor, k_HSQ: Tensor, lse_HC: Tensor, scale: float) -> Tensor:
    """Returns the attention probabilities of all pairs, averaged over the heads: fp32 (C, S).

    lse_HC: log-sum-exp of each query's scaled scores over its visible keys; the result is valid only for these keys
    """
    q_HCQ, k_HSQ, lse_HC = (t if t.stride(-1) == 1 else t.contiguous() for t in (q_HCQ, k_HSQ, lse_HC))
    (heads, queries, width), keys = q_HCQ.shape, k_HSQ.size(1)
    out_CS = torch.empty(queries, keys, dtype=torch.float32, device=q_HCQ.device)
    if not out_CS.numel():
        return out_CS
    grid = triton.cdiv(queries, M), triton.cdiv(keys, N)
    with_options(_mean_attention_kernel[grid], num_warps=8, num_stages=1)(
        q_HCQ, k_HSQ, lse_HC, out_CS, queries, keys, q_HCQ.stride(0), q_HCQ.stride(1), k_HSQ.stride(0), k_HSQ.stride(1),
        lse_HC.stride(0), heads, width, scale, max(16, triton.next_power_of_2(width)), M, N,
    )  # fmt: skip
    return out_CS


def fused_index_scores(q_CHI: Tensor, k_SI: Tensor, w_CH: Tensor) -> Tensor:
    """Returns the scores I of one sequence, fp32 (C, S)."""
    q_CHI, k_SI, w_CH = (t if t.stride(-1) == 1 else t.contiguous() for t in (q_CHI, k_SI, w_CH))
    (queries, heads, width), keys = q_CHI.shape, len(k_SI)
    out_CS = torch.empty(queries, keys, dtype=torch.float32, device=q_CHI.device)
    if not out_CS.numel():
        return out_CS
    _index_scores_kernel[triton.cdiv(queries, M), triton.cdiv(keys, N)](
        q_CHI, k_SI, w_CH, out_CS, queries, keys, q_CHI.stride(0), q_CHI.stride(1), k_SI.stride(0), w_CH.stride(0),
        heads, width, max(16, triton.next_power_of_2(width)), M, N,
    )  # fmt: skip
    return out_CS
