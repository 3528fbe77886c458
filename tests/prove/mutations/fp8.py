"""Matmuls in FP8 and bf16: casts, scales, caches, and what stays in higher precision. All run in the recipe's own
precision, on one rank."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tests.prove.mutations.registry import BACKWARD, FORWARD, OURS, mutation
from tests.prove.mutations.seams import Seams
from train.kernels.fp8 import cast_rules, fp8, linear
from train.kernels.fp8.cast_rules import CastRules, OperandRule
from train.kernels.fp8.compiled_casts import CompiledCasts
from train.kernels.fp8.compiled_engine import CompiledEngine
from train.kernels.fp8.groups import PaddedGroups
from train.kernels.fp8.quantize import QuantizedTensor, fitted
from train.kernels.plain.plain_kernels import added

LOW = "recipe"
WEIGHTS = "gradients of (single )?weights"
ATTENTION, EXPERTS, MADE = "attention", "moe|experts", "outputs|matmuls"
"""Parts that certificates name; what a part made, in the last."""


def with_operands(bug: Seams, change: Callable[..., Tensor | QuantizedTensor]) -> None:
    """change(make, source, rule, transposed) in the place of the engine's operands."""

    def operand(original, self, source, rule, transposed=False, groups=None):
        def make(source=source, rule=rule) -> Tensor | QuantizedTensor:
            return original(self, source, rule, transposed, groups)

        return change(make, source, rule, transposed)

    bug.around(CompiledEngine, "operand", operand)


def is_weight(rule: OperandRule) -> bool:
    """Whether an operand with this rule is a weight."""
    return rule.granularity == "128x128"


def with_cast_rules(bug: Seams, change: Callable[[CastRules], CastRules]) -> None:
    bug.around(fp8, "build_rules", lambda original, section: change(original(section)))


def with_rules(bug: Seams, change: Callable[[str, float], tuple[str, float]]) -> None:
    """change(text, floor) before an operand's rule is made of them."""
    bug.around(cast_rules, "parse_rule", lambda original, text, floor: original(*change(text, floor)))


# --- Products ---------------------------------------------------------------------------------------------------------


@mutation(OURS + ": products of experts come out 1.3 times as large", "fp8", FORWARD, EXPERTS, LOW)
def experts_times_1_3(bug: Seams) -> None:
    bug.around(CompiledEngine, "grouped", lambda original, self, *given: original(self, *given) * 1.3)


@mutation("pytorch/torchtitan#1166: products of experts come out as zero", "fp8", FORWARD, EXPERTS, LOW)
def experts_come_out_as_zero(bug: Seams) -> None:
    bug.around(CompiledEngine, "grouped", lambda original, self, *given: torch.zeros_like(original(self, *given)))


@mutation(
    "NVIDIA/TransformerEngine#3342: gradients of experts' weights come out smaller", "fp8", BACKWARD, WEIGHTS, LOW
)
def wgrad_of_experts_halved(bug: Seams) -> None:
    def grouped_wgrad(original, self, left, right, groups, dtype, into=None):
        return added(original(self, left, right, groups, dtype) * 0.5, into)

    bug.around(CompiledEngine, "grouped_wgrad", grouped_wgrad)


def with_wgrad(bug: Seams, module: object, change: Callable[[Tensor, Tensor | None], Tensor]) -> None:
    """change(made, into) in the place of their sum, of the gradients of weights that a module of products makes."""

    def weight_gradient(original, ctx, argument, weight, matmul):
        def changed(dtype: torch.dtype, into: Tensor | None) -> Tensor:
            return change(matmul(dtype, None), into)

        return original(ctx, argument, weight, changed)

    bug.around(module, "weight_gradient", weight_gradient)


@mutation(OURS + ": gradients of linear layers' weights are halved", "fp8", BACKWARD, WEIGHTS, LOW)
def wgrad_of_linears_halved(bug: Seams) -> None:
    with_wgrad(bug, linear, lambda made, into: added(made * 0.5, into))


@mutation(
    OURS + ": gradients of weights are summed over micro-batches in bf16",
    "fp8",
    BACKWARD,
    f"{WEIGHTS}|sums over micro-batches",
    LOW,
)
def wgrad_summed_in_bf16(bug: Seams) -> None:
    def change(made: Tensor, into: Tensor | None) -> Tensor:
        return made.copy_(made.bfloat16()) if into is None else into.copy_((into + made).bfloat16())

    with_wgrad(bug, linear, change)


