"""Balance of experts: the balance loss, loads, and the biases that follow them."""

import torch

from tests.prove.mutations.registry import BACKWARD, FORWARD, OURS, UPDATE, mutation
from tests.prove.mutations.seams import Seams
from train.kernels.plain import routing
from train.loop import training_engine
from train.model import router
from train.model.sequence import Positions


@mutation("NVIDIA-NeMo/Automodel#1408: the gradient of the balance loss never flows", "experts", BACKWARD, "router")
def balance_loss_detached(bug: Seams) -> None:
    def backward(original, ctx, *grads):
        ctx.balance_weight = 0.0
        return original(ctx, *grads)

    bug.around(routing.Route, "backward", backward)


@mutation("NVIDIA/Megatron-LM#3672: the balance loss shrinks with the number of data-parallel ranks", "copies",
          (FORWARD, BACKWARD), "router|balance")  # fmt: skip
def balance_loss_divided_by_ranks(bug: Seams) -> None:
    def set_weights(original, self, *arguments):
        original(self, *arguments)
        for one in self.measure.routers.values():
            one.balance_weight /= 2

    bug.around(training_engine.Engine, "_set_weights", set_weights)


@mutation(
    "NVIDIA-NeMo/Automodel#3359: the balance loss is not divided under accumulation", "copies", FORWARD, "balance"
)
def balance_loss_of_every_micro_batch_in_full(bug: Seams) -> None:
    def set_weights(original, self, *arguments):
        original(self, *arguments)
        for one in self.measure.routers.values():
            one.balance_weight *= self._mean_micro_batches

    bug.around(training_engine.Engine, "_set_weights", set_weights)


@mutation(
    "NVIDIA/Megatron-LM#7452: counts are overwritten by their sum, and the balance gradient doubles",
    "experts",
    BACKWARD,
    "router",
)
def balance_gradient_doubled(bug: Seams) -> None:
    def backward(original, ctx, *grads):
        ctx.balance_weight *= 2
        return original(ctx, *grads)

    bug.around(routing.Route, "backward", backward)


@mutation(
    "ISEEKYAN/Megatron-LM#223: the balance loss counts other experts than it should under limited groups",
    "copies",
    FORWARD,
    "balance",
)
def balance_counts_the_chosen(bug: Seams) -> None:
    chosen: list[torch.Tensor] = []

    def choose(original, biased_BTE, rule):
        chosen.clear()
        chosen.append(original(biased_BTE, rule))
        return chosen[0]

    def top_indices(original, scores, k):
        return chosen[0] if chosen and scores.size(-1) > k and k == chosen[0].size(-1) else original(scores, k)

    bug.around(routing, "choose_experts", choose)
    bug.around(routing, "top_indices", top_indices)


@mutation(
    "ISEEKYAN/Megatron-LM#223: grouped routing counts the best of unrestricted scores", "copies", FORWARD, "loads"
)
def loads_of_unrestricted_scores(bug: Seams) -> None:
    def forward(original, ctx, logits_BTE, bias_E, rule, weight, counters, positions, *more):
        gates, ids_BTK = original(ctx, logits_BTE, bias_E, rule, weight, counters, positions, *more)
        if counters is not None:
            experts = logits_BTE.size(-1)
            best_BTK = routing.top_indices(logits_BTE, rule.top_k)
            counters[0].add_(
                (routing.count_experts(best_BTK, experts) - routing.count_experts(ids_BTK, experts)).sum(0)
            )
        return gates, ids_BTK

    bug.around(routing.Route, "forward", forward)


@mutation(OURS + ": the loss of each sequence is taken over all of a micro-batch", "two sequences", FORWARD, "balance")
def balance_loss_of_all_sequences_as_one(bug: Seams) -> None:
    def forward(original, ctx, logits_BTE, bias_E, rule, weight, counters, positions, *more):
        batch, length, _ = logits_BTE.shape
        counted = None if counters is None else (counters[0].clone(), counters[1].clone(), counters[2])
        original(
            ctx, logits_BTE.flatten(0, 1).unsqueeze(0), bias_E, rule, weight, counted, Positions(batch * length), *more
        )
        if counters is None:
            return original(ctx, logits_BTE, bias_E, rule, weight, counters, positions, *more)
        kept = counters[2].clone()
        found = original(ctx, logits_BTE, bias_E, rule, weight, counters, positions, *more)
        counters[2].copy_(kept)
        return found

    bug.around(routing.Route, "forward", forward)


