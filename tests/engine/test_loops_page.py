"""The scripts of the page on loops, small, in every kind of layout."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conf.schema import ROOT
from tests.docs import files
from tests.small import SMALL, environment

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


@pytest.mark.slow
def test_the_adapter_trains_on_files_and_leaves_weights(tmp_path):
    msgpack = pytest.importorskip("msgpack")
    (tmp_path / "prime_files.py").write_text(files(ROOT / "train/docs/loops.md")["prime_files.py"])
    for step in range(2):
        sample = [[3, 5, 7, 9, 11, 2, 4, 6], [False, True, True, True, False, True, True, True], [0.5] * 8, [-4.0] * 8]
        micro_batches = [[*sample, [0, 1, 2, 3, 0, 1, 2, 3], [1.0] * 8, "an environment"]] * 3
        path = tmp_path / "rollouts" / f"step_{step}" / "rank_0.bin"
        path.parent.mkdir(parents=True)
        path.write_bytes(msgpack.packb(micro_batches))
    words = [word for word in SMALL if not word.startswith(("steps=", "batch_size="))]
    command = [sys.executable, "prime_files.py", str(tmp_path), "2", *words, "parallel.dp=2", "micro_batch_size=2"]
    more = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "batch_size=4", f"runs={tmp_path}"],
        cwd=tmp_path,
        env=environment() | more,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["0", "1"]
    first, second = (load_file(tmp_path / "broadcasts" / f"step_{step}" / "model.safetensors") for step in (1, 2))
    assert (tmp_path / "broadcasts/step_2/STABLE").exists() and "lm_head.weight" in first
    assert any(not torch.equal(first[name], second[name]) for name in first)
