"""Scores the model's answers to held-out questions by their similarity to the true answers.

The true answer is the last learnt turn of a held-out chat. The question is the chat before this turn. The model decodes
greedily, up to the stop token or ANSWER_TOKENS tokens. The score is ROUGE-L: F1 of the longest common subsequence of
words (Lin 2004; lower case, letters and digits).

Common words give a high score, so two baselines are scored too: the model's answer to another question, and the most
frequent training answer.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from conf.errors import UserError
from train.data.packing import Documents
from train.data.tokenizer import Tokenizer
from train.generate.decoder import Decoder
from train.generate.generation import Generation, Limits
from train.generate.sampling import Sampler

ANSWER_TOKENS = 64
ANSWERED_AT_ONCE = 32
"""Number of questions that are answered in one batch."""
SHOWN_QUESTIONS = 5
"""Number of questions whose answers are kept as text."""


@dataclass(frozen=True)
class HeldOutQuestion:
    """A question and its true answer.

    The answer is the last learnt turn of a held-out chat. The question is the chat before this turn.
    """

    prompt: list[int]
    answer: list[int]
    """Tokens of the true answer, including its stop token."""


@dataclass(frozen=True)
class AnswerScore:
    """The similarity of a set of answers to the true answers."""

    of: str
    """Text for the user: where the answers come from."""
    rouge_l: float
    """Mean ROUGE-L over the questions, from 0 to 1."""
    loss: float | None = None
    """Held-out loss in nats per learnt token; None for a baseline."""


@dataclass(frozen=True)
class JudgedAnswers:
    """The scores and examples of answers that evaluate.json stores."""

    questions: int
    scores: list[AnswerScore]
    examples: list[dict[str, str]]
    """Texts of the question, the true answer, and each model's answer."""

    def plain(self) -> dict[str, Any]:
        """Returns the object for the key `answers` of evaluate.json."""
        return asdict(self)


def find_questions(documents: Documents, count: int) -> list[HeldOutQuestion]:
    """Returns at most `count` questions, spread evenly over the chats. Raises UserError if there is none."""
    found = list(_last_turns(documents))
    stop = Counter(each.answer[-1] for each in found).most_common(1)[0][0]
    whole = [each for each in found if each.answer[-1] == stop and len(each.answer) > 1]
    if not whole:
        rule = "needs a held-out chat whose answer has more than its stop token, and there is none"
        raise UserError("evaluate.answers", count, rule, "set evaluate.answers=0")
    return [whole[place * len(whole) // min(count, len(whole))] for place in range(min(count, len(whole)))]


def _last_turns(documents: Documents) -> Iterator[HeldOutQuestion]:
    assert documents.supervised is not None
    for start, length in zip(documents.starts_D.tolist(), documents.lengths_D.tolist(), strict=True):
        learnt_N = documents.supervised[start : start + length] > 0
        last = int(np.flatnonzero(learnt_N)[-1]) + 1
        before_N = np.flatnonzero(~learnt_N[:last])
        first = int(before_N[-1]) + 1 if len(before_N) else 1
        ids = documents.tokens[start : start + last].tolist()
        yield HeldOutQuestion(ids[:first], ids[first:])


def commonest_answer(documents: Documents, tokenizer: Tokenizer) -> str:
    """Returns the most frequent answer in the chats."""
    answers = Counter(tuple(each.answer) for each in _last_turns(documents))
    return text_of(tokenizer, list(answers.most_common(1)[0][0]))


def answer_questions(
    decoder: Decoder, tokenizer: Tokenizer, questions: list[HeldOutQuestion], context: int
) -> list[str]:
    """Returns the model's answer to each question. context: maximum tokens."""
    stops = frozenset({*tokenizer.stop_ids, questions[0].answer[-1]})
    texts = []
    for first in range(0, len(questions), ANSWERED_AT_ONCE):
        prompts = [each.prompt for each in questions[first : first + ANSWERED_AT_ONCE]]
        limits, sampler = Limits(ANSWER_TOKENS, context, stops), Sampler(tokenizer.vocab_size, temperature=0)
        generation = Generation(decoder, prompts, sampler, limits, seed=0)
        for _ in generation.steps():
            pass
        texts += [text_of(tokenizer, ids) for ids in generation.tokens]
    return texts


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Decodes the tokens of an answer, without a stop token."""
    special = tokenizer.bytes_V[ids[-1]] == 0 if ids else False
    return tokenizer.decode(ids[:-1] if special else ids).strip()


def mean_rouge_l(answers: list[str], truth: list[str]) -> float:
    """Returns the mean ROUGE-L of the answers."""
    return float(np.mean([rouge_l(*pair) for pair in zip(answers, truth, strict=True)]))


def to_other_questions(answers: list[str]) -> list[str]:
    """Gives each question the answer to another question."""
    order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(0)).tolist()
    moved = [""] * len(answers)
    for here, there in zip(order, [*order[1:], order[0]], strict=True):
        moved[there] = answers[here]
    return moved


def rouge_l(answer: str, truth: str) -> float:
    """Returns ROUGE-L of two texts, from 0 to 1."""
    found, wanted = (re.findall("[a-z0-9]+", text.lower()) for text in (answer, truth))
    lengths = [0] * (len(wanted) + 1)
    for word in found:
        diagonal = 0
        for place, other in enumerate(wanted, 1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == other else max(above, lengths[place - 1])
            diagonal = above
    return 2 * lengths[-1] / (len(found) + len(wanted)) if found and wanted else 0.0
