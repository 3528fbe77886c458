"""A training step of ours beside transformers' DeepseekV3ForCausalLM with torch's fused AdamW, in one run.

Equal work on both sides: the same sizes, dtype, threads and tokens; forward, backward, clipping to norm 1, AdamW. Neither
has MTP or recomputation here, as transformers has none. Each side is a process of its own, set up as its users run it
(ours tunes the allocator at start, transformers takes its default experts), and the two take turns, so that the noise of
the machine falls on both. Prints medians, their ratio, and the range of the ratio over the rounds.

    python -m bench.train_step [--threads 2] [--dtype bf16] [--rounds 7] [--shape debug|tiny]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SHAPES = {
    # torchtitan's debug model: 33M parameters
    "debug": {
        "vocab_size": 2048, "hidden": 256, "layers": 6, "dense_layers": 1, "heads": 16, "q_rank": None, "kv_rank": 512,
        "nope_head_dim": 128, "rope_head_dim": 64, "v_head_dim": 128, "dense_width": 1024, "expert_width": 256,
        "experts": 8, "shared_experts": 2, "top_k": 3, "groups": 1, "top_groups": 1, "route_scale": 1.0,
    },
    "tiny": {},
}  # fmt: skip
TOKENS = {"debug": (1, 512), "tiny": (16, 256)}
"""Sequences per step and their length."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each side in a round")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="debug")
    parser.add_argument("--side", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        _serve(options)
        return
    sides = {name: _start(name) for name in ("ours", "transformers")}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, process in sides.items():
            rates[name].append(_ask(process, options.seconds))
    for process in sides.values():
        process.stdin.close()
        process.wait()
    ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
    print(f"{options.shape}, {options.dtype}, {options.threads} threads, {TOKENS[options.shape]} (sequences, tokens)")
    for name, values in rates.items():
        print(f"  {name:13} {statistics.median(values):8.0f} tokens/s  ({min(values):.0f} to {max(values):.0f})")
    print(f"  ratio {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")


def _start(side: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "bench.train_step", "--side", side, *sys.argv[1:]]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert json.loads(process.stdout.readline()) == "ready"
    return process


def _ask(process: subprocess.Popen, seconds: float) -> float:
    process.stdin.write(f"{seconds}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def _serve(options: argparse.Namespace) -> None:
    """One side: builds its step, then answers each line of seconds with tokens per second."""
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    step = {"ours": _ours, "transformers": _transformers}[options.side](options)
    tokens = TOKENS[options.shape][0] * TOKENS[options.shape][1]
    for _ in range(3):
        step()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        began, steps = time.perf_counter(), 0
        while time.perf_counter() - began < float(line):
            step()
            steps += 1
        print(json.dumps(steps * tokens / (time.perf_counter() - began)), flush=True)


def _model_config(options: argparse.Namespace):
    from conf.load import compose

    overrides = [f"model.{key}={'null' if value is None else value}" for key, value in SHAPES[options.shape].items()]
    batch, length = TOKENS[options.shape]
    return compose(
        *overrides, "model.mtp_depth=0", "model.recompute=[]", f"precision={options.dtype}", f"seq_len={length}",
        f"batch_size={batch}", f"micro_batch_size={batch}", "cluster.device=cpu",
    )  # fmt: skip


def _tokens(options: argparse.Namespace, vocab: int):
    import torch

    batch, length = TOKENS[options.shape]
    return torch.randint(vocab, (batch, length + 1), generator=torch.Generator().manual_seed(1))


def _ours(options: argparse.Namespace):
    """The trainer's own step: pipeline of one, DeepSpeed engine, our AdamW."""
    from train.cpu import tune_cpu

    tune_cpu()
    import torch
    import torch.distributed as dist

    from parallel.mesh import Layout, build_mesh
    from train.parallelize import parallelize

    torch.set_num_threads(options.threads)
    config = _model_config(options)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parts = parallelize(config, build_mesh(Layout()), torch.device("cpu"))
    tokens_BS = _tokens(options, config.model.vocab_size)
    parts.zero.set_lr(1e-4)

    def step() -> None:
        with parts.zero.accumulate():
            parts.pipeline.step(tokens_BS, micro_batches=1)
        parts.zero.step()

    return step


def _transformers(options: argparse.Namespace):
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.set_num_threads(options.threads)
    model = _model_config(options).model
    config = DeepseekV3Config(
        vocab_size=model.vocab_size, hidden_size=model.hidden, intermediate_size=model.dense_width,
        moe_intermediate_size=model.expert_width, num_hidden_layers=model.layers, num_attention_heads=model.heads,
        num_key_value_heads=model.heads, n_shared_experts=model.shared_experts, n_routed_experts=model.experts,
        routed_scaling_factor=model.route_scale, kv_lora_rank=model.kv_rank, q_lora_rank=model.q_rank,
        qk_rope_head_dim=model.rope_head_dim, v_head_dim=model.v_head_dim, qk_nope_head_dim=model.nope_head_dim,
        n_group=model.groups, topk_group=model.top_groups, num_experts_per_tok=model.top_k,
        first_k_dense_replace=model.dense_layers, norm_topk_prob=True, max_position_embeddings=model.max_seq_len,
        use_cache=False,
    )  # fmt: skip
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    peer = DeepseekV3ForCausalLM(config).to(dtype).train()
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens_BS = _tokens(options, model.vocab_size)[:, :-1]

    def step() -> None:
        peer(input_ids=tokens_BS, labels=tokens_BS).loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
