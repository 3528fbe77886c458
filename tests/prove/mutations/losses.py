"""Losses of the main model and of MTP, and the weights of micro-batches and ranks in these losses."""

import torch

from parallel.pipeline.schedule import Pipeline
from tests.prove.mutations.registry import BACKWARD, FORWARD, OURS, mutation
from tests.prove.mutations.seams import Seams
from train.loop import training_engine
from train.model import deepseek
from train.model.deepseek import DeepSeekV3, Head
from train.model.mtp import MTP


@mutation(
    "verl-project/verl#3332, NVIDIA-NeMo/RL#84: losses of micro-batches summed, not averaged",
    "copies",
    BACKWARD,
    "head|norm|mtp",
)
def micro_batches_not_averaged(bug: Seams) -> None:
    def make_schedule(original, self, micro_batches, *sizes):
        schedule = original(self, micro_batches, *sizes)
        schedule._loss_fn = lambda loss, _: loss.sum()
        return schedule

    bug.around(Pipeline, "_make_schedule", make_schedule)


@mutation(
    "karpathy/nanoGPT#605 asks for it: the last micro-batch of a step has another weight",
    "pipeline",
    BACKWARD,
    "head|norm|mtp",
)
def last_micro_batch_unscaled(bug: Seams) -> None:
    def make_schedule(original, self, micro_batches, *sizes):
        schedule = original(self, micro_batches, *sizes)
        seen = [0]

        def loss_fn(loss, _):
            seen[0] += 1
            return loss.sum() / (1 if seen[0] % micro_batches == 0 else micro_batches)

        schedule._loss_fn = loss_fn
        return schedule

    bug.around(Pipeline, "_make_schedule", make_schedule)


@mutation(
    "verl-project/verl#6609: losses averaged per rank, where shares differ",
    "uneven",
    (FORWARD, BACKWARD),
    "loss|head|norm|mtp",
)
def ranks_with_less_weigh_more(bug: Seams) -> None:
    def set_weights(original, self, plan, batch, *more):
        original(self, plan, batch, *more)
        self._mean_micro_batches = self._micro_batches(batch)

    bug.around(training_engine.Engine, "_set_weights", set_weights)


@mutation(
    "verl-project/verl#6836, NVIDIA/Megatron-LM#7452: MTP's loss over its own count of tokens",
    "copies",
    FORWARD,
    "mtp_loss",
)
def mtp_losses_over_their_own_positions(bug: Seams) -> None:
    def forward(original, self, states, tokens_BS, positions, *given):
        losses = original(self, states, tokens_BS, positions, *given)
        counts = [positions.shorter(depth).count if depth else positions.count for depth in range(len(losses))]
        return [loss * (counts[0] / count) for loss, count in zip(losses, counts, strict=True)]

    bug.around(Head, "forward", forward)


@mutation("radixark/miles#2215: the targets of MTP one position off", "copies", FORWARD, "mtp")
def mtp_targets_shifted_by_one(bug: Seams) -> None:
    def forward(original, self, states, tokens_BS, positions, *given):
        found = original(self, states[:1], tokens_BS, positions, *given)
        for depth, hidden_BTD in enumerate(states[1:], 1):  # the head's first target is the second of its tokens
            found += original(self, [hidden_BTD], tokens_BS[:, depth - 1 : -1], positions, *given)
        return found

    bug.around(Head, "forward", forward)


@mutation(
    "pytorch/torchtitan#3392 discusses which token: MTP gets the embedding of the token before",
    "pipeline",
    FORWARD,
    "mtp",
)
def mtp_embedding_one_token_early(bug: Seams) -> None:
    def forward(original, self, hidden_BTD, embedding_BTD, documents_BT):
        return original(self, hidden_BTD, embedding_BTD.roll(1, 1), documents_BT)

    bug.around(MTP, "forward", forward)


@mutation("NVIDIA/Megatron-LM#1532: the losses of MTP depths summed, not averaged", "copies", BACKWARD, "mtp|head")
def mtp_losses_not_averaged(bug: Seams) -> None:
    def set_weights(original, self, *arguments):
        original(self, *arguments)
        if self.measure.last is not None:
            self.measure.last.mtp_weight *= 2

    bug.around(training_engine.Engine, "_set_weights", set_weights)


