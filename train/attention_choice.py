"""Which of torch's attention kernels a GPU runs: the first that works there forward and backward, with the right values.

torch picks a kernel by what it knows of the sizes. DeepSeek-V3's heads, 192 wide in queries and keys and 128 in values, leave
few of them, and the fastest, cuDNN's, fails on some versions of its library only when it is called. So each is tried once at the
start, on a small input whose result and gradients are held against train/model/attention.py on the CPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.errors import UserError
from conf.schema import Config
from train.model.attention import Attention, BlockAttention, document_mask, document_spans
from train.model.kernels import Kernels
from train.model.sequence import Rectangle
from train.precision.build import activation_dtype

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""From q, k (B, H, T, Q), v (B, H, T, V), who sees whom (B, 1, T, T) or None for causal, and the scale: (B, H, T, V)."""

BOUND = 2e-2
"""Largest relative error, in the norm, of the result and of each gradient. Rounding the result and the probabilities to bf16
makes some 3e-3; a wrong mask, scale or head makes 0.1 and more."""
LENGTHS = 256, 255
"""Positions tried: the module of an MTP depth has one fewer than the model."""


def cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """cuDNN's kernel."""
    bias = None if mask is None else _bias(mask, q)
    keep = torch.is_grad_enabled()
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, bias, keep, 0.0, mask is None, scale=scale)[0]


def efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The memory-efficient kernel, which every GPU since 2016 runs."""
    bias = None if mask is None else _bias(mask, q)
    keep = torch.is_grad_enabled()
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, keep, 0.0, mask is None, scale=scale)[
        0
    ]


def own_choice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Whatever torch takes for these sizes."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)


KERNELS: dict[str, Kernel] = {
    "cuDNN's attention": cudnn,
    "torch's memory-efficient attention": efficient,
    "the attention that torch chooses": own_choice,
}
"""The fastest first."""


class FusedAttention:
    """`Kernels.attention` of a GPU, with the kernels that were found to work."""

    def __init__(self, causal: Kernel, masked: Kernel):
        self._causal, self._masked = causal, masked

    def __call__(
        self, q_BHTQ: Tensor, k_BHTQ: Tensor, v_BHTV: Tensor, scale: float, documents_BT: Tensor | None
    ) -> Tensor:
        if documents_BT is None:
            return self._causal(q_BHTQ, k_BHTQ, v_BHTV, None, scale)
        return self._masked(q_BHTQ, k_BHTQ, v_BHTV, document_mask(documents_BT), scale)


def choose_attention(config: Config, device: torch.device) -> tuple[Attention, list[str]]:
    """The attention of a run on this GPU, and notes on what does not work.

    Raises UserError where no kernel gives the right values.
    """
    causal, notes = _first_that_works(config, device, masked=False)
    if not config.data.mask_documents:
        return FusedAttention(causal, own_choice), notes
    masked, more = _first_that_works(config, device, masked=True)
    return FusedAttention(causal, masked), notes + more


def require_blocks(kernels: Kernels, config: Config, device: torch.device) -> None:
    """Raise UserError where this GPU does not compute right what ranks that share sequences ask of it: attention of a block of
    keys at a time, put together by log-sum-exps.
    """
    dtype, model, length = activation_dtype(config.precision), config.model, LENGTHS[0]
    width, generator = model.nope_head_dim + model.rope_head_dim, torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(2, 2, size, channels, generator=generator).to(dtype)
        for size, channels in (
            (2 * length, width),
            (length, width),
            (length, model.v_head_dim),
            (2 * length, model.v_head_dim),
        )
    )
    rectangles = [Rectangle(None, 0, length, 0, length, 0), Rectangle(None, length, 2 * length, 0, length, length)]

    def both(kernels: Kernels, there: torch.device | str) -> list[Tensor]:
        moved = [tensor.to(there) for tensor in (q, k, v, dout)]
        out, lse = kernels.attend(*moved[:3], width**-0.5, rectangles)
        lse = lse + 1.0  # as if other blocks had been met
        grads = kernels.attend_backward(moved[3], *moved[:3], out, lse, width**-0.5, rectangles)
        return [tensor.float().cpu() for tensor in (out, lse, *grads)]

    expected = both(Kernels(), "cpu")
    try:
        ours = both(kernels, device)
        errors = [((one - other).norm() / other.norm()).item() for one, other in zip(ours, expected, strict=True)]
        problem = None if max(errors) < BOUND else f"is off by {max(errors):.2g} of its norm, and {BOUND} is allowed"
    except RuntimeError as error:
        problem = f"fails ({str(error).strip().splitlines()[0][:200]})"
    if problem is not None:
        rule = f"torch's attention of blocks of keys {problem} on {torch.cuda.get_device_name(device)}"
        raise UserError("parallel.cp", config.parallel.cp, rule, "leave parallel.cp out, or install another torch")


def _first_that_works(config: Config, device: torch.device, masked: bool) -> tuple[Kernel, list[str]]:
    """The kernel, and a note if it is not the first."""
    what, failed = "inside documents" if masked else "over whole sequences", []
    for name, kernel in KERNELS.items():
        problem = problem_of(kernel, config, device, masked)
        if problem is None:
            notes = [f"attention {what} is {name}: {'; '.join(failed)}"] if failed else []
            return kernel, notes
        failed.append(f"{name} {problem}")
    raise UserError(
        "cluster.device",
        config.cluster.device,
        f"no kernel of torch {torch.__version__} computes attention {what} right on {torch.cuda.get_device_name(device)}: "
        + "; ".join(failed),
        "install another torch or driver"
        + (", set data.mask_documents=false" if masked else "")
        + ", or use cluster.device=cpu",
    )


def problem_of(kernel: Kernel, config: Config, device: torch.device, masked: bool) -> str | None:
    """What is wrong with a kernel at the widths of this model's heads; None where nothing is."""
    return next(filter(None, (_problem_at(length, kernel, config, device, masked) for length in LENGTHS)), None)


