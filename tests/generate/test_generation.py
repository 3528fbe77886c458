"""The result of a generation: exactly the model's own choices, whatever else is in the batch."""

from collections import Counter

import pytest
import torch

from conf.errors import UserError
from conf.schema import Model
from tests.generate.test_decoder import random_model
from train.generate.decoder import Decoder
from train.generate.generation import EndReason, Generation, Limits
from train.generate.sampling import Sampler, draw

torch.set_num_threads(1)
CONTEXT = 48
END = 0


def model_config(depth: int = 0) -> Model:
    return Model(
        vocab_size=40, hidden=24, layers=2, dense_layers=1, heads=2, q_rank=12, kv_rank=8, nope_head_dim=6,
        rope_head_dim=4, v_head_dim=6, dense_width=32, expert_width=16, experts=4, top_k=2, groups=2, top_groups=1,
        mtp_depth=depth,
    )  # fmt: skip


def decoder_of(depth: int) -> Decoder:
    return Decoder(random_model(model_config(depth), CONTEXT), CONTEXT)


def run(
    decoder: Decoder, prompts: list[list[int]], *, tokens: int = 20, seed: int = 0, end: int = END, **how
) -> Generation:
    sampler = Sampler(decoder.config.vocab_size, **how)
    generation = Generation(decoder, prompts, sampler, Limits(tokens, CONTEXT, frozenset([end])), seed=seed)
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


@pytest.mark.parametrize("depth", [0, 1])
def test_greedy_tokens_are_the_training_models(depth):
    decoder = decoder_of(depth)
    prompts = [[5, 9, 30, 2, 7, 7, 1], [3], [8, 2, 2, 39]]
    expected = [one_by_one(decoder, prompt, 20) for prompt in prompts]
    generation = run(decoder, prompts, temperature=0)
    assert generation.tokens == expected
    assert run(decoder, prompts[1:2], temperature=0).tokens == expected[1:2]
    assert generation.counts.decoded == sum(max(0, len(tokens) - 1) for tokens in expected)


def test_a_prompt_does_not_depend_on_its_batch():
    decoder = decoder_of(2)
    prompts = [[5, 9, 30, 2, 7, 7, 1], [3], [8, 2, 2, 39], [3]]
    together = run(decoder, prompts, temperature=1.0, top_p=0.9, seed=7)
    for prompt, tokens, end in zip(prompts, together.tokens, together.ends, strict=True):
        alone = run(decoder, [prompt], temperature=1.0, top_p=0.9, seed=7)
        assert (alone.tokens, alone.ends) == ([tokens], [end])
    assert together.tokens[1] == together.tokens[3]
    assert run(decoder, prompts, temperature=1.0, seed=8).tokens != together.tokens


def test_why_a_text_ends():
    decoder = decoder_of(1)
    by_number = run(decoder, [[3, 4]], temperature=0, tokens=7, end=-1)
    assert by_number.ends == [EndReason.tokens] and len(by_number.tokens[0]) == 7
    token = by_number.tokens[0][3]
    by_end = run(decoder, [[3, 4]], temperature=0, tokens=7, end=token)
    assert by_end.ends == [EndReason.document]
    assert by_end.tokens[0] == by_number.tokens[0][: by_number.tokens[0].index(token)]
    by_context = run(decoder, [[3] * 40], temperature=0, tokens=100, end=-1)
    assert by_context.ends == [EndReason.context] and len(by_context.tokens[0]) == CONTEXT - 40
    with pytest.raises(UserError) as caught:
        run(decoder, [[3], [4] * CONTEXT])
    assert caught.value.field == "generate.prompt" and f"{CONTEXT} tokens" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("tokens", 0), ("top_p", 0), ("top_p", 1.5), ("temperature", -1), ("temperature", float("nan"))],
)
def test_a_call_with_a_meaningless_setting_is_refused(field, value):
    """Calls from Python have not passed the bounds of recipes. With tokens=0 a text would never end."""
    with pytest.raises(UserError) as caught:
        run(decoder_of(0), [[3]], **{field: value})
    assert caught.value.field == field


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
