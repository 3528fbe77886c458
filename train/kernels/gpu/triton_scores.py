"""Computes the largest score of each query on a GPU with a Triton kernel.

Attention kernels return only the log-sum-exp, which is never less than the largest score. If a block's log-sum-exps are
all at most a limit, this kernel returns them instead, without reading queries and keys. The module needs triton.

Shapes: B sequences, H heads, T queries, S keys, Q qk width; M queries and N keys of a block, D columns at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.triton_types import constexpr
from train.model.attention import AttentionInput
from train.model.sequence import Rectangle

M, N, D = 64, 64, 64


@triton.jit
def _largest_kernel(
    q_ptr, k_ptr, lse_ptr, seen_ptr, out_ptr,
    q_b, q_h, q_t, k_b, k_h, k_s, seen_b, heads, queries, scale, limit,
    Q: constexpr, M: constexpr, N: constexpr, D: constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)  # from 87,382 positions on, offsets in q and k exceed 32 bits
    sequence, head = row // heads, row % heads
    query = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    real = query < queries
    out_at = row * queries + query
    bound = tl.load(lse_ptr + out_at, real, -float("inf"))
    if tl.max(bound, 0) <= limit:
        tl.store(out_ptr + out_at, bound, real)
        return
    first = tl.load(seen_ptr + sequence * seen_b + query * 2, real, 0)
    last = tl.load(seen_ptr + sequence * seen_b + query * 2 + 1, real, 0)
    nothing = 2147483647
    start = tl.min(tl.where(last > first, first, nothing), 0)
    most = tl.full((M,), -float("inf"), tl.float32)
    for key_0 in range(start // N * N, last.max(0), N):
        key = tl.cast(key_0, tl.int64) + tl.arange(0, N)
        scores = tl.zeros((M, N), tl.float32)
        for column_0 in tl.static_range(0, Q, D):
            column = column_0 + tl.arange(0, D)
            q = tl.load(
                q_ptr + sequence * q_b + head * q_h + query[:, None] * q_t + column[None, :],
                real[:, None] & (column < Q)[None, :], 0.0,
            )  # fmt: skip
            k = tl.load(
                k_ptr + sequence * k_b + head * k_h + key[None, :] * k_s + column[:, None],
                (key < tl.max(last, 0))[None, :] & (column < Q)[:, None], 0.0,
            )  # fmt: skip
            scores = tl.dot(q, k, scores, input_precision="ieee")
        sees = (key[None, :] >= first[:, None]) & (key[None, :] < last[:, None])
        most = tl.maximum(most, tl.max(tl.where(sees, scores * scale, -float("inf")), 1))
    tl.store(out_ptr + out_at, most, real)


def largest_scores(given: AttentionInput, lse_BHT: Tensor, limit: float) -> Tensor:
    """Returns the largest scaled score of each query: (B, H, T), fp32.

    If all log-sum-exps of a block of queries are at most `limit`, they are returned instead.
    """
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in given[:2])
    batch, heads, queries, width = q.shape
    seen = given.seen.once(_seen_by_query, batch, queries, q.device)
    out = torch.empty_like(lse_BHT, memory_format=torch.contiguous_format)
    (q_b, q_h, q_t, _), (k_b, k_h, k_s, _) = q.stride(), k.stride()
    _largest_kernel[-(-queries // M), batch * heads](
        q, k, lse_BHT.contiguous(), seen, out, q_b, q_h, q_t, k_b, k_h, k_s, seen.stride(0), heads, queries,
        given.scale, limit, width, M, N, D,
    )  # fmt: skip
    return out


def _seen_by_query(rectangles: list[Rectangle], batch: int, queries: int, device: torch.device) -> Tensor:
    """Returns the start and end of the keys that each query sees: int32 (B, T, 2)."""
    seen = torch.zeros(batch, queries, 2, dtype=torch.int32)
    for sequence, first_query, last_query, first_key, last_key, before in rectangles:
        rows = slice(None) if sequence is None else slice(sequence, sequence + 1)
        after = first_key + before + 1 + torch.arange(last_query - first_query)
        seen[rows, first_query:last_query, 0] = first_key
        seen[rows, first_query:last_query, 1] = after.clamp(max=last_key).int()
    return (seen.pin_memory() if device.type == "cuda" else seen).to(device, non_blocking=True)
