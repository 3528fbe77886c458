"""Context parallelism: ranks that share sequences."""

import torch

from parallel.context import ContextParallel, LatentsOnTheirWay
from parallel.pipeline.schedule import Pipeline
from tests.prove.mutations.registry import BACKWARD, FORWARD, OURS, VALIDATION, mutation
from tests.prove.mutations.seams import Seams
from train.kernels.plain import routing
from train.kernels.plain.plain_attention import PlainAttention
from train.model.deepseek import Head
from train.model.rope import Rope
from train.model.sequence import Positions
from train.model.shared_attention import KeysOfLatents


@mutation(
    "fla-org/flash-linear-attention#1115: ranks take pieces of the sequence in another order",
    "shared",
    FORWARD,
    "attention",
)
def late_pieces_in_the_order_of_ranks(bug: Seams) -> None:
    def wait(original, self):
        size = self._all_NBTX.size(2) // 2
        original(self)
        pieces = [half for halves in self._all_NBTX.split(size, 2) for half in halves]
        return [piece[:, :rows] for piece, rows in zip(pieces, self._rows, strict=True)]

    bug.around(LatentsOnTheirWay, "wait", wait)


@mutation(
    "NVIDIA/TransformerEngine#1557, NVIDIA/Megatron-LM#1465: gradients of keys that other ranks met are lost",
    "shared",
    BACKWARD,
    "attention|layers|mtp",
)
def gradients_of_latents_elsewhere_lost(bug: Seams) -> None:
    def scatter_sum(_, self, pieces):
        return torch.cat([pieces[self.part], pieces[-1 - self.part]], 1)

    bug.around(ContextParallel, "scatter_sum", scatter_sum)


@mutation(
    OURS + ": gradients of latents are averaged where they should be summed", "shared", BACKWARD, "attention|layers|mtp"
)
def gradients_of_latents_averaged(bug: Seams) -> None:
    bug.around(ContextParallel, "scatter_sum", lambda original, self, pieces: original(self, pieces) / self.parts)


@mutation(
    "NVIDIA/TransformerEngine#1557: blocks of keys are merged as if all weighed the same",
    "shared",
    FORWARD,
    "attention",
)
def blocks_merged_with_equal_weights(bug: Seams) -> None:
    def forward(original, self, *arguments, **keywords):
        made = original(self, *arguments, **keywords)
        return made._replace(lse_BHT=made.lse_BHT.where(made.lse_BHT.isinf(), 0.0))

    bug.around(PlainAttention, "forward", forward)


