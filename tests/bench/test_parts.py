"""Every part of a step beside its peer: each runs once, forward and backward, on both sides."""

from bench.parts import Parts
from bench.train_step import Case


def test_every_part_runs_on_both_sides():
    for name, part in Parts(Case("debug", threads=1)).all().items():
        part.ours(), part.peer()
        assert name == "optimizer" or part.flops > 0
        if part.floor:
            part.floor()
