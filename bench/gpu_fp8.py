"""FP8 on an H100: every kernel against the CPU reference, then TFLOP/s at V3's shapes beside bf16 and DeepGEMM's own figures.

    python -m bench.gpu_fp8 [--skip-times]

Needs a Hopper GPU, triton, and sgl-deep-gemm with a CUDA toolkit for the experts; says which is missing. Without a GPU it
is a dry check: it lists what is there, compiles the Triton kernels for sm_90 where triton is installed, and runs the CPU
side of every comparison at the sizes of the GPU run.

Quantisers must agree in every bit of q and scale. Products may differ by the order of their sums and the few bits that
Hopper's tensor cores drop inside 128 products; SwiGLU by the last bit of exp, which flips a rounding to FP8 now and then.

Published: DeepGEMM's README of March 2025, H800, 1x128 by 128x128, bf16 out (reference deepseek_v3.md 6.7).
"""

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import gpu_fp8_times as times
from conf.errors import UserError
from conf.load import compose
from train.precision import hopper
from train.precision.formats import E4M3, E5M2, E5M6, TILE, Cast
from train.precision.fp8 import Fp8Precision
from train.precision.products import CpuEngine
from train.precision.quantize import quantize_reference
from train.precision.recipe import OperandRule

TILES, BLOCKS = OperandRule(E4M3, "1x128", False, 1e-4), OperandRule(E4M3, "128x128", False, 1e-4)
PRODUCT_TOLERANCE = 5e-3
"""Relative error of a product in bf16: its rounding is 2e-3, the accumulation of Hopper about 1e-3."""
LAYER_TOLERANCE = 3e-2
"""The same through an expert's two layers, where one rounding to FP8 in a thousand may flip."""


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--skip-times", action="store_true", help="only the checks")
    options = arguments.parse_args()
    for line in environment():
        print(line)
    if not torch.cuda.is_available():
        print("no CUDA device: dry check, nothing below ran on a GPU")
        return dry_check()
    try:
        engine = hopper.HopperEngine(compose("precision=fp8").precision.fp8)
    except UserError as error:
        print(error)
        return 2
    failed = 0
    for name, check in checks(engine).items():
        problem = check()
        failed += problem is not None
        print(f"{'FAIL' if problem else 'ok  '}  {name}{f': {problem}' if problem else ''}", flush=True)
    if not options.skip_times:
        times.dense(engine)
        times.grouped(engine)
        times.quantisers(engine)
        times.layers()
    return 1 if failed else 0


def environment() -> list[str]:
    """Versions of all that takes part."""
    lines = [f"torch {torch.__version__}, CUDA {torch.version.cuda}, scaled_mm {hasattr(F, 'scaled_mm')}"]
    for package in ("triton", hopper.DEEP_GEMM, "apache-tvm-ffi"):
        try:
            lines.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{package} is not installed")
    if torch.cuda.is_available():
        lines.append(f"{torch.cuda.get_device_name()}, compute capability {torch.cuda.get_device_capability()}")
    return lines


def dry_check() -> int:
    """All that a machine without a GPU can show."""
    for precision_input in quantiser_inputs():
        for cast in quantiser_casts():
            quantize_reference(precision_input, cast)
    reference_layers()
    print("ok    CPU side of the comparisons")
    if importlib.util.find_spec("triton") is None:
        print("skip  kernels for sm_90: triton is not installed")
        return 0
    from bench.compile_kernels import compile_all

    found = compile_all((90,))
    failed = {name: binary.problem for (name, _), binary in found.items() if binary.problem}
    for name, problem in failed.items():
        print(f"FAIL  {name}: {problem}")
    print(
        f"ok    {len(found) - len(failed)} of {len(found)} kernels compile for sm_90 without spills and byte-wide stores"
    )
    return 1 if failed else 0


def checks(engine: hopper.HopperEngine) -> dict[str, Callable[[], str | None]]:
    """Every comparison with the CPU, by name. Each returns None, or the problem."""
    return {
        "quantisers, q and scale bit for bit": lambda: check_quantisers(engine),
        "E5M6 bit for bit": check_e5m6,
        "scaled_mm 1x128 by 128x128, K / 128 not a multiple of 4, ragged": lambda: check_dense(engine, False),
        "scaled_mm 1x128 by 1x128 (Wgrad), ragged": lambda: check_dense(engine, True),
        "linear, output projection and experts, forward and backward": check_layers,
        "experts with every granularity that CUDA takes": check_granularities,
    }


