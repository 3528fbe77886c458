"""Our training step beside those of transformers and torchtitan, in one run.

The same sizes, threads and tokens on all sides; forward, backward, clipping to norm 1, AdamW. No side recomputes, and
no side has MTP unless --mtp asks for it, which transformers does not support. Each side runs its matmuls in bf16 or
fp32, whichever is faster here in a few short rounds, unless --dtype sets one for all: a CPU without bf16 instructions
can take minutes for a peer's step that takes seconds in fp32. The optimizers are not equal: with bf16, ours keeps and
updates fp32 weights beside the bf16 ones, as in the paper, while the peers' weights and moments are only bf16. That
favours the peers in time and memory, most if a step has few tokens for its parameters (shape v3).

Each side is a separate process, set up as its users run it (ours tunes the allocator at start, transformers uses its
default experts; for torchtitan see bench/torchtitan_peer.py). The sides take turns, so that machine noise affects all.
Prints medians, the ratio of ours to each, its range over the rounds, and the ratio of CPU seconds of a step, which
other work disturbs less. A peer that cannot run is named with the reason.

    python -m bench.train_step [--threads 2] [--dtype best|bf16|fp32] [--rounds 7] [--shape debug|v3|tiny] [--length
    512] [--mtp]

Takes about 2 minutes.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from bench.sides import Side, SideResult, cpu_ratio, fastest, ratios, serve, take_turns
from bench.torchtitan_peer import environment

SHAPES = {
    # torchtitan's debug model: 33M parameters
    "debug": {
        "vocab_size": 2048, "hidden": 256, "layers": 6, "dense_layers": 1, "heads": 16, "q_rank": None, "kv_rank": 512,
        "nope_head_dim": 128, "rope_head_dim": 64, "v_head_dim": 128, "dense_width": 1024, "expert_width": 256,
        "experts": 8, "shared_experts": 2, "top_k": 3, "groups": 1, "top_groups": 1, "route_scale": 1.0,
    },
    # a small DeepSeek-V3: 287M parameters, and 27M more in an MTP module
    "v3": {
        "vocab_size": 16384, "hidden": 512, "layers": 11, "dense_layers": 1, "heads": 8, "q_rank": 384, "kv_rank": 256,
        "nope_head_dim": 64, "rope_head_dim": 32, "v_head_dim": 64, "dense_width": 1536, "expert_width": 256,
        "experts": 64, "shared_experts": 1, "top_k": 6, "groups": 8, "top_groups": 3, "route_scale": 2.5,
    },
    # one MoE layer with many experts and tokens, to compare its time with that of its matmuls alone (bench/parts.py)
    "moe": {
        "vocab_size": 2048, "hidden": 512, "layers": 2, "dense_layers": 1, "heads": 8, "q_rank": 384, "kv_rank": 256,
        "nope_head_dim": 64, "rope_head_dim": 32, "v_head_dim": 64, "dense_width": 1536, "expert_width": 256,
        "experts": 64, "shared_experts": 1, "top_k": 8, "groups": 1, "top_groups": 1, "route_scale": 1.0,
    },
    # 1.3B parameters, for a GPU
    "gpu": {
        "vocab_size": 32768, "hidden": 2048, "layers": 4, "dense_layers": 1, "heads": 16, "q_rank": 768, "kv_rank": 512,
        "nope_head_dim": 128, "rope_head_dim": 64, "v_head_dim": 128, "dense_width": 8192, "expert_width": 1024,
        "experts": 64, "shared_experts": 1, "top_k": 6, "groups": 8, "top_groups": 3, "route_scale": 2.5,
    },
    "tiny": {},
}  # fmt: skip
TOKENS = {"debug": (1, 512), "v3": (1, 1024), "moe": (4, 1024), "gpu": (2, 4096), "tiny": (16, 256)}
"""Sequences per step and their length."""
DTYPES = ("fp32", "bf16")
"""Dtypes of matmuls. In the first one, every side is fast enough."""
PEERS = Path.home() / ".cache" / "sluice" / "peers"
"""Folder of the peers' environments."""


