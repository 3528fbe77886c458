"""How many operations the parts of a split backward take: zbv and dualpipev run its inputs (I) and its weights (W) apart.

    python -m bench.split_backward [--hidden 256]

Counts the FLOP of all matrix products of one chunk of two layers, one dense and one of experts, from the
middle of a pipeline, and prints them in units of the forward. I and W together should take what an undivided
backward (B) takes: a product that both of them do is done twice. Times are CPU seconds of the calling thread, least of
the rounds.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.flop_counter import FlopCounterMode

from conf.load import compose
from parallel.pipeline.graph import kept_graph
from train.model.deepseek import DeepSeekV3
from train.model.init import initialise
from train.precision.build import activation_dtype, build_precision

PRODUCTS = {
    torch.ops.aten._grouped_mm: lambda a, b, *_, out_shape, **__: 2 * a[0] * a[1] * b[-1],
    torch.ops.aten.baddbmm_: lambda _, a, b, out_shape, **__: 2 * a[0] * a[1] * a[2] * b[-1],
}
"""FLOP from shapes of the products that torch's counter does not know; grouped: rows by (E, in, out), or a sum over rows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "precision        operations, F = 1:  B      I      W    I+W / B  |  CPU ms:  F      B      I      W   (I+W) / B"
    )
    for name in ("fp32", "bf16", "fp8", "fp8_ue8m0"):
        _show(name, _measure(name, options.hidden, options.rounds))


def _measure(name: str, hidden: int, rounds: int) -> dict[str, tuple[int, float]]:
    """(operations, least CPU seconds) of F, B, I and W."""
    config = compose(f"precision={name}", f"model.hidden={hidden}")
    dtype = activation_dtype(config.precision)
    chunk = DeepSeekV3(
        replace(config.model, dense_layers=1), build_precision(config.precision, torch.device("cpu")),
        seq_len=config.seq_len, layers=range(2), has_embedding=False, has_head=False, dtype=dtype,
    )  # fmt: skip
    initialise(chunk, seed=1)
    hidden_BTD = torch.randn(4, config.seq_len, hidden).to(dtype).requires_grad_()
    best: dict[str, tuple[int, float]] = {}
    for _ in range(rounds + 1):
        _round(chunk, hidden_BTD, best)
    return best


def _round(chunk: DeepSeekV3, hidden_BTD: Tensor, best: dict[str, tuple[int, float]]) -> None:
    """One undivided backward and one split, the best kept."""

    def timed(name: str, run: Callable):
        started = time.thread_time()
        result = run()
        seconds = time.thread_time() - started
        best[name] = best.get(name, (0,))[0], min(seconds, best.get(name, (0, 1e9))[1])
        return result

    def counted(name: str, run: Callable):
        if name in best:
            return timed(name, run)
        with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter:
            result = run()
        best[name] = counter.get_total_flops(), 1e9
        return result

    upstream = torch.ones_like(hidden_BTD)
    out = counted("F", lambda: chunk(hidden_BTD))
    counted("B", lambda: out.backward(upstream))
    out = chunk(hidden_BTD)
    weights, graph = list(chunk.parameters()), kept_graph(out)
    _, groups = counted("I", lambda: stage_backward_input([out], [upstream], [hidden_BTD], iter(weights)))
    counted("W", lambda: stage_backward_weight(iter(weights), groups))
    del graph
    chunk.zero_grad()
    hidden_BTD.grad = None


def _show(name: str, best: dict[str, tuple[int, float]]) -> None:
    forward = best["F"][0]
    counts = {part: count / forward for part, (count, _) in best.items()}
    times = {part: 1e3 * seconds for part, (_, seconds) in best.items()}
    print(
        f"{name:32} {counts['B']:6.3f} {counts['I']:6.3f} {counts['W']:6.3f} {(counts['I'] + counts['W']) / counts['B']:8.3f}  |"
        f" {times['F']:11.1f} {times['B']:6.1f} {times['I']:6.1f} {times['W']:6.1f} {(times['I'] + times['W']) / times['B']:8.2f}"
    )


if __name__ == "__main__":
    main()
