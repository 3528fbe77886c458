"""The model against the reference of proofs, which is the paper's formulas and shares no code with it; chunks against the whole."""

import dataclasses

import pytest
import torch

import train.kernels.cpu.libraries as native
from conf.load import compose
from conf.schema import Model, Recompute
from train.data.batch import Batch
from train.kernels.choice import build_kernels
from train.kernels.plain.high import HighPrecision
from train.kernels.plain.plain_kernels import PlainKernels
from train.model import block
from train.model.deepseek import DeepSeekV3, Losses
from train.model.init import initialise
from train.prove.recipe_values import read_values
from train.prove.reference import PlainModel, gradients

torch.set_num_threads(1)

CONFIG = Model(
    vocab_size=50,
    hidden=16,
    layers=3,
    dense_layers=1,
    heads=2,
    q_rank=12,
    kv_rank=8,
    nope_head_dim=6,
    rope_head_dim=4,
    v_head_dim=6,
    dense_width=20,
    expert_width=8,
    experts=8,
    shared_experts=1,
    top_k=3,
    groups=4,
    top_groups=3,
    mtp_depth=1,
    init_std=0.3,
    loss_chunk=7,
)


def build(config: Model, seed: int = 3, **parts) -> DeepSeekV3:
    parts = {"layers": range(config.layers), "has_embedding": True, "has_head": True} | parts
    model = DeepSeekV3(config, HighPrecision(torch.float32, build_kernels("cpu")), seq_len=12, device="meta", **parts)
    initialise(model, seed)
    generator = torch.Generator().manual_seed(5)
    for name, router in sorted(model.routers().items()):
        generator.manual_seed(sum(map(ord, name)))
        router.bias_E.normal_(0, 0.1, generator=generator)
    return model


def reference_of(model: DeepSeekV3, balance_loss: float) -> PlainModel:
    """The reference of proofs with copies of the model's weights, which keep gradients of their own."""
    config = compose()
    config = dataclasses.replace(
        config, model=model.config, optim=dataclasses.replace(config.optim, balance_loss=balance_loss)
    )
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
    return PlainModel(
        read_values(config), weights, {name: router.bias_E.clone() for name, router in model.routers().items()}
    )


def test_losses_of_a_step_are_means_over_its_micro_batches():
    losses = Losses(2)
    losses.add(torch.tensor(1.0), [torch.tensor(2.0), torch.tensor(4.0)])
    losses.add(torch.tensor(3.0), [torch.tensor(4.0), torch.tensor(8.0)], torch.tensor(1.0))
    assert losses.means().tolist() == [2.0, 3.0, 6.0, 0.5]
    losses.clear()
    losses.add(torch.tensor(5.0), [torch.tensor(6.0), torch.tensor(7.0)])
    assert losses.means().tolist() == [5.0, 6.0, 7.0, 0.0]


def test_detached_mtp_losses_train_the_mtp_modules_alone():
    """Two depths, the second behind the first: all other weights learn what they learn without MTP losses."""
    config = dataclasses.replace(CONFIG, mtp_depth=2)
    tokens = torch.randint(config.vocab_size, (2, 13), generator=torch.Generator().manual_seed(1))
    found = []
    for weight in (0.0, 0.5):
        model = build(config)
        model.mtp_weight, model.detaches_mtp = weight, True
        model.head.zero_grad()
        model(tokens).sum().backward()
        found.append({name: param.grad for name, param in model.named_parameters()})
    without, beside = found
    for name, grad in beside.items():
        same = torch.equal(grad, without[name])
        assert same != name.startswith("mtp."), name


@pytest.mark.parametrize("first", [0, 2])
def test_so_many_blocks_of_a_chunk_run_again(monkeypatch, first):
    """The first two of those that are here, wherever the chunk begins."""
    again = []
    monkeypatch.setattr(block, "repeatable", lambda run, x: again.append(1) or run(x))
    config = dataclasses.replace(CONFIG, layers=5, recompute=["layer:2"])
    model = build(config, layers=range(first, 5), has_embedding=False, has_head=False)
    model(torch.randn(1, 6, config.hidden, requires_grad=True))
    assert len(again) == 2


