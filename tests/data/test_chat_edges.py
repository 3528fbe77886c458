"""Edge cases of chats: the first token, which has no prediction, the last token that fits, and tokens beside learnt
text."""

from types import SimpleNamespace

import numpy as np
import pytest

from cluster.run_files import MANIFEST
from conf.errors import UserError
from conf.load import compose
from conf.schema import Data, TooLong
from train.data import chat_tokens
from train.data.chat_template import ChatTemplate, RenderedChat
from train.data.chat_tokens import chat_tokenizer, fit_chats, learnt_tokens, tokenise_chats
from train.data.packing import Documents, PackedChats
from train.data.sources import hash_id


def chats_of(*masks: str) -> Documents:
    """Chats one after another, a letter a token: x is learnt."""
    lengths_D = np.array([len(mask) for mask in masks])
    supervised = np.array([letter == "x" for letter in "".join(masks)], dtype=np.uint8)
    tokens = np.arange(10, 10 + lengths_D.sum()).astype(np.uint16)
    return Documents(tokens, np.cumsum(lengths_D) - lengths_D, lengths_D, supervised)


def encoded(*offsets: tuple[int, int]) -> SimpleNamespace:
    return SimpleNamespace(ids=list(range(len(offsets))), offsets=list(offsets))


LONG = chats_of("---xx", "----xx", "-----x", "x-----x", "x-x----")
"""One of five tokens, and longer ones: learnt within five, behind them alone, and in the first token, which is no target."""


@pytest.mark.parametrize(
    ("too_long", "lengths", "counts"),
    [(TooLong.cut, [5, 5, 5], (2, 0, 2)), (TooLong.drop, [5], (0, 4, 0))],
)
def test_chats_that_are_cut_keep_what_is_learnt_or_are_left_out(too_long, lengths, counts):
    found = fit_chats(LONG, 5, too_long)
    assert found.documents.lengths_D.tolist() == lengths and found.longest == 7
    assert (found.cut, found.dropped, found.emptied) == counts and found.long == 4
    assert fit_chats(LONG, 7, too_long).documents is LONG


def test_a_token_is_learnt_where_the_span_reaches_into_it_and_not_beside():
    chat = RenderedChat("abcdefg", [(3, 4), (6, 7)])
    ids, mask = learnt_tokens(encoded((0, 3), (3, 4), (4, 5), (5, 7)), chat)
    assert ids.tolist() == [0, 1, 2, 3] and mask.tolist() == [0, 1, 0, 1]
    _, mask = learnt_tokens(encoded((0, 3), (3, 4), (3, 4), (4, 7)), chat)
    assert mask.tolist() == [0, 1, 1, 1], "a character may be several tokens"


def test_a_chat_of_which_the_first_token_alone_is_learnt_is_left_out():
    offsets = (0, 1), (1, 2)
    tokenizer = SimpleNamespace(encode_rendered=lambda texts: [encoded(*offsets) for _ in texts])
    template = SimpleNamespace(name="own", render=lambda chat, *_: RenderedChat("ab", [chat]))
    given = [("first", (0, 1)), ("second", (1, 2))]
    (found,) = tokenise_chats(iter(given), tokenizer, template, "data.path", "a", Data())
    assert (found.unlearnt, found.lengths_D.tolist(), found.supervised_N.tolist()) == (1, [2], [0, 1])


def test_chats_are_encoded_some_at_a_time_and_each_once(monkeypatch):
    """Of the first two one has nothing to learn, of the next two both."""
    monkeypatch.setattr(chat_tokens, "AT_ONCE", 2)
    tokenizer = SimpleNamespace(encode_rendered=lambda texts: [encoded((0, 1), (1, 2)) for _ in texts])
    template = SimpleNamespace(name="own", render=lambda chat, *_: RenderedChat("ab", [chat]))
    given = zip("abcde", [(1, 2), (0, 1), (0, 1), (0, 1), (1, 2)], strict=True)
    found = list(tokenise_chats(given, tokenizer, template, "data.path", "a", Data()))
    assert [part.unlearnt for part in found] == [1, 2, 0]
    assert [part.ids_N.tolist() for part in found] == [[0, 1], [], [0, 1]]
    assert [part.supervised_N.tolist() for part in found] == [[0, 1], [], [0, 1]]
    assert [part.hashes_D.tolist() for part in found] == [[hash_id("a")], [], [hash_id("e")]]


def test_the_order_of_sequences_is_another_one_in_each_epoch():
    packed = PackedChats(chats_of(*["-xxxxxxx"] * 30), 7, 1, seed=3)
    first, second, later = packed.windows_N(np.arange(90)).reshape(3, 30).tolist()
    assert sorted(first) == sorted(second) == sorted(later) == list(range(30))
    assert first != second != later != first


def test_what_only_fills_a_sequence_up_belongs_to_no_chat():
    packed = PackedChats(chats_of("-xx", "--xx"), 8, 1, seed=0)
    tokens, numbers, learnt = np.empty(9, np.int64), np.empty(9, np.int32), np.empty(9, np.bool_)
    packed.fill(0, tokens, numbers, learnt)
    assert tokens.tolist() == [13, 14, 15, 16, 10, 11, 12, 1, 1], "the longest first"
    assert numbers.tolist() == [0] * 4 + [1] * 3 + [-1] * 2
    assert learnt.tolist() == [letter == "x" for letter in "--xx-xx--"]


def test_a_checkpoint_stands_for_the_tokenizer_of_its_run(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_tokens, "load_tokenizer", lambda path: path)
    monkeypatch.setattr(chat_tokens, "template_of", lambda data, folder, tokenizer: folder)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).touch()
    assert chat_tokenizer(compose(f"init_from={checkpoint}")) == (str(tmp_path / "run"), tmp_path / "run")
    assert chat_tokenizer(compose(f"init_from={tmp_path / 'run'}")) == (str(tmp_path / "run"), tmp_path / "run")


@pytest.mark.parametrize(
    "source",
    ["{{ " + "(" * 3000 + ")" * 3000 + " }}", "{% if x %}" * 200 + "{% endif %}" * 200, "{{ 1" + "0" * 6000 + " }}"],
)
def test_a_template_that_cannot_be_compiled_is_an_error_of_the_user(source):
    with pytest.raises(UserError, match="cannot be compiled"):
        ChatTemplate({"default": source}, {}, "data.template", "a template")
