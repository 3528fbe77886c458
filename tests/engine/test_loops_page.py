"""The scripts of the page on loops, small, in every kind of layout."""

import subprocess
import sys
from pathlib import Path

import pytest

from conf.schema import ROOT
from tests.docs import files
from tests.small import environment

LAYOUTS = [
    ["parallel.pp=2", "parallel.schedule=dualpipev"],
    ["parallel.dp=2", "parallel.ep=2"],
    ["parallel.cp=2"],
    ["parallel.dp=2", "parallel.zero=3"],
]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda words: words[-1])
@pytest.mark.parametrize("script", ["grpo", "distil"])
def test_a_script_runs_unchanged_in_a_layout(tmp_path, script, layout):
    for name, body in files(ROOT / "train/docs/loops.md").items():
        (Path(tmp_path) / name).write_text(body)
    words = [*layout, f"runs={tmp_path}"]
    code = f"import {script}; {script}.main(1, {words}, 2, 4)"
    more = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment() | more, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("held-out") == (5 if script == "grpo" else 3)