@mutation(OURS + ": the balance loss leaves MTP out", "copies", FORWARD, "balance")
def balance_loss_without_mtp(bug: Seams) -> None:
    def set_weights(original, self, *arguments):
        original(self, *arguments)
        for name, one in self.measure.routers.items():
            one.balance_weight *= not name.startswith("mtp")

    bug.around(training_engine.Engine, "_set_weights", set_weights)


@mutation(
    "pytorch/torchtitan#1593, NVIDIA-NeMo/Automodel#3247: recomputation counts tokens again", "copies", FORWARD, "load"
)
def loads_counted_twice(bug: Seams) -> None:
    def forward(original, self, *arguments):
        before = self.load_E.clone()
        result = original(self, *arguments)
        self.load_E.add_(self.load_E - before)
        return result

    bug.around(router.Router, "forward", forward)


@mutation(
    "NVIDIA-NeMo/Automodel#3247: a layer that runs again counts its tokens again",
    "layers again",
    FORWARD,
    "loads|balance_loss",
)
def loads_counted_in_the_second_run(bug: Seams) -> None:
    bug.around(routing, "is_repeated", lambda original: False)


@mutation(OURS + ": loads are those of the last micro-batch", "copies", FORWARD, "loads")
def loads_of_the_last_micro_batch(bug: Seams) -> None:
    def forward(original, self, *arguments):
        self.load_E.zero_()
        return original(self, *arguments)

    bug.around(router.Router, "forward", forward)


@mutation("pytorch/torchtitan#1593: one update of the bias for every count of the tokens", "copies", UPDATE, "bias")
def bias_updated_twice(bug: Seams) -> None:
    def update(original, *arguments):
        original(*arguments)
        original(*arguments)

    bug.around(training_engine, "update_bias", update)


@mutation("AI-Hypercomputer/maxtext#2494: a routing bias that nothing updates", "copies", UPDATE, "bias")
def bias_of_mtp_not_updated(bug: Seams) -> None:
    def update_biases(original, self, measured, plan):
        routers = self.measure.routers
        self.measure.routers = {name: one for name, one in routers.items() if not name.startswith("mtp")}
        original(self, measured, plan)
        self.measure.routers = routers

    bug.around(training_engine.Engine, "_update_biases", update_biases)


@mutation("gfyddha/FlyLoRA#1: loads compared with a mean of another unit", "copies", UPDATE, "bias")
def bias_follows_a_wrong_mean(bug: Seams) -> None:
    def update(original, bias_E, load_E, speed):
        bias_E.add_(torch.sign(1 / len(load_E) - load_E).to(bias_E.dtype), alpha=speed)

    bug.around(training_engine, "update_bias", update)


@mutation(OURS + ": biases follow the loads of the rank alone", "copies", UPDATE, "bias")
def bias_follows_the_own_loads(bug: Seams) -> None:
    def update_biases(original, self, loads_LE, plan):
        own_LE = torch.zeros_like(loads_LE)
        for name, one in self.measure.routers.items():
            own_LE[self.measure.layers.index(name)] = one.load_E
        original(self, own_LE, plan)

    bug.around(training_engine.Engine, "_update_biases", update_biases)


@mutation(OURS + ": biases move the wrong way", "copies", UPDATE, "bias")
def bias_moves_the_wrong_way(bug: Seams) -> None:
    bug.around(training_engine, "update_bias", lambda original, bias_E, load_E, speed: original(bias_E, load_E, -speed))


@mutation(OURS + ": biases move by how much loads differ", "copies", UPDATE, "bias")
def bias_moves_by_the_excess(bug: Seams) -> None:
    def update(_, bias_E, load_E, speed):
        bias_E.add_(((load_E.mean() - load_E) / load_E.mean()).to(bias_E.dtype), alpha=speed)

    bug.around(training_engine, "update_bias", update)


@mutation(OURS + ": biases are kept in bf16", "copies", UPDATE, "bias")
def bias_in_bf16(bug: Seams) -> None:
    def update(original, bias_E, load_E, speed):
        original(bias_E, load_E, speed)
        bias_E.copy_(bias_E.bfloat16())

    bug.around(training_engine, "update_bias", update)


@mutation(OURS + ": biases of one step move by the loads of the step before", "copies", UPDATE, "bias")
def bias_follows_the_loads_of_the_step_before(bug: Seams) -> None:
    before: list[torch.Tensor] = []

    def update_biases(original, self, loads_LE, plan):
        original(self, before[0] if before else loads_LE, plan)
        before[:] = [loads_LE.clone()]

    bug.around(training_engine.Engine, "_update_biases", update_biases)
