"""Reference for matmuls in mixed precision, written like the formulas of the paper (section 3.3).

A linear layer has three matmuls (paper 3.3.1):

    Fprop   y  = x w^T      summed over the inputs
    Dgrad   dx = dy w       summed over the outputs
    Wgrad   dw = dy^T x     summed over the tokens and over micro-batches, in fp32 (paper 3.3.3)

An FP8 operand is cut into tiles along the axis of the sum: 1x128 for activations and gradients, 128x128 for weights.
Each tile has one scale (paper 3.3.2):

    scale = max(largest, floor) / largest number of the format, or the next power of two above
    q     = x * (1 / scale), rounded to the nearest number of the format, and the matmul multiplies q * scale

scale, 1 / scale, x * (1 / scale) and q * scale are rounded to fp32.

Matmuls are summed in fp32, with promotion every 128 terms (paper 3.3.2). Results of Fprop and Dgrad are rounded once,
to bf16; results of Wgrad are not. Inputs are saved for Wgrad in FP8, but the output projection's input in E5M6. Wgrad
casts the saved inputs again along the tokens (paper 3.3.3, 3.5.2).

The arithmetic is in fp64. A rank may sum in another order. So near a rounding tie, it may round to the other neighbour.
`NearNumbers` holds numbers with this possible error.

Shapes: T rows, K inputs, N outputs. For experts: R rows sorted by expert, D model width, F inner width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from train.prove.recipe_values import Values

TILE = 128
FLOOR = 1e-4
"""Lower limit of the magnitude from which the scale of a tile is computed."""
FP32 = 2.0**-24
"""Unit roundoff of fp32."""
EXPONENT = 0x7FF << 52
"""Mask of the exponent bits of an fp64 number."""
CURVED = 16 * FP32
"""Relative error of an fp32 result with one exponential."""


@dataclass(frozen=True)
class PlainFormat:
    """A number format with 1 + mantissa bits, and equal spacing below 2^least."""

    mantissa: int
    least: int
    largest: float


FORMATS = {
    "e4m3": PlainFormat(3, -6, 448.0),
    "e5m2": PlainFormat(2, -14, 57344.0),
    "e5m6": PlainFormat(6, -14, 65024.0),
    "bf16": PlainFormat(7, -126, 3.3895313892515355e38),
    "fp32": PlainFormat(23, -126, 3.4028234663852886e38),
}


class NearNumbers(NamedTuple):
    """Numbers x in fp64. On a correct rank, they may differ from x by up to `off`."""

    x: Tensor
    off: Tensor | None = None


class Total(NamedTuple):
    """Sums of products, before the sums are rounded."""

    x: Tensor
    size: Tensor
    """Sum of the products' magnitudes, to which rounding errors are proportional."""
    off: Tensor | None
    """Maximum change of each sum if operands near a rounding tie are rounded the other way."""


def slack(given: NearNumbers | Total) -> Tensor:
    """Returns the possible errors `off`, as zeros if `off` is None."""
    return torch.zeros_like(given.x) if given.off is None else given.off


def spacing(x: Tensor, form: PlainFormat) -> Tensor:
    """Returns the distance between neighbouring numbers of the format, near x."""
    # The exponent bits alone are x rounded down to a power of two.
    leading = x.abs().clamp_min_(2.0**form.least).view(torch.int64) & EXPONENT
    return leading.view(torch.float64).mul_(2.0**-form.mantissa)


