"""Sparse attention against plain operations over all scores at once: the choice, the attention, the indexer's loss and its gradients."""

import contextlib
import dataclasses

import pytest
import torch
from torch.nn import functional as F

from conf.schema import SELECTIVE, Recompute, SparseAttention
from conf.thresholds import lowered
from tests.model.test_deepseek import CONFIG
from train.kernels.choice import build_kernels
from train.kernels.plain.high import HighPrecision
from train.kernels.plain.plain_indexer import choose_keys
from train.model.deepseek import DeepSeekV3
from train.model.indexer import IndexVectors, best_keys
from train.model.init import initialise
from train.model.sequence import Positions

torch.set_num_threads(1)
SPARSE = SparseAttention(heads=3, head_dim=8, top_k=5)
LENGTH = 40


def build(sparse: SparseAttention = SPARSE, **changes) -> DeepSeekV3:
    config = dataclasses.replace(CONFIG, sparse=sparse, init_std=0.2, recompute=[], mtp_depth=1) if sparse else CONFIG
    config = dataclasses.replace(config, **changes)
    precision = HighPrecision(torch.float32, build_kernels("cpu"), Recompute.swiglu in config.recompute)
    model = DeepSeekV3.whole(config, precision, seq_len=LENGTH, device="meta")
    initialise(model, 3)
    model.mtp_weight, model.index_weight = 0.3, 1.0
    return model


