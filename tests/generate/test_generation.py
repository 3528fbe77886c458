"""What comes out of a generation: exactly the model's own choices, whatever the batch and whoever drafts."""

from collections import Counter

import pytest
import torch

from conf.errors import UserError
from conf.schema import Model
from tests.generate.test_decoder import random_model
from train.generate.decoder import Decoder
from train.generate.generation import EndReason, Generation, Limits
from train.generate.sampling import Sampler, accept_drafts, draw
from train.model.deepseek import DeepSeekV3

torch.set_num_threads(1)
CONTEXT = 48
END = 0


def model_config(depth: int, vocab_size: int = 40) -> Model:
    return Model(
        vocab_size=vocab_size, hidden=24, layers=2, dense_layers=1, heads=2, q_rank=12, kv_rank=8, nope_head_dim=6,
        rope_head_dim=4, v_head_dim=6, dense_width=32, expert_width=16, experts=4, top_k=2, groups=2, top_groups=1,
        mtp_depth=depth,
    )  # fmt: skip


def decoder_of(depth: int, vocab_size: int = 40) -> Decoder:
    return Decoder(random_model(model_config(depth, vocab_size), CONTEXT), CONTEXT)


def run(
    decoder: Decoder, prompts: list[list[int]], *, tokens: int = 20, seed: int = 0, end: int = END, **how
) -> Generation:
    speculative = how.pop("speculative", False)
    sampler = Sampler(decoder.config.vocab_size, **how)
    generation = Generation(
        decoder, prompts, sampler, Limits(tokens, CONTEXT, frozenset([end])), seed=seed, speculative=speculative
    )
    streamed = Counter()
    for new in generation.steps():
        streamed.update({index: len(ids) for index, ids in new.items()})
    assert [streamed[index] for index in range(len(prompts))] == [len(ids) for ids in generation.tokens]
    return generation


def one_by_one(decoder: Decoder, prompt: list[int], tokens: int) -> list[int]:
    """Greedy choices of the training model, which reads the whole text for each."""
    ids = list(prompt)
    while len(ids) < len(prompt) + tokens:
        with torch.no_grad():
            ids.append(decoder.model.logits(torch.tensor([ids]), last=True)[0, 0].argmax().item())
        if ids[-1] == END:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_greedy_tokens_are_the_training_models(depth):
    decoder = decoder_of(depth)
    prompts = [[5, 9, 30, 2, 7, 7, 1], [3], [8, 2, 2, 39]]
    expected = [one_by_one(decoder, prompt, 20) for prompt in prompts]
    generation = run(decoder, prompts, temperature=0, speculative=depth > 0)
    assert generation.tokens == expected
    assert run(decoder, prompts[1:2], temperature=0, speculative=depth > 0).tokens == expected[1:2]
    counts = generation.counts
    assert counts.drafted == depth * counts.row_steps and counts.decoded <= counts.row_steps + counts.accepted


def self_drafting(depth: int) -> DeepSeekV3:
    """A model whose next token depends on the last one alone, and MTP modules that are this model."""
    config = model_config(depth)
    config.layers, config.dense_layers = 1, 0
    model = random_model(config, CONTEXT)
    with torch.no_grad():
        block = model.layers["0"]
        block.attention.out.weight.zero_()
        # Rows of norm 1, which the module's norm of the embedding leaves alone.
        model.embedding.weight.div_(model.embedding.weight.square().mean(-1, keepdim=True).sqrt())
        for module in model.mtp:
            module.block.load_state_dict(block.state_dict())
            module.norm.weight.copy_(model.norm.weight)
            module.embedding_norm.weight.fill_(1)
            module.projection.weight.copy_(torch.eye(config.hidden, 2 * config.hidden))  # the embedding's half
    return model


