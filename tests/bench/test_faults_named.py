"""The benchmark of faults: how a run's incident is judged, one fault for real, and what `sluice why` says of that run."""

import json
import subprocess
import sys
import time

import pytest

from bench.fault_hooks import FAULTS
from bench.faults_named import CASES, FaultCase, judge_case
from cluster.judgement import Fault
from conf.schema import ROOT
from tests.small import environment


def test_every_case_has_a_fault_and_a_cause_that_exist():
    assert len({case.name + str(sorted(case.faults)) for case in CASES}) == len(CASES) >= 60
    assert {fault for case in CASES for fault in case.faults.values()} == FAULTS.keys()
    causes = {right for case in CASES for right in case.right if not right.startswith("kind:")}
    assert causes <= {fault.name for fault in Fault}


@pytest.mark.parametrize(
    ("ranks", "fault", "rank", "cause"),
    [
        ([1], "loader", True, True),
        ([1], "absent", True, False),
        ([0], "loader", False, False),
        ([], "unknown", False, False),
        ([0, 1], "loader", False, False),
    ],
)
def test_a_wrong_rank_and_an_unknown_one_count_as_failures(tmp_path, ranks, fault, rank, cause):
    (tmp_path / "logs").mkdir()
    now = time.time()
    incident = {"time": now, "ranks": ranks, "fault": fault, "kind": "hang", "text": "", "waits": []}
    incident |= {"among": [], "where": "", "advice": ""}
    case = FaultCase("dp2", {1: "loader_sleep"}, ("loader",))
    (tmp_path / "logs" / "incident_1.json").write_text(json.dumps(incident))
    assert judge_case(case, tmp_path, now - 1).said == "the fault did not come to pass"
    (tmp_path / "struck_1").write_text(str(now - 3))
    judged = judge_case(case, tmp_path, now - 4)
    assert (judged.rank, judged.cause, round(judged.seconds)) == (rank, cause, 3)
    assert judge_case(case, tmp_path, now + 1).said == "no incident"


@pytest.mark.slow
def test_a_rank_that_leaves_a_collective_out_is_named(tmp_path):
    """And not the one that fails of it."""
    words = [
        sys.executable,
        "-m",
        "bench.faults_named",
        "--only",
        "dp2:skip:local",
        "--out",
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=170)
    assert "of 1: right rank 1, right cause 1" in done.stdout, done.stdout + done.stderr
    assert json.loads((tmp_path / "out.json").read_text())[0]["rank"]
