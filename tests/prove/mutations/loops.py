"""Custom training loops: token losses, values per token, several calls in a step, replayed experts, and returned
weights."""

from dataclasses import replace

import torch

from tests.prove.mutations.registry import BACKWARD, FORWARD, OURS, UPDATE, mutation
from tests.prove.mutations.seams import Seams
from train.kernels.plain.plain_kernels import PlainKernels
from train.loop import live_model, live_weights, training_engine
from train.model import sequence, token_losses
from train.model.deepseek import Head
from train.model.router import Router
from train.model.sequence import Positions

LOSS, GRADIENTS = "losses", "losses|gradients"


@mutation(
    OURS + ": gates are looked up among the router's own experts, and are 0 for others that are replayed",
    "copies",
    FORWARD,
    "log-probabilities|losses",
    "loop",
)
def gates_of_scattered_zeros(bug: Seams) -> None:
    def route(original, self, logits, bias, rule, weight, counters, positions, replayed):
        gates, ids = original(self, logits, bias, rule, weight, counters, positions)
        if replayed is None:
            return gates, ids
        return torch.zeros_like(logits).scatter(-1, ids, gates).gather(-1, replayed), replayed

    bug.around(PlainKernels, "route", route)


@mutation(OURS + ": the routers of MTP modules are replayed", "copies", FORWARD, "mtp", "loop")
def mtp_replayed(bug: Seams) -> None:
    def shorter(original, self, by):
        kept = None if self.experts_BTLK is None else self.experts_BTLK[:, :-by]
        return replace(original(self, by), experts_BTLK=kept)

    def forward(original, self, x_BTD, remake, positions):
        self.layer = self.layer or 0
        return original(self, x_BTD, remake, positions)

    bug.around(Positions, "shorter", shorter)
    bug.around(Router, "forward", forward)


@mutation(OURS + ": balance biases move by the loads of replayed experts", "copies", UPDATE, "biases", "loop")
def biases_move_on_replayed_loads(bug: Seams) -> None:
    def update(original, self, plan):
        self._moves_biases = True
        return original(self, plan)

    bug.around(training_engine.Engine, "_update", update)


@mutation(
    OURS + ": replayed experts are those of the layer before",
    "copies",
    FORWARD,
    "log-probabilities|losses|loads",
    "loop",
)
def experts_of_another_layer(bug: Seams) -> None:
    bug.around(Positions, "experts_here_BTLK", lambda original, self: _rolled(original(self)))


def _rolled(experts_BTLK):
    return None if experts_BTLK is None else experts_BTLK.roll(1, 2)


@mutation(OURS + ": log-probabilities do not replay", "copies", FORWARD, "log-probabilities replayed", "loop")
def logprobs_without_replay(bug: Seams) -> None:
    def logprobs(original, self, batch):
        return original(self, replace(batch, experts_BTLK=None))

    bug.around(training_engine.Engine, "logprobs", logprobs)


@mutation(
    OURS + ": log-probabilities in the middle of a step count their tokens", "copies", FORWARD, "loads|balance", "loop"
)
def logprobs_count_tokens(bug: Seams) -> None:
    def logprobs(original, self, batch):
        found = original(self, batch)
        for router in self._parts.routers().values():
            router.load_E += 1
        return found

    bug.around(training_engine.Engine, "logprobs", logprobs)


@mutation(
    OURS + ": old log-probabilities are those of the tokens before", "dualpipev", (FORWARD, BACKWARD), GRADIENTS, "loop"
)
def old_logprobs_shifted_by_one(bug: Seams) -> None:
    def getitem(original, self, name):
        return original(self, name).roll(1, 1) if name == "old_logprobs" else original(self, name)

    bug.around(token_losses.LossTokens, "__getitem__", getitem)


@mutation("verl-project/verl#6609: a mean over the tokens of each rank, not of all", "copies", FORWARD, LOSS, "loop")
def mean_over_the_tokens_of_a_rank(bug: Seams) -> None:
    def count(original, self, batches, rows=None):
        own = sum(batch.targets for batch in batches)
        return original(self, batches, rows)._replace(targets=own * self._layout.dp)

    bug.around(training_engine.Engine, "count", count)


@mutation(OURS + ": a mean over the tokens of each call, not of the step", "copies", FORWARD, LOSS, "loop")
def mean_over_a_call(bug: Seams) -> None:
    def forward_backward(original, self, batch, loss, *, last, total, terms, **settings):
        original(self, batch, loss, last=last, total=self.count([batch]), terms=terms, **settings)

    bug.around(training_engine.Engine, "forward_backward", forward_backward)


@mutation(OURS + ": padding has a loss", "copies", FORWARD, LOSS, "loop")
def padding_counted(bug: Seams) -> None:
    def learnt(original, self, supervised_BS):
        return original(self, supervised_BS) | ~self.counted_BT

    bug.around(Positions, "learnt_BT", learnt)


@mutation(OURS + ": the mask of the micro-batch before, under DualPipeV", "dualpipev", FORWARD, LOSS, "loop")
def mask_of_another_micro_batch(bug: Seams) -> None:
    before = []

    def token_loss(original, self, hidden, tokens, positions, supervised_BS, divisor, tensors):
        before.append(supervised_BS)
        return original(self, hidden, tokens, positions, before[max(0, len(before) - 2)], divisor, tensors)

    bug.around(Head, "_token_loss", token_loss)


