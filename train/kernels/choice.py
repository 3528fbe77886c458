"""Which kernels compute the model (train/kernels/plain/plain_kernels.py): compiled code or torch's operations on a CPU, fused ones on a GPU."""

import torch

from conf.schema import Config
from train.kernels.attention_choice import choose_attention
from train.kernels.cpu import libraries as native
from train.kernels.cpu.compiled_kernels import CompiledKernels
from train.kernels.gpu.fused_kernels import FusedKernels
from train.kernels.plain.plain_kernels import PlainKernels
from train.kernels.precision import activation_dtype
from train.model.attention import AttentionCore
from train.model.operations import Kernels


def build_kernels(
    kind: str, compiled: bool = True, core: AttentionCore | None = None, measured: bool = True
) -> Kernels:
    """kind: of the device, cpu or cuda. compiled: whether a CPU that can runs compiled code. core: of attention on a GPU.
    measured: see `train.kernels.cpu.libraries.products_pay`.
    """
    if kind == "cuda":
        return FusedKernels(core)
    return (
        CompiledKernels(native.products_pay(measured)) if compiled and native.why_absent() is None else PlainKernels()
    )


def choose_kernels(config: Config, device: torch.device) -> tuple[Kernels, list[str]]:
    """The kernels of a run, and notes on what is slower than it could be.

    Raises UserError where no attention of a GPU gives the right values.
    """
    if device.type == "cuda":
        core, notes = choose_attention(config, device)
        return build_kernels("cuda", core=core), notes
    compiled, notes = config.cluster.compiled, []
    if compiled and activation_dtype(config.precision) == torch.bfloat16 and (why := native.why_absent()):
        notes.append(f"the model trains in torch's operations, slower than compiled code: {why}")
    return build_kernels("cpu", compiled, measured=not config.cluster.deterministic), notes
