"""Judges single parts of the model, such as a linear layer or a norm, in precisions with rounding.

The reference computes each part from the recorded input, and rounds wherever the recipe rounds. A correct result
differs only by summation order and by one rounding. The comparison subtracts this rounding, and divides the rest by the
sum of the terms' magnitudes.
"""

import re
from collections.abc import Callable, Iterable

from train.prove import judge_attention, judge_layers, judge_matmuls, reference
from train.prove.reference_adapter import is_adapted
from train.prove.step_parts import StepParts

PartJudge = Callable[[StepParts, str], None]
"""Judges all calls of a model part, forward or backward."""
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
"""Pattern for weight names, forward judge, backward judge. The pattern's first group is the part's name."""
WITHIN = ("", ".w13", ".0", ".out", ".ffn_norm")
"""Suffixes of the names under which the calls of a model part are recorded."""


def judge_parts(step: StepParts) -> None:
    """Report model parts that were not recorded. If there are none, judge forward, then backward."""
    at, parts = step.at, list(_parts_of(reference.weight_shapes(step.config.model)))
    if step.config.optim.index_warmup:  # other parts have no gradients; a proof without warm-up judges them
        parts = [part for part in parts if ".indexer." in part[0]]
    elif step.config.model.sparse.heads and step.config.seq_len > step.config.model.sparse.top_k:
        # Attention over chosen keys reads the weight of kv_up directly, and computes no keys and values.
        parts = [part for part in parts if not part[0].endswith((".attention", ".kv_up"))]
    failed = len(at.findings.differences)
    at.phase = "forward"
    for name, *_ in parts:
        if not any(step.calls.get(f"{name}{part}") for part in WITHIN):
            at.fail("parts", name, "no rank recorded its inputs and outputs")
    at.phase = "backward"
    returning = [part for part in reversed(parts) if step.config.optim.index_loss or ".indexer." not in part[0]]
    for name, *_ in returning:
        _judge_returns(step, name)
    if len(at.findings.differences) > failed:
        return
    at.phase = "forward"
    for name, forward, _ in parts:
        forward(step, name)
    at.phase = "backward"
    for name, _, backward in returning:
        backward(step, name)


def _parts_of(weights: Iterable[str]) -> Iterable[tuple[str, PartJudge, PartJudge]]:
    """Yields the name and the judges of each part. weights: in forward order."""
    for weight in weights:
        for pattern, forward, backward in PART_JUDGES:
            if match := re.fullmatch(pattern, weight.removesuffix(".weight")):
                yield match[1], forward, backward


def _judge_returns(step: StepParts, name: str) -> None:
    """Check that backward reached the part exactly once for every micro-batch."""
    if is_adapted(step.config) and name.endswith("embedding_norm"):
        return  # no trained layer precedes this norm, so it gets no gradient
    if ".indexer." in name and (is_adapted(step.config) or step.at.config.data.chats):
        return  # an indexer gets no gradient here, or only from micro-batches with learnt tokens
    for rank in step.ranks:
        those = [call for call in step.calls.get(name, []) if call.rank is rank]
        if not those or name == "embedding" or (rank.info.cp > 1 and name.endswith(".kv_up")):
            continue  # the part is on another rank, or its number of calls differs from the number of micro-batches
        back, due = sum(call.has("dx" if name.endswith(".router") else "dy") for call in those), rank.micro_batches()
        if back != due:
            step.at.fail("parts", name, "a micro-batch has no backward pass, or two", back, due, rank)
