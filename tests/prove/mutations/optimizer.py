"""The update, the moving average of the weights, and settings that change during the run."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from conf.optimizers import OptimizerFacts
from parallel.zero import engine
from parallel.zero.engine import Zero
from tests.prove.mutations.registry import FORWARD, OURS, SETTINGS, UPDATE, mutation
from tests.prove.mutations.seams import Seams
from train.loop.hooks.averaged_weights import Ema
from train.optim import adamw, schedules
from train.optim.adamw import AdamW
from train.optim.schedules import Schedules


@mutation(
    "NVIDIA/Megatron-LM#950: a layer computes with the weights of the step before",
    "copies",
    (UPDATE, FORWARD),
    "head|main_loss",
)
def stale_weights(bug: Seams) -> None:
    def step(original, self, valid=True):
        held = [(param, param.detach().clone()) for param, name in self.names.items() if name == "head.weight"]
        update = original(self, valid)
        with torch.no_grad():
            for param, before in held:
                param.copy_(before)
        return update

    bug.around(Zero, "step", step)


@mutation("ServiceNow/Fast-LLM#545: gains of norms decay", "copies", UPDATE, "norm")
def gains_decay(bug: Seams) -> None:
    bug.around(OptimizerFacts, "choose_rule", lambda original, self, weight, dims: self.matrices)


@mutation(OURS + ": norm weights that are to decay do not", "norms decay", UPDATE, "norm")
def gains_do_not_decay(bug: Seams) -> None:
    def groups(original, *given):
        return [group | ({"weight_decay": 0.0} if group["name"] == "norms" else {}) for group in original(*given)]

    bug.around(engine, "_parameter_groups", groups)


@mutation("pytorch/torchtitan#4382: Adam's count is one ahead, and so its bias correction", "copies", UPDATE, "master")
def adam_counts_one_ahead(bug: Seams) -> None:
    def step(original, self, closure=None):
        self.updates += 1
        original(self)
        self.updates -= 1

    bug.around(AdamW, "step", step)


def after_the_update(bug: Seams, change: Callable[[AdamW, dict, Tensor, Tensor], None]) -> None:
    """Change flat weights after AdamW's step; given the optimizer, its group, the weights and what they were."""

    def step(original, self, closure=None):
        held = [(group, param, param.clone()) for group in self.param_groups for param in group["params"]]
        original(self)
        with torch.no_grad():
            for group, param, before in held:
                change(self, group, param, before)

    bug.around(AdamW, "step", step)


@mutation(OURS + ": weights stay as they are, at a rate of 1e-6", "tiny rate", UPDATE, "master")
def weights_frozen(bug: Seams) -> None:
    after_the_update(bug, lambda optimizer, group, param, before: param.copy_(before))


@mutation(
    OURS + ": the sign of the gradient in the place of Adam's update, at a rate of 1e-6", "tiny rate", UPDATE, "master"
)
def update_by_signs(bug: Seams) -> None:
    def change(optimizer, group, param, before):
        param.copy_(before * (1 - group["lr"] * group["weight_decay"]))
        param.sub_(group["lr"] * optimizer.state[param]["exp_avg"].sign())

    after_the_update(bug, change)


@mutation(
    "karpathy/nanochat#304, pytorch/pytorch#22628 on where eps belongs: it is inside the root",
    "tiny rate",
    UPDATE,
    "master",
)
def eps_inside_the_root(bug: Seams) -> None:
    def change(optimizer, group, param, before):
        (beta1, beta2), count, state = group["betas"], optimizer.updates + 1, optimizer.state[param]
        root = (state["exp_avg_sq"] / (1 - beta2**count) + group["eps"]).sqrt()
        param.copy_(before * (1 - group["lr"] * group["weight_decay"]))
        param.sub_(group["lr"] / (1 - beta1**count) * state["exp_avg"] / root)

    after_the_update(bug, change)


