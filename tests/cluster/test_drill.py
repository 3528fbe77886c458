"""The drill on a toy run: two faults, and losses equal to those of the unbroken run."""

import math

import pytest

from cluster.drill import main, worst_difference
from conf.errors import EXIT_OK


def test_the_worst_difference_is_found():
    assert worst_difference({1: 4.0, 2: 2.0}, {1: 4.0, 2: 2.5}) == (2, 0.25)
    assert worst_difference({1: 4.0, 2: 2.0}, {1: 4.0}) == (2, math.inf)


@pytest.mark.slow
def test_a_drill_of_two_faults(tmp_path, capsys):
    toy = (
        "model.hidden=32 model.layers=2 model.experts=8 model.vocab_size=512 seq_len=32 batch_size=4 micro_batch_size=1"
    )
    words = f"--faults 2 --seed 5 conf=tiny name=toy runs={tmp_path} steps=50 parallel.dp=2 checkpoint.every=5 {toy}"
    assert main(words.split()) == EXIT_OK, capsys.readouterr()
    said = capsys.readouterr().out
    assert "fault 2/2" in said and "largest relative difference of a loss: 0 " in said
