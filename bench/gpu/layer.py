"""One layer of DeepSeek-V3 alone on a device: built, timed, measured, and watched for waits.

The layer is the trainer's own chunk of one block with its own precision, and gradients that accumulate in fp32, as from
the second micro-batch of a step on. As one rank of 64 it has four experts; the data of other ranks is simulated
(parallel/expert/stand_in.py).
"""

import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.distributed.pipelining._backward import stage_backward_input
from torch.profiler import ProfilerActivity, profile

from bench.gpu.machine import kernels_of
from conf.load import compose
from conf.schema import ROOT, Config
from parallel.expert.build import build_stand_in, build_wire
from parallel.expert.stand_in import Load
from parallel.pipeline.stage import GRADIENT_STD, HIDDEN_STD, backward_of_weights, kept_graph
from train.dry_run.assumed_rows import group_of
from train.dry_run.piece import for_device, shrunk
from train.kernels.precision import activation_dtype, build_precision
from train.model.count import attention_matmul_weights, layer_flops
from train.model.deepseek import DeepSeekV3
from train.model.operations import Kernels
from train.plan.memory.ledger import PeakMeter

EP, RANKS_PER_NODE = 64, 8
PARTS = ("forward", "backward", "backward, inputs", "backward, weights")
"""The last two are the same backward in two passes, as zbv and dualpipev run it."""
STEP = "forward + backward"
WARM_ROUNDS = 3
SYNCHRONIZES = "called a synchronizing CUDA operation"
"""What torch's sync debug mode warns of."""


def layer_config(precision: str, dispatch: str, shrink: int, device: torch.device) -> Config:
    """DeepSeek-V3 with its experts over 64 ranks; FP8 rows on the wire where the experts take them, weights cast once a step. shrink divides widths."""
    wire = "fp8" if precision.startswith("fp8") else "bf16"
    config = compose(
        "conf=deepseek_v3", "mode=dry_run", "parallel=single", f"precision={precision}", f"parallel.dp={EP}", f"parallel.ep={EP}",
        f"parallel.dispatch={dispatch}", f"parallel.wire={wire}", f"cluster.ranks_per_node={RANKS_PER_NODE}",
        *["precision.fp8.hold_weights=true"] * precision.startswith("fp8"),
    )  # fmt: skip
    return shrunk(for_device(config, device), shrink)


