"""The device of the checks: a CUDA device, or in a dry check the CPU."""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from bench.gpu.line import NotTried
from conf.errors import UserError
from conf.load import compose
from conf.schema import Config
from train.kernels.choice import build_kernels, choose_kernels
from train.kernels.plain.plain_kernels import PlainKernels
from train.model.operations import Kernels

PATIENCE = 4.0


class DeviceSide(NamedTuple):
    """One side of a comparison."""

    device: torch.device
    kernels: Kernels


def kernels_of(config: Config, device: torch.device) -> Kernels:
    """What a run takes. Where no attention is right, a line of the environment fails, and torch's own choice is measured."""
    try:
        return choose_kernels(config, device)[0]
    except UserError:
        return build_kernels(device.type)


@dataclass(frozen=True)
class Machine:
    """The device under examination. On a CPU torch's operations take its place, and compiled code is the reference."""

    device: torch.device

    @classmethod
    def here(cls, device: str) -> "Machine":
        """device: cuda or cpu. Call it before anything imports triton, which without a GPU interprets its kernels."""
        if device == "cuda":
            torch.cuda.set_device(0)
            return cls(torch.device("cuda", 0))
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(min(2, torch.get_num_threads()))
        return cls(torch.device("cpu"))

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def patience(self) -> float:
        """What times allowed are multiplied with: a dry check may share its cores with others."""
        return 1.0 if self.on_gpu else PATIENCE

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.on_gpu else "CPU"

    def need_gpu(self, what: str) -> None:
        """Raises NotTried on a CPU."""
        if not self.on_gpu:
            raise NotTried(f"{what} needs a CUDA device")

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def broken(self) -> bool:
        """Whether an earlier error left the CUDA context of this process unusable."""
        try:
            self.synchronize()
        except RuntimeError:
            return True
        return False

    def side(self, reference: bool) -> DeviceSide:
        """Where and how to compute one side of a comparison: the reference is always the CPU.

        Without a GPU both sides are the CPU, and what differs is whether it runs compiled code.
        """
        return (
            DeviceSide(torch.device("cpu"), build_kernels("cpu"))
            if reference
            else DeviceSide(self.device, self._kernels)
        )

    @cached_property
    def _kernels(self) -> Kernels:
        return (
            kernels_of(
                compose("conf=deepseek_v3", "mode=dry_run", "precision=bf16", "data.mask_documents=true"), self.device
            )
            if self.on_gpu
            else PlainKernels()
        )
