"""Code that a judge could share with the product: the rules of the optimizers, and the initial weights of a run."""

import re
from dataclasses import replace
from functools import cache

import torch

from conf import optimizers
from conf.optimizers import OptimizerFacts
from conf.schema import Fp8, Model, Optim
from tests.prove.mutations.registry import FORWARD, OURS, SETTINGS, UPDATE, mutation
from tests.prove.mutations.seams import Seams
from train.model import adapter, init
from train.model.adapter import LoraWeights
from train.model.init import draw_uniform
from train.model.layers import RMSNorm
from train.optim import schedules
from train.optim.schedules import Schedules

START, DRAWN = "start", "initial weights"


@mutation(OURS + ": Muon takes routers as matrices", "muon", START, "state .*router")
def routers_by_muon(bug: Seams) -> None:
    bug.value(optimizers, "TABLE", re.compile(r"^(embedding|head)\."))


@mutation(OURS + ": Muon takes embedding and head as matrices", "muon", START, "state .*(embedding|head)")
def tables_by_muon(bug: Seams) -> None:
    bug.value(optimizers, "TABLE", re.compile(r"\.router\."))


@mutation(OURS + ": Muon takes the head as a matrix", "muon", START, "state .*head")
def head_by_muon(bug: Seams) -> None:
    bug.value(optimizers, "TABLE", re.compile(r"^embedding\.|\.router\."))


@mutation(OURS + ": AdamW takes the experts of Muon", "muon experts", START, "state .*experts")
def experts_by_adamw(bug: Seams) -> None:
    bug.value(optimizers, "TABLE", re.compile(r"^(embedding|head)\.|\.router\.|\.experts\."))


@mutation(OURS + ": AdamW takes all weights of Muon", "muon", START, "state")
def all_by_adamw(bug: Seams) -> None:
    bug.value(optimizers, "TABLE", re.compile(""))


def with_facts(bug: Seams, **changes) -> None:
    """Facts of the optimizer whose rules of vectors or matrices have other values."""

    @cache
    def changed(facts: OptimizerFacts) -> OptimizerFacts:
        return replace(facts, **{name: replace(getattr(facts, name), **values) for name, values in changes.items()})

    bug.around(Optim, "facts", lambda original, self: changed(original(self)))


@mutation(OURS + ": norm weights decay by the table of optimizers", "copies", UPDATE, "decay|master")
def norm_weights_decay_by_rule(bug: Seams) -> None:
    with_facts(bug, vectors={"decays": True})


@mutation(OURS + ": no matrix decays by the table of optimizers", "copies", UPDATE, "decay|master")
def no_matrix_decays_by_rule(bug: Seams) -> None:
    with_facts(bug, matrices={"decays": False})


def drawn(bug: Seams, change) -> None:
    """change(weight, key, std) after a weight was drawn."""

    def draw(original, weight, key, std, experts=None):
        original(weight, key, std, experts)
        change(weight, key, std)

    bug.around(init, "draw_normal", draw)


@mutation(OURS + ": first weights are ten times as large", "copies", START, DRAWN)
def first_weights_times_10(bug: Seams) -> None:
    drawn(bug, lambda weight, key, std: weight.mul_(10))


@mutation(OURS + ": first weights have the variance for a deviation", "copies", START, DRAWN)
def first_weights_by_variance(bug: Seams) -> None:
    drawn(bug, lambda weight, key, std: weight.mul_(std))


@mutation(OURS + ": first weights are uniform", "copies", START, DRAWN)
def first_weights_uniform(bug: Seams) -> None:
    drawn(bug, lambda weight, key, std: draw_uniform(weight, key, std * 3**0.5))


@mutation(OURS + ": first weights are never negative", "copies", START, DRAWN)
def first_weights_without_signs(bug: Seams) -> None:
    drawn(bug, lambda weight, key, std: weight.abs_())


@mutation(OURS + ": the embedding begins with a deviation of 1", "copies", START, f"{DRAWN} .*embedding")
def embedding_drawn_with_1(bug: Seams) -> None:
    drawn(bug, lambda weight, key, std: weight.div_(std) if key.endswith("/embedding.weight") else None)


@mutation(OURS + ": the head begins with zeros", "copies", START, f"{DRAWN} .*head")
def head_of_zeros(bug: Seams) -> None:
    drawn(bug, lambda weight, key, std: weight.zero_() if key.endswith("/head.weight") else None)


@mutation(OURS + ": what is added to the residual is drawn smaller by depth", "copies", START, f"{DRAWN} .*(out|w2)")
def residual_outputs_scaled(bug: Seams) -> None:
    drawn(
        bug, lambda weight, key, std: weight.div_(6**0.5) if key.endswith(("out.weight", "w2.weight", "w2")) else None
    )


@mutation(OURS + ": norm weights begin with 0", "copies", START, f"{DRAWN} .*norm")
def norm_weights_of_0(bug: Seams) -> None:
    def draw(original, module, weight, name, seed, std):
        original(module, weight, name, seed, std)
        if isinstance(module, RMSNorm):
            weight.data.zero_()

    bug.around(init, "_draw_weight", draw)


