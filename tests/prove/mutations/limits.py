"""Bugs that show only beyond a size or at a limit: positions from 128 on, 32 or more experts, a third rank, softmaxes
that overflow, floors of scales."""

import torch

from parallel.expert.wire import Fp8Wire
from tests.prove.mutations.adapters import dropped
from tests.prove.mutations.fp8 import ATTENTION, EXPERTS
from tests.prove.mutations.registry import BACKWARD, FORWARD, OURS, RESUME, mutation
from tests.prove.mutations.seams import Seams
from tests.prove.mutations.wire import ROWS
from train.kernels.plain import grouped, plain_attention
from train.kernels.plain.plain_attention import PlainAttention
from train.kernels.plain.plain_kernels import PlainKernels
from train.loop import trainer
from train.loop.hooks.held_out_metrics import BestKept
from train.model.deepseek import DeepSeekV3
from train.model.rope import Rope

POSITIONS, WARP, OVERFLOW = 128, 32, 88.7
WIDE = "tiles"


@mutation(OURS + ": queries from position 128 on miss a key", "bf16 plain", FORWARD, ATTENTION, WIDE)
def late_queries_miss_a_key(bug: Seams) -> None:
    def blocks(original, given):
        for rows, queries, keys, bias_CS in original(given):
            late = torch.arange(queries.start, queries.stop)[:, None] >= POSITIONS
            yield rows, queries, keys, bias_CS.masked_fill(late & (torch.arange(bias_CS.size(-1)) == 0), -torch.inf)

    bug.around(plain_attention, "_blocks", blocks)


@mutation(OURS + ": keys from position 128 on get no gradient", "bf16 plain", BACKWARD, ATTENTION, WIDE)
def late_keys_without_gradient(bug: Seams) -> None:
    def backward(original, self, *given):
        dq, dk, dv = original(self, *given)
        dk[:, :, POSITIONS:] = 0
        return dq, dk, dv

    bug.around(PlainAttention, "backward", backward)


@mutation(OURS + ": positions are counted in seven bits", "bf16 plain", FORWARD, "heads|" + ATTENTION, WIDE)
def positions_in_seven_bits(bug: Seams) -> None:
    def table(original, self, length, device):
        whole = original(self, length, device)
        return whole[torch.arange(length) % POSITIONS]

    bug.around(Rope, "table", table)


@mutation(OURS + ": positions of shared sequences are counted in eight bits", "shared bf16", FORWARD, ATTENTION, WIDE)
def positions_in_eight_bits(bug: Seams) -> None:
    def table(original, self, length, device):
        whole = original(self, length, device)
        return whole[torch.arange(length) % (2 * POSITIONS)]

    bug.around(Rope, "table", table)


@mutation(
    OURS + ": a thread of a warp has one expert, and those behind have none", "many local", FORWARD, EXPERTS, WIDE
)
def experts_beyond_a_warp_left_out(bug: Seams) -> None:
    def matmul(original, x_RI, weight_EIO, rows):
        out_RO = original(x_RI, weight_EIO, rows)
        out_RO[sum(rows[:WARP]) :] = 0
        return out_RO

    bug.around(grouped, "matmul", matmul)


@mutation(OURS + ": experts from 32 on take the weights of the first", "many local", FORWARD, EXPERTS, WIDE)
def experts_beyond_a_warp_are_the_first(bug: Seams) -> None:
    def matmul(original, x_RI, weight_EIO, rows):
        return original(x_RI, weight_EIO[torch.arange(len(weight_EIO)) % WARP], rows)

    bug.around(grouped, "matmul", matmul)


@mutation(OURS + ": experts from 32 on do not learn", "many local", BACKWARD, "gradients of single", WIDE)
def experts_beyond_a_warp_do_not_learn(bug: Seams) -> None:
    def gradient(original, *given):
        dweight_EOI = original(*given)
        dweight_EOI[WARP:] = 0
        return dweight_EOI

    bug.around(grouped, "weight_gradient", gradient)


@mutation(OURS + ": attention's softmax does not subtract its maximum", "bf16 plain", FORWARD, ATTENTION, WIDE)
def attention_without_its_maximum(bug: Seams) -> None:
    def forward(original, self, *given, **keywords):
        made = original(self, *given, **keywords)
        made.out_BHTV[made.lse_BHT > OVERFLOW] = torch.nan
        return made

    bug.around(PlainAttention, "forward", forward)


@mutation(
    OURS + ": the loss's softmax does not subtract its maximum", "bf16 plain", (FORWARD, BACKWARD), "head|loss", WIDE
)
def loss_without_its_maximum(bug: Seams) -> None:
    def cross_entropy(original, self, logits_NV, *rest):
        overflows_N1 = (logits_NV > OVERFLOW).any(-1, keepdim=True)
        return original(self, logits_NV.masked_fill_(overflows_N1, torch.nan), *rest)

    bug.around(PlainKernels, "cross_entropy", cross_entropy)


def with_floors(bug: Seams, **floors: float) -> None:
    def encode(original, self, x_RD, *, gradient=False):
        vars(self).update(floors)
        return original(self, x_RD, gradient=gradient)

    bug.around(Fp8Wire, "encode", encode)


@mutation(OURS + ": scales of the wire have no floor", "fp8 wire", FORWARD, ROWS, WIDE)
def wire_without_a_floor(bug: Seams) -> None:
    with_floors(bug, activation_floor=2.0**-100)


@mutation(OURS + ": scales of gradients on the wire have no floor", "fp8 wire", BACKWARD, "gradients|" + ROWS, WIDE)
def wire_without_a_floor_for_gradients(bug: Seams) -> None:
    with_floors(bug, gradient_floor=2.0**-100)


@mutation(OURS + ": dropout of a recipe in fp32 does not scale up", "adapters in fp32", FORWARD, "dropout", WIDE)
def dropout_without_scaling_in_fp32(bug: Seams) -> None:
    dropped(bug, lambda kept, x, share: kept * (1 - share))


@mutation(
    OURS + ": the checkpoint of the highest loss is kept as the best", "best kept", RESUME, "step of the best", "fp32"
)
def highest_loss_is_the_best(bug: Seams) -> None:
    def on_step(original, self, run, step, record):
        original(self, run, step, {name: -value for name, value in record.items() if name == "validation_loss"})

    bug.around(BestKept, "on_step", on_step)


@mutation(OURS + ": a third rank has the samples of the second", "three copies", FORWARD, "embedding", "fp32")
def third_rank_has_the_samples_of_the_second(bug: Seams) -> None:
    bug.around(trainer, "share_of", lambda original, config, batch, rank: original(config, batch, min(rank, 1)))


@mutation(
    OURS + ": a stage with neither end of the pipeline doubles what it sends", "three stages", FORWARD, "layers|norm"
)
def middle_stage_doubles_what_it_sends(bug: Seams) -> None:
    def run(original, self, *given):
        made = original(self, *given)
        return made if self.has_embedding or self.has_head else 2 * made

    bug.around(DeepSeekV3, "_run", run)
