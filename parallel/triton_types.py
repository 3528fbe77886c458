"""What a checker of types has to know of Triton's kernels. The module needs triton.

Parameters of a kernel have no types of Python's: Triton takes them from the arguments of a launch. One that it compiles into
the kernel it knows by the word `constexpr`, to its interpreter a word as it stands in the source, and by its own annotations
such an argument would have to be one, where a launch gives a plain number. The options of a launch are in no signature.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, cast

import triton.language as tl

Parameters = ParamSpec("Parameters")
constexpr = Any if TYPE_CHECKING else tl.constexpr


def with_options(launch: Callable[Parameters, None], **options: int) -> Callable[Parameters, None]:
    """`kernel[grid]` with options of Triton, such as num_warps."""
    return partial(cast("Callable[..., None]", launch), **options)


def power_of_2_from(count: int) -> int:
    """The smallest power of 2 that is not below the count, which is at least 1. Triton's own takes the host as long as a launch."""
    return 1 << (count - 1).bit_length()
