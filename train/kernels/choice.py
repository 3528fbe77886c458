"""Chooses the implementation of `Kernels` for a run, and tests the attention cores of a GPU.

cuDNN's attention kernel is the fastest, but fails in some library versions. So a run first tests each core with the
run's heads and length. It uses the first correct core; documents may need another core.

All scores in the test are near -120, which reveals errors such as a running maximum that starts at 0.
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
"""Largest allowed error of the output, the log-sum-exp and each gradient: |x - r| / |r - mean(r)|, where x is the
core's tensor and r the reference's. Rounding to bf16 causes about 3e-3. A wrong mask, scale or head causes at least
0.1.
"""
TRIED_SCORE = -120.0
"""Approximate value of all scores in the test."""
LARGE = 32.0
"""First component of every query in the test. LARGE times a key's first component times the scale is TRIED_SCORE."""
ATTENTION_RESULTS = "its result", "its log-sum-exp", "dq", "dk", "dv"

ATTENTION_PARTS = "whole sequences", "documents", "blocks of keys"
"""Kinds of attention that a run may need; "blocks of keys" if ranks share sequences."""

CORES: dict[str, AttentionCore] = {
    "cuDNN's attention": CudnnAttention(),
    "torch's flash attention": FlashAttention(),
    "torch's memory-efficient attention": EfficientAttention(),
    "attention in torch's operations, which is slow,": PlainAttention(),
}
"""Attention cores by name, in torch's order of preference on Hopper."""


def choose_attention(config: Config, device: torch.device) -> tuple[AttentionCore, list[str]]:
    """Returns the attention core for a run on this GPU, and notes on failed cores. Raises UserError if no core is
    correct.
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
    """Returns the first attention core that is correct for all `parts`, and a note on the cores that failed."""
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
    """Returns why a run cannot use this attention core, or None."""
    if isinstance(core, CudnnAttention) and config.cluster.deterministic:
        return "may give other bits in each run, which cluster.deterministic=true excludes"
    return problem_of(core, config, device, part)


def _tried(part: str, length: int) -> tuple[int, SeenKeys]:
    """Returns the number of queries of a test, and which of `length` keys they see."""
    if part == "blocks of keys":  # queries of the keys' own block, then of a later block
        rectangles = [Rectangle(None, 0, length, 0, length, 0), Rectangle(None, length, 2 * length, 0, length, length)]
        return 2 * length, SeenKeys(rectangles)
    documents_BT = None
    if part == "documents":  # documents of different lengths; one document has a single position
        ends = torch.tensor([1, length // 3, length // 2])
        documents_BT = (torch.arange(length) >= ends[:, None]).sum(0)[None].int()
    return length, Positions(length, documents_BT).seen[0]


def problem_of(core: AttentionCore, config: Config, device: torch.device, part: str) -> str | None:
    """Tests an attention core with this run's heads and length. Returns its error, or None.

    part: one of ATTENTION_PARTS.
    """
    length = config.seq_len // config.parallel.cp
    if part == "blocks of keys":
        length = max(1, length // 2)  # a rank that shares sequences has two pieces of each sequence
    lengths = (length, length - 1) if config.model.mtp_depth else (length,)  # an MTP module has one position fewer
    return next(filter(None, (_problem_at(one, core, config, device, part) for one in lengths)), None)


def _problem_at(length: int, core: AttentionCore, config: Config, device: torch.device, part: str) -> str | None:
    dtype, model = activation_dtype(config.precision), config.model
    width, values = model.nope_head_dim + model.rope_head_dim, model.v_head_dim
    scale, keys = width**-0.5, model.nope_head_dim + values
    queries, seen = _tried(part, length)
    generator = torch.Generator(device).manual_seed(0)
    # The model's memory layout: positions before heads, and keys before values in a row.
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
    """Runs a core. Returns output, log-sum-exp, dq, dk and dv."""
    q, k, kv, dout = (tensor.transpose(1, 2) for tensor in numbers)
    v = kv[..., -dout.size(-1) :]
    given = AttentionInput(q, k, v, scale, seen)
    made = core.forward(given, keep=True)
    met = made
    if q.size(2) > k.size(2):  # adds to the log-sum-exp, as earlier blocks of keys would
        met = AttentionOutput(made.out_BHTV, made.lse_BHT + 1.0)
    dq, dk, dv = core.backward(dout, given, met)
    return [
        made.out_BHTV,
        made.lse_BHT,
        dq[..., 1:],
        dk,
        dv,
    ]  # without dq's first column, which contains only rounding errors


def build_kernels(
    kind: str, compiled: bool = True, core: AttentionCore | None = None, matmuls: bool | None = None
) -> Kernels:
    """Builds the kernels for a kind of device.

    kind: cpu or cuda.
    compiled: whether a CPU may use compiled code.
    core: the attention core for a GPU.
    matmuls: whether a CPU also uses compiled matmuls; None: the faster ones.
    """
    if kind == "cuda":
        return FusedKernels(core)
    if not compiled or native.why_absent() is not None:
        return PlainKernels()
    return CompiledKernels(native.compiled_matmuls_pay() if matmuls is None else matmuls)


def choose_matmuls(config: Config, device: torch.device, kept: bool | None) -> bool | None:
    """Returns whether a run on this CPU uses compiled matmuls; None on a GPU or without compiled code.

    kept: the choice before a resume, or None. The function returns it unchanged, because a new measurement could change
        the arithmetic.
    """
    if kept is not None or device.type == "cuda" or not config.cluster.compiled or native.why_absent() is not None:
        return kept
    return native.compiled_matmuls_pay(measured=not config.cluster.deterministic)


def choose_kernels(config: Config, device: torch.device, matmuls: bool | None = None) -> tuple[Kernels, list[str]]:
    """Returns the kernels of a run, and notes on choices that make the run slower.

    Raises UserError if no attention core of a GPU is correct. matmuls: the result of `choose_matmuls`.
    """
    if device.type == "cuda":
        core, notes = choose_attention(config, device)
        return build_kernels("cuda", core=core), notes
    compiled, notes = config.cluster.compiled, []
    if compiled and activation_dtype(config.precision) == torch.bfloat16 and (why := native.why_absent()):
        notes.append(f"the model trains in torch's operations, slower than compiled code: {why}")
    return build_kernels("cpu", compiled, matmuls=choose_matmuls(config, device, matmuls)), notes
