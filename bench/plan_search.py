"""The layouts that plan.search finds, beside ten handwritten layouts for each job. Needs no GPU.

    python -m bench.plan_search [JOB ...] [--layouts N]

A handwritten layout is one that an expert of this trainer would write for the job. The layouts have pipelines of
several lengths with their schedules, one or more sequences at a time, recomputed or offloaded blocks, DeepEP, the
optimizer on the host, or ZeRO 3. Each is planned as in `mode=plan`. The bench ends with an error if a handwritten
layout fits and is faster than the best result of the search, or if the search finds no layout. The seconds of a search,
and of its first and last result, are core-seconds. The batch size of a job does not grow, because a layout would have
to divide all batch sizes. 48 is the smallest number of B200 that can hold 671B. With 32, the optimizer does not fit on
the devices; on the hosts, a node would need 2.6 TB and has 2 TB.

Takes about ten minutes.
"""

import argparse
import sys
import time

from conf.errors import UserError
from conf.load import compose
from train.plan.budget import make_plan
from train.plan.search.search import FoundLayout, search

RAMPLESS = "data.path=none mode=plan optim.batch_ramp_start=null optim.batch_ramp_steps=0"
CHEAP = "norm,mla_up,swiglu"
V3 = f"conf=deepseek_v3 parallel.offload_optimizer=false checkpoint.staging_bytes=4e9 {RAMPLESS}"
JOBS = {
    "8 H100 (16B)": (8, f"conf=deepseek_v3_16b hardware=h100 {RAMPLESS}"),
    "256 H100": (256, f"{V3} hardware=h100"),
    "64 H200": (64, f"{V3} hardware=h200"),
    "48 B200": (48, f"{V3} hardware=b200 precision=mxfp8"),
    "32K": (2048, f"conf=deepseek_v3_32k {RAMPLESS}"),
    "128K": (2048, f"conf=deepseek_v3_128k {RAMPLESS}"),
    "512 H100 (Kimi K2)": (512, f"conf=kimi_k2 hardware=h100 {RAMPLESS}"),
    "4 H800 (tiny)": (4, f"conf=tiny hardware=h800 {RAMPLESS}"),
}
"""For each job: number of devices, and the recipe. The last job is for a quick trial of this bench."""


def _layout(pp: int, dp: int, ep: int, schedule: str, size: int, *more: str, cp: int = 1) -> str:
    """The command line of a layout. size: sequences per micro-batch. more: names in WORDS, or overrides."""
    spread = f"parallel.pp={pp} parallel.dp={dp} parallel.ep={ep} parallel.cp={cp} parallel.zero=1 parallel.schedule={schedule} micro_batch_size={size}"
    return " ".join([spread, *(WORDS.get(one, one) for one in more)])


WORDS = {
    "deepep": "parallel.dispatch=deepep",
    "flat": "parallel.dispatch=flat",
    "host": "parallel.offload_optimizer=true",
    "zero3": "parallel.zero=3",
    "zero2": "parallel.zero=2",
    "again": f"model.recompute=[{CHEAP},layer]",
    "away": "model.offload=[layer]",
    "none": "model.recompute=[]",
} | {f"again:{n}": f"model.recompute=[{CHEAP},layer:{n}]" for n in range(1, 8)} | {f"away:{n}": f"model.offload=[layer:{n}]" for n in range(1, 9)}  # fmt: skip

