"""Keys that an earlier version had: dropped from its files where they say nothing, an error with the cure where they do."""

import copy
import re

import pytest
import yaml

from conf.changed_settings import changed, settings_of
from conf.errors import UserError
from conf.keys import groups
from conf.load import compose, read_config, write_config
from conf.removed_keys import REMOVED_KEYS, REMOVED_VALUES, drop_removed_keys
from conf.schema import ROOT

KEY = "precision.fp8.gradient_floor"
BEFORE = "with another value with version 0.1.0"


def with_floor(settings: dict, floor: float) -> dict:
    found = copy.deepcopy(settings)
    found["precision"]["fp8"]["gradient_floor"] = floor
    return found


def test_the_table_names_keys_that_are_gone_and_the_page_names_them():
    known = {key.path for group in groups() for key in group.keys}
    page = (ROOT / "CHANGELOG.md").read_text()
    rows = re.findall(r"^\| (.*?) \|", page.partition("### From 0.1.0")[2].partition("\n## ")[0], re.M)
    table = "\n".join(rows)
    assert KEY in REMOVED_KEYS
    assert all(f"`{key}={value}`" in table for key, value in REMOVED_VALUES)
    assert [name for name in re.findall(r"`([\w.]+\.\w+)`", table) if name in known] == ["evaluate.task_path"]
    for key, removed in REMOVED_KEYS.items():
        section, _, name = key.rpartition(".")
        listed = f"`{key}`", f"`{section}.*`", f"`{section.rpartition('.')[0]}.*`"
        assert key not in known and any(name in table for name in listed), key
        assert drop_removed_keys({name: removed.default, "other": 1}, "mine.yaml", section) is True
        with pytest.raises(UserError, match=removed.version) as caught:
            drop_removed_keys({name: "another"}, "mine.yaml", section, by_run=False)
        assert "mine.yaml" in caught.value.rule and caught.value.cure == removed.cure


@pytest.mark.slow
def test_in_a_run_folder(tmp_path):
    config = compose("name=old", f"runs={tmp_path}", "precision=fp8", "seq_len=48")
    file = tmp_path / "old" / "config.yaml"
    file.parent.mkdir()
    write_config(config, str(file))
    settings = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(with_floor(settings, 1e-12)))
    assert read_config(str(file)) == config
    assert compose("mode=evaluate", "name=old", f"runs={tmp_path}").seq_len == 48
    file.write_text(yaml.safe_dump(with_floor(settings, 1e-9)))
    for read in (lambda: read_config(str(file)), lambda: compose("mode=evaluate", "name=old", f"runs={tmp_path}")):
        with pytest.raises(UserError, match=BEFORE) as caught:
            read()
        assert caught.value.field == KEY and str(file) in caught.value.rule


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, head, body",
    [
        ("conf/mine.yaml", "# @package _global_\n", "defaults: [tiny, {override /precision: fp8}, _self_]\nprecision: {fp8: {gradient_floor: FLOOR}}\n"),
        ("precision/mine.yaml", "", "defaults: [fp8, _self_]\nfp8: {gradient_floor: FLOOR}\n"),
    ],
)  # fmt: skip
def test_in_a_recipe_and_in_an_option_of_a_group(tmp_path, file, head, body):
    path = tmp_path / file
    path.parent.mkdir()
    words = [f'hydra.searchpath=["{tmp_path}"]', f"{path.parent.name}=mine"]
    path.write_text(head + body.replace("FLOOR", "1.0e-12"))
    assert compose(*words) == compose("precision=fp8", f"name={compose(*words).name}")
    path.write_text(head + body.replace("FLOOR", "1.0e-9"))
    with pytest.raises(UserError, match=BEFORE) as caught:
        compose(*words)
    assert caught.value.field == KEY and str(path) in caught.value.rule


def test_a_key_that_said_what_another_key_says(tmp_path):
    config = compose("precision=fp8")
    settings, file = settings_of(config), tmp_path / "config.yaml"
    operands = {"fprop": {"activation": "e4m3/1x128/pow2", "weight": "e4m3/128x128/fp32"}}
    settings["precision"]["fp8"]["output"] = operands
    file.write_text(yaml.safe_dump(settings))
    assert read_config(str(file)) == config
    operands["fprop"]["activation"] = (
        config.precision.fp8.activation
    )  # which is another than that of the attention's output
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=BEFORE) as caught:
        read_config(str(file))
    assert caught.value.field == "precision.fp8.output.fprop.activation" and "attention_output" in caught.value.cure


def test_a_key_that_changed_no_result_stops_no_run_that_goes_on(tmp_path):
    config = compose("precision=fp8")
    settings = settings_of(config)
    settings["log"]["repeat_above"] = 10.0
    settings["precision"]["fp8"]["backend"] = "specialized"  # whose bits triton gives
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert read_config(str(file)) == config
    assert changed(config, "x", {"step": 4, "data": "x", "has_ema": False, "config": settings}).notes() == []
    with pytest.raises(UserError, match=r"log\.state_every"):
        compose("log.repeat_above=10")


def test_in_a_checkpoint():
    config = compose("precision=fp8")
    meta = {"step": 4, "data": "x", "has_ema": False, "config": with_floor(settings_of(config), 1e-12)}
    assert changed(config, "x", meta).notes() == []
    with pytest.raises(UserError, match=BEFORE):
        changed(config, "x", meta | {"config": with_floor(settings_of(config), 1e-9)})


def test_on_a_command_line():
    with pytest.raises(UserError, match=r"was removed in 0\.2\.0") as caught:
        compose(f"{KEY}=1e-12")
    assert caught.value.cure.startswith("leave it out")
