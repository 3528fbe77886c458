"""Mixed precision (3.3) as plain as the paper says it: what single parts of a rank are held against in the pass `recipe`.

A linear layer has three products, each of a left and a right operand (3.3.1):

    Fprop   y  = x w^T      summed over the inputs
    Dgrad   dx = dy w       summed over the outputs
    Wgrad   dw = dy^T x     summed over the tokens, in fp32, also over micro-batches (3.3.3)

An operand in FP8 is cut into tiles along the sum, 1x128 of activations and gradients, or into blocks of 128x128 of weights. Each
has one scale, made from its largest magnitude (3.3.2):

    scale = max(largest, floor) / largest number of the format, or the next power of two above
    q     = x * (1 / scale), rounded to the nearest number of the format, and the product multiplies q * scale

each rounded to fp32, and 1 / scale made by a division of its own (DeepSeek's TileKernels do the same).

Products are summed in fp32 (every 128 of them promoted, 3.3.2) and rounded once, to bf16 (Fprop, Dgrad) or not (Wgrad). What waits for
Wgrad waits in FP8, or E5M6 behind the attention, and is cast again along the tokens (3.3.3, 3.5.2).

Nothing is shared with what is judged but the values of the recipe. All is in fp64 here. What honest ranks may do
differently is the order of a sum, and so the side of a tie on which its result falls; both are counted: `NearNumbers` holds numbers and
how far each may be off, because a value lies so near to the middle between two numbers of a format.

Shapes: T rows, K inputs, N outputs; of experts R rows sorted by expert, D width, F inner width.
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
"""Smallest max-abs of activations and weights that a scale is made for, as in DeepSeek's kernels."""
FP32 = 2.0**-24
"""Unit roundoff."""
EXPONENT = 0x7FF << 52
"""Bits of fp64 that say the power of two."""
CURVED = 16 * FP32
"""Relative: by what an exponential and the products around it may be off."""


@dataclass(frozen=True)
class PlainFormat:
    """Numbers of 1 + mantissa significant bits, down to 2^least; below, equally spaced ones."""

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
    """Numbers, fp64, and by how much each may honestly be off; None for not at all."""

    x: Tensor
    off: Tensor | None = None


class Total(NamedTuple):
    """What a sum of products comes to before it is rounded."""

    x: Tensor
    size: Tensor
    """The sum of the products' magnitudes, which rounding of sums is measured in."""
    off: Tensor | None
    """What ties of the operands may change."""


def slack(given: NearNumbers | Total) -> Tensor:
    """By how much each number may be off."""
    return torch.zeros_like(given.x) if given.off is None else given.off


def spacing(x: Tensor, form: PlainFormat) -> Tensor:
    """Distance of the neighbouring numbers of the format around x."""
    leading = x.abs().clamp_min_(2.0**form.least).view(torch.int64) & EXPONENT  # of fp64, without its mantissa
    return leading.view(torch.float64).mul_(2.0**-form.mantissa)


def power(exponent: Tensor) -> Tensor:
    """2^exponent, exactly."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def nearest(x: Tensor, form: PlainFormat) -> Tensor:
    """Rounded to the format, to nearest, ties to even, and what is beyond its largest number to that."""
    step = spacing(x, form)
    return ((x / step).round_() * step).clamp_(-form.largest, form.largest)


def rounded(given: NearNumbers | Total, form: PlainFormat, noise: Tensor | float = 0.0) -> NearNumbers:
    """Numbers rounded to the format. noise: by how much the numbers may be off beside what they say, which decides on
    which side of a tie they fall.
    """
    x, margin = nearest(given.x, form), noise if given.off is None else given.off + noise
    if isinstance(margin, float) and margin == 0:
        return NearNumbers(x)
    return NearNumbers(x, nearest(given.x + margin, form) - nearest(given.x - margin, form))


# --- Casts (3.3.2) --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How an operand is cast."""

    form: PlainFormat
    shared: str
    """What shares a scale: 1x128, 1x32, 128x128, row (all of the sum) or tensor."""
    is_power: bool
    """Whether scales are powers of two."""
    floor: float
    """Smallest magnitude that a scale is made for."""

    def block(self, along: int) -> tuple[int | None, int | None]:
        """Rows and columns that share a scale, None for all, of a matrix that is summed over this axis."""
        sides = {"1x128": (1, TILE), "1x32": (1, 32), "128x128": (TILE, TILE), "row": (1, None), "tensor": (None, None)}
        across_along = sides[self.shared]
        return across_along if along == -1 else across_along[::-1]


