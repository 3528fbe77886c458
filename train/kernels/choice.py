"""Chooses the kernels of the model: compiled code or torch operations on a CPU, fused kernels on a GPU (interface:
`Kernels`).

It also chooses the GPU's attention cores, for whole sequences and for documents: the first core that works in forward
and backward, with correct values.

torch selects an attention kernel by the sizes alone. DeepSeek-V3's heads have 192 elements in queries and keys and 128
in values, which few kernels support. cuDNN's, the fastest, fails in some library versions only when it is called. So
every core is tested once at the start, with this run's heads and length. The scores are near -120, which reveals a
running maximum that starts at 0, or a mask that only subtracts. Results and gradients of the first and the last head
are compared with train/model/attention.py in fp32 on the same device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import Config
from train.kernels.cpu import libraries as native
from train.kernels.cpu.compiled_kernels import CompiledKernels
from train.kernels.gpu.fused_attention import AttentionByKind, CudnnAttention, EfficientAttention, FlashAttention
from train.kernels.gpu.fused_kernels import FusedKernels
from train.kernels.plain.plain_attention import PlainAttention
from train.kernels.plain.plain_kernels import PlainKernels
from train.kernels.precision import activation_dtype
from train.model.attention import AttentionCore, AttentionInput, AttentionOutput
from train.model.operations import Kernels
from train.model.sequence import Positions, Rectangle, SeenKeys

ATTENTION_BOUND = 2e-2
"""Largest allowed relative error, in the norm, of a result and of each gradient. Rounding the result and the
probabilities to bf16 gives about 3e-3; a wrong mask, scale or head gives at least 0.1."""
TRIED_SCORE = -120.0
"""Approximate value of all scores in the test. The softmax does not depend on it."""
LARGE = 32.0
"""A large component of every query; its product with a component of every key gives TRIED_SCORE."""
ATTENTION_RESULTS = "its result", "its log-sum-exp", "dq", "dk", "dv"

ATTENTION_PARTS = "whole sequences", "documents", "blocks of keys"
"""Parts of attention that a run may need; the last only if ranks share sequences."""

CORES: dict[str, AttentionCore] = {
    "cuDNN's attention": CudnnAttention(),
    "torch's flash attention": FlashAttention(),
    "torch's memory-efficient attention": EfficientAttention(),
    "attention in torch's operations, which is slow,": PlainAttention(),
}
"""In the order of torch's own preference on Hopper."""


def choose_attention(config: Config, device: torch.device) -> tuple[AttentionCore, list[str]]:
    """The attention core of a run on this GPU, and notes on cores that fail.

    Raises UserError if no core gives correct values.
    """
    parts = ATTENTION_PARTS if config.parallel.cp > 1 else ATTENTION_PARTS[:2]
    whole, notes = _first_right(config, device, [part for part in parts if part != "documents"], CORES)
    if not (config.data.mask_documents or config.data.chats):
        return whole, notes
    cores = {name: core for name, core in CORES.items() if core.takes_documents}
    documents, more = _first_right(config, device, parts, cores)
    notes += [note for note in more if documents is not whole]
    if not (isinstance(whole, EfficientAttention) and isinstance(documents, EfficientAttention)):
        return documents, more
    return documents if documents is whole else AttentionByKind(whole, documents), notes


def _first_right(
    config: Config, device: torch.device, parts: Sequence[str], cores: dict[str, AttentionCore]
) -> tuple[AttentionCore, list[str]]:
    """The first core that is correct for all of these parts, and a note on the cores before it."""
    failed: list[str] = []
    for name, core in cores.items():
        problem = next(filter(None, (_refusal(core, config, device, part) for part in parts)), None)
        if problem is None:
            what = " for documents" if "documents" in parts else ""
            return core, [f"this run takes {name}{what} as {'; '.join(failed)}"] if failed else []
        failed.append(f"{name} {problem}")
    raise UserError(
        "cluster.device",
        config.cluster.device,
        f"no attention of torch {torch.__version__} gives correct values on {torch.cuda.get_device_name(device)}: {'; '.join(failed)}",
        "install another torch or driver, or use cluster.device=cpu",
    )


def _refusal(core: AttentionCore, config: Config, device: torch.device, part: str) -> str | None:
    """The reason why a run cannot use this core; None if it can."""
    if isinstance(core, CudnnAttention) and config.cluster.deterministic:
        return "may give other bits in each run, which cluster.deterministic=true excludes"
    return problem_of(core, config, device, part)


