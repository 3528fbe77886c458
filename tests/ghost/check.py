"""All checks of the GPU path that need no GPU, and their tables last. Run by .ci/gpu in a virtual environment with a CUDA build of torch.

kernels    every Triton kernel compiled by this environment's triton (bench/compile_kernels.py)
products   which calls of F.scaled_mm this torch takes
layers     layers of DeepSeek-V3 at full width in bf16 and FP8: placement, waits of the host, launches, bytes
overlap    the hops of a layer of experts, alone and in a pair: what is computed from the start of each to the wait for it
ranks      `python -m train` in bf16 and FP8, and single ranks of ep, pp, offload, node-limited and ZeRO 3 layouts
processes  `python -m train` in two real processes: experts, pipelines, sequences and activations on the host shared out
repeated   cluster.deterministic: torch refuses an operation that cannot repeat its bits
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from tests.ghost.build import NoCudaBuild, ghost_environment
from tests.ghost.log import on_ghost

BUDGET = {
    ("bf16", "dense", "flat"): (67, 1.9), ("bf16", "moe", "flat"): (148, 4.3), ("bf16", "moe", "node_limited"): (136, 4.6),
    ("fp8", "dense", "flat"): (95, 3.2), ("fp8", "moe", "flat"): (185, 5.2), ("fp8", "moe", "node_limited"): (173, 5.5),
}  # fmt: skip
"""Of one layer, forward and backward, under every torch: most launches, and most milliseconds at 3 TB/s of bytes outside products
and attention. Who adds one says why; who saves some lowers the figure."""
CHOSEN_LAUNCHES = 2252
"""Most launches of attention over chosen keys and of the loss of the indexer, in a layer of DeepSeek-V3.2."""
STEP_WAITS = 2
"""Most waits of the host in a step of a rank by itself in bf16: for what the passes took, and for the norm."""
COMPILING = 900.0
"""Seconds that compiling every kernel may take; it takes half a minute of a free core."""
MOST_MEMORY = 16 << 30
"""Bytes that a process may map for its ranks, the ghost's device memory among them."""


def main() -> int:
    if not on_ghost():
        return _start_on_ghost()
    warnings.filterwarnings("ignore")
    from tests.ghost import stand_ins

    stand_ins.install()
    failed, lines = 0, []
    for check in (kernels, products, layers, overlap, ranks, processes, repeated):
        problems, table = tried(check)
        for problem in problems:
            print(f"FAIL  {check.__name__}: {problem}", flush=True)
        failed += len(problems)
        lines += ["", *table]
    print("\n".join(lines))
    print(f"\nGPU checks without a GPU: {f'{failed} failed' if failed else 'all passed'}, {_versions()}")
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: a thread of autograd that still holds Python objects would abort the process while Python takes itself down.
    os._exit(1 if failed else 0)


def tried(check: Callable[[], tuple[list[str], list[str]]]) -> tuple[list[str], list[str]]:
    """Problems and table of a check; one that raises has its error as the problem, and the others go on."""
    try:
        return check()
    except Exception as error:
        traceback.print_exc()
        return [f"it ended early: {error!r}"], []


