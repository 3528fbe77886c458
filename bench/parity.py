"""Losses and gradient norms of every layout beside one process: the largest relative differences over 20 steps.

Runs `python -m train` as a user does, on a small model with every mechanism, in fp32, bf16 and FP8. One thread per
rank.

Layouts sum gradients in different orders, so sums differ in the last place. With bf16 moments such a difference can
round a moment the other way, which changes one weight's update by up to 0.4 %; --moments fp32 avoids that.

An FP8 cast enlarges such differences, see train/docs/fp8.md. --set adds settings to every run, including the reference.

    python -m bench.parity [--steps 20] [--dtype fp32|bf16|fp8|fp8_ue8m0] [--moments bf16|fp32] [--set KEY=VALUE ...]
    [LAYOUT ...]

Takes about 8 minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from conf.schema import PipelineSchedule

MODEL = [
    "model.vocab_size=512",
    "model.hidden=64",
    "model.layers=8",
    "model.heads=2",
    "model.q_rank=32",
    "model.kv_rank=32",
    "model.dense_width=128",
    "model.expert_width=32",
    "model.experts=8",
]
RUN = [
    "seq_len=64",
    "batch_size=16",
    "micro_batch_size=1",
    "optim.warmup_steps=5",
    "checkpoint.every=0",
    "cluster.threads=1",
    "cluster.device=cpu",
    "log.wandb=disabled",
    "log.sample_tokens=0",
    "log.validation_sequences=8",
    "log.peak_flops=1e11",
]


def _pp(ranks: int, schedule: str, *more: str) -> list[str]:
    return [f"parallel.pp={ranks}", f"parallel.schedule={schedule}", *more]


LAYOUTS = {
    **{f"dp2 zero{stage}": ["parallel.dp=2", f"parallel.zero={stage}"] for stage in (1, 2, 3)},
    "ep2": ["parallel.dp=2", "parallel.ep=2"],
    "ep4": ["parallel.dp=4", "parallel.ep=4"],
    "ep4 node_limited": [
        "parallel.dp=4",
        "parallel.ep=4",
        "parallel.dispatch=node_limited",
        "cluster.ranks_per_node=2",
    ],
    "dp4 ep2": ["parallel.dp=4", "parallel.ep=2"],
    "dp4 ep2 zero3": ["parallel.dp=4", "parallel.ep=2", "parallel.zero=3"],
    **{f"pp2 {name}": _pp(2, name) for name in PipelineSchedule},
    **{f"pp4 {name}": _pp(4, name) for name in PipelineSchedule},
    **{f"pp2 dp2 ep2 {name}": _pp(2, name, "parallel.dp=2", "parallel.ep=2") for name in PipelineSchedule},
    "pp2 dp2 ep2 dualpipev, MTP depth 2": _pp(2, "dualpipev", "parallel.dp=2", "parallel.ep=2", "model.mtp_depth=2"),
    "ep2, MTP depth 2": ["parallel.dp=2", "parallel.ep=2", "model.mtp_depth=2"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp8", "fp8_ue8m0"), default="fp32")
    parser.add_argument("--moments", choices=("bf16", "fp32"), default="bf16", help="format of Adam's moments")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every run")
    parser.add_argument("layouts", nargs="*", help=f"some of: {'; '.join(LAYOUTS)}")
    options = parser.parse_args()
    if unknown := set(options.layouts) - LAYOUTS.keys():
        parser.error(f"no such layout: {'; '.join(unknown)}. There are: {'; '.join(LAYOUTS)}")
    references: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        print(f"{options.dtype}, {options.steps} steps: largest relative difference from one process", flush=True)
        print(f"{'layout':36} {'loss':>9} {'grad norm':>9} {'held-out loss':>13}", flush=True)
        for number, (name, overrides) in enumerate(LAYOUTS.items()):
            if options.layouts and name not in options.layouts:
                continue
            depth = "2" if "model.mtp_depth=2" in overrides else "1"
            if depth not in references:
                references[depth] = _train(Path(folder), f"one{depth}", [f"model.mtp_depth={depth}"], options)
            want = references[depth]
            got = _train(Path(folder), f"layout{number}", overrides, options)
            worst = [
                max(abs(a[key] - b[key]) / b[key] for a, b in zip(got, want, strict=True) if key in b)
                for key in ("loss", "grad_norm", "validation_loss")
            ]
            print(f"{name:36} {worst[0]:9.1e} {worst[1]:9.1e} {worst[2]:13.1e}", flush=True)


def _train(folder: Path, name: str, overrides: list[str], options: argparse.Namespace) -> list[dict]:
    """Trains one run. Returns its records by step."""
    command = [
        sys.executable, "-m", "train", *MODEL, *RUN, f"precision={options.dtype}", f"precision.moments={options.moments}", f"steps={options.steps}", f"name={name}",
        f"runs={folder}", *options.set, *overrides,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
