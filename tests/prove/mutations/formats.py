"""FP8 formats, and tensors that are stored in them for backward; in the recipe's own precision, on one rank."""

from dataclasses import replace

import torch

from tests.prove.mutations.fp8 import ATTENTION, EXPERTS, LOW, MADE, WEIGHTS, with_cast_rules, with_operands, with_rules
from tests.prove.mutations.registry import BACKWARD, FORWARD, OURS, mutation
from tests.prove.mutations.seams import Seams
from train.kernels.fp8 import swiglu
from train.kernels.fp8.cast_rules import CastRules
from train.kernels.fp8.compiled_casts import CompiledCasts
from train.kernels.fp8.compiled_engine import CompiledEngine
from train.kernels.fp8.engines import RoundedTensor
from train.kernels.fp8.formats import E4M3, E5M2, E5M6, TILE, Cast
from train.kernels.fp8.quantize import QuantizedTensor, dequantize

# --- Formats and caches -----------------------------------------------------------------------------------------------


@mutation("NVIDIA/TransformerEngine#3342 is about it: gradients in E5M2", "fp8", BACKWARD, "gradient", LOW)
def gradients_in_e5m2(bug: Seams) -> None:
    with_rules(bug, lambda text, floor: (text.replace("e4m3", "e5m2") if floor < 1e-6 else text, floor))


@mutation(OURS + ": what is kept in FP8 loses its last bit", "fp8", BACKWARD, WEIGHTS, LOW)
def bytes_lose_their_last_bit(bug: Seams) -> None:
    def split(original, self, x, cast):
        if isinstance(x, QuantizedTensor) and x.q.dtype == torch.float8_e4m3fn:
            x = replace(x, q=(x.q.view(torch.uint8) & 0xFE).view(torch.float8_e4m3fn))
        return original(self, x, cast)

    bug.around(CompiledCasts, "split", split)


@mutation(OURS + ": SwiGLU's input is kept in E5M2", "fp8", BACKWARD, EXPERTS, LOW)
def swiglu_kept_in_e5m2(bug: Seams) -> None:
    with_cast_rules(bug, lambda made: replace(made, swiglu=replace(made.swiglu, format=E5M2)))


@mutation(OURS + ": attention's output is kept in E4M3", "fp8", BACKWARD, ATTENTION, LOW)
def attention_output_kept_in_e4m3(bug: Seams) -> None:
    def change(made: CastRules) -> CastRules:
        return replace(made, output=replace(made.output, cache=Cast(E4M3, (1, TILE), True, 1e-4)))

    with_cast_rules(bug, change)


@mutation(OURS + ": the two values of three bytes change places", "fp8", BACKWARD, ATTENTION, LOW)
def halves_of_e5m6_change_places(bug: Seams) -> None:
    def keep(original, self, x_MK, cast):
        return original(self, x_MK.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if cast.format is E5M6 else x_MK, cast)

    bug.around(CompiledEngine, "keep", keep)


@mutation(OURS + ": the recomputed output of SwiGLU lacks the gate", "fp8", BACKWARD, EXPERTS, LOW)
def recomputed_swiglu_without_the_gate(bug: Seams) -> None:
    def backward(original, h_P2F, gates_P, da_PF):
        a_PF, *rest = original(h_P2F, gates_P, da_PF)
        return (a_PF / gates_P.clamp_min(1e-6).unsqueeze(1)).to(a_PF.dtype), *rest

    bug.around(swiglu, "backward", backward)


@mutation(OURS + ": products fall back to bf16 in silence", "fp8", FORWARD, MADE, LOW)
def products_in_bf16(bug: Seams) -> None:
    def change(make, source, rule, transposed):
        x = dequantize(source) if isinstance(source, QuantizedTensor) else source
        x = x.values if isinstance(x, RoundedTensor) else x
        return x.bfloat16().mT if transposed else x.bfloat16()

    with_operands(bug, change)
