"""A routed MoE layer over 2 ranks, forward and backward, beside DeepSpeed's two MoE layers in the same run.

    python -m bench.dispatch [--rounds 15] [--tokens 1024] [--malloc plain]

Every layer has a router, 16 SwiGLU experts of width 512, top 4, hidden 256, EP 2 on gloo, 1024 tokens (--tokens) and
one thread per rank; no token is dropped. In every round each layer takes one step, in turn, so that all see the same
machine load; a step ends when the slower rank finishes.

Prints medians, minimum times, the ratio of medians to the first row (the trainer's own layer), and the median CPU time
of rank 0, which other work disturbs less. `--malloc tuned` (the default, as in training) keeps freed memory in the
process, for every layer; `plain` uses the C library's defaults.

    flat, node-limited  the project's dispatchers; experts in a loop (bench/expert_loop.py) or grouped_mm (the
                        trainer's)
    deepspeed MoE       deepspeed.moe.layer.MoE with drop_tokens=False: pads every expert to the fullest one; random
                        routers load experts almost evenly, so the padding adds 7 % of GEMM work here, not the worst
                        case
    deepspeed AutoEP    AutoEPMoELayer made from a one-layer Mixtral, grouped_mm experts

Takes about half a minute.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from bench.expert_loop import expert_loop
from parallel.expert.build import build_dispatcher
from train.kernels.choice import build_kernels
from train.kernels.cpu.processor import tune_cpu
from train.kernels.plain.high import HighPrecision

RANKS, HIDDEN, FFN, EXPERTS, TOP_K = 2, 256, 512, 16, 4


class Ours(nn.Module):
    """Softmax router, the project's dispatcher, and its experts (grouped_mm) or those of bench/expert_loop.py."""

    def __init__(self, name: str, wire: str, experts: str, dtype: torch.dtype):
        super().__init__()
        local = EXPERTS // RANKS
        self.router = nn.Parameter(0.05 * torch.randn(EXPERTS, HIDDEN, dtype=dtype))
        self.w13 = nn.Parameter(0.05 * torch.randn(local, 2 * FFN, HIDDEN, dtype=dtype))
        self.w2 = nn.Parameter(0.05 * torch.randn(local, HIDDEN, FFN, dtype=dtype))
        world = dist.group.WORLD
        alone = [dist.new_group([rank]) for rank in range(RANKS)][dist.get_rank()]
        high = HighPrecision(dtype, build_kernels("cpu"), recompute_swiglu=False)
        self.experts = high.expert_ffn if experts == "grouped" else expert_loop
        self.dispatcher = build_dispatcher(
            name, experts=EXPERTS, wire=wire, ep_group=world, intra_group=world, inter_group=alone, ranks_per_node=RANKS
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        gates_TK, ids_TK = F.linear(x_TD, self.router).float().softmax(1).topk(TOP_K, 1)
        gates_TK = gates_TK / gates_TK.sum(1, keepdim=True)
        routed = self.dispatcher.dispatch(x_TD, ids_TK, gates_TK)
        out_RD = self.experts(routed.rows_RD, routed.gates_R, self.w13, self.w2, routed.counts_E)
        return self.dispatcher.combine(out_RD, routed)


class SwiGLU(nn.Module):
    """One expert, in the form DeepSpeed's MoE copies."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, FFN, bias=False, dtype=dtype)
        self.up = nn.Linear(HIDDEN, FFN, bias=False, dtype=dtype)
        self.down = nn.Linear(FFN, HIDDEN, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def deepspeed_moe(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    from deepspeed.moe.layer import MoE

    layer = MoE(HIDDEN, SwiGLU(dtype), num_experts=EXPERTS, ep_size=RANKS, k=TOP_K, drop_tokens=False)
    with redirect_stdout(None):  # DeepSpeed prints that it creates a group
        layer.set_deepspeed_parallelism()
    return lambda x_TD: layer(x_TD[None])[0][0]


def deepspeed_autoep(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
    }
    model = MixtralForCausalLM(
        MixtralConfig(**sizes, num_hidden_layers=1, vocab_size=64, num_attention_heads=4, num_key_value_heads=4)
    ).to(dtype)
    config = parse_autoep_config({"enabled": True, "autoep_size": RANKS, "preset_model": "mixtral"})
    (spec,) = AutoEP(model, config).ep_parser()
    # The layer is not put back into the model, because the output recorder of transformers 5 would then fail.
    layer = AutoEPMoELayer(spec, model.model.layers[0].mlp, ep_size=RANKS, ep_rank=dist.get_rank(), config=config)
    layer.set_deepspeed_parallelism()

    def call(x_TD: Tensor) -> Tensor:
        y = layer(x_TD[None])
        return (y[0] if isinstance(y, tuple) else y).view_as(x_TD)

    return call


def contenders(dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "flat bf16, grouped": Ours("flat", "bf16", "grouped", dtype),
        "flat bf16, loop": Ours("flat", "bf16", "loop", dtype),
        "flat fp8, loop": Ours("flat", "fp8", "loop", dtype),
        "node-limited bf16, loop": Ours("node_limited", "bf16", "loop", dtype),
        "node-limited fp8, loop": Ours("node_limited", "fp8", "loop", dtype),
        "deepspeed MoE": deepspeed_moe(dtype),
        "deepspeed AutoEP": deepspeed_autoep(dtype),
    }


def step(layer: Callable[[Tensor], Tensor], x_TD: Tensor, grad_TD: Tensor) -> tuple[float, float]:
    """Returns the seconds of one forward and backward until every rank has finished, and the CPU seconds of this
    rank."""
    dist.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    layer(x_TD).backward(grad_TD)
    cpu = time.process_time() - cpu
    dist.barrier()
    return time.perf_counter() - start, cpu


def worker(rank: int, folder: str, rounds: int, tokens: int, malloc: str) -> None:
    """Runs one rank. Rank 0 writes the times to FOLDER/times.json."""
    if malloc == "tuned":
        tune_cpu()
    import deepspeed
    import deepspeed.ops

    # DeepSpeed's shared-memory collective would take two minutes to compile, and it can abort at exit.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    deepspeed.init_distributed("gloo", verbose=False)
    measured = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        layers = contenders(dtype)
        x_TD = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(dtype).requires_grad_()
        grad_TD = torch.randn(tokens, HIDDEN).to(dtype)
        times = {name: [] for name in layers}
        for index in range(rounds + 2):
            for name, layer in layers.items():
                taken = step(layer, x_TD, grad_TD)
                if index >= 2:
                    times[name].append(taken)
        measured[str(dtype).removeprefix("torch.")] = times
    if rank == 0:
        (Path(folder) / "times.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


DispatchTimes = dict[str, list[tuple[float, float]]]
"""(wall seconds, CPU seconds of rank 0) of every timed step, by layer."""


def measure(rounds: int, tokens: int = 1024, malloc: str = "tuned") -> dict[str, DispatchTimes]:
    """Runs the ranks. Returns the times by dtype (float32, bfloat16)."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, args=(folder, rounds, tokens, malloc), nprocs=RANKS)
        return json.loads((Path(folder) / "times.json").read_text())


def show(dtype: str, times: DispatchTimes) -> None:
    medians = {name: statistics.median(wall for wall, _ in taken) for name, taken in times.items()}
    ours = next(iter(medians.values()))
    print(f"\n{dtype:14}, ms a step{'':7}{'median':>8}{'least':>8}{'ratio':>7}{'CPU':>8}")
    for name, taken in times.items():
        cpu = statistics.median(cpu for _, cpu in taken)
        least = min(wall for wall, _ in taken)
        ratio = medians[name] / ours
        print(f"{name:32}{medians[name] * 1e3:8.1f}{least * 1e3:8.1f}{ratio:7.2f}{cpu * 1e3:8.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of every layer")
    parser.add_argument("--tokens", type=int, default=1024, help="of a rank and step")
    parser.add_argument("--malloc", choices=("tuned", "plain"), default="tuned")
    args = parser.parse_args()
    for dtype, times in measure(args.rounds, args.tokens, args.malloc).items():
        show(dtype, times)


if __name__ == "__main__":
    main()
