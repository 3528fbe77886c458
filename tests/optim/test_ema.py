"""The moving average of weights: each update counts once, in the order in which they came."""

import torch

from train.loop.hooks.averaged_weights import Ema


def test_the_average_takes_a_tenth_of_every_update():
    """It is taken when the next step arrives, or when somebody asks."""
    master = torch.tensor([1.0, 2.0])
    ema, expected = Ema({"a": master}, decay=0.9), master.clone()
    for step in range(3):
        master.add_(1.0 + step)
        ema.update()
        expected = 0.9 * expected + 0.1 * master
    assert not torch.allclose(ema.average["a"], expected), "the last is on its way"
    for _ in range(2):
        ema.flush()
        torch.testing.assert_close(ema.average["a"], expected)


def test_a_restart_forgets_what_was_on_its_way():
    master = torch.tensor([1.0])
    ema = Ema({"a": master}, decay=0.5)
    master.fill_(9.0)
    ema.update()
    master.fill_(3.0)
    ema.restart()
    ema.flush()
    assert ema.average["a"].tolist() == [3.0]
