"""A training step over several ranks, ours beside torchtitan's and DeepSpeed's AutoEP, in one run.

    python -m bench.layouts [--layouts ep2 pp2dp2 pp2dp2ep2] [--shape debug|v3|tiny] [--rounds 7] [--seconds 6] [--out
    FILE]

Ranks are processes of this machine on gloo with one thread each. The model is a whole DeepSeek-V3 without MTP. Each
side runs its matmuls in bf16 or fp32, whichever is faster here in a few short rounds. A step is forward, backward,
reduction, clipping to norm 1, AdamW; no side recomputes. Every side trains the same layout on equal sizes and tokens.

    ep2         2 ranks, each with its own data, experts over both
    pp2dp2      4 ranks: two stages, 1F1B with 4 micro-batches, of two data-parallel ranks each, which hold all experts
    pp2dp2ep2   the same with experts over the two data-parallel ranks

    ours        the trainer's own step, ZeRO-1
    torchtitan  its DeepSeek-V3 with FSDP2, see bench/torchtitan_peer.py
    autoep1     DeepSpeed's AutoEP on transformers' DeepSeek-V3 with ZeRO-1, see bench/deepspeed_peer.py
    autoep2     the same with ZeRO-2, only without a pipeline: DeepSpeed's pipelines reject ZeRO-2

In bf16, all sides keep fp32 weights in shards beside the bf16 weights. Gradients are reduced in fp32 by ours and
torchtitan, in bf16 by DeepSpeed. Moments are bf16 for ours, as in the paper, and fp32 for the peers. No side updates
the routers' biases.

Each side is a separate set of processes, set up as its users run it; the sides take turns (bench/sides.py). Prints
medians of tokens per second of all ranks together, their range, the ratio of ours to each (median and range over the
rounds), CPU seconds of a step of all ranks together and the peer's over ours (which other work disturbs less), the peak
memory of the largest rank, and seconds from the command to the first step. If there are more ranks than cores, ranks
share cores, and other ranks fill the waits of a pipeline. A peer that cannot run is named with the reason.

Takes about 10 minutes.
"""

import argparse
import json
import os
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from bench.sides import LIMIT, Side, SideResult, cpu_ratio, ratios, serve, take_turns
from bench.train_step import (
    DTYPES,
    SHAPES,
    Case,
    in_best_dtype,
    interpreter,
    own_step,
    random_tokens,
    torch_dtype,
    transformers_model,
)


@dataclass(frozen=True)
class LayoutCase(Case):
    """The work of all sides, over pp x dp ranks."""

    threads: int = 1
    """Number of threads of a rank."""
    pp: int = 1
    dp: int = 1
    ep: int = 1

    @property
    def micro_batches(self) -> int:
        return 1 if self.pp == 1 else 2 * self.pp

    @property
    def size(self) -> tuple[int, int]:
        """Number of sequences per step of a data-parallel rank, and the length of a sequence."""
        batch, length = super().size
        return max(batch, self.micro_batches), length

    @property
    def tokens(self) -> int:
        """Number of tokens in a step, over all ranks."""
        return self.dp * super().tokens

    def config(self, *more: str):
        batch, _ = self.size
        return super().config(
            f"parallel.pp={self.pp}", f"parallel.dp={self.dp}", f"parallel.ep={self.ep}",
            f"batch_size={batch * self.dp}", f"micro_batch_size={batch // self.micro_batches}", *more,
        )  # fmt: skip


LAYOUTS = {
    "ep2": {"dp": 2, "ep": 2},
    "pp2dp2": {"pp": 2, "dp": 2},
    "pp2dp2ep2": {"pp": 2, "dp": 2, "ep": 2},
}


def sides_of(case: LayoutCase) -> list[str]:
    """Names of the sides that can run the case, ours first."""
    return ["ours", "torchtitan", "autoep1"] + (["autoep2"] if case.pp == 1 else [])


def compare(case: LayoutCase, names: list[str], rounds: int, seconds: float) -> dict[str, SideResult | str]:
    """Runs these sides of a case, each in its fastest dtype. Returns the result by name, or why a side cannot run."""
    return take_turns({name: in_best_dtype(start, name, case, DTYPES) for name in names}, rounds, seconds)


def start(name: str, case: LayoutCase, limit: float = LIMIT) -> Side:
    """Starts the ranks of a side and warms them up. Raises RuntimeError if they cannot run, or do not answer within
    `limit` seconds."""
    words = ["-m", "bench.layouts", "--side", name, "--case", json.dumps(asdict(case))]
    return Side([interpreter(name), *words], case.tokens, ranks=case.pp * case.dp, threads=case.threads, limit=limit)