def power(exponent: Tensor) -> Tensor:
    """Returns 2^exponent without a rounding error."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def nearest(x: Tensor, form: PlainFormat) -> Tensor:
    """Rounds x to the nearest number of the format, ties to even."""
    step = spacing(x, form)
    return ((x / step).round_() * step).clamp_(-form.largest, form.largest)


def rounded(given: NearNumbers | Total, form: PlainFormat, noise: Tensor | float = 0.0) -> NearNumbers:
    """Rounds numbers to the format. noise: possible error before rounding."""
    x, margin = nearest(given.x, form), noise if given.off is None else given.off + noise
    if isinstance(margin, float) and margin == 0:
        return NearNumbers(x)
    return NearNumbers(x, nearest(given.x + margin, form) - nearest(given.x - margin, form))


# --- Casts (paper 3.3.2) --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How an operand is cast: its number format and its scales."""

    form: PlainFormat
    shared: str
    """Which numbers share a scale: 1x128, 1x32, 128x128, row or tensor."""
    is_power: bool
    """Whether scales are powers of two."""
    floor: float
    """Lower limit of the magnitude from which a scale is computed."""

    def block(self, along: int) -> tuple[int | None, int | None]:
        """Returns how many rows and columns have a common scale; None: all."""
        sides = {"1x128": (1, TILE), "1x32": (1, 32), "128x128": (TILE, TILE), "row": (1, None), "tensor": (None, None)}
        across_along = sides[self.shared]
        return across_along if along == -1 else across_along[::-1]


def cast(given: NearNumbers, rule: Rule | None, along: int, noise: float = 0.0) -> NearNumbers:
    """Casts an operand (..., M, N), and returns the values that the matmul multiplies.

    - along: axis of the sum, -1 or -2.
    - noise: possible relative error of the operand, in addition to its absolute error `given.off`.
    """
    if rule is None:
        return given
    blocks, off = _blocks(given.x, rule, along), None if given.off is None else _blocks(given.off, rule, along)
    if noise:
        off = noise * blocks.abs() if off is None else off + noise * blocks.abs()
    largest = blocks.abs().amax((-3, -1), keepdim=True)
    made = _cast(blocks, largest, rule)
    if off is None or not bool(off.any()):
        return NearNumbers(_whole(made, given.x.shape))
    may = torch.zeros_like(made)
    most, least = ((blocks.abs() + side * off).amax((-3, -1), keepdim=True) for side in (1, -1))
    for other in (most, least):
        for moved in (blocks + off, blocks - off):
            torch.maximum(may, (_cast(moved, other, rule) - made).abs(), out=may)
    return NearNumbers(_whole(made, given.x.shape), _whole(may, given.x.shape))


def _cast(blocks: Tensor, largest: Tensor, rule: Rule) -> Tensor:
    """Quantizes blocks to q, and returns q * scale for a matmul."""
    amax, most = largest.clamp_min(rule.floor).float(), torch.tensor(rule.form.largest, dtype=torch.float32)
    scale, inverse = (amax / most).double(), (most / amax).double()
    if rule.is_power:
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, with 0.5 <= mantissa < 1
        exponent = exponent - (mantissa == 0.5).int()
        scale, inverse = power(exponent), power(-exponent)
    q = nearest((blocks * inverse).float().double(), rule.form)
    return (q * scale).float().double()


def _blocks(x: Tensor, rule: Rule, along: int) -> Tensor:
    """Divides x into blocks, padded with zeros: (..., M, N) becomes (..., m, rows, n, columns)."""
    height, width = x.shape[-2:]
    rows, columns = (side or size for side, size in zip(rule.block(along), (height, width), strict=True))
    rows, columns = max(1, min(rows, height)), max(1, min(columns, width))
    x = F.pad(x, (0, -width % columns, 0, -height % rows))
    return x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))


def _whole(blocks: Tensor, shape: torch.Size) -> Tensor:
    return blocks.flatten(-4, -3).flatten(-2, -1)[..., : shape[-2], : shape[-1]]


# --- Rounding --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearRules:
    """Casts of a linear layer's matmuls, and of the saved input (`kept`)."""

    fprop: tuple[Rule | None, Rule | None]
    dgrad: tuple[Rule | None, Rule | None]
    wgrad: tuple[Rule | None, Rule | None]
    kept: Rule | None


