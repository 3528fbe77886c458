""".ci/gpu where it cannot check anything: it says what to install, by exit codes that .ci/run tells apart."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from conf.schema import ROOT
from tests.ghost import check


def gpu_checks(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """.ci/gpu of a checkout that has nothing else."""
    (tree / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "gpu", tree / ".ci")
    outside = {name: value for name, value in os.environ.items() if name != "SLUICE_GPU_PYTHON"} | environment
    return subprocess.run(
        [str(tree / ".ci" / "gpu"), *arguments], env=outside, capture_output=True, text=True, timeout=60
    )


def test_without_a_cuda_build_it_says_how_to_get_one(tmp_path):
    found = gpu_checks(tmp_path)
    assert found.returncode == 3 and "pip install torch==" in found.stdout


def test_a_python_that_is_named_must_have_a_cuda_build(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # no installed package is seen
    bare.chmod(0o755)
    found = gpu_checks(tmp_path, SLUICE_GPU_PYTHON=str(bare))
    assert found.returncode == 1 and f"{bare} has no CUDA build of torch" in found.stdout


def test_a_compile_that_takes_too_long_is_reported():
    problems, table = check.kernels(limit=0.05)
    assert problems == ["bench.compile_kernels had no end after 0.05 s: it said nothing"] and table == []


def test_a_check_that_raises_does_not_take_the_others_with_it():
    def late() -> tuple[list[str], list[str]]:
        raise subprocess.TimeoutExpired("a compiler", 900.0)

    problems, table = check.tried(late)
    assert problems == ["it ended early: TimeoutExpired('a compiler', 900.0)"]
    assert table == [] and check.tried(lambda: (["one"], ["table"])) == (["one"], ["table"])


def test_a_commit_is_checked_as_ci_does_before_the_tests():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    checks = (ROOT / ".ci" / "run").read_text().partition("--no-compile")[2].partition("\ncode=")[0]
    at_a_commit = [hook["entry"] for hook in hooks if "stages" not in hook]
    assert at_a_commit == [check.strip(" \\\n") for check in checks.split("&&") if check.strip(" \\\n")]


def test_a_push_is_checked_by_the_command_of_a_working_day():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    (at_a_push,) = [hook["entry"] for hook in hooks if hook.get("stages") == ["pre-push"]]
    assert at_a_push.endswith("--quick")
    assert all(at_a_push in (ROOT / page).read_text() for page in ("README.md", "CONTRIBUTING.md"))
