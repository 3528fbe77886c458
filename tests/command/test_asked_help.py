"""Every `sluice` command has a help text."""

import importlib

import pytest

from conf.errors import EXIT_OK
from train.__main__ import COMMAND_MODULES, _command


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("word", COMMAND_MODULES)
def test_every_word_answers_help(word, flag, capsys):
    assert _command([word, flag]) == EXIT_OK
    said = capsys.readouterr().out
    assert said.startswith(f"`sluice {word}") and "error" not in said.splitlines()[0]
    assert importlib.import_module(f"train.command.{COMMAND_MODULES[word]}").__doc__.strip() == said.strip()


def test_help_of_a_word_is_found_among_other_words(capsys):
    assert _command(["runs", "clean", "mine", "--help"]) == EXIT_OK
    assert "sluice runs clean" in capsys.readouterr().out
