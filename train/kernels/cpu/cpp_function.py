"""The one way from tensors to compiled code: what a C++ function takes is declared once, and checked in every call.

C++ gets addresses and reads what lies there. So a `Kernel` says of every parameter, in C++'s order, what it may be: of a
tensor the dtype, the shape in named sizes, which strides C++ takes, and whether it is written. Any other tensor (elsewhere,
apart in memory, of a class that holds its values in another place) is a bug of ours: an AssertionError names function,
parameter, expectation and what came, and nothing is called. On the meta device the same is checked and nothing is called,
so that a plan sees what a run allocates.

`torch.library.custom_op` could stand here too, but it checks no strides and takes 36 us a call where this takes 5 to 10.
"""

import ctypes
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from ctypes import c_char_p, c_int64, c_void_p
from functools import cached_property
from itertools import chain
from types import CodeType
from typing import Any, Protocol

import torch
from torch import Tensor

PLAIN_CLASSES = (Tensor, torch.nn.Parameter)
"""Classes whose values lie at their address."""


class _Call:
    """What is known of a call while its arguments are taken."""

    __slots__ = ("derived", "meta", "real", "sizes")

    def __init__(self):
        self.sizes: dict[str, float] = {}
        self.derived: list[tuple[str, Array, Tensor, CodeType, int]] = []
        """Sizes that must follow from others, and what came."""
        self.meta: list[tuple[str, Array, Tensor]] = []
        """Tensors without memory."""
        self.real = False
        """Whether memory is to be written."""


class _Unfit(Exception):
    """An argument is not what is declared: name of the parameter, its declaration, what came."""


def _compiled(sizes: str) -> list[str | CodeType]:
    """Names as they are, expressions to be evaluated."""
    return [size if size.isidentifier() else compile(size, "size", "eval") for size in sizes.split()]


def _value(size: str | CodeType, sizes: dict[str, float]) -> float:
    return sizes[size] if type(size) is str else eval(size, {}, sizes)


class Parameter(Protocol):
    """One of a C++ function, or a part of its struct."""

    types: list[type]
    """Types of the words that C++ gets."""

    def take(self, name: str, given: Iterator, call: _Call) -> Iterable[Any]:
        """Those words, of the next argument that is given if there is one for it. Raises _Unfit."""


class Array:
    """A tensor: its address, then the strides of the axes that may lie apart.

    dtype: or several; the place of the one that came is then the size PARAMETER_dtype.
    sizes: of every axis a name, a number or an expression without spaces, as in "N 2*F". "*N": the product of all
    first axes, 1 if there is none.
    apart: how many axes, from the first on, may lie apart in memory. Without any the tensor is contiguous.
    beside: among so many last axes one lies side by side.
    out: it is written. optional: None may come in its place, a null pointer.
    """

    def __init__(
        self, dtype: torch.dtype | tuple[torch.dtype, ...], sizes: str, apart: int = 0, beside: int = 1,
        out: bool = False, optional: bool = False,
    ):  # fmt: skip
        self._dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
        self._text, self._many, self._sizes = sizes, sizes.startswith("*"), _compiled(sizes.removeprefix("*"))
        self._apart, self._beside, self._out, self._optional = apart, beside, out, optional
        self.types = [c_void_p, *[c_int64] * apart]

    def take(self, name: str, given: Iterator, call: _Call) -> Sequence[int]:
        x = next(given)
        if x is None and self._optional:
            call.sizes[f"{name}_dtype"] = 0  # of no meaning
            return [0] * len(self.types)
        if type(x) not in PLAIN_CLASSES or x.dtype not in self._dtypes or not self._has_values(name, x, call):
            raise _Unfit(name, self, x)
        if len(self._dtypes) > 1:
            call.sizes[f"{name}_dtype"] = self._dtypes.index(x.dtype)
        if not self._has_sizes(name, x, call):
            raise _Unfit(name, self, x)
        address = x.data_ptr() if x.is_cpu else 0
        if self._apart:
            strides = x.stride()
            if self._many and x.dim() < len(self._sizes):
                strides = (0, *strides)
            if len(strides) == len(self._sizes) and self._lies_right(x.shape, strides):
                return address, *strides[: self._apart]
        elif x.is_contiguous():
            return (address,)
        raise _Unfit(name, self, x)

    def _has_values(self, name: str, x: Tensor, call: _Call) -> bool:
        """Whether the numbers at its address are its values, or it has none."""
        if x.is_cpu:
            call.real |= self._out
            return not x.is_conj() and not x.is_neg()
        call.meta.append((name, self, x))
        return x.is_meta

    def _has_sizes(self, name: str, x: Tensor, call: _Call) -> bool:
        shape = x.shape
        if self._many:
            lead = max(0, len(shape) - len(self._sizes) + 1)
            shape = (math.prod(shape[:lead]), *shape[lead:])
        if len(shape) != len(self._sizes):
            return False
        for size, came in zip(self._sizes, shape):  # noqa: B905 - asked above
            if type(size) is CodeType:
                call.derived.append((name, self, x, size, came))
            elif call.sizes.setdefault(size, came) != came:
                return False
        return True

    def _lies_right(self, shape: Sequence[int], strides: Sequence[int]) -> bool:
        """Whether values lie side by side where they must, and none is written twice.

        The stride of a lone value means nothing.
        """
        if self._out and any(size > 1 and stride == 0 for size, stride in zip(shape, strides, strict=True)):
            return False
        return not self._beside or 1 in strides[-self._beside :] or shape[-self._beside] <= 1 or 0 in shape

    def __str__(self) -> str:
        dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in self._dtypes)
        apart = f"{self._apart} axes apart and one of the last {self._beside} side by side"
        where = apart if self._apart else "contiguous"
        return f"a plain {dtypes} tensor ({self._text}), {where}" + ", or None" * self._optional


