"""Chats from docstrings: which chats there are, that whole files are held out, and the chats of the running Python's
own library."""

import numpy as np
import pytest

from conf.load import compose
from conf.schema import DataFormat, MixSource
from train.data.chats import LONGEST_ANSWER, SHORTEST_ANSWER, read_docstring_chats
from train.data.held_out import held_out_D
from train.data.sources import find_files, hash_id, open_chats, open_source

CODE = '''"""Things to add.

More of it."""

def add(a, *, b: int = 2) -> int:
    """Return the sum
    of a and b.

    Not this."""

def _hidden(a):
    """Return what nobody asks for."""

def short(): "No."

class Sum:
    """A sum that grows."""
    async def take(self, value):
        """Add a value to the sum."""
    class Part:
        """A part of a sum."""
'''


def test_definitions_with_a_docstring_become_questions(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text(CODE)
    (tmp_path / "old.py").write_text("print 'a statement'\n")
    found = {}
    for file in find_files(tmp_path, "data.path"):
        for name, chat in read_docstring_chats(file, "data.path"):
            assert name == "package/__init__.py" and chat.learnt == [False, True]
            found[chat.messages[0]["content"]] = chat.messages[1]["content"]
    assert found == {
        "What is the module package?": "Things to add.",
        "What does the function package.add(a, *, b: int=2) do?": "Return the sum of a and b.",
        "What is the class package.Sum?": "A sum that grows.",
        "What does the method package.Sum.take(self, value) do?": "Add a value to the sum.",
        "What is the class package.Sum.Part?": "A part of a sum.",
    }


@pytest.mark.slow
def test_the_files_that_are_held_out_are_those_that_plain_text_holds_out():
    """So that weights trained on conf=tiny have not seen what the held-out questions are about."""
    chats = list(open_chats(MixSource(format=DataFormat.docstrings), "data.path", "").documents())
    texts = {name for name, _ in open_source(MixSource(format=DataFormat.stdlib), "data.path").documents()}
    names = {name for name, _ in chats}
    assert names < texts and len(chats) > 3000
    assert all(SHORTEST_ANSWER <= len(chat.messages[1]["content"]) <= LONGEST_ANSWER for _, chat in chats)
    held, of_chats = (
        {
            name
            for name, out in zip(
                sorted(some), held_out_D(np.array([hash_id(n) for n in sorted(some)], np.uint64), 0.05), strict=True
            )
            if out
        }
        for some in (texts, names)
    )
    assert of_chats == held & names and of_chats


def test_a_path_is_read_as_chats():
    config = compose("conf=tiny_chat", "data.path=chats.jsonl")
    assert config.data.chats and config.data.format == DataFormat.docstrings
    assert compose("conf=tiny_chat").data.path is None
