"""What a rank says of its own failure, and how long it waits for data."""

import json
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from cluster.cause import name_cause, read_report
from cluster.place import Place
from conf.errors import EXIT_CRASH, EXIT_DIVERGED, EXIT_STOPPED, EXIT_USER, StopInterrupt, UserError
from parallel.exchange import is_timeout
from tests.ranks import run_processes
from train.data.prepare_progress import ReportProgress
from train.loop.hooks.skipped_steps import RunDiverged
from train.rank import guarded, in_turn


def wrapped(error: Exception) -> Exception:
    """As the pipeline does: its own error, caused by the real one."""
    try:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("[Stage 0] failed to run forward") from cause
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "timeout"),
    [
        (
            RuntimeError(
                "[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation to complete"
            ),
            True,
        ),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:557] Application timeout caused pair closure"), True),
        (dist.DistStoreError("wait timeout after 1000ms, keys: /default_pg/0//cpu//0/0"), True),
        (
            dist.DistNetworkError("The client socket has timed out after 1000ms while trying to connect to (n1, 1)."),
            True,
        ),
        (dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL ran for 9 milliseconds"), True),
        (RuntimeError("Wait timeout"), True),  # gloo's, where the ranks of a group meet
        (RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:44"), False),
        (ValueError("the request timed out"), False),  # data, not another rank
        (RuntimeError("the server of the tokenizer timed out"), False),
        (TimeoutError("timed out waiting for a lock"), False),
    ],
)
def test_a_wait_for_another_rank_is_told_from_other_errors(error, timeout):
    assert is_timeout(error) is timeout
    assert is_timeout(wrapped(error)) is timeout


BAD_INPUT = UserError("data.path", "nowhere", "must exist", "give another")
ERRORS = [(BAD_INPUT, EXIT_USER), (RunDiverged("not finite"), EXIT_DIVERGED), (ValueError("boom"), EXIT_CRASH)]


def fails(error: Exception):
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize("world", [1, 2])
def test_an_error_goes_to_the_driver_or_where_there_is_none_to_the_terminal(tmp_path, capfd, world):
    """World of 1 with a driver: a job of a sweep, or cluster=ray. World of 2 without one: torchrun."""
    place = Place(world - 1, world, world - 1, world)
    for error, code in ERRORS:
        assert guarded(place, tmp_path, fails(error)) == code
        said = json.loads((tmp_path / f"rank_{world - 1}.error.json").read_text())
        assert said["code"] == code and str(error) in said["message"]
    assert capfd.readouterr().err == ""
    for error, code in ERRORS[1:]:
        assert guarded(place, None, fails(error)) == code
        shown = capfd.readouterr().err
        assert str(error) in shown and ("rank 1: " in shown) is (world == 2)
    with pytest.raises(UserError, match="nowhere"):
        guarded(place, None, fails(BAD_INPUT))


def test_an_exit_in_the_middle_of_the_work_is_an_error_and_a_mark_tells_of_one_that_nobody_catches(tmp_path):
    place, mark = Place(1, 2, 1, 2), tmp_path / "rank_1.at_work"

    def work() -> int:
        assert mark.exists()
        return EXIT_STOPPED

    assert guarded(place, tmp_path, work) == EXIT_STOPPED and not mark.exists()
    assert guarded(place, tmp_path, fails(SystemExit(0))) == EXIT_CRASH and not mark.exists()
    said = json.loads((tmp_path / "rank_1.error.json").read_text())
    assert said["headline"].startswith("SystemExit: 0 (tests/test_rank.py:") and said["kind"] == "crash"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), EXIT_CRASH, "KeyboardInterrupt (tests/test_rank.py:"),
        (StopInterrupt(), EXIT_STOPPED, "this rank alone received a stop signal"),
    ],
)
def test_an_interrupt_of_one_rank_is_named_and_not_the_neighbour_that_loses_it(tmp_path, error, code, words):
    assert guarded(Place(1, 2, 1, 2), tmp_path, fails(error)) == code
    assert guarded(Place(0, 2, 0, 2), tmp_path, fails(RuntimeError("Connection closed by peer"))) == EXIT_CRASH
    reports = [read_report(rank, each, tmp_path) for rank, each in enumerate((EXIT_CRASH, code))]
    cause = name_cause(reports, {})
    assert (cause.ranks, cause.code) == ((1,), EXIT_CRASH) and cause.text.startswith(f"rank 1 failed: {words}")
    assert reports[1].bad is (code == EXIT_CRASH), "who was asked to stop has not failed"


def test_the_first_failure_is_named_though_the_clock_of_its_process_was_set_an_hour_ahead(tmp_path, monkeypatch):
    now = time.time
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: now() + 3600)
        guarded(Place(1, 2, 1, 2), tmp_path, fails(ValueError("boom")))
    guarded(Place(0, 2, 0, 2), tmp_path, fails(RuntimeError("Connection closed by peer")))
    cause = name_cause([read_report(rank, EXIT_CRASH, tmp_path) for rank in range(2)], {})
    assert cause.ranks == (1,) and "boom" in cause.text


def test_an_error_of_the_user_is_one_screen_wherever_it_was_raised(tmp_path):
    place = Place(1, 2, 1, 2)
    assert guarded(place, tmp_path, fails(wrapped(BAD_INPUT))) == EXIT_USER
    said = json.loads((tmp_path / "rank_1.error.json").read_text())
    assert said["message"] == str(BAD_INPUT) and said["kind"] == "user"
    with pytest.raises(UserError, match="nowhere"):
        guarded(place, None, fails(wrapped(BAD_INPUT)))


def wait_for_data(rank: int, store: str) -> None:
    """It takes longer than the collectives of this group may, once both ranks have met."""
    group = {"init_method": f"file://{store}", "rank": rank, "world_size": 2, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", **group)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)

    def make(_: ReportProgress) -> str:
        if rank == 0:
            time.sleep(3)
        return "made"

    assert in_turn(Place(rank, 2, rank, 2), make) == "made"
    dist.destroy_process_group()


def test_ranks_wait_for_data_longer_than_for_each_other(tmp_path):
    run_processes(wait_for_data, str(tmp_path / "store"))


@pytest.mark.parametrize(("rank", "lines"), [(0, 1), (1, 0)])
def test_ranks_that_are_asked_to_stop_before_their_first_step_say_so_once(tmp_path, capsys, rank, lines):
    place = Place(rank=rank, world=2, local_rank=rank, local_world=2)
    assert guarded(place, tmp_path, fails(StopInterrupt())) == EXIT_STOPPED
    assert capsys.readouterr().err.count("stopped before the first step; the same command resumes") == lines
