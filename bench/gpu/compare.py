"""When two results of the same arithmetic are equal enough.

Each comparison has three sides that start from equal values: the device, the CPU in the same dtype, and the CPU in
fp32. The distance between the two CPU results is the error of the dtype. The device may be FACTOR times as far from the
CPU. Two independent roundings differ by a factor of the square root of 2; the rest is chance, above all in small
tensors: two implementations on one CPU differed by a factor of up to 1.9 in one of the 148 tensors of a step of `tiny`.
A real error (a scale, a row, a sign, a missing sum) shows as many times that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpu.line import Finding
from bench.gpu.machine import DeviceSide, Machine

FACTOR = 3.0
SAME = 2e-5
"""Relative distance that is always allowed: fp32 sums in another order, and what a tensor core keeps of them."""
SCALAR = 3e-4
"""What a format is said to cost a single number, which may be right by chance."""
BOUND = (
    f"each tensor is at most {FACTOR:g} times as far from the CPU's in the same format as that is from fp32's (two independent "
    f"roundings are sqrt 2 apart, the rest is chance), or {SAME:g} of its norm (fp32 sums in another order)"
)


LARGE = 1 << 22
"""Elements from which distances are taken in fp32, which is off by 1e-4 of them and does not take minutes."""


@dataclass(frozen=True)
class Distance:
    """Of one tensor, relative to its norm."""

    name: str
    device: float
    """Of the device from the CPU in the same format."""
    format: float
    """Of that from the CPU in fp32."""

    @property
    def too_far(self) -> bool:
        return not self.device <= max(SAME, FACTOR * self.format)  # not a number is too far

    @property
    def ratio(self) -> float:
        """Of the distance to what is allowed; infinite where it is no number."""
        return self.device / max(SAME, FACTOR * self.format) if self.device == self.device else float("inf")


def relative(ours: Tensor, expected: Tensor) -> float:
    """Distance over the norm of what is expected; of two zeros 0."""
    format = torch.float64 if expected.numel() < LARGE else torch.float32
    ours, expected = (tensor.detach().cpu().to(format) for tensor in (ours, expected))
    if ours.shape != expected.shape:
        raise ValueError(f"shapes {tuple(ours.shape)} and {tuple(expected.shape)}")
    distance = (ours - expected).norm().item()
    return distance and distance / max(expected.norm().item(), 1e-30)


def distances(device: dict[str, Tensor], same: dict[str, Tensor], exact: dict[str, Tensor]) -> list[Distance]:
    """Of all tensors, which must be the same ones on all sides."""
    if not device.keys() == same.keys() == exact.keys():
        raise ValueError(f"the sides differ in {sorted(device.keys() ^ same.keys() | same.keys() ^ exact.keys())}")
    found = []
    for name, x in device.items():
        least = SCALAR if x.numel() == 1 else 0.0
        found.append(Distance(name, relative(x, same[name]), max(least, relative(same[name], exact[name]))))
    return found


def judge(found: Sequence[Distance], show_all: bool = False) -> Finding:
    """A verdict on all of them; the table has the worst ones."""
    worst = sorted(found, key=lambda one: -one.ratio)
    wrong = [one for one in worst if one.too_far]
    problem = None
    if wrong:
        first = wrong[0]
        problem = (
            f"{len(wrong)} of {len(found)} tensors are too far, first {first.name}: {first.device:.1e} from the CPU, which "
            f"is {first.format:.1e} from fp32"
        )
    rows = worst if show_all or len(worst) <= 6 else worst[:6]
    table = [["tensor", "device to CPU", "CPU to fp32"], *([one.name, one.device, one.format] for one in rows)]
    return Finding({"tensors": len(found), "worst, of what is allowed": worst[0].ratio}, BOUND, problem, table)


Sides = Callable[[DeviceSide, torch.dtype], dict[str, Tensor]]
"""Results by name, on this side and in this format, from values that are the same for all."""


def three_sides(machine: Machine, work: Sides, dtype: torch.dtype = torch.bfloat16) -> Finding:
    """The device, the CPU in the same format, and the CPU in fp32."""
    exact = work(machine.side(reference=True), torch.float32)
    same = work(machine.side(reference=True), dtype)
    return judge(distances(work(machine.side(reference=False), dtype), same, exact))


def seeded(seed: int, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Draws normal tensors that are equal on every device and, but for what bf16 holds, in every format."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        x = (scale * torch.randn(shape, generator=generator)).bfloat16().to(dtype).to(device)
        return x.requires_grad_(grad)

    return draw


def with_gradients(
    outputs: dict[str, Tensor], inputs: dict[str, Tensor], draw: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """The outputs, and the gradients of the inputs from random gradients of the outputs."""
    grads = [draw(*y.shape, grad=False).to(y.dtype) for y in outputs.values()]
    found = torch.autograd.grad(list(outputs.values()), list(inputs.values()), grads)
    return outputs | {f"d {name}": grad for name, grad in zip(inputs, found, strict=True)}
