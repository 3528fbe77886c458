"""In fp64 every layout has the losses, gradients and biases of one process to 1e-11, for every loss of tokens, with per-token tensors, several
calls and replayed experts; and each of these bugs, which cost others dearly, shows.
"""

from dataclasses import replace

import pytest
import torch

from tests.engine.exact import exact, worst
from tests.engine.scenario import LAYOUTS
from train.kernels.plain.plain_kernels import PlainKernels
from train.loop.training_engine import Engine
from train.model import token_losses
from train.model.deepseek import DeepSeekV3, Head
from train.model.sequence import Positions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exact")


@pytest.fixture(scope="module")
def one(folder):
    return exact(folder, "one")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_one_process_to_1e_11(folder, one, name):
    world, more = LAYOUTS[name]
    found = exact(folder, name, *[word for word in more if "zero" not in word], world=world)
    assert worst(found, one) < 1e-11


def gates_of_scattered_zeros():
    """Gates are looked up among the router's own top-k: 0 for a replayed expert that is not among them."""
    original = PlainKernels.route

    def route(self, logits, bias, rule, weight, counters, positions, replayed=None):
        gates, ids = original(self, logits, bias, rule, weight, counters, positions)
        if replayed is None:
            return gates, ids
        return torch.zeros_like(logits).scatter(-1, ids, gates).gather(-1, replayed), replayed

    PlainKernels.route = route


def mtp_replayed():
    original = Positions.shorter

    def shorter(self, by):
        kept = None if self.experts_BTLK is None else self.experts_BTLK[:, :-by]
        return replace(original(self, by), experts_BTLK=kept)

    Positions.shorter = shorter
    build = DeepSeekV3.__init__

    def init(self, *arguments, **more):
        build(self, *arguments, **more)
        for module in getattr(self, "mtp", ()):
            module.block.moe.router.layer = 0

    DeepSeekV3.__init__ = init


def biases_move_on_replayed_loads():
    original = Engine._update

    def update(self, plan):
        self._moves_biases = True
        return original(self, plan)

    Engine._update = update


def old_logprobs_shifted_by_one():
    original = token_losses.LossTokens.__getitem__
    token_losses.LossTokens.__getitem__ = lambda self, name: (
        original(self, name).roll(1, 1) if name == "old_logprobs" else original(self, name)
    )


def mean_over_ranks():
    original = Engine.count

    def count(self, batches, rows=None):
        own = sum(batch.targets for batch in batches)
        return original(self, batches, rows)._replace(targets=own * self._layout.dp)

    Engine.count = count


def mean_over_a_call():
    original = Engine.forward_backward

    def forward_backward(self, batch, loss, *, total, **more):
        original(self, batch, loss, total=self.count([batch]), **more)

    Engine.forward_backward = forward_backward


def padding_counted():
    original = Positions.learnt_BT
    Positions.learnt_BT = lambda self, supervised_BS: original(self, supervised_BS) | ~self.counted_BT


def mask_of_another_micro_batch():
    original, before = Head._token_loss, []

    def token_loss(self, hidden, tokens, positions, supervised_BS, *rest):
        before.append(supervised_BS)
        return original(self, hidden, tokens, positions, before[max(0, len(before) - 2)], *rest)

    Head._token_loss = token_loss


def temperature_forgotten():
    original = Head.logprobs

    def logprobs(self, hidden, tokens, positions, tensors, *rest):
        return original(self, hidden, tokens, positions, {}, *rest)

    Head.logprobs = logprobs


def weights_forgotten():
    original = Head._token_loss

    def token_loss(self, hidden, tokens, positions, supervised, divisor, tensors):
        kept = {name: tensor for name, tensor in tensors.items() if name != "weights"}
        return original(self, hidden, tokens, positions, supervised, divisor, kept)

    Head._token_loss = token_loss


def sequences_not_gathered():
    def gather(self, here_BT):
        if self.share is None:
            return here_BT
        size = self.count // 2
        whole = here_BT.new_zeros(len(here_BT), self.length)
        for part, piece in enumerate(self.here):
            whole[:, piece.start : piece.stop] = here_BT[:, part * size : part * size + len(piece)]
        return whole

    Positions.gather = gather


def gather_without_its_gradient():
    from train.model import sequence

    original = sequence._Gather.backward
    sequence._Gather.backward = staticmethod(
        lambda ctx, grad: (original(ctx, grad)[0] / ctx.positions.share.parts, None)
    )


def samples_of_a_sequence_are_one():
    original = token_losses.LossTokens.mean_of_samples
    token_losses.LossTokens.mean_of_samples = lambda self, x: original(
        replace(self, samples_BT=torch.zeros_like(self.samples_BT)), x
    )


def balance_term_always_on():
    original = Engine._set_weights
    Engine._set_weights = lambda self, plan, batch, total, with_balance=True: original(self, plan, batch, total)


def clipped_ratio_in_the_graph():
    def cispo(logprobs_BT, tokens, clip=1.0, clip_high=2.0):
        weights = (logprobs_BT - tokens["old_logprobs"]).exp().clamp(1 - clip, 1 + clip_high)
        return -weights * tokens["advantages"] * logprobs_BT

    token_losses.TOKEN_LOSSES["cispo"] = cispo


BUGS = {
    gates_of_scattered_zeros: "dp2",
    mtp_replayed: "dp2",
    biases_move_on_replayed_loads: "dp2",
    old_logprobs_shifted_by_one: "pp2_dualpipev",
    mean_over_ranks: "dp2",
    mean_over_a_call: "dp2",
    padding_counted: "dp2",
    mask_of_another_micro_batch: "pp2_dualpipev",
    temperature_forgotten: "pp2_dualpipev",
    weights_forgotten: "pp2_dualpipev",
    sequences_not_gathered: "cp2",
    gather_without_its_gradient: "cp2",
    samples_of_a_sequence_are_one: "cp2",
    balance_term_always_on: "dp2",
    clipped_ratio_in_the_graph: "dp2",
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_shows(folder, one, bug):
    world, more = LAYOUTS[BUGS[bug]]
    found = exact(folder, bug.__name__, *more, world=world, change=bug)
    assert worst(found, one) > 1e-4
