"""Modes that look at a run take its settings, under what the command line says."""

import subprocess
import sys

import pytest
import yaml

from conf.errors import UserError
from conf.load import compose, read_config, write_config
from conf.schema import ROOT
from conf.yaml_file import escaped
from train.api import _quoted


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


@pytest.mark.slow
def test_a_run_s_settings_need_not_be_repeated(runs):
    config = compose("mode=evaluate", "name=old", f"runs={runs}")
    assert (config.model.layers, config.seq_len, [part.path for part in config.data.mix]) == (3, 48, ["/a", "/b"])
    assert config.mode.value == "evaluate" and config.name == "old"
    assert (config.parallel.dp, config.parallel.ep) == (1, 1), "how to spread the work is this job's own"


@pytest.mark.slow
def test_the_command_line_goes_over_them(runs):
    config = compose("mode=evaluate", "name=old", f"runs={runs}", "data.path=/c", "seq_len=32", "precision=fp32")
    assert (config.data.path, config.data.mix, config.seq_len, config.precision.name) == ("/c", [], 32, "fp32")
    assert config.model.layers == 3
    config = compose("mode=evaluate", "name=old", f"runs={runs}", "data=stdlib", "parallel.pp=2")
    assert (config.data.mix, config.data.format.value, config.parallel.pp) == ([], "stdlib", 2)


@pytest.mark.slow
def test_a_checkpoint_brings_the_settings_of_the_run_around_it(runs):
    for folder in ("old", "old/checkpoints/step_00000004"):
        config = compose("mode=evaluate", f"runs={runs}", f"evaluate.checkpoint={runs / folder}")
        assert (config.name, config.model.layers) == ("old", 3)


@pytest.mark.slow
def test_training_and_an_explicit_recipe_take_the_recipe_alone(runs):
    assert compose("name=old", f"runs={runs}").model.layers == 4
    config = compose("mode=evaluate", "conf=tiny", "name=old", f"runs={runs}")
    assert (config.model.layers, config.data.mix) == (4, [])
    assert compose("mode=evaluate", "name=none", f"runs={runs}").model.layers == 4


def test_rules_hold_for_what_comes_together(runs):
    with pytest.raises(UserError) as caught:
        compose("mode=evaluate", "name=old", f"runs={runs}", "seq_len=100000")
    assert caught.value.field == "seq_len"


@pytest.mark.slow
def test_a_sweep_over_runs_looks_at_each_by_its_name(tmp_path):
    command = [sys.executable, "-m", "train", "-m", "mode=evaluate", "name=one,two", f"runs={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"there is none in {tmp_path / 'one' / 'checkpoints'}" in done.stderr, done.stderr


SECRET = "s3cret-of-the-victim"
LOOKING = ["mode=evaluate", "mode=generate", "mode=export export.to=/nowhere", "mode=dashboard"]


def rewrite(runs, **changes):
    """Change values of the run's config.yaml, as a stranger can."""
    path = runs / "old" / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        *groups, last = key.split("__")
        place = settings
        for group in groups:
            place = place[group]
        place[last] = value
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["${oc.env:SECRET}", "a ${oc.env:SECRET,b}", "${${generate.prompt}:SECRET}", "${oc.decode:${seed}}"]
)
@pytest.mark.parametrize("mode", LOOKING)
def test_a_run_of_somebody_else_reads_nothing_of_this_machine(runs, monkeypatch, mode, text):
    monkeypatch.setenv("SECRET", SECRET)
    rewrite(runs, average__to=text, generate__prompt="oc.env")
    with pytest.raises(UserError) as caught:
        compose(*mode.split(), "name=old", f"runs={runs}")
    assert caught.value.field == "average.to" and "trust=true" in caught.value.cure and SECRET not in str(caught.value)