BY_HAND = {
    "8 H100 (16B)": [
        _layout(1, 8, 8, "1f1b", 4, "deepep"),
        _layout(1, 8, 8, "1f1b", 2, "deepep"),
        _layout(1, 8, 8, "1f1b", 4, "flat", "again"),
        _layout(1, 8, 8, "1f1b", 8, "deepep", "away"),
        _layout(1, 8, 4, "1f1b", 4, "deepep", "zero2"),
        _layout(1, 8, 8, "1f1b", 8, "deepep", "again", "zero3"),
        _layout(2, 4, 4, "zbv", 2, "deepep"),
        _layout(2, 4, 4, "dualpipev", 2, "deepep"),
        _layout(2, 4, 4, "1f1b", 4, "deepep"),
        _layout(4, 2, 2, "interleaved", 2, "deepep"),
    ],
    "256 H100": [
        _layout(16, 16, 16, "1f1b", 1, "flat", "again:3"),
        _layout(16, 16, 16, "1f1b", 1, "flat", "away:3"),
        _layout(16, 16, 16, "1f1b", 1, "deepep", "away:3"),
        _layout(16, 16, 16, "1f1b", 4, "deepep", "away:4"),
        _layout(16, 16, 8, "1f1b", 2, "deepep", "away", "host"),
        _layout(8, 32, 32, "1f1b", 2, "deepep", "away", "host"),
        _layout(8, 32, 16, "interleaved", 2, "deepep", "away", "host"),
        _layout(16, 16, 16, "dualpipev", 1, "deepep", "away", "host"),
        _layout(8, 32, 16, "zbv", 1, "deepep", "away", "host"),
        _layout(1, 256, 64, "1f1b", 2, "deepep", "away", "zero3"),
    ],
    "64 H200": [
        _layout(8, 8, 8, "1f1b", 1, "host"),
        _layout(8, 8, 8, "1f1b", 1, "host", "away"),
        _layout(8, 8, 8, "1f1b", 1, "host", "again"),
        _layout(8, 8, 8, "1f1b", 2, "host", "away", "deepep"),
        _layout(8, 8, 8, "1f1b", 4, "host", "away", "deepep"),
        _layout(8, 8, 8, "interleaved", 2, "host", "away", "deepep"),
        _layout(8, 8, 8, "dualpipev", 1, "host", "away", "deepep"),
        _layout(8, 8, 8, "zbv", 1, "host", "away", "deepep"),
        _layout(16, 4, 4, "1f1b", 2, "host", "away", "deepep"),
        _layout(4, 16, 16, "1f1b", 2, "host", "away", "deepep"),
    ],
    "48 B200": [
        _layout(6, 8, 8, "1f1b", 1, "host", "deepep"),
        _layout(6, 8, 8, "1f1b", 2, "host", "again", "deepep"),
        _layout(6, 8, 8, "1f1b", 2, "host", "again:3", "deepep"),
        _layout(6, 8, 8, "1f1b", 4, "host", "again:6", "deepep"),
        _layout(6, 8, 8, "1f1b", 2, "host", "away", "deepep"),
        _layout(6, 8, 8, "interleaved", 2, "host", "again:3", "deepep"),
        _layout(12, 4, 4, "1f1b", 2, "host", "again:3", "deepep"),
        _layout(12, 4, 4, "interleaved", 1, "host", "deepep"),
        _layout(12, 4, 4, "1f1b", 4, "host", "again", "deepep"),
        _layout(3, 16, 16, "1f1b", 1, "host", "again", "deepep"),
    ],
    "32K": [
        _layout(16, 16, 64, "dualpipev", 1, cp=8),
        _layout(16, 16, 64, "1f1b", 1, cp=8),
        _layout(16, 16, 64, "1f1b", 1, "deepep", cp=8),
        _layout(16, 32, 64, "1f1b", 1, "deepep", "away", cp=4),
        _layout(16, 32, 64, "dualpipev", 1, "deepep", "away", cp=4),
        _layout(16, 32, 64, "zbv", 1, "deepep", "away", cp=4),
        _layout(16, 16, 64, "interleaved", 1, "deepep", cp=8),
        _layout(8, 32, 64, "1f1b", 1, "deepep", "away", cp=8),
        _layout(8, 64, 64, "interleaved", 1, "deepep", "away", cp=4),
        _layout(16, 64, 64, "1f1b", 1, "deepep", "away", "host", cp=2),
    ],
    "128K": [
        _layout(16, 4, 64, "1f1b", 1, cp=32),
        _layout(16, 4, 64, "dualpipev", 1, cp=32),
        _layout(16, 8, 64, "1f1b", 1, "away", cp=16),
        _layout(16, 8, 64, "interleaved", 1, "away", cp=16),
        _layout(16, 8, 64, "interleaved", 1, "away", "deepep", cp=16),
        _layout(16, 8, 64, "dualpipev", 1, "away", "deepep", cp=16),
        _layout(16, 16, 64, "interleaved", 1, "away", "deepep", "host", cp=8),
        _layout(8, 16, 64, "interleaved", 1, "away", "deepep", cp=16),
        _layout(8, 8, 64, "1f1b", 1, "away", "deepep", cp=32),
        _layout(16, 4, 64, "1f1b", 1, "again", "deepep", cp=32),
    ],
    "512 H100 (Kimi K2)": [
        "parallel.dp=32",
        "parallel.dp=32 parallel.schedule=1f1b",
        "parallel.dp=32 parallel.dispatch=deepep",
        "parallel.dp=32 parallel.dispatch=deepep parallel.offload_optimizer=true",
        "parallel.pp=8 parallel.dp=64 parallel.ep=32 parallel.dispatch=deepep parallel.offload_optimizer=true",
    ],
    "4 H800 (tiny)": [_layout(1, 4, 4, "1f1b", 4), _layout(2, 2, 2, "zbv", 4)],
}


