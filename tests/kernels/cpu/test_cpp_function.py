"""Which arguments a declared C++ function refuses, and which values reach it."""

import ctypes
from ctypes import c_double, c_float, c_int64
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from conf.schema import ROOT
from parallel.expert.wire import QuantizedRows
from train.kernels.cpu.cpp_function import Array, Kernel, Number, Size, Struct, Table, Threads, Zeros, rows_of_table

BF16, FP32 = torch.bfloat16, torch.float32


def kernel(returns: type | None = None, **parameters) -> Kernel:
    """One whose library tells what it was called with."""

    def function(*words: float) -> tuple:
        return words

    return Kernel(lambda: SimpleNamespace(tested=function), "tested", returns, **parameters)


@pytest.fixture(autouse=True)
def _declared(monkeypatch):
    """What is declared here is no function of the project's."""
    monkeypatch.setattr(Kernel, "declared", [])


@pytest.fixture
def rows() -> Kernel:
    return kernel(
        x=Array(BF16, "N 2*F", apart=1), gates=Array(FP32, "N", optional=True), y=Array(BF16, "*N F", out=True),
        rows=Size("N"), width=Size("2*F"), eps=Number(c_float), threads=Threads(),
    )  # fmt: skip


def test_addresses_strides_sizes_and_numbers_come_in_the_order_of_the_declaration(rows):
    x, gates, y = torch.zeros(6, 10, dtype=BF16)[:, :8], torch.zeros(6), torch.zeros(2, 3, 4, dtype=BF16)
    addresses = x.data_ptr(), gates.data_ptr(), y.data_ptr()
    threads = torch.get_num_threads()
    assert rows(x, gates, y, 0.5) == (addresses[0], 10, addresses[1], addresses[2], 6, 8, 0.5, threads)
    assert rows(torch.nn.Parameter(x), None, y, 1)[2] == 0


def test_a_struct_lies_in_memory_as_c_lays_it():
    class Settings(ctypes.Structure):
        _fields_ = [
            ("x", c_int64),
            ("row", c_int64),
            ("n", c_int64),
            ("eps", c_float),
            ("rest", c_int64),
            ("f", c_double),
        ]

    struct = Struct(x=Array(FP32, "N D", apart=1), n=Size("N"), eps=Number(c_float), rest=Zeros(1), f=Number(c_double))
    x = torch.zeros(3, 5)
    words, parts, count, last = kernel(settings=struct, parts=Table(2), last=Number(c_int64))(
        x, 0.5, 0.25, rows_of_table([(1, 2)]), 7
    )
    read = Settings.from_buffer_copy(words)
    assert (read.x, read.row, read.n, read.eps, read.rest, read.f) == (x.data_ptr(), 5, 3, 0.5, 0, 0.25)
    assert (list(parts), count, last) == ([1, 2], 1, 7)


class Elsewhere(Tensor):
    """A class of tensors."""


