"""Judges single parts of the ranks in precisions with rounding. Each output is compared with the result for the part's
actual input.

The recorded inputs and output gradients of a rank (train/prove/parts.py) go through the formulas of
train/prove/low_precision.py and high_precision.py. These formulas round wherever the recipe rounds. Correct results
differ from them only by the order of a sum and by one rounding. So a bound is a few millionths of the sum of
magnitudes. For outputs of a complete FP8 model, it would be three quarters. Only the part of a difference beyond half a
step of the result's format counts, relative to the sum of the magnitudes of the terms. The gradient of a weight is the
sum over all micro-batches and the mean over all ranks, as in the update.

If rounding ties may change a number by more than INCONCLUSIVE of that sum, the number is inconclusive. If more than a
fraction MOST_INCONCLUSIVE of a tensor is inconclusive, the comparison fails, because it would prove nothing.

PART_JUDGES assigns a judge to each part: judge_matmuls.py, judge_attention.py, judge_layers.py.
"""

import re
from collections.abc import Callable, Iterable

from train.prove import judge_attention, judge_layers, judge_matmuls, reference
from train.prove.reference_adapter import is_adapted
from train.prove.step_parts import StepParts

PartJudge = Callable[[StepParts, str], None]
"""A function that judges the forward or the backward of all calls of a part."""
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
"""A pattern for the name of a weight without its ending, then the judges of forward and backward. The match is the name
of the judged part."""
WITHIN = ("", ".w13", ".0", ".out", ".ffn_norm")
"""Name endings of the recorded layers inside an FFN, the head, attention and a block."""


def judge_parts(step: StepParts) -> None:
    """Judge forward from the first part to the last, then backward from the last part to the first. Judge neither if
    evidence is missing."""
    at, parts = step.at, list(_parts_of(reference.weight_shapes(step.config.model)))
    if step.config.optim.index_warmup:  # the other parts run without gradients, and are judged in the sparse stage
        parts = [part for part in parts if ".indexer." in part[0]]
    elif step.config.model.sparse.heads and step.config.seq_len > step.config.model.sparse.top_k:
        # Attention over chosen keys reads the weight itself, and computes no keys.
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
    """Yields the names of parts with their judges, in the order of a forward pass. weights: names of weights in this
    order."""
    for weight in weights:
        for pattern, forward, backward in PART_JUDGES:
            if match := re.fullmatch(pattern, weight.removesuffix(".weight")):
                yield match[1], forward, backward


def _judge_returns(step: StepParts, name: str) -> None:
    """Check that the part receives a gradient from every micro-batch."""
    if is_adapted(step.config) and name.endswith("embedding_norm"):
        return  # no layer before it is trained
    if ".indexer." in name and (is_adapted(step.config) or step.at.config.data.chats):
        return  # no gradient, or only from micro-batches with learnt tokens
    for rank in step.ranks:
        those = [call for call in step.calls.get(name, []) if call.rank is rank]
        if not those or name == "embedding" or (rank.info.cp > 1 and name.endswith(".kv_up")):
            continue  # on another rank; a table shared with MTP modules; keys computed block by block
        back, due = sum(call.has("dx" if name.endswith(".router") else "dy") for call in those), rank.micro_batches()
        if back != due:
            step.at.fail("parts", name, "a micro-batch has no backward pass, or two", back, due, rank)
