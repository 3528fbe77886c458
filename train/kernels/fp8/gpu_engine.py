"""The engine of a GPU that a recipe asks for: Hopper's where scales are those of tiles of 128, Blackwell's where they are those of 32."""

import importlib
from types import ModuleType

from torch.nn import functional as F

from conf.schema import Fp8
from train.kernels.fp8.blackwell import BlackwellEngine, ScaledGroupedProducts
from train.kernels.fp8.grouped_products import DeepGemmProducts, TritonProducts, load_deep_gemm
from train.kernels.fp8.hopper import HopperEngine, check_gpu_operands, has_mx_tiles, needs_deep_gemm
from train.kernels.fp8.installed import require_fit


def load_gpu_engine(fp8: Fp8) -> HopperEngine:
    """The engine of this GPU. Raises UserError for what it lacks."""
    check_gpu_operands(fp8)
    mx = has_mx_tiles(fp8)
    require_fit(deep_gemm=False, mx=mx)
    kernels = _triton_module("quantize")
    if mx:
        grouped = F.scaled_grouped_mm  # pyrefly: ignore[missing-attribute]  torch's own stubs have only scaled_mm
        return BlackwellEngine(kernels, ScaledGroupedProducts(grouped))
    if needs_deep_gemm(fp8):
        return HopperEngine(kernels, DeepGemmProducts(load_deep_gemm()))
    return HopperEngine(kernels, TritonProducts(_triton_module("products")))


def _triton_module(name: str) -> ModuleType:
    """Kernels that need triton, imported once it is known to be there."""
    return importlib.import_module(f"train.kernels.fp8.triton_{name}")
