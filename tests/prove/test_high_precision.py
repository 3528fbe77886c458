"""The reference of the parts in high precision, against torch's own functions and autograd."""

import pytest
import torch
from torch.nn import functional as F

from conf.load import compose
from tests.small import SMALL
from train.prove import high_precision as high
from train.prove.low_precision import FORMATS, NearNumbers
from train.prove.recipe_values import read_values
from train.prove.reference import PlainModel

B, T, D, E, K = 2, 6, 12, 8, 4


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.requires_grad_()


def test_norms():
    x, gain, dy = drawn(5, D), drawn(D, seed=1), drawn(5, D, seed=2).detach()
    y = F.rms_norm(x, (D,), gain, 1e-6)
    y.backward(dy)
    torch.testing.assert_close(high.rms_norm(x.detach(), gain.detach(), 1e-6).x, y.detach())
    dx, dgain = high.rms_norm_back(dy, x.detach(), gain.detach(), 1e-6)
    torch.testing.assert_close(dx.x, x.grad)
    torch.testing.assert_close(dgain.x, gain.grad)
    assert (dx.size >= dx.x.abs() - 1e-12).all() and (dgain.size >= dgain.x.abs() - 1e-12).all()


def test_attention_inside_documents():
    q, k, v, dout = (drawn(B, 2, T, 4, seed=seed) for seed in range(4))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [0] * T])
    unseen = high.unseen(T, documents)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=~unseen, scale=0.3)
    out.backward(dout.detach())
    given = [one.detach() for one in (q, k, v)]
    torch.testing.assert_close(high.attend(*given, 0.3, unseen).x, out.detach())
    slopes = high.attend_back(dout.detach(), *given, out.detach(), 0.3, unseen)
    for total, leaf in zip(slopes, (q, k, v), strict=True):
        torch.testing.assert_close(total.x, leaf.grad)
    assert bool(unseen[0, 0, 3, 2]) and not bool(unseen[1, 0, 3, 2]) and bool(unseen[1, 0, 2, 3])


def test_turning_back_undoes_turning_where_nothing_grows():
    config = compose(*SMALL, "data.path=none")
    x = drawn(1, 2, 3, config.model.rope_head_dim).detach()
    there = high.rotated(x, config, [5, 1, 9])
    torch.testing.assert_close(high.rotated(there.x, config, [5, 1, 9], back=True).x, x)
    torch.testing.assert_close(high.rotated(x[:, :, 1:2], config, [1]).x, there.x[:, :, 1:2])


def test_the_output_head():
    x, weight, targets = drawn(7, D), drawn(11, D, seed=1), torch.arange(7)
    loss = F.cross_entropy(x @ weight.T, targets, reduction="sum") / 9
    loss.backward()
    made = high.head(NearNumbers(x.detach()), weight.detach(), targets, 9, FORMATS["fp32"], 0.0)
    torch.testing.assert_close(made.loss.x, loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(made.x.x, x.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(made.weight.x, weight.grad, rtol=1e-5, atol=1e-7)
    low = high.head(NearNumbers(x.detach()), weight.detach(), targets, 9, FORMATS["bf16"], 1e-6)
    error = (low.x.x - x.grad).norm() / x.grad.norm()
    assert 1e-4 < error < 2e-2 and low.x.off is not None


@pytest.mark.parametrize("softmax", [False, True])
def test_the_router_with_its_balance_loss(softmax):
    """Against autograd of the whole reference's own formulas."""
    x, weight, dgates = drawn(B, T, D), drawn(E, D, seed=1), drawn(B, T, K, seed=2).detach()
    small = read_values(compose(*SMALL, "data.path=none", f"model.experts={E}", f"model.top_k={K}"))
    plain = PlainModel(small, {}, {})
    scores = (x @ weight.T).softmax(-1) if softmax else (x @ weight.T).sigmoid()
    ids = high.best(scores.detach(), K)
    chosen = scores.gather(-1, ids)
    gates = 2.5 * chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    ((gates * dgates).sum() + 0.01 * plain.balance_loss(scores)).backward()
    balance = 0.01 / (B * T) * E / (K * T) * high.among_best(scores.detach(), K).sum(1, keepdim=True)
    slopes = high.route_back(dgates, x.detach(), weight.detach(), ids, 2.5, balance, torch.zeros_like(balance), softmax)
    torch.testing.assert_close(slopes.x.x, x.grad.flatten(0, 1))
    torch.testing.assert_close(slopes.weight.x, weight.grad)
    scores, sizes = high.route_scores(x.detach(), weight.detach(), softmax)
    torch.testing.assert_close(high.gates(scores, sizes, ids, 2.5).x, gates.detach())
