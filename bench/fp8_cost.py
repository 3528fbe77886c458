"""Cost of the CPU emulation of FP8 beside bf16: linear layers, routed experts, and a model's forward and backward.

    python -m bench.fp8_cost [--threads 2] [--rounds 7] [--only linear|experts|model]

In every round each precision takes one step of the same work, in turn, so that all see the same machine load. Prints
the minimum wall time and the minimum CPU time (which other work disturbs less), and their ratios to bf16. `fast` keeps
values instead of bytes for backward, and rounds operands with fp32 scales to bf16.

Takes about 5 minutes.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from functools import partial

import train.kernels.cpu.tuned  # noqa: F401  before torch allocates anything

# isort: split
import torch

from conf.load import compose
from train.kernels.choice import build_kernels
from train.kernels.fp8.fp8 import Fp8Precision
from train.kernels.plain.high import HighPrecision
from train.model.deepseek import DeepSeekV3
from train.model.init import initialise

LINEAR = ((4096, 512, 1536), (4096, 1024, 1024), (4096, 2048, 1024), (2048, 2048, 2048))
"""Sizes (tokens, inputs, outputs): V3's attention and FFN projections at a quarter to a half of their widths."""
EXPERTS = ((4096, 8, 64, 512, 256), (4096, 8, 32, 1024, 512), (2048, 4, 16, 2048, 512))
"""Sizes: tokens, experts per token, experts, width, inner width."""
MODELS = (("tiny", []), ("tiny", ["model.hidden=512", "model.expert_width=256", "model.kv_rank=128"]))
"""Recipes and settings."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--only", choices=("linear", "experts", "model"))
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'work':52s} {'precision':10s} {'wall ms':>9s} {'/ bf16':>7s} {'cpu ms':>9s} {'/ bf16':>7s}")
    works = {"linear": _linear_works, "experts": _expert_works, "model": _model_works}
    for name, make in works.items():
        if options.only in (None, name):
            for title, steps in make():
                _compare(title, steps, options.rounds)


def _precisions() -> dict[str, HighPrecision | Fp8Precision]:
    recipes = {
        "ue8m0": ["precision=fp8_ue8m0"],
        "fp8": ["precision=fp8"],
    }
    cpu, kernels = torch.device("cpu"), build_kernels("cpu")
    fp8 = {name: Fp8Precision(compose(*given).precision.fp8, cpu, kernels) for name, given in recipes.items()}
    return {"bf16": HighPrecision(torch.bfloat16, kernels), **fp8}


def _linear_works() -> Iterable[tuple[str, dict[str, Callable]]]:
    for tokens, inputs, outputs in LINEAR:
        x = torch.randn(tokens, inputs).bfloat16().requires_grad_()
        w = (torch.randn(outputs, inputs) / inputs**0.5).bfloat16().requires_grad_()
        grad = torch.randn(tokens, outputs).bfloat16()

        def step(precision, x=x, w=w, grad=grad) -> None:
            torch.autograd.grad(precision.linear(x, w), (x, w), grad)

        yield f"linear {tokens} x {inputs} -> {outputs}", {n: partial(step, p) for n, p in _precisions().items()}


def _expert_works() -> Iterable[tuple[str, dict[str, Callable]]]:
    for tokens, top_k, experts, width, inner in EXPERTS:
        ids = torch.rand(tokens, experts).topk(top_k).indices
        counts, rows = ids.flatten().bincount(minlength=experts), tokens * top_k
        x = torch.randn(rows, width).bfloat16().requires_grad_()
        gates = torch.rand(rows).requires_grad_()
        w13 = (torch.randn(experts, 2 * inner, width) / width**0.5).bfloat16().requires_grad_()
        w2 = (torch.randn(experts, width, inner) / inner**0.5).bfloat16().requires_grad_()
        inputs, grad = (x, gates, w13, w2), torch.randn(rows, width).bfloat16()

        def step(precision, inputs=inputs, counts=counts, grad=grad) -> None:
            torch.autograd.grad(precision.expert_ffn(*inputs, counts), inputs, grad)

        title = f"experts {tokens} tok x {top_k} of {experts}, {width} x {inner}"
        yield title, {name: partial(step, precision) for name, precision in _precisions().items()}


def _model_works() -> Iterable[tuple[str, dict[str, Callable]]]:
    for recipe, overrides in MODELS:
        config = compose(f"conf={recipe}", *overrides)
        batch = min(8, config.micro_batch_size)
        tokens = torch.randint(config.model.vocab_size, (batch, config.seq_len + 1))
        steps = {}
        for name, precision in _precisions().items():
            model = DeepSeekV3.whole(
                config.model, precision, seq_len=config.seq_len, device="cpu", dtype=torch.bfloat16
            )
            initialise(model, seed=1)
            model.mtp_weight = 0.3

            def step(model=model, tokens=tokens) -> None:
                model.zero_grad()
                model(tokens).sum().backward()

            steps[name] = step
        yield f"model {recipe} {' '.join(o.split('.')[1] for o in overrides)}", steps


def _compare(title: str, steps: dict[str, Callable], rounds: int) -> None:
    best = {name: (float("inf"), float("inf")) for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if turn:  # the first round warms up
                best[name] = min(best[name][0], wall), min(best[name][1], cpu)
    for name, (wall, cpu) in best.items():
        base = best["bf16"]
        print(
            f"{title:52s} {name:10s} {wall * 1e3:9.1f} {wall / base[0]:7.2f} {cpu * 1e3:9.1f} {cpu / base[1]:7.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