@mutation(OURS + ": all experts begin alike", "experts", START, f"{DRAWN} .*experts")
def experts_begin_alike(bug: Seams) -> None:
    def fill(original, weight, key, experts, draw):
        original(weight, key, experts, draw)
        if experts is not None:
            weight.copy_(weight[:1].expand_as(weight).clone())

    bug.around(init, "_fill_drawn", fill)


@mutation(OURS + ": gate and up projection begin alike", "copies", START, f"{DRAWN} .*w13")
def gate_and_up_begin_alike(bug: Seams) -> None:
    def change(weight, key, std):
        if "w13" in key:
            half = weight.size(-2) // 2
            weight[..., half:, :] = weight[..., :half, :]

    drawn(bug, change)


@mutation(OURS + ": B begins with 0.02", "adapters", START, f"{DRAWN} .*lora_B")
def second_factor_of_002(bug: Seams) -> None:
    def start(original, self, module, names, section, kernels, chunk, salt):
        original(self, module, names, section, kernels, chunk, salt)
        for name in names:
            getattr(module, name.b).data.fill_(0.02)

    bug.around(LoraWeights, "__init__", start)


@mutation(OURS + ": A begins within 1 / inputs", "adapters", START, f"{DRAWN} .*lora_A")
def first_factor_within_1_over_inputs(bug: Seams) -> None:
    bug.around(
        adapter,
        "draw_uniform",
        lambda original, weight, key, bound, experts=None: original(weight, key, bound**2, experts),
    )


@mutation(OURS + ": A begins normal, as weights do", "adapters", START, f"{DRAWN} .*lora_A")
def first_factor_normal(bug: Seams) -> None:
    def draw(original, weight, key, bound, experts=None):
        weight.copy_(bound * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(key))))

    bug.around(adapter, "draw_uniform", draw)


SCHEDULED = "settings of all steps lr"


@mutation(OURS + ": the last phase of a schedule never comes", "phases", SETTINGS, SCHEDULED, "fp32")
def last_phase_never_comes(bug: Seams) -> None:
    bug.around(
        schedules,
        "value_at",
        lambda original, phases, share: original(
            phases[:-1] or phases, min(share, phases[-2 if len(phases) > 1 else -1].until)
        ),
    )


@mutation(OURS + ": a cosine ends at the middle of its phase", "phases", SETTINGS, SCHEDULED, "fp32")
def cosine_of_half_a_phase(bug: Seams) -> None:
    bug.around(
        schedules,
        "_between",
        lambda original, shape, before, after, done: original(shape, before, after, min(1.0, 2 * done)),
    )


@mutation(OURS + ": a phase begins at 0, not at the value before it", "phases", SETTINGS, SCHEDULED, "fp32")
def phases_begin_at_0(bug: Seams) -> None:
    bug.around(schedules, "_between", lambda original, shape, before, after, done: original(shape, 0.0, after, done))


@mutation(OURS + ": the ramp of batches is one step late", "copies", SETTINGS, "settings of all steps|batch", "fp32")
def ramp_one_step_late(bug: Seams) -> None:
    bug.around(schedules, "_batch_size", lambda original, config, index: original(config, max(0, index - 1)))


@mutation(OURS + ": the warmup ends a step late", "copies", SETTINGS, "settings of all steps lr", "fp32")
def warmup_ends_late(bug: Seams) -> None:
    def plan(original, self, step, shift=0):
        made = original(self, step, shift)
        warmup = self.config.optim.warmup_steps
        return replace(made, lr=made.lr * warmup / (warmup + 1)) if step == warmup else made

    bug.around(Schedules, "plan", plan)


# --- What follows from the values of a recipe ---------------------------------------------------------------------------


@mutation(OURS + ": norms of latents forget their own eps", "eps of latents", FORWARD, "output|layers|mtp|loss")
def latents_without_their_eps(bug: Seams) -> None:
    bug.around(Model, "resolved_latent_norm_eps", lambda original, self: self.norm_eps)


@mutation(OURS + ": groups of experts are scored by their best expert", "copies", FORWARD, "chosen experts|moe|router")
def groups_by_their_best(bug: Seams) -> None:
    bug.around(Model, "resolved_group_top_k", lambda original, self: 1)


@mutation(
    OURS + ": the attention's output is cast as other inputs are", "fp8", FORWARD, "matmuls .*attention.out", "recipe"
)
def attention_output_cast_as_others(bug: Seams) -> None:
    bug.around(
        Fp8, "operands", lambda original, self, family: original(self, "dense" if family == "output" else family)
    )


@mutation(
    OURS + ": what travels to experts is cast as other inputs are", "fp8", FORWARD, "matmuls of experts", "recipe"
)
def dispatched_cast_as_others(bug: Seams) -> None:
    bug.around(
        Fp8,
        "operands",
        lambda original, self, family: original(self, "dense" if family.startswith("experts") else family),
    )
