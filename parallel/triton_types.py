"""Types of Triton's kernels for a type checker, and a launch that takes less host time.

Triton recognises compile-time parameters by the text of the annotation, `constexpr`. With Triton's own class, a type
checker would reject plain numbers in a launch. So this module defines another `constexpr`.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import torch
import triton.language as tl
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

Parameters = ParamSpec("Parameters")
_Launched = TypeVar("_Launched")
constexpr = Any if TYPE_CHECKING else tl.constexpr
COMPILED: list[str] = []
"""Kernels that this process compiled or read from Triton's cache."""


def _note_compiled(*, repr: str, **_: Any) -> None:
    COMPILED.append(repr)


if knobs.runtime.jit_post_compile_hook is None:  # if other code has set a hook, it stays in place
    knobs.runtime.jit_post_compile_hook = _note_compiled


class QuickKernel:
    """A kernel that is launched like Triton's own, `kernel[grid](...)`, in half the host time.

    Triton compiles a kernel again for each combination of these properties of its arguments:

        tensor: its dtype, and whether 16 divides its address
        number: its type, whether 16 divides it, and whether it is 1. In `do_not_specialize`: only its type
        constants and options: their values

    This class computes a key from these properties, and reuses the kernel of the key's first launch. Parameters must be
    in this order: tensors (names end in _ptr), numbers, constants.
    """

    def __init__(self, kernel: JITFunction):
        self.kernel, self._found = kernel, dict[tuple, Any]()
        self._tensors = sum(name.endswith("_ptr") for name in kernel.arg_names)
        self._constants = len(kernel.arg_names) - len(kernel.constexprs)
        numbers = kernel.params[self._tensors : self._constants]
        self._kinds = [_width_of if number.do_not_specialize else _kind_of for number in numbers]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *args: Any, **options: int) -> None:
        tensors, addresses = args[: self._tensors], 0
        for one in tensors:
            addresses |= one.data_ptr()
        if addresses % 16 or _watched(knobs.runtime.launch_enter_hook) or _watched(knobs.runtime.launch_exit_hook):
            self.kernel[grid](*args, **options)
            return
        device, given = args[0].get_device(), args[self._tensors : self._constants]
        numbers = [kind(number) for kind, number in zip(self._kinds, given, strict=True)]
        key = device, *[one.dtype for one in tensors], *numbers, *args[self._constants :], *options.items()
        found = self._found.get(key)
        if found is None:
            self._found[key] = self.kernel[grid](*args, **options)
            return
        x, y, z = (*grid, 1, 1)[:3]
        stream = cast("Any", driver.active).get_current_stream(device)
        found.run(x, y, z, stream, found.function, found.packed_metadata, None, None, None, *args)


def quick(kernel: _Launched) -> _Launched:
    """Return a `QuickKernel` if this file knows the GPU's specialisation rules, else the kernel."""
    known = isinstance(kernel, JITFunction) and torch.version.hip is None
    return cast("_Launched", QuickKernel(kernel)) if known else kernel


def _watched(hook: Any) -> bool:
    """Whether this launch hook of Triton is set: a function, a chain of functions (with `calls`), or None if unset."""
    return bool(getattr(hook, "calls", hook))


@lru_cache(1 << 14, typed=True)
def _kind_of(number: float) -> tuple:
    """Return the properties of a number for which Triton specialises."""
    if not isinstance(number, int):
        return (type(number),)
    return type(number), number == 1, number % 16 == 0, -(2**31) <= number < 2**31, number < 2**63


def _width_of(number: int) -> bool:
    """Return whether an integer in `do_not_specialize` fits into 32 bits."""
    return number < 2**31


def with_options(launch: Callable[Parameters, None], **options: int) -> Callable[Parameters, None]:
    """Return `kernel[grid]` with Triton options, such as num_warps."""
    return partial(cast("Callable[..., None]", launch), **options)


def power_of_2_from(count: int) -> int:
    """Return the smallest power of 2 that is at least `count` and at least 1, fast."""
    return 1 << (count - 1).bit_length()
