"""Forward and backward of all micro-batches of a step, over the stages of a pipeline.

torch.distributed.pipelining owns the order of the actions and the transfers between stages.  Every rank of a pipeline
reads the same batch; tokens_BS (and documents_BS) are cut into micro-batches along B and reach every local chunk
as keywords, so that only hidden states cross stages.  The last chunk turns them into its loss, of shape (1,): no
logits enter the schedule.  The schedule weighs each loss by 1 / micro-batches and sums gradients, so gradients are
those of the mean over micro-batches.  A single stage is a pipeline of one and runs through the same object, in the
1F1B order F0 B0 F1 B1 ...

Shapes: B sequences, S = T + 1 tokens of a batch row (T inputs and T targets), T positions, D hidden width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleDualPipeV, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

from conf.errors import UserError
from parallel.pipeline.split import SCHEDULES
from parallel.pipeline.stage import Stage
from parallel.pipeline.timeline import Timeline

_TORCH = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


def check_schedule(name: str, pp: int, micro_batches: int, layers: int) -> None:
    """Raise UserError when the schedule cannot run with these sizes. Pure; called before anything starts.

    micro_batches: micro-batches per step and data-parallel rank, batch_size / (micro_batch_size x dp).
    """
    if name not in SCHEDULES:
        raise UserError("parallel.schedule", name, "must be a known schedule", f"use one of {', '.join(SCHEDULES)}")
    stages = pp * SCHEDULES[name]
    if layers < stages:
        raise UserError(
            "parallel.pp",
            f"{pp} with parallel.schedule={name}",
            f"{name} makes {stages} stages of at least one layer, and model.layers={layers}",
            f"use parallel.pp <= {layers // SCHEDULES[name]}, or model.layers >= {stages}",
        )
    rounds = max(1, micro_batches // pp)
    least = {"1f1b": pp, "dualpipev": 2 * pp}.get(name, 1)
    if micro_batches < least:
        rule = f"{name} needs at least {least} micro-batches to fill {pp} pipeline ranks"
    elif name == "interleaved" and micro_batches % rounds:
        rule = f"interleaved needs micro-batches that {rounds} rounds of about {pp} divide (a multiple of pp is safe)"
    else:
        return
    raise UserError(
        "batch_size",
        f"{micro_batches} micro-batches per step and data-parallel rank",
        rule,
        "change batch_size, micro_batch_size or parallel.dp (micro-batches = batch_size / (micro_batch_size x dp)), "
        "or choose another parallel.schedule",
    )


class Pipeline:
    """This rank's part of a pipeline. Make it with build_schedule."""

    def __init__(
        self,
        name: str,
        modules: Sequence[nn.Module],
        stage_ids: Sequence[int],
        num_stages: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
        hidden: int,
        dtype: torch.dtype,
    ):
        assert len(modules) == len(stage_ids) == SCHEDULES[name] and list(stage_ids) == sorted(stage_ids)
        self.name, self.modules, self.stage_ids, self.num_stages = name, list(modules), list(stage_ids), num_stages
        self.group, self.device, self.hidden, self.dtype = group, device, hidden, dtype
        self.timeline = Timeline(device)
        """When each action of the last steps ran."""
        self._schedules: dict[tuple, Any] = {}

    @property
    def has_last(self) -> bool:
        """Whether this rank holds the last stage, and so sees the loss."""
        return self.stage_ids[-1] == self.num_stages - 1

    def step(self, tokens_BS: Tensor, documents_BS: Tensor | None = None, *, micro_batches: int) -> Tensor | None:
        """Run all micro-batches forward and backward; gradients are added to the parameters' .grad.

        tokens_BS int64 and documents_BS int32 (or None) are the same on every rank of the pipeline, with B a multiple
        of micro_batches. Returns the mean loss over micro-batches, a detached scalar, on the rank with the last stage,
        and None elsewhere.
        """
        schedule = self._schedule(tokens_BS, micro_batches)
        keywords = {"tokens_BS": tokens_BS} | ({} if documents_BS is None else {"documents_BS": documents_BS})
        losses: list[Tensor] = []
        with self.timeline.step():
            # The target only has to be there: the last chunk already knows its targets from tokens_BS.
            schedule.step(tokens_BS, target=tokens_BS, losses=losses, return_outputs=False, **keywords)
        return torch.stack(losses).sum().detach() if self.has_last else None

    def _schedule(self, tokens_BS: Tensor, micro_batches: int):
        """The torch schedule for this number and shape of micro-batches; a batch ramp changes the number."""
        B, S = tokens_BS.shape
        assert B % micro_batches == 0, (B, micro_batches)
        key = (micro_batches, B // micro_batches, S)
        if key not in self._schedules:
            self._schedules[key] = self._make_schedule(*key)
        return self._schedules[key]

    def _make_schedule(self, micro_batches: int, B: int, S: int):
        stages = [
            Stage(
                module,
                stage_id,
                self.num_stages,
                self.device,
                self.group,
                self._example(stage_id, B, S),
                self._example(stage_id + 1, B, S),
                self.timeline,
            )
            for module, stage_id in zip(self.modules, self.stage_ids, strict=True)
        ]
        return _TORCH[self.name](
            stages[0] if self.name == "1f1b" else stages,
            micro_batches,
            loss_fn=lambda loss, _: loss.sum() / micro_batches,
            scale_grads=False,
        )

    def _example(self, boundary: int, B: int, S: int) -> Tensor:
        """What crosses the boundary before stage `boundary`: tokens, hidden states, or (at the end) the loss."""
        if boundary == 0:
            return torch.empty(B, S, dtype=torch.int64, device="meta")
        if boundary == self.num_stages:
            return torch.empty(1, dtype=torch.float32, device="meta", requires_grad=True)
        return torch.empty(B, S - 1, self.hidden, dtype=self.dtype, device="meta", requires_grad=True)


def build_schedule(
    name: str,
    modules: Sequence[nn.Module],
    stage_ids: Sequence[int],
    num_stages: int,
    group: dist.ProcessGroup | None,
    device: torch.device,
    *,
    hidden: int,
    dtype: torch.dtype,
) -> Pipeline:
    """The pipeline of this rank.

    modules: this rank's chunks in stage order, called as chunk(x, tokens_BS=..., documents_BS=...) where x is tokens_BS
    for stage 0 and hidden states (B, T, D) else; stage_ids as in split.stage_placement; group: the ranks of this
    pipeline in order (None: the world); hidden: D; dtype: of the hidden states between stages. Collective over group.
    """
    if dist.get_world_size(group) > 1:
        # torch opens the group's communicator at the first mixed send and receive, where only two ranks meet; NCCL
        # wants all of them there, so open it here.
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    return Pipeline(name, modules, stage_ids, num_stages, group, device, hidden, dtype)
