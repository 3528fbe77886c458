"""What quantisation costs in accuracy: error of Y = X W^T under every granularity, for several kinds of X.

    python -m bench.fp8_error [--size 1024]

X is quantised as an activation or gradient, W in 128x128 blocks (or like X for `tensor` and `row`), the product is fp32.
Prints the median and the worst relative error over the tokens, the share of tokens with an error over 10 %, and the
share of X that became zero. bf16 operands are the yardstick.
"""

import argparse

import torch
from torch import Tensor

from train.precision.products import CpuEngine
from train.precision.recipe import OperandRule, parse_rule

SCHEMES = {
    "bf16": ("bf16", "bf16"),
    "tensor": ("e4m3/tensor/fp32", "e4m3/tensor/fp32"),
    "row": ("e4m3/row/fp32", "e4m3/row/fp32"),
    "128x128": ("e4m3/128x128/fp32", "e4m3/128x128/fp32"),
    "1x128": ("e4m3/1x128/fp32", "e4m3/128x128/fp32"),
    "1x128 pow2": ("e4m3/1x128/pow2", "e4m3/128x128/pow2"),
    "1x128 E5M2": ("e5m2/1x128/fp32", "e4m3/128x128/fp32"),
}
FLOOR = 1e-12


def inputs(size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The kinds of X, (size, size)."""
    normal = torch.randn(size, size, generator=generator)
    outliers = normal.clone()
    outliers[:, torch.randperm(size, generator=generator)[:4]] *= 100
    chi2 = torch.randn(3, size, size, generator=generator).square().mean(0)
    other = torch.randn(size, size, generator=generator)
    scale_T = torch.exp(3 * torch.randn(size, 1, generator=generator))
    return {
        "normal": normal,
        f"4 of {size} channels x100": outliers,
        "student-t(3)": normal / chi2.sqrt(),
        "silu(a) b": torch.nn.functional.silu(normal) * other,
        "token scale e^3N": normal * scale_T,
        "elements e^2N": normal * torch.exp(2 * other),
    }


def measure(x: Tensor, w: Tensor, left: OperandRule, right: OperandRule) -> tuple[float, float, float, float]:
    """Median and worst relative error of a token, share of tokens over 10 %, share of x that became zero."""
    engine = CpuEngine()
    operand = engine.operand(x, left)
    y = engine.product(operand.float(), engine.operand(w, right).float(), torch.float32).double()
    exact = x.double() @ w.double().t()
    error_T = (y - exact).norm(dim=1) / exact.norm(dim=1)
    flushed = ((operand == 0) & (x != 0)).sum() / (x != 0).sum()
    return error_T.median().item(), error_T.max().item(), (error_T > 0.1).double().mean().item(), flushed.item()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--size", type=int, default=1024)
    size = arguments.parse_args().size
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(size, size, generator=generator) / size**0.5
    print(f"{'X':26s} {'scales':12s} {'median':>9s} {'worst':>9s} {'over 10 %':>10s} {'flushed':>9s}")
    for kind, x in inputs(size, generator).items():
        for scheme, rules in SCHEMES.items():
            left, right = (parse_rule(text, FLOOR) for text in rules)
            median, worst, over, flushed = measure(x, w, left, right)
            print(f"{kind:26s} {scheme:12s} {median:9.2e} {worst:9.2e} {over:10.1%} {flushed:9.1e}")


if __name__ == "__main__":
    main()
