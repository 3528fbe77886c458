"""Modes that look at a run take its settings, under what the command line says."""

import subprocess
import sys

import pytest

from conf.errors import UserError
from conf.load import compose, write_config
from conf.schema import ROOT


@pytest.fixture
def runs(tmp_path):
    """A run `old` on a mix, of another shape than the recipe's."""
    mix = "data.mix=[{path: /a, weight: 2}, {path: /b}]"
    config = compose(
        "name=old",
        f"runs={tmp_path}",
        mix,
        "model.layers=3",
        "seq_len=48",
        "micro_batch_size=8",
        "parallel.dp=2",
        "parallel.ep=2",
    )
    (tmp_path / "old").mkdir()
    write_config(config, str(tmp_path / "old" / "config.yaml"))
    return tmp_path


def test_a_run_s_settings_need_not_be_repeated(runs):
    config = compose("mode=evaluate", "name=old", f"runs={runs}")
    assert (config.model.layers, config.seq_len, [part.path for part in config.data.mix]) == (3, 48, ["/a", "/b"])
    assert config.mode.value == "evaluate" and config.name == "old"
    assert (config.parallel.dp, config.parallel.ep) == (1, 1), "how to spread the work is this job's own"


def test_the_command_line_goes_over_them(runs):
    config = compose("mode=evaluate", "name=old", f"runs={runs}", "data.path=/c", "seq_len=32", "precision=fp32")
    assert (config.data.path, config.data.mix, config.seq_len, config.precision.name) == ("/c", [], 32, "fp32")
    assert config.model.layers == 3
    config = compose("mode=evaluate", "name=old", f"runs={runs}", "data=stdlib", "parallel.pp=2")
    assert (config.data.mix, config.data.format.value, config.parallel.pp) == ([], "stdlib", 2)


def test_a_checkpoint_brings_the_settings_of_the_run_around_it(runs):
    for folder in ("old", "old/checkpoints/step_00000004"):
        config = compose("mode=evaluate", f"runs={runs}", f"evaluate.checkpoint={runs / folder}")
        assert (config.name, config.model.layers) == ("old", 3)


def test_training_and_an_explicit_recipe_take_the_recipe_alone(runs):
    assert compose("name=old", f"runs={runs}").model.layers == 4
    config = compose("mode=evaluate", "conf=tiny", "name=old", f"runs={runs}")
    assert (config.model.layers, config.data.mix) == (4, [])
    assert compose("mode=evaluate", "name=none", f"runs={runs}").model.layers == 4


def test_rules_hold_for_what_comes_together(runs):
    with pytest.raises(UserError) as caught:
        compose("mode=evaluate", "name=old", f"runs={runs}", "seq_len=100000")
    assert caught.value.field == "seq_len"


def test_a_sweep_over_runs_looks_at_each_by_its_name(tmp_path):
    command = [sys.executable, "-m", "train", "-m", "mode=evaluate", "name=one,two", f"runs={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"there is none in {tmp_path / 'one' / 'checkpoints'}" in done.stderr, done.stderr
