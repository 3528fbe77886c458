"""FP8 matmuls for the model: DeepSeek-V3's mixed precision (paper 3.3).

Embedding, output head, router, norms and the attention core compute in bf16 or fp32. Scales come from the current
values. So an FP8 run can resume from a bf16 checkpoint, and a bf16 run from an FP8 checkpoint.

Shape suffixes: R rows sorted by expert, D width, F inner width, E experts.
"""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conf.schema import Fp8
from train.kernels.cpu.cpp_build import has_avx2
from train.kernels.fp8.blackwell import BlackwellEngine, ScaledGroupedMatmuls
from train.kernels.fp8.cast_rules import build_rules
from train.kernels.fp8.compiled_casts import CompiledCasts, load_casts
from train.kernels.fp8.compiled_engine import CompiledEngine, need_compiled
from train.kernels.fp8.cpu_engine import CpuEngine
from train.kernels.fp8.engines import Fp8Engine, HeldWeights, pack_sources, unpack_sources
from train.kernels.fp8.health import HealthWatch, Report
from train.kernels.fp8.hopper import (
    DeepGemmMatmuls,
    HopperEngine,
    TritonMatmuls,
    check_gpu_operands,
    has_mx_tiles,
    load_deep_gemm,
    needs_deep_gemm,
)
from train.kernels.fp8.installed import require_fit
from train.kernels.fp8.linear import expert_ffn, keep, linear
from train.model.layers import AddedMatmul, HeldInput
from train.model.operations import Kernels


class Fp8Precision:
    """Implements the protocol `train.model.layers.LayerPrecision` with FP8 matmuls."""

    dtype = torch.bfloat16
    """Dtype of activations between the matmuls."""

    def __init__(
        self,
        fp8: Fp8,
        device: torch.device,
        kernels: Kernels,
        engine: Fp8Engine | None = None,
        making: Callable[[], AbstractContextManager] = nullcontext,
    ):
        """Raises UserError if the device lacks something that its engine needs.

        engine: None for the device's default engine. making: see `HeldWeights`.
        """
        self.kernels = kernels
        self._rules = build_rules(fp8)
        self._health = HealthWatch(fp8.health.every)
        if engine is None and device.type == "cuda":
            engine = load_gpu_engine(fp8)
        self._engine: Fp8Engine = engine or cpu_engine(fp8, kernels)
        self.weights = HeldWeights(self._engine, making)

    def linear(self, x: Tensor, weight: Tensor, kind: str = "dense", held: HeldInput | None = None) -> Tensor:
        """Multiplies x (..., K) by the transposed weight (N, K). kind: `output` for attention's output, or `dense`."""
        rules = getattr(self._rules, kind)
        return linear(x, weight, self.weights, rules, self._health.probe(weight), held)

    def hold(self, x: Tensor, kind: str) -> HeldInput | None:
        """Returns x as `linear` saves it for backward; None without gradients."""
        rules = getattr(self._rules, kind)
        if not torch.is_grad_enabled():
            return None
        kept = keep(x.detach().reshape(-1, x.shape[-1]), self._engine, rules)
        (tensors, forms), shape = pack_sources(kept), x.shape

        def values(*tensors: Tensor) -> Tensor:
            (source,) = unpack_sources(tensors, forms)
            return self._engine.values(source).reshape(shape)

        return HeldInput(kept, tensors, values)

    def expert_ffn(
        self,
        rows_RD: Tensor,
        gates_R: Tensor,
        w13_E2FD: Tensor,
        w2_EDF: Tensor,
        counts_E: Tensor,
        added: tuple[AddedMatmul | None, AddedMatmul | None] = (None, None),
    ) -> Tensor:
        """Computes every expert's SwiGLU FFN for its rows. Returns (R, D)."""
        up, down = self._health.probe(w13_E2FD), self._health.probe(w2_EDF)
        probes = (up, down) if up is not None and down is not None else None
        both = w13_E2FD, w2_EDF
        return expert_ffn(rows_RD, gates_R, both, counts_E, self.weights, self._rules, probes, added, self.kernels)

    def watch(self, model: nn.Module) -> None:
        """Store the names of the model's layers, for health readings."""
        self._health.name(model.named_parameters())

    def start_step(self, step: int, hold_weights: bool = False) -> None:
        """Start a step. Every `precision.fp8.health.every` steps, the matmuls are checked.

        hold_weights: whether to cast each weight only once. Then no weight may change before `end_passes`.
        """
        self._health.start_step(step)
        if hold_weights:
            self.weights.hold()

    def end_passes(self) -> None:
        """Drop the stored casts of weights, before the optimizer changes them."""
        self.weights.drop()

    def health(self) -> Report:
        """Returns the step's metrics and warnings; empty for an unchecked step."""
        return self._health.report()


def cpu_engine(fp8: Fp8, kernels: Kernels, meta: bool = False) -> CpuEngine:
    """Returns the engine that emulates FP8 on a CPU.

    Raises UserError if compiled code is requested and cannot be loaded.

    kernels: compute the matmuls of operands without scales.
    meta: whether mode=plan builds the engine; then no compiled code runs.
    """
    if not fp8.compiled:
        return CpuEngine()
    casts = CompiledCasts() if meta else load_casts()
    if not has_avx2():
        return CpuEngine(casts)
    if not meta:
        need_compiled()
    return CompiledEngine(casts, kernels)


def load_gpu_engine(fp8: Fp8) -> HopperEngine:
    """Returns the GPU engine of a recipe: `BlackwellEngine` for 1x32 tiles, else `HopperEngine`.

    Raises UserError if the GPU or the installed software lacks something that the engine needs.
    """
    check_gpu_operands(fp8)
    mx = has_mx_tiles(fp8)
    require_fit(deep_gemm=False, mx=mx)
    casts = _triton_module("quantize")
    if mx:
        grouped = F.scaled_grouped_mm  # pyrefly: ignore[missing-attribute]  torch's type stubs have only scaled_mm
        return BlackwellEngine(casts, ScaledGroupedMatmuls(grouped))
    if needs_deep_gemm(fp8):
        return HopperEngine(casts, DeepGemmMatmuls(load_deep_gemm()))
    return HopperEngine(casts, TritonMatmuls(_triton_module("matmuls")))


def _triton_module(name: str) -> ModuleType:
    """Imports a module with Triton kernels, which needs triton."""
    return importlib.import_module(f"train.kernels.fp8.triton_{name}")
