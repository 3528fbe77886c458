"""Compile the FP8 kernels for sm_90 without a GPU: triton brings the assembler."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from train.precision import triton_kernels as kernels

POINTERS = {
    "q_ptr": "*fp8e4nv",
    "scale_ptr": "*fp32",
    "in_scale_ptr": "*fp32",
    "gates_ptr": "*fp32",
    "dgates_ptr": "*fp32",
    "base_ptr": "*i64",
    "stride_ptr": "*i64",
}
"""Types of the pointer arguments; all others are bf16, or FP8 where the input is quantised already."""
CAST = {"maximum": 448.0, "floor": 1e-4, "pow2": False}
VARIANTS = (
    (kernels._tiles_kernel, CAST | {"scaled": False, "block": kernels.ROWS}),
    (kernels._tiles_kernel, CAST | {"scaled": True, "block": kernels.ROWS}),
    (kernels._columns_kernel, CAST | {"scaled": False, "block": kernels.COLUMNS}),
    (kernels._columns_kernel, CAST | {"scaled": True, "block": kernels.COLUMNS}),
    (kernels._blocks_kernel, CAST | {"transposed": False}),
    (kernels._blocks_kernel, CAST | {"transposed": True}),
    (kernels._swiglu_kernel, CAST | {"block": kernels.ROWS}),
    (kernels._swiglu_backward_kernel, {"scaled": False, "block": kernels.ROWS}),
    (kernels._swiglu_backward_kernel, {"scaled": True, "block": kernels.ROWS}),
)


def compile_all() -> dict[str, int]:
    """Bytes of the binary of every variant, by name."""
    target = GPUTarget("cuda", 90, 32)
    sizes = {}
    for kernel, constants in VARIANTS:
        source = ASTSource(kernel, _signature(kernel, constants), constants)
        binary = triton.compile(source, target=target).asm["cubin"]
        flags = ", ".join(name for name in ("scaled", "transposed") if constants.get(name))
        sizes[kernel.__name__.strip("_") + (f" ({flags})" if flags else "")] = len(binary)
    return sizes


def _signature(kernel: triton.JITFunction, constants: dict) -> dict[str, str]:
    quantised = "*fp8e4nv" if constants.get("scaled") else "*bf16"
    types = {"x_ptr": quantised, "h_ptr": quantised, "da_ptr": "*bf16", "a_ptr": "*bf16", "dh_ptr": "*bf16"} | POINTERS
    return {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