@pytest.mark.slow
def test_one_s_own_may_with_trust_and_references_need_none(runs, monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    path = rewrite(runs, average__to="${oc.env:SECRET}", score__to="${seq_len} ${model.layers}")
    config = compose("mode=evaluate", "name=old", f"runs={runs}", "trust=true")
    assert (config.average.to, config.score.to, config.trust) == (SECRET, "48 3", True)
    rewrite(runs, average__to=None, trust=True)
    config = compose("mode=evaluate", "name=old", f"runs={runs}")
    assert config.score.to == "48 3" and not config.trust, "a config.yaml cannot ask for trust"
    rewrite(runs, average__to="${oc.env:SECRET}")
    with pytest.raises(UserError, match="trust=true"):
        read_config(str(path))


@pytest.mark.slow
def test_a_value_that_only_looks_like_a_reference_stays_as_it_is(runs, monkeypatch):
    """Resolved once, written to config.yaml and read again by a rank, an escaped reference must not become a true one."""
    monkeypatch.setenv("SECRET", SECRET)
    rewrite(runs, average__to="\\${oc.env:SECRET}", evaluate__tasks=["\\${seed}", "\\${", "\\\\${seed}"])
    config = compose("mode=evaluate", "name=old", f"runs={runs}", "generate.prompt='echo \\${oc.env:SECRET}'")
    for _ in range(3):
        assert config.average.to == "${oc.env:SECRET}" and config.generate.prompt == "echo ${oc.env:SECRET}"
        assert config.evaluate.tasks == ["${seed}", "${", "\\1"]
        write_config(config, str(runs / "again.yaml"))
        config = read_config(str(runs / "again.yaml"))


@pytest.mark.slow
def test_the_name_of_a_folder_is_no_reference(runs, monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    folder = (runs / "old").rename(runs / "${oc.env:SECRET}")
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = _quoted(escaped(str(folder)))
    config = compose("mode=generate", f"runs={runs}", f"generate.checkpoint={checkpoint}")
    assert config.data.tokenizer == config.generate.checkpoint == str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        "_target_: os.system",
        "hydra: {callbacks: {a: {_target_: os.system}}}",
        "seed: !!python/object/apply:os.getpid []",
    ],
)
def test_nothing_that_a_run_names_is_imported_or_called(runs, body):
    path = runs / "old" / "config.yaml"
    path.write_text(f"{path.read_text()}{body}\n")
    for words in (["trust=true"], []):
        with pytest.raises(UserError, match=r"config\.yaml"):
            compose("mode=evaluate", "name=old", f"runs={runs}", *words)


@pytest.mark.slow
def test_definitions_of_tasks_which_are_code_are_named_by_the_user_alone(runs):
    rewrite(runs, evaluate__task_path=str(runs / "tasks"), evaluate__tasks=["mine"])
    with pytest.raises(UserError, match="can contain code"):
        compose("mode=evaluate", "name=old", f"runs={runs}")
    for words in (["trust=true"], [f"evaluate.task_path={runs / 'tasks'}"]):
        assert compose("mode=evaluate", "name=old", f"runs={runs}", *words).evaluate.task_path == str(runs / "tasks")
    assert compose("mode=evaluate", "name=old", f"runs={runs}", "evaluate.task_path=null").evaluate.task_path is None
    assert compose("mode=generate", "name=old", f"runs={runs}").evaluate.tasks == ["mine"]


def test_a_recipe_of_one_s_own_may_read_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    assert compose("average.to=${oc.env:SECRET}").average.to == SECRET


NAMED = {"model__router": "model.router", "model__block": "model.block", "data__source": "data.source"}


def name_code(runs, **more):
    """A run whose config.yaml names code for every place, which leaves a mark where it is imported."""
    mark = runs / "imported"
    (runs / "stranger_code.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Thing: pass\n")
    thing = {"_target_": "stranger_code.Thing"}
    changes = dict.fromkeys(NAMED, thing) | {"optim__extra_loss": thing, "callbacks": [thing], "data__mix": []}
    rewrite(runs, **(changes | more))
    return mark


@pytest.mark.slow
@pytest.mark.parametrize("key", NAMED)
def test_code_that_a_run_names_is_imported_with_trust_alone(runs, monkeypatch, key):
    monkeypatch.chdir(runs)
    others = {name: {} for name in NAMED if name != key}
    mark = name_code(runs, **others)
    words = "mode=evaluate", "name=old", f"runs={runs}"
    with pytest.raises(UserError) as caught:
        compose(*words)
    assert caught.value.field == f"{NAMED[key]}._target_" and "trust=true" in caught.value.cure
    assert "stranger_code.Thing" in str(caught.value) and not mark.exists()
    assert compose(*words, f"{NAMED[key]}=null").mode.value == "evaluate", "what is typed counts"
    assert compose(*words, "trust=true").trust and not mark.exists(), "settings alone import nothing"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mode=export export.to=/nowhere", "mode=dashboard", "mode=report"])
def test_modes_that_need_no_code_ask_for_no_trust_and_import_none(runs, monkeypatch, mode):
    monkeypatch.chdir(runs)
    mark = name_code(runs)
    assert compose(*mode.split(), "name=old", f"runs={runs}").name == "old"
    assert not mark.exists()


@pytest.mark.slow
def test_a_run_that_is_written_from_needs_trust_for_its_router_alone(runs, monkeypatch):
    monkeypatch.chdir(runs)
    mark = name_code(runs, model__router={})
    assert compose("mode=generate", "name=old", f"runs={runs}").model.block and not mark.exists()
    name_code(runs)
    with pytest.raises(UserError, match=r"model\.router"):
        compose("mode=generate", "name=old", f"runs={runs}")


def test_training_takes_no_code_from_a_run(runs, monkeypatch):
    monkeypatch.chdir(runs)
    mark = name_code(runs)
    config = compose("name=old", f"runs={runs}", f"resume={runs / 'old' / 'checkpoints' / 'step_00000001'}")
    assert not (config.model.router or config.data.source or config.callbacks) and not mark.exists()