def figures(results: dict[str, SideResult | str]) -> dict[str, dict]:
    """Medians and ratios of each side, with every single measurement."""
    found, ours = {}, results["ours"]
    for name, result in results.items():
        if isinstance(result, str):
            found[name] = {"cannot_run": result}
            continue
        found[name] = asdict(result) | {
            "median": statistics.median(result.rates),
            "median_cpu_seconds": statistics.median(result.cpu_seconds),
        }
        if result is not ours and isinstance(ours, SideResult):
            found[name] |= {
                "ours_to_peer": statistics.median(ratios(ours, result)),
                "range": (min(ratios(ours, result)), max(ratios(ours, result))),
                "cpu_of_peer_to_ours": cpu_ratio(ours, result),
            }
    return found


def show(layout: str, case: LayoutCase, found: dict[str, dict]) -> None:
    print(f"\nlayouts: {layout}, {case.shape}, {case.pp * case.dp} ranks, {case.tokens} tokens")
    print(
        f"  {'':12}{'dtype':5}{'tokens/s':>9}{'range':>14}{'ours/peer':>11}{'range':>15}{'CPU s':>8}{'peer/ours':>11}",
        end="",
    )
    print(f"{'peak GB':>9}{'first step s':>14}")
    for name, row in found.items():
        if "cannot_run" in row:
            print(f"  {name:12}cannot run: {row['cannot_run']}")
            continue
        line = (
            f"  {name:12}{row['choice']:5}{row['median']:9.0f}"
            + f"{min(row['rates']):.0f} to {max(row['rates']):.0f}".rjust(14)
        )
        if "ours_to_peer" in row:
            low, high = row["range"]
            line += f"{row['ours_to_peer']:11.2f}" + f"{low:.2f} to {high:.2f}".rjust(15)
        else:
            line += " " * 26
        line += f"{row['median_cpu_seconds']:8.2f}"
        line += f"{row['cpu_of_peer_to_ours']:11.2f}" if "cpu_of_peer_to_ours" in row else " " * 11
        print(line + f"{row['peak_memory'] / 1e9:9.2f}{row['first_step']:14.1f}", flush=True)


def measure(layout: str, rounds: int, seconds: float, shape: str = "debug", length: int | None = None) -> dict:
    """Measure and print one layout."""
    case = LayoutCase(shape, length=length, **LAYOUTS[layout])
    found = figures(compare(case, sides_of(case), rounds, seconds))
    show(layout, case, found)
    return {"layout": layout, "case": asdict(case), "sides": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=tuple(LAYOUTS), default=tuple(LAYOUTS))
    parser.add_argument("--shape", choices=tuple(SHAPES), default="debug")
    parser.add_argument("--length", type=int, help="tokens of a sequence; the shape's own by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each side in a round")
    parser.add_argument("--out", type=Path, help="file for every single measurement")
    parser.add_argument("--side", choices=tuple(BUILDERS), help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return serve(partial(BUILDERS[options.side], LayoutCase(**options.case)))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    report = []
    for layout in options.layouts:
        report.append(measure(layout, options.rounds, options.seconds, options.shape, options.length))
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    return None


def _join(case: LayoutCase) -> int:
    """Join the process group of the ranks. Returns the data-parallel rank of this process, which is the same on all
    sides."""
    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    torch.set_num_threads(case.threads)
    dist.init_process_group("gloo", init_method=os.environ["BENCH_STORE"], rank=rank, world_size=case.pp * case.dp)
    return rank % case.dp


def _ours(case: LayoutCase):
    from train.kernels.cpu.processor import tune_cpu

    tune_cpu()
    _join(case)
    return own_step(case)


def _torchtitan(case: LayoutCase):
    from bench.torchtitan_peer import build_ranks_step

    model = case.config().model
    tokens_BS = random_tokens(case, model.vocab_size, _join(case))
    return build_ranks_step(
        model, tokens_BS, torch_dtype(case), pp=case.pp, ep=case.ep, micro_batches=case.micro_batches
    )


def _autoep(case: LayoutCase, zero: int):
    from bench.deepspeed_peer import build_step

    dp_rank = _join(case)
    model = transformers_model(case)
    tokens_BS = random_tokens(case, model.config.vocab_size, dp_rank)
    return build_step(model, tokens_BS, pp=case.pp, ep=case.ep, zero=zero, micro_batches=case.micro_batches)


BUILDERS = {
    "ours": _ours,
    "torchtitan": _torchtitan,
    "autoep1": partial(_autoep, zero=1),
    "autoep2": partial(_autoep, zero=2),
}


if __name__ == "__main__":
    main()
