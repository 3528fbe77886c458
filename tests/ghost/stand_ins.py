"""DeepGEMM on the ghost. It compiles at the first call, with nvcc, and its products need a GPU's answers; so they are counted here.

tests/precision/fakes.py checks the layouts of its arguments and computes the products, on the CPU.
"""

from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_leaves

from tests.ghost.log import note_kernel
from train.precision import hopper


def install() -> None:
    """Give every FP8 engine that is built from now on these products."""
    hopper.load_deep_gemm = lambda: SimpleNamespace(
        m_grouped_fp8_gemm_nt_contiguous=lambda *args, **options: _product("m_grouped_fp8_gemm", args),
        k_grouped_fp8_gemm_nt_contiguous=lambda *args, **options: _product("k_grouped_fp8_gemm", args),
    )


def _product(name: str, args: tuple) -> None:
    for tensor in tree_leaves(args):
        if isinstance(tensor, torch.Tensor):
            assert tensor.is_cuda, f"{name}: {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
    note_kernel(name)