def cast(given: NearNumbers, rule: Rule | None, along: int, noise: float = 0.0) -> NearNumbers:
    """An operand (..., M, N) as the product takes it, summed over axis `along` (-1 or -2); as it is without a rule.

    noise: relative, by which the numbers may be off beside what they say.
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
    """q * scale of blocks with these largest magnitudes."""
    amax, most = largest.clamp_min(rule.floor).float(), torch.tensor(rule.form.largest, dtype=torch.float32)
    scale, inverse = (amax / most).double(), (most / amax).double()
    if rule.is_power:
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa from 0.5 on
        exponent = exponent - (mantissa == 0.5).int()
        scale, inverse = power(exponent), power(-exponent)
    q = nearest((blocks * inverse).float().double(), rule.form)
    return (q * scale).float().double()


def _blocks(x: Tensor, rule: Rule, along: int) -> Tensor:
    """(..., M, N) as (..., m, rows, n, columns), the last ones filled with zeros."""
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
    """The operands of the three products, each in FP8 or bf16 (None), and the form in which the input waits for Wgrad."""

    fprop: tuple[Rule | None, Rule | None]
    dgrad: tuple[Rule | None, Rule | None]
    wgrad: tuple[Rule | None, Rule | None]
    kept: Rule | None


@dataclass(frozen=True)
class PlainRounding:
    """The casts of all linear layers, by what they are."""

    high: PlainFormat
    """Format of activations between the products."""
    dense: LinearRules
    output: LinearRules
    """The projection behind the attention."""
    up: LinearRules
    down: LinearRules
    """The two of experts, SwiGLU between them."""
    swiglu: Rule | None
    """In what form the input of the experts' SwiGLU waits."""
    is_fp8: bool


def read_rounding(precision: Values) -> PlainRounding:
    """The casts of a recipe, which names an operand FORMAT/GRANULARITY/SCALE."""
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


# --- Linear layers (3.3.1) ------------------------------------------------------------------------------------------


def product(left: NearNumbers, right: NearNumbers) -> Total:
    """left (O, C) right (N, C)^T, summed over C."""
    x, size = left.x @ right.x.mT, left.x.abs() @ right.x.abs().mT
    off = None
    if left.off is not None:
        off = left.off @ right.x.abs().mT
    if right.off is not None:
        more = left.x.abs() @ right.off.mT
        off = more if off is None else off + more
    return Total(x, size, off)


def fprop(x_TK: Tensor, weight: NearNumbers, rules: LinearRules) -> Total:
    """weight: (N, K), cast for this product."""
    return product(cast(NearNumbers(x_TK), rules.fprop[0], -1), weight)


def transposed(given: NearNumbers) -> NearNumbers:
    """Transposed."""
    return NearNumbers(given.x.mT, None if given.off is None else given.off.mT)


def dgrad(dy_TN: NearNumbers, weight: NearNumbers, rules: LinearRules) -> Total:
    """weight: (N, K), cast for this product."""
    return product(cast(dy_TN, rules.dgrad[0], -1), transposed(weight))


def wgrad(dy_TN: NearNumbers, kept_TK: NearNumbers, rules: LinearRules) -> Total:
    """(N, K)."""
    left, right = cast(dy_TN, rules.wgrad[0], -2), cast(kept_TK, rules.wgrad[1], -2)
    return product(transposed(left), transposed(right))


def kept(x_TK: Tensor, rule: Rule | None) -> NearNumbers:
    """What an input is when Wgrad takes it."""
    return NearNumbers(x_TK) if rule is None else cast(NearNumbers(x_TK), rule, -1)


def weight_for(which: str, weight: Tensor, rules: LinearRules) -> NearNumbers:
    """A weight (..., N, K) as Fprop or Dgrad takes it."""
    return (
        cast(NearNumbers(weight), rules.fprop[1], -1)
        if which == "fprop"
        else cast(NearNumbers(weight), rules.dgrad[1], -2)
    )


# --- Experts (3.3.3) ------------------------------------------------------------------------------------------------


class SwigluSlopes(NamedTuple):
    """What goes back through SwiGLU."""

    a: NearNumbers
    """Output of SwiGLU, made again, in the activations' format."""
    dh: Total
    dgates: Total


def swiglu(h_R2F: Tensor, gates_R: Tensor | None) -> Tensor:
    """silu(gate) * up, times the value of the router's gate where there is one (3.3.3): (R, F)."""
    gate_RF, up_RF = h_R2F.chunk(2, -1)
    made = gate_RF * gate_RF.sigmoid() * up_RF
    return made if gates_R is None else made * gates_R[:, None]


def swiglu_backward(h_R2F: NearNumbers, gates_R: Tensor | None, da_RF: NearNumbers, high: PlainFormat) -> SwigluSlopes:
    """From the gradient of the output to those of h and of the gates. h: as it waited."""
    factor_R1 = 1.0 if gates_R is None else gates_R[:, None]

    def parts(h_R2F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """silu(gate) * up, its slopes along gate and up, and the magnitudes that make these."""
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
    """Rows of several experts, none of whose tiles holds rows of two."""
    rows = None if rule is None else rule.block(along)[0]
    if rule is None or rows in (None, 1):
        return cast(given, rule, along, noise)
    parts = [cast(one, rule, along, noise) for one in split_rows(given, counts)]
    offs = [torch.zeros_like(part.x) if part.off is None else part.off for part in parts]
    has_off = any(part.off is not None for part in parts)
    return NearNumbers(torch.cat([part.x for part in parts]), torch.cat(offs) if has_off else None)


def split_rows(given: NearNumbers, counts: Sequence[int]) -> list[NearNumbers]:
    """The rows of each expert."""
    offs = [None] * len(counts) if given.off is None else given.off.split(list(counts))
    return [NearNumbers(x, off) for x, off in zip(given.x.split(list(counts)), offs, strict=True)]