def plan_by_hand(recipe: str, layout: str) -> tuple[float | None, str]:
    """Returns the seconds of a step. If the layout does not fit, returns None and the reason."""
    try:
        plan = make_plan(compose(*recipe.split(), *layout.split()))
    except UserError as error:
        return None, f"{error.field}: {error.rule}"
    return (plan.step.step_seconds, "fits") if plan.fits else (None, "does not fit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help=f"some of: {'; '.join(JOBS)}")
    parser.add_argument("--layouts", type=int, default=10, help="how many by hand of each")
    options = parser.parse_args()
    if unknown := set(options.jobs) - JOBS.keys():
        parser.error(f"no such job: {'; '.join(unknown)}. There are: {'; '.join(JOBS)}")
    faster = []
    for job in options.jobs or JOBS:
        devices, recipe = JOBS[job]
        began, best = time.process_time(), None
        answers: list[tuple[float, float]] = []

        def tell(found: FoundLayout, began: float = began, answers: list[tuple[float, float]] = answers) -> None:
            answers.append((time.process_time() - began, found.step_seconds))

        try:
            found = search(compose(*recipe.split(), "plan.search=true", f"plan.devices={devices}"), tell)
        except UserError as error:
            words = error.rule.partition(" (")[0]
        else:
            best = found.best[0]
            words = f"{best.step_seconds:.4g} s a step among {found.tried} layouts\n    {' '.join(best.overrides)}"
        print(f"{job}, {time.process_time() - began:.0f} s: {words}", flush=True)
        if answers:
            (first, step), (last, _) = answers[0], answers[-1]
            print(f"    first answer after {first:.0f} s ({step:.4g} s a step), best after {last:.0f} s", flush=True)
        for layout in BY_HAND[job][: options.layouts]:
            seconds, why = plan_by_hand(recipe, layout)
            away = "" if seconds is None or best is None else f", {100 * (seconds / best.step_seconds - 1):+.1f} %"
            beside = why if seconds is None else f"{seconds:.4g} s{away}"
            print(f"  {beside:24} {layout}", flush=True)
            if seconds is not None and (best is None or seconds < best.step_seconds * (1 - 1e-9)):
                faster.append(f"{job}: {layout}")
    if faster:
        sys.exit(f"faster than what the search found: {'; '.join(faster)}")


if __name__ == "__main__":
    main()
