"""Bugs that training systems really had, put into ours on purpose: a certificate that misses one proves nothing.

Each is a function that patches the product in the processes of the ranks, and says who had the bug and where a certificate
should point: a part of the name of the layer or tensor, and the phase. The layout is the smallest in which the bug shows. To
add one, write a function with `@mutation(...)`; the test and `python -m bench.prove --mutations` find it.

Sources are threads on GitHub, as owner/repository#number.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from parallel.expert.all_to_all import AllToAllDispatcher
from parallel.pipeline.schedule import Pipeline
from parallel.zero.engine import Zero
from parallel.zero.whole_weights import WholeWeights
from train.loop import step as training_step
from train.loop.state import State
from train.model import rope, router, routing
from train.model.deepseek import DeepSeekV3, Head
from train.model.mtp import MTP
from train.model.recompute import Recomputed
from train.model.rope import Rope
from train.optim.adamw import AdamW
from train.optim.schedules import Schedules
from train.precision.high import HighPrecision
from train.prove.findings import Difference

Patch = pytest.MonkeyPatch

FORWARD, BACKWARD, REDUCTION, UPDATE, SETTINGS, RESUME = (
    "forward",
    "backward",
    "reduction",
    "update",
    "settings",
    "resume",
)


@dataclass(frozen=True)
class Mutation:
    """One bug."""

    name: str
    had: str
    """Who had it, and what it was."""
    layout: str
    """One of LAYOUTS."""
    phases: tuple[str, ...]
    """In which a certificate may see it first."""
    layer: str
    """Regular expression for the layer or tensor that a certificate may name."""
    apply: Callable[[Patch], None]

    @property
    def proof(self) -> str:
        """The first pass of a proof in which it shows."""
        return "exact" if set(self.phases) <= {FORWARD, BACKWARD} else "fp32"

    def phase_is_right(self, first: Difference) -> bool:
        return bool(phases_of(first) & set(self.phases))

    def layer_is_right(self, first: Difference) -> bool:
        return bool(self.layer) and re.search(self.layer, f"{first.quantity} {first.name}") is not None


def phases_of(first: Difference) -> set[str]:
    """What the phase of a certificate is called here, where two more are told apart."""
    found = {first.phase}
    if first.phase == "backward" and first.proof != "exact":
        found.add(REDUCTION)  # what the ranks had each for itself, the pass before has proven
    if first.phase == "checkpoint" or first.part > 0:
        found.add(RESUME)
    return found


MUTATIONS: dict[str, Mutation] = {}

MODEL = {
    "vocab_size": 53, "hidden": 16, "layers": 3, "dense_layers": 1, "heads": 2, "q_rank": 8, "kv_rank": 8,
    "nope_head_dim": 8, "rope_head_dim": 4, "v_head_dim": 6, "dense_width": 24, "expert_width": 8, "experts": 8,
    "top_k": 2, "groups": 4, "top_groups": 2, "group_top_k": 2, "mtp_depth": 2, "loss_chunk": 7, "init_std": 0.2,
    "recompute": "[norm,mla_up,swiglu]", "yarn.always": "true", "yarn.original_seq_len": 6,
}  # fmt: skip
BASE = [
    *(f"model.{key}={value}" for key, value in MODEL.items()),
    "mode=prove", "steps=4", "precision=fp32", "precision.moments=fp32", "seq_len=12", "batch_size=12", "micro_batch_size=1",
    "data.mask_documents=true", "optim.clip=0.1", "optim.warmup_steps=2", "optim.batch_ramp_start=8",
    "optim.batch_ramp_steps=1", "optim.batch_ramp_increment=4", "optim.bias_speed=[{until: 1.0, value: 0.02}]",
    "optim.balance_loss=0.01", "cluster.threads=1", "cluster.device=cpu", "cluster.compiled=false",
]  # fmt: skip
"""Everything that a mutation may need is switched on, in the smallest sizes."""
LAYOUTS = {
    "experts": [*BASE, "parallel.dp=2", "parallel.ep=2"],
    "copies": [*BASE, "parallel.dp=2"],
    "pipeline": [*BASE, "parallel.pp=2"],
    "layers again": [*BASE, "parallel.dp=2", "parallel.ep=2", "model.recompute=[layer]"],
}


def mutation(
    had: str, layout: str, phases: str | tuple[str, ...], layer: str
) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def register(apply: Callable[[Patch], None]) -> Callable[[Patch], None]:
        found = (phases,) if isinstance(phases, str) else phases
        MUTATIONS[apply.__name__] = Mutation(apply.__name__, had, layout, found, layer, apply)
        return apply

    return register


def around(patch: Patch, owner: object, name: str, wrapper: Callable) -> None:
    """Replace owner.name by wrapper(original, *arguments)."""
    original = getattr(owner, name)
    held = vars(owner).get(name) if isinstance(owner, type) else None

    @wraps(original)
    def replaced(*arguments, **keywords):
        return wrapper(original, *arguments, **keywords)

    patch.setattr(owner, name, staticmethod(replaced) if isinstance(held, staticmethod) else replaced)


# --- Norm, reduction and clipping -----------------------------------------------------------------------------------


def norm_over(patch: Patch, squares: Callable[[Zero, list[tuple[str, float]]], float]) -> None:
    """Let the norm be the root of what `squares` makes, on every rank, of (name, sum of squares) of its gradients."""

    def global_norm(original, self):
        original(self)
        found = [(self.names[p], float(g.double().square().sum()) / d**2) for p, g, d in self._weights.gradients()]
        total = torch.tensor(squares(self, found), dtype=torch.float64)
        dist.all_reduce(total)
        self._norm = total.sqrt().float()
        return self._norm

    around(patch, Zero, "_global_norm", global_norm)


@mutation("NVIDIA/Megatron-LM#5916, laekov/fastmoe#29: norm omits experts", "experts", UPDATE, "norm")
def norm_without_experts(patch: Patch) -> None:
    norm_over(patch, lambda zero, found: sum(square for name, square in found if ".experts." not in name))


@mutation("deepspeedai/DeepSpeed#8475: norms of ranks with other experts averaged", "experts", UPDATE, "norm")
def norm_averaged_over_ranks(patch: Patch) -> None:
    norm_over(patch, lambda zero, found: sum(square for _, square in found) / zero.mesh.layout.world)


@mutation("pytorch/torchtitan#4488 takes care of it: a shared embedding counts twice", "pipeline", UPDATE, "norm")
def norm_counts_the_tied_embedding_twice(patch: Patch) -> None:
    norm_over(patch, lambda zero, found: sum(square for _, square in found))


@mutation("huggingface/transformers#48205: rows behind the real ones hold what was in memory", "copies", UPDATE, "norm")
def norm_with_the_padding_of_zero(patch: Patch) -> None:
    norm_over(patch, lambda zero, found: sum(square for _, square in found) + 0.25)


@mutation("sgl-project/SpecForge#663, areal-project/AReaL#312: clipped by the norm of the rank's own part", "copies",
          (REDUCTION, UPDATE), "norm|gradient")  # fmt: skip
def clipped_before_the_reduction(patch: Patch) -> None:
    def keep_unshared(original, self):
        grads = [param.grad for group in self._groups for param in group]
        norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
        for grad in grads:
            grad.mul_(min(1.0, self._clip / float(norm)))
        original(self)

    around(patch, WholeWeights, "_keep_unshared", keep_unshared)


@mutation("pytorch/pytorch#160285: gradients of experts doubled by ep=2", "experts", REDUCTION, "experts")
def expert_gradients_not_divided(patch: Patch) -> None:
    def keep_unshared(original, self):
        for group in self._groups:
            for param in group:
                if not getattr(param, "allreduce", True):
                    param.grad.mul_(2)
        original(self)

    around(patch, WholeWeights, "_keep_unshared", keep_unshared)


@mutation("EleutherAI/gpt-neox#1004: a gradient is reduced before its last part is there", "copies", REDUCTION, "")
def a_gradient_reduced_too_early(patch: Patch) -> None:
    def keep_unshared(original, self):
        self._groups[0][-1].grad.mul_(0.5)
        original(self)

    around(patch, WholeWeights, "_keep_unshared", keep_unshared)


@mutation(
    "NVIDIA/Megatron-LM#4609: the buffer of gradients holds something when a step begins", "copies", REDUCTION, ""
)
def gradients_not_cleared(patch: Patch) -> None:
    kept: dict[torch.nn.Parameter, torch.Tensor] = {}

    def keep_unshared(original, self):
        for param in self._groups[0]:
            before, now = kept.get(param), param.grad.clone()
            if before is not None:
                param.grad.add_(before, alpha=0.1)
            kept[param] = now
        original(self)

    around(patch, WholeWeights, "_keep_unshared", keep_unshared)


@mutation(
    "NVIDIA/Megatron-LM#844: gradients of a shared embedding summed wrongly over the ends",
    "pipeline",
    REDUCTION,
    "embedding",
)
def tied_embedding_summed_twice(patch: Patch) -> None:
    def sum_tied(original, self):
        original(self)
        original(self)

    around(patch, Zero, "_sum_tied", sum_tied)


@mutation(
    "NVIDIA-NeMo/Megatron-Bridge#5380: the embedding of MTP is in no group and drifts away",
    "pipeline",
    REDUCTION,
    "embedding",
)
def tied_embedding_not_summed(patch: Patch) -> None:
    patch.setattr(Zero, "_sum_tied", lambda self: None)


# --- Losses and micro-batches ---------------------------------------------------------------------------------------


@mutation(
    "verl-project/verl#3332, NVIDIA-NeMo/RL#84: losses of micro-batches summed, not averaged",
    "copies",
    BACKWARD,
    "head|norm|mtp",
)
def micro_batches_not_averaged(patch: Patch) -> None:
    def make_schedule(original, self, micro_batches, *sizes):
        schedule = original(self, micro_batches, *sizes)
        schedule._loss_fn = lambda loss, _: loss.sum()
        return schedule

    around(patch, Pipeline, "_make_schedule", make_schedule)


@mutation(
    "karpathy/nanoGPT#605 asks for it: the last micro-batch of a step has another weight",
    "pipeline",
    BACKWARD,
    "head|norm|mtp",
)
def last_micro_batch_unscaled(patch: Patch) -> None:
    def make_schedule(original, self, micro_batches, *sizes):
        schedule = original(self, micro_batches, *sizes)
        seen = [0]

        def loss_fn(loss, _):
            seen[0] += 1
            return loss.sum() / (1 if seen[0] % micro_batches == 0 else micro_batches)

        schedule._loss_fn = loss_fn
        return schedule

    around(patch, Pipeline, "_make_schedule", make_schedule)


@mutation("NVIDIA-NeMo/Automodel#1408: the gradient of the balance loss never flows", "experts", BACKWARD, "router")
def balance_loss_detached(patch: Patch) -> None:
    def backward(original, ctx, *grads):
        ctx.balance_weight = 0.0
        return original(ctx, *grads)

    around(patch, routing.Route, "backward", backward)


@mutation("NVIDIA/Megatron-LM#3672: the balance loss shrinks with the number of data-parallel ranks", "copies",
          (FORWARD, BACKWARD), "router|balance")  # fmt: skip
def balance_loss_divided_by_ranks(patch: Patch) -> None:
    def set_weights(original, self, *arguments):
        original(self, *arguments)
        for one in self.measure.routers.values():
            one.balance_weight /= 2

    around(patch, training_step.TrainingStep, "_set_weights", set_weights)


@mutation("radixark/miles#2215: the targets of MTP one position off", "copies", FORWARD, "mtp")
def mtp_targets_shifted_by_one(patch: Patch) -> None:
    def forward(original, self, states, tokens_BS, positions):
        found = original(self, states[:1], tokens_BS, positions)
        for depth, hidden_BTD in enumerate(states[1:], 1):  # the head's first target is the second of its tokens
            found += original(self, [hidden_BTD], tokens_BS[:, depth - 1 : -1], positions)
        return found

    around(patch, Head, "forward", forward)


@mutation(
    "pytorch/torchtitan#3392 discusses which token: MTP gets the embedding of the token before",
    "pipeline",
    FORWARD,
    "mtp",
)
def mtp_embedding_one_token_early(patch: Patch) -> None:
    def forward(original, self, hidden_BTD, embedding_BTD, documents_BT):
        return original(self, hidden_BTD, embedding_BTD.roll(1, 1), documents_BT)

    around(patch, MTP, "forward", forward)


@mutation("NVIDIA/Megatron-LM#1532: the losses of MTP depths summed, not averaged", "copies", BACKWARD, "mtp|head")
def mtp_losses_not_averaged(patch: Patch) -> None:
    def set_weights(original, self, *arguments):
        original(self, *arguments)
        if self.measure.last is not None:
            self.measure.last.mtp_weight *= 2

    around(patch, training_step.TrainingStep, "_set_weights", set_weights)


@mutation(
    "verl-project/verl#6432, radixark/Megatron-LM#13: MTP trains behind a detached model",
    "copies",
    BACKWARD,
    r"layers\.|norm|embedding",
)
def mtp_detached(patch: Patch) -> None:
    def forward(original, self, hidden_BTD, embedding_BTD, documents_BT):
        return original(self, hidden_BTD.detach(), embedding_BTD, documents_BT)

    around(patch, MTP, "forward", forward)


# --- Router and experts ---------------------------------------------------------------------------------------------


@mutation(
    "vllm-project/vllm#12002, huggingface/transformers#41647: gates from the biased scores",
    "copies",
    FORWARD,
    "moe|mtp|loss",
)
def bias_in_the_gate(patch: Patch) -> None:
    def forward(original, ctx, logits_BTE, bias_E, *rest):
        biased = (logits_BTE.sigmoid() + bias_E).clamp(1e-6, 1 - 1e-6)
        return original(ctx, biased.logit(), torch.zeros_like(bias_E), *rest)

    around(patch, routing.Route, "forward", forward)


@mutation(
    "sgl-project/sglang-jax#1282, vllm-project/vllm#23123: routed_scaling_factor skipped",
    "copies",
    FORWARD,
    "moe|layers",
)
def route_scale_skipped(patch: Patch) -> None:
    def forward(original, ctx, logits_BTE, bias_E, rule, *rest):
        return original(ctx, logits_BTE, bias_E, rule._replace(route_scale=1.0), *rest)

    around(patch, routing.Route, "forward", forward)


@mutation("EricLBuehler/mistral.rs#1278: groups chosen by another rule", "copies", FORWARD, "load|moe|layers")
def groups_by_their_best_expert(patch: Patch) -> None:
    def choose(original, biased_BTE, rule):
        return original(biased_BTE, rule._replace(group_top_k=1))

    around(patch, routing, "choose", choose)


@mutation(
    "vllm-project/llm-compressor#1907: scores applied before the experts where they belong behind",
    "experts",
    FORWARD,
    "moe|layers",
)
def gate_on_the_input_of_experts(patch: Patch) -> None:
    def expert_ffn(original, self, rows_RD, gates_R, *rest):
        return original(self, rows_RD * gates_R.unsqueeze(-1).to(rows_RD.dtype), torch.ones_like(gates_R), *rest)

    around(patch, HighPrecision, "expert_ffn", expert_ffn)


@mutation(
    "pytorch/torchtitan#1166, meta-pytorch/MSLK#158: experts without rows",
    "experts",
    (FORWARD, BACKWARD),
    "experts|moe|layers",
)
def empty_expert_dropped(patch: Patch) -> None:
    def expert_ffn(original, self, *operands):
        *others, counts_E = operands
        filled = counts_E[counts_E > 0]
        return original(self, *others, F.pad(filled, (0, len(counts_E) - len(filled))))

    around(patch, HighPrecision, "expert_ffn", expert_ffn)


@mutation(
    "huggingface/transformers#48205: a rank's gradient of the scores covers its own experts alone",
    "experts",
    BACKWARD,
    "router|layers",
)
def gate_gradients_of_other_ranks_missing(patch: Patch) -> None:
    def by_token(original, self, plan, side_CX):
        grads_TK = original(self, plan, side_CX)
        mine = plan.ids_TK // (self.experts // self.links[0].size) == self.links[0].rank
        return grads_TK * mine

    around(patch, AllToAllDispatcher, "_gate_grads_by_token", by_token)


@mutation(
    "deepseek-ai/DeepEP#58 asks for it: rows come in another order than their experts", "experts", FORWARD, "moe|layers"
)
def gates_of_other_rows(patch: Patch) -> None:
    def row_gates(original, self, plan, side_MX):
        return original(self, plan, side_MX).roll(1)

    around(patch, AllToAllDispatcher, "_row_gates", row_gates)


@mutation(
    "pytorch/torchtitan#1593, NVIDIA-NeMo/Automodel#3247: recomputation counts tokens again", "copies", FORWARD, "load"
)
def loads_counted_twice(patch: Patch) -> None:
    def forward(original, self, *arguments):
        before = self.load_E.clone()
        result = original(self, *arguments)
        self.load_E.add_(self.load_E - before)
        return result

    around(patch, router.Router, "forward", forward)


@mutation(
    "NVIDIA-NeMo/Automodel#3247: a layer that runs again counts its tokens again", "layers again", FORWARD, "load"
)
def loads_counted_in_the_second_run(patch: Patch) -> None:
    patch.setattr(routing, "is_repeated", lambda: False)


@mutation(
    "NVIDIA-NeMo/Automodel#3140, #3325: a layer that runs again sends other rows to its experts than before",
    "layers again",
    BACKWARD,
    "layers|mtp",
)
def second_run_routed_by_other_rows(patch: Patch) -> None:
    def dispatch(original, self, x_TD, ids_TK, gates_TK, again=None):
        return original(self, x_TD if again is None else x_TD.roll(1, 0), ids_TK, gates_TK, again)

    around(patch, AllToAllDispatcher, "dispatch_begin", dispatch)


@mutation("pytorch/torchtitan#1593: one update of the bias for every count of the tokens", "copies", UPDATE, "bias")
def bias_updated_twice(patch: Patch) -> None:
    def update(original, *arguments):
        original(*arguments)
        original(*arguments)

    around(patch, training_step, "update_bias", update)


@mutation("AI-Hypercomputer/maxtext#2494: a routing bias that nothing updates", "copies", UPDATE, "bias")
def bias_of_mtp_not_updated(patch: Patch) -> None:
    def update_biases(original, self, measured, plan):
        routers = self.measure.routers
        self.measure.routers = {name: one for name, one in routers.items() if not name.startswith("mtp")}
        original(self, measured, plan)
        self.measure.routers = routers

    around(patch, training_step.TrainingStep, "_update_biases", update_biases)


@mutation("gfyddha/FlyLoRA#1: loads compared with a mean of another unit", "copies", UPDATE, "bias")
def bias_follows_a_wrong_mean(patch: Patch) -> None:
    def update(original, bias_E, load_E, speed):
        bias_E.add_(torch.sign(1 / len(load_E) - load_E).to(bias_E.dtype), alpha=speed)

    around(patch, training_step, "update_bias", update)


# --- Attention ------------------------------------------------------------------------------------------------------


@mutation(
    "huggingface/optimum-intel#1877: RoPE turns halves where the weights want neighbours",
    "copies",
    FORWARD,
    r"attention|layers\.0",
)
def rope_pairs_the_halves(patch: Patch) -> None:
    def rotate(original, x_BTHR, table):
        halves = x_BTHR.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return original(halves, table).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)

    around(patch, rope, "rotate", rotate)


@mutation(
    "NVIDIA/Megatron-LM#1429, onnxruntime/mobius#548: YaRN's factor on the scores is missing",
    "copies",
    FORWARD,
    r"attention|layers\.0",
)
def softmax_scale_without_yarn(patch: Patch) -> None:
    def scale(self):
        return (self._config.nope_head_dim + self._config.rope_head_dim) ** -0.5

    patch.setattr(Rope, "softmax_scale", property(scale))


@mutation(
    "NVIDIA/Megatron-LM#5643, pytorch/torchtitan#4801: attention across packed documents",
    "pipeline",
    FORWARD,
    r"attention|layers\.0",
)
def documents_not_masked(patch: Patch) -> None:
    def run_layers(original, self, hidden_BTD, documents_BT):
        return original(self, hidden_BTD, None)

    around(patch, DeepSeekV3, "_run_layers", run_layers)


@mutation("vllm-project/speculators#621: MTP attends across documents", "copies", FORWARD, "mtp")
def documents_not_masked_in_mtp(patch: Patch) -> None:
    def forward(original, self, hidden_BTD, embedding_BTD, documents_BT):
        return original(self, hidden_BTD, embedding_BTD, None)

    around(patch, MTP, "forward", forward)


@mutation(
    "NVIDIA-NeMo/Automodel#3140, #2635: recomputation does not give what the forward gave",
    "copies",
    BACKWARD,
    r"layers|mtp",
)
def recomputation_differs(patch: Patch) -> None:
    around(patch, Recomputed, "make", lambda original, *arguments: original(*arguments) * 1.01)


# --- Update ---------------------------------------------------------------------------------------------------------


@mutation(
    "NVIDIA/Megatron-LM#950: a layer computes with the weights of the step before",
    "copies",
    (UPDATE, FORWARD),
    "head|norm",
)
def stale_weights(patch: Patch) -> None:
    def step(original, self, valid=True):
        held = [(param, param.detach().clone()) for param, name in self.names.items() if name == "head.weight"]
        update = original(self, valid)
        with torch.no_grad():
            for param, before in held:
                param.copy_(before)
        return update

    around(patch, Zero, "step", step)


@mutation("ServiceNow/Fast-LLM#545: gains of norms decay", "copies", UPDATE, "norm")
def gains_decay(patch: Patch) -> None:
    from train import parallelize

    patch.setattr(parallelize, "decays", lambda name, param: True)


@mutation("pytorch/torchtitan#4382: Adam's count is one ahead, and so its bias correction", "copies", UPDATE, "master")
def adam_counts_one_ahead(patch: Patch) -> None:
    def step(original, self, closure=None):
        self.updates += 1
        original(self)
        self.updates -= 1

    around(patch, AdamW, "step", step)


@mutation(
    "NVIDIA-NeMo/Megatron-Bridge#5399, verl-project/verl#3674: the rate lags one step behind", "copies", SETTINGS, "lr"
)
def rate_of_the_step_before(patch: Patch) -> None:
    def plan(original, self, step, shift=0):
        return replace(original(self, step, shift), lr=original(self, max(1, step - 1), shift).lr * (step > 1))

    around(patch, Schedules, "plan", plan)


# --- Resuming -------------------------------------------------------------------------------------------------------


@mutation(
    "verl-project/verl#7401, modelscope/ms-swift#10050: the data do not go on where they ended",
    "copies",
    RESUME,
    "first_sample",
)
def resumed_one_sample_off(patch: Patch) -> None:
    def finish_load(original, self, meta, with_ema):
        original(self, meta | {"samples": meta["samples"] + 1}, with_ema)

    around(patch, State, "finish_load", finish_load)


@mutation("flagos-ai/FlagScale#411: balance biases are not in the checkpoint", "copies", RESUME, "bias")
def biases_lost_in_the_checkpoint(patch: Patch) -> None:
    def finish_load(original, self, meta, with_ema):
        original(self, meta, with_ema)
        for one in self.routers.values():
            one.bias_E.zero_()

    around(patch, State, "finish_load", finish_load)


@mutation(
    "areal-project/AReaL#1468, deepspeedai/DeepSpeed#564: Adam starts to count again",
    "copies",
    RESUME,
    "updates|master",
)
def adam_count_lost_in_the_checkpoint(patch: Patch) -> None:
    def finish_load(original, self, meta, with_ema):
        original(self, meta | {"updates": 0}, with_ema)

    around(patch, State, "finish_load", finish_load)


@mutation("LBANN/lbann#1510: one of the two moments is not handed on", "copies", RESUME, "exp_avg")
def moments_lost_in_the_checkpoint(patch: Patch) -> None:
    def finish_load(original, self, meta, with_ema):
        original(self, meta, with_ema)
        for name, shard in self.zero.shards().items():
            if name.startswith("exp_avg_sq."):
                shard.local.zero_()

    around(patch, State, "finish_load", finish_load)
