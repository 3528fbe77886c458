"""Chats as tokens, each with whether it is learnt, and as long as sequences take them.

The text of a chat is encoded as a whole, as an inference engine encodes it, and special tokens that are spelled in it are those
tokens. A token is learnt if the span of what is learnt reaches into it.

D = chats, N = their tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding

from cluster.run_files import MANIFEST
from conf.errors import UserError
from conf.schema import Config, Data, TooLong
from train.data.chat_template import (
    CannotRender,
    ChatTemplate,
    RenderedChat,
)
from train.data.packing import Documents
from train.data.sources import hash_id, place_of
from train.data.template_function import template_of
from train.data.tokenizer import Tokenizer, load_tokenizer

MASK_VERSION = 3
"""Version of the way in which learnt tokens are found: another one makes the files of tokens anew. 1 lost turns that begin with a space, 2
wrote reasoning into contents, and learnt no stop where the template writes none."""
AT_ONCE = 256
"""Chats that are encoded together."""


@dataclass(frozen=True)
class TokenisedChats:
    ids_N: np.ndarray
    """uint32, the chats one after another."""
    supervised_N: np.ndarray
    """uint8: 1 of what is learnt."""
    lengths_D: np.ndarray
    hashes_D: np.ndarray
    """uint64, of the chats' ids."""
    text_bytes: int
    unlearnt: int
    """Chats that were left out, as nothing of them is learnt."""
    unthought: int
    """Learnt turns without reasoning, where the prompt of the template begins some."""


def chat_tokenizer(config: Config) -> tuple[Tokenizer, ChatTemplate]:
    """The tokenizer of the weights that are tuned, and the template of chats. Raises UserError."""
    choice = config.data.tokenizer or config.init_from
    if choice is None:
        rule = "chats need the tokenizer of the model that is tuned; none can be made of chats"
        raise UserError("data.tokenizer", None, rule, "set init_from=FOLDER, or data.tokenizer to the model's folder")
    path = Path(choice).expanduser()
    if config.data.tokenizer is None and (path / MANIFEST).is_file():
        path = path.absolute().parents[1]  # a checkpoint, whose run has the tokenizer
    tokenizer = load_tokenizer(str(path))
    folder = path if path.is_dir() else path.parent if path.is_file() else None
    return tokenizer, template_of(config.data, folder, tokenizer)


def tokenise_chats(
    chats: Iterator[tuple[str, Any]],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    field: str,
    source: str,
    settings: Data,
) -> Iterator[TokenisedChats]:
    """Tokens of the chats (by their ids), some at a time. field, source: for errors. Raises UserError for a chat that cannot become text."""
    names: list[str] = []
    rendered: list[RenderedChat] = []
    for name, chat in chats:
        try:
            chat = chat.without_old_reasoning() if settings.cut_reasoning else chat
            made = template.render(chat, settings.supervise, settings.reasoning)
        except CannotRender as error:
            raise UserError(
                field, f"{source}: {place_of(name)}", f"{error.rule} ({template.name})", error.cure
            ) from error
        names.append(name)
        rendered.append(made)
        if len(names) == AT_ONCE:
            yield _encode(names, rendered, tokenizer)
            names, rendered = [], []
    if names:
        yield _encode(names, rendered, tokenizer)


def _encode(names: list[str], rendered: list[RenderedChat], tokenizer: Tokenizer) -> TokenisedChats:
    encodings = tokenizer.encode_rendered([chat.text for chat in rendered])
    masked = [learnt_tokens(*one) for one in zip(encodings, rendered, strict=True)]
    found = [(name, ids, mask) for name, (ids, mask) in zip(names, masked, strict=True)]
    kept = [(name, ids, mask) for name, ids, mask in found if mask[1:].any()]
    return TokenisedChats(
        np.concatenate([ids for _, ids, _ in kept] or [np.empty(0, np.uint32)]),
        np.concatenate([mask for *_, mask in kept] or [np.empty(0, np.uint8)]),
        np.array([len(ids) for _, ids, _ in kept], dtype=np.int64),
        np.array([hash_id(name) for name, *_ in kept], dtype=np.uint64),
        sum(len(chat.text.encode()) for chat in rendered),
        len(found) - len(kept),
        sum(chat.unthought for chat in rendered),
    )


def learnt_tokens(encoding: Encoding, chat: RenderedChat) -> tuple[np.ndarray, np.ndarray]:
    """Ids (uint32) of a chat, and 1 (uint8) for those that are learnt."""
    mask_N = np.zeros(len(encoding.ids), dtype=np.uint8)
    begins_N, ends_N = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    for begin, end in chat.learnt:  # a character may be several tokens, and both columns rise
        first, behind = np.searchsorted(ends_N, begin, side="right"), np.searchsorted(begins_N, end)
        mask_N[first:behind] = 1
    return np.array(encoding.ids, dtype=np.uint32), mask_N


@dataclass(frozen=True)
class FittedChats:
    """Chats that fit into sequences, and what became of the others."""

    documents: Documents
    longest: int
    """Tokens of the longest before."""
    cut: int = 0
    dropped: int = 0
    emptied: int = 0
    """Cut, and dropped since nothing of what is left is learnt."""

    @property
    def long(self) -> int:
        """Chats that were too long."""
        return self.cut + self.dropped + self.emptied


def fit_chats(documents: Documents, room: int, too_long: TooLong) -> FittedChats:
    """Keep chats of at most `room` tokens: longer ones lose their end, or are dropped."""
    long_D = documents.lengths_D > room
    longest = int(documents.lengths_D.max(initial=0))
    if not long_D.any():
        return FittedChats(documents, longest)
    keep_D, lengths_D, emptied = ~long_D, documents.lengths_D, 0
    if too_long is not TooLong.drop:
        assert documents.supervised is not None
        lengths_D = np.minimum(lengths_D, room)
        starts = documents.starts_D[long_D].tolist()
        learns = np.array([documents.supervised[start + 1 : start + room].any() for start in starts])
        keep_D = keep_D.copy()
        keep_D[long_D] = learns
        emptied = int((~learns).sum())
    kept = Documents(documents.tokens, documents.starts_D[keep_D], lengths_D[keep_D], documents.supervised)
    cut = int((long_D & keep_D).sum())
    return FittedChats(kept, longest, cut, len(documents) - len(kept) - emptied, emptied)