def quantiser_inputs() -> list[Tensor]:
    """Many orders of magnitude, with a row of zeros, in both formats that occur."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 896, generator=generator) * torch.exp(3 * torch.randn(512, 896, generator=generator))
    x[3] = 0
    return [x, x.bfloat16()]


def quantiser_casts() -> list[Cast]:
    blocks = ((1, TILE), (TILE, 1), (TILE, TILE))
    return [
        Cast(format, block, pow2, floor)
        for format, block, pow2, floor in itertools.product((E4M3, E5M2), blocks, (False, True), (1e-4, 1e-12))
    ]


def check_quantisers(engine: hopper.HopperEngine) -> str | None:
    kernels = engine._kernels
    for x, cast in itertools.product(quantiser_inputs(), quantiser_casts()):
        reference = quantize_reference(x, cast)
        if cast.block == (1, TILE):
            q, scale = kernels.quantize_tiles(x.cuda(), cast)
        elif cast.block == (TILE, 1):
            q, scale = (tensor.mT for tensor in kernels.quantize_columns(x.cuda(), cast))
        else:
            q, scale = kernels.quantize_blocks(x.cuda(), cast, transposed=False)
        wrong = (q.float().cpu() != reference.q.float()).sum().item()
        wrong_scales = (scale.cpu() != reference.scale).sum().item()
        if wrong or wrong_scales:
            return f"{cast} of {x.dtype}: {wrong} values and {wrong_scales} scales differ"
    return None


def check_e5m6() -> str | None:
    cast = Cast(E5M6, (1, TILE), True)
    for x in quantiser_inputs():
        ours, reference = quantize_reference(x.cuda(), cast), quantize_reference(x, cast)
        if not (torch.equal(ours.q.cpu(), reference.q) and torch.equal(ours.scale.cpu(), reference.scale)):
            return f"{x.dtype} differs"
    return None


def check_dense(engine: hopper.HopperEngine, wgrad: bool) -> str | None:
    generator = torch.Generator().manual_seed(1)
    cpu = CpuEngine()
    for rows, outputs, inputs in ((256, 384, 640), (1000, 576, 7168), (4096, 2112, 1536)):
        x, w = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
        if wgrad:
            x, w = x.t().contiguous(), w.t().contiguous()  # contracted over their rows
        right = TILES if wgrad else BLOCKS
        y = engine.product(
            engine.operand(x.cuda(), TILES, transposed=wgrad),
            engine.operand(w.cuda(), right, transposed=wgrad),
            torch.bfloat16,
        )
        expected = cpu.product(cpu.operand(x, TILES, wgrad), cpu.operand(w, right, wgrad), torch.float32)
        error = relative(y, expected)
        if not error < PRODUCT_TOLERANCE:
            return f"{rows} x {outputs} x {inputs}: relative error {error:.1e}"
    return None


def check_layers() -> str | None:
    return compare(run_layers(torch.device("cuda")), reference_layers())


def check_granularities() -> str | None:
    for overrides in (
        ["precision.fp8.gradient=e4m3/128x128/fp32"],
        ["precision.fp8.gradient=e4m3/tensor/fp32", "precision.fp8.weight=e4m3/tensor/fp32"],
        ["precision.fp8.activation=e4m3/row/fp32", "precision.fp8.dispatched=e4m3/row/pow2"],
    ):
        problem = compare(run_layers(torch.device("cuda"), *overrides), reference_layers(*overrides))
        if problem:
            return f"{overrides}: {problem}"
    return None


def reference_layers(*overrides: str) -> list[Tensor]:
    return run_layers(torch.device("cpu"), *overrides)


def run_layers(device: torch.device, *overrides: str) -> list[Tensor]:
    """Outputs and gradients of a linear layer, the output projection, and ragged experts with an idle one."""
    precision = Fp8Precision(compose("precision=fp8", *overrides).precision.fp8, device)
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).bfloat16().to(device).requires_grad_()

    x, w, rows = normal(300, 1536), normal(576, 1536, scale=0.025), normal(700, 512)
    w13, w2 = normal(4, 512, 512, scale=0.044), normal(4, 512, 256, scale=0.0625)
    counts = torch.tensor([300, 0, 1, 399], device=device)
    gates = torch.rand(700, generator=generator).to(device).requires_grad_()
    results = []
    for output, inputs in (
        (precision.linear(x, w), (x, w)),
        (precision.linear(x, w, "output"), (x, w)),
        (precision.expert_ffn(rows, gates, w13, w2, counts), (rows, gates, w13, w2)),
    ):
        grad = torch.randn(output.shape, generator=generator).bfloat16().to(device)
        results += [output.detach(), *torch.autograd.grad(output, inputs, grad)]
    return results


def compare(ours: list[Tensor], expected: list[Tensor]) -> str | None:
    errors = [relative(a, b) for a, b in zip(ours, expected, strict=True)]
    worst = max(errors)
    return None if worst < LAYER_TOLERANCE else f"relative errors {', '.join(f'{error:.1e}' for error in errors)}"


def relative(ours: Tensor, expected: Tensor) -> float:
    return ((ours.cpu().float() - expected.float()).norm() / expected.float().norm()).item()


if __name__ == "__main__":
    sys.exit(main())
