"""The cast rule of each operand of each matmul (paper 3.3). `conf.schema.Fp8` contains the rules as text.

A linear layer has three matmuls, each with a left and a right operand:

    Fprop   y  = x w^T      activation, weight       contracted over the inputs
    Dgrad   dx = dy w       gradient, weight         contracted over the outputs
    Wgrad   dw = dy^T x     gradient, activation     contracted over the tokens

A tile consists of 128 values along the contraction (32 in MXFP8). A tile of the rule 1x128 is 1x128 if the contraction
runs over the tensor's last dimension, and 128x1 if it runs over the first.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from conf.schema import Fp8
from parallel.expert.wire import ACTIVATION_FLOOR, GRADIENT_FLOOR
from train.kernels.fp8.formats import E4M3, E5M2, E5M6, MX_TILE, TILE, WHOLE_SIDE, Cast, Format


@dataclass(frozen=True)
class OperandRule:
    """Defines how one operand of a matmul is quantised."""

    format: Format
    granularity: str = "1x128"
    pow2: bool = False
    floor: float = 0.0

    def cast(self, transposed: bool = False) -> Cast:
        """Returns the cast for a contraction over the last dimension; if `transposed`, the last but one."""
        return self._casts[transposed]

    @cached_property
    def _casts(self) -> tuple[Cast, Cast]:
        rows, columns = {
            "1x128": (1, TILE),
            "1x32": (1, MX_TILE),
            "128x128": (TILE, TILE),
            "row": (1, WHOLE_SIDE),
            "tensor": (WHOLE_SIDE, WHOLE_SIDE),
        }[self.granularity]
        blocks = (rows, columns), (columns, rows)
        plain, transposed = (Cast(self.format, block, self.pow2, self.floor) for block in blocks)
        return plain, transposed


class MatmulRules(NamedTuple):
    """The rules of a matmul's left and right operands."""

    left: OperandRule
    right: OperandRule


@dataclass(frozen=True)
class LayerCasts:
    """The rules of a linear layer's matmuls. `cache`: cast of the input saved for Wgrad."""

    fprop: MatmulRules
    dgrad: MatmulRules
    wgrad: MatmulRules
    cache: Cast


@dataclass(frozen=True)
class CastRules:
    """The rules of each kind of layer, and of SwiGLU's saved input."""

    dense: LayerCasts
    output: LayerCasts
    """Rules of the attention's output projection."""
    experts_up: LayerCasts
    experts_down: LayerCasts
    """Rules of the experts' second layer, whose input backward recomputes instead of caching it."""
    swiglu: Cast
    """The cast of the saved input of the experts' SwiGLU."""


def build_rules(fp8: Fp8) -> CastRules:
    """Builds the rules from `precision.fp8` of a checked configuration."""
    dense, output, up, down = (_linear(fp8, family) for family in ("dense", "output", "experts_up", "experts_down"))
    return CastRules(dense, output, up, down, Cast(E4M3, (1, TILE), down.fprop.left.pow2, ACTIVATION_FLOOR))


def _linear(fp8: Fp8, family: str) -> LayerCasts:
    operands = fp8.operands(family)
    activation, weight = (parse_rule(text, ACTIVATION_FLOOR) for text in (operands.activation, operands.weight))
    gradient = parse_rule(operands.gradient, GRADIENT_FLOOR)
    cache = Cast(E5M6, (1, TILE), True, ACTIVATION_FLOOR) if family == "output" else activation.cast()
    matmuls = MatmulRules(activation, weight), MatmulRules(gradient, weight), MatmulRules(gradient, activation)
    return LayerCasts(*matmuls, cache)


def parse_rule(text: str, floor: float) -> OperandRule:
    """Parses an operand's rule.

    text: FORMAT/GRANULARITY/SCALE, as in the configuration.
    """
    name, granularity, scale = text.split("/")
    return OperandRule({"e4m3": E4M3, "e5m2": E5M2}[name], granularity, scale == "pow2", floor)