def kernels(limit: float = COMPILING) -> tuple[list[str], list[str]]:
    """In a process without the ghost, as the compiler asks for a device of its own choice. limit: in seconds."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [sys.executable, "-m", "bench.compile_kernels"]
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as late:
        said = (late.stderr or b"").decode(errors="replace").strip().splitlines()[-1:]  # bytes, whatever was asked for
        return [f"bench.compile_kernels had no end after {limit:g} s: {' '.join(said) or 'it said nothing'}"], []
    problems = [] if run.returncode == 0 else [f"bench.compile_kernels gives {run.returncode}: {run.stderr[-2000:]}"]
    return problems, run.stdout.splitlines()


def products() -> tuple[list[str], list[str]]:
    from tests.ghost import scaled_mm

    found = {product: product.refusal() for product in scaled_mm.PRODUCTS}
    problems = [
        f"{product.name} is {'taken' if refusal is None else f'refused: {refusal}'}"
        for product, refusal in found.items()
        if (refusal is None) != product.taken
    ]
    return problems, scaled_mm.table(found)


def layers() -> tuple[list[str], list[str]]:
    from tests.ghost import layers

    found, problems = _each(layers.LAYERS, lambda key: layers.count_layer(*key))
    for key, counts in found.items():
        launches, milliseconds = BUDGET[key]
        if counts.launches > launches:
            problems.append(f"{key}: {counts.launches} launches where at most {launches} were needed")
        worst = "; ".join(layers.by_line(counts, 3))
        if counts.milliseconds > milliseconds:
            problems.append(
                f"{key}: {counts.milliseconds:.2f} ms of memory traffic, and its budget is {milliseconds}: {worst}"
            )
        if counts.waits:
            problems.append(f"{key}: the host waits for the GPU: {counts.waits}")
        if counts.on_host:
            problems.append(f"{key}: computed on the host: {counts.on_host}")
        if refused := sum(calls.kinds["refusal"] for calls in counts.calls.values()):
            problems.append(f"{key}: {refused} calls with memory that no GPU could read")
    few, many = (layers.count_update(parameters, 5000) for parameters in (2, 300))
    if few != many:
        problems.append(f"an update of 2 parameters takes {few} launches and one of 300 takes {many}")
    inside, more = _each(layers.DOCUMENTS, lambda case: layers.count_documents(*layers.DOCUMENTS[case]))
    problems += more
    problems += [
        f"{case}: attention by {slow}" for case, calls in inside.items() if (slow := layers.slow_attention(calls))
    ]
    chosen = layers.count_chosen()
    if chosen.launches > CHOSEN_LAUNCHES:
        problems.append(
            f"attention over chosen keys: {chosen.launches} launches, at most {CHOSEN_LAUNCHES} were needed"
        )
    apart = {inside[case].launches for case in ("4 documents", "64 documents") if case in inside}
    if len(apart) != 1:
        problems.append(f"launches of attention depend on how many documents there are: {apart}")
    return problems, [
        *layers.table(found),
        f"the norm and an update of any number of parameters: {many} launches",
        *(f"attention inside {case}: {calls.launches} launches" for case, calls in inside.items()),
        f"attention over chosen keys and the loss of the indexer: {chosen.launches} launches",
        f"the loss of the indexer over all keys: {layers.count_index_loss().launches} launches",
    ]


def overlap() -> tuple[list[str], list[str]]:
    from tests.ghost import overlap, ranks

    keys = [(precision, dispatch) for precision in ranks.PRECISIONS for dispatch in overlap.EXCHANGES]
    found, problems = _each(keys, lambda key: overlap.count_beside(*key))
    problems += [
        f"{' '.join(key)}: {problem}" for key, counts in found.items() for problem in overlap.problems(key[1], counts)
    ]
    reductions, failed = _each(ranks.PRECISIONS, overlap.count_beside_reduction)
    problems += failed
    problems += [f"{key}: {one}" for key, beside in reductions.items() for one in overlap.reduction_problems(beside)]
    return problems, [
        f"launches beside each exchange of a layer, {' '.join(key)}, {how}: {' '.join(map(str, beside))}"
        for key, counts in found.items()
        for how, beside in counts.items()
    ] + [
        f"launches beside each reduction of a step, DualPipeV, {key}: {' '.join(map(str, beside))}"
        for key, beside in reductions.items()
    ]


def ranks() -> tuple[list[str], list[str]]:
    import torch

    from tests.ghost import ranks

    torch.cuda.empty_cache()
    # A size that a program reads from memory which no kernel wrote may be any; then it shall fail rather than fill the machine.
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, resource.RLIM_INFINITY))

    def run(key: tuple[str, str]):
        precision, layout = key
        if layout != "alone":
            return ranks.run_lone(layout, precision)
        with tempfile.TemporaryDirectory() as folder:
            return ranks.train_alone(precision, Path(folder))

    keys = [(precision, layout) for precision in ranks.PRECISIONS for layout in ("alone", *ranks.LAYOUTS)]
    found, problems = _each(keys, run)
    problems += [
        f"{key}: refused {calls.kinds['refusal']} calls" for key, calls in found.items() if calls.kinds["refusal"]
    ]
    for precision in ranks.PRECISIONS:
        there, here = (found.get((precision, f"pp 2, 1f1b{more}")) for more in (", offload", ""))
        if there is not None and here is not None and there.waits > here.waits:
            problems.append(
                f"{precision}: with activations on the host it waits {there.waits} times, without {here.waits}"
            )
    alone = found.get(("bf16", "alone"))
    if alone is not None and alone.waits > STEP_WAITS:
        problems.append(f"a step waits {alone.waits} times where {STEP_WAITS} will do")
    return problems, ranks.table({" ".join(key): calls for key, calls in found.items()})


def processes() -> tuple[list[str], list[str]]:
    from tests.ghost import processes

    def run(layout: str) -> float:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            processes.run_pair(layout, Path(folder))
        return time.monotonic() - began

    found, problems = _each(processes.LAYOUTS, run)
    return problems, [
        f"two processes, {layout}: two steps to their end in {took:.0f} s" for layout, took in found.items()
    ]


def repeated() -> tuple[list[str], list[str]]:
    """The last check: what torch was told stays."""
    import torch

    from tests.ghost import layers, ranks
    from train.generate.sampling import draw
    from train.kernels.deterministic import repeat_bits

    repeat_bits()

    def run(key: tuple[str, ...]):
        if key == ("chosen keys",):
            return layers.count_chosen()
        if key == ("sampling",):
            return draw(torch.empty(2, 320, device="cuda"), torch.rand(2, device="cuda"))
        if key == ("training",):
            with tempfile.TemporaryDirectory() as folder:
                return ranks.train_alone("bf16", Path(folder), "cluster.deterministic=true")
        return layers.count_layer(*key)

    kinds = [key for key in layers.LAYERS if key[2] == "flat"]
    found, problems = _each([*kinds, ("chosen keys",), ("training",), ("sampling",)], run)
    return problems, [
        f"cluster.deterministic: {len(found)} of {len(kinds) + 3} parts ask torch for nothing that it refuses"
    ]


def _each(keys, work: Callable) -> tuple[dict, list[str]]:
    """What every key gives, and the errors of those that give none."""
    found, problems = {}, []
    for key in keys:
        try:
            found[key] = work(key)
        except Exception as error:
            traceback.print_exc()
            problems.append(f"{key}: {error!r}")
    return found, problems


def _versions() -> str:
    import torch
    import triton

    return f"torch {torch.__version__}, triton {triton.__version__}"


def _start_on_ghost() -> int:
    try:
        environment = ghost_environment()
    except NoCudaBuild as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return subprocess.run([sys.executable, "-m", "tests.ghost.check"], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
