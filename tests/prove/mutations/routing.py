"""The router: scores, groups, gates and their gradients."""

import torch

from tests.prove.mutations.registry import BACKWARD, FORWARD, OURS, mutation
from tests.prove.mutations.seams import Seams
from train.kernels.plain import routing
from train.model import router


@mutation(
    "vllm-project/vllm#12002, huggingface/transformers#41647: gates from the biased scores",
    "copies",
    FORWARD,
    "moe|mtp|loss",
)
def bias_in_the_gate(bug: Seams) -> None:
    def forward(original, ctx, logits_BTE, bias_E, *rest):
        biased = (logits_BTE.sigmoid() + bias_E).clamp(1e-6, 1 - 1e-6)
        return original(ctx, biased.logit(), torch.zeros_like(bias_E), *rest)

    bug.around(routing.Route, "forward", forward)


@mutation(
    "sgl-project/sglang-jax#1282, vllm-project/vllm#23123: routed_scaling_factor skipped",
    "copies",
    FORWARD,
    "moe|layers",
)
def route_scale_skipped(bug: Seams) -> None:
    def forward(original, ctx, logits_BTE, bias_E, rule, *rest):
        return original(ctx, logits_BTE, bias_E, rule._replace(route_scale=1.0), *rest)

    bug.around(routing.Route, "forward", forward)


@mutation("EricLBuehler/mistral.rs#1278: groups chosen by another rule", "copies", FORWARD, "load|moe|layers")
def groups_by_their_best_expert(bug: Seams) -> None:
    def choose(original, biased_BTE, rule):
        return original(biased_BTE, rule._replace(group_top_k=1))

    bug.around(routing, "choose_experts", choose)


@mutation(
    "InternLM/lmdeploy#3030, ggml-org/llama.cpp#11049 has both: scores of a softmax for those of a sigmoid",
    "copies",
    FORWARD,
    "router|experts|moe",
)
def scores_by_softmax(bug: Seams) -> None:
    def forward(original, ctx, logits_BTE, *rest):
        return original(ctx, logits_BTE.softmax(-1).clamp(1e-6, 1 - 1e-6).logit(), *rest)

    bug.around(routing.Route, "forward", forward)


@mutation("ggml-org/llama.cpp#11049 makes it a setting: gates that do not sum to one", "copies", FORWARD, "gates")
def gates_not_normalised(bug: Seams) -> None:
    def forward(original, ctx, logits_BTE, *rest):
        gates_BTK, ids_BTK = original(ctx, logits_BTE, *rest)
        return gates_BTK * logits_BTE.sigmoid().gather(-1, ids_BTK).sum(-1, keepdim=True), ids_BTK

    bug.around(routing.Route, "forward", forward)


@mutation(OURS + ": the last of a token's experts has no weight", "copies", FORWARD, "gates")
def last_gate_dropped(bug: Seams) -> None:
    def forward(original, ctx, *arguments):
        gates_BTK, ids_BTK = original(ctx, *arguments)
        gates_BTK = gates_BTK.clone()
        gates_BTK[..., -1] = 0
        return gates_BTK, ids_BTK

    bug.around(routing.Route, "forward", forward)


@mutation(OURS + ": groups are limited by their number, whatever their scores", "copies", FORWARD, "chosen experts")
def groups_taken_in_order(bug: Seams) -> None:
    def choose(original, biased_BTE, rule):
        open_ones = rule.top_groups * biased_BTE.size(-1) // rule.groups
        closed = torch.zeros_like(biased_BTE).index_fill_(-1, torch.arange(open_ones, biased_BTE.size(-1)), -torch.inf)
        return original(biased_BTE + closed, rule._replace(groups=1, top_groups=1))

    bug.around(routing, "choose_experts", choose)


@mutation(OURS + ": experts chosen without the bias", "copies", FORWARD, "chosen experts")
def chosen_without_the_bias(bug: Seams) -> None:
    def forward(original, ctx, logits_BTE, bias_E, *rest):
        return original(ctx, logits_BTE, torch.zeros_like(bias_E), *rest)

    bug.around(routing.Route, "forward", forward)


@mutation(OURS + ": the gradient of the gates misses what they are divided by", "copies", BACKWARD, "router|layers|mtp")
def gate_gradient_without_the_sum(bug: Seams) -> None:
    def backward(original, ctx, *grads):
        ctx.route_scale = float("inf")
        return original(ctx, *grads)

    bug.around(routing.Route, "backward", backward)


@mutation("TIML-Group/Robust-MoE-Dual-Model#2: the router's weight gets no gradient", "copies", BACKWARD, "router")
def router_without_gradient(bug: Seams) -> None:
    def backward(original, ctx, grad):
        dx_BTD, dweight_ED, rest = original(ctx, grad)
        return dx_BTD, torch.zeros_like(dweight_ED), rest

    bug.around(router._Logits, "backward", backward)


@mutation(OURS + ": the router sees a detached input", "copies", BACKWARD, r"layers|mtp")
def router_sees_a_detached_input(bug: Seams) -> None:
    def backward(original, ctx, grad):
        dx_BTD, *rest = original(ctx, grad)
        return torch.zeros_like(dx_BTD), *rest

    bug.around(router._Logits, "backward", backward)


@mutation(OURS + ": sigmoid's slope is taken of the logits", "copies", BACKWARD, "router")
def slope_of_the_wrong_number(bug: Seams) -> None:
    def backward(original, ctx, *grads):
        dlogits_BTE, *rest = original(ctx, *grads)
        scores_BTE = ctx.saved_tensors[0]
        return dlogits_BTE / (1 - scores_BTE).clamp_min(1e-6), *rest

    bug.around(routing.Route, "backward", backward)
