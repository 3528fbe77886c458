"""Work that is cut into parts if it is large: the second part is wrong, whatever its size."""

import torch

from conf.thresholds import THRESHOLDS
from parallel.pipeline.host_store import HostStore
from parallel.zero.deepspeed_patches import import_deepspeed
from parallel.zero.engine import Zero
from tests.prove.mutations.registry import BACKWARD, FORWARD, OURS, REDUCTION, RESUME, UPDATE, mutation
from tests.prove.mutations.seams import Seams
from train.checkpoint.staging import StagingBuffers
from train.kernels.fp8 import swiglu
from train.kernels.plain import grouped, plain_attention
from train.kernels.plain.plain_attention import PlainAttention
from train.kernels.plain.plain_kernels import PlainKernels
from train.model import deepseek
from train.optim import adamw
from train.optim.adamw import AdamW


@mutation(
    "intel/sycl-tla#489, torch-spyre/torch-spyre#3216: attention's second block misses a key",
    "many heads",
    FORWARD,
    "attention",
)
def second_block_misses_a_key(bug: Seams) -> None:
    def blocks(original, given):
        firsts = {one.first_query for one in given.seen.rectangles}
        for rows, queries, keys, bias_CS in original(given):
            if queries.start not in firsts:
                bias_CS = bias_CS.clone()
                bias_CS[:, 0] = -torch.inf
            yield rows, queries, keys, bias_CS

    bug.around(plain_attention, "_blocks", blocks)


@mutation(
    "Dao-AILab/flash-attention#2337: backward counts tiles of another size",
    "many heads",
    BACKWARD,
    "attention|layers|mtp",
)
def second_block_without_backward(bug: Seams) -> None:
    running = []

    def backward(original, self, *arguments):
        running.append(True)
        made = original(self, *arguments)
        running.pop()
        return made

    def blocks(original, given):
        firsts = {one.first_query for one in given.seen.rectangles}
        return (one for one in original(given) if not running or one[1].start in firsts)

    bug.around(PlainAttention, "backward", backward)
    bug.around(plain_attention, "_blocks", blocks)


@mutation(
    "jax-ml/jax#27224: what does not fill a block of a kernel is lost, here heads", "many heads", FORWARD, "attention"
)
def second_pass_over_heads_lost(bug: Seams) -> None:
    def blocks(original, given):
        heads = given.q_BHTQ.size(1)
        return (one for one in original(given) if one[0].start % heads == 0)

    bug.around(plain_attention, "_blocks", blocks)


@mutation(
    "deepspeedai/DeepSpeed#6351, deepspeedai/DeepSpeed#4879: what the second bucket holds is not reduced",
    "copies",
    REDUCTION,
    "gradients of weights|reduced gradients",
)
def second_bucket_not_reduced(bug: Seams) -> None:
    import_deepspeed(on_cuda=False)
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    buckets = [0]

    def average(original, self, tensor, communication_data_type):
        buckets[0] += 1
        if buckets[0] > 1:
            tensor.mul_(0.5)
        return original(self, tensor, communication_data_type)

    def step(original, self, valid=True):
        buckets[0] = 0
        return original(self, valid)

    bug.around(DeepSpeedZeroOptimizer, "average_tensor", average)
    bug.around(Zero, "step", step)


@mutation(
    "NVIDIA/Megatron-LM#7398 loses what waits on the host: here its second page",
    "host",
    BACKWARD,
    "layers|gradients",
)
def second_page_is_lost(bug: Seams) -> None:
    def fetch(original, self, batch):
        first = batch.pages[0].host.data_ptr() if batch.pages else None
        for place in (place for places in batch.places for place in places):
            if place.host.untyped_storage().data_ptr() != first:
                place.host.zero_()
        original(self, batch)

    bug.around(HostStore, "_fetch", fetch)


