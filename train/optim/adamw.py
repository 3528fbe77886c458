"""AdamW with fp32 weights and bf16 moments (paper 3.3.3), for the flat shards of ZeRO.

The reference is torch's fused kernel. CPUs with AVX2 use train/kernels/cpu/adamw.cpp, GPUs
train/kernels/gpu/triton_adamw.py.
"""

from collections.abc import Collection, Sequence
from ctypes import c_double, c_float
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from conf.optimizers import UpdateRule
from conf.schema import Config, Optim, Precision
from conf.thresholds import THRESHOLDS
from parallel.shard import GradientHandover
from train.kernels.cpu.cpp_function import Array, Kernel, Number, Size, Struct, Threads
from train.kernels.cpu.libraries import library

VECTOR = 16
"""Number of elements of torch's widest vector. torch's kernel updates the elements after the last vector in double
precision.
"""

_load = partial(library, "adamw")
_sum_of_squares = Kernel(
    _load, "sum_of_squares", c_double, x=Array(torch.float32, "N"), elements=Size("N"), threads=Threads()
)  # fmt: skip
_adamw = Kernel(
    _load, "adamw",
    weight=Array(torch.float32, "N", out=True), gradient=Array(torch.float32, "N"),
    mean=Array(torch.bfloat16, "N", out=True), square=Array(torch.bfloat16, "N", out=True),
    elements=Size("N"),
    settings=Struct(
        factor=Number(c_float), lerp=Number(c_float), keep_square=Number(c_float), add_square=Number(c_float),
        decay=Number(c_float), step=Number(c_float), root=Number(c_float), eps=Number(c_float),
    ),
    threads=Threads(),
)  # fmt: skip


class WeightShapes(NamedTuple):
    """Update rule and weight shapes of a parameter group, for a plan."""

    rule: UpdateRule
    shapes: Sequence[tuple[str, Sequence[int]]]
    """Name and shape of each weight. The shape of an expert weight counts only this rank's experts."""