class Layer:
    """A dense block, or one of experts, with an input and the gradient of its output; its weights are drawn on the device.

    kernels: if not given, those of a run. like: a layer of these sizes, whose weights, input and gradient this one takes. Raises UserError where the device lacks
    what the precision needs.
    """

    def __init__(
        self,
        config: Config,
        dense: bool,
        device: torch.device,
        kernels: Kernels | None = None,
        like: "Layer | None" = None,
    ):
        self.config, self.dense, self.device = config, dense, device
        model, parallel = config.model, config.parallel
        dispatcher, local = None, range(model.experts)
        if parallel.ep > 1:
            group = group_of(config)
            self.load, local = Load.even(group), range(group.experts // group.ranks)
            wire = build_wire(parallel.wire, config.precision.fp8 is not None)
            dispatcher = build_stand_in(parallel.dispatch, group, wire, self.load)
        first, dtype = 0 if dense else model.dense_layers, activation_dtype(config.precision)
        self.kernels = kernels or kernels_of(config, device)
        self._precision = build_precision(config.precision, device, self.kernels)
        self.chunk = DeepSeekV3(
            model, self._precision, seq_len=config.seq_len, layers=range(first, first + 1), has_embedding=False,
            has_head=False, dispatcher=dispatcher, local_experts=local, dtype=dtype, device=device,
        )  # fmt: skip
        if like is not None:
            self.chunk.load_state_dict(like.chunk.state_dict())
        else:
            with torch.no_grad():
                for param in self.chunk.parameters():
                    param.fill_(1) if param.dim() == 1 else param.normal_(0, model.init_std)
        for router in self.chunk.routers().values():
            router.balance_weight = config.optim.balance_loss
        for param in self.chunk.parameters():
            param.grad_dtype = torch.float32
            param.grad = torch.zeros_like(param, dtype=torch.float32)
        self._precision.watch(self.chunk)
        self._precision.start_step(1, config.holds_weights)
        shape = 1, config.seq_len, model.hidden
        made = (torch.randn(shape, device=device).mul_(std) for std in (HIDDEN_STD, GRADIENT_STD))
        x_BTD, dy_BTD = made if like is None else (like.x_BTD.detach(), like.dy_BTD)
        self.x_BTD = x_BTD.to(device, dtype).requires_grad_()
        self.dy_BTD = dy_BTD.to(device, dtype)

    def forward(self) -> Tensor:
        return self.chunk(self.x_BTD)

    def backward(self, y_BTD: Tensor) -> None:
        self.x_BTD.grad = None
        y_BTD.backward(self.dy_BTD)

    def inputs(self, y_BTD: Tensor) -> list:
        """The gradient of the input; returns what `weights` needs."""
        self.x_BTD.grad = None
        self._graph = kept_graph(y_BTD)
        return stage_backward_input([y_BTD], [self.dy_BTD], [self.x_BTD], self.chunk.parameters())[1]

    def weights(self, groups: list) -> None:
        backward_of_weights(groups)
        self._graph = None

    def flops(self) -> dict[str, float]:
        """Of every part, as train/model/count.py counts: causal, without what is recomputed."""
        model, seq_len = self.config.model, self.config.seq_len
        forward = layer_flops(model, seq_len, self.dense) / 3
        ffn = model.dense_width if self.dense else (model.top_k + model.shared_experts) * model.expert_width
        products = 2 * (attention_matmul_weights(model) + 3 * model.hidden * ffn)
        core = forward - products  # twice as much in backward, all of it for the inputs
        parts = forward, 2 * forward, products + 2 * core, products
        return {name: seq_len * one for name, one in zip((*PARTS, STEP), (*parts, 3 * forward), strict=True)}


class Stopwatch:
    """Marks on the device's own time line, without waiting for it."""

    def __init__(self, device: torch.device):
        self._device, self._marks = device, []

    def mark(self) -> None:
        if self._device.type == "cuda":
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between neighbours. On CUDA call when the device is done."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type == "cuda":
            return [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return [end - start for start, end in pairs]


def times(layer: Layer, rounds: int) -> dict[str, float]:
    """Median seconds of the parts, and of forward and backward together, one after another as fast as the host issues them."""
    watches = []
    for _ in range(WARM_ROUNDS + rounds if layer.device.type == "cuda" else 1 + rounds):
        watch = Stopwatch(layer.device)
        watch.mark()
        y_BTD = layer.forward()
        watch.mark()
        layer.backward(y_BTD)
        watch.mark()
        y_BTD = layer.forward()
        watch.mark()
        groups = layer.inputs(y_BTD)
        watch.mark()
        layer.weights(groups)
        watch.mark()
        watches.append(watch)
    synchronize(layer.device)
    found = [watch.seconds() for watch in watches[-rounds:]]
    columns = {"forward": 0, "backward": 1, "backward, inputs": 3, "backward, weights": 4}
    result = {name: statistics.median(one[column] for one in found) for name, column in columns.items()}
    return result | {STEP: statistics.median(one[0] + one[1] for one in found)}


def peaks(layer: Layer) -> dict[str, int]:
    """Most bytes of tensors at a time, in forward and in backward; weights and gradients of this layer among them."""
    found = {}
    with PeakMeter(layer.device) as meter:
        y_BTD = layer.forward()
        found["forward"] = meter.mark()
        layer.backward(y_BTD)
        found["backward"] = meter.mark()
    return found


def waits(layer: Layer) -> dict[str, int]:
    """Where one forward and backward makes the host wait for the GPU, by line of this project, and how often."""
    found: Counter[str] = Counter()
    synchronize(layer.device)
    with warnings.catch_warnings(action="ignore"):  # it says that it is a prototype
        torch.cuda.set_sync_debug_mode("warn")
    try:
        with collected(found):
            layer.backward(layer.forward())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return dict(found.most_common())


@contextmanager
def collected(found: Counter[str]) -> Iterator[None]:
    """Count torch's warnings of waits by the innermost line of this project; other warnings are shown as always."""

    def note(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: object) -> None:
        if SYNCHRONIZES in str(message):
            found[_place()] += 1
        else:
            print(warnings.formatwarning(message, category, filename, lineno), file=sys.stderr)

    with warnings.catch_warnings():  # which brings showwarning back, too
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield


def _place() -> str:
    """FILE:LINE of the innermost caller in this project, bench aside; autograd's own nodes have none."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        inside = path.is_relative_to(ROOT) and "site-packages" not in path.parts
        if inside and not path.is_relative_to(ROOT / "bench"):
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "torch's own backward"


def launches(layer: Layer) -> dict[str, int]:
    """GPU operations of a forward and backward: kernels, and copies and fills, from torch's profiler."""
    layer.backward(layer.forward())
    synchronize(layer.device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        layer.backward(layer.forward())
        synchronize(layer.device)
    names = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    moved = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return {"kernels": len(names) - moved, "copies and fills": moved}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