def _tried(part: str, length: int) -> tuple[int, SeenKeys]:
    """Number of queries of a sequence, and the keys that they see, of `length` keys."""
    if part == "blocks of keys":  # a rank that shares sequences: its own piece, and a later piece that sees all of it
        rectangles = [Rectangle(None, 0, length, 0, length, 0), Rectangle(None, length, 2 * length, 0, length, length)]
        return 2 * length, SeenKeys(rectangles)
    documents_BT = None
    if part == "documents":  # of unequal lengths, one of them a single position
        ends = torch.tensor([1, length // 3, length // 2])
        documents_BT = (torch.arange(length) >= ends[:, None]).sum(0)[None].int()
    return length, Positions(length, documents_BT).seen[0]


def problem_of(core: AttentionCore, config: Config, device: torch.device, part: str) -> str | None:
    """A description of a core's error at this run's heads and length; None if it is correct. part: of
    ATTENTION_PARTS."""
    length = config.seq_len // config.parallel.cp
    if part == "blocks of keys":
        length = max(1, length // 2)  # ranks that share sequences hold two pieces each
    lengths = (length, length - 1) if config.model.mtp_depth else (length,)  # an MTP module has one position fewer
    return next(filter(None, (_problem_at(one, core, config, device, part) for one in lengths)), None)


def _problem_at(length: int, core: AttentionCore, config: Config, device: torch.device, part: str) -> str | None:
    dtype, model = activation_dtype(config.precision), config.model
    width, values = model.nope_head_dim + model.rope_head_dim, model.v_head_dim
    scale, keys = width**-0.5, model.nope_head_dim + values
    queries, seen = _tried(part, length)
    generator = torch.Generator(device).manual_seed(0)
    # In the model's layout: positions before heads, values after keys in a row.
    shapes = (queries, width), (length, width), (length, keys), (queries, values)
    numbers = [
        torch.randn(1, rows, model.heads, columns, generator=generator, device=device).to(dtype)
        for rows, columns in shapes
    ]
    numbers[0][..., 0], numbers[1][..., 0] = LARGE, round(TRIED_SCORE / (scale * LARGE))
    compared = sorted({0, model.heads - 1})
    expected = _both_ways(PlainAttention(), [tensor[:, :, compared].float() for tensor in numbers], scale, seen)
    try:
        ours = _both_ways(core, numbers, scale, seen)
    except RuntimeError as error:
        return f"fails for {part} ({str(error).strip().splitlines()[0][:200]})"
    for name, one, other in zip(ATTENTION_RESULTS, ours, expected, strict=True):
        error = ((one[:, compared].float() - other).norm() / (other - other.mean()).norm()).item()
        if not error < ATTENTION_BOUND:  # NaN is an error too
            return f"is wrong for {part} ({name} is off by {error:.2g} of its norm, and {ATTENTION_BOUND} is allowed)"
    return None


def _both_ways(core: AttentionCore, numbers: list[Tensor], scale: float, seen: SeenKeys) -> list[Tensor]:
    """Result, log-sum-exp, dq, dk and dv of one core."""
    q, k, kv, dout = (tensor.transpose(1, 2) for tensor in numbers)
    v = kv[..., -dout.size(-1) :]
    given = AttentionInput(q, k, v, scale, seen)
    made = core.forward(given, keep=True)
    met = made
    if q.size(2) > k.size(2):  # as if other blocks of keys had come before
        met = AttentionOutput(made.out_BHTV, made.lse_BHT + 1.0)
    dq, dk, dv = core.backward(dout, given, met)
    return [
        made.out_BHTV,
        made.lse_BHT,
        dq[..., 1:],
        dk,
        dv,
    ]  # the first column of dq is zero up to rounding, times a large number


def build_kernels(
    kind: str, compiled: bool = True, core: AttentionCore | None = None, matmuls: bool | None = None
) -> Kernels:
    """The kernels for a kind of device.

    kind: cpu or cuda. compiled: whether a CPU uses compiled code if it can. core: attention core of a GPU. matmuls:
    whether a CPU also uses compiled matmuls; None selects the faster choice
    (`train.kernels.cpu.libraries.compiled_matmuls_pay`).
    """
    if kind == "cuda":
        return FusedKernels(core)
    if not compiled or native.why_absent() is not None:
        return PlainKernels()
    return CompiledKernels(native.compiled_matmuls_pay() if matmuls is None else matmuls)


def choose_matmuls(config: Config, device: torch.device, kept: bool | None) -> bool | None:
    """Whether a run on this CPU uses compiled matmuls; None if there is no choice.

    kept: the choice at the start of the run, so a busy machine cannot change the arithmetic at a resume.
    """
    if kept is not None or device.type == "cuda" or not config.cluster.compiled or native.why_absent() is not None:
        return kept
    return native.compiled_matmuls_pay(measured=not config.cluster.deterministic)


def choose_kernels(config: Config, device: torch.device, matmuls: bool | None = None) -> tuple[Kernels, list[str]]:
    """The kernels of a run, and notes on slow choices. matmuls: see `choose_matmuls`; None to choose here.

    Raises UserError if no attention core of a GPU gives correct values.
    """
    if device.type == "cuda":
        core, notes = choose_attention(config, device)
        return build_kernels("cuda", core=core), notes
    compiled, notes = config.cluster.compiled, []
    if compiled and activation_dtype(config.precision) == torch.bfloat16 and (why := native.why_absent()):
        notes.append(f"the model trains in torch's operations, slower than compiled code: {why}")
    return build_kernels("cpu", compiled, matmuls=choose_matmuls(config, device, matmuls)), notes