def tokens(batch: int = 2) -> torch.Tensor:
    return torch.randint(50, (batch, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def plain_layer(mla, x_BTD: torch.Tensor, chosen=None, documents_BT=None):
    """Output, chosen keys and KL of every query, in plain operations of all scores. chosen: as a shared layer takes them."""
    config, T = mla._config, x_BTD.size(1)
    q_latent, kv = mla.q_down(x_BTD), mla.kv_down(x_BTD)
    q, k, v = mla._up(q_latent, *kv.split([config.kv_rank, config.rope_head_dim], -1))
    seen_TT = torch.ones(T, T, dtype=torch.bool).tril()
    if documents_BT is not None:
        seen_TT = seen_TT & (documents_BT.unsqueeze(-1) == documents_BT.unsqueeze(-2))
    kl_BT = None
    scores_BHTT = (q @ k.mT * mla._rope.softmax_scale).masked_fill(~_heads(seen_TT), -torch.inf)
    if chosen is None:
        indexer, sparse = mla.indexer, config.sparse
        qi = F.linear(mla.q_norm(q_latent).detach(), indexer.q.weight).unflatten(-1, (sparse.heads, -1))
        ki = F.linear(x_BTD.detach(), indexer.k.weight)
        ki = F.layer_norm(ki, ki.shape[-1:], indexer.k_norm.weight, indexer.k_norm.bias, 1e-6).unsqueeze(2)
        qi, ki = (_turned(t, config, sparse.interleaved, mla._rope) for t in (qi, ki))
        products = (qi.transpose(1, 2) @ ki.transpose(1, 2).mT * sparse.head_dim**-0.5).relu()
        w = F.linear(x_BTD.detach(), indexer.weight) * sparse.heads**-0.5
        index_BTT = (products * w.mT.unsqueeze(-1)).sum(1).masked_fill(~seen_TT, -torch.inf)
        order = index_BTT.sort(dim=-1, descending=True, stable=True).indices[..., : sparse.top_k]
        chosen = torch.zeros_like(index_BTT, dtype=torch.bool).scatter_(-1, order, True) & seen_TT
        p_BTT = scores_BHTT.detach().masked_fill(~_heads(chosen), -torch.inf).softmax(-1).mean(1)
        log_BTT = index_BTT.masked_fill(~chosen, -torch.inf).log_softmax(-1)
        kl_BT = torch.where(p_BTT > 0, p_BTT * (p_BTT.log() - log_BTT), 0).sum(-1)
    out = scores_BHTT.masked_fill(~_heads(chosen), -torch.inf).softmax(-1) @ v
    return mla.out(out.transpose(1, 2).flatten(2)), chosen, kl_BT


def _heads(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.ndim == 2 else mask.unsqueeze(1)


def _turned(x_BTHI: torch.Tensor, config, interleaved: bool, rope) -> torch.Tensor:
    """RoPE by sines and cosines of whole rows, as DeepSeek's and GLM's code have it."""
    R, T = config.rope_head_dim, x_BTHI.size(1)
    angles_TR = torch.outer(torch.arange(T).float(), rope.frequencies())
    cos, sin = angles_TR.cos().unsqueeze(1), angles_TR.sin().unsqueeze(1)
    first, rest = x_BTHI[..., :R], x_BTHI[..., R:]
    a, b = (first[..., 0::2], first[..., 1::2]) if interleaved else first.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("small_blocks", [True, False])
@pytest.mark.parametrize("recompute", [[], [Recompute.mla_up, Recompute.norm]])
def test_a_layer_is_that_of_plain_operations_with_all_gradients(interleaved, small_blocks, recompute):
    sparse = dataclasses.replace(SPARSE, interleaved=interleaved)
    mla = build(sparse, recompute=recompute).layers["1"].attention
    x_BTD = torch.randn(2, LENGTH, CONFIG.hidden, generator=torch.Generator().manual_seed(2)).requires_grad_()
    dy_BTD = torch.randn(x_BTD.shape, generator=torch.Generator().manual_seed(4))
    positions = Positions(LENGTH)
    positions.choices.weight = 0.7
    with lowered() if small_blocks else contextlib.nullcontext():
        y_BTD = mla(x_BTD, contextlib.nullcontext(), positions)
        y_BTD.backward(dy_BTD)
    got = {name: p.grad.clone() for name, p in mla.named_parameters()} | {"x": x_BTD.grad.clone()}
    mla.zero_grad()
    x_BTD.grad = None
    expected, chosen, kl_BT = plain_layer(mla, x_BTD)
    ((expected * dy_BTD).sum() + 0.7 * kl_BT.sum()).backward()
    numbers = positions.choices.chosen_BTK
    assert torch.equal(_mask(numbers, LENGTH), chosen)
    torch.testing.assert_close(y_BTD, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mla.indexer.loss, 0.7 * kl_BT.sum().detach(), rtol=1e-5, atol=1e-6)
    for name, p in [*mla.named_parameters(), ("x", x_BTD)]:
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


def _mask(chosen_BTK: torch.Tensor, length: int) -> torch.Tensor:
    numbers = chosen_BTK.long()
    mask = torch.zeros(*numbers.shape[:2], length + 1, dtype=torch.bool)
    return mask.scatter_(-1, numbers.masked_fill(numbers < 0, length), True)[..., :length]


def test_equal_scores_go_to_the_earlier_key_and_rows_with_few_keys_end_in_none():
    scores = torch.tensor([[2.0, 1, 1, 3, 1, 1], [0, -torch.inf, 0, 0, 0, -torch.inf], [-torch.inf] * 5 + [1]])
    assert best_keys(scores, 4).tolist() == [[0, 1, 2, 3], [0, 2, 3, 4], [5, -1, -1, -1]]
    assert best_keys(scores[:, :2], 4).tolist() == [[0, 1, -1, -1], [0, -1, -1, -1], [-1] * 4]


def test_the_choice_stays_inside_documents():
    generator = torch.Generator().manual_seed(0)
    q, k, w = (torch.randn(shape, generator=generator) for shape in ((2, LENGTH, 3, 8), (2, LENGTH, 8), (2, LENGTH, 3)))
    documents_BT = torch.tensor([[0] * 13 + [1] * 27, [0] * 30 + [1] * 10], dtype=torch.int32)
    chosen = choose_keys(IndexVectors(q, k, w), Positions(LENGTH, documents_BT).seen_whole, 5).long()
    for b in range(2):
        for t in range(LENGTH):
            first = documents_BT[b].tolist().index(documents_BT[b, t])
            found = [key for key in chosen[b, t].tolist() if key >= 0]
            assert len(found) == min(5, t - first + 1) and all(first <= key <= t for key in found), (b, t)


def test_with_as_many_keys_as_tokens_it_is_the_dense_model_bit_for_bit():
    many = build(dataclasses.replace(SPARSE, top_k=LENGTH))
    many.index_weight = 0.0
    dense = build(SparseAttention())
    dense.load_state_dict({name: p for name, p in many.state_dict().items() if "indexer" not in name})
    assert torch.equal(many(tokens()), dense(tokens()))
    assert not torch.equal(build()(tokens()), dense(tokens()))


def test_layers_of_a_pattern_take_the_keys_of_the_last_that_chose():
    model = build(dataclasses.replace(SPARSE, pattern="FSF"), mtp_depth=0).eval()
    assert [layer.attention.indexer is not None for layer in model.layers.values()] == [True, False, True]
    x, chosen = model.embedding(tokens()[:, :-1]), None
    for layer in model.layers.values():
        mla = layer.attention
        attended, chosen, _ = plain_layer(mla, layer.attention_norm(x), chosen if mla.indexer is None else None)
        x = x + attended
        normed = layer.ffn_norm(x)
        if hasattr(layer, "moe"):
            x = x + layer.moe(normed, contextlib.nullcontext())
        else:
            x = x + layer.ffn(normed.flatten(0, 1), contextlib.nullcontext()).view(x.shape)
    torch.testing.assert_close(
        model.logits(tokens()[:, :-1]), F.linear(model.norm(x), model.head.weight), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("recompute", [SELECTIVE, [Recompute.layer], ["layer:2", Recompute.norm]])
def test_recomputation_changes_no_gradient(recompute):
    found = []
    for what in ([], recompute):
        model = build(dataclasses.replace(SPARSE, pattern="FSF"), recompute=list(what))
        loss = model(tokens())
        loss.backward()
        kl = sum(indexer.loss for indexer in model.indexers())
        found.append(({name: p.grad for name, p in model.named_parameters()}, loss.item(), float(kl)))
    (before, *numbers), (after, *same) = found
    assert numbers == same and before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=0, msg=name)


def test_the_language_loss_ends_before_the_indexer_and_its_loss_ends_in_it():
    learns, still = build(), build()
    still.index_weight = 0.0
    for model in (learns, still):
        model(tokens()).backward()
    for (name, p), (_, other) in zip(learns.named_parameters(), still.named_parameters(), strict=True):
        if ".indexer." in name:
            assert other.grad is None and p.grad.abs().sum() > 0, name
        else:
            torch.testing.assert_close(p.grad, other.grad, rtol=0, atol=0, msg=name)


def test_only_learnt_queries_count():
    model = build(mtp_depth=0)
    batch, supervised = tokens(1), torch.zeros(1, LENGTH + 1, dtype=torch.bool)
    supervised[:, 7], supervised[:, 23] = True, True
    documents = torch.zeros(1, LENGTH + 1, dtype=torch.int32)
    model.loss_divisor = 2.0
    model(batch, documents_BS=documents, supervised_BS=supervised)
    got = sum(float(indexer.loss) for indexer in model.indexers())
    model.eval()
    expected, x = 0.0, model.embedding(batch[:, :-1])
    for layer in model.layers.values():
        expected += plain_layer(layer.attention, layer.attention_norm(x))[2][0, [6, 22]].mean().item()
        x = layer(x)
    assert got == pytest.approx(expected, rel=1e-4)
