"""One whole step, the device beside the CPU: of `tiny`, and of a layer of DeepSeek-V3 at full width.

`tiny` runs as a rank in its own process (bench/gpu/rank.py) with the trainer's pipeline, DeepSpeed and AdamW. The layer
is dense or has eight experts, four of them per token: all widths are DeepSeek-V3's, and the dispatch is real.
"""

import tempfile
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from bench.gpu.compare import BOUND, distances, judge
from bench.gpu.kernels import hopper
from bench.gpu.layer import Layer
from bench.gpu.line import Check, Finding, NotTried
from bench.gpu.machine import Machine
from bench.gpu.rank import Ranks, Task
from conf.errors import UserError
from conf.load import compose
from conf.schema import Config
from train.dry_run.piece import for_device, shrunk
from train.optim.adamw import AdamW

LOSS = {"bf16": 1e-3, "fp8": 4e-3, "fp8_ue8m0": 4e-3}
"""Relative. A loss is a mean over thousands of tokens, whose roundings cancel."""
SMALL = ("batch_size=4", "micro_batch_size=2", "seq_len=128")
"""`tiny` in a dry check."""
TOKENS, SMALL_TOKENS, SHRINK = 256, 128, 32
FEW_EXPERTS = ("model.experts=8", "model.top_k=4", "model.groups=4", "model.top_groups=2")
RATE = 1e-3
LIMIT = 100.0


def checks(machine: Machine) -> list[Check]:
    found = [Check(f"tiny, {name}", partial(tiny, machine, name), LIMIT) for name in ("bf16", "fp8")]
    for name in ("bf16", "fp8"):
        for kind in ("dense", "MoE"):
            title = f"layer of DeepSeek-V3, {kind}, {name}"
            found.append(Check(title, partial(layer_step, machine, name, kind == "dense"), LIMIT))
    return found


def tiny(machine: Machine, precision: str) -> Finding:
    """Loss, every gradient and every update of the first step."""
    if machine.on_gpu and precision == "fp8":
        hopper(machine)
    with tempfile.TemporaryDirectory() as folder:
        started = [
            start(machine, precision, machine.device.type, Path(folder) / "ours", machine.on_gpu),
            start(machine, precision, "cpu", Path(folder) / "same"),
        ]
        (device,), (cpu,) = (ranks.found(machine.patience * LIMIT) for ranks in started)
    fp32 = exact(machine)
    sides = [
        side["gradients"] | {f"update of {n}": x for n, x in side["updates"].items()} for side in (device, cpu, fp32)
    ]
    found = judge(distances(*sides))
    error = abs(device["losses"][0] / cpu["losses"][0] - 1)
    found.figures |= {"loss": device["losses"][0], "loss on the CPU": cpu["losses"][0], "in fp32": fp32["losses"][0]}
    found.bound = f"losses within {LOSS[precision]:g}, where the roundings of thousands of tokens cancel; {BOUND}"
    if not error <= LOSS[precision]:
        found.problem = "; ".join(filter(None, (f"losses differ by {error:.1e}", found.problem)))
    return found


def start(machine: Machine, precision: str, device: str, folder: Path, compiled: bool = True) -> Ranks:
    overrides = ("conf=tiny", f"precision={precision}", *(() if machine.on_gpu else SMALL))
    return Ranks(Task(overrides, device, tensors=True, compiled=compiled), folder)


@cache
def exact(machine: Machine) -> dict:
    """The CPU in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        (found,) = start(machine, "fp32", "cpu", Path(folder) / "exact").found(machine.patience * LIMIT)
    return found


def layer_config(precision: str, machine: Machine, device: torch.device) -> Config:
    tokens = TOKENS if machine.on_gpu else SMALL_TOKENS
    config = compose("conf=deepseek_v3", "mode=dry_run", "parallel=single", f"precision={precision}", *FEW_EXPERTS)
    config = shrunk(for_device(config, device), 1 if machine.on_gpu else SHRINK)
    config.seq_len = tokens
    return config


def layer_step(machine: Machine, precision: str, dense: bool) -> Finding:
    """Output, the input's gradient, every gradient and every update."""
    torch.manual_seed(1)
    try:
        ours = Layer(layer_config(precision, machine, machine.device), dense, *machine.side(reference=False))
    except UserError as error:
        raise NotTried(f"precision={precision} cannot run here: {error.rule}; {error.cure}") from error
    sides = [results(ours)]
    for name in (precision, "fp32"):
        device, kernels = machine.side(reference=True)
        sides.append(results(Layer(layer_config(name, machine, device), dense, device, kernels, like=ours)))
    return judge(distances(*sides))


def results(layer: Layer) -> dict[str, Tensor]:
    """On the CPU, by name."""
    y_BTD = layer.forward()
    layer.backward(y_BTD)
    found = {"y": y_BTD.detach().cpu(), "d x": layer.x_BTD.grad.cpu()}
    for name, param in layer.chunk.named_parameters():
        found[f"d {name}"] = param.grad.cpu()
        found[f"update of {name}"] = update(layer, param).cpu()
        param.grad = None
    return found


def update(layer: Layer, param: torch.nn.Parameter) -> Tensor:
    """What AdamW adds to the fp32 weight in the first step."""
    master = torch.nn.Parameter(param.detach().float().view(-1))
    before = master.detach().clone()
    master.grad = param.grad.view(-1)
    group = {"params": [master], "weight_decay": 0.1, "lr": RATE}
    AdamW.make([group], layer.config, layer.kernels.parts).step()
    return master.detach() - before