@mutation(OURS + ": the second chunk of the loss has its targets in another order", "copies", FORWARD, "loss")
def second_chunk_of_the_loss_reversed(bug: Seams) -> None:
    chunks = [0]

    def cross_entropy(original, *arguments):
        chunks[0] = 0
        return original(*arguments)

    def one_chunk(original, self, logits_CV, targets_C, scale):
        chunks[0] += 1
        return original(self, logits_CV, targets_C if chunks[0] == 1 else targets_C.flip(0), scale)

    bug.around(deepseek, "cross_entropy", cross_entropy)
    bug.around(PlainKernels, "cross_entropy", one_chunk)


@mutation(OURS + ": rows of logits beyond those of one pass are left out", "wide", FORWARD, "loss")
def second_rows_of_logits_left_out(bug: Seams) -> None:
    def one_chunk(original, self, logits_CV, targets_C, scale):
        rows = self.rows_at_once(logits_CV, THRESHOLDS.logits)
        return original(self, logits_CV[:rows], targets_C[:rows], scale)

    bug.around(PlainKernels, "cross_entropy", one_chunk)


@mutation(
    OURS + ": the second piece of SwiGLU has its rows in another order", "copies", (FORWARD, BACKWARD), "ffn|moe|layers"
)
def second_piece_of_swiglu_reversed(bug: Seams) -> None:
    def pieces(original, self, *tensors):
        for number, (h, *rest) in enumerate(original(self, *tensors)):
            yield (h if number == 0 else h.flip(0)), *rest

    bug.around(PlainKernels, "_pieces", pieces)


@mutation(
    OURS + ": the second piece of FP8's SwiGLU has its rows in another order", "fp8", FORWARD, "moe|experts", "recipe"
)
def second_piece_of_swiglu_reversed_in_fp8(bug: Seams) -> None:
    def chunks(original, x_P, h_P2F=None):
        first, *rest = original(x_P, h_P2F)
        return first, *(one.flip(0) if h_P2F is None else one for one in rest)

    bug.around(swiglu, "chunks", chunks)


@mutation(
    OURS + ": an expert's product that is rounded up to whole steps writes over the next one's",
    "bf16 plain",
    FORWARD,
    "moe|experts",
    "recipe",
)
def rows_written_over_the_next_experts(bug: Seams) -> None:
    bug.around(grouped, "_parts", lambda original, *given: reversed(list(original(*given))))


@mutation(
    OURS + ": weights beyond the first chunk of AdamW are not updated", "moments in bf16", UPDATE, "master|moments"
)
def second_chunk_of_adamw_not_updated(bug: Seams) -> None:
    def update(original, piece, group, count, factor):
        held = [tensor.clone() for tensor in piece]
        original(piece, group, count, factor)
        for tensor, before in zip(piece, held, strict=True):
            tensor[THRESHOLDS.adamw_elements :] = before[THRESHOLDS.adamw_elements :]

    bug.around(adamw, "_update", update)


@mutation(OURS + ": elements behind whole vectors are not updated", "bf16 plain", UPDATE, "master|moments", "recipe")
def rest_of_adamw_not_updated(bug: Seams) -> None:
    bug.around(adamw, "_update_rest", lambda original, rest, group, step: None)


@mutation(OURS + ": the norm counts the first row of what it sums", "copies", UPDATE, "norm")
def norm_of_the_first_row(bug: Seams) -> None:
    def sum_of_squares(original, self, x):
        return original(self, x[: THRESHOLDS.norm_row])

    bug.around(AdamW, "_sum_of_squares", sum_of_squares)


@mutation(
    OURS + ": the second buffer of a checkpoint is the first", "copies", RESUME, "state (from the|in a) checkpoint"
)
def second_buffer_of_a_checkpoint_is_the_first(bug: Seams) -> None:
    def copy(original, self, shards):
        original(self, shards)
        for segment in self.segments[1:]:
            segment.copy_(self.segments[0][: len(segment)])

    bug.around(StagingBuffers, "copy", copy)
