"""Stages of a pipeline, schedules, and activations that wait on the host."""

from typing import Any

import torch

from parallel.pipeline import stage as pipeline_stage
from parallel.pipeline.host_store import HostStore
from parallel.pipeline.schedule import Pipeline
from parallel.pipeline.stage import Stage
from tests.prove.mutations.registry import BACKWARD, FORWARD, OURS, VALIDATION, mutation
from tests.prove.mutations.seams import Seams
from train import parallelize
from train.model.offload import _OnHost


def from_the_micro_batch_before(bug: Seams, method: str) -> None:
    """What a stage receives, by a method that is given the micro-batch's number, is what it received last."""
    last: dict[int, Any] = {}

    def receive(original, self, number):
        found = original(self, number)
        before = last.get(id(self), found)
        last[id(self)] = tuple(one.detach().clone().requires_grad_(one.requires_grad) for one in found)
        return before

    bug.around(Stage, method, receive)


@mutation(
    OURS + ": a stage computes on the hidden states of the micro-batch before", "pipeline", FORWARD, "layers|mtp|norm"
)
def hidden_states_of_the_micro_batch_before(bug: Seams) -> None:
    from_the_micro_batch_before(bug, "_retrieve_recv_activations")


@mutation(OURS + ": a stage gets the gradient of the micro-batch before", "pipeline", BACKWARD, "layers")
def gradients_of_the_micro_batch_before(bug: Seams) -> None:
    from_the_micro_batch_before(bug, "_retrieve_recv_grads")


@mutation(
    "NVIDIA-NeMo/Automodel#3530: gradients are thrown away between micro-batches",
    "pipeline",
    BACKWARD,
    "gradients of weights",
)
def last_micro_batch_alone_trains(bug: Seams) -> None:
    def run_backward(original, self, *arguments, **keywords):
        for param in self.submod.parameters():
            param.grad = None
        original(self, *arguments, **keywords)

    bug.around(Stage, "run_backward", run_backward)


@mutation(
    "huggingface/transformers#35438: gradients are divided by the micro-batches twice",
    "pipeline",
    BACKWARD,
    "gradients of weights",
)
def gradients_scaled_twice(bug: Seams) -> None:
    def make_schedule(original, self, *sizes):
        schedule = original(self, *sizes)
        schedule.scale_grads = True
        return schedule

    bug.around(Pipeline, "_make_schedule", make_schedule)


@mutation("sii-research/siiRL#69: stages have the documents of other sequences", "pipeline", FORWARD, "attention")
def documents_of_another_micro_batch(bug: Seams) -> None:
    def step(original, self, tokens_BS, documents_BS=None, supervised_BS=None, **keywords):
        return original(self, tokens_BS, documents_BS.roll(1, 0), supervised_BS, **keywords)

    bug.around(Pipeline, "step", step)


@mutation(
    "deepspeedai/Megatron-DeepSpeed#442, pytorch/pytorch#153833: weight gradients that nobody adds",
    "zbv",
    BACKWARD,
    "gradients of weights",
)
def weight_gradients_of_a_micro_batch_lost(bug: Seams) -> None:
    calls = [0]

    def backward(original, groups):
        calls[0] += 1
        if calls[0] > 1:
            original(groups)

    bug.around(pipeline_stage, "backward_of_weights", backward)


@mutation(
    "pytorch/pytorch#181365: a split backward counts what reaches a weight twice",
    "zbv",
    BACKWARD,
    "gradients of (weights|outputs)",
)
def weights_counted_twice(bug: Seams) -> None:
    def backward(original, groups):
        for group in groups:
            group["grads"] = [[one if one is None else 2 * one for one in ones] for ones in group["grads"]]
        original(groups)

    bug.around(pipeline_stage, "backward_of_weights", backward)


@mutation(OURS + ": where a pipeline turns, a stage hands on what it made last", "zbv", FORWARD, "layers|mtp|norm")
def turned_with_another_micro_batch(bug: Seams) -> None:
    last: dict[int, torch.Tensor] = {}

    def hand_over(original, self, output, number):
        before = last.get(self.stage_index, output)
        last[self.stage_index] = output.detach().clone().requires_grad_()
        original(self, before, number)

    bug.around(Stage, "set_local_fwd_input", hand_over)


@mutation(
    OURS + ": where a pipeline turns, the gradient is that of another micro-batch", "zbv", BACKWARD, "layers|embedding"
)
def turned_with_another_gradient(bug: Seams) -> None:
    last: dict[int, Any] = {}

    def hand_over(original, self, gradients, number):
        before = last.get(self.stage_index, gradients)
        last[self.stage_index] = tuple(one.detach().clone() for one in gradients)
        original(self, before, number)

    bug.around(Stage, "set_local_bwd_input", hand_over)


@mutation(OURS + ": the pairs of dualpipev hand on what the stage made last", "dualpipev", FORWARD, "layers|mtp|norm")
def pairs_with_another_micro_batch(bug: Seams) -> None:
    turned_with_another_micro_batch(bug)


@mutation(OURS + ": virtual stages in another order", "interleaved", FORWARD, "layers")
def virtual_stages_in_another_order(bug: Seams) -> None:
    def split(original, config):
        layers = original(config)
        return [layers[0], layers[2], layers[1], *layers[3:]]

    bug.around(parallelize, "stage_layers", split)


@mutation(OURS + ": the held-out loss sees across documents", "pipeline", VALIDATION, "held-out")
def held_out_loss_across_documents(bug: Seams) -> None:
    def evaluate(original, self, tokens_BS, documents_BS=None, supervised_BS=None, **keywords):
        return original(self, tokens_BS, None, supervised_BS, **keywords)

    bug.around(Pipeline, "evaluate", evaluate)


@mutation(OURS + ": the held-out loss leaves sequences out that do not fill a pass", "copies", VALIDATION, "held-out")
def held_out_loss_of_the_first_sequences(bug: Seams) -> None:
    first: list[torch.Tensor] = []

    def evaluate(original, self, *batch, **keywords):
        first[:] = first or batch
        return original(self, *first, **keywords)

    bug.around(Pipeline, "evaluate", evaluate)


@mutation(
    "NVIDIA/Megatron-LM#7398, meta-pytorch/torchtune#1867: what comes back from the host is what lay there before",
    "host",
    BACKWARD,
    "layers|gradients",
)
def host_gives_what_lay_there_before(bug: Seams) -> None:
    def fetch(original, self, batch):
        fresh = not batch.is_back and not batch.held
        original(self, batch)
        for piece in batch.held if fresh else ():
            piece.tensor[: len(piece.tensor) // 2] = 0

    bug.around(HostStore, "_fetch", fetch)


@mutation(
    "modelscope/ms-swift#10157: views of what went to the host come back as if they were contiguous",
    "host",
    BACKWARD,
    "layers|gradients",
)
def views_from_the_host_are_contiguous(bug: Seams) -> None:
    def unpack(original, self):
        found = original(self)
        if found.is_contiguous() or self.tensor is not None:
            return found
        return torch.empty(0, dtype=found.dtype).set_(found.untyped_storage(), found.storage_offset(), found.size())

    bug.around(_OnHost, "unpack", unpack)
