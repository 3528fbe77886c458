"""Real ranks of a tiny model, one of which fails in the middle of a step: the driver names it, and what happened there."""

import os
import sys
import time
from pathlib import Path

import pytest

from cluster.cause import Cause, Kind, name_cause, read_report
from cluster.place import Place
from conf.errors import EXIT_CRASH, EXIT_OK
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
    with open(f"{store}_{rank}.out", "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    from train.checkpoint.staging import StagingBuffers
    from train.model.moe import MoE
    from train.worker import run_rank

    calls, forward, write = [], MoE.forward, StagingBuffers.write

    def broken(module, *given):
        calls.append(module)
        if fault == "backward" and len(calls) >= FAILS_AT:
            given[0].register_hook(lambda _: raise_error(code))
        elif len(calls) >= FAILS_AT:
            globals()[fault](code)
        return forward(module, *given)

    def stuck(buffers, folder, rank):
        if "step_00000002" in folder.name:
            time.sleep(1e6)
        return write(buffers, folder, rank)

    if rank == 1 and fault == "stuck":
        StagingBuffers.write = stuck
    elif rank == 1:
        MoE.forward = broken
    config = read_config(config_path)
    sys.exit(run_rank(config, Place(rank, 2, rank, 2), Path(config.runs) / config.name / "logs"))


def run_ranks(tmp_path: Path, fault: str, code: int, *more: str) -> tuple[Path, list[int | None]]:
    """The folder of a run whose rank 1 meets this fault, and the exit codes of its ranks."""
    config = compose(*arguments(tmp_path, "parallel.dp=2", "log.validate_every=0", "log.sample_tokens=0", *more))
    folder = Path(config.runs) / config.name
    folder.mkdir(parents=True)
    write_config(config, str(folder / "config.yaml"))
    given = str(folder / "config.yaml"), str(tmp_path / "store"), fault, code
    ranks = [CONTEXT.Process(target=be_rank, args=(rank, *given)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(150)
        process.kill()
    print("".join(path.read_text() for path in tmp_path.glob("store_*.out")))
    return folder, [process.exitcode for process in ranks]


def cause_of(tmp_path: Path, fault: str, code: int) -> Cause:
    """What the driver says of such a run."""
    folder, codes = run_ranks(tmp_path, fault, code, "checkpoint.every=0", "cluster.timeout=60")
    cause = name_cause([read_report(rank, codes[rank], folder / "logs") for rank in range(2)], {})
    assert cause is not None, codes
    return cause


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 75])
def test_a_rank_that_leaves_in_a_step_as_if_all_were_well_is_named(tmp_path, code):
    cause = cause_of(tmp_path, "leave", code)
    assert (cause.ranks, cause.code) == ((1,), EXIT_CRASH)
    assert cause.text == f"rank 1 ended by exit code {code} before the end of its work"


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_rank_whose_write_does_not_end_costs_one_checkpoint(tmp_path):
    folder, codes = run_ranks(tmp_path, "stuck", 0, "checkpoint.every=2", "cluster.timeout=20")
    assert codes == [EXIT_OK, EXIT_OK]
    assert [path.name for path in sorted((folder / "checkpoints").glob("step_*"))] == ["step_00000004", "step_00000006"]
    said = [" ".join((tmp_path / f"store_{rank}.out").read_text().split()) for rank in range(2)]
    assert "checkpoint of step 2 not written: no files from ranks 1 within" in said[0]
    assert "checkpoint of step 2 given up: rank 1 writes for" in said[1]
