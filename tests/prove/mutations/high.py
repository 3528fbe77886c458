"""Computations that stay in bf16 or above while matmuls are in FP8: attention, router, norms, head. In the recipe's own
precision, on one rank."""

import torch
from torch import Tensor, nn

from tests.prove.mutations.fp8 import ATTENTION, EXPERTS, LOW
from tests.prove.mutations.registry import BACKWARD, FORWARD, OURS, mutation
from tests.prove.mutations.seams import Seams
from train.kernels.cpu.compiled_attention import CompiledAttention
from train.kernels.cpu.compiled_kernels import CompiledKernels
from train.kernels.plain.high import HighPrecision
from train.kernels.plain.plain_kernels import PlainKernels
from train.model import deepseek


@mutation(OURS + ": the output head in FP8", "fp8", FORWARD, "head|loss", LOW)
def head_in_fp8(bug: Seams) -> None:
    def rounded(x: Tensor) -> Tensor:
        return x + (x.detach().to(torch.float8_e4m3fn).to(x.dtype) - x.detach())

    def cross_entropy(original, hidden_ND, head_VD, *rest):
        return original(rounded(hidden_ND), rounded(head_VD), *rest)

    bug.around(deepseek, "cross_entropy", cross_entropy)


@mutation(OURS + ": the router's product in bf16", "bf16", FORWARD, "gates|router|chosen", LOW)
def router_in_bf16(bug: Seams) -> None:
    def logits(_, self, x_ND, weight_ED):
        return nn.functional.linear(x_ND.bfloat16(), weight_ED.bfloat16()).float()

    bug.around(PlainKernels, "logits", logits)


@mutation(OURS + ": the scale of attention 3 % off", "bf16", FORWARD, ATTENTION, LOW)
def attention_scale_3_percent_off(bug: Seams) -> None:
    def forward(original, self, given, *rest, **keywords):
        return original(self, given._replace(scale=1.03 * given.scale), *rest, **keywords)

    bug.around(CompiledAttention, "forward", forward)


@mutation(OURS + ": attention's backward takes the scale of another width", "bf16", BACKWARD, ATTENTION, LOW)
def attention_backward_scale_5_percent_off(bug: Seams) -> None:
    def backward(original, self, dout_BHTV, given, made):
        return original(self, dout_BHTV, given._replace(scale=1.05 * given.scale), made)

    bug.around(CompiledAttention, "backward", backward)


@mutation(OURS + ": sums of norms in bf16", "bf16", FORWARD, "norm", LOW)
def norms_in_bf16(bug: Seams) -> None:
    def rms_norm(original, self, x, weight_D, eps):
        _, rstd = original(self, x, weight_D, eps)
        return (x * rstd.bfloat16() * weight_D).bfloat16(), rstd

    bug.around(CompiledKernels, "rms_norm", rms_norm)


@mutation(OURS + ": experts' gates are applied after the cast to bf16, twice", "bf16", FORWARD, EXPERTS, LOW)
def gates_of_experts_squared(bug: Seams) -> None:
    def expert_ffn(original, self, rows_RD, gates_R, *rest):
        return original(self, rows_RD, gates_R * gates_R, *rest)

    bug.around(HighPrecision, "expert_ffn", expert_ffn)