@mutation(OURS + ": every piece counts its positions from 0", "shared", FORWARD, "attention")
def positions_within_a_piece(bug: Seams) -> None:
    def table(original, self, length, device):
        return original(self, length, device)[torch.arange(length) % (length // 4)]

    bug.around(Rope, "table", table)


@mutation(
    "NVIDIA/TransformerEngine#1930, NVIDIA-NeMo/Megatron-Bridge#1292: packed documents end at the border of a piece",
    "shared",
    FORWARD,
    "attention",
)
def documents_end_with_a_piece(bug: Seams) -> None:
    def rectangles(original, self, block):
        found = original(self, block)
        return found if block in self.here else [one for one in found if one.before > len(block)]

    bug.around(Positions, "_rectangles", rectangles)


@mutation(
    "NVIDIA/Megatron-LM#5643: documents see each other across the borders of pieces", "shared", FORWARD, "attention"
)
def documents_seen_across_pieces(bug: Seams) -> None:
    def rectangles(original, self, block):
        if block in self.here:
            return original(self, block)
        return original(Positions(self.length, None, self.share, self.whole), block)

    bug.around(Positions, "_rectangles", rectangles)


@mutation(
    "NVIDIA-NeMo/Automodel#3544, verl-project/verl#4250: targets of MTP are rolled inside a piece",
    "shared",
    FORWARD,
    "mtp_loss",
)
def mtp_targets_rolled_inside_a_piece(bug: Seams) -> None:
    def take(original, self, x, shift=0):
        if shift < 2:
            return original(self, x, shift)
        rolled = [
            torch.cat([x[:, p.start + shift : p.stop + 1], x[:, p.start + 1 : p.start + shift]], 1) for p in self.here
        ]
        return torch.cat([part[:, : len(p)] for part, p in zip(rolled, self.here, strict=True)], 1)

    bug.around(Positions, "take", take)


@mutation(
    "NVIDIA-NeMo/Automodel#3544: MTP gets the embeddings of its own piece at the border",
    "shared",
    FORWARD,
    "embedding|mtp",
)
def mtp_embeddings_rolled_inside_a_piece(bug: Seams) -> None:
    def take_with_next(original, self, x, more):
        found = original(self, x, more)
        behind = found[:, self.count :]
        return torch.cat([found[:, : self.count], behind.flip(1) if behind.size(1) > 1 else found[:, :1]], 1)

    bug.around(Positions, "take_with_next", take_with_next)


@mutation(OURS + ": the balance loss counts over the positions of a rank", "shared", FORWARD, "balance")
def balance_counts_of_own_positions(bug: Seams) -> None:
    bug.around(ContextParallel, "total", lambda original, self, counts: counts * self.parts)


@mutation(
    "NVIDIA/Megatron-LM#673: a part of the loss is averaged over ranks that each have a share of it",
    "shared",
    BACKWARD,
    "router",
)
def balance_gradient_of_a_share(bug: Seams) -> None:
    def backward(original, ctx, *grads):
        ctx.balance_weight /= 2
        return original(ctx, *grads)

    bug.around(routing.Route, "backward", backward)


@mutation(
    "NVIDIA/Megatron-LM#673, verl-project/verl#4250: the loss is divided by the positions of all ranks",
    "shared",
    FORWARD,
    "loss",
)
def loss_divided_by_all_positions(bug: Seams) -> None:
    def loss(original, self, hidden_BTD, targets_BT, divisor, *given):
        return original(self, hidden_BTD, targets_BT, 2 * divisor, *given)

    bug.around(Head, "loss", loss)


@mutation(
    "NVIDIA/TransformerEngine#1557: the up projection's gradient misses blocks of other ranks",
    "shared",
    BACKWARD,
    "kv_up",
)
def weight_gradient_of_the_first_block(bug: Seams) -> None:
    calls = [0]

    def gradients(original, self, *arguments):
        dq, dlatents, dweights = original(self, *arguments)
        calls[0] += 1
        return dq, dlatents, [each * (calls[0] % 2) for each in dweights]

    bug.around(KeysOfLatents, "gradients", gradients)


@mutation(
    "NVIDIA/Megatron-LM#1464: softmax's backward takes the output of the block for that of all blocks",
    "shared",
    BACKWARD,
    "attention|layers|mtp",
)
def backward_with_the_output_of_a_block(bug: Seams) -> None:
    def backward(original, self, dout_BHTV, given, made):
        return original(self, dout_BHTV, given, made._replace(out_BHTV=self.forward(given).out_BHTV))

    bug.around(PlainAttention, "backward", backward)


@mutation("sii-research/siiRL#69: what one rank has is not sent to the others", "shared", FORWARD, "attention")
def latents_of_the_own_rank_alone(bug: Seams) -> None:
    def all_gather(original, self, all_NBTX, own_BTX):
        work = original(self, all_NBTX, own_BTX)
        work.wait()
        all_NBTX.copy_(own_BTX.expand_as(all_NBTX))

    bug.around(ContextParallel, "_all_gather", all_gather)


@mutation(OURS + ": the held-out loss is that of the first rank's positions", "shared", VALIDATION, "held-out")
def held_out_loss_of_the_first_rank(bug: Seams) -> None:
    def evaluate(original, self, *arguments, **keywords):
        loss = original(self, *arguments, **keywords)
        return None if getattr(self.modules[0]._share, "part", 0) else loss

    bug.around(Pipeline, "evaluate", evaluate)
