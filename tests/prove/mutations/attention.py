"""Attention: positions, YaRN, masks, heads, and its backward."""

import torch

from tests.prove.mutations.registry import BACKWARD, FORWARD, OURS, mutation
from tests.prove.mutations.seams import Seams
from train.kernels.plain import heads
from train.kernels.plain.heads import PlainHeads
from train.kernels.plain.plain_attention import PlainAttention
from train.model.deepseek import DeepSeekV3
from train.model.mla import MLA
from train.model.mtp import MTP
from train.model.recompute import RecomputedOutputs
from train.model.rope import Rope
from train.model.sequence import Positions


@mutation(
    "huggingface/optimum-intel#1877: RoPE turns halves where the weights want neighbours",
    "copies",
    FORWARD,
    r"attention|layers\.0",
)
def rope_pairs_the_halves(bug: Seams) -> None:
    def rotate(original, x_BTHR, table):
        halves = x_BTHR.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return original(halves, table).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)

    bug.around(heads, "rotate", rotate)


@mutation(
    "NVIDIA/Megatron-LM#1429, onnxruntime/mobius#548: YaRN's factor on the scores is missing",
    "copies",
    FORWARD,
    r"attention|layers\.0",
)
def softmax_scale_without_yarn(bug: Seams) -> None:
    def scale(original, self):
        return (self._config.nope_head_dim + self._config.rope_head_dim) ** -0.5

    bug.around(Rope, "softmax_scale", scale)


@mutation("kekzl/imp#880: YaRN's factor on the scores is taken once", "copies", FORWARD, r"attention")
def softmax_scale_with_yarn_once(bug: Seams) -> None:
    def scale(original, self):
        plain = (self._config.nope_head_dim + self._config.rope_head_dim) ** -0.5
        return (original(self) * plain) ** 0.5

    bug.around(Rope, "softmax_scale", scale)


@mutation("apache/tvm#18576, NVIDIA-NeMo/Automodel#2103: YaRN slows all pairs alike", "copies", FORWARD, "attention")
def yarn_slows_all_pairs(bug: Seams) -> None:
    def frequencies(_, self):
        width, theta = self._config.rope_head_dim, self._config.rope_theta
        return theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width) / self._config.yarn.factor

    bug.around(Rope, "frequencies", frequencies)


@mutation(
    "fla-org/flash-linear-attention#1115: backward misses an offset, as if gradients turned forward",
    "copies",
    BACKWARD,
    "attention|layers|mtp",
)
def gradients_turned_forward(bug: Seams) -> None:
    def backward(original, ctx, *grads):
        ctx.table = ctx.table.conj()
        return original(ctx, *grads)

    bug.around(PlainHeads, "backward", backward)


@mutation(
    OURS + ": the one rope key gets the gradient of the first head", "copies", BACKWARD, "kv_down|attention|layers|mtp"
)
def rope_key_of_the_first_head(bug: Seams) -> None:
    def backward(original, ctx, dq, dk_BHTQ, dv):
        dk_BHTQ = dk_BHTQ.clone()
        dk_BHTQ[:, 1:, :, ctx.nope :] = 0
        return original(ctx, dq, dk_BHTQ, dv)

    bug.around(PlainHeads, "backward", backward)


@mutation(OURS + ": the latent of queries is not normed", "copies", FORWARD, "attention")
def queries_not_normed(bug: Seams) -> None:
    bug.around(MLA, "_up_queries", lambda original, self, q_latent, pieces: self.q_up(q_latent))


@mutation(OURS + ": heads in another order before the output projection", "copies", FORWARD, "attention")
def heads_in_another_order(bug: Seams) -> None:
    def project(original, self, out_BHTV, saved):
        return original(self, out_BHTV.flip(1), saved)

    bug.around(MLA, "_project", project)


@mutation(
    "NVIDIA/Megatron-LM#5643, pytorch/torchtitan#4801: attention across packed documents",
    "pipeline",
    FORWARD,
    r"attention|layers\.0",
)
def documents_not_masked(bug: Seams) -> None:
    def run_layers(original, self, hidden_BTD, documents_BT):
        return original(self, hidden_BTD, None)

    bug.around(DeepSeekV3, "_run_layers", run_layers)


@mutation("vllm-project/speculators#621: MTP attends across documents", "copies", FORWARD, "mtp")
def documents_not_masked_in_mtp(bug: Seams) -> None:
    def forward(original, self, hidden_BTD, embedding_BTD, documents_BT):
        return original(self, hidden_BTD, embedding_BTD, None)

    bug.around(MTP, "forward", forward)


@mutation(OURS + ": a query sees the next token", "copies", FORWARD, "attention")
def a_query_sees_the_next_token(bug: Seams) -> None:
    def rectangles(original, self, block):
        return [one._replace(before=one.before + 1) for one in original(self, block)]

    bug.around(Positions, "_rectangles", rectangles)


@mutation(OURS + ": a document begins one token early", "copies", FORWARD, "attention")
def documents_begin_one_token_early(bug: Seams) -> None:
    def rectangles(original, self, block):
        if self.documents_BT is None:
            return original(self, block)
        documents_BT = torch.cat([self.documents_BT[:, 1:], self.documents_BT[:, -1:]], 1)
        return original(Positions(self.length, documents_BT, self.share, self.whole), block)

    bug.around(Positions, "_rectangles", rectangles)


@mutation(
    "NVIDIA-NeMo/Megatron-Bridge#2952: all sequences have the documents of the first",
    "two sequences",
    FORWARD,
    "attention",
)
def documents_of_the_first_sequence(bug: Seams) -> None:
    def rectangles(original, self, block):
        if self.documents_BT is None:
            return original(self, block)
        documents_BT = self.documents_BT[:1].expand_as(self.documents_BT)
        return original(Positions(self.length, documents_BT, self.share, self.whole), block)

    bug.around(Positions, "_rectangles", rectangles)


@mutation(
    "NVIDIA/TransformerEngine#1615: the gradient of queries is wrong, and nothing else",
    "copies",
    BACKWARD,
    "attention|layers|mtp",
)
def query_gradient_without_the_scale(bug: Seams) -> None:
    def backward(original, self, dout_BHTV, given, made):
        dq, dk, dv = original(self, dout_BHTV, given, made)
        return dq / given.scale, dk, dv

    bug.around(PlainAttention, "backward", backward)


@mutation(OURS + ": softmax's backward without its sum", "copies", BACKWARD, "attention|layers|mtp")
def softmax_backward_without_its_sum(bug: Seams) -> None:
    def backward(original, self, dout_BHTV, given, made):
        return original(self, dout_BHTV, given, made._replace(out_BHTV=torch.zeros_like(made.out_BHTV)))

    bug.around(PlainAttention, "backward", backward)


@mutation(OURS + ": heads get each other's gradient of values", "copies", BACKWARD, "attention|layers|mtp")
def value_gradients_of_another_head(bug: Seams) -> None:
    def backward(original, self, dout_BHTV, given, made):
        dq, dk, dv_BHTV = original(self, dout_BHTV, given, made)
        return dq, dk, dv_BHTV.roll(1, 1)

    bug.around(PlainAttention, "backward", backward)


@mutation(
    "NVIDIA-NeMo/Automodel#3140, #2635: recomputation does not give what the forward gave",
    "copies",
    BACKWARD,
    r"layers|mtp",
)
def recomputation_differs(bug: Seams) -> None:
    bug.around(RecomputedOutputs, "make", lambda original, *arguments: original(*arguments) * 1.01)
