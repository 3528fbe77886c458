"""The parts of a training step beside transformers' and torch's, forward and backward, and beside the matmul rate.

    python -m bench.parts [--shape debug|v3|moe] [--threads 2] [--dtype best|bf16|fp32] [--rounds 9] [--json]

    MLA         one attention layer                     transformers' DeepseekV3Attention
    MoE         router, routed and shared experts       transformers' DeepseekV3MoE
    loss        head and cross-entropy                  transformers' head and loss_function
    optimizer   AdamW on the fp32 weights of one MoE    torch's fused AdamW on the same
                layer, bf16 moments                     (fp32 moments)

All run in one process with the allocator settings of our training, which help both sides. Each side of a part uses bf16
or fp32, whichever is faster in its first steps here, unless --dtype sets one for all; the limits use the dtype of our
side. In every round each side takes one step, in turn, and two limits are timed. One is a large matmul. The other, for
MoE, is its floor: only its GEMMs, forward and backward, with equal rows for every expert. Both limits use torch or
compiled code, whichever is faster on the machine and used in training.

Prints medians, the ratio of the times, our time as a multiple of the floor, and the part's share of the large matmul's
rate (arithmetic as in train/model/count.py; none for the optimizer). In the shape `moe`, work besides GEMMs is largest:
64 experts, top 8, 4096 tokens.

Takes about half a minute.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import train.kernels.cpu.tuned  # noqa: F401  before torch allocates anything

# isort: split
import torch

from bench.train_step import DTYPES, SHAPES, TOKENS, Case, random_tokens, torch_dtype, transformers_model
from train.kernels.choice import build_kernels
from train.kernels.precision import build_precision
from train.metrics.peak import measured_peak
from train.model.count import attention_matmul_weights, expert_params, head_flops
from train.model.deepseek import Head
from train.model.mla import MLA
from train.model.moe import LocalDispatcher, MoE
from train.model.rope import Rope
from train.model.sequence import Positions
from train.optim.adamw import AdamW

Step = Callable[[], object]
WARM_STEPS = 2


@dataclass
class TimedPart:
    """Two implementations of a part, and its floating-point operations (0 if the part has no matmuls)."""

    ours: Step
    peer: Step
    flops: float
    floor: Step | None = None
    """Only the matmuls of the part."""


@dataclass
class PartResult:
    """Times of a part: medians over the rounds."""

    ours_dtype: str
    peer_dtype: str
    ours_ms: float
    peer_ms: float
    ratio: float
    """Ratio of the peer's time to ours, median over the rounds."""
    gemm_share: float | None
    """Share of the measured matmul rate that our implementation reaches."""
    floor_ms: float | None = None
    to_floor: float | None = None
    """Ratio of our time to the time of the matmuls alone, median over the rounds."""