@mutation(
    "modelscope/mcore-bridge#125: Dgrad of weights that were never filled",
    "fp8",
    BACKWARD,
    "gradients? of (outputs|the input|the first matmul)",
    LOW,
)
def dgrad_of_empty_weights(bug: Seams) -> None:
    def change(make, source, rule, transposed):
        made = make()
        if transposed and is_weight(rule) and source.dim() == 2:
            return replace(made, q=torch.zeros_like(made.q))
        return made

    with_operands(bug, change)


@mutation(
    "NVIDIA/TransformerEngine#1047: the weights' FP8 copies are never refreshed",
    "fp8",
    FORWARD,
    "outputs|loss|matmuls",
    LOW,
)
def copies_of_weights_never_refreshed(bug: Seams) -> None:
    copies: dict[tuple[int, bool], Tensor | QuantizedTensor] = {}

    def change(make, source, rule, transposed):
        if not is_weight(rule):
            return make()
        return copies.setdefault((source.data_ptr(), transposed), make())

    with_operands(bug, change)


@mutation(
    "NVIDIA/TransformerEngine#1047: the same on two ranks that share experts",
    "fp8 wire",
    FORWARD,
    "outputs|loss|matmuls",
    LOW,
)
def copies_of_weights_never_refreshed_on_two_ranks(bug: Seams) -> None:
    copies_of_weights_never_refreshed(bug)


@mutation(
    "NVIDIA/TransformerEngine#1190: Wgrad with the cached input of the micro-batch before",
    "fp8",
    BACKWARD,
    WEIGHTS,
    LOW,
)
def wgrad_with_the_cache_of_the_micro_batch_before(bug: Seams) -> None:
    held: dict[int, object] = {}

    def weight_gradient(original, ctx, argument, weight, matmul):
        left, right, *groups = matmul.args
        if groups:  # of experts, whose rows differ in number
            return original(ctx, argument, weight, matmul)
        before = held.get(weight.data_ptr(), right)
        held[weight.data_ptr()] = right
        return original(ctx, argument, weight, partial(matmul.func, left, before))

    bug.around(linear, "weight_gradient", weight_gradient)


@mutation(OURS + ": a row of padding is taken for an expert's row", "fp8", FORWARD, EXPERTS, LOW)
def rows_of_padding_taken(bug: Seams) -> None:
    def unpad(original, self, rows_PX):
        if self.slots_R is None:
            return original(self, rows_PX)
        return rows_PX.index_select(0, (self.slots_R + 1) % len(rows_PX))

    bug.around(PaddedGroups, "unpad", unpad)


# --- Scales -----------------------------------------------------------------------------------------------------------


def with_scales(bug: Seams, change: Callable[[QuantizedTensor], Tensor]) -> None:
    """change(quantized) in the place of the scales of 1x128 tiles."""

    def quantize(original, self, x, q, cast):
        made = original(self, x, q, cast)
        return replace(made, scale=change(made).contiguous()) if made.cast.block[0] == 1 else made

    bug.around(CompiledCasts, "_quantize", quantize)


@mutation(OURS + ": a tile has the scale of the row before", "fp8", FORWARD, MADE, LOW)
def scale_of_the_row_before(bug: Seams) -> None:
    with_scales(bug, lambda made: made.scale.roll(1, -2))


@mutation(OURS + ": all tiles of a row have the scale of the last", "fp8", FORWARD, MADE, LOW)
def scale_of_the_last_tile(bug: Seams) -> None:
    with_scales(bug, lambda made: made.scale[..., -1:].expand_as(made.scale))


@mutation("pytorch/ao#4229: what lies behind whole tiles is lost", "fp8", FORWARD, MADE, LOW)
def ragged_tile_lost(bug: Seams) -> None:
    def change(made: QuantizedTensor) -> Tensor:
        keep = torch.ones_like(made.scale)
        keep[..., 1:] = 0
        return made.scale * keep

    with_scales(bug, change)


@mutation(
    "pytorch/ao#4229: Dgrad with the first block's scale",
    "fp8",
    BACKWARD,
    "gradients? of (outputs|the input|the first matmul)",
    LOW,
)
def dgrad_with_the_first_blocks_scale(bug: Seams) -> None:
    def change(make, source, rule, transposed):
        made = make()
        if transposed and is_weight(rule):
            return replace(made, scale=made.scale[..., :1, :1].expand_as(made.scale).contiguous())
        return made

    with_operands(bug, change)