@dataclass(frozen=True)
class PlainRounding:
    """The casts of all linear layers, by kind of layer."""

    high: PlainFormat
    """Format of activations between matmuls."""
    dense: LinearRules
    output: LinearRules
    """Casts of the output projection, which computes attention's output."""
    up: LinearRules
    down: LinearRules
    """Casts of the experts' second linear layer."""
    swiglu: Rule | None
    """The cast with which the experts' SwiGLU input is saved."""
    is_fp8: bool


def read_rounding(precision: Values) -> PlainRounding:
    """Returns a recipe's casts. The recipe describes each cast as FORMAT/GRANULARITY/SCALE."""
    fp8, high = precision.fp8, FORMATS["fp32" if precision.name == "fp32" else "bf16"]
    if fp8 is None:
        plain = LinearRules((None, None), (None, None), (None, None), None)
        return PlainRounding(high, plain, plain, plain, plain, None, False)

    def rule(text: str, floor: float = FLOOR) -> Rule:
        form, shared, scale = text.split("/")
        return Rule(FORMATS[form], shared, scale == "pow2", floor)

    def rules(activation: str, gradient: str, kept: Rule | None) -> LinearRules:
        x, weight, dy = rule(activation), rule(fp8.weight), rule(gradient, 1e-12)
        return LinearRules((x, weight), (dy, weight), (dy, x), kept)

    swiglu = Rule(FORMATS["e4m3"], "1x128", fp8.activation.endswith("pow2"), FLOOR)
    dense = rules(fp8.activation, fp8.gradient, rule(fp8.activation))
    output = rules(fp8.attention_output, fp8.gradient, Rule(FORMATS["e5m6"], "1x128", True, FLOOR))
    up = rules(fp8.dispatched, fp8.gradient, rule(fp8.dispatched))
    return PlainRounding(high, dense, output, up, rules(fp8.activation, fp8.dispatched, None), swiglu, True)


# --- Linear layers (paper 3.3.1) ------------------------------------------------------------------------------------


def matmul(left: NearNumbers, right: NearNumbers) -> Total:
    """Multiplies left (O, C) by right (N, C) transposed: (O, N)."""
    x, size = left.x @ right.x.mT, left.x.abs() @ right.x.abs().mT
    off = None
    if left.off is not None:
        off = left.off @ right.x.abs().mT
    if right.off is not None:
        more = left.x.abs() @ right.off.mT
        off = more if off is None else off + more
    return Total(x, size, off)


def fprop(x_TK: Tensor, weight: NearNumbers, rules: LinearRules) -> Total:
    """Computes Fprop. weight: (N, K), already cast for this matmul."""
    return matmul(cast(NearNumbers(x_TK), rules.fprop[0], -1), weight)


def transposed(given: NearNumbers) -> NearNumbers:
    """Transposes numbers and their errors."""
    return NearNumbers(given.x.mT, None if given.off is None else given.off.mT)


def dgrad(dy_TN: NearNumbers, weight: NearNumbers, rules: LinearRules) -> Total:
    """Computes Dgrad. weight: (N, K), already cast for this matmul."""
    return matmul(cast(dy_TN, rules.dgrad[0], -1), transposed(weight))


def wgrad(dy_TN: NearNumbers, kept_TK: NearNumbers, rules: LinearRules) -> Total:
    """Computes Wgrad, the weight's gradient (N, K). kept_TK: the saved input."""
    left, right = cast(dy_TN, rules.wgrad[0], -2), cast(kept_TK, rules.wgrad[1], -2)
    return matmul(transposed(left), transposed(right))


def kept(x_TK: Tensor, rule: Rule | None) -> NearNumbers:
    """Returns an input as it is saved for Wgrad."""
    return NearNumbers(x_TK) if rule is None else cast(NearNumbers(x_TK), rule, -1)


def weight_for(which: str, weight: Tensor, rules: LinearRules) -> NearNumbers:
    """Casts a weight (..., N, K) for Fprop or Dgrad (`which`)."""
    return (
        cast(NearNumbers(weight), rules.fprop[1], -1)
        if which == "fprop"
        else cast(NearNumbers(weight), rules.dgrad[1], -2)
    )


