"""Computes SwiGLU and the split into heads on a GPU with Triton kernels, each in one pass over memory.

The arithmetic is in fp32, and only the result is rounded. Differences to train/kernels/plain/plain_kernels.py come from
the last bit of exp, the order of the sum over heads, and fused multiply-adds.

liger-kernel's SwiGLU is not used: it cannot multiply by the router's gate value, and overwrites the saved [gate | up].
torch.compile is not used: it would recompile for each row count of the experts.

The module needs triton; train/kernels/gpu/fused_rows.py allocates the outputs. Shapes as in train/model/operations.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from parallel.triton_types import constexpr, power_of_2_from, quick

SWIGLU_ROWS, SWIGLU_COLUMNS = 4, 512
"""Number of rows and number of columns that a SwiGLU program processes at a time. Each thread reads 128 bits."""
HEAD_POSITIONS = 16
"""Number of positions that a program of `heads` processes, for one head."""
BACKWARD_TOKENS = 8
"""Number of positions that a program of `heads_backward` processes, for all heads."""


@quick
@triton.jit(do_not_specialize=["rows_N"])
def _swiglu_kernel(
    h_ptr, gates_ptr, out_ptr, rows_N, width,
    gated: constexpr, SWIGLU_ROWS: constexpr, SWIGLU_COLUMNS: constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * SWIGLU_ROWS + tl.arange(0, SWIGLU_ROWS)
    columns = tl.program_id(1) * SWIGLU_COLUMNS + tl.arange(0, SWIGLU_COLUMNS)
    there = (rows < rows_N)[:, None] & (columns < width)[None, :]
    place = rows[:, None].to(tl.int64) * (2 * width) + columns[None, :]
    gate = tl.load(h_ptr + place, there, 0.0).to(tl.float32)
    up = tl.load(h_ptr + place + width, there, 0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    if gated:
        out *= tl.load(gates_ptr + rows, rows < rows_N, 0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + rows[:, None].to(tl.int64) * width + columns[None, :], out, there)


@quick
@triton.jit(do_not_specialize=["rows_N"])
def _swiglu_backward_kernel(
    grad_ptr, h_ptr, gates_ptr, dh_ptr, dgates_ptr, rows_N, width,
    gated: constexpr, SWIGLU_ROWS: constexpr, SWIGLU_COLUMNS: constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * SWIGLU_ROWS + tl.arange(0, SWIGLU_ROWS)
    total = tl.zeros((SWIGLU_ROWS,), tl.float32)
    for start in range(0, width, SWIGLU_COLUMNS):
        columns = start + tl.arange(0, SWIGLU_COLUMNS)
        there = (rows < rows_N)[:, None] & (columns < width)[None, :]
        place = rows[:, None].to(tl.int64) * (2 * width) + columns[None, :]
        gate = tl.load(h_ptr + place, there, 0.0).to(tl.float32)
        up = tl.load(h_ptr + place + width, there, 0.0).to(tl.float32)
        grad = tl.load(grad_ptr + rows[:, None].to(tl.int64) * width + columns[None, :], there, 0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        dup, dsilu = gate * sigmoid * grad, grad * up
        if gated:
            total += tl.sum(dup * up, axis=1)
            gates = tl.load(gates_ptr + rows, rows < rows_N, 0.0).to(tl.float32)[:, None]
            dup *= gates
            dsilu *= gates
        tl.store(dh_ptr + place, dsilu * sigmoid * (1.0 + gate * (1.0 - sigmoid)), there)
        tl.store(dh_ptr + place + width, dup, there)
    if gated:
        tl.store(dgates_ptr + rows, total, rows < rows_N)


@triton.jit
def _turned(pairs_ptr, place, there, table_ptr, table_place, table_there, ROPE: constexpr, back: constexpr):
    """Load a block (tokens, ROPE), and apply `_times_table`."""
    pairs = tl.load(pairs_ptr + place, there, 0.0).to(tl.float32)
    return _times_table(pairs, table_ptr, table_place, table_there, ROPE, back)


@triton.jit
def _times_table(pairs, table_ptr, table_place, table_there, ROPE: constexpr, back: constexpr):
    """Multiply adjacent pairs by the table's complex rotation factors, or if `back` by their conjugates; fp32."""
    rows: constexpr = pairs.shape[0]
    real, imaginary = tl.split(tl.reshape(pairs, (rows, ROPE // 2, 2)))
    table = tl.load(table_ptr + table_place, table_there, 0.0)
    cosine, sine = tl.split(tl.reshape(table, (rows, ROPE // 2, 2)))
    if back:
        sine = -sine
    turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
    return tl.reshape(turned, (rows, ROPE))


@quick
@triton.jit
def _heads_kernel(
    q_ptr, kv_ptr, shared_ptr, table_ptr, k_ptr, length, heads, shared_row,
    nope: constexpr, rope: constexpr, kv_row: constexpr,
    NOPE: constexpr, ROPE: constexpr, HEAD_POSITIONS: constexpr,
):  # fmt: skip
    """Processes HEAD_POSITIONS positions of one head.

    q_ptr: the queries' rope part, rotated in place, in rows of nope + rope elements.
    """
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(0) * HEAD_POSITIONS + tl.arange(0, HEAD_POSITIONS)
    real = (tokens < length)[:, None]
    row = (batch * length + tokens[:, None]) * heads + head
    n, r = tl.arange(0, NOPE)[None, :], tl.arange(0, ROPE)[None, :]
    plain, turned = real & (n < nope), real & (r < rope)
    table_place = tokens[:, None] * rope + r
    place = row * (nope + rope) + r
    rotated = _turned(q_ptr, place, turned, table_ptr, table_place, turned, ROPE, False)
    tl.debug_barrier()  # all threads must have read before a thread writes
    tl.store(q_ptr + place, rotated, turned)
    tl.store(k_ptr + row * (nope + rope) + n, tl.load(kv_ptr + row * kv_row + n, plain), plain)
    shared = (batch * length + tokens[:, None]) * shared_row + r
    rotated = _turned(shared_ptr, shared, turned, table_ptr, table_place, turned, ROPE, False)
    tl.store(k_ptr + place + nope, rotated, turned)


@quick
@triton.jit
def _heads_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, table_ptr, dq_out_ptr, dkv_out_ptr, dshared_ptr, length, heads,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    nope: constexpr, rope: constexpr, value: constexpr,
    NOPE: constexpr, ROPE: constexpr, VALUE: constexpr, HEAD_POSITIONS: constexpr,
):  # fmt: skip
    """Processes all heads of some positions, and sums the shared rope key's gradient over the heads in order."""
    batch = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * HEAD_POSITIONS + tl.arange(0, HEAD_POSITIONS)
    places = tokens[:, None].to(tl.int64)
    real = (tokens < length)[:, None]
    n, r, v = (tl.arange(0, NOPE)[None, :], tl.arange(0, ROPE)[None, :], tl.arange(0, VALUE)[None, :])
    plain, turned, valued = real & (n < nope), real & (r < rope), real & (v < value)
    table_place = tokens[:, None] * rope + r
    total = tl.zeros((HEAD_POSITIONS, ROPE), tl.float32)
    dq_ptr += batch * q_batch + places * q_token
    dk_ptr += batch * k_batch + places * k_token
    dv_ptr += batch * v_batch + places * v_token
    made = (batch * length + places) * heads
    for head in range(heads):
        tl.store(dq_out_ptr + (made + head) * (nope + rope) + n, tl.load(dq_ptr + n, plain), plain)
        rotated = _turned(dq_ptr, nope + r, turned, table_ptr, table_place, turned, ROPE, True)
        tl.store(dq_out_ptr + (made + head) * (nope + rope) + nope + r, rotated, turned)
        tl.store(dkv_out_ptr + (made + head) * (nope + value) + n, tl.load(dk_ptr + n, plain), plain)
        tl.store(dkv_out_ptr + (made + head) * (nope + value) + nope + v, tl.load(dv_ptr + v, valued), valued)
        total += tl.load(dk_ptr + nope + r, turned, 0.0).to(tl.float32)
        dq_ptr += q_head
        dk_ptr += k_head
        dv_ptr += v_head
    dshared = _times_table(total, table_ptr, table_place, turned, ROPE, True)
    tl.store(dshared_ptr + (batch * length + places) * rope + r, dshared, turned)


def swiglu(h_N2F: Tensor, gates_N: Tensor | None, out_NF: Tensor) -> None:
    """Writes silu(gate) * up to out_NF, times each row's gate value if given. All tensors are contiguous."""
    rows, width = out_NF.shape
    gates = h_N2F if gates_N is None else gates_N
    grid = -(-rows // SWIGLU_ROWS), -(-width // SWIGLU_COLUMNS)
    _swiglu_kernel[grid](h_N2F, gates, out_NF, rows, width, gates_N is not None, SWIGLU_ROWS, SWIGLU_COLUMNS)


def swiglu_backward(
    grad_NF: Tensor, h_N2F: Tensor, gates_N: Tensor | None, dh_N2F: Tensor, dgates_N: Tensor | None
) -> None:
    """Writes the gradients of h and of the gate values. All tensors are contiguous."""
    rows, width = grad_NF.shape
    gates, dgates = (h_N2F, dh_N2F) if gates_N is None else (gates_N, dgates_N)
    _swiglu_backward_kernel[(-(-rows // SWIGLU_ROWS),)](
        grad_NF, h_N2F, gates, dh_N2F, dgates, rows, width, gates_N is not None, SWIGLU_ROWS, SWIGLU_COLUMNS
    )


def heads(q_rope_BTHR: Tensor, k_nope_BTHN: Tensor, k_rope_BTR: Tensor, table: Tensor, k_BTHQ: Tensor) -> None:
    """Rotates the rope part of the queries in place, and writes the keys. Queries and keys are contiguous.

    k_nope_BTHN: the first elements of contiguous rows.
    k_rope_BTR: evenly spaced rows.
    table: the complex rotation factors as real numbers (T, R/2, 2).
    """
    B, T, H, _ = k_BTHQ.shape
    nope, rope = k_nope_BTHN.size(3), k_rope_BTR.size(2)
    _heads_kernel[(-(-T // HEAD_POSITIONS), H, B)](
        q_rope_BTHR, k_nope_BTHN, k_rope_BTR, table, k_BTHQ, T, H, k_rope_BTR.stride(1),
        nope, rope, k_nope_BTHN.stride(2), power_of_2_from(nope), power_of_2_from(rope), HEAD_POSITIONS,
    )  # fmt: skip


def heads_backward(
    dq_BHTQ: Tensor,
    dk_BHTQ: Tensor,
    dv_BHTV: Tensor,
    table: Tensor,
    dq_BTHQ: Tensor,
    dkv_BTHX: Tensor,
    dk_rope_BTR: Tensor,
) -> None:
    """Writes the gradients of q, kv and the rope key, from gradients with a contiguous last axis."""
    B, H, T, Q = dq_BHTQ.shape
    sizes = Q - dk_rope_BTR.size(2), dk_rope_BTR.size(2), dv_BHTV.size(3)
    nope, rope, value = map(power_of_2_from, sizes)
    (qb, qh, qt, _), (kb, kh, kt, _), (vb, vh, vt, _) = dq_BHTQ.stride(), dk_BHTQ.stride(), dv_BHTV.stride()
    _heads_backward_kernel[(-(-T // BACKWARD_TOKENS), B)](
        dq_BHTQ, dk_BHTQ, dv_BHTV, table, dq_BTHQ, dkv_BTHX, dk_rope_BTR, T, H,
        qb, qh, qt, kb, kh, kt, vb, vh, vt, *sizes, nope, rope, value, BACKWARD_TOKENS,
    )  # fmt: skip
