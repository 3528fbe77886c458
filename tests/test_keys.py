"""Every key of the schema: its line in `sluice --help`, on the page of the guides, and in the schema for editors."""

import io
import json
import re

import jsonschema
import pytest
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError
from rich.console import Console

from conf.errors import EXIT_OK, EXIT_USER
from conf.help import option_line, recipe_lines, show_help
from conf.keys import attribute_meanings, groups
from conf.keys_files import EDITORS, KEYS_PAGE, keys_page, recipe_schema
from conf.load import compose_node
from conf.schema import ROOT, Mode
from tests.ranks import run_module
from tests.small import environment
from train.__main__ import COMMAND_MODULES

KEYS = [key for group in groups() for key in group.keys]
MADE = "it is not what the schema says now; run: python -m conf.keys_files"


def screen(*words: str, terminal: bool = False, width: int = 400) -> tuple[int, str]:
    output = io.StringIO()
    console = Console(file=output, width=width, force_terminal=terminal, highlight=False)
    return show_help(list(words), console), output.getvalue()


def test_every_key_and_mode_has_a_line():
    assert len(KEYS) > 200 and len({key.path for key in KEYS}) == len(KEYS)
    assert [key.path for key in KEYS if not key.meaning.endswith(".")] == []
    assert set(attribute_meanings(Mode)) == {mode.name for mode in Mode}
    assert [group.name for group in groups() if not group.meaning] == []
    assert [line for line in recipe_lines().values() if not line.endswith(".")] == []


@pytest.mark.slow
@pytest.mark.parametrize("expert", [False, True])
def test_help_shows_every_key_in_its_section(expert):
    """Those that hardly anyone sets where they are asked for, and nowhere else."""
    for group in groups():
        code, said = screen("--help", group.name or "keys", *["expert"] * expert)
        assert code == EXIT_OK
        shown = [line.split()[0] for line in said.splitlines() if re.match(r"  [a-z_0-9.\[\]A-Z]+  ", line)]
        assert {key.path for key in group.keys if key.expert is not expert}.isdisjoint(shown)
        for key in (key for key in group.keys if key.expert is expert):
            (line,) = (line for line in said.splitlines() if line.startswith(f"  {key.path} "))
            assert key.meaning in line and all(choice in line for choice in key.choices), line


def test_help_names_every_word_that_may_follow_the_command():
    said = screen("--help")[1]
    assert [word for word in COMMAND_MODULES if f"  sluice {word}" not in said] == []


def test_help_and_the_page_keep_what_hardly_anyone_sets_apart():
    rare = {key.path for key in KEYS if key.expert}
    assert len(rare) > 40 and {"cluster.standby", "precision.fp8.hold_weights"} <= rare
    more = sum(path.startswith("cluster.") for path in rare)
    assert f"{more} more, rarely used: sluice --help expert cluster" in screen("--help", "cluster")[1]
    everything = screen("--help", "expert")[1]
    assert [path for path in rare if f"  {path} " not in everything] == [] and "  optim.lr " not in everything
    assert "  cluster.standby " in screen("--help", "cluster.standby")[1], "a key that is named is shown"
    common, expert = keys_page().split("\n## Expert\n")
    for key in KEYS:
        assert f"| `{key.path}` |" in (expert if key.expert else common)
        assert f"| `{key.path}` |" not in (common if key.expert else expert)


def test_help_is_one_screen_that_names_its_lists():
    code, said = screen("--help", width=80)
    assert code == EXIT_OK and len(said.splitlines()) <= 30 and max(map(len, said.splitlines())) <= 80
    for word, listed in {
        "modes": "dry_run",
        "recipes": "deepseek_v3_16b",
        "groups": "h800",
        "keys": "hardware",
    }.items():
        assert f"sluice --help {word}" in said and listed in screen("--help", word)[1]