@mutation(OURS + ": the embedding does not decay", "copies", UPDATE, "embedding")
def embedding_without_decay(bug: Seams) -> None:
    def step(original, self, valid=True):
        held = {name: shard.local.clone() for name, shard in self.shards().items() if name == "master.embedding.weight"}
        update = original(self, valid)
        for name, before in held.items():
            group = self.client.param_groups[0]
            self.shards()[name].local.add_(before, alpha=group["lr"] * group["weight_decay"])
        self._weights.refresh()
        return update

    bug.around(Zero, "step", step)


@mutation(
    "nntrainer/nntrainer#3565, flagos-ai/FlagGems#4988: decay as a part of the gradient",
    "copies",
    UPDATE,
    "master|moments",
)
def decay_in_the_gradient(bug: Seams) -> None:
    def fused(original, operands, group, step):
        weight, grad, *moments = operands
        decayed = grad + group["weight_decay"] * weight
        original([weight, decayed, *moments], group | {"weight_decay": 0.0}, step)

    bug.around(adamw, "_fused", fused)


@mutation("huggingface/transformers#14539: decay of the weights after their update", "loud", UPDATE, "master")
def decay_after_the_update(bug: Seams) -> None:
    def fused(original, operands, group, step):
        original(operands, group | {"weight_decay": 0.0}, step)
        operands[0].mul_(1 - group["lr"] * group["weight_decay"])

    bug.around(adamw, "_fused", fused)


@mutation(OURS + ": decay does not follow the rate", "copies", UPDATE, "master")
def decay_without_the_rate(bug: Seams) -> None:
    def fused(original, operands, group, step):
        decay = group["weight_decay"] * 2e-3 / max(group["lr"], 1e-12)
        original(operands, group | {"weight_decay": decay}, step)

    bug.around(adamw, "_fused", fused)


@mutation(OURS + ": the two betas change places", "copies", UPDATE, "moments|master")
def betas_change_places(bug: Seams) -> None:
    def fused(original, operands, group, step):
        original(operands, group | {"betas": group["betas"][::-1]}, step)

    bug.around(adamw, "_fused", fused)


@mutation("karpathy/nanochat#304: bias correction of the first moment alone", "copies", UPDATE, "master")
def second_moment_not_corrected(bug: Seams) -> None:
    def change(optimizer, group, param, before):
        (beta1, _), state = group["betas"], optimizer.state[param]
        root = state["exp_avg_sq"].sqrt() + group["eps"]
        param.copy_(before * (1 - group["lr"] * group["weight_decay"]))
        param.sub_(group["lr"] / (1 - beta1 ** (optimizer.updates + 1)) * state["exp_avg"] / root)

    after_the_update(bug, change)


@mutation(
    OURS + ": the second moment is that of gradients before they were clipped",
    "copies",
    UPDATE,
    "second moments|master",
)
def second_moment_not_clipped(bug: Seams) -> None:
    def update(original, piece, group, count, factor):
        before, (_, beta2) = piece.exp_avg_sq.clone(), group["betas"]
        raw = piece.grad.square()
        original(piece, group, count, factor)
        piece.exp_avg_sq.copy_(beta2 * before + (1 - beta2) * raw)

    bug.around(adamw, "_update", update)


@mutation(
    "huggingface/accelerate#4242 has such a case: the rate reaches the first group alone", "copies", UPDATE, "master"
)
def rate_of_the_first_group_alone(bug: Seams) -> None:
    def set_lr(original, self, lr):
        rates = [group["lr"] for group in self.optimizer.param_groups]
        original(self, lr)
        for group, rate in list(zip(self.optimizer.param_groups, rates, strict=True))[1:]:
            group["lr"] = rate

    bug.around(Zero, "set_lr", set_lr)


@mutation(OURS + ": the rate is set after the update", "copies", UPDATE, "master")
def rate_set_after_the_update(bug: Seams) -> None:
    rates: list[float] = []

    def set_lr(original, self, lr):
        original(self, rates[-1] if rates else 0.0)
        rates.append(lr)

    bug.around(Zero, "set_lr", set_lr)


