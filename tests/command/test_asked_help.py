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
    assert importlib.import_module(f"train.command.{COMMAND_MODULES[word]}").__doc__.split() == said.split()


@pytest.mark.parametrize("word", COMMAND_MODULES)
def test_the_help_of_a_word_fits_a_narrow_terminal(word, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert _command([word, "--help"]) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60 and any(len(line) > 45 for line in lines) and "" in lines


def test_help_of_a_word_is_found_among_other_words(capsys):
    assert _command(["runs", "clean", "mine", "--help"]) == EXIT_OK
    assert "sluice runs clean" in capsys.readouterr().out
