"""Installed software, the device, and the speed of the reference operations of the other parts."""

import importlib.util
import os
import time
from functools import partial

import psutil
import torch

from bench.gpu.line import Check, Finding, NotTried
from bench.gpu.machine import Machine
from bench.gpu.timing import median_seconds
from bench.gpu.verdict import nvcc
from conf.load import compose
from train.kernels.choice import ATTENTION_BOUND, ATTENTION_PARTS, CORES, build_kernels, problem_of
from train.kernels.fp8.hopper_probe import probe
from train.kernels.fp8.installed import MX_CAPABILITIES
from train.kernels.gpu.host_compiler import compiler_command, missing_for_triton
from train.metrics.peak import measured_peak, named_peak
from train.model.attention import Attend, AttentionCore, AttentionInput
from train.model.sequence import Positions

TIMED = {"whole sequences": 1, "documents": 8}
"""Parts that are timed, with the documents of a sequence."""
BUSY = 0.9
"""Share of a card's memory that is free when nobody else uses it."""


def checks(machine: Machine) -> list[Check]:
    return [
        Check("the machine", partial(host, machine)),
        Check("the device", partial(device, machine)),
        Check("rate of bf16 products", partial(product_rate, machine)),
        Check("rate of memory", partial(memory_rate, machine)),
        Check("time of a launch", partial(launch_time, machine)),
        Check("a C compiler and Python's headers, for Triton", partial(host_compiler, machine)),
        Check("nvcc, for DeepGEMM", partial(compiler, machine)),
        Check("precision=fp8 can start", partial(fp8_starts, machine, "triton")),
        Check("precision=fp8 can start with DeepGEMM", partial(fp8_starts, machine, "deepgemm")),
        Check("precision=mxfp8 can start", partial(mxfp8_starts, machine)),
        Check("attention with heads of 192 and 128", partial(attention, machine)),
    ]


def host(machine: Machine) -> Finding:
    return Finding(
        {"cores": os.cpu_count(), "memory (GiB)": psutil.virtual_memory().total / 2**30, "load": os.getloadavg()[0]}
    )


def device(machine: Machine) -> Finding:
    machine.need_gpu("this")
    properties = torch.cuda.get_device_properties(machine.device)
    free, total = torch.cuda.mem_get_info(machine.device)
    busy = free < BUSY * total
    return Finding(
        {
            "name": properties.name, "compute capability": f"{properties.major}.{properties.minor}",
            "SMs": properties.multi_processor_count, "memory (GiB)": total / 2**30, "free (GiB)": free / 2**30,
            "cards of this machine": torch.cuda.device_count(),
        },
        f"{BUSY:.0%} of the memory is free: other programs on the card make times and the dry runs meaningless",
        f"only {free / total:.0%} of the memory is free" if busy else None,
    )  # fmt: skip


def product_rate(machine: Machine) -> Finding:
    rate = measured_peak(machine.device, torch.bfloat16, build_kernels(machine.device.type))
    figures = {"rate (TFLOP/s)": rate / 1e12}
    if not machine.on_gpu:
        return Finding(figures)
    made = named_peak(machine.name)
    if made is None:
        return Finding(figures | {"maker's figure": "not known for this card"})
    problem = None if 0.4 <= rate / made <= 1.02 else f"{rate / made:.0%} of the maker's {made / 1e12:.0f} TFLOP/s"
    bound = (
        "between 0.4 and 1.02 of the maker's figure: large products reach 0.6 to 0.8 of it under the power limit; less "
        "means a throttled or shared card, more that the clock of this measurement is wrong"
    )
    return Finding(figures | {"of the maker's": rate / made}, bound, problem)


def memory_rate(machine: Machine) -> Finding:
    size = 2**30 if machine.on_gpu else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    figures = {"copy, read and written (TB/s)": 2 * size / median_seconds(lambda: target.copy_(source), machine) / 1e12}
    if machine.on_gpu:
        pinned = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        part = target[: 2**28]
        for name, work in {
            "to the host (GB/s)": lambda: pinned.copy_(part, non_blocking=True),
            "from the host (GB/s)": lambda: part.copy_(pinned, non_blocking=True),
        }.items():
            figures[name] = 2**28 / median_seconds(work, machine, rounds=5) / 1e9
    return Finding(figures)


def launch_time(machine: Machine) -> Finding:
    machine.need_gpu("this")
    x, count = torch.zeros(1, device=machine.device), 2000
    for _ in range(100):
        x.add_(1)
    machine.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        x.add_(1)
    issued = time.perf_counter() - began
    machine.synchronize()
    done = time.perf_counter() - began
    return Finding({"issued (us)": 1e6 * issued / count, "done (us)": 1e6 * done / count})


