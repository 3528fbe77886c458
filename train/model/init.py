"""Initial weights: every weight normal(0, init_std), every gain 1 (paper 4.2).

A value depends on the seed, the global name of its parameter and, for expert weights, the global index of the expert,
and on nothing else: any layout of chunks, ranks and devices starts from the same model. Numbers are drawn on the CPU.
"""

import hashlib

import torch
from torch import Tensor, nn

from train.model.deepseek import DeepSeekV3
from train.model.layers import RMSNorm
from train.model.moe import Experts


def initialise(chunk: DeepSeekV3, seed: int, device: torch.device | str | None = None) -> None:
    """Give memory to parts on the meta device (on `device`) and draw all weights; counters and biases become 0."""
    materialise(chunk, device)
    generator = torch.Generator()
    with torch.no_grad():
        for prefix, module in chunk.named_modules():
            for name, weight in module.named_parameters(recurse=False):
                full_name = f"{prefix}.{name}"
                if isinstance(module, RMSNorm):
                    weight.fill_(1)
                elif isinstance(module, Experts):
                    for index, expert in zip(module.local, weight, strict=True):
                        _draw(expert, generator, f"{seed}/{full_name}/{index}", chunk.config.init_std)
                else:
                    _draw(weight, generator, f"{seed}/{full_name}", chunk.config.init_std)
            for buffer in module.buffers(recurse=False):
                buffer.zero_()


def materialise(chunk: nn.Module, device: torch.device | str | None = None) -> None:
    """Replace parameters and buffers on the meta device by memory on `device`: weights arbitrary, buffers 0."""
    for module in chunk.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.is_meta:
                setattr(module, name, nn.Parameter(torch.empty_like(weight, device=device or "cpu")))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.zeros_like(buffer, device=device or "cpu"))


def _draw(weight: Tensor, generator: torch.Generator, key: str, std: float) -> None:
    generator.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True))
    weight.copy_(torch.empty(weight.shape, dtype=torch.float32).normal_(0, std, generator=generator))
