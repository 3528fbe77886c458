"""What the checks run on: a CUDA device, or in a dry check the CPU."""

import os
from dataclasses import dataclass

import torch

from bench.gpu.line import NotTried
from train.native import model as native

PATIENCE = 4.0


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

    def side(self, reference: bool) -> torch.device:
        """The device to compute one side of a comparison on: the reference is always the CPU.

        Without a GPU both sides are the CPU, and what differs is whether it runs compiled code.
        """
        native.choose(reference or self.on_gpu)
        return torch.device("cpu") if reference else self.device
