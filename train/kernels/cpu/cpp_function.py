"""Calls compiled C++ functions with tensors.

`torch.library.custom_op` is not used: a call would take 36 us instead of 5 to 10 us, and would not check strides.

A C++ function gets addresses and cannot check the memory. So a `Kernel` declares every parameter, in the C++ order, and
checks every call. A tensor that does not match is a bug in Sluice: another device, other strides, or a class that
stores its values elsewhere. The call then raises an AssertionError. On the meta device, a call only checks.
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
"""Tensor classes that store their values at the address data_ptr()."""


class _Call:
    """State of a call while its arguments are processed."""

    __slots__ = ("derived", "meta", "real", "sizes")

    def __init__(self):
        self.sizes: dict[str, float] = {}
        self.derived: list[tuple[str, Array, Tensor, CodeType, int]] = []
        """Axes whose size is an expression: parameter name, declaration, tensor, expression, actual size."""
        self.meta: list[tuple[str, Array, Tensor]] = []
        """Tensors on the meta device, which have no memory."""
        self.real = False
        """Whether the call writes to a tensor that is not meta."""


class _Unfit(Exception):
    """Raised for a wrong argument: parameter name, declaration, argument."""


def _compiled(sizes: str) -> list[str | CodeType]:
    """Splits declared sizes at spaces, and compiles each expression."""
    return [size if size.isidentifier() else compile(size, "size", "eval") for size in sizes.split()]


def _value(size: str | CodeType, sizes: dict[str, float]) -> float:
    return sizes[size] if type(size) is str else eval(size, {}, sizes)


class Parameter(Protocol):
    """A parameter of a C++ function or a struct's field."""

    types: list[type]
    """The ctypes types of the C++ arguments that this parameter becomes."""

    def take(self, name: str, given: Iterator, call: _Call) -> Iterable[Any]:
        """Returns the C++ arguments for this parameter. If the caller passes the parameter, its value is the next in
        `given`.

        Raises _Unfit if the value does not match.
        """


class Array:
    """A tensor parameter. The C++ function gets the tensor's address, and then the strides of its leading axes.

    - dtype: the allowed dtype, or a tuple of them. With a tuple, PARAMETER_dtype in sizes is the index of the actual
      dtype.
    - sizes: for each axis a name, a number or an expression without spaces, as in "N 2*F". "*N" means the product of
      all leading axes; it is 1 if there are none.
    - apart: number of leading axes that may have any stride. With 0 the tensor must be contiguous.
    - beside: a number n. One of the last n axes must have stride 1.
    - out: whether the C++ function writes to the tensor.
    - optional: whether the argument may be None, which becomes a null pointer.
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
            call.sizes[f"{name}_dtype"] = 0  # any number, because C++ does not read it without a tensor
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
        """Returns whether x is a meta tensor, or a CPU tensor that is no conjugate or negated view."""
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
        for size, came in zip(self._sizes, shape):  # noqa: B905 - checked above
            if type(size) is CodeType:
                call.derived.append((name, self, x, size, came))
            elif call.sizes.setdefault(size, came) != came:
                return False
        return True

    def _lies_right(self, shape: Sequence[int], strides: Sequence[int]) -> bool:
        """Returns whether one of the last `beside` axes has stride 1, and no axis that C++ writes has stride 0.

        Axes of size 1 do not matter.
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
    """A parameter that is a number. Size expressions may contain the parameter's name."""

    def __init__(self, kind: type):
        self.types = [kind]

    def take(self, name: str, given: Iterator, call: _Call) -> tuple[float]:
        call.sizes[name] = value = next(given)
        return (value,)


class Size:
    """A parameter computed from the sizes of earlier tensors. Callers of the `Kernel` do not pass it."""

    def __init__(self, size: str, kind: type = c_int64):
        self.types = [kind]
        (self._size,) = _compiled(size)

    def take(self, name: str, given: Iterator, call: _Call) -> tuple[float]:
        return (_value(self._size, call.sizes),)


class Threads:
    """A parameter whose value is torch's number of threads. Callers of the `Kernel` do not pass it."""

    def __init__(self, kind: type = c_int64):
        self.types = [kind]

    def take(self, name: str, given: Iterator, call: _Call) -> tuple[int]:
        return (torch.get_num_threads(),)


class Zeros:
    """`words` parameters that C++ ignores. They are always 0, and callers of the `Kernel` do not pass them."""

    def __init__(self, words: int):
        self.types = [c_int64] * words

    def take(self, name: str, given: Iterator, call: _Call) -> list[int]:
        return [0] * len(self.types)


class Table:
    """A parameter that is a table from `rows_of_table`. C++ gets the table's address and number of rows."""

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
    """Returns the rows as one int64 array for a `Table` parameter."""
    words = list(chain.from_iterable(rows))
    return (c_int64 * len(words))(*words)


class Struct:
    """Parameters that are fields of a C++ struct, passed by address."""

    types = [c_char_p]

    def __init__(self, **parts: Parameter):
        self._parts = list(parts.items())
        kinds = chain.from_iterable(part.types for part in parts.values())
        self._layout = struct.Struct("@" + "".join(kind._type_ for kind in kinds))  # "@" aligns the fields as C++ does

    def take(self, name: str, given: Iterator, call: _Call) -> tuple[bytes]:
        return (self._layout.pack(*_words(self._parts, given, call)),)


def _words(parameters: list[tuple[str, Parameter]], given: Iterator, call: _Call) -> list:
    words = []
    for name, parameter in parameters:
        words += parameter.take(name, given, call)
    return words


class Kernel:
    """A C++ function, called with the arguments in the declared order."""

    declared: list["Kernel"] = []
    """All kernels that this process has declared."""

    def __init__(
        self, load: Callable[[], ctypes.CDLL], name: str, returns: type | None = None, **parameters: Parameter
    ):
        """load: function that returns the library. parameters: declarations in C++ order."""
        self.name, self._load, self._returns, self._parameters = name, load, returns, list(parameters.items())
        Kernel.declared.append(self)

    def __call__(self, *given: Any) -> Any:
        """Calls the C++ function and returns its result. On the meta device, only checks the arguments.

        Raises AssertionError if an argument does not match its declaration.
        """
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
