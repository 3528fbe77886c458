"""Judges single parts of the ranks in precisions with rounding: each output is compared with the result for the actual
input.

A rank's own inputs and output gradients (train/prove/parts.py) go through train/prove/low_precision.py and
high_precision.py, which round where the recipe rounds. The remaining differences are the order of a sum and one
rounding. So a bound is a few millionths of a sum's magnitudes, instead of the three quarters for outputs of a whole FP8
model. A difference is measured beyond half a step of the result's format, relative to the sum of the magnitudes of the
terms. The gradient of a weight is the sum over all micro-batches and the mean over all ranks, as the update takes it.

Numbers that rounding ties may change by more than INCONCLUSIVE of that sum are inconclusive. More than a fraction MOST_INCONCLUSIVE of
them in a tensor fails, because the comparison would prove nothing.

PART_JUDGES assigns a judge to each part: judge_matmuls.py, judge_attention.py, judge_layers.py.
"""

import re
from collections.abc import Callable, Iterable

from train.prove import judge_attention, judge_layers, judge_matmuls, reference
from train.prove.reference_adapter import is_adapted
from train.prove.step_parts import StepParts

PartJudge = Callable[[StepParts, str], None]
"""Judges the forward or the backward of all calls of a part."""
PART_JUDGES: tuple[tuple[str, PartJudge, PartJudge], ...] = (
    (r"(embedding)", judge_layers.judge_embedding, judge_layers.judge_embedding_back),
    (r"(head)", judge_layers.judge_head, judge_layers.judge_head_back),
    (r"((?!.*\.indexer\.).*norm)", judge_layers.judge_norm, judge_layers.judge_norm_back),
    (r"(.*)\.ffn_norm", judge_layers.judge_sums, judge_layers.judge_sums_back),
    (r"(.*\.router)", judge_layers.judge_router, judge_layers.judge_router_back),
    (r"(.*)\.experts\.w13", judge_matmuls.judge_experts, judge_matmuls.judge_experts_back),
    (
        r"(?!.*norm|.*\.router|.*\.experts\.|.*\.indexer$)(.+\..+)",
        judge_matmuls.judge_linear,
        judge_matmuls.judge_linear_back,
    ),
    (r"(.*\.(?:ffn|shared))\.w13", judge_matmuls.judge_swiglu, judge_matmuls.judge_swiglu_back),
    (r"(.*)\.kv_up", judge_attention.judge_attention, judge_attention.judge_attention_back),
)
"""Patterns for the name of a weight, without its ending: the name of the part that begins there, and the judges of its
forward and backward."""
WITHIN = ("", ".w13", ".0", ".out", ".ffn_norm")
"""Name endings of the watched layers of a part, for an FFN, the head, attention and a block."""


def judge_parts(step: StepParts) -> None:
    """Judge forward from the first part to the last, backward from the last to the first; neither if evidence is
    missing."""
    at, parts = step.at, list(_parts_of(reference.weight_shapes(step.config.model)))
    if step.config.optim.index_warmup:  # the others run without gradients, and as in the sparse stage
        parts = [part for part in parts if ".indexer." in part[0]]
    elif step.config.model.sparse.heads and step.config.seq_len > step.config.model.sparse.top_k:
        # attention over chosen keys takes the weight itself, and computes no keys
        parts = [part for part in parts if not part[0].endswith((".attention", ".kv_up"))]
    failed = len(at.findings.differences)
    at.phase = "forward"
    for name, *_ in parts:
        if not any(step.calls.get(f"{name}{part}") for part in WITHIN):
            at.fail("parts", name, "no rank recorded its inputs and outputs")
    at.phase = "backward"
    for name, *_ in reversed(parts):
        _judge_returns(step, name)
    if len(at.findings.differences) > failed:
        return
    at.phase = "forward"
    for name, forward, _ in parts:
        forward(step, name)
    at.phase = "backward"
    for name, _, backward in reversed(parts):
        backward(step, name)


def _parts_of(weights: Iterable[str]) -> Iterable[tuple[str, PartJudge, PartJudge]]:
    """Parts by name with their judges, in the order of a forward pass. weights: in that order."""
    for weight in weights:
        for pattern, forward, backward in PART_JUDGES:
            if match := re.fullmatch(pattern, weight.removesuffix(".weight")):
                yield match[1], forward, backward


def _judge_returns(step: StepParts, name: str) -> None:
    """Check that every micro-batch gives the part a gradient."""
    if is_adapted(step.config) and name.endswith("embedding_norm"):
        return  # no layer before it learns
    if ".indexer." in name and (is_adapted(step.config) or step.at.config.data.chats):
        return  # it learns nothing, or only where targets are learnt
    for rank in step.ranks:
        those = [call for call in step.calls.get(name, []) if call.rank is rank]
        if not those or name == "embedding" or (rank.info.cp > 1 and name.endswith(".kv_up")):
            continue  # on another rank; a table shared with MTP modules; keys computed block by block
        back, due = sum(call.has("dx" if name.endswith(".router") else "dy") for call in those), rank.micro_batches()
        if back != due:
            step.at.fail("parts", name, "a micro-batch has no backward pass, or two", back, due, rank)
