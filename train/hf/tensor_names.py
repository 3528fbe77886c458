"""Maps every tensor of a Hugging Face folder to its place in our model. The map depends only on the configuration.

The two layouts differ in names and in stacking, not in values. RoPE rotates adjacent elements in both. Sluice stacks
the gate and the up projection in one tensor, and also the matrices of all experts. So each Hugging Face tensor is one
interval of one of our flattened tensors. In a folder, MTP module k is the layer with index `layers` + k. It has copies
of the embedding and the head.

Our names are `master.PARAMETER` for weights, and `bias.BLOCK` for balance biases, as in a checkpoint.

D width, F inner width, E experts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from conf.schema import Model, ModelFamily
from train.hf.families import FAMILIES

SCALE = "_scale_inv"
"""Suffix of the name of an FP8 weight's scales."""
MTP_NAMES = (
    "embed_tokens.weight",
    "enorm.weight",
    "hnorm.weight",
    "eh_proj.weight",
    "shared_head.norm.weight",
    "shared_head.head.weight",
)
"""Names of tensors that only MTP modules have, without the layer's prefix."""


@dataclass(frozen=True)
class PlacedTensor:
    """A Hugging Face tensor (theirs), and its interval in a Sluice tensor (ours)."""

    theirs: str
    shape: tuple[int, ...]
    ours: str
    start: int = 0
    """Index of the tensor's first element in Sluice's flattened tensor."""
    whole: tuple[int, ...] = ()
    """Shape of Sluice's tensor."""
    fp8: bool = False
    """Whether DeepSeek's FP8 release stores this matrix in FP8 blocks."""
    copy: bool = False
    """Whether this is an MTP module's copy of embedding or head."""

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def tensors(model: Model, family: ModelFamily = ModelFamily.deepseek_v3) -> Iterator[PlacedTensor]:
    """Yield every tensor of a folder, layer by layer, without FP8 scales."""
    facts = FAMILIES[family]
    for each in _as_deepseek(model):
        if facts.has_biases or not each.ours.startswith("bias."):
            yield replace(each, theirs=facts.name_of(each.theirs))


def _as_deepseek(model: Model) -> Iterator[PlacedTensor]:
    """Yield every tensor of the model under its name in DeepSeek-V3."""
    table = model.vocab_size, model.hidden
    yield _same("model.embed_tokens.weight", "master.embedding.weight", table)
    for index in range(model.layers):
        yield from _block(
            model,
            f"model.layers.{index}.",
            f"layers.{index}",
            "",
            dense=index < model.dense_layers,
            chooses=model.sparse.chooses(index),
        )
    for depth in range(model.mtp_depth):
        yield from _mtp(model, f"model.layers.{model.layers + depth}.", f"mtp.{depth}")
    yield _same("model.norm.weight", "master.norm.weight", (model.hidden,))
    yield _same("lm_head.weight", "master.head.weight", table)


def _same(theirs: str, ours: str, shape: tuple[int, ...], fp8: bool = False) -> PlacedTensor:
    """Return the entry for a tensor of the folder that has the same elements as one complete Sluice tensor."""
    return PlacedTensor(theirs, shape, ours, 0, shape, fp8)


def _block(model: Model, theirs: str, ours: str, inner: str, dense: bool, chooses: bool) -> Iterator[PlacedTensor]:
    """Yield the tensors of one transformer block.

    theirs: prefix of the Hugging Face names. ours: the block's name. inner: follows `ours` in the names of parameters.
    chooses: whether the block has an indexer.
    """
    here = f"master.{ours}.{inner}"
    yield _same(f"{theirs}input_layernorm.weight", f"{here}attention_norm.weight", (model.hidden,))
    yield from _attention(model, f"{theirs}self_attn.", f"{here}attention.")
    if chooses:
        yield from _indexer(model, f"{theirs}self_attn.indexer.", f"{here}attention.indexer.")
    yield _same(f"{theirs}post_attention_layernorm.weight", f"{here}ffn_norm.weight", (model.hidden,))
    if dense:
        yield from _ffn(model.hidden, model.dense_width, f"{theirs}mlp.", f"{here}ffn.")
        return
    yield _same(f"{theirs}mlp.gate.weight", f"{here}moe.router.weight", (model.experts, model.hidden))
    yield _same(f"{theirs}mlp.gate.e_score_correction_bias", f"bias.{ours}", (model.experts,))
    for index in range(model.experts):
        expert, stacked = f"{theirs}mlp.experts.{index}.", f"{here}moe.experts."
        yield from _ffn(model.hidden, model.expert_width, expert, stacked, index, model.experts)
    if model.shared_experts:
        width = model.shared_experts * model.expert_width
        yield from _ffn(model.hidden, width, f"{theirs}mlp.shared_experts.", f"{here}moe.shared.")


