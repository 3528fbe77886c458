"""Compiles every Triton kernel for GPUs that this machine lacks, as a run on them compiles it."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: the extra dev brings it on Linux")
tl = triton.language

from bench import compile_kernels  # noqa: E402


@triton.jit
def _transposed(x_ptr, y_ptr, start_ptr, KNOWN: tl.constexpr):
    """Stores 128 x 32 bytes column by column, at a place that is read from memory."""
    start = tl.load(start_ptr)
    if KNOWN:
        start = tl.multiple_of(start, 128)
    rows, columns = tl.arange(0, 128), tl.arange(0, 32)
    x = tl.load(x_ptr + rows[:, None] * 32 + columns[None, :])
    tl.store(y_ptr + start + columns[:, None] * 128 + rows[None, :], tl.trans(x))


@triton.jit
def _crowded(x_ptr, y_ptr):
    """Needs more values at a time than a thread has registers."""
    places = tl.arange(0, 32768)
    x = tl.load(x_ptr + places)
    for _ in range(3):
        x += tl.sum(x, 0) * x
    tl.store(y_ptr + places, x)


def compiled(kernel, *args, **options) -> compile_kernels.Binary:
    with compile_kernels.compiling(90) as found:
        kernel[(1,)](*args, **options)
    return compile_kernels._read(found, 90)[0]


def test_the_loop_that_multiplies_is_the_shortest_way_back():
    program = [
        ("0000", "LDC R1, c[0x0][0x28] ;"),
        ("0010", "LDS R2, [R1] ;"),
        ("0020", "@P0 BRA 0x10 ;"),
        ("0030", "QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4] ;"),
        ("0040", "FFMA R3, R4, R5, R3 ;"),
        ("0050", "@!P0 BRA 0x30 ;"),
        ("0060", "BRA 0x0 ;"),
        ("0070", "BRA 0x80 ;"),
        ("0080", "EXIT ;"),
    ]
    assert compile_kernels._loop(program) == 3
    assert compile_kernels._loop([(address, text.replace("QGMMA", "FADD")) for address, text in program]) == 0


@pytest.mark.slow
def test_the_gate_sees_stores_of_single_bytes_and_spills():
    x, start = torch.empty(4096, dtype=torch.uint8), torch.empty(1, dtype=torch.int64)
    assert compiled(_transposed, x, x, start, KNOWN=False).problem.startswith("stores single bytes")
    known = compiled(_transposed, x, x, start, KNOWN=True)
    assert known.problem is None and set(known.stores) == {128} and known.registers > 0
    wide = torch.empty(32768)
    assert compiled(_crowded, wide, wide).problem.startswith("spills")


@pytest.mark.slow
def test_no_kernel_spills_registers_or_stores_single_bytes():
    found = compile_kernels.compile_all()
    assert {architecture for _, architecture in found} == {90, 100}
    problems = {name: binary.problem for name, binary in found.items() if binary.problem}
    assert not problems, "\n".join(compile_kernels.table(found))
    for name in compile_kernels.products_of():
        assert found[name, 90].matmuls.keys() == {"QGMMA"} and found[name, 100].matmuls.keys() == {"UTCQMMA"}