def _problem_at(length: int, kernel: Kernel, config: Config, device: torch.device, masked: bool) -> str | None:
    dtype, model = activation_dtype(config.precision), config.model
    width, values = model.nope_head_dim + model.rope_head_dim, model.v_head_dim
    scale, generator = width**-0.5, torch.Generator().manual_seed(0)
    shapes = [(2, 2, length, size) for size in (width, width, values, values)]
    numbers = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    documents_BT = None
    if masked:  # of unequal lengths, other ones in the second sequence
        ends = torch.tensor([[length // 3, length // 2], [1, length - 5]])
        documents_BT = (torch.arange(length) >= ends[:, :, None]).sum(1).int()
    spans = None if documents_BT is None else document_spans(documents_BT)
    exact = [tensor.float() for tensor in numbers]
    expected = _with_gradients(lambda q, k, v: BlockAttention.apply(q, k, v, scale, spans), *exact)
    try:
        mask = None if documents_BT is None else document_mask(documents_BT.to(device))
        there = [tensor.to(device) for tensor in numbers]
        ours = _with_gradients(lambda q, k, v: kernel(q, k, v, mask, scale), *there)
        ours = [tensor.float().cpu() for tensor in ours]
    except RuntimeError as error:
        return f"fails ({str(error).strip().splitlines()[0][:200]})"
    for name, one, other in zip(("its result", "dq", "dk", "dv"), ours, expected, strict=True):
        error = ((one - other).norm() / other.norm()).item()
        if not error < BOUND:  # not a number is wrong too
            return f"is wrong ({name} is off by {error:.2g} of its norm, and {BOUND} is allowed)"
    return None


def _with_gradients(run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """Result, dq, dk, dv."""
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = run(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def _bias(mask_B1TT: Tensor, q_BHTQ: Tensor) -> Tensor:
    """0 where a position is seen and -inf elsewhere, for all heads; its rows begin at multiples of 16 values in memory."""
    length = mask_B1TT.size(-1)
    wide = mask_B1TT.new_zeros(*mask_B1TT.shape[:-1], -(-length // 16) * 16, dtype=q_BHTQ.dtype)
    bias = wide[..., :length].masked_fill_(~mask_B1TT, -torch.inf)
    return bias.expand(-1, q_BHTQ.size(1), -1, -1)