def plain(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


WRONG = {
    "dtype": lambda: (plain(6, 8, dtype=torch.float16), None, plain(6, 4)),
    "dtype of an optional tensor": lambda: (plain(6, 8), plain(6), plain(6, 4)),
    "rank": lambda: (plain(48), None, plain(6, 4)),
    "no axes": lambda: (plain(6, 8), plain(dtype=FP32), plain(6, 4)),
    "a size of another tensor": lambda: (plain(6, 8), plain(5, dtype=FP32), plain(6, 4)),
    "a size that follows from another": lambda: (plain(6, 9), None, plain(6, 4)),
    "a product of axes": lambda: (plain(6, 8), None, plain(2, 2, 4)),
    "strides where rows must lie side by side": lambda: (plain(8, 6).t(), None, plain(6, 4)),
    "strides of an output": lambda: (plain(6, 8), None, plain(6, 8)[:, :4]),
    "an expanded output": lambda: (plain(6, 8), None, plain(1, 4).expand(6, 4)),
    "a view of every second value": lambda: (plain(6, 8), plain(12, dtype=FP32)[::2], plain(6, 4)),
    "none in place of a tensor": lambda: (None, None, plain(6, 4)),
    "a list": lambda: ([[0.0] * 8] * 6, None, plain(6, 4)),
    "a subclass": lambda: (plain(6, 8).as_subclass(Elsewhere), None, plain(6, 4)),
    "values elsewhere": lambda: (QuantizedRows(plain(6, 8, dtype=torch.float8_e4m3fn), plain(6, 1), 1.0, BF16), None, plain(6, 4)),
    "negative values that stand as positive ones": lambda: (plain(6, 8), torch.zeros(6, dtype=torch.complex64).conj().imag, plain(6, 4)),
    "no memory where memory is to be written": lambda: (plain(6, 8).to("meta"), None, plain(6, 4)),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_another_tensor_is_refused_and_nothing_is_called(rows, wrong):
    def unreachable(*words: float) -> None:
        raise RuntimeError("called")

    rows._load = lambda: SimpleNamespace(tested=unreachable)
    with pytest.raises(AssertionError, match=r"^tested: (x|gates|y) must be a plain "):
        rows(*WRONG[wrong](), 1e-6)


def test_the_complaint_names_what_is_wrong(rows):
    with pytest.raises(AssertionError) as raised:
        rows(plain(6, 8), plain(12, dtype=FP32)[::2], plain(6, 4), 1e-6)
    assert str(raised.value) == (
        "tested: gates must be a plain float32 tensor (N), contiguous, or None with N=6, "
        "and it is Tensor torch.float32 (6,) on cpu, strides (2,)"
    )


@pytest.mark.parametrize("given", [(), (plain(6, 8), None, plain(6, 4)), (plain(6, 8), None, plain(6, 4), 1.0, 2.0)])
def test_another_number_of_arguments_is_refused(rows, given):
    with pytest.raises(AssertionError, match="arguments than it takes"):
        rows(*given)


def test_one_of_two_axes_lies_side_by_side():
    matrix = kernel(x=Array(BF16, "*E N C", apart=3, beside=2))
    for x in (plain(3, 5), plain(5, 3).t(), plain(2, 3, 5).mT, plain(1, 5).expand(4, 5), plain(0, 9)[:, ::2]):
        assert matrix(x)[1:] == (x.stride() if x.dim() == 3 else (0, *x.stride()))
    for x in (plain(3, 10)[:, ::2], plain(2, 2, 3, 5), plain(10, 6).t()[::2, ::2]):
        with pytest.raises(AssertionError, match="x must be"):
            matrix(x)


def test_the_stride_of_a_lone_value_means_nothing():
    (last,) = [plain(9, 1).as_strided((4, 1), (2, 7))]
    assert kernel(x=Array(BF16, "N D", apart=1))(last)[1:] == (2,)


def test_complex_numbers_that_stand_for_their_conjugates_are_refused():
    turned = kernel(table=Array(torch.complex64, "T R"))
    x = torch.zeros(2, 3, dtype=torch.complex64)
    assert turned(x) == (x.data_ptr(),)
    with pytest.raises(AssertionError, match="table must be"):
        turned(x.conj())


def test_a_table_is_one():
    parts = kernel(parts=Table(3))
    assert parts(rows_of_table([]))[1] == 0
    for wrong in ([1, 2, 3], rows_of_table([(1, 2)]), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(AssertionError, match="parts must be a table of 3 columns"):
            parts(wrong)


def test_on_the_meta_device_all_is_checked_and_nothing_is_called(rows):
    x, gates, y = (t.to("meta") for t in (plain(6, 8), plain(6, dtype=FP32), plain(6, 4)))

    def load() -> None:
        raise RuntimeError("loaded")

    rows._load = load
    assert rows(x, gates, y, 1e-6) is None
    assert rows(x, plain(6, dtype=FP32), y, 1e-6) is None  # a constant of a plan
    with pytest.raises(AssertionError, match="x must be"):
        rows(x, gates, plain(6, 5).to("meta"), 1e-6)
    with pytest.raises(AssertionError, match="x must be"):
        kernel(x=Array(FP32, "N"))(plain(3, dtype=FP32).to("meta"))  # what would it return?


def test_no_other_code_gives_addresses_to_c():
    for path in (path for part in ("train", "parallel", "bench") for path in (ROOT / part).rglob("*.py")):
        text = path.read_text()
        if path != ROOT / "train" / "kernels" / "cpu" / "cpp_function.py":
            assert not ("ctypes" in text and "data_ptr" in text) and "argtypes" not in text, path