class UpdatePiece(NamedTuple):
    """Operands for the update of adjacent shard elements, all flat."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, in fp32, on the device of the weights.

    A parameter is a flat fp32 tensor: ZeRO's shard of the master weights. Any sharding gives the same bits.

    moments: dtype of the moments. compiled: whether a CPU uses compiled code.
    """

    def __init__(self, groups: list[dict], optim: Optim, moments: torch.dtype, compiled: bool):
        beta1, beta2 = optim.betas
        super().__init__(groups, {"lr": optim.lr, "betas": (beta1, beta2), "eps": optim.eps, "weight_decay": 0.0})
        self.moments, self._compiled = moments, compiled
        self.handover = GradientHandover()
        self.updates = 0
        """Number of completed updates, the same for all parameter groups. Bias correction needs it."""

    @classmethod
    def make(cls, groups: list[dict], config: Config, parts: Collection[str]) -> "AdamW":
        """Creates AdamW for these groups, with the run's settings. parts: see `Kernels.parts`."""
        return cls(groups, config.optim, moments_dtype(config.precision), "adamw" in parts)

    @staticmethod
    def count_scratch_bytes(kind: str, config: Config, group: WeightShapes, elements: int, compiled: bool) -> int:
        """Returns the scratch memory, in bytes, for an update of `elements` elements. kind: device type."""
        none = kind == "cuda" or compiled or moments_dtype(config.precision) == torch.float32
        return 0 if none else 8 * min(THRESHOLDS.adamw_elements, elements)

    def allocate(self, param: Tensor) -> dict[str, Tensor]:
        """Allocate the two moments of a parameter, unless they exist."""
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param, dtype=self.moments)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=self.moments)
        return state

    def sums_of_squares(self, pieces: Sequence[Tensor]) -> Tensor:
        """Returns each flat fp32 tensor's sum of squares, fp64 (len(pieces),)."""
        if pieces and pieces[0].is_cuda:
            from train.kernels.gpu import triton_adamw

            return triton_adamw.sums_of_squares(pieces)
        sums = [self._sum_of_squares(piece) for piece in pieces]
        return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64)

    def _sum_of_squares(self, x: Tensor) -> Tensor:
        """Returns the sum of squares of all elements: each row is summed in fp32, and the rows in fp64.

        The relative error is 1e-7 (torch's norm of the complete tensor: 1e-4). A sum in fp64 would be ten times slower.
        """
        if self._compiled:
            return torch.tensor(_sum_of_squares(x), dtype=torch.float64)
        row = THRESHOLDS.norm_row
        whole = x.numel() // row * row
        rows = [
            torch.linalg.vector_norm(x[:whole].view(-1, row), dim=1),
            torch.linalg.vector_norm(x[whole:]).view(1),
        ]
        return torch.cat(rows).double().square_().sum()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyrefly: ignore[bad-override]  there is no closure
        """Update every group that has gradients. The caller increments `updates`."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                self.update(param, group)
                if factors := self.handover.row_factors:
                    self.handover.shards[param].scale_rows(param.view(-1), factors)

    def update(self, param: Tensor, group: dict) -> None:
        """Update one flat parameter with its gradient from ZeRO."""
        state = self.allocate(param)
        held = param.view(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        gradients, factor = self.handover.of(param)
        if param.is_cuda:
            _update_on_gpu(held, gradients, group, self.updates + 1, factor)
            return
        update, first = _update, 0
        if self._compiled and self.moments == torch.bfloat16:
            update = _update_compiled
        if isinstance(factor, Tensor):
            factor = factor.to(param.device)
        for grad in gradients:
            part = slice(first, first + grad.numel())
            weight, mean, square = (tensor[part] for tensor in held)
            update(UpdatePiece(weight, grad.to(param.device), mean, square), group, self.updates + 1, factor)
            first = part.stop


def _update(piece: UpdatePiece, group: dict, count: int, factor: Tensor | float | None) -> None:
    """Update with torch's fused kernel, in one pass over memory. Also multiplies the gradient by `factor` in place.

    Moments in a dtype other than fp32 are copied to fp32 and back, chunk by chunk.
    """
    weight, grad, exp_avg, exp_avg_sq = piece
    step = torch.full(
        (), float(count), device=weight.device
    )  # created on the device, because a copy would block the host
    if factor is not None:
        grad.mul_(factor)
    whole = weight.numel() // VECTOR * VECTOR
    size = max(1, whole) if exp_avg.dtype == torch.float32 else THRESHOLDS.adamw_elements
    parts = [tensor[:whole].split(size) for tensor in (weight, grad, exp_avg, exp_avg_sq)]
    scratch = [torch.empty(min(size, whole), device=weight.device) for _ in range(2 * (exp_avg.dtype != torch.float32))]
    for weight_C, grad_C, *moments in zip(*parts, strict=True):
        if not scratch:
            _fused([weight_C, grad_C, *moments], group, step)
            continue
        exact = [buffer[: weight_C.numel()].copy_(moment) for buffer, moment in zip(scratch, moments, strict=True)]
        _fused([weight_C, grad_C, *exact], group, step)
        for moment, value in zip(moments, exact, strict=True):
            moment.copy_(value)
    if whole < weight.numel():
        _update_rest([tensor[whole:] for tensor in (weight, grad, exp_avg, exp_avg_sq)], group, step)


def _update_compiled(piece: UpdatePiece, group: dict, count: int, factor: Tensor | float | None) -> None:
    """Update with compiled code, for bf16 moments."""
    _adamw(*piece, *_settings(group, count, factor).values())


def _update_on_gpu(
    held: tuple[Tensor, Tensor, Tensor],
    gradients: Sequence[Tensor],
    group: dict,
    count: int,
    factor: Tensor | float | None,
) -> None:
    """Update the shard in one launch. gradients: of adjacent intervals of the shard. held: weight and moments, flat."""
    from train.kernels.gpu import triton_adamw

    weight, mean, square = held
    triton_adamw.update(weight, mean, square, gradients, **_settings(group, count, factor))


def _settings(group: dict, count: int, factor: Tensor | float | None) -> dict[str, float]:
    """Returns the coefficients of update number `count` (`Settings` in train/kernels/cpu/adamw.cpp)."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    return {
        "factor": 1.0 if factor is None else float(factor), "lerp": 1 - beta1,
        "keep_square": beta2, "add_square": 1 - beta2, "decay": 1 - lr * group["weight_decay"],
        "step": lr / (1 - beta1**count), "root": (1 - beta2**count) ** 0.5, "eps": group["eps"],
    }  # fmt: skip


def _update_rest(rest: list[Tensor], group: dict, step: Tensor) -> None:
    """Update a shard's last elements as a padded vector, so that shard boundaries do not change the result."""
    padded = [torch.zeros(VECTOR, device=tensor.device) for tensor in rest]
    for vector, tensor in zip(padded, rest, strict=True):
        vector[: tensor.numel()] = tensor
    _fused(padded, group, step)
    for vector, tensor in zip(padded, rest, strict=True):
        tensor.copy_(vector[: tensor.numel()])


def _fused(operands: list[Tensor], group: dict, step: Tensor) -> None:
    """Call torch's kernel for a weight, its gradient and its moments."""
    (weight, grad, exp_avg, exp_avg_sq), (beta1, beta2) = operands, group["betas"]
    torch._fused_adamw_(
        [weight], [grad], [exp_avg], [exp_avg_sq], [], [step], lr=group["lr"], beta1=beta1, beta2=beta2,
        weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
    )  # fmt: skip


def moments_dtype(precision: Precision) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision.moments]
