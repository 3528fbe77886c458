"""An attention layer with sparse attention beside dense attention, by length: processor seconds of forward and backward.

    python -m bench.sparse_layer [--shapes tiny wide] [--lengths 2048 4096 8192 16384 32768] [--top-k 256] [--parts]

tiny is the layer of `conf=tiny_dsa`, in bf16. wide has 16 heads, and twice its ranks and widths. Every layer runs on one thread, in a process
that runs nothing else, and processor seconds do not count the time of other processes. The indexer learns. --parts also times the
choice of keys, the attention and the indexer's loss.

Takes about five minutes; to 8192, one.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import train.kernels.cpu.tuned  # noqa: F401  before torch allocates anything

# isort: split
import torch

from bench.parts import small
from conf.load import compose
from train.kernels.choice import build_kernels
from train.kernels.plain.high import HighPrecision
from train.kernels.plain.plain_kernels import PlainKernels
from train.model.mla import MLA
from train.model.rope import Rope
from train.model.sequence import Positions

WIDE = {"heads": 16, "q_rank": 256, "kv_rank": 128, "nope_head_dim": 64, "rope_head_dim": 32, "v_head_dim": 64}
PARTS = ("choose_keys", "attend_chosen", "attend_chosen_backward", "chosen_index_loss")


def build(shape: str, length: int, top_k: int) -> Callable[[], None]:
    """Builds a step: forward and backward of a layer. top_k: 0 for dense attention."""
    model = compose("conf=tiny_dsa").model
    model = replace(model, sparse=replace(model.sparse, top_k=top_k, heads=model.sparse.heads if top_k else 0))
    model = replace(model, **(WIDE if shape == "wide" else {}))
    precision = HighPrecision(torch.bfloat16, build_kernels("cpu"))
    layer = small(MLA(model, precision, Rope(model, length), top_k > 0, dtype=torch.bfloat16))
    x_BTD = torch.randn(1, length, model.hidden, dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        positions = Positions(length)
        positions.choices.weight = 1 / length
        layer(x_BTD, nullcontext(), positions).backward(torch.ones_like(x_BTD))

    return step


def seconds(step: Callable[[], None], spent: dict[str, float]) -> float:
    """Processor seconds of the faster of two steps. Adds the processor seconds of every part to `spent`."""

    def timed(name: str) -> Callable[..., Any]:
        original = getattr(PlainKernels, name)

        def run(*given: Any, **named: Any) -> Any:
            began = time.process_time()
            try:
                return original(*given, **named)
            finally:
                spent[name] = spent.get(name, 0) + time.process_time() - began

        return run

    took = []
    for _ in range(2):
        spent.clear()
        with ExitStack() as stack:
            for name in PARTS:
                stack.enter_context(mock.patch.object(PlainKernels, name, timed(name)))
            began = time.process_time()
            step()
        took.append(time.process_time() - began)
    return min(took)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", choices=["tiny", "wide"], default=["tiny", "wide"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--top-k", type=int, default=256)
    parser.add_argument("--parts", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for shape in args.shapes:
        print(f"{shape:10} {'dense':>8} {'sparse':>8}  dense/sparse")
        for length in args.lengths:
            spent: dict[str, float] = {}
            dense, sparse = (seconds(build(shape, length, top_k), spent) for top_k in (0, args.top_k))
            print(f"{length:10} {dense:8.2f} {sparse:8.2f}  {dense / sparse:.2f}", flush=True)
            if args.parts:
                print(" ".join(f"{name} {value:.2f}" for name, value in spent.items()))


if __name__ == "__main__":
    main()
