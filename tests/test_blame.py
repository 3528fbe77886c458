"""Real ranks of a tiny model, one of which fails in the middle of a step: the driver names it, and what happened there."""

import os
import sys
from pathlib import Path

import pytest

from cluster.cause import Cause, Kind, name_cause, read_report
from cluster.launch import Place
from conf.errors import EXIT_CRASH
from conf.load import compose, read_config, write_config
from tests.ranks import CONTEXT
from tests.small import arguments

WORDS = "the server of this layer timed out"
FAILS_AT = 40
"""A call of the feed-forward part, in a step that is not the first."""


def leave(code: int) -> None:
    os._exit(code)


def leave_by_exit(code: int) -> None:
    sys.exit(code)


def raise_error(_: int) -> None:
    raise RuntimeError(WORDS)


def be_rank(rank: int, config_path: str, store: str, fault: str, code: int) -> None:
    """One of two ranks; rank 1 meets the fault."""
    os.environ.update(SLUICE_STORE=store, GLOO_SOCKET_IFNAME="lo")
    from train.model.moe import MoE
    from train.worker import run_rank

    calls, forward = [], MoE.forward

    def broken(module, *given):
        calls.append(module)
        if fault == "backward" and len(calls) >= FAILS_AT:
            given[0].register_hook(lambda _: raise_error(code))
        elif len(calls) >= FAILS_AT:
            globals()[fault](code)
        return forward(module, *given)

    if rank == 1:
        MoE.forward = broken
    config = read_config(config_path)
    sys.exit(run_rank(config, Place(rank, 2, rank, 2), Path(config.runs) / config.name / "logs"))


def cause_of(tmp_path: Path, fault: str, code: int) -> Cause:
    """What the driver says of a run whose rank 1 meets this fault."""
    config = compose(
        *arguments(tmp_path, "parallel.dp=2", "checkpoint.every=0", "log.validate_every=0", "cluster.timeout=60")
    )
    folder = Path(config.runs) / config.name
    folder.mkdir(parents=True)
    write_config(config, str(folder / "config.yaml"))
    given = str(folder / "config.yaml"), str(tmp_path / "store"), fault, code
    ranks = [CONTEXT.Process(target=be_rank, args=(rank, *given)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(100)
    cause = name_cause([read_report(rank, ranks[rank].exitcode, folder / "logs") for rank in range(2)], {})
    assert cause is not None, [process.exitcode for process in ranks]
    return cause


@pytest.mark.parametrize("code", [0, 75])
def test_a_rank_that_leaves_in_a_step_as_if_all_were_well_is_named(tmp_path, code):
    cause = cause_of(tmp_path, "leave", code)
    assert (cause.ranks, cause.code) == ((1,), EXIT_CRASH)
    assert cause.text == f"rank 1 ended by exit code {code} in the middle of its work"


@pytest.mark.parametrize("fault", ["raise_error", "backward", "leave_by_exit"])
def test_an_error_in_the_pipeline_is_named_by_what_was_raised_first(tmp_path, fault):
    cause = cause_of(tmp_path, fault, 0)
    words = "SystemExit: 0" if fault == "leave_by_exit" else f"RuntimeError: {WORDS}"
    function = fault if fault == "leave_by_exit" else "raise_error"
    assert (cause.kind, cause.ranks) == (Kind.crash, (1,)), "words of a user's error are no hang"
    assert cause.text.startswith(f"rank 1 failed: {words} (tests/test_blame.py:") and cause.text.endswith(
        f", in {function})"
    )
    lines = cause.log.splitlines()
    assert any(line.startswith(words) for line in lines[-30:]), "what is shown of it"
    assert "kwargs: {" not in cause.log