def host_compiler(machine: Machine) -> Finding:
    """Without them every part that runs a kernel fails."""
    machine.need_gpu("this")
    lacks, cure = missing_for_triton() or (None, "")
    bound = "a module of Python in C can be built, as Triton builds what starts its kernels"
    return Finding({"compiler": compiler_command()}, bound, lacks and f"{lacks}: {cure}")


def compiler(machine: Machine) -> Finding:
    machine.need_gpu("this")
    if nvcc() is None:
        raise NotTried(
            "there is no nvcc in CUDA_HOME, /usr/local/cuda or PATH: precision.fp8.backend=deepgemm cannot compile its kernels"
        )
    return Finding({"in CUDA_HOME": bool(os.environ.get("CUDA_HOME"))})


def fp8_starts(machine: Machine, backend: str) -> Finding:
    """As a run of precision=fp8 finds out before it reads data."""
    machine.need_gpu("the FP8 path")
    capability = torch.cuda.get_device_capability(machine.device)
    if capability != (9, 0):
        raise NotTried(
            f"compute capability {capability[0]}.{capability[1]} has no blockwise FP8 products, 9.0 (H100, H200) has"
        )
    if backend == "deepgemm" and importlib.util.find_spec("deep_gemm") is None:
        raise NotTried("sgl-deep-gemm is not installed: pip install -e '.[fp8]'")
    found = probe(compose("precision=fp8", f"precision.fp8.backend={backend}"), machine.device.index)
    return Finding(
        {"found": found}, "small products have the values of the emulation (train/kernels/fp8/hopper_probe.py)"
    )


def mxfp8_starts(machine: Machine) -> Finding:
    """As a run of precision=mxfp8 finds out before it reads data."""
    machine.need_gpu("the MXFP8 path")
    capability = torch.cuda.get_device_capability(machine.device)
    if capability not in MX_CAPABILITIES:
        raise NotTried(
            f"compute capability {capability[0]}.{capability[1]} has no MXFP8 products, 10.0 and 10.3 (B200, B300) have"
        )
    found = probe(compose("precision=mxfp8"), machine.device.index)
    return Finding(
        {"found": found}, "small products have the values of the emulation (train/kernels/fp8/hopper_probe.py)"
    )


def attention(machine: Machine) -> Finding:
    """Cores of attention with DeepSeek-V3's heads, one by one; a run takes the first that is right, for documents the first of
    those that are made for them (train/kernels/choice.py)."""
    machine.need_gpu("torch's CUDA attention")
    config = compose("conf=deepseek_v3", "mode=dry_run", "precision=bf16")
    heads = [f"{phase}, {part} (ms)" for part in TIMED for phase in ("forward", "both")]
    table, works = [["core", *ATTENTION_PARTS, *heads]], set()
    for name, core in CORES.items():
        says = {part: problem_of(core, config, machine.device, part) for part in ATTENTION_PARTS}
        if not core.takes_documents:
            says["documents"] = "not asked: it makes a plan for every length"
        works |= {part for part, problem in says.items() if problem is None}
        row = []
        for part, documents in TIMED.items():
            row += [None, None] if says[part] else attention_times(machine, core, documents)
        table.append([name, *(problem or "works" for problem in says.values()), *row])
    missing = set(ATTENTION_PARTS) - works
    problem = f"no core is right for {' and '.join(sorted(missing))}" if missing else None
    return Finding(
        {},
        f"one of the cores is within {ATTENTION_BOUND:g} of torch's operations in fp32, forward and backward, at 128 heads and 4096 positions",
        problem,
        table,
    )


def attention_times(machine: Machine, core: AttentionCore, documents: int) -> list[float]:
    """ms of forward, and of both, with 32 heads over one sequence of 4096 tokens, of so many equal documents."""
    shapes = [(1, 32, 4096, width) for width in (192, 192, 128)]
    q, k, v = (torch.randn(shape, device=machine.device).bfloat16().requires_grad_() for shape in shapes)

    documents_BT = None if documents == 1 else (torch.arange(4096) * documents // 4096).unsqueeze(0)
    given = AttentionInput(q, k, v, 192**-0.5, Positions(4096, documents_BT).seen[0])

    def forward() -> torch.Tensor:
        return Attend.apply(core, *given)

    def both() -> object:
        return torch.autograd.grad(forward(), (q, k, v), v.detach())

    return [1e3 * median_seconds(work, machine, rounds=10) for work in (forward, both)]