@pytest.mark.parametrize(("depth", "temperature"), [(1, 0), (1, 1.0), (3, 1.0)])
def test_a_drafter_that_is_the_model_is_always_right(depth, temperature):
    decoder = Decoder(self_drafting(depth), CONTEXT)
    how = {"temperature": temperature, "speculative": True, "end": -1, "tokens": 21}
    counts = run(decoder, [[4, 9], [7, 1, 1, 3]], **how).counts
    assert counts.accepted == counts.drafted == depth * counts.row_steps
    assert counts.row_steps == 2 * -(-20 // (depth + 1))


@pytest.mark.parametrize("speculative", [False, True])
def test_a_prompt_does_not_depend_on_its_batch(speculative):
    decoder = decoder_of(2)
    prompts = [[5, 9, 30, 2, 7, 7, 1], [3], [8, 2, 2, 39], [3]]
    together = run(decoder, prompts, temperature=1.0, top_p=0.9, seed=7, speculative=speculative)
    for prompt, tokens, end in zip(prompts, together.tokens, together.ends, strict=True):
        alone = run(decoder, [prompt], temperature=1.0, top_p=0.9, seed=7, speculative=speculative)
        assert (alone.tokens, alone.ends) == ([tokens], [end])
    assert together.tokens[1] == together.tokens[3]
    assert run(decoder, prompts, temperature=1.0, seed=8).tokens != together.tokens


def test_why_a_text_ends():
    decoder = decoder_of(1)
    for speculative in (False, True):
        by_number = run(decoder, [[3, 4]], temperature=0, tokens=7, end=-1, speculative=speculative)
        assert by_number.ends == [EndReason.tokens] and len(by_number.tokens[0]) == 7
        token = by_number.tokens[0][3]
        by_end = run(decoder, [[3, 4]], temperature=0, tokens=7, end=token, speculative=speculative)
        assert by_end.ends == [EndReason.document]
        assert by_end.tokens[0] == by_number.tokens[0][: by_number.tokens[0].index(token)]
        by_context = run(decoder, [[3] * 40], temperature=0, tokens=100, end=-1, speculative=speculative)
        assert by_context.ends == [EndReason.context] and len(by_context.tokens[0]) == CONTEXT - 40
    with pytest.raises(UserError) as caught:
        run(decoder, [[3], [4] * CONTEXT])
    assert caught.value.field == "generate.prompt" and f"{CONTEXT} tokens" in str(caught.value)


def chi_square(counts: list[int], p: list[float]) -> float:
    total = sum(counts)
    return sum((count - total * share) ** 2 / (total * share) for count, share in zip(counts, p, strict=True))


def test_accepted_and_replaced_tokens_have_the_models_distribution():
    """Of `accept_drafts` alone, with a drafter that has nothing to do with the model."""
    torch.manual_seed(3)
    vocab, rows = 6, 40_000
    p_LV = torch.rand(2, vocab).softmax(-1)
    q_V = torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0, 0.0])
    q_BKV = q_V.expand(rows, 1, vocab)
    drafts_BK = draw(q_BKV[:, 0], torch.rand(rows)).unsqueeze(1)
    counts_B, next_B = accept_drafts(drafts_BK, q_BKV, p_LV.expand(rows, 2, vocab), torch.rand(rows, 2))
    first_B = torch.where(counts_B == 1, drafts_BK[:, 0], next_B)
    # 5 degrees of freedom: chance exceeds 20.5 once in a thousand times, and the seed is fixed.
    assert chi_square(first_B.bincount(minlength=vocab).tolist(), p_LV[0].tolist()) < 20.5
    second_B = next_B[counts_B == 1]
    assert chi_square(second_B.bincount(minlength=vocab).tolist(), p_LV[1].tolist()) < 20.5
    assert abs(counts_B.float().mean() - torch.minimum(p_LV[0], q_V).sum()) < 0.01


def test_speculative_text_has_the_distribution_of_plain_text():
    decoder = decoder_of(2, vocab_size=4)
    rows = 3000
    found = {}
    for speculative in (False, True):
        counter = Counter()
        sampler = Sampler(4, temperature=1.2, top_p=0.95)
        generation = Generation(
            decoder, [[1, 2]] * rows, sampler, Limits(4, CONTEXT, frozenset()), seed=0, speculative=speculative
        )
        for seed, row in enumerate(generation._rows):  # rows of one prompt would else draw the same
            row.generator.manual_seed(2 * seed + speculative)
        for _ in generation.steps():
            pass
        counter.update(map(tuple, generation.tokens))
        found[speculative] = counter
        if speculative:
            assert 0.2 < generation.counts.accepted / generation.counts.drafted < 0.95
    # Texts of four tokens, compared as two samples; those that are rare in both are counted as one.
    common = [text for text in found[False] | found[True] if found[False][text] + found[True][text] >= 20]
    pairs = [(found[False][text], found[True][text]) for text in common]
    pairs.append(tuple(rows - sum(column) for column in zip(*pairs, strict=True)))
    statistic = sum((a - b) ** 2 / (a + b) for a, b in pairs if a + b)
    freedom = len(pairs) - 1
    assert freedom > 20 and statistic < freedom + 4 * (2 * freedom) ** 0.5  # mean + 4 standard deviations


def test_temperature_and_top_p():
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, 9.0])
    plain = Sampler(4, temperature=1.0).probabilities(logits_V)
    torch.testing.assert_close(plain, logits_V[:4].softmax(-1))  # the last row is beyond the tokenizer
    torch.testing.assert_close(Sampler(4, temperature=0.5).probabilities(logits_V), (2 * logits_V[:4]).softmax(-1))
    assert Sampler(4, temperature=0).probabilities(logits_V).tolist() == [1, 0, 0, 0]
    nucleus = Sampler(4, temperature=1.0, top_p=0.7).probabilities(logits_V)
    torch.testing.assert_close(nucleus, torch.tensor([plain[0], plain[1], 0, 0]) / plain[:2].sum())
    assert Sampler(4, temperature=1.0, top_p=1e-6).probabilities(logits_V).tolist() == [1, 0, 0, 0]
    assert draw(torch.tensor([[0.0, 0.25, 0.75, 0.0]] * 4), torch.tensor([0.0, 0.2499, 0.25, 0.9999])).tolist() == [
        1,
        1,
        2,
        2,
    ]