@dataclass(frozen=True)
class Case:
    """The work of all sides."""

    shape: str
    dtype: str = "bf16"
    threads: int = 2
    mtp: bool = False
    """Whether the model has one MTP module."""
    length: int | None = None
    """Tokens of a sequence; None for the shape's own."""

    @property
    def size(self) -> tuple[int, int]:
        """Sequences per step and their length."""
        batch, length = TOKENS[self.shape]
        return batch, self.length or length

    @property
    def tokens(self) -> int:
        batch, length = self.size
        return batch * length

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches per rank and step."""
        return 1

    def config(self, *more: str):
        """Our configuration of the case. more: overrides that are applied last."""
        from conf.load import compose

        sizes = [f"model.{key}={'null' if value is None else value}" for key, value in SHAPES[self.shape].items()]
        batch, length = self.size
        return compose(
            *sizes, f"model.mtp_depth={int(self.mtp)}", "model.recompute=[]", f"precision={self.dtype}",
            f"seq_len={length}", f"batch_size={batch}", f"micro_batch_size={batch}", "cluster.device=cpu", *more,
        )  # fmt: skip


def sides_of(case: Case) -> list[str]:
    """Names of the sides that can run the case, ours first."""
    return ["ours", "torchtitan"] if case.mtp else ["ours", "transformers", "torchtitan"]


def compare(
    case: Case,
    rounds: int,
    seconds: float,
    between: Callable[[], None] = lambda: None,
    dtypes: Sequence[str] = DTYPES,
) -> dict[str, SideResult | str]:
    """Runs all sides of a case, each in the fastest of these dtypes. Returns the result by name, or why a side cannot
    run. `between` is called once per round."""
    return take_turns(
        {name: in_best_dtype(_start, name, case, dtypes) for name in sides_of(case)}, rounds, seconds, between
    )


def in_best_dtype(start: Callable[..., Side], name: str, case: Case, dtypes: Sequence[str]) -> Callable[[], Side]:
    """Starts a side in its fastest dtype. start: a function of the name, the case and the maximum seconds until the
    side answers."""
    return partial(fastest, {dtype: partial(start, name, replace(case, dtype=dtype)) for dtype in dtypes})


def _start(name: str, case: Case, limit: float) -> Side:
    words = ["-m", "bench.train_step", "--side", name, "--case", json.dumps(asdict(case))]
    return Side([interpreter(name), *words], case.tokens, threads=case.threads, limit=limit)


def interpreter(side: str) -> str:
    """The Python interpreter of this side. Raises RuntimeError if the side cannot be installed."""
    return str(environment(PEERS / side)) if side == "torchtitan" else sys.executable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("best", *DTYPES), default="best", help="of products; best: each side's own")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each side in a round")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="debug")
    parser.add_argument("--length", type=int, help="tokens of a sequence; the shape's own by default")
    parser.add_argument("--mtp", action="store_true", help="with one MTP module")
    parser.add_argument("--side", choices=("ours", "transformers", "torchtitan"), help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        step = {"ours": _ours, "transformers": _transformers, "torchtitan": _torchtitan}[options.side]
        return serve(partial(step, Case(**options.case)))
    case = Case(options.shape, threads=options.threads, mtp=options.mtp, length=options.length)
    dtypes = DTYPES if options.dtype == "best" else (options.dtype,)
    results = compare(case, options.rounds, options.seconds, dtypes=dtypes)
    print(f"{case.shape}, {case.threads} threads, {case.size} (sequences, tokens)")
    ours = results["ours"]
    for name, result in results.items():
        if isinstance(result, str):
            print(f"  {name:13} cannot run: {result}")
            continue
        line = f"  {name:13} {result.choice} {statistics.median(result.rates):8.0f} tokens/s"
        line += f"  ({min(result.rates):.0f} to {max(result.rates):.0f})"
        if name != "ours" and isinstance(ours, SideResult):
            each = ratios(ours, result)
            line += f"  ours is {statistics.median(each):.2f} times as fast ({min(each):.2f} to {max(each):.2f})"
            line += f", {cpu_ratio(ours, result):.2f} by CPU seconds"
        print(line)
    return None


def random_tokens(case: Case, vocab: int, dp_rank: int = 0):
    """The tokens (B, T + 1) that all sides train on, on this data-parallel rank."""
    import torch

    batch, length = case.size
    return torch.randint(vocab, (batch, length + 1), generator=torch.Generator().manual_seed(1 + dp_rank))


def torch_dtype(case: Case):
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[case.dtype]


def _ours(case: Case):
    """The trainer's own step: pipeline of one, DeepSpeed engine, our AdamW."""
    from train.kernels.cpu.processor import tune_cpu

    tune_cpu()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(case.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return own_step(case)


def own_step(
    case: Case, balance_loss: float = 0.0, device: str = "cpu", more: Sequence[str] = ()
) -> Callable[[], tuple[float, float]]:
    """A step of the case on this rank of the default process group, on random tokens.

    balance_loss: weight of the sequence-wise loss, which the peers do not have. more: further arguments of the command
    line. The step returns the seconds of forward and backward, and the seconds of metrics, reduction and update.
    """
    import torch

    from parallel.mesh import build_mesh
    from train.data.batch import Batch
    from train.kernels.choice import choose_kernels
    from train.loop.training_engine import Engine
    from train.optim.schedules import StepPlan
    from train.parallelize import parallelize
    from train.plan.job import layout_of
    from train.rank_parts import RankSetup

    config, here = case.config(f"optim.balance_loss={balance_loss}", *more), torch.device(device)
    mesh = build_mesh(layout_of(config))
    kernels, _ = choose_kernels(config, here)
    engine = Engine(config, parallelize(config, mesh, here, kernels), RankSetup(here, mesh))
    batch = Batch(random_tokens(case, config.model.vocab_size, mesh.dp_rank).to(here))
    plan = StepPlan(1, 0, config.batch_size, lr=1e-4, mtp_weight=0.3, bias_speed=0.0)

    def step() -> tuple[float, float]:
        marks = [time.perf_counter()]
        engine.run(plan, batch, on_phase=lambda _: marks.append(time.perf_counter()))
        return marks[1] - marks[0], marks[-1] - marks[1]

    return step


def transformers_model(case: Case, layers: int | None = None):
    """DeepseekV3ForCausalLM of these sizes, or with fewer layers, in training mode."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    model = case.config().model
    config = DeepseekV3Config(
        vocab_size=model.vocab_size, hidden_size=model.hidden, intermediate_size=model.dense_width,
        moe_intermediate_size=model.expert_width, num_hidden_layers=layers or model.layers,
        num_attention_heads=model.heads, num_key_value_heads=model.heads, n_shared_experts=model.shared_experts,
        n_routed_experts=model.experts, routed_scaling_factor=model.route_scale, kv_lora_rank=model.kv_rank,
        q_lora_rank=model.q_rank, qk_rope_head_dim=model.rope_head_dim, v_head_dim=model.v_head_dim,
        qk_nope_head_dim=model.nope_head_dim, n_group=model.groups, topk_group=model.top_groups,
        num_experts_per_tok=model.top_k, first_k_dense_replace=model.dense_layers, norm_topk_prob=True,
        max_position_embeddings=model.max_seq_len, use_cache=False,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config).to(torch_dtype(case)).train()


def _transformers(case: Case):
    import torch

    torch.set_num_threads(case.threads)
    peer = transformers_model(case)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens_BS = random_tokens(case, peer.config.vocab_size)[:, :-1]

    def step() -> None:
        peer(input_ids=tokens_BS, labels=tokens_BS).loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _torchtitan(case: Case):
    import torch

    from bench.torchtitan_peer import build_step

    torch.set_num_threads(case.threads)
    model = case.config().model
    return build_step(model, random_tokens(case, model.vocab_size), torch_dtype(case), case.mtp)


if __name__ == "__main__":
    main()