class Number:
    """A number as it is given. Expressions of sizes may name it."""

    def __init__(self, kind: type):
        self.types = [kind]

    def take(self, name: str, given: Iterator, call: _Call) -> tuple[float]:
        call.sizes[name] = value = next(given)
        return (value,)


class Size:
    """A size of the parameters before it, or an expression of sizes. Nobody gives it."""

    def __init__(self, size: str, kind: type = c_int64):
        self.types = [kind]
        (self._size,) = _compiled(size)

    def take(self, name: str, given: Iterator, call: _Call) -> tuple[float]:
        return (_value(self._size, call.sizes),)


class Threads:
    """An argument for the number of threads: as many as torch uses. No caller gives it."""

    def __init__(self, kind: type = c_int64):
        self.types = [kind]

    def take(self, name: str, given: Iterator, call: _Call) -> tuple[int]:
        return (torch.get_num_threads(),)


class Zeros:
    """Words that the function does not look at. Nobody gives them."""

    def __init__(self, words: int):
        self.types = [c_int64] * words

    def take(self, name: str, given: Iterator, call: _Call) -> list[int]:
        return [0] * len(self.types)


class Table:
    """Rows of so many int64, as `rows_of_table` makes them: their address and their number."""

    types = [c_void_p, c_int64]

    def __init__(self, columns: int):
        self._columns = columns

    def take(self, name: str, given: Iterator, call: _Call) -> tuple[ctypes.Array, int]:
        words = next(given)
        if getattr(words, "_type_", None) is not c_int64 or len(words) % self._columns:
            raise _Unfit(name, self, words)
        return words, len(words) // self._columns

    def __str__(self) -> str:
        return f"a table of {self._columns} columns"


def rows_of_table(rows: Iterable[Iterable[int]]) -> ctypes.Array:
    """For `Table`."""
    words = list(chain.from_iterable(rows))
    return (c_int64 * len(words))(*words)


class Struct:
    """Parameters that C++ takes together, by one address."""

    types = [c_char_p]

    def __init__(self, **parts: Parameter):
        self._parts = list(parts.items())
        kinds = chain.from_iterable(part.types for part in parts.values())
        self._layout = struct.Struct("@" + "".join(kind._type_ for kind in kinds))  # aligned as C++ does

    def take(self, name: str, given: Iterator, call: _Call) -> tuple[bytes]:
        return (self._layout.pack(*_words(self._parts, given, call)),)


def _words(parameters: list[tuple[str, Parameter]], given: Iterator, call: _Call) -> list:
    words = []
    for name, parameter in parameters:
        words += parameter.take(name, given, call)
    return words


class Kernel:
    """One C++ function, called with what its parameters need, in their order."""

    declared: list["Kernel"] = []
    """All of this process."""

    def __init__(
        self, load: Callable[[], ctypes.CDLL], name: str, returns: type | None = None, **parameters: Parameter
    ):
        """load: the library, at the first call. parameters: those of C++, in its order."""
        self.name, self._load, self._returns, self._parameters = name, load, returns, list(parameters.items())
        Kernel.declared.append(self)

    def __call__(self, *given: Any) -> Any:
        """What C++ returns, or None on the meta device. Raises AssertionError where an argument is not as declared."""
        call, values = _Call(), iter(given)
        try:
            words = _words(self._parameters, values, call)
            for name, parameter, x, size, came in call.derived:
                if _value(size, call.sizes) != came:
                    raise _Unfit(name, parameter, x)
            if call.meta and (call.real or not any(array._out for _, array, _ in call.meta)):
                raise _Unfit(*call.meta[0])
        except _Unfit as unfit:
            name, parameter, came = unfit.args
            raise AssertionError(self._complaint(name, parameter, came, call.sizes)) from None
        except StopIteration:
            raise AssertionError(f"{self.name} got fewer arguments than it takes") from None
        assert next(values, call) is call, f"{self.name} got more arguments than it takes"
        return None if call.meta else self._function(*words)

    @cached_property
    def _function(self) -> Callable:
        function = getattr(self._load(), self.name)
        function.argtypes = list(chain.from_iterable(parameter.types for _, parameter in self._parameters))
        function.restype = self._returns
        return function

    def _complaint(self, name: str, parameter: Parameter, came: Any, sizes: dict[str, float]) -> str:
        if isinstance(came, Tensor):
            lies = f"strides {came.stride()}" if came.layout is torch.strided else came.layout
            came = f"{type(came).__name__} {came.dtype} {tuple(came.shape)} on {came.device}, {lies}"
        known = ", ".join(f"{size}={value}" for size, value in sizes.items())
        return f"{self.name}: {name} must be {parameter} with {known or 'no sizes known yet'}, and it is {came}"
