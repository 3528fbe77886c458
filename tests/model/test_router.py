"""Choice of experts, gates, and the sequence-wise balance loss (paper eq. 12-20)."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import Model, ScoreFunction
from train.kernels.choice import build_kernels
from train.kernels.plain.routing import choose_experts, top_indices
from train.model.operations import RoutingRule
from train.model.router import Router, update_bias

torch.set_num_threads(1)


def plain_choice(biased: list[float], rule: RoutingRule) -> list[int]:
    """Python's stable sort, so that of equal values the lower index comes first."""
    size = len(biased) // rule.groups
    members = [range(g * size, (g + 1) * size) for g in range(rule.groups)]
    best = [sum(sorted((biased[e] for e in group), reverse=True)[: rule.group_top_k]) for group in members]
    groups = sorted(range(rule.groups), key=lambda g: -best[g])[: rule.top_groups]
    allowed = [e for g in sorted(groups) for e in members[g]]
    return sorted(allowed, key=lambda e: -biased[e])[: rule.top_k]


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_choice_with_ties_and_negative_scores(data):
    """Few distinct values, so ties abound; negative ones, so a mask of 0 would choose from closed groups."""
    groups = data.draw(st.sampled_from([1, 2, 4]))
    top_groups = data.draw(st.integers(1, groups))
    size = data.draw(st.integers(2, 4))
    top_k = data.draw(st.integers(1, size * top_groups))
    rule = RoutingRule(top_k, groups, top_groups, 1.0, group_top_k=data.draw(st.integers(1, size)))
    biased = data.draw(
        st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0]), min_size=groups * size, max_size=groups * size)
    )
    ids = choose_experts(torch.tensor(biased).view(1, 1, -1), rule)
    assert ids.flatten().tolist() == plain_choice(biased, rule)


def test_top_indices_are_stable():
    assert top_indices(torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0]), 2).tolist() == [1, 2]


def router_with(bias: torch.Tensor | None = None, **change) -> Router:
    torch.manual_seed(0)
    shape = {"hidden": 8, "experts": 8, "top_k": 2, "groups": 4, "top_groups": 2, "route_scale": 2.5} | change
    router = Router(Model(**shape), build_kernels("cpu"))
    torch.nn.init.normal_(router.weight)
    if bias is not None:
        router.bias_E.copy_(bias)
    return router


def test_the_bias_of_an_overloaded_expert_goes_down():
    bias_E = torch.tensor([0.0, 0.25, 0.5, 0.75])
    update_bias(bias_E, torch.tensor([1, 3, 3, 5]), speed=0.125)  # the mean is 3
    assert bias_E.tolist() == [0.125, 0.25, 0.5, 0.625]


def test_bias_selects_but_does_not_weigh():
    router = router_with(torch.tensor([9.0, 0, 0, 0, 9.0, 0, 0, 0]))
    x_BTD = torch.randn(2, 5, 8)
    gates_TK, ids_TK = router(x_BTD, nullcontext())
    assert set(ids_TK.flatten().tolist()) == {0, 4}
    scores = torch.sigmoid(x_BTD.flatten(0, 1) @ router.weight.T).gather(1, ids_TK)
    torch.testing.assert_close(gates_TK, 2.5 * scores / scores.sum(-1, keepdim=True))
    assert gates_TK.dtype == torch.float32


@pytest.mark.parametrize("scores", ScoreFunction)
@pytest.mark.parametrize("balance_weight", [0.0, 0.3])
def test_gradients_equal_autograd(balance_weight, scores):
    """Of the gates and of the balance loss, whose frequencies count the unbiased choice."""
    router = router_with(torch.randn(8) * 0.3, scores=scores)
    router.balance_weight = balance_weight
    x_BTD = torch.randn(3, 5, 8, dtype=torch.float32, requires_grad=True)
    gates_TK, ids_TK = router(x_BTD, nullcontext())
    upstream = torch.randn_like(gates_TK)
    got = torch.autograd.grad((gates_TK * upstream).sum(), [x_BTD, router.weight])

    logits_BTE = x_BTD @ router.weight.T
    scores_BTE = logits_BTE.softmax(-1) if scores == ScoreFunction.softmax else logits_BTE.sigmoid()
    chosen = scores_BTE.flatten(0, 1).gather(1, ids_TK)
    loss = (2.5 * chosen / chosen.sum(-1, keepdim=True) * upstream).sum()
    share_BE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean(1)
    unbiased = torch.nn.functional.one_hot(scores_BTE.topk(2).indices, 8).sum((1, 2)) * 8 / (2 * 5)
    balance = balance_weight * (unbiased * share_BE).sum(-1).mean()
    expected = torch.autograd.grad(loss + balance, [x_BTD, router.weight])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(router.balance_loss, balance.detach())
    torch.testing.assert_close(router.score_E, share_BE.sum(0).detach())
    assert torch.equal(router.load_E, ids_TK.flatten().bincount(minlength=8))


def test_balance_loss_of_even_scores_is_its_weight():
    """sum f P is 1 at balance, whatever the number of experts."""
    router = router_with()
    torch.nn.init.zeros_(router.weight)
    router.balance_weight = 0.5
    router(torch.randn(2, 6, 8), nullcontext())
    assert router.balance_loss.item() == pytest.approx(0.5)
    assert router.entropy().item() == pytest.approx(torch.log(torch.tensor(8.0)).item(), abs=1e-6)


def test_an_evaluation_knows_no_balance_loss():
    """Nothing is counted, and the gates alone give a gradient."""
    router, x_BTD = router_with(torch.randn(8) * 0.3).eval(), torch.randn(2, 6, 8)
    gradients = []
    for weight in (0.0, 0.5):
        router.balance_weight = weight
        gates_TK, _ = router(x_BTD, nullcontext())
        gradients += torch.autograd.grad(gates_TK.square().sum(), [router.weight])
    assert torch.equal(*gradients)
    assert not any(counted.any() for counted in (router.load_E, router.score_E, router.balance_loss))


def test_engines_that_cast_the_module_leave_bias_and_counters_exact():
    router = router_with(torch.full((8,), 0.001))
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert router.bias_E.dtype == router.score_E.dtype == torch.float32
    assert router.load_E.dtype == torch.int64
    assert torch.equal(router.bias_E, torch.full((8,), 0.001))
    assert list(router.state_dict()) == ["weight", "bias_E"]
