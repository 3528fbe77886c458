"""Answers to held-out questions: the questions are as in training; ROUGE-L; and the baselines that only match the
format."""

import json
import random

import numpy as np
import pytest
import torch

from conf.errors import EXIT_OK, UserError
from conf.load import compose
from tests.layouts import train_on
from tests.loop.test_tuning import overrides
from train.data.corpus import build_corpus
from train.data.packing import Documents
from train.evaluate.answers import HeldOutQuestion, commonest_answer, find_questions, rouge_l, to_other_questions
from train.evaluate.run import evaluate

torch.set_num_threads(1)


def test_rouge_l_is_that_of_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk and scikit-learn

    draw, theirs = random.Random(3), RougeScorer(["rougeL"])
    words = ["Return", "the", "line's", "end", "of_file", "3.5", "(x)", "caf\u00e9", ""]
    for _ in range(300):
        one, other = (" ".join(draw.choices(words, k=draw.randint(0, 12))) for _ in range(2))
        assert rouge_l(one, other) == pytest.approx(theirs.score(other, one)["rougeL"].fmeasure, abs=1e-12)
    assert rouge_l("a b c", "a c") == pytest.approx(0.8)


def chats(*chats: list[tuple[int, int]]) -> Documents:
    """Chats of (token, learnt)."""
    flat = [pair for chat in chats for pair in chat]
    lengths_D = np.array([len(chat) for chat in chats])
    starts_D = np.cumsum([0, *lengths_D[:-1]])
    tokens, learnt = (np.array(part) for part in zip(*flat, strict=True))
    return Documents(tokens.astype(np.uint32), starts_D, lengths_D, learnt.astype(np.uint8))


def test_a_question_ends_where_the_last_learnt_turn_begins():
    """An answer that was cut, whose end is no stop token, is none."""
    documents = chats(
        [(1, 0), (2, 1), (9, 1), (3, 0), (4, 1), (5, 1), (9, 1), (7, 0)],
        [(1, 0), (6, 1), (9, 1)],
        [(1, 0), (6, 1), (6, 1)],
        [(1, 0), (9, 1)],
    )
    assert find_questions(documents, 10) == [HeldOutQuestion([1, 2, 9, 3], [4, 5, 9]), HeldOutQuestion([1], [6, 9])]
    assert len(find_questions(documents, 1)) == 1


def test_chats_whose_answers_are_only_a_stop_token_are_refused():
    with pytest.raises(UserError, match="more than its stop token"):
        find_questions(chats([(1, 0), (9, 1)], [(2, 0), (3, 0), (9, 1)]), 10)


def test_answers_to_other_questions_are_never_their_own():
    answers = [str(number) for number in range(50)]
    moved = to_other_questions(answers)
    assert sorted(moved) == sorted(answers) and all(a != b for a, b in zip(answers, moved, strict=True))


@pytest.mark.slow
def test_a_tuned_run_is_set_beside_its_start_and_what_a_format_alone_gets(tmp_path, capsys):
    """Of two steps, so the figures are poor; the file, the screen and the report have them."""
    given = overrides(tmp_path, "steps=2", "optim.lr=0.01", "optim.warmup_steps=0", "data.validation_fraction=0.3")
    train_on(compose(*given, "name=first"), 1)
    again = [*given, "name=tuned", f"init_from={tmp_path}/runs/first", "evaluate.answers=6"]
    train_on(compose(*again), 1)
    looked = compose("mode=evaluate", "name=tuned", f"runs={tmp_path}/runs", "cluster.threads=1", "cluster.device=cpu")
    assert evaluate(looked, alone=True) == EXIT_OK
    found = json.loads((tmp_path / "runs/tuned/evaluate.json").read_text())
    own, start, shuffled, common = found["answers"]["scores"]
    assert own["loss"] == pytest.approx(found["total"]["loss"]) and start["loss"] > own["loss"]
    assert found["total"]["positions"] == [] and found["total"]["mtp"] == []
    last = (tmp_path / "runs/tuned/metrics.jsonl").read_text().splitlines()[-1]
    assert found["total"]["loss"] == pytest.approx(json.loads(last)["validation_loss"], rel=1e-6)
    assert all(0 <= row["rouge_l"] <= 1 for row in (own, start, shuffled, common))
    said, page = capsys.readouterr().out, (tmp_path / "runs/tuned/report.html").read_text()
    for words in ("before the tune", "each compared with another question", "the most common answer"):
        assert words in said and words in page
    text = commonest_answer(build_corpus(compose(*again)).parts[0].train, build_corpus(compose(*again)).tokenizer)
    assert text[:20] in common["of"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.format=text", "are generated for questions of chats"),
        ("parallel.dp=2", "one process"),
    ],
)
def test_what_cannot_be_answered_is_refused(override, words):
    with pytest.raises(UserError, match=words) as error:
        compose("mode=evaluate", "conf=tiny", "data.format=chat", "data.path=x", "evaluate.answers=3", override)
    assert error.value.field == "evaluate.answers"