@pytest.mark.parametrize("words", [(), ("keys",), ("recipes",), ("precision",), ("expert",)])
def test_help_fits_a_narrow_terminal(words):
    code, said = screen("--help", *words, width=60)
    assert code == EXIT_OK and max(map(len, said.splitlines())) <= 60


def test_help_shows_the_values_of_the_recipe_that_is_named():
    assert " 0.002 " in screen("--help", "optim.lr")[1]
    assert " 0.00022 " in screen("--help", "optim.lr", "conf=deepseek_v3")[1]
    assert (
        " e4m3/1x128/pow2 " in screen("-h", "precision.fp8.dispatched")[1]
    )  # also where precision=bf16 has no such section
    assert "\x1b[36m" in screen("--help", "optim", terminal=True)[1]


def test_help_shows_the_values_of_a_recipe_of_ones_own(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text("# @package _global_\ndefaults: [tiny, _self_]\nsteps: 77\n")
    for flag in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"]):
        code, said = screen("--help", *flag, "conf=mine", "steps")
        assert code == EXIT_OK and " 77 " in said


@pytest.mark.parametrize(
    "words, cure",
    [
        (["optim.lrr"], "did you mean optim.lr"),
        (["paralel"], "parallel"),
        (["optim", "conf=tinny"], "tiny"),
        (["lr"], "did you mean optim.lr"),
        (["train"], "write `sluice --help modes`"),
        (["tiny_chat"], "write `sluice --help recipes`"),
        (["launch"], "write `sluice launch --help`"),
    ],
)
def test_help_for_what_is_not_there_says_what_is_near(words, cure, capsys):
    assert screen("--help", *words)[0] == EXIT_USER
    assert cure in capsys.readouterr().err


def test_the_command_itself_shows_help(tmp_path):
    done = run_module("train", ["--help", "parallel"], ROOT, environment())
    assert done.returncode == EXIT_OK and "parallel.dp" in done.stdout, done.stderr


def test_a_key_takes_its_choices_and_no_other_word():
    values = compose_node("precision=fp8")
    keys = [key for key in KEYS if key.type == "word" and "[]" not in key.path]
    assert len(keys) > 10 and all(key.choices for key in keys)
    for key in keys:
        for choice in key.choices:
            OmegaConf.update(values, key.path, choice)
            assert str(OmegaConf.select(values, key.path)) == choice
        with pytest.raises(ValidationError, match=key.choices[-1]):
            OmegaConf.update(values, key.path, "nonsense")


def test_the_page_and_the_schema_for_editors_are_up_to_date():
    assert KEYS_PAGE.read_text() == keys_page(), MADE
    assert EDITORS.read_text() == recipe_schema(), MADE


@pytest.mark.slow
def test_the_schema_for_editors_takes_our_recipes():
    schema = json.loads(EDITORS.read_text())
    for path in (ROOT / "conf" / "conf").glob("*.yaml"):
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)
        assert "# yaml-language-server: $schema=../recipe.schema.json" in path.read_text().splitlines()
        assert not option_line(path).startswith("yaml")
    jsonschema.validate(
        {"optim": {"lr": "${seed}", "lr_schedule": [{"until": 1.0, "shape": "cosine"}]}, "init_from": None}, schema
    )
    jsonschema.validate(
        {"precision": {"fp8": {"weight": "e4m3/128x128/fp32"}}, "model": {"recompute": ["norm"]}}, schema
    )


@pytest.mark.parametrize(
    "recipe",
    [
        {"stesp": 3},
        {"mode": "trian"},
        {"optim": {"lr": "fast"}},
        {"steps": 1.5},
        {"steps": None},
        {"parallel": {"wire": "fp4"}},
        {"optim": {"lr_schedule": [{"untill": 1.0}]}},
        {"hardware": {"rates": {"bf16": {"flop": 1}}}},
    ],
    ids=str,
)
def test_the_schema_for_editors_refuses_what_a_run_refuses(recipe):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(recipe, json.loads(EDITORS.read_text()))
