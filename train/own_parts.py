"""Tests a recipe's user code before anything is started or written."""

from dataclasses import replace

import torch
from torch import nn

from conf.errors import UserError
from conf.own_code import TARGET, refused
from conf.schema import Config, Model
from train.kernels.plain.high import HighPrecision
from train.kernels.plain.plain_kernels import PlainKernels
from train.loop.hooks.callbacks import make_callbacks
from train.model.deepseek import DeepSeekV3
from train.parallelize import make_loss


def check_own_code(config: Config) -> None:
    """Raise UserError for missing or unsuitable user code, except data code."""
    for name in ("block", "router"):
        if section := getattr(config.model, name):
            with refused(f"model.{name}", section[TARGET], "making it"):
                extra = _buffers(config.model) - _buffers(replace(config.model, block=None, router=None))
            if extra:
                rule = f"has buffers of its own, which no checkpoint keeps: {', '.join(sorted(extra))}"
                cure = "make them parameters, register them with persistent=False, or compute them again"
                raise UserError(f"model.{name}.{TARGET}", section[TARGET], rule, cure)
    if config.optim.extra_loss:
        make_loss(config.optim.extra_loss)
    make_callbacks(config)


def _buffers(model: Model) -> set[str]:
    """Returns the names of the buffers in a checkpoint of this model."""
    last = min(model.dense_layers, model.layers - 1)
    layers = range(max(0, last - 1), last + 1)
    kernels = HighPrecision(torch.float32, PlainKernels())
    parts: nn.Module = DeepSeekV3(
        model, kernels, seq_len=1, layers=layers, has_embedding=False, has_head=False, device="meta"
    )
    return {name for name in parts.state_dict() if name not in dict(parts.named_parameters())}
