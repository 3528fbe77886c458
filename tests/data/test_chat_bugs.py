"""Injected bugs of chat data that a loss curve does not show: a test of tests/data/test_chats.py finds each one.

Those of packing and losses are in tests/prove/mutations/chats.py, where a certificate sees them.
"""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conf.schema import Supervise
from tests.data import test_chats
from tests.data.test_chats import CHATML, MARKED, tokenizer
from train.data import chat_tokens, chats
from train.data.chat_template import ChatTemplate
from train.data.chats import Chat
from train.data.packing import PackedChats
from train.data.tokenizer import Tokenizer

__all__ = ["tokenizer"]
turns = functools.partial(test_chats.test_the_assistants_turns_are_learnt_with_their_stop_token, CHATML)
marked_turns = functools.partial(test_chats.test_the_assistants_turns_are_learnt_with_their_stop_token, MARKED)
tools = test_chats.test_calls_of_tools_are_learnt_and_successive_replies_stay


def stop_token_is_not_learnt(patch: pytest.MonkeyPatch) -> None:
    """InternLM/xtuner#1997: the mask ends one token early."""
    original = ChatTemplate.render

    def render(self, chat, *how):
        made = original(self, chat, *how)
        return replace(made, learnt=[(begin, end - 1) for begin, end in made.learnt])

    patch.setattr(ChatTemplate, "render", render)


def mask_begins_one_token_late(patch: pytest.MonkeyPatch) -> None:
    original = chat_tokens.learnt_tokens

    def learnt_tokens(*given):
        ids_N, mask_N = original(*given)
        return ids_N, mask_N & np.roll(mask_N, 1)

    patch.setattr(test_chats, "learnt_tokens", learnt_tokens)


def first_token_comes_twice(patch: pytest.MonkeyPatch) -> None:
    """The template writes it, and the tokenizer puts it in front once more."""
    original = Tokenizer.encode_rendered

    def encode_rendered(self, texts):
        return original(self, [self.eos + text for text in texts])

    patch.setattr(Tokenizer, "encode_rendered", encode_rendered)


def template_is_applied_twice(patch: pytest.MonkeyPatch) -> None:
    original = ChatTemplate._run

    def run(self, messages, tools, add_generation_prompt=False):
        text = original(self, messages, tools, add_generation_prompt)
        return original(self, [{"role": "user", "content": text}], None, add_generation_prompt)

    patch.setattr(ChatTemplate, "_run", run)


def weight_0_is_ignored(patch: pytest.MonkeyPatch) -> None:
    original = chats._message

    def message(given, number, refuse):
        return original(given, number, refuse)[0], True

    patch.setattr(chats, "_message", message)


def last_turn_alone_is_learnt(patch: pytest.MonkeyPatch) -> None:
    original = ChatTemplate.render
    patch.setattr(
        ChatTemplate, "render", lambda self, chat, supervise, *how: original(self, chat, Supervise.last, *how)
    )


def successive_replies_of_tools_are_dropped(patch: pytest.MonkeyPatch) -> None:
    """THUDM/slime#2264."""
    original = ChatTemplate.render

    def render(self, chat, *how):
        kept = [
            number
            for number, message in enumerate(chat.messages)
            if number == 0 or message["role"] != "tool" or chat.messages[number - 1]["role"] != "tool"
        ]
        fewer = Chat([chat.messages[n] for n in kept], chat.tools, [chat.learnt[n] for n in kept])
        return original(self, fewer, *how)

    patch.setattr(ChatTemplate, "render", render)


def old_reasoning_is_always_cut(patch: pytest.MonkeyPatch) -> None:
    original = ChatTemplate.render
    patch.setattr(ChatTemplate, "render", lambda self, chat, *how: original(self, chat.without_old_reasoning(), *how))


def chats_are_cut_at_the_end_of_a_sequence(patch: pytest.MonkeyPatch) -> None:
    """As plain text is packed: the end of one sequence and the beginning of the next."""
    original = PackedChats.fill

    def fill(self, window, tokens_S, numbers_S, supervised_S):
        original(self, window, tokens_S, numbers_S, supervised_S)
        for part in (tokens_S, numbers_S, supervised_S):
            part[:] = np.roll(part, 3)

    patch.setattr(PackedChats, "fill", fill)


SEEN_BY = {
    stop_token_is_not_learnt: turns,
    mask_begins_one_token_late: "masks",
    first_token_comes_twice: "masks",
    template_is_applied_twice: "masks",
    weight_0_is_ignored: test_chats.test_a_weight_of_0_keeps_a_turn_from_being_learnt,
    last_turn_alone_is_learnt: marked_turns,
    successive_replies_of_tools_are_dropped: tools,
    old_reasoning_is_always_cut: test_chats.test_reasoning_is_cut_on_request_alone,
    chats_are_cut_at_the_end_of_a_sequence: "epoch",
}


@pytest.mark.parametrize("bug", SEEN_BY, ids=lambda bug: bug.__name__)
def test_each_bug_is_seen(bug, tokenizer, tmp_path: Path, monkeypatch):
    with_tokenizer = {
        "masks": lambda: test_chats.test_masks_are_those_of_transformers(tokenizer),
        "epoch": lambda: test_chats.test_every_chat_is_in_one_sequence_of_an_epoch(tokenizer, tmp_path),
    }
    seen_by = SEEN_BY[bug]
    check = with_tokenizer[seen_by] if isinstance(seen_by, str) else seen_by
    bug(monkeypatch)
    with pytest.raises((AssertionError, chats.UserError, test_chats.CannotRender)):
        check()
