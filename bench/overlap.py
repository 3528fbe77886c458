"""How much of the all-to-all hides under compute in dualpipev, with parallel.overlap on and off, compute being sleeps.

    python -m bench.overlap [--pp 4] [--layers 2] [--micro-batches 16] [--steps 3] [--attention 20] [--experts 20] [--exchange 20]

Every stage has `layers` layers of attention, dispatch, experts, combine. Attention and experts sleep in the forward pass,
and twice as long in the backward pass (I and W alike); dispatch and combine take `exchange` ms each way from their start to
their end, as an asynchronous transfer does that needs no core, and call the same yield point as the dispatchers
(parallel/expert/link.py). What a rank sleeps for at the end of an exchange is exposed, the rest of it is hidden.

Hidden is the share of the time of all exchanges, on all ranks; `in pairs` counts only those in a forward and a backward
that run as a pair (FB), since nothing can hide those of the warm-up and the drain. Figures are of the fastest of `--steps`
steps (the first one not counted), and the step without any exchange is the limit.
"""

import argparse
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.schedules import HIDDEN, SEQ, Sleep, run_ranks
from parallel.pipeline.overlap import yield_point
from parallel.pipeline.schedule import Pipeline
from parallel.pipeline.split import SCHEDULES, stage_placement

NAME = "dualpipev"


@dataclass
class Exchanges:
    """Of one rank and step: how often something was sent, and the seconds waited for it."""

    seconds: float
    """Length of one."""
    waited: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    """When each ended, in seconds of the step, to know the action it was in."""
    began: float = 0.0
    """Time at which the step began."""

    def send(self) -> None:
        """Start one, let the other lane compute, wait for what is left."""
        if self.seconds == 0:
            return
        until = time.perf_counter() + self.seconds
        yield_point()
        left = max(0.0, until - time.perf_counter())
        time.sleep(left)
        self.waited.append(left)
        self.ended.append(time.perf_counter() - self.began)

    def start_step(self) -> None:
        self.waited.clear()
        self.ended.clear()
        self.began = time.perf_counter()


class _Exchange(torch.autograd.Function):
    """Identity that takes an exchange each way."""

    @staticmethod
    def forward(ctx, x: Tensor, exchanges: Exchanges) -> Tensor:
        ctx.exchanges = exchanges
        exchanges.send()
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.exchanges.send()
        return grad, None


class Chunk(nn.Module):
    """A stage of layers that sleep and exchange. attention, experts: seconds of a forward pass."""

    def __init__(
        self, layers: int, attention: float, experts: float, exchanges: Exchanges, first: bool, last: bool
    ) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(2 * layers))
        self.attention, self.experts, self.exchanges = attention, experts, exchanges
        self.first, self.last = first, last

    def forward(self, x: Tensor, *, tokens_BS: Tensor) -> Tensor:
        if self.first:
            x = torch.zeros(len(tokens_BS), SEQ, HIDDEN, requires_grad=True)
        for attention, experts in zip(self.weights[::2], self.weights[1::2], strict=True):
            x = Sleep.apply(x, attention, (self.attention,) * 3)
            x = _Exchange.apply(x, self.exchanges)  # dispatch
            x = Sleep.apply(x, experts, (self.experts,) * 3)
            x = _Exchange.apply(x, self.exchanges)  # combine
        return x.mean().reshape(1) if self.last else x


@dataclass
class RankStep:
    """One step of one rank, in seconds."""

    span: float
    exchanged: float
    waited: float
    exchanged_in_pairs: float
    waited_in_pairs: float


def measure(rank: int, folder: str, results, args: argparse.Namespace) -> None:
    """Body of one rank: the step without exchanges, with them in pairs that overlap, and in pairs that do not."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=args.pp)
    placement, stages = stage_placement(NAME, args.pp), args.pp * SCHEDULES[NAME]
    for case, exchange, overlap in (("none", 0.0, True), ("on", args.exchange, True), ("off", args.exchange, False)):
        exchanges = Exchanges(exchange / 1000)
        chunks = [
            Chunk(args.layers, args.attention / 1000, args.experts / 1000, exchanges, stage == 0, stage == stages - 1)
            for stage in placement[rank]
        ]
        pipeline = Pipeline(
            NAME, chunks, placement[rank], stages, None, torch.device("cpu"), hidden=HIDDEN, dtype=torch.float32,
            overlap=overlap,
        )  # fmt: skip
        tokens_BS = torch.zeros(args.micro_batches, SEQ + 1, dtype=torch.int64)
        steps = []
        for _ in range(args.steps + 1):
            dist.barrier()
            exchanges.start_step()
            pipeline.step(tokens_BS, micro_batches=args.micro_batches)
            steps.append(_read(pipeline.timeline.newest(), exchanges))
        results.put((case, rank, steps[1:]))
    dist.barrier()
    dist.destroy_process_group()


def _read(record, exchanges: Exchanges) -> RankStep:
    pairs = [(action.start, action.start + action.seconds) for action in record.actions if action.kind == "FB"]
    inside = [any(start <= end <= stop for start, stop in pairs) for end in exchanges.ended]
    return RankStep(
        record.span,
        exchanges.seconds * len(inside),
        sum(exchanges.waited),
        exchanges.seconds * sum(inside),
        sum(waited for waited, pair in zip(exchanges.waited, inside, strict=True) if pair),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("pp", 4), ("layers", 2), ("micro-batches", 16), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for part in ("attention", "experts", "exchange"):
        parser.add_argument(f"--{part}", type=float, default=20.0, help="milliseconds")
    args = parser.parse_args()
    print(
        f"{NAME}, pp={args.pp}, {args.micro_batches} micro-batches, {args.layers} layers a stage; "
        f"attention {args.attention:g}, experts {args.experts:g}, exchange {args.exchange:g} ms"
    )
    print(f"{'overlap':8}{'step ms':>9}{'over limit':>12}{'hidden':>9}{'in pairs':>10}")
    limit = 0.0
    for case, ranks in run(args).items():
        step = min(zip(*ranks, strict=True), key=lambda step: max(rank.span for rank in step))
        span = max(rank.span for rank in step)
        limit = limit or span
        print(f"{case:8}{1e3 * span:9.0f}{span / limit:12.2f}{_hidden(step, ''):>9}{_hidden(step, '_in_pairs'):>10}")


def _hidden(step: tuple[RankStep, ...], where: str) -> str:
    exchanged = sum(getattr(rank, "exchanged" + where) for rank in step)
    return f"{1 - sum(getattr(rank, 'waited' + where) for rank in step) / exchanged:.0%}" if exchanged else "-"


def run(args: argparse.Namespace) -> dict[str, list[list[RankStep]]]:
    """By case, of every rank all steps."""
    cases: dict[str, list] = {"none": [], "on": [], "off": []}
    for case, _, steps in sorted(run_ranks(measure, args.pp, len(cases), args), key=lambda one: one[1]):
        cases[case].append(steps)
    return cases


if __name__ == "__main__":
    main()
