"""Repair of Triton's CPU interpreter.

The interpreter of triton 3.6 to 3.9 loses the carry out of the mantissa when it casts fp32 to FP8 (124.3 becomes 64
instead of 128), and truncates when it casts to bf16, so torch does these casts here as hardware does them: nearest,
ties to even, FP8 saturating. That of triton 3.6, which torch 2.11 brings, takes the bounds of a loop from arrays of one
element, which numpy 2.4 refuses.
"""

from collections.abc import Callable

import numpy as np
import torch

FORMATS = {
    "fp8e4nv": (torch.float8_e4m3fn, torch.uint8),
    "fp8e5": (torch.float8_e5m2, torch.uint8),
    "bf16": (torch.bfloat16, torch.uint16),
}
"""torch's types for a value and for its bits."""


def repair(put: Callable[[object, str, object], None] = setattr) -> None:
    """Round as hardware does. put: sets an attribute, for a test that takes it back."""
    import triton.runtime.interpreter as interpreter

    convert, patch = interpreter._convert_float, interpreter._patch_lang_tensor

    def repaired(x, source, target, rounding_mode):
        if str(target) not in FORMATS or source.primitive_bitwidth != 32:
            return convert(x, source, target, rounding_mode)
        format, bits = FORMATS[str(target)]
        values = torch.from_numpy(np.frombuffer(x.tobytes(), np.float32).copy())
        if format.itemsize == 1:
            largest = torch.finfo(format).max
            values = values.clamp(-largest, largest)
        return values.to(format).view(bits).numpy().reshape(x.shape)

    def with_bounds(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    put(interpreter, "_convert_float", repaired)
    put(interpreter, "_patch_lang_tensor", with_bounds)
