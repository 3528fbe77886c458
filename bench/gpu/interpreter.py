"""Repairs Triton's CPU interpreter.

The interpreter of triton 3.6 to 3.9 loses the carry out of the mantissa when it casts fp32 to FP8 (124.3 becomes 64
instead of 128), and truncates when it casts to bf16. So torch does these casts here as hardware does them: nearest,
ties to even, FP8 saturating. The interpreter multiplies the bits of bf16 matrices as if they were values, so they are
widened before. It rejects inline assembly; an empty assembly, which only enforces an order, here returns its argument.
The interpreter of triton 3.6, which torch 2.11 brings, takes loop bounds from arrays of one element, which numpy 2.4
rejects.

Half of its time goes into three habits that change no result and are removed here. It prepares Triton's language anew
for every call of a function. It checks whole numbers for overflow and drops the answer (it asserts only with its option
`debug`). It builds a table of numpy's types to look up one type.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

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
    dot = interpreter.InterpreterBuilder.create_dot

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

    def with_values(builder, a, b, *rest):
        return dot(builder, widened(a), widened(b), *rest)

    def with_nothing(builder, assembly, constraints, values, *rest):
        assert not assembly, "assembly is not interpreted"
        return SimpleNamespace(get_result=values.__getitem__)

    numpy_type = cache(interpreter._get_np_dtype)

    def numpy_type_of(type):
        return np.dtype(np.uint64) if type.scalar.is_ptr() else numpy_type(type.scalar)

    def prepared(function):
        return SimpleNamespace(restore=lambda: None)

    put(interpreter, "_convert_float", repaired)
    put(interpreter.InterpreterBuilder, "create_inline_asm", with_nothing)
    put(interpreter.InterpreterBuilder, "create_dot", with_values)
    put(interpreter, "_patch_lang_tensor", with_bounds)
    put(interpreter, "_get_np_dtype", numpy_type_of)
    builder = interpreter.interpreter_builder
    put(builder, "options", replace(builder.options, sanitize_overflow=builder.options.debug))
    # once for all functions, by either of the names under which their files know the language
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": interpreter.tl, "core": interpreter.tl.core}))
    put(interpreter, "_patch_lang", prepared)


def widened(operand):
    """A matrix of the interpreter's, in fp32 if it is bf16."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if str(operand.dtype.scalar) != "bf16":
        return operand
    bits = np.ascontiguousarray(operand.data).view(np.uint16).astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)
