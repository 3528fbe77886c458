"""A training step beside torchtitan's and transformers', and FP8 layers beside TransformerEngine's, on one GPU.

The same sizes and tokens in bf16 on all sides; forward, backward, clipping to norm 1, AdamW; no side recomputes.
torchtitan's blocks are compiled, as it recommends on a GPU. Our side keeps and updates fp32 weights beside the bf16
ones, as in the paper; the peers' weights and moments are only bf16, which favours them in time and memory. The sides
run one after another, each in its own process (bench/sides.py).
"""

import importlib.util
import json
import statistics
import sys
from dataclasses import asdict
from functools import partial

import torch

from bench.gpu.line import Check, Finding, NotTried
from bench.gpu.machine import Machine
from bench.gpu.timing import median_seconds
from bench.layouts import LayoutCase
from bench.sides import Side, serve
from bench.train_step import PEERS, Case, own_step, random_tokens, torch_dtype, transformers_model
from train.model.count import flops_per_token

SECONDS, ROUNDS = 3.0, 3
LIMIT = 100.0


def checks(machine: Machine) -> list[Check]:
    found = [Check(f"a step of {name}", partial(step, machine, name), LIMIT) for name in BUILDERS]
    return [*found, Check("FP8 layers of TransformerEngine", partial(transformer_engine, machine))]


def case_of(machine: Machine) -> LayoutCase:
    return LayoutCase("gpu", threads=8) if machine.on_gpu else LayoutCase("debug", length=64)


def step(machine: Machine, name: str) -> Finding:
    """Tokens per second and peak memory."""
    case = case_of(machine)
    words = ["-m", "bench.gpu.peers", name, machine.device.type, json.dumps(asdict(case))]
    side = Side([interpreter(machine, name), *words], case.tokens, threads=case.threads)
    try:
        rates = [side.turn(SECONDS if machine.on_gpu else SECONDS / 3)[0] for _ in range(ROUNDS)]
        first, peak = side.first_step, side.peak_memory()
    finally:
        side.kill()
    config, rate = case.config(), statistics.median(rates)
    figures = {
        "tokens/s": rate, "slowest": min(rates), "fastest": max(rates), "TFLOP/s": rate * flops_per_token(config.model, config.seq_len) / 1e12,
        "peak (GiB)": peak / 2**30, "to the first step (s)": first,
    }  # fmt: skip
    return Finding(figures)


def interpreter(machine: Machine, name: str) -> str:
    """Raises NotTried where the peer is not installed and cannot be."""
    if name == "Sluice" or importlib.util.find_spec(name) is not None:
        return sys.executable
    if name != "torchtitan":
        raise NotTried(f"{name} is not installed: pip install '{name}'")
    from bench.torchtitan_peer import environment

    if not machine.on_gpu and not (PEERS / name / "installed").exists():
        raise NotTried("torchtitan is not installed; a dry check installs nothing, python -m bench.train_step does")
    try:
        return str(environment(PEERS / name))
    except RuntimeError as error:
        raise NotTried(f"torchtitan cannot be installed: {error}") from error


def transformer_engine(machine: Machine) -> Finding:
    """The layers of `rates`, with the 1x128 by 128x128 recipe."""
    if importlib.util.find_spec("transformer_engine") is None:
        raise NotTried("TransformerEngine is not installed: pip install 'transformer_engine[pytorch]'")
    machine.need_gpu("TransformerEngine")
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8BlockScaling

    common = {"bias": False, "params_dtype": torch.bfloat16, "device": "cuda"}
    linear, up = te.Linear(7168, 7168, **common), te.GroupedLinear(8, 7168, 4096, **common)
    x, rows = (torch.randn(n, 7168, device=machine.device).bfloat16().requires_grad_() for n in (4096, 32768))

    def run(layer, x, *rest):
        with te.fp8_autocast(enabled=True, fp8_recipe=Float8BlockScaling()):
            y = layer(x, *rest)
        y.backward(torch.ones_like(y))

    works = {
        "linear, 4096 x 7168 -> 7168": (lambda: run(linear, x), 6 * 4096 * 7168 * 7168),
        "8 experts' w13, 4096 rows each": (lambda: run(up, rows, [4096] * 8), 6 * 32768 * 7168 * 4096),
    }
    table = [["forward and backward", "ms", "TFLOP/s"]]
    for name, (work, operations) in works.items():
        seconds = median_seconds(work, machine, 10)
        table.append([name, 1e3 * seconds, operations / seconds / 1e12])
    return Finding({}, table=table)


# The sides, each in its own process


def sluice(case: Case, device: str):
    import torch.distributed as dist

    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    return own_step(case, device=device)


def transformers(case: Case, device: str):
    with torch.device(device):
        peer = transformers_model(case)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens_BS = random_tokens(case, peer.config.vocab_size)[:, :-1].to(device)

    def run() -> None:
        peer(input_ids=tokens_BS, labels=tokens_BS).loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def torchtitan(case: Case, device: str):
    from bench.torchtitan_peer import build_step

    model = case.config().model
    tokens_BS = random_tokens(case, model.vocab_size).to(device)
    return build_step(model, tokens_BS, torch_dtype(case), case.mtp, compiled=device == "cuda")


BUILDERS = {"Sluice": sluice, "torchtitan": torchtitan, "transformers": transformers}


def main() -> None:
    name, device, words = sys.argv[1:]
    case = LayoutCase(**json.loads(words))

    def build():
        torch.set_num_threads(case.threads)
        run = BUILDERS[name](case, device)

        def waited() -> None:
            run()
            if device == "cuda":
                torch.cuda.synchronize()

        return waited

    serve(build, device)


if __name__ == "__main__":
    from train.kernels.cpu.processor import tune_cpu

    tune_cpu()
    main()
