"""Builds the object that computes the model's matmuls."""

import torch

from conf.schema import Precision
from train.kernels.fp8.fp8 import Fp8Precision
from train.kernels.plain.high import HighPrecision
from train.model.operations import Kernels


def build_precision(
    precision: Precision, device: torch.device, kernels: Kernels, recompute_swiglu: bool = True
) -> HighPrecision | Fp8Precision:
    """Builds the object that computes the model's matmuls. Raises UserError if this device does not support FP8.

    recompute_swiglu: whether experts in fp32 or bf16 recompute their SwiGLU output in backward. FP8 experts always do.
    """
    if precision.fp8 is not None:
        return Fp8Precision(precision.fp8, device, kernels)
    return HighPrecision(activation_dtype(precision), kernels, recompute_swiglu)


def activation_dtype(precision: Precision) -> torch.dtype:
    """Returns the dtype of weights in matmuls, and of activations.

    Master weights and gradients are always in fp32.
    """
    return torch.float32 if precision.name == "fp32" else torch.bfloat16
