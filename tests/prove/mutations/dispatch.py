"""Dispatch and combine, flat and node-limited, and the computation of the experts."""

import torch
from torch.nn import functional as F

from parallel.expert import dispatcher
from parallel.expert.all_to_all import AllToAllDispatcher
from parallel.expert.dispatcher import ChainDispatcher
from parallel.expert.node_limited import NodeLimitedDispatcher
from tests.prove.mutations.registry import BACKWARD, FORWARD, OURS, mutation
from tests.prove.mutations.seams import Seams
from train.kernels.plain.high import HighPrecision
from train.kernels.plain.plain_kernels import PlainKernels
from train.model import moe


@mutation(
    "vllm-project/llm-compressor#1907: scores applied before the experts where they belong behind",
    "experts",
    FORWARD,
    "moe|layers",
)
def gate_on_the_input_of_experts(bug: Seams) -> None:
    def expert_ffn(original, self, rows_RD, gates_R, *rest):
        return original(self, rows_RD * gates_R.unsqueeze(-1).to(rows_RD.dtype), torch.ones_like(gates_R), *rest)

    bug.around(HighPrecision, "expert_ffn", expert_ffn)


@mutation(
    "pytorch/torchtitan#1166, meta-pytorch/MSLK#158: experts without rows",
    "many experts",
    (FORWARD, BACKWARD),
    "experts|moe|layers",
)
def empty_expert_dropped(bug: Seams) -> None:
    def expert_ffn(original, self, *operands):
        *others, counts_E, added = operands
        filled = counts_E[counts_E > 0]
        return original(self, *others, F.pad(filled, (0, len(counts_E) - len(filled))), added)

    bug.around(HighPrecision, "expert_ffn", expert_ffn)


@mutation(OURS + ": experts of a rank in another order", "experts", FORWARD, "moe")
def experts_in_another_order(bug: Seams) -> None:
    def expert_ffn(original, self, rows_RD, gates_R, w13_E2FD, w2_EDF, *rest):
        return original(self, rows_RD, gates_R, w13_E2FD.flip(0), w2_EDF.flip(0), *rest)

    bug.around(HighPrecision, "expert_ffn", expert_ffn)


