"""Text that a live engine generates, and the log-probabilities that training computes for it."""

import pytest
import torch

from conf.errors import UserError
from tests.engine.scenario import Played, play
from train.data.batch import GivenSample, batch_of_samples

PROMPTS = [[3, 5, 8, 13], [2], [300, 4, 4, 4, 4, 4, 9], [1, 1], [7, 6], [7, 6]]


def write(played: Played) -> None:
    """With top-p; the second time as the greedy choice; a policy's ratio is 1 at the first step."""
    engine = played.engine
    for number in range(2):
        drawn = engine.generate(PROMPTS, tokens=9, temperature=0.7, top_p=0.6, end_ids=range(0, 100, 3), seed=4)
        samples = [
            GivenSample(
                prompt + text.tokens,
                len(prompt),
                {"old_logprobs": text.logprobs, "advantages": 1.0, "temperatures": 0.7},
                text.experts_TLK,
            )
            for prompt, text in zip(PROMPTS, drawn, strict=True)
        ]
        lengths = {len(text.tokens) for text in drawn}
        assert len(lengths) > 2 and any(text.tokens[-1] in range(0, 100, 3) for text in drawn)
        assert drawn[4].tokens != drawn[5].tokens, "rows of one prompt draw from seeds of their own"
        assert all(
            cut >= before for text in drawn for cut, before in zip(text.cut_logprobs, text.logprobs, strict=True)
        )
        assert any(
            cut > before + 1e-3 for text in drawn for cut, before in zip(text.cut_logprobs, text.logprobs, strict=True)
        )
        batch = batch_of_samples(samples, 25)
        assert batch.supervised_BS is not None
        found, given = engine.logprobs(batch)[batch.supervised_BS], batch.tensors["old_logprobs"][batch.supervised_BS]
        assert (found - given).abs().max() < 1e-5
        engine.forward_backward(batch, "importance_sampling")
        played.found[f"loss.{number}"] = torch.tensor(engine.update().measured.main_loss)
    assert all(len(text.tokens) == 3 for text in engine.generate(PROMPTS[:2], tokens=3, temperature=0.0))
    for token in (-1, 10**6):
        with pytest.raises(UserError, match="must be token ids, 0 to"):
            engine.generate([[3], [5, token]], tokens=1)


def test_training_takes_the_log_probabilities_of_generation(tmp_path):
    found = play(tmp_path, "one", write, "batch_size=6", "model.scores=sigmoid")
    assert found["loss.0"].item() == pytest.approx(-1, abs=1e-5) and found["loss.1"].item() == pytest.approx(
        -1, abs=1e-5
    )


def refused(played: Played) -> None:
    with pytest.raises(UserError, match="must be one process"):
        played.engine.generate([[1]], tokens=1)


def test_ranks_of_a_layout_do_not_write(tmp_path):
    play(tmp_path, "two", refused, "parallel.dp=2", world=2)


def test_a_batch_of_samples_has_each_value_at_its_token():
    batch = batch_of_samples(
        [GivenSample([5, 6, 7, 8], 2, {"advantages": -1.0, "old_logprobs": [0.25, 0.5]})], 6, filling=9
    )
    assert batch.tokens_BS.tolist() == [[5, 6, 7, 8, 9, 9]] and batch.supervised_BS is not None
    assert batch.supervised_BS.tolist() == [[False, False, True, True, False, False]]
    assert batch.tensors["old_logprobs"].tolist() == [[0, 0, 0.25, 0.5, 0, 0]] and batch.targets == 2
    with pytest.raises(UserError, match="each of its 2 learnt tokens"):
        batch_of_samples([GivenSample([5, 6, 7, 8], 2, {"old_logprobs": [0.25]})], 6)
    with pytest.raises(UserError, match="shorten the sample"):
        batch_of_samples([GivenSample([5, 6, 7, 8], 2)], 3)