@mutation(
    "verl-project/verl#6432, radixark/Megatron-LM#13: MTP trains behind a detached model",
    "copies",
    BACKWARD,
    r"mtp\.0|norm|layers\.",
)
def mtp_detached(bug: Seams) -> None:
    def forward(original, self, hidden_BTD, embedding_BTD, documents_BT):
        return original(self, hidden_BTD.detach(), embedding_BTD, documents_BT)

    bug.around(MTP, "forward", forward)


@mutation(OURS + ": the halves that MTP joins change places", "copies", FORWARD, "mtp")
def mtp_halves_change_places(bug: Seams) -> None:
    def forward(_, self, hidden_BTD, embedding_BTD, positions):
        joined = torch.cat([self.hidden_norm(hidden_BTD), self.embedding_norm(embedding_BTD)], -1)
        return self.norm(self.block(self.projection(joined), positions))

    bug.around(MTP, "forward", forward)


@mutation("NVIDIA/Megatron-LM#5011: what a depth of MTP takes is shifted once too often", "copies", FORWARD, "mtp")
def mtp_depths_begin_with_the_main_model(bug: Seams) -> None:
    main: list[torch.Tensor] = []

    def loss(original, self, hidden_BTD, *rest):
        main[:] = [hidden_BTD]
        return original(self, hidden_BTD, *rest)

    def forward(original, self, hidden_BTD, *rest):
        return original(self, main[0].narrow(1, 0, hidden_BTD.size(1)), *rest)

    bug.around(DeepSeekV3, "_loss", loss)
    bug.around(MTP, "forward", forward)


@mutation(OURS + ": MTP's embedding gets no gradient", "copies", BACKWARD, "embedding")
def mtp_embedding_detached(bug: Seams) -> None:
    def loss(original, self, hidden_BTD, embedding_BTD, *rest):
        return original(self, hidden_BTD, embedding_BTD.detach(), *rest)

    bug.around(DeepSeekV3, "_loss", loss)


@mutation(OURS + ": the head gets no gradient of MTP", "copies", BACKWARD, "head")
def mtp_head_detached(bug: Seams) -> None:
    def forward(original, self, states, *given):
        with_mtp, weight = original(self, states, *given), self.weight
        del self._parameters["weight"]
        self.weight = weight.detach()
        without = original(self, states, *given)
        del self.weight
        self._parameters["weight"] = weight
        return with_mtp[:1] + without[1:]

    bug.around(Head, "forward", forward)


@mutation("modelscope/mcore-bridge#104: MTP weighs less than it should", "copies", (BACKWARD,), "mtp|head|norm")
def mtp_weight_of_the_end(bug: Seams) -> None:
    def set_weights(original, self, *arguments):
        original(self, *arguments)
        if self.measure.last is not None:
            self.measure.last.mtp_weight = 0.1

    bug.around(training_engine.Engine, "_set_weights", set_weights)


@mutation(
    "huggingface/transformers#34191, ml-explore/mlx-lm#1413: each part of a batch is divided by its own count",
    "copies",
    FORWARD,
    "main_loss",
)
def chunks_of_the_loss_averaged(bug: Seams) -> None:
    def cross_entropy(original, hidden_ND, head_VD, targets_N, divisor, chunk, kernels):
        parts = list(zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True))
        share = len(targets_N) / divisor / len(parts)
        return share * sum(
            original(hidden, head_VD, targets, len(targets), chunk, kernels) for hidden, targets in parts
        )

    bug.around(deepseek, "cross_entropy", cross_entropy)


@mutation(OURS + ": the last target of a sequence is left out", "copies", FORWARD, "main_loss")
def last_target_left_out(bug: Seams) -> None:
    def loss(original, self, hidden_BTD, targets_BT, *given):
        return original(self, hidden_BTD[:, :-1], targets_BT[:, :-1], *given)

    bug.around(Head, "loss", loss)