@pytest.mark.parametrize(
    ("change", "packed"),
    [
        ({}, False),
        ({"mtp_depth": 3}, True),
        ({"mtp_depth": 2, "q_rank": None, "shared_experts": 0, "groups": 1, "top_groups": 1, "recompute": []}, False),
        ({"mtp_depth": 2, "dense_layers": 0, "shared_experts": 2, "top_k": 2, "top_groups": 1}, True),
        ({"mtp_depth": 0, "dense_layers": 3}, False),
        (
            {"mtp_depth": 1, "top_k": 3, "top_groups": 2, "group_top_k": 2, "norm_eps": 1e-2, "latent_norm_eps": 0.3},
            False,
        ),
    ],
)
def test_losses_and_gradients_equal_the_plain_formulas(change, packed):
    """Of the main loss, of MTP at any depth and of the balance loss together."""
    model = build(dataclasses.replace(CONFIG, **change))
    depths, alpha = model.config.mtp_depth, 0.05
    model.mtp_weight = 0.3
    for router in model.routers().values():
        router.balance_weight = alpha
    torch.manual_seed(0)
    tokens_BS = torch.randint(50, (2, 13))
    documents_BS = torch.tensor([[0] * 5 + [1] * 8, [4] * 9 + [7] * 2 + [8] * 2], dtype=torch.int32) if packed else None
    model(tokens_BS, documents_BS=documents_BS).backward()

    reference = reference_of(model, alpha)
    seen = gradients(reference, Batch(tokens_BS, documents_BS), 0.3)
    torch.testing.assert_close(model.losses.main, seen.main.detach())
    torch.testing.assert_close(model.losses.mtp, [loss.detach() for loss in seen.mtp])
    for name, parameter in model.named_parameters():
        expected = reference.weights[name].grad
        # fp32 sums in another order; gradients are of size 1e-3 to 1
        torch.testing.assert_close(parameter.grad, expected, atol=2e-6, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    for name, router in model.routers().items():
        torch.testing.assert_close(router.load_E, seen.loads[name])
    recorded = sum(router.balance_loss for router in model.routers().values())
    if depths or model.config.dense_layers < model.config.layers:
        torch.testing.assert_close(recorded, seen.balance.detach())


def test_chunks_equal_the_whole():
    """Three chunks, with global names, the same initial values and the same gradients."""
    config = dataclasses.replace(CONFIG, mtp_depth=2)
    whole = build(config)
    first = build(config, layers=range(1), has_embedding=True, has_head=False)
    middle = build(config, layers=range(1, 2), has_embedding=False, has_head=False)
    last = build(config, layers=range(2, 3), has_embedding=False, has_head=True)
    chunks = [first, middle, last]
    assert set().union(*(dict(chunk.named_parameters()) for chunk in chunks)) == set(dict(whole.named_parameters()))
    for model in (whole, last):
        model.mtp_weight = 0.3
    tokens_BS = torch.randint(50, (2, 13))
    expected = whole(tokens_BS)
    expected.backward()
    hidden = middle(first(tokens_BS))
    assert hidden.shape == (2, 12, 16)
    loss = last(hidden, tokens_BS=tokens_BS)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    gradients: dict[str, torch.Tensor] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            gradients[name] = gradients.get(name, 0) + parameter.grad  # the two embedding tables are tied
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_chunks_in_one_process_share_the_embedding():
    first = build(CONFIG, layers=range(2), has_head=False)
    last = DeepSeekV3(
        CONFIG,
        HighPrecision(torch.float32, build_kernels("cpu")),
        seq_len=12,
        layers=range(2, 3),
        has_embedding=False,
        has_head=True,
        embedding=first.embedding,
        device="meta",
    )
    initialise(last, 3)
    assert last.embedding.weight is first.embedding.weight


def test_eval_counts_nothing_and_gives_the_main_loss():
    model = build(CONFIG)
    tokens_BS = torch.randint(50, (2, 13))
    loss = model.eval()(tokens_BS)
    logits = model.logits(tokens_BS[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens_BS[:, 1:].flatten())
    torch.testing.assert_close(loss[0], expected)
    torch.testing.assert_close(model.logits(tokens_BS[:, :-1], last=True), logits[:, -1:])
    assert model.losses.count == 0
    assert all(router.load_E.sum() == 0 and router.score_E.sum() == 0 for router in model.routers().values())


def test_losses_and_load_accumulate_over_micro_batches_until_cleared():
    model = build(CONFIG)
    for _ in range(2):
        model(torch.randint(50, (2, 13))).backward()
    assert model.losses.count == 2
    assert list(model.routers()) == ["layers.1", "layers.2", "mtp.0"]
    loads = [int(router.load_E.sum()) for router in model.routers().values()]
    assert loads == [2 * 2 * 12 * 3, 2 * 2 * 12 * 3, 2 * 2 * 11 * 3]
    model.losses.clear()
    router = model.routers()["layers.1"]
    assert 0 < router.entropy() < torch.log(torch.tensor(8.0))
    router.clear()
    assert model.losses.count == 0 and router.load_E.sum() == 0


@pytest.mark.parametrize("recompute", [[], list(Recompute)])
def test_bf16_is_near_fp32(recompute):
    """bf16 weights with fp32 gradients; 5 % is several roundings of 2^-8 through four blocks.

    Every token takes every expert: a near tie could send it elsewhere in bf16.
    """
    config = dataclasses.replace(CONFIG, recompute=recompute, init_std=0.1, experts=4, top_k=4, groups=1, top_groups=1)
    torch.manual_seed(0)
    exact = build(config)
    model = DeepSeekV3.whole(
        config, HighPrecision(torch.bfloat16, build_kernels("cpu")), seq_len=12, dtype=torch.bfloat16
    )
    model.load_state_dict(exact.state_dict())
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    tokens_BS = torch.randint(50, (2, 13))
    losses = []
    for each in (exact, model):
        each.mtp_weight = 0.3
        loss = each(tokens_BS)
        loss.backward()
        losses.append(loss)
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-3, atol=0)
    for (name, parameter), reference in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32, name
        error = (parameter.grad - reference.grad).norm() / reference.grad.norm()
        assert error < 0.05, (name, error)


@pytest.mark.skipif(native.why_absent() is not None, reason=native.why_absent() or "")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_expert_a_token_makes_the_same_model_with_and_without_compiled_code(dtype):
    """Every bit of loss, logits and gradients. In bf16 torch does the order of rows alone: the rest rounds differently, which
    could send a token elsewhere."""
    config = dataclasses.replace(CONFIG, top_k=1, groups=1, top_groups=1)
    tokens_BS = torch.randint(50, (2, 13), generator=torch.Generator().manual_seed(1))
    results = []
    compiled, plain = build_kernels("cpu"), PlainKernels()
    if dtype == torch.bfloat16:
        plain = build_kernels("cpu")
        plain.sort_by_expert = PlainKernels().sort_by_expert
    for kernels in (compiled, plain):
        model = DeepSeekV3.whole(config, HighPrecision(dtype, kernels), seq_len=12, dtype=dtype)
        model.load_state_dict(build(config).state_dict())
        loss = model(tokens_BS)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        results.append([loss, model.logits(tokens_BS[:, :-1]), *grads])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