@mutation(OURS + ": temperatures are forgotten", "dualpipev", FORWARD, "log-probabilities", "loop")
def temperatures_forgotten(bug: Seams) -> None:
    def logprobs(original, self, hidden, tokens, positions, tensors, rows=None):
        return original(self, hidden, tokens, positions, {}, rows)

    bug.around(Head, "logprobs", logprobs)


@mutation(OURS + ": weights of tokens are forgotten", "dualpipev", FORWARD, LOSS, "loop")
def token_weights_forgotten(bug: Seams) -> None:
    def token_loss(original, self, hidden, tokens, positions, supervised, divisor, tensors):
        kept = {name: tensor for name, tensor in tensors.items() if name != "weights"}
        return original(self, hidden, tokens, positions, supervised, divisor, kept)

    bug.around(Head, "_token_loss", token_loss)


@mutation(OURS + ": a loss sees this rank's part of a shared sequence", "shared", FORWARD, "log-prob|losses", "loop")
def sequences_not_gathered(bug: Seams) -> None:
    def gather(_, self, here_BT):
        size, whole = self.count // 2, here_BT.new_zeros(len(here_BT), self.length)
        for part, piece in enumerate(self.here):
            whole[:, piece.start : piece.stop] = here_BT[:, part * size : part * size + len(piece)]
        return whole

    bug.around(Positions, "gather", gather)


@mutation(OURS + ": gathered sequences lose the gradients of other ranks", "shared", BACKWARD, "gradients", "loop")
def gather_without_the_gradient_of_others(bug: Seams) -> None:
    def backward(original, ctx, grad):
        return original(ctx, grad)[0] / ctx.positions.share.parts, None

    bug.around(sequence._Gather, "backward", backward)


@mutation(OURS + ": GSPO takes the samples of a sequence for one", "copies", (FORWARD, BACKWARD), "gspo", "loop")
def samples_of_a_sequence_are_one(bug: Seams) -> None:
    def mean(original, self, x_BT):
        return original(replace(self, samples_BT=torch.zeros_like(self.samples_BT)), x_BT)

    bug.around(token_losses.LossTokens, "mean_of_samples", mean)


@mutation(OURS + ": CISPO's clipped weight has a gradient", "copies", BACKWARD, "gradients.*cispo", "loop")
def clipped_ratio_in_the_graph(bug: Seams) -> None:
    def cispo(logprobs_BT, tokens, clip, clip_high):
        weights = (logprobs_BT - tokens["old_logprobs"]).exp().clamp(1 - clip, 1 + clip_high)
        return -weights * tokens["advantages"] * logprobs_BT

    def find(original, self, loss, batch, settings):
        found = original(self, loss, batch, settings)
        return (lambda *given: cispo(*given, **settings)) if loss == "cispo" else found

    bug.around(training_engine.Engine, "_find_loss", find)


@mutation(OURS + ": the upper bound of the clip is the lower one", "copies", (FORWARD, BACKWARD), GRADIENTS, "loop")
def upper_clip_forgotten(bug: Seams) -> None:
    bug.around(
        token_losses, "_clipped", lambda original, ratio, advantages, low, high: original(ratio, advantages, low, low)
    )


@mutation(OURS + ": the balance loss stays on where a caller leaves it out", "copies", FORWARD, "balance_loss", "loop")
def balance_term_always_on(bug: Seams) -> None:
    def set_weights(original, self, plan, batch, total, with_balance):
        original(self, plan, batch, total)

    bug.around(training_engine.Engine, "_set_weights", set_weights)


@mutation(OURS + ": the first call of a step is lost", "copies", (FORWARD, BACKWARD), GRADIENTS, "loop")
def first_call_lost(bug: Seams) -> None:
    def run_passes(original, self, batch):
        for chunk in self._parts.chunks:
            chunk.zero_grad(set_to_none=True)
        original(self, batch)

    bug.around(training_engine.Engine, "run_passes", run_passes)


@mutation(
    OURS + ": weights are handed out without the balance biases, which are no parameters", "copies", UPDATE, "e_score"
)
def weights_without_biases(bug: Seams) -> None:
    def wanted(original, *given):
        return (one for one in original(*given) if not one.placed.ours.startswith("bias."))

    bug.around(live_weights, "_wanted", wanted)


@mutation(OURS + ": a merged adapter is in the base already", "adapters", UPDATE, "weights handed out")
def merged_adapter_twice(bug: Seams) -> None:
    def live(original, config, state, device, **how):
        return original(
            replace(config, adapter=replace(config.adapter, alpha=2 * config.adapter.alpha)), state, device, **how
        )

    bug.around(live_model, "live_weights", live)


@mutation(
    OURS + ": experts are handed out with gate and up exchanged", "experts", UPDATE, "weights handed out.*experts"
)
def gate_and_up_exchanged(bug: Seams) -> None:
    def fill(original, target, part, shard):
        start = part.start
        if ".experts." in part.ours and part.ours.endswith("w13"):
            number, size = divmod(start // part.count, 2), part.count
            start = (2 * number[0] + 1 - number[1]) * size
        original(target, replace(part, start=start), shard)

    bug.around(live_weights, "_fill", fill)