def _attention(model: Model, theirs: str, ours: str) -> Iterator[PlacedTensor]:
    width, heads = model.hidden, model.heads
    queries = heads * (model.nope_head_dim + model.rope_head_dim)
    if model.q_rank is None:
        parts = [("q_proj", "q", (queries, width))]
    else:
        parts = [
            ("q_a_proj", "q_down", (model.q_rank, width)),
            ("q_a_layernorm", "q_norm", (model.q_rank,)),
            ("q_b_proj", "q_up", (queries, model.q_rank)),
        ]
    parts += [
        ("kv_a_proj_with_mqa", "kv_down", (model.kv_rank + model.rope_head_dim, width)),
        ("kv_a_layernorm", "kv_norm", (model.kv_rank,)),
        ("kv_b_proj", "kv_up", (heads * (model.nope_head_dim + model.v_head_dim), model.kv_rank)),
        ("o_proj", "out", (width, heads * model.v_head_dim)),
    ]
    for name, own, shape in parts:
        yield _same(f"{theirs}{name}.weight", f"{ours}{own}.weight", shape, fp8=len(shape) == 2)


def _indexer(model: Model, theirs: str, ours: str) -> Iterator[PlacedTensor]:
    """Yield the tensors of an indexer. `weights_proj` is never FP8."""
    heads, width = model.sparse.heads, model.sparse.head_dim
    yield _same(f"{theirs}wq_b.weight", f"{ours}q.weight", (heads * width, model.q_rank or 0), fp8=True)
    yield _same(f"{theirs}wk.weight", f"{ours}k.weight", (width, model.hidden), fp8=True)
    for part in ("weight", "bias"):
        yield _same(f"{theirs}k_norm.{part}", f"{ours}k_norm.{part}", (width,))
    yield _same(f"{theirs}weights_proj.weight", f"{ours}weight", (heads, model.hidden))


def _ffn(
    width: int, inner: int, theirs: str, ours: str, index: int = 0, experts: int | None = None
) -> Iterator[PlacedTensor]:
    """Yield the tensors of a dense or shared FFN, or of the expert `index`.

    Shapes: w13 (2F, D), w2 (D, F); with experts, w13 (E, 2F, D), w2 (E, D, F). In w13, the gate projection comes first.
    """
    stack, end = ((), ".weight") if experts is None else ((experts,), "")
    for number, name in enumerate(("gate_proj", "up_proj")):
        start, whole = (2 * index + number) * inner * width, (*stack, 2 * inner, width)
        yield PlacedTensor(f"{theirs}{name}.weight", (inner, width), f"{ours}w13{end}", start, whole, fp8=True)
    start, whole = index * inner * width, (*stack, width, inner)
    yield PlacedTensor(f"{theirs}down_proj.weight", (width, inner), f"{ours}w2{end}", start, whole, fp8=True)


def _mtp(model: Model, theirs: str, ours: str) -> Iterator[PlacedTensor]:
    width, table = model.hidden, (model.vocab_size, model.hidden)
    yield replace(_same(f"{theirs}embed_tokens.weight", "master.embedding.weight", table), copy=True)
    yield _same(f"{theirs}enorm.weight", f"master.{ours}.embedding_norm.weight", (width,))
    yield _same(f"{theirs}hnorm.weight", f"master.{ours}.hidden_norm.weight", (width,))
    yield _same(f"{theirs}eh_proj.weight", f"master.{ours}.projection.weight", (width, 2 * width))
    yield from _block(model, theirs, ours, "block.", dense=False, chooses=model.sparse.chooses(None))
    yield _same(f"{theirs}shared_head.norm.weight", f"master.{ours}.norm.weight", (width,))
    yield replace(_same(f"{theirs}shared_head.head.weight", "master.head.weight", table), copy=True)
