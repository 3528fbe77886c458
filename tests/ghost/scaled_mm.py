"""Which FP8 matmuls the installed torch accepts, according to its own argument checks.

What cuBLASLt has a kernel for, only a GPU tells: torch asks it after its own checks, and the ghost always says yes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from train.kernels.fp8.blackwell import BlackwellEngine, ScaledGroupedMatmuls
from train.kernels.fp8.cast_rules import OperandRule
from train.kernels.fp8.formats import E4M3 as FORMAT
from train.plan.memory.meta_device import _KERNELS

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TILES, BLOCKS, ROWS = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128, F.ScalingType.RowWise


@dataclass(frozen=True)
class ScaledProduct:
    """One call, and whether torch must take it for our products to run."""

    name: str
    left: torch.dtype = E4M3
    right: torch.dtype = E4M3
    right_recipe: F.ScalingType = BLOCKS
    output: torch.dtype = torch.bfloat16
    tiles: int = 56
    """Of the contraction."""
    padded: bool = True
    """The blocks' scales padded to a multiple of 4 along the contraction."""
    grouped: bool = False
    mx: bool = False
    """Tiles of 32, as train/kernels/fp8/blackwell.py calls them, for all of its products."""
    taken: bool = True

    def refusal(self) -> str | None:
        """The error's first line, or None."""
        try:
            if self.mx:
                _mx(self.grouped)
            elif self.grouped:
                _grouped(self.right_recipe)
            else:
                _dense(self)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            return str(error).splitlines()[0]
        return None


PRODUCTS = (
    ScaledProduct("1x128 by 128x128, bf16 (Fprop, Dgrad)"),
    ScaledProduct("1x128 by 128x128, fp32", output=torch.float32),
    ScaledProduct("1x128 by 1x128, bf16", right_recipe=TILES),
    ScaledProduct("1x128 by 1x128, fp32 (Wgrad)", right_recipe=TILES, output=torch.float32),
    ScaledProduct("1x128 by 128x128, 5 tiles, scales padded to 8", tiles=5),
    ScaledProduct("1x128 by 128x128, 5 tiles, scales as they are", tiles=5, padded=False, taken=False),
    ScaledProduct("E5M2 1x128 by E4M3 128x128", left=E5M2, taken=False),
    ScaledProduct("E5M2 1x128 by E5M2 1x128", left=E5M2, right=E5M2, right_recipe=TILES, taken=False),
    ScaledProduct("grouped, 1x128 by 128x128", grouped=True, taken=False),
    ScaledProduct("grouped, a scale a row", grouped=True, right_recipe=ROWS),
    ScaledProduct("1x32 by 1x32, bf16 and fp32", mx=True),
    ScaledProduct("grouped, 1x32 by 1x32, and Wgrad", mx=True, grouped=True),
)
"""As train/kernels/fp8/hopper.py and train/kernels/fp8/blackwell.py call them, and what they would call if torch took it."""


def _dense(product: ScaledProduct) -> Tensor:
    rows, outputs, inputs = 256, 384, 128 * product.tiles
    left = torch.empty(rows, inputs, device="cuda", dtype=product.left)
    right = torch.empty(outputs, inputs, device="cuda", dtype=product.right)
    tiles = product.tiles + -product.tiles % 4 if product.padded else product.tiles
    blocks = torch.empty(outputs // 128, tiles, device="cuda").t()
    by_tile = torch.empty(product.tiles, outputs, device="cuda").t()
    return F.scaled_mm(
        left,
        right.t(),
        scale_a=torch.empty(product.tiles, rows, device="cuda").t(),
        scale_recipe_a=TILES,
        scale_b=by_tile if product.right_recipe is TILES else blocks,
        scale_recipe_b=product.right_recipe,
        output_dtype=product.output,
    )


def _grouped(recipe: F.ScalingType) -> Tensor:
    experts, rows, outputs, inputs = 4, 1024, 512, 1024
    left = torch.empty(rows, inputs, device="cuda", dtype=E4M3)
    right = torch.empty(experts, outputs, inputs, device="cuda", dtype=E4M3)
    by_row = recipe is ROWS
    blocks = torch.empty(experts, inputs // 128, outputs // 128, device="cuda")
    return F.scaled_grouped_mm(
        left,
        right.transpose(1, 2),
        scale_a=torch.empty(rows, device="cuda") if by_row else torch.empty(inputs // 128, rows, device="cuda").t(),
        scale_recipe_a=ROWS if by_row else TILES,
        scale_b=torch.empty(experts, outputs, device="cuda") if by_row else blocks,
        scale_recipe_b=recipe,
        offs=torch.arange(1, experts + 1, device="cuda", dtype=torch.int32) * (rows // experts),
        output_dtype=torch.bfloat16,
    )


def _mx(grouped: bool) -> None:
    """Ragged sizes, an expert without rows."""
    engine = BlackwellEngine(_KERNELS, ScaledGroupedMatmuls(F.scaled_grouped_mm), F.scaled_mm)
    rule, counts = OperandRule(FORMAT, "1x32", True), torch.tensor([3, 0, 127], device="cuda")
    x, dy = (torch.empty(130, width, device="cuda", dtype=torch.bfloat16) for width in (256, 512))
    if not grouped:
        for dtype in (torch.bfloat16, torch.float32):
            engine.matmul(engine.operand(x[:, :200], rule), engine.operand(dy[:70, :200], rule), dtype)
        return
    weights, groups = torch.empty(3, 512, 256, device="cuda", dtype=torch.bfloat16), engine.groups(counts, len(x))
    engine.grouped(engine.operand(x, rule), engine.operand(weights, rule), groups, torch.bfloat16)
    engine.grouped(engine.operand(dy, rule), engine.operand(weights, rule, transposed=True), groups, torch.bfloat16)
    left, right = (engine.operand(side, rule, transposed=True, groups=groups) for side in (dy, x))
    engine.grouped_wgrad(left, right, groups, torch.float32)


def table(found: dict[ScaledProduct, str | None]) -> list[str]:
    """Lines to print."""
    lines = [f"{f'F.scaled_mm, torch {torch.__version__}':50}by torch's checks"]
    return lines + [
        f"{product.name:50}{'taken' if refusal is None else f'refused: {refusal[:90]}'}"
        for product, refusal in found.items()
    ]
