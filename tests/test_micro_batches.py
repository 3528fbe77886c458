"""The micro-batch that is chosen where none is given, and what is offered where ranks cannot share a batch."""

import itertools
from dataclasses import replace

import pytest

from conf.errors import UserError
from conf.load import compose, read_config, write_config
from conf.micro_batches import (
    MICRO_BATCH_TOKENS,
    batch_sizes,
    choose_micro_batch_size,
    divisors,
    in_lockstep,
    micro_batch_counts,
    share_of,
)
from conf.pipeline_schedules import SCHEDULES
from conf.schema import PipelineSchedule
from train.loop.layout_check import check_layout


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        (("seq_len=1024", "parallel.cp=2"), 8),
        ((), 16),
        (("parallel.dp=2",), 8),
        (("parallel.dp=16",), 1),
        (("batch_size=15", "parallel.dp=3"), 5),
        (("seq_len=1024",), 4),
        (("seq_len=4096",), 1),
        (("parallel.pp=2",), 8),
        (("parallel.pp=2", "parallel.schedule=dualpipev"), 4),
        (("parallel.pp=2", "parallel.dp=2", "parallel.schedule=dualpipev"), 2),
        (("optim.batch_ramp_start=4", "optim.batch_ramp_steps=5", "optim.batch_ramp_increment=4"), 4),
        (("optim.batch_ramp_start=6", "optim.batch_ramp_steps=5", "optim.batch_ramp_increment=2"), 2),
        (("micro_batch_size=2", "parallel.dp=2"), 2),
        (("conf=deepseek_v3", "data=stdlib"), 1),
    ],
)
def test_the_largest_size_that_fits_is_chosen_and_a_given_one_obeyed(overrides, size):
    config = compose(*overrides)
    assert config.micro_batch_size == size
    check_layout(config)


@pytest.mark.parametrize("schedule", PipelineSchedule)
def test_no_larger_size_would_run(schedule):
    base = compose()
    for pp, dp, batch in itertools.product((1, 2, 3), (1, 2), (12, 16, 20)):
        spread = replace(base.parallel, pp=pp, dp=dp, schedule=schedule)
        config = replace(base, parallel=spread, batch_size=batch)
        runs = [
            size
            for size in divisors(batch // dp)
            if size * config.seq_len <= MICRO_BATCH_TOKENS
            and not any(SCHEDULES[schedule].find_broken_rule(pp, each // (size * dp)) for each in batch_sizes(config))
        ]
        assert choose_micro_batch_size(config) == max(runs, default=1)


def test_the_file_of_a_run_holds_the_number(tmp_path):
    write_config(compose("parallel.dp=2"), str(tmp_path / "config.yaml"))
    assert "micro_batch_size: 8\n" in (tmp_path / "config.yaml").read_text()
    assert read_config(str(tmp_path / "config.yaml")).micro_batch_size == 8


def test_a_mode_that_looks_at_a_run_keeps_its_size_where_its_own_layout_takes_it(tmp_path):
    (tmp_path / "old").mkdir()
    write_config(compose("name=old", "micro_batch_size=8"), str(tmp_path / "old" / "config.yaml"))
    look = ("mode=evaluate", "name=old", f"runs={tmp_path}")
    assert [compose(*look, *more).micro_batch_size for more in ((), ("parallel.dp=4",))] == [8, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "field", "cure"),
    [
        (("parallel.dp=3",), "batch_size", "use batch_size=15 or 18, or parallel.dp=2 or 4"),
        (("parallel.dp=32",), "batch_size", "use batch_size=32, or parallel.dp=16"),
        (("parallel.dp=3", "micro_batch_size=16"), "batch_size", "batch_size=15 or 18 with micro_batch_size left out"),
        (("parallel.dp=3", "micro_batch_size=2"), "batch_size", "use batch_size=18 or 12, or parallel.dp=2 or 4"),
        (("parallel.dp=6", "parallel.ep=2"), "batch_size", "use batch_size=18 or 12, or parallel.dp=4 or 8"),
        (("parallel.dp=2", "micro_batch_size=16"), "micro_batch_size", "use micro_batch_size=8, or leave it out"),
        (("micro_batch_size=7",), "micro_batch_size", "use micro_batch_size=4, or leave it out"),
    ],
)
def test_what_is_offered_is_near_to_what_was_asked_and_works(overrides, field, cure):
    with pytest.raises(UserError) as caught:
        compose(*overrides)
    assert caught.value.field == field and cure in caught.value.cure
    for part in cure.removeprefix("use ").split(", or "):
        name, _, values = part.partition("=")
        given = [each for each in overrides if "micro_batch_size left out" not in part or "micro_batch" not in each]
        for value in values.removesuffix(" with micro_batch_size left out").split(" or ") if values else []:
            compose(*(each for each in given if not each.startswith(f"{name}=")), f"{name}={value}")


def test_ranks_that_work_in_lockstep_have_equal_shares_and_the_first_groups_a_micro_batch_more():
    """20 sequences in micro-batches of 2: ten, of which pairs of ranks take two at a time."""
    config = compose("parallel.dp=4", "parallel.ep=2", "parallel.uneven=true", "batch_size=20", "micro_batch_size=2")
    assert [share_of(config, 20, rank) for rank in range(4)] == [(0, 6), (6, 6), (12, 4), (16, 4)]
    assert [share_of(config, 16, rank) for rank in range(4)] == [(0, 4), (4, 4), (8, 4), (12, 4)]
    assert micro_batch_counts(config) == {3, 2}
    three = replace(config, parallel=replace(config.parallel, dp=6))
    assert [share_of(three, 28, rank) for rank in range(6)] == [(0, 6), (6, 6), (12, 4), (16, 4), (20, 4), (24, 4)]


@pytest.mark.parametrize(("ep", "cp", "ranks"), [(4, 1, 4), (4, 2, 2), (4, 4, 1), (2, 4, 1), (6, 4, 3), (1, 2, 1)])
def test_ranks_that_share_a_sequence_are_one_in_a_lockstep(ep, cp, ranks):
    assert in_lockstep(replace(compose().parallel, ep=ep, cp=cp)) == ranks


def test_a_ramp_may_begin_with_a_micro_batch_a_rank_and_the_nearest_batch_is_offered_first():
    words = "parallel.dp=4", "parallel.ep=2", "parallel.uneven=true", "micro_batch_size=2", "batch_size=20"
    ramp = "optim.batch_ramp_steps=2", "optim.batch_ramp_increment=4"
    assert batch_sizes(compose(*words, *ramp, "optim.batch_ramp_start=8")) == [8, 12, 16, 20]
    with pytest.raises(UserError, match="give every rank a micro-batch"):
        compose(*words, *ramp, "optim.batch_ramp_start=4")
    for batch, near in ((23, "24 or 12"), (13, "12 or 24"), (5, "6 or 3"), (4, "3 or 6")):
        with pytest.raises(UserError) as caught:
            compose("parallel.dp=3", "micro_batch_size=4", f"batch_size={batch}")
        assert caught.value.cure.startswith(f"use batch_size={near}")
    with pytest.raises(UserError) as caught:
        compose("parallel.dp=5", "micro_batch_size=1", "batch_size=12")
    assert caught.value.cure.endswith("parallel.dp=4 or 6, for equal shares of 12 sequences")
