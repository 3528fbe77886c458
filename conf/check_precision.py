"""Rules of the precision section."""

import re

from conf.errors import UserError
from conf.schema import Fp8, Precision, Products

OPERAND = re.compile(r"bf16|(e4m3|e5m2)/(1x128|128x128|row|tensor)/(fp32|pow2)")


def check_precision(precision: Precision) -> None:
    """Raise UserError for the first rule that the section breaks."""
    if (precision.fp8 is not None) != precision.name.startswith("fp8"):
        raise UserError(
            "precision.fp8",
            "null" if precision.fp8 is None else "set",
            "must be set for a recipe with FP8 products and for no other",
            "choose precision=fp8, which fills it",
        )
    if precision.fp8 is not None:
        _check_fp8(precision.fp8)


def _check_fp8(fp8: Fp8) -> None:
    for family in ("dense", "output", "experts_up", "experts_down"):
        _check_products(f"precision.fp8.{family}", getattr(fp8, family))


def _check_products(path: str, products: Products) -> None:
    for name in ("fprop", "dgrad", "wgrad"):
        operands = vars(getattr(products, name))
        for operand, value in operands.items():
            if OPERAND.fullmatch(value) is None:
                raise UserError(
                    f"{path}.{name}.{operand}",
                    value,
                    "must be bf16 or FORMAT/GRANULARITY/SCALE: e4m3|e5m2 / 1x128|128x128|row|tensor / fp32|pow2",
                    "use e4m3/1x128/fp32",
                )
        if len({value == "bf16" for value in operands.values()}) == 2:
            raise UserError(
                f"{path}.{name}",
                ", ".join(f"{key}={value}" for key, value in operands.items()),
                "both operands of a product are bf16 or neither is",
                " ".join(f"{path}.{name}.{key}=bf16" for key in operands),
            )
