"""Forward and backward of all micro-batches of a step, over the stages of a pipeline.

torch.distributed.pipelining orders the actions and transfers data between stages. Every rank of a pipeline reads the
same batch and cuts it into micro-batches along B. So only hidden states are sent between stages. The last chunk returns
its loss with shape (1,).

The schedule divides each loss by the number of micro-batches and sums the gradients. If data-parallel pipelines have
different numbers, the divisor is their mean.

Shapes: B sequences, S = T + 1 tokens of a batch row (T inputs and T targets), T positions, D hidden width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import OVERLAP_F_B, PipelineScheduleMulti

from conf.pipeline_schedules import SCHEDULES
from parallel.pipeline.host_store import HostStore
from parallel.pipeline.orders import ORDERS, Action, schedule_actions
from parallel.pipeline.overlap import Lanes, overlapped_pair
from parallel.pipeline.simulate import what_runs
from parallel.pipeline.stage import Stage
from parallel.pipeline.timeline import timeline_of

Chunk = TypeVar("Chunk", bound=nn.Module)


class Pipeline(Generic[Chunk]):
    """This rank's chunks of the model, as stages of a pipeline."""

    def __init__(
        self,
        name: str,
        modules: Sequence[Chunk],
        stage_ids: Sequence[int],
        num_stages: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
        *,
        hidden: int,
        dtype: torch.dtype,
        cp: int = 1,
        overlap: bool = True,
        timeout: float = 600.0,
        host: HostStore | None = None,
    ):
        """Set up this rank's part of the pipeline. Collective over the group.

        modules: this rank's chunks in stage order, called as chunk(x, tokens_BS=..., documents_BS=..., ...); x is
            tokens_BS for stage 0, and hidden states (B, T, D) for other stages
        group: ranks of this pipeline in order; None for all ranks
        hidden, dtype: width D and dtype of the hidden states
        cp: number of ranks that share each sequence; T = (S - 1) / cp
        overlap: whether the passes of a pair take turns (overlap.py)
        timeout: maximum seconds that one pass of a pair waits for the other
        host: store of the chunks' activations; every action is reported to it
        """
        each = len(modules)
        self.facts = SCHEDULES[name]
        assert len(stage_ids) == each == self.facts.rank_stages(each) and list(stage_ids) == sorted(stage_ids)
        self.modules, self.stage_ids, self.num_stages = list(modules), list(stage_ids), num_stages
        self.group, self.device, self.hidden, self.dtype, self._cp = group, device, hidden, dtype, cp
        self.timeline = timeline_of(device)
        """Times of each action in the last steps."""
        self.stage_type: type[Stage] = Stage
        """Class of the stages; replaceable before the first step."""
        self.on_action: Callable[[str, int, int], None] = lambda kind, stage, micro_batch: None
        """Function that is called at the start of every action."""
        self.on_chunk_end: Callable[[int], None] = lambda chunk: None
        """Called with a chunk's index when its gradients are complete, except for the rank's last chunk."""
        self._left: dict[int, int] = {}
        """For each stage: number of backward passes that this step has not completed."""
        self._host = host
        self._lanes = Lanes(device, timeout) if overlap and self.facts.pairs else None
        placement = self.facts.place_stages(num_stages // each, each)
        self._rank_of = {stage: rank for rank, stages in enumerate(placement) for stage in stages}
        self._schedules: dict[tuple, Any] = {}
        if dist.get_world_size(group) > 1:
            # NCCL needs all ranks of the group to open its communicator, but torch would open it in the first message
            # of two ranks.
            dist.all_reduce(torch.zeros(1, device=device), group=group)

    @property
    def has_last(self) -> bool:
        """Whether this rank holds the last stage, which computes the loss."""
        return self.stage_ids[-1] == self.num_stages - 1

    def step(
        self,
        tokens_BS: Tensor,
        documents_BS: Tensor | None = None,
        supervised_BS: Tensor | None = None,
        *,
        micro_batches: int,
        mean: float | None = None,
        **more: Tensor,
    ) -> Tensor | None:
        """Run all micro-batches forward and backward. Adds gradients to the parameters' .grad.

            tokens_BS: int64; micro_batches divides B
            documents_BS: int32 or None, on the host
            supervised_BS: bool or None, on the host
            more: tensors (B, ...) that every chunk gets as keyword arguments
            mean: divisor of the losses, by default micro_batches

        The first three must be equal on every rank of the pipeline. Returns the sum of the divided losses, a detached
        scalar; None on ranks without the last stage.
        """
        schedule = self._schedule(tokens_BS, micro_batches, float(micro_batches) if mean is None else mean)
        keywords = {"tokens_BS": tokens_BS} | _given(documents_BS, supervised_BS) | more
        losses: list[Tensor] = []
        self._left = dict.fromkeys(self.stage_ids, micro_batches)
        if self._host is not None:
            self._host.start(*self._actions(micro_batches))
        with self.timeline.step():
            # torch requires a target, but the last chunk reads tokens_BS.
            try:
                schedule.step(tokens_BS, target=tokens_BS, losses=losses, return_outputs=False, **keywords)
            except BaseException:
                self._schedules.clear()  # the failed schedule still holds losses and graphs
                raise
        return torch.stack(losses).sum().detach() if self.has_last else None

    @torch.no_grad()
    def evaluate(
        self,
        tokens_BS: Tensor,
        documents_BS: Tensor | None = None,
        supervised_BS: Tensor | None = None,
        *,
        micro_batches: int,
    ) -> Tensor | None:
        """Return the mean loss over micro-batches, without gradients; None on ranks without the last stage.

        The arguments are those of `forward`.
        """
        losses = self.forward(tokens_BS, documents_BS, supervised_BS, micro_batches=micro_batches)
        total = torch.zeros((), device=self.device)
        for loss in losses:
            total += loss.sum() / micro_batches
        return total if self.has_last else None

    @torch.no_grad()
    def forward(
        self,
        tokens_BS: Tensor,
        documents_BS: Tensor | None = None,
        supervised_BS: Tensor | None = None,
        *,
        micro_batches: int,
        **more: Tensor,
    ) -> list[Tensor]:
        """Return the last stage's output for every micro-batch, without gradients; an empty list on other ranks.

        The arguments are those of `step`; micro_batches may be any divisor of B. Modules are in eval mode.

        In time slot t, stage s runs micro-batch t - s. Between two slots, all ranks exchange outputs in one batch of
        sends and receives. torch's schedules cannot run only the forward of several stages per rank.
        """
        was_training = [module.training for module in self.modules]
        try:
            for module in self.modules:
                module.eval()
            return self._forward(tokens_BS, _given(documents_BS, supervised_BS) | more, micro_batches)
        finally:
            for module, training in zip(self.modules, was_training, strict=True):
                module.train(training)

    def _forward(self, tokens_BS: Tensor, given: dict[str, Tensor], micro_batches: int) -> list[Tensor]:
        assert len(tokens_BS) % micro_batches == 0, (tokens_BS.shape, micro_batches)
        tokens = tokens_BS.chunk(micro_batches)
        parts = {name: value.chunk(micro_batches) for name, value in given.items()}
        inputs: dict[tuple[int, int], Tensor] = {}
        found: list[Tensor] = []
        for slot in range(micro_batches + self.num_stages - 1):
            outputs: dict[tuple[int, int], Tensor] = {}
            for module, stage in zip(self.modules, self.stage_ids, strict=True):
                m = slot - stage
                if 0 <= m < micro_batches:
                    x = tokens[m] if stage == 0 else inputs.pop((stage, m))
                    keywords = {name: part[m] for name, part in parts.items()}
                    outputs[stage, m] = module(x, tokens_BS=tokens[m], **keywords)
            last = outputs.pop((self.num_stages - 1, slot - self.num_stages + 1), None)
            if last is not None:
                found.append(last)
            inputs |= self._exchange(slot, outputs, tokens)
        return found

    def _exchange(self, slot: int, outputs: dict, tokens: Sequence[Tensor]) -> dict[tuple[int, int], Tensor]:
        """Send this rank's outputs of a time slot. Return its stages' inputs for the next slot."""
        inputs, transfers = {}, []
        for (stage, m), output in outputs.items():
            if stage + 1 in self.stage_ids:
                inputs[stage + 1, m] = output
            else:
                transfers.append(self._transfer(dist.isend, output.contiguous(), stage + 1))
        for stage in self.stage_ids:
            m = slot + 1 - stage
            if stage > 0 and stage - 1 not in self.stage_ids and 0 <= m < len(tokens):
                inputs[stage, m] = torch.empty_like(self._example(stage, *tokens[m].shape), device=self.device)
                transfers.append(self._transfer(dist.irecv, inputs[stage, m], stage - 1))
        for work in dist.batch_isend_irecv(transfers) if transfers else ():
            work.wait()
        return inputs

    def _transfer(self, operation, tensor: Tensor, stage: int) -> dist.P2POp:
        return dist.P2POp(operation, tensor, group=self.group, group_peer=self._rank_of[stage])

    def _schedule(self, tokens_BS: Tensor, micro_batches: int, mean: float):
        """Return the torch schedule for micro-batches of this number and shape."""
        B, S = tokens_BS.shape
        assert B % micro_batches == 0, (B, micro_batches)
        key = (micro_batches, B // micro_batches, S, mean)
        if key not in self._schedules:
            self._schedules[key] = self._make_schedule(*key)
        return self._schedules[key]

    def _make_schedule(self, micro_batches: int, B: int, S: int, mean: float):
        stages = [
            self.stage_type(
                module,
                stage_id,
                self.num_stages,
                self.device,
                self.group,
                self._example(stage_id, B, S),
                self._example(stage_id + 1, B, S),
                self._acting,
            )
            for module, stage_id in zip(self.modules, self.stage_ids, strict=True)
        ]

        def loss_fn(loss: Tensor, _: Any) -> Tensor:
            return loss.sum() / mean

        drives = ORDERS[self.facts.name].drives
        if not issubclass(drives, PipelineScheduleMulti):
            return drives(stages[0], micro_batches, loss_fn=loss_fn, scale_grads=False)
        schedule = drives([*stages], micro_batches, loss_fn=loss_fn, scale_grads=False)
        if self._lanes is not None:
            pair = overlapped_pair(self._lanes, self._acting)
            schedule.register_custom_function(OVERLAP_F_B, pair)  # pyrefly: ignore[missing-attribute]  a schedule with pairs has it
        return schedule

    def _actions(self, micro_batches: int) -> tuple[list[Action], list[int]]:
        """Return this rank's actions in a step, and its stages whose backward cannot be split."""
        each = len(self.modules)
        actions = schedule_actions(
            self.facts.name, self.num_stages // each, micro_batches, each, self._lanes is not None
        )
        chunks = zip(self.stage_ids, self.modules, strict=True)
        one_piece = [stage for stage, module in chunks if getattr(module, "backward_in_one_piece", False)]
        return actions[self._rank_of[self.stage_ids[0]]], one_piece

    @contextmanager
    def _acting(
        self, kind: str, stage: int, micro_batch: int, backward: tuple[int, int] | None = None
    ) -> Iterator[None]:
        """Run one action inside the block, and record it. Arguments as in `Timeline.action`."""
        self.on_action(kind, stage, micro_batch)
        hosted = nullcontext() if self._host is None else self._host.acting(kind, stage, micro_batch)
        with self.timeline.action(kind, stage, micro_batch, backward), hosted:
            yield
        chunk = self.stage_ids.index(stage if backward is None else backward[0])
        one_piece = getattr(self.modules[chunk], "backward_in_one_piece", False)
        if backward is None and what_runs(Action(kind, stage, micro_batch), one_piece) not in ("B", "W"):
            return
        self._left[self.stage_ids[chunk]] -= 1
        if not self._left[self.stage_ids[chunk]] and any(self._left.values()):
            self.on_chunk_end(chunk)

    def _example(self, boundary: int, B: int, S: int) -> Tensor:
        """Return an example of stage `boundary`'s input. After the last stage, the example is the loss."""
        if boundary == 0:
            return torch.empty(B, S, dtype=torch.int64, device="meta")
        if boundary == self.num_stages:
            return torch.empty(1, dtype=torch.float32, device="meta", requires_grad=True)
        return torch.empty(B, (S - 1) // self._cp, self.hidden, dtype=self.dtype, device="meta", requires_grad=True)


def _given(documents_BS: Tensor | None, supervised_BS: Tensor | None) -> dict[str, Tensor]:
    """Return these tensors, except those that are None, as keyword arguments of a chunk."""
    named = {"documents_BS": documents_BS, "supervised_BS": supervised_BS}
    return {name: value for name, value in named.items() if value is not None}
