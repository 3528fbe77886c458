"""Chats that share sequences: which tokens are learnt, what they see of each other, and the padding."""

from dataclasses import replace

import torch

from tests.prove.mutations.registry import BACKWARD, FORWARD, OURS, UPDATE, mutation
from tests.prove.mutations.seams import Seams
from train.loop import training_engine
from train.model.deepseek import Head
from train.model.router import Router
from train.model.sequence import PackedSamples, Positions


@mutation(
    "NVIDIA-NeMo/Megatron-Bridge#2952: samples that share a sequence see each other",
    "chats",
    FORWARD,
    "output|layers|norm|loss",
)
def samples_see_each_other(bug: Seams) -> None:
    bug.around(Positions, "documents", lambda original, self: [(None, range(self.length))])


@mutation("NVIDIA-NeMo/Megatron-Bridge#2952: targets of MTP cross the border of a sample", "chats", FORWARD, "mtp|loss")
def targets_cross_borders(bug: Seams) -> None:
    def learnt(original, self, supervised_BS):
        return original(replace(self, samples_BS=None), supervised_BS)

    bug.around(Positions, "learnt", learnt)


@mutation("InternLM/xtuner#1997: the stop token is not learnt", "chats", FORWARD, "loss")
def stop_token_not_learnt(bug: Seams) -> None:
    def learnt(original, self, supervised_BS):
        return original(self, supervised_BS & supervised_BS.roll(-1, 1))

    bug.around(Positions, "learnt", learnt)


@mutation(OURS + ": every token is learnt, the prompts too", "chats", FORWARD, "loss")
def prompts_learnt(bug: Seams) -> None:
    def learnt(original, self, supervised_BS):
        return original(self, torch.ones_like(supervised_BS))

    bug.around(Positions, "learnt", learnt)


@mutation(OURS + ": targets are shifted where they are read, and again in the loss", "chats", FORWARD, "loss")
def targets_shifted_twice(bug: Seams) -> None:
    def forward(original, self, states, tokens_BS, *given):
        return original(self, states, tokens_BS.roll(-1, 1), *given)

    bug.around(Head, "forward", forward)


@mutation("NVIDIA/Megatron-LM#5011: the mask of MTP is rolled twice", "chats", FORWARD, "mtp")
def mask_of_mtp_rolled_twice(bug: Seams) -> None:
    def learnt(original, self, supervised_BS):
        is_mtp = self.length < self.whole_length
        return original(self, supervised_BS.roll(-1, 1) if is_mtp else supervised_BS)

    bug.around(Positions, "learnt", learnt)


@mutation(
    "NVIDIA-NeMo/Automodel#3544: targets of MTP are lost where ranks that share sequences meet",
    "chats shared",
    FORWARD,
    "mtp",
)
def targets_of_mtp_lost_at_shares(bug: Seams) -> None:
    def learnt(original, self, supervised_BS):
        behind = self.whole_length - self.length
        if behind:
            supervised_BS = supervised_BS.clone()
            for piece in self.pieces[:-1]:
                supervised_BS[:, piece.stop + behind] = False
        return original(self, supervised_BS)

    bug.around(Positions, "learnt", learnt)


@mutation(
    "verl-project/verl#6836: a mean over the learnt tokens of each micro-batch, not of the step",
    "chats",
    (FORWARD, BACKWARD),
    "loss|head|norm|mtp",
)
def mean_of_a_micro_batch(bug: Seams) -> None:
    def forward(original, self, states, tokens_BS, positions, supervised_BS, divisor, *given):
        own = float(max(1, len(positions.learnt(supervised_BS))))
        return original(self, states, tokens_BS, positions, supervised_BS, own, *given)

    bug.around(Head, "forward", forward)


@mutation(
    "verl-project/verl#6609: a mean over the learnt tokens of each rank, not of all",
    "chats",
    (FORWARD, BACKWARD),
    "loss|head|norm|mtp",
)
def mean_of_a_rank(bug: Seams) -> None:
    def count(original, self, batches, rows=None):
        targets = sum(batch.targets for batch in batches)
        return original(self, batches, rows)._replace(targets=targets * self._layout.dp)

    bug.around(training_engine.Engine, "count", count)


@mutation(
    "NVIDIA-NeMo/Megatron-Bridge#5744, #5470, NVIDIA/Megatron-LM#1984: routers count what fills sequences up",
    "chats",
    FORWARD,
    "load|balance|router|count",
)
def routers_count_filling(bug: Seams) -> None:
    def forward(original, self, x_BTD, remake, positions):
        return original(self, x_BTD, remake, replace(positions, samples_BS=None))

    bug.around(Router, "forward", forward)


@mutation(
    OURS + ": the balance loss takes samples that share a sequence for one",
    "chats",
    (FORWARD, BACKWARD),
    "balance|router",
)
def balance_of_sequences(bug: Seams) -> None:
    def packed(original, self):
        found = original(self)
        if found is None:
            return None
        number_BT, lengths_N = found.on(torch.device("cpu"))
        rows_BT = torch.arange(len(number_BT)).unsqueeze(1).expand_as(number_BT)
        rows_BT = rows_BT.masked_fill(number_BT == len(lengths_N), len(number_BT))
        return PackedSamples(rows_BT, torch.bincount(rows_BT.flatten(), minlength=len(number_BT) + 1)[:-1])

    bug.around(Positions, "packed", packed)


@mutation(
    "PrimeIntellect-ai/prime-rl#2953: balance biases move in a tune that leaves them",
    "chats with biases",
    UPDATE,
    "bias",
)
def biases_move_in_a_tune(bug: Seams) -> None:
    def update(original, self, loads_LE, plan):
        original(self, loads_LE, replace(plan, bias_speed=0.02))

    bug.around(training_engine.Engine, "_update_biases", update)
