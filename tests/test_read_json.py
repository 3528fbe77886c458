"""JSON from a user's file: whatever is in it, field, value, rule and cure come out."""

import os

import pytest

from conf import files as module
from conf.errors import UserError
from conf.files import parse_json, read_json

BAD = {
    "nested": (b"[" * 200_000, "too many nested"),
    "nested_objects": (b'{"a":' * 200_000, "too many nested"),
    "not_utf8": (b'{"a": "\xff"}', "not UTF-8 text: invalid start byte at byte 7"),
    "cut": (b'{"a": 1', "not JSON: Expecting ',' delimiter"),
    "empty": (b"", "not JSON: Expecting value"),
    "a_number_of_5000_digits": (b'{"a": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
    "a_list": (b"[]", "it must contain an object, and contains a list"),
    "a_number": (b"3", "it must contain an object, and contains a number"),
    "null": (b"null", "it must contain an object, and contains null"),
}
"""Contents of a file that should hold an object, and what is said of them."""


@pytest.mark.parametrize("name", BAD)
def test_no_content_ends_in_another_error(tmp_path, name):
    content, rule = BAD[name]
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rule) as caught:
        read_json(path, "init_from", "download it again")
    assert (caught.value.field, caught.value.value, caught.value.cure) == ("init_from", path, "download it again")
    assert caught.value.rule.startswith("a.json cannot be read: ") and len(str(caught.value)) < 400


def test_files_that_are_none(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for path, rule in (
        (tmp_path / "none.json", "no such file"),
        (tmp_path, "not a plain file"),
        (tmp_path / "pipe", "not a plain file"),
        (tmp_path / ("a" * 300), "File name too long"),
    ):
        with pytest.raises(UserError, match=rule):
            read_json(path, "init_from", "download it again")
    monkeypatch.setattr(module, "LARGEST_FILE", 10)
    (tmp_path / "large.json").write_text('{"a": 12345}')
    with pytest.raises(UserError, match="has 12 bytes; the limit is 10"):
        read_json(tmp_path / "large.json", "init_from", "download it again")


def test_what_is_sound_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ["\u4e2d", 1.5, null]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json", "init_from", "") == {"a": ["\u4e2d", 1.5, None]}
    assert parse_json("[1]", list) == [1]