@mutation(
    "NVIDIA-NeMo/Megatron-Bridge#5399, verl-project/verl#3674: the rate lags one step behind", "copies", SETTINGS, "lr"
)
def rate_of_the_step_before(bug: Seams) -> None:
    def plan(original, self, step, shift=0):
        return replace(original(self, step, shift), lr=original(self, max(1, step - 1), shift).lr * (step > 1))

    bug.around(Schedules, "plan", plan)


@mutation(OURS + ": schedules go by steps where the batch grows", "copies", SETTINGS, "lr|mtp_weight|bias_speed")
def schedules_by_steps(bug: Seams) -> None:
    def init(original, self, config):
        original(self, config)
        self.plan_by_samples, self._plan_sizes = self.batch_sizes, self.samples

    def plan(original, self, step, shift=0):
        found, sizes, samples = original(self, step, shift), self.batch_sizes, self.samples
        self.batch_sizes, self.samples = [1] * len(sizes), list(range(len(samples)))
        by_steps = original(self, step, shift)
        self.batch_sizes, self.samples = sizes, samples
        return replace(found, lr=by_steps.lr, mtp_weight=by_steps.mtp_weight, bias_speed=by_steps.bias_speed)

    bug.around(Schedules, "plan", plan)


@mutation(OURS + ": a phase begins at its own value", "copies", SETTINGS, "lr|mtp_weight|bias_speed")
def phases_begin_at_their_own_value(bug: Seams) -> None:
    bug.around(schedules, "_between", lambda original, shape, before, after, done: original(shape, after, after, done))


@mutation("NVIDIA-NeMo/Speech#3293: warm-up counts one step too many", "copies", SETTINGS, "lr")
def warm_up_one_step_ahead(bug: Seams) -> None:
    def plan(original, self, step, shift=0):
        found, warmup = original(self, step, shift), self.config.optim.warmup_steps
        return replace(found, lr=found.lr / min(1.0, step / warmup) * min(1.0, (step + 1) / warmup))

    bug.around(Schedules, "plan", plan)


@mutation(OURS + ": the batch grows a step late", "copies", SETTINGS, "batch_size|first_sample")
def batch_grows_a_step_late(bug: Seams) -> None:
    bug.around(schedules, "_batch_size", lambda original, config, index: original(config, max(0, index - 1)))


@mutation(OURS + ": the average of the weights never moves", "tiny rate", UPDATE, "average")
def average_never_moves(bug: Seams) -> None:
    bug.around(Ema, "update", lambda original, self: None)


@mutation("karpathy/nanochat#818: an average one step late", "tiny rate", UPDATE, "average")
def average_one_step_late(bug: Seams) -> None:
    waiting: dict[int, dict[str, Tensor]] = {}

    def update(original, self):
        original(self)
        now = {name: arrived.clone() for name, arrived in self._arrived.items()}
        before = waiting.get(id(self))
        for name, arrived in (before or {}).items():
            self._arrived[name].copy_(arrived)
        self._pending = before is not None
        waiting[id(self)] = now

    bug.around(Ema, "update", update)


@mutation(
    "atomistic-machine-learning/schnetpack#785 mixes them up: the average is that of rounded weights",
    "averaged",
    UPDATE,
    "average",
)
def average_of_rounded_weights(bug: Seams) -> None:
    def update(original, self):
        original(self)
        for arrived in self._arrived.values():
            arrived.copy_(arrived.bfloat16())

    bug.around(Ema, "update", update)


@mutation(OURS + ": the average forgets what it should keep", "averaged", UPDATE, "average")
def average_forgets(bug: Seams) -> None:
    def flush(original, self):
        self.decay = 1 - self.decay
        original(self)
        self.decay = 1 - self.decay

    bug.around(Ema, "flush", flush)
