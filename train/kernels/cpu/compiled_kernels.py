"""The kernels of a CPU with AVX2: bf16 operations in compiled code (train/kernels/cpu), others in torch.

Shapes as in train/model/operations.py. On the meta device, the functions create the same tensors as in a run, so
mode=plan can count their memory.
"""

import torch
from torch import Tensor

from train.kernels.cpu import compiled_matmuls, compiled_rows
from train.kernels.cpu.compiled_attention import CompiledAttention
from train.kernels.cpu.libraries import LIBRARY_NAMES
from train.kernels.plain.plain_kernels import PlainKernels
from train.model.operations import ExpertGroups
from train.model.weight_gradient import LinearMatmul


class CompiledKernels(PlainKernels):
    """Implements `Kernels` in compiled code.

    matmuls: whether to compile matmuls too (`train.kernels.cpu.libraries.compiled_matmuls_pay`).
    """

    def __init__(self, matmuls: bool):
        self._matmuls = matmuls
        self.core = CompiledAttention()
        self.parts = tuple(name for name in LIBRARY_NAMES if matmuls or name != "products")

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        kernel = compiled_rows.rms_norm if _in_bf16(x, weight_D) else super().rms_norm
        return kernel(x, weight_D, eps)

    def rms_norm_backward(
        self, grad: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor, x_needed: bool, weight_needed: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        kernel = compiled_rows.rms_norm_backward if _in_bf16(x, weight_D) else super().rms_norm_backward
        return kernel(grad, x, weight_D, rstd, x_needed, weight_needed)

    def swiglu(self, h_N2F: Tensor, gates_N: Tensor | None) -> Tensor:
        kernel = compiled_rows.swiglu if _in_bf16(h_N2F) else super().swiglu
        return kernel(h_N2F, gates_N)

    def swiglu_backward(self, grad_NF: Tensor, h_N2F: Tensor, gates_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
        kernel = compiled_rows.swiglu_backward if _in_bf16(h_N2F) else super().swiglu_backward
        return kernel(grad_NF, h_N2F, gates_N)

    def to_heads(
        self, q_BTHQ: Tensor, kv_BTHX: Tensor, k_rope_BTR: Tensor, table: Tensor, nope: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not _in_bf16(q_BTHQ, kv_BTHX, k_rope_BTR):
            return super().to_heads(q_BTHQ, kv_BTHX, k_rope_BTR, table, nope)
        return compiled_rows.CompiledHeads.apply(q_BTHQ, kv_BTHX, k_rope_BTR, table, nope)

    def sort_by_expert(self, expert_ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return compiled_rows.sort_by_expert(expert_ids_TK, experts)

    def best_keys(self, scores_TS: Tensor, top_k: int) -> Tensor:
        kernel = (
            compiled_rows.largest_keys if scores_TS.dtype == torch.float32 else super().best_keys
        )  # the scores of mode=prove are in fp64
        return kernel(scores_TS, top_k)

    def cross_entropy(self, logits_NV: Tensor, targets_N: Tensor, scale: float | None) -> Tensor:
        kernel = compiled_rows.cross_entropy_of_logits if _in_bf16(logits_NV) else super().cross_entropy
        return kernel(logits_NV, targets_N, scale)

    def linear(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        if not self.compiles_matmul(x, weight_OI):
            return super().linear(x, weight_OI)
        return LinearMatmul.apply(x, weight_OI, self)

    def matmul(self, left_OC: Tensor, right_NC: Tensor, dtype: torch.dtype, into_ON: Tensor | None = None) -> Tensor:
        kernel = compiled_matmuls.matmul if self.compiles_matmul(left_OC, right_NC) else super().matmul
        return kernel(left_OC, right_NC, dtype, into_ON)

    def grouped_matmul(self, x_RI: Tensor, weight_EIO: Tensor, groups: ExpertGroups) -> Tensor:
        if not self.compiles_matmul(x_RI, weight_EIO):
            return super().grouped_matmul(x_RI, weight_EIO, groups)
        assert isinstance(groups, list)
        return compiled_matmuls.grouped(x_RI, weight_EIO.mT, groups)

    def grouped_weight_gradient(
        self, grad_RO: Tensor, x_RI: Tensor, groups: ExpertGroups, dtype: torch.dtype, into_EOI: Tensor | None = None
    ) -> Tensor:
        if not self.compiles_matmul(grad_RO, x_RI):
            return super().grouped_weight_gradient(grad_RO, x_RI, groups, dtype, into_EOI)
        assert isinstance(groups, list)
        return compiled_matmuls.grouped_weight_gradient(grad_RO.t(), x_RI.t(), groups, dtype, into_EOI)

    def compiles_matmul(self, *tensors: Tensor) -> bool:
        return self._matmuls and _in_bf16(*tensors)


def _in_bf16(*tensors: Tensor) -> bool:
    return all(t.dtype == torch.bfloat16 for t in tensors)