# --- Experts (paper 3.3.3) ------------------------------------------------------------------------------------------


class SwigluSlopes(NamedTuple):
    """The results of SwiGLU's backward."""

    a: NearNumbers
    """Recomputed output of SwiGLU, in the activation dtype."""
    dh: Total
    dgates: Total


def swiglu(h_R2F: Tensor, gates_R: Tensor | None) -> Tensor:
    """Computes silu(gate) * up, (R, F), times any gates (paper 3.3.3)."""
    gate_RF, up_RF = h_R2F.chunk(2, -1)
    made = gate_RF * gate_RF.sigmoid() * up_RF
    return made if gates_R is None else made * gates_R[:, None]


def swiglu_backward(h_R2F: NearNumbers, gates_R: Tensor | None, da_RF: NearNumbers, high: PlainFormat) -> SwigluSlopes:
    """Computes the gradients of SwiGLU's input and of the gates."""
    factor_R1 = 1.0 if gates_R is None else gates_R[:, None]

    def parts(h_R2F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns silu(gate) * up, its derivatives, and the magnitudes of the derivatives' terms."""
        gate_RF, up_RF = h_R2F.chunk(2, -1)
        sigmoid_RF = gate_RF.sigmoid()
        silu_RF, rest_RF = gate_RF * sigmoid_RF, gate_RF * (1 - sigmoid_RF)
        slopes = torch.cat([up_RF * sigmoid_RF * (1 + rest_RF), silu_RF], -1)
        return silu_RF * up_RF, slopes, torch.cat([up_RF * sigmoid_RF * (1 + rest_RF.abs()), silu_RF], -1).abs()

    made_RF, slopes, sizes = parts(h_R2F.x)
    made_off, slopes_off = torch.zeros_like(made_RF), torch.zeros_like(slopes)
    if h_R2F.off is not None:
        for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            off = torch.cat([sign * one for sign, one in zip(signs, h_R2F.off.chunk(2, -1), strict=True)], -1)
            other_RF, other, _ = parts(h_R2F.x + off)
            torch.maximum(made_off, (other_RF - made_RF).abs(), out=made_off)
            torch.maximum(slopes_off, (other - slopes).abs(), out=slopes_off)
    twice, each = da_RF.x.repeat(1, 2) * factor_R1, da_RF.x * made_RF
    off, ties = twice.abs() * slopes_off, da_RF.x.abs() * made_off
    if da_RF.off is not None:
        off += (da_RF.off.repeat(1, 2) * factor_R1).abs() * (slopes.abs() + slopes_off)
        ties += da_RF.off * (made_RF.abs() + made_off)
    a_RF = made_RF * factor_R1
    return SwigluSlopes(
        rounded(NearNumbers(a_RF, (made_off * factor_R1).abs()), high, CURVED * a_RF.abs()),
        Total(twice * slopes, twice.abs() * sizes, off),
        Total(each.sum(-1), each.abs().sum(-1), ties.sum(-1)),
    )


def cast_rows(
    given: NearNumbers, counts: Sequence[int], rule: Rule | None, along: int, noise: float = 0.0
) -> NearNumbers:
    """Casts the rows of several experts, each expert in separate tiles."""
    rows = None if rule is None else rule.block(along)[0]
    if rule is None or rows in (None, 1):
        return cast(given, rule, along, noise)
    parts = [cast(one, rule, along, noise) for one in split_rows(given, counts)]
    offs = [torch.zeros_like(part.x) if part.off is None else part.off for part in parts]
    has_off = any(part.off is not None for part in parts)
    return NearNumbers(torch.cat([part.x for part in parts]), torch.cat(offs) if has_off else None)


def split_rows(given: NearNumbers, counts: Sequence[int]) -> list[NearNumbers]:
    """Splits rows by expert. counts: number of rows of each expert."""
    offs = [None] * len(counts) if given.off is None else given.off.split(list(counts))
    return [NearNumbers(x, off) for x, off in zip(given.x.split(list(counts)), offs, strict=True)]
