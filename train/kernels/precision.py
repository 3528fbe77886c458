"""From the precision section to the object that the model asks for its products."""

import torch

from conf.schema import Precision
from train.kernels.fp8.fp8 import Fp8Precision
from train.kernels.plain.high import HighPrecision
from train.model.operations import Kernels


def build_precision(
    precision: Precision, device: torch.device, kernels: Kernels, recompute_swiglu: bool = True
) -> HighPrecision | Fp8Precision:
    """The products of a checked section on this device. Raises UserError where the device lacks what FP8 needs.

    kernels: what the model computes with on this device, see train/kernels/choice.py. recompute_swiglu: whether experts in fp32 or
    bf16 make their SwiGLU output again in backward; FP8 always does.
    """
    if precision.fp8 is not None:
        return Fp8Precision(precision.fp8, device, kernels)
    return HighPrecision(activation_dtype(precision), kernels, recompute_swiglu)


def activation_dtype(precision: Precision) -> torch.dtype:
    """Format of weights and of activations between the products; master weights and gradients are fp32 in all."""
    return torch.float32 if precision.name == "fp32" else torch.bfloat16
