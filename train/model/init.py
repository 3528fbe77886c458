"""Draws initial weights: every weight from normal(0, init_std); every norm weight is 1 (paper 4.2).

A value depends only on the seed, the global name of its parameter and the global index of its expert. So every layout
starts from the same model. All CPUs draw the same numbers, and so do all GPUs of one kind.
"""

import hashlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from train.model.deepseek import DeepSeekV3
from train.model.indexer import LayerNorm
from train.model.layers import RMSNorm
from train.model.moe import Experts


def initialise(chunk: DeepSeekV3, seed: int | None, device: torch.device | str | None = None) -> None:
    """Move parameters and buffers from the meta device to `device`, and draw all weights. Buffers become 0.

    seed: None if a checkpoint will fill the weights. They are NaN until then.
    """
    materialise(chunk, device)
    for draw in first_draws(chunk, seed).values():
        draw()
    for buffer in chunk.buffers():
        buffer.zero_()


def first_draws(chunk: DeepSeekV3, seed: int | None) -> dict[nn.Parameter, Callable[[], None]]:
    """Return for each weight a function that draws it, after allocation if necessary.

    seed: see `initialise`.
    """
    return {
        weight: partial(_draw_weight, module, weight, f"{prefix}.{name}", seed, chunk.config.init_std)
        for prefix, module in chunk.named_modules()
        for name, weight in module.named_parameters(recurse=False)
    }


def materialise(chunk: nn.Module, device: torch.device | str | None = None, hollow: bool = False) -> None:
    """Allocate the meta parameters and buffers on `device`. Weights get arbitrary values; buffers become 0.

    hollow: whether each weight has its full shape, but memory for one element.
    """
    device = device or "cpu"
    for module in chunk.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.is_meta:
                data = (
                    weight.new_empty((), device=device).expand(weight.shape)
                    if hollow
                    else torch.empty_like(weight, device=device)
                )
                setattr(module, name, nn.Parameter(data, requires_grad=weight.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.zeros_like(buffer, device=device))


@torch.no_grad()
def _draw_weight(module: nn.Module, weight: nn.Parameter, name: str, seed: int | None, std: float) -> None:
    """Draw one weight of a module. name: its global name."""
    if weight.untyped_storage().nbytes() < weight.nbytes:
        weight.data = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if weight.dtype == torch.uint8:  # a frozen weight in block FP8, where the byte 255 means NaN
        weight.fill_(255)
    elif seed is None:
        weight.fill_(torch.nan)
    elif isinstance(module, RMSNorm | LayerNorm):
        weight.fill_(0 if name.endswith(".bias") else 1)
    else:
        draw_normal(weight, f"{seed}/{name}", std, module.local if isinstance(module, Experts) else None)


def draw_indexer(name: str, shape: tuple[int, ...], seed: int, std: float) -> Tensor:
    """Return an indexer weight's complete initial values, as drawn on a CPU. name: its global name."""
    values = torch.empty(shape)
    if ".k_norm." in name:
        return values.fill_(0 if name.endswith(".bias") else 1)
    draw_normal(values, f"{seed}/{name}", std)
    return values


def draw_uniform(weight: Tensor, key: str, bound: float, experts: range | None = None) -> None:
    """Fill a weight with uniform values in +-bound, which depend only on the text `key` and the expert.

    experts: indices of the experts along the first dimension, drawn separately; None: draw the weight as one tensor.
    """
    _fill_drawn(weight, key, experts, lambda exact, generator: exact.uniform_(-bound, bound, generator=generator))


def draw_normal(weight: Tensor, key: str, std: float, experts: range | None = None) -> None:
    """Fill a weight with normal values of mean 0. key, experts: see `draw_uniform`."""
    _fill_drawn(weight, key, experts, lambda exact, generator: exact.normal_(0, std, generator=generator))


def _fill_drawn(
    weight: Tensor, key: str, experts: range | None, draw: Callable[[Tensor, torch.Generator], Tensor]
) -> None:
    """Draw in fp32 and copy to the weight; with `experts`, one expert at a time."""
    for index, one in [(None, weight)] if experts is None else zip(experts, weight, strict=True):
        generator = _generator(weight, key if index is None else f"{key}/{index}")
        one.copy_(draw(torch.empty(one.shape, dtype=torch.float32, device=weight.device), generator))


def _generator(weight: Tensor, key: str) -> torch.Generator:
    return torch.Generator(weight.device).manual_seed(key_number(key))


def key_number(key: str) -> int:
    """Return the start of the text's SHA-256 as a signed 64-bit integer."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