@mutation(
    OURS + ": down projections of experts have one scale for two blocks of inputs", "fp8", FORWARD, EXPERTS, "tiles"
)
def down_projection_with_one_scale_a_row_of_blocks(bug: Seams) -> None:
    def change(make, source, rule, transposed):
        made = make()
        if not transposed and is_weight(rule) and source.dim() == 3 and source.size(-1) == source.size(-2):
            return replace(made, scale=made.scale[..., :1].expand_as(made.scale).contiguous())
        return made

    with_operands(bug, change)


@mutation(OURS + ": tokens behind the first tile have its scale in Wgrad", "fp8", BACKWARD, WEIGHTS, "tiles")
def wgrad_with_the_first_tiles_scale(bug: Seams) -> None:
    def change(make, source, rule, transposed):
        made = make()
        if transposed and not is_weight(rule) and isinstance(made, QuantizedTensor):
            return replace(made, scale=made.scale[..., :1].expand_as(made.scale).contiguous())
        return made

    with_operands(bug, change)


@mutation(
    "pytorch/ao#4229: scales of blocks are not transposed with their values",
    "fp8",
    BACKWARD,
    "gradients? of (outputs|the input|the first matmul)",
    LOW,
)
def scales_not_transposed(bug: Seams) -> None:
    def change(make, source, rule, transposed):
        made = make()
        if transposed and is_weight(rule) and source.dim() == 2:
            return replace(made, scale=made.scale.mT.reshape(made.scale.shape))
        return made

    with_operands(bug, change)


@mutation("mlc-ai/pith-train#74: a transposed tile has its values in another order", "fp8", BACKWARD, WEIGHTS, LOW)
def transposed_values_in_another_order(bug: Seams) -> None:
    def change(make, source, rule, transposed):
        made = make()
        if not transposed or is_weight(rule):
            return made
        return replace(made, q=made.q.roll(1, -2)) if isinstance(made, QuantizedTensor) else made.roll(1, -2)

    with_operands(bug, change)


@mutation(OURS + ": operands of Wgrad keep the tiles of Fprop and Dgrad", "fp8", BACKWARD, WEIGHTS, LOW)
def wgrad_without_requantising(bug: Seams) -> None:
    def operand(original, self, source, rule, transposed=False, groups=None):
        if not transposed or is_weight(rule):
            return original(self, source, rule, transposed, groups)
        x = source if isinstance(source, Tensor | QuantizedTensor) else source.values
        return self._compiled.fake_quantize(x, fitted(rule.cast(), source), torch.float32).mT

    bug.around(CompiledEngine, "operand", operand)


@mutation(OURS + ": weights have one scale a matrix", "fp8", FORWARD, MADE, LOW)
def one_scale_a_weight(bug: Seams) -> None:
    with_rules(bug, lambda text, floor: (text.replace("128x128", "tensor"), floor))


@mutation(OURS + ": scales that should be powers of two are not", "fp8", FORWARD, MADE, LOW)
def scales_no_powers_of_two(bug: Seams) -> None:
    with_rules(bug, lambda text, floor: (text.replace("pow2", "fp32"), floor))


@mutation(OURS + ": gradients have the floor of activations", "fp8 small", BACKWARD, "gradient", LOW)
def floor_of_activations_for_gradients(bug: Seams) -> None:
    with_rules(bug, lambda text, floor: (text, max(floor, 1e-4)))


@mutation("ROCm/vllm#381: values beyond half the largest are clamped", "fp8", FORWARD, MADE, LOW)
def activations_saturate(bug: Seams) -> None:
    def change(make, source, rule, transposed):
        if transposed or not isinstance(source, Tensor) or is_weight(rule):
            return make()
        most = source.abs().amax(-1, keepdim=True) / 2
        return make(source.clamp(-most, most))

    with_operands(bug, change)


@mutation(
    OURS + ": Wgrad of experts' up projection with the rows before they were sorted", "fp8", BACKWARD, WEIGHTS, LOW
)
def wgrad_of_other_rows(bug: Seams) -> None:
    def gradient_operands(original, dy, *rest):
        for_inputs, for_weights = original(dy, *rest)
        if for_weights is None:
            return for_inputs, for_weights
        return for_inputs, replace(for_weights, q=for_weights.q.flip(-1), scale=for_weights.scale)

    bug.around(linear, "gradient_operands", gradient_operands)
