"""Tokenises chats, marks the learnt tokens and fits chats to the sequence length.

Names of special tokens in the text become these tokens. Tokens that overlap a learnt span of the text are learnt.

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
"""Version of the method for masks. A change rebuilds the cached token files."""
AT_ONCE = 256
"""Number of chats that are encoded in one call."""


@dataclass(frozen=True)
class TokenisedChats:
    ids_N: np.ndarray
    """Token ids of all chats, concatenated (uint32)."""
    supervised_N: np.ndarray
    """Mask of the tokens (uint8): 1 for learnt tokens."""
    lengths_D: np.ndarray
    hashes_D: np.ndarray
    """Hashes of the chats' stable ids (uint64)."""
    text_bytes: int
    unlearnt: int
    """Number of chats that were left out: they have no learnt token."""
    unthought: int
    """Number of learnt turns that contain no reasoning, although the prompt opens a reasoning block."""


def chat_tokenizer(config: Config) -> tuple[Tokenizer, ChatTemplate]:
    """Returns the tokenizer of the weights that the run tunes, and the chat template. Raises UserError."""
    choice = config.data.tokenizer or config.init_from
    if choice is None:
        rule = "chats need the tokenizer of the tuned model; no tokenizer can be trained on chats"
        raise UserError("data.tokenizer", None, rule, "set init_from=FOLDER, or data.tokenizer to the model's folder")
    path = Path(choice).expanduser()
    if config.data.tokenizer is None and (path / MANIFEST).is_file():
        path = path.absolute().parents[1]  # a checkpoint: the tokenizer is in its run folder
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
    """Yields the tokens of the chats, AT_ONCE chats at a time. Raises UserError."""
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
    """Returns token ids (uint32), and a mask (uint8): 1 for learnt tokens."""
    mask_N = np.zeros(len(encoding.ids), dtype=np.uint8)
    begins_N, ends_N = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    for begin, end in chat.learnt:  # one character may be several tokens
        first, after = np.searchsorted(ends_N, begin, side="right"), np.searchsorted(begins_N, end)
        mask_N[first:after] = 1
    return np.array(encoding.ids, dtype=np.uint32), mask_N


@dataclass(frozen=True)
class FittedChats:
    """Chats that fit into a sequence, and counts of cut or dropped chats."""

    documents: Documents
    longest: int
    """Length of the longest chat, in tokens, before any cut."""
    cut: int = 0
    dropped: int = 0
    emptied: int = 0
    """Chats that were dropped, because a cut removes all learnt tokens."""

    @property
    def long(self) -> int:
        """Number of chats that were too long."""
        return self.cut + self.dropped + self.emptied


def fit_chats(documents: Documents, room: int, too_long: TooLong) -> FittedChats:
    """Cuts or drops chats that have more than `room` tokens."""
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