@mutation(OURS + ": gate and up projection change places", "copies", FORWARD, "ffn|moe")
def gate_and_up_change_places(bug: Seams) -> None:
    def swiglu(original, self, h_N2F, gates_N):
        return original(self, h_N2F.roll(h_N2F.size(1) // 2, 1), gates_N)

    bug.around(PlainKernels, "swiglu", swiglu)


@mutation(OURS + ": what is over a capacity is dropped", "experts", FORWARD, "moe")
def tokens_over_a_capacity_dropped(bug: Seams) -> None:
    def expert_ffn(original, self, *operands):
        out_RD, counts_E = original(self, *operands), operands[4]
        last = counts_E.cumsum(0)[counts_E.argmax()] - 1
        return torch.where(torch.arange(len(out_RD)).unsqueeze(1) == last, 0, out_RD)

    bug.around(HighPrecision, "expert_ffn", expert_ffn)


@mutation(OURS + ": the gradient of gates misses the up projection", "copies", BACKWARD, "router|moe")
def gate_gradient_in_part(bug: Seams) -> None:
    def swiglu_backward(original, self, grad_NF, h_N2F, gates_N):
        dh_N2F, dgates_N = original(self, grad_NF, h_N2F, gates_N)
        return dh_N2F, None if dgates_N is None else dgates_N * 0.5

    bug.around(PlainKernels, "swiglu_backward", swiglu_backward)


@mutation(OURS + ": where all experts are here, the way back takes the order of the way out", "copies", FORWARD, "moe")
def rows_back_in_the_order_out(bug: Seams) -> None:
    def forward(original, ctx, out_RD, order, kernels):
        return original(ctx, out_RD.roll(1, 0), order, kernels)

    bug.around(moe._Unpermute, "forward", forward)


@mutation(
    "huggingface/transformers#48205: a rank's gradient of the scores covers its own experts alone",
    "experts",
    BACKWARD,
    "router|layers",
)
def gate_gradients_of_other_ranks_missing(bug: Seams) -> None:
    def by_token(original, self, plan, side_CX):
        grads_TK = original(self, plan, side_CX)
        mine = plan.ids_TK // (self.experts // self.links[0].size) == self.links[0].rank
        return grads_TK * mine

    bug.around(AllToAllDispatcher, "_gate_grads_by_token", by_token)


@mutation(
    "deepseek-ai/DeepEP#58 asks for it: rows come in another order than their experts", "experts", FORWARD, "moe|layers"
)
def gates_of_other_rows(bug: Seams) -> None:
    def row_gates(original, self, plan, side_MX):
        return original(self, plan, side_MX).roll(1)

    bug.around(AllToAllDispatcher, "_row_gates", row_gates)


@mutation(
    "NVIDIA-NeMo/Automodel#3140, #3325: a layer that runs again sends other rows to its experts than before",
    "layers again",
    BACKWARD,
    "layers|mtp",
)
def second_run_routed_by_other_rows(bug: Seams) -> None:
    def dispatch(original, self, x_TD, ids_TK, gates_TK, again=None):
        return original(self, x_TD if again is None else x_TD.roll(1, 0), ids_TK, gates_TK, again)

    bug.around(AllToAllDispatcher, "dispatch_begin", dispatch)


@mutation(
    "huggingface/transformers#48687: the router collects gradient for slots of other ranks",
    "experts",
    BACKWARD,
    "router",
)
def gate_gradients_of_slots_elsewhere(bug: Seams) -> None:
    def by_token(original, self, plan, side_CX):
        grads_TK = original(self, plan, side_CX)
        elsewhere = plan.ids_TK // (self.experts // self.links[0].size) != self.links[0].rank
        return grads_TK + grads_TK.roll(1, 0) * elsewhere

    bug.around(AllToAllDispatcher, "_gate_grads_by_token", by_token)


@mutation(OURS + ": results of a token's experts are averaged", "experts", FORWARD, "moe")
def results_averaged(bug: Seams) -> None:
    def finish_back(original, self, flight, transfer):
        rows_TD, side_CX = original(self, flight, transfer)
        return rows_TD / flight.plan.ids_TK.size(1), side_CX

    bug.around(ChainDispatcher, "_finish_back", finish_back)


@mutation(
    OURS + ": gradients of results come in another order than the rows", "experts", BACKWARD, "moe|experts|router"
)
def gradients_of_other_rows(bug: Seams) -> None:
    def finish_out(original, self, flight, transfer, gradient=False):
        rows_RD, side_MX = original(self, flight, transfer, gradient)
        return (rows_RD.roll(1, 0) if gradient else rows_RD), side_MX

    bug.around(ChainDispatcher, "_finish_out", finish_out)


@mutation(
    "pytorch/pytorch#160285: gradients of rows grow by the number of ranks", "experts", BACKWARD, "layers|mtp|norm"
)
def gradients_of_rows_doubled(bug: Seams) -> None:
    def start_back(original, self, flight, rows_RD, side_MX):
        return original(self, flight, rows_RD if side_MX is None else 2 * rows_RD, side_MX)

    bug.around(ChainDispatcher, "_start_back", start_back)


@mutation(OURS + ": results travel back in bf16 where the run is in fp32", "experts", FORWARD, "moe")
def results_rounded_on_their_way_back(bug: Seams) -> None:
    def back_message(original, self, rows_CD, fan, side_MX):
        return original(self, rows_CD.bfloat16().to(rows_CD.dtype), fan, side_MX)

    bug.around(ChainDispatcher, "_back_message", back_message)


@mutation("deepseek-ai/DeepEP#58 asks for it: rows come in another order than their experts", "experts", FORWARD, "moe")
def a_rank_gets_the_rows_of_another_order(bug: Seams) -> None:
    def spread(original, rows_SX, fan):
        return original(rows_SX, fan._replace(source_C=fan.source_C.flip(0)))

    bug.around(dispatcher, "spread", spread)


@mutation(
    "deepseek-ai/DeepEP#48 asks for it: a row that stands for two experts takes the first one's gate",
    "nodes",
    FORWARD,
    "moe",
)
def every_row_has_the_first_gate(bug: Seams) -> None:
    def row_gates(original, self, plan, side_MX):
        entries, plan.entry_of_row = plan.entry_of_row, plan.entry_of_row // 2 * 2
        gates_R = original(self, plan, side_MX)
        plan.entry_of_row = entries
        return gates_R

    bug.around(NodeLimitedDispatcher, "_row_gates", row_gates)


@mutation(OURS + ": gradients of gates go to another entry", "nodes", BACKWARD, "router")
def gate_gradients_of_another_entry(bug: Seams) -> None:
    def by_message(original, self, plan, grads_R):
        return original(self, plan, grads_R).flip(1)

    bug.around(NodeLimitedDispatcher, "_gate_grads_by_message", by_message)


@mutation("huggingface/transformers#48205: gradients of gates are those of one node", "nodes", BACKWARD, "router")
def gate_gradients_of_the_last_node(bug: Seams) -> None:
    def by_token(_, self, plan, side_CX):
        fan = plan.fans[0]
        last_S = torch.cat([fan.start_S[1:], fan.start_S.new_tensor([len(fan.copy_C)])]) - 1
        return side_CX.index_select(0, fan.copy_C[last_S])

    bug.around(NodeLimitedDispatcher, "_gate_grads_by_token", by_token)


@mutation(
    OURS + ": the forwarding rank sends on the last of a token's results instead of their sum",
    "two hops",
    FORWARD,
    "moe",
)
def one_result_of_a_node(bug: Seams) -> None:
    def collect(original, rows_CX, fan, out_SX=None):
        last_S = torch.cat([fan.start_S[1:], fan.start_S.new_tensor([len(fan.copy_C)])]) - 1
        last_SX = rows_CX.index_select(0, fan.copy_C[last_S])
        return last_SX if out_SX is None else out_SX.copy_(last_SX)

    bug.around(dispatcher, "collect", collect)


@mutation(OURS + ": gradients of gates are lost at a forwarding rank", "two hops", BACKWARD, "router")
def gate_gradients_lost_at_the_forwarder(bug: Seams) -> None:
    def start_back(original, self, flight, rows_RD, side_MX):
        if side_MX is not None:
            side_MX = side_MX * (torch.arange(len(side_MX)) % 2).unsqueeze(1)
        return original(self, flight, rows_RD, side_MX)

    bug.around(ChainDispatcher, "_start_back", start_back)