class TimedParts:
    """All parts of a case with equal sizes, on the same random hidden states."""

    def __init__(self, case: Case):
        self.case, self.config = case, case.config()
        self.model, self.dtype = self.config.model, torch_dtype(case)
        self._kernels = build_kernels("cpu")
        self._precision = build_precision(self.config.precision, torch.device("cpu"), self._kernels, False)
        self._factory = {"dtype": self.dtype}
        self._peer = transformers_model(case, layers=self.model.dense_layers + 1)
        batch, length = TOKENS[case.shape]
        self._shape = batch, length, self.model.hidden
        self._tokens = random_tokens(case, self.model.vocab_size)

    def all(self) -> dict[str, TimedPart]:
        return {"MLA": self._mla(), "MoE": self._moe(), "loss": self._loss(), "optimizer": self._optimizer()}

    def _states(self) -> torch.Tensor:
        return torch.randn(self._shape, dtype=self.dtype).requires_grad_()

    def _step(self, forward: Callable[[torch.Tensor], torch.Tensor]) -> Step:
        """A step of forward and backward. The output's gradient is all ones, and the input gets a gradient too."""
        x_BTD = self._states()

        def step() -> None:
            y = forward(x_BTD)
            y.backward(torch.ones_like(y))

        return step

    def _mla(self) -> TimedPart:
        ours = small(MLA(self.model, self._precision, Rope(self.model, self.config.seq_len), **self._factory))
        peer = self._peer.model.layers[-1].self_attn
        positions = torch.arange(self._shape[1])[None]
        turns = self._peer.model.rotary_emb(self._states(), positions)
        widths = self.model.nope_head_dim + self.model.rope_head_dim + self.model.v_head_dim
        core = self.config.seq_len * self.model.heads * widths / 2
        return TimedPart(
            self._step(lambda x_BTD: ours(x_BTD, nullcontext())),
            self._step(lambda x_BTD: peer(x_BTD, position_embeddings=turns, attention_mask=None)[0]),
            6 * self.case.tokens * (attention_matmul_weights(self.model) + core),
        )

    def _moe(self) -> TimedPart:
        experts = self.model.experts
        dispatcher = LocalDispatcher(experts, self._kernels)
        ours = small(MoE(self.model, self._precision, dispatcher, range(experts), **self._factory))
        peer = self._peer.model.layers[-1].mlp
        active = (self.model.top_k + self.model.shared_experts) * expert_params(self.model)
        return TimedPart(
            self._step(lambda x_BTD: ours(x_BTD, nullcontext())),
            self._step(peer),
            6 * self.case.tokens * active,
            self._ffn_matmuls(),
        )

    def _ffn_matmuls(self) -> Step:
        """The six matmuls of every expert, with equal rows for all experts, and those of the shared experts as one
        FFN."""
        model = self.model
        sizes = [(self.case.tokens * model.top_k // model.experts, model.expert_width)] * model.experts
        if model.shared_experts:
            sizes.append((self.case.tokens, model.shared_experts * model.expert_width))
        weights = [self._random_pair(width, model.hidden) for _, width in sizes]
        rows = max(rows for rows, _ in sizes)
        x, h, a = (
            torch.randn(rows, width, dtype=self.dtype)
            for width in (model.hidden, 2 * max(w for _, w in sizes), max(w for _, w in sizes))
        )

        def step() -> None:
            for (R, F), (w13, w2) in zip(sizes, weights, strict=True):
                for left, weight in ((x[:R], w13), (a[:R, :F], w2)):  # forward
                    self._kernels.matmul(left, weight, self.dtype)
                for grad, left, weight in ((x[:R], a[:R, :F], w2), (h[:R, : 2 * F], x[:R], w13)):  # backward
                    self._kernels.matmul(grad, weight.t(), self.dtype)
                    self._kernels.matmul(grad.t(), left.t(), self.dtype)

        return step

    def _random_pair(self, width: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
        """w13 (2F, D) and w2 (D, F)."""
        return torch.randn(2 * width, hidden, dtype=self.dtype), torch.randn(hidden, width, dtype=self.dtype)

    def _loss(self) -> TimedPart:
        model = self.model
        ours = small(Head(model.hidden, model.vocab_size, model.loss_chunk, self._kernels, **self._factory))
        peer, labels, whole = self._peer, self._tokens[:, :-1], Positions(self._shape[1])
        return TimedPart(
            self._step(lambda x_BTD: ours([x_BTD], self._tokens, whole)[0]),
            self._step(lambda x: peer.loss_function(peer.lm_head(x), labels, vocab_size=self.model.vocab_size)),
            self.case.tokens * head_flops(self.model),
        )

    def _optimizer(self) -> TimedPart:
        size = self.model.experts * expert_params(self.model)
        ours, theirs = (torch.nn.Parameter(torch.randn(size)) for _ in range(2))
        ours.grad, theirs.grad = torch.randn(size), torch.randn(size)
        group = {"params": [ours], "weight_decay": 0.1}
        mine = AdamW.make([group], self.config, self._kernels.parts)
        torchs = torch.optim.AdamW([theirs], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        return TimedPart(mine.step, torchs.step, 0.0)


def small(module: torch.nn.Module) -> torch.nn.Module:
    """Sets random weights, because the modules do not initialise their weights."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return module


def measure(case: Case, rounds: int, dtypes: Sequence[str] = DTYPES) -> dict[str, PartResult]:
    """Measures every part of the case, each side in the fastest of these dtypes."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(1)
    results = {}
    cases = {dtype: replace(case, dtype=dtype) for dtype in dtypes}
    parts = {dtype: TimedParts(one).all() for dtype, one in cases.items()}
    for name in parts[dtypes[0]]:
        ours_dtype = min(dtypes, key=lambda dtype: _trial(parts[dtype][name].ours))
        peer_dtype = min(dtypes, key=lambda dtype: _trial(parts[dtype][name].peer))
        part, peer_step = parts[ours_dtype][name], parts[peer_dtype][name].peer
        times = [
            (
                _seconds(part.ours),
                _seconds(peer_step),
                _gemm(cases[ours_dtype]),
                _seconds(part.floor) if part.floor else 0.0,
            )
            for _ in range(rounds)
        ]
        ours, peer, gemm, floor = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(peer / ours for ours, peer, _, _ in times)
        share = part.flops / ours / gemm if part.flops else None
        results[name] = PartResult(ours_dtype, peer_dtype, 1e3 * ours, 1e3 * peer, ratio, share)
        if part.floor:
            results[name].floor_ms = 1e3 * floor
            results[name].to_floor = statistics.median(ours / floor for ours, _, _, floor in times)
    return results


def _trial(step: Step) -> float:
    """Seconds of the fastest warm-up step."""
    return min(_seconds(step) for _ in range(WARM_STEPS))


def _gemm(case: Case) -> float:
    return measured_peak(torch.device("cpu"), torch_dtype(case), build_kernels("cpu"), budget=0.1)


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def show(case: Case, results: dict[str, PartResult]) -> None:
    print(
        f"\n{f'{case.shape}, {case.threads} threads':20}{'ours, peer in':>16}{'ours ms':>10}{'peer ms':>10}{'ratio':>8}"
        f"{'GEMM share':>12}{'floor ms':>10}{'to floor':>10}"
    )
    for name, result in results.items():
        share = "-" if result.gemm_share is None else f"{result.gemm_share:.0%}"
        line = f"  {name:18}{f'{result.ours_dtype}, {result.peer_dtype}':>16}{result.ours_ms:10.1f}{result.peer_ms:10.1f}{result.ratio:8.2f}{share:>12}"
        print(line if result.to_floor is None else f"{line}{result.floor_ms:10.1f}{result.to_floor:10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="debug")
    parser.add_argument("--dtype", choices=("best", *DTYPES), default="best", help="of products; best: each side's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    case = Case(options.shape, threads=options.threads)
    results = measure(case, options.rounds, DTYPES if options.dtype == "best" else (options.dtype,))
    if options.json:
        print(json.dumps({name: asdict(result) for name, result in results.items()}))
    else:
        show(case, results)


if __name__ == "__main__":
    main()
