"""Builds the tokenised corpus from the configuration: the slow part of `prepare`, without torch.

Cache entries are in data.cache under the hash of their inputs:
  manifests/  hashes of files by name, size and mtime      tokenizers/  trained tokenizers
  tokens/     token folders (token_store.py)               marks/       which large token folders were checked

If two processes need an entry, the second waits for the first. A damaged entry is reported and rebuilt.
"""

import contextlib
import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from conf.errors import UserError
from conf.own_code import TARGET, refused
from conf.schema import Config, DataFormat, HoldOutBy, MixSource, TooLong
from train.data.chat_template import ChatTemplate
from train.data.chat_tokens import MASK_VERSION, FittedChats, chat_tokenizer, fit_chats, tokenise_chats
from train.data.held_out import all_documents, long_documents, split_documents, training_texts
from train.data.own_documents import KEY, OwnDocuments
from train.data.packing import Documents
from train.data.prepare_progress import ReportProgress, silent
from train.data.sources import (
    DocumentSource,
    FileSource,
    format_of,
    no_text,
    open_chats,
    open_source,
    sources_of,
    unreadable,
)
from train.data.token_store import STORE_VERSION, DamagedStore, StoreWriter, TokenStore, keep_text, locked, open_store
from train.data.tokenise import tokenise
from train.data.tokenizer import SMALLEST_VOCAB, Tokenizer, check_fit, load_tokenizer, train_bpe

SAMPLE_BYTES = 64 << 20
"""Maximum bytes of text on which a tokenizer is trained."""


@dataclass(frozen=True)
class CorpusPart:
    """One source of the corpus, split into training and held-out documents."""

    name: str
    """Path of the source; `stdlib` for Python's library."""
    content: str
    """Hash of meta.json in the source's token folder."""
    weight: float
    train: Documents
    validation: Documents
    whole: Documents
    """All documents of the source.

    A single document is complete here, although training and validation each get a part of it.
    """


@dataclass(frozen=True)
class Corpus:
    parts: list[CorpusPart]
    tokenizer: Tokenizer
    fingerprint: str
    """Hash of the sources' contents and weights, the tokenizer, and the split into training and held-out documents."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user, one sentence each."""
    template_files: dict[str, str] | None = None
    """Jinja templates of the chats, by file name. None without chats."""


def build_corpus(config: Config, progress: ReportProgress = silent) -> Corpus:
    """Open the corpus and build missing parts. Raises UserError."""
    return _Builder(config, progress).build()


class _Builder:
    """Builds one corpus. Holds its settings and notes."""

    def __init__(self, config: Config, progress: ReportProgress):
        self.config, self.data, self.progress = config, config.data, progress
        self.cache = Path(config.data.cache).expanduser()
        self.by_content = self.data.hold_out_by is HoldOutBy.content
        self.notes: list[str] = []

    def build(self) -> Corpus:
        if self.data.chats:
            return self._build_chats(sources_of(self.config))
        choice = self.data.tokenizer
        given = (
            None if choice is None else (load_tokenizer(choice), choice)
        )  # this check comes before the long read of the data
        if self.data.source:
            with refused(KEY, self.data.source[TARGET], "reading it"):
                return self._read_own(given)
        named = sources_of(self.config)
        memmaps = {key: part.path for part, key in named if format_of(part, key) == DataFormat.memmap}
        memmaps = {key: _folder(path, key) for key, path in memmaps.items()}
        sources = {key: open_source(part, key, self.by_content) for part, key in named if key not in memmaps}
        digests = {key: source.digest(self.cache / "manifests", self.progress) for key, source in sources.items()}
        tokenizer, name = given or self._tokenizer(memmaps, sources, digests)
        check_fit(tokenizer, name, self.config.model.vocab_size, self.data.fim_rate)

        parts, contents = [], []
        for part, key in named:
            if key in memmaps:
                store = self._open_memmap(memmaps[key], key, tokenizer)
            else:
                store = self._tokens(sources[key], digests[key], tokenizer)
                for note in sources[key].notes():
                    self._note(note)
            sides = split_documents(store, tokenizer, self.data.validation_fraction)
            sides = self._without_short(_name(part), *sides, all_documents(store))
            parts.append(CorpusPart(_name(part), _hash(store.meta), part.weight, *sides))
            contents.append([store.meta, part.weight])
        fingerprint = _hash(contents, tokenizer.fingerprint, self.data.fim_rate, self.data.validation_fraction)
        return Corpus(parts, tokenizer, fingerprint, self.notes)

    def _read_own(self, given: tuple[Tokenizer, str] | None) -> Corpus:
        """Returns the held-out documents of data.source as a corpus."""
        documents = OwnDocuments(self.config)
        content = documents.digest(self.cache, self.progress)
        tokenizer, name = given or self._tokenizer({}, {KEY: documents}, {KEY: content})
        check_fit(tokenizer, name, self.config.model.vocab_size, fim_rate=0)
        sequences = max(self.config.log.validation_sequences, self.config.evaluate.sequences or 0)
        held = OwnDocuments(self.config, tokenizer).held_out(sequences * self.config.seq_len)
        part = CorpusPart(documents.name, content, 1.0, held, held, held)
        fingerprint = _hash(content, tokenizer.fingerprint, self.data.validation_fraction)
        return Corpus([part], tokenizer, fingerprint, self.notes)

    def _build_chats(self, named: list[tuple[MixSource, str]]) -> Corpus:
        tokenizer, template = chat_tokenizer(self.config)
        check_fit(tokenizer, self.data.tokenizer or str(self.config.init_from), self.config.model.vocab_size, 0)
        way = f"{MASK_VERSION}:{template.fingerprint}:{self.data.supervise}:{self.data.cut_reasoning}:{self.data.reasoning}"
        parts, contents, long = [], [], []
        for part, key in named:
            source = open_chats(part, key, way, self.by_content)
            digest = source.digest(self.cache / "manifests", self.progress)
            path = self.cache / "tokens" / _hash(digest, tokenizer.fingerprint)
            store = self._store(path, lambda path, source=source: self._write_chats(path, source, tokenizer, template))
            name = _name(part)
            if dropped := store.meta.get("unlearnt", 0):
                self._note(f"{name}: {dropped} chats have no learnt tokens and are left out")
            if unthought := store.meta.get("unthought", 0):
                self._note(
                    f"{name}: {unthought} learnt turns have no reasoning, but the template's prompt opens a reasoning block, so generation differs from the training: add reasoning, or see data.template_keys"
                )
            if len(store.hashes_D) < 2:
                rule = f"has {len(store.hashes_D)} chats with learnt tokens; at least one is held out, and at least one is needed for training"
                raise UserError(key, part.path, rule, "give more chats")
            sides = split_documents(store, tokenizer, self.data.validation_fraction)
            fitted = [
                fit_chats(side, self.config.seq_len + 1, self.data.too_long) for side in (*sides, all_documents(store))
            ]
            long.append((name, fitted[-1]))
            parts.append(CorpusPart(name, _hash(store.meta), part.weight, *(side.documents for side in fitted)))
            contents.append([store.meta, part.weight])
        self._tell_of_long(long, parts)
        fingerprint = _hash(contents, tokenizer.fingerprint, self.data.too_long, self.data.validation_fraction)
        return Corpus(parts, tokenizer, fingerprint, self.notes, template.files)

    def _tell_of_long(self, fitted: list[tuple[str, FittedChats]], parts: list[CorpusPart]) -> None:
        """Raise UserError for chats that are too long, or add notes about them."""
        long = sum(one.long for _, one in fitted)
        if long and self.data.too_long is TooLong.refuse:
            count = sum(len(one.documents) + one.emptied + one.dropped for _, one in fitted)
            longest = max(one.longest for _, one in fitted)
            raise UserError(
                "seq_len",
                self.config.seq_len,
                f"{long} of {count} chats are longer; the longest has {longest} tokens",
                f"set seq_len={longest - 1} or more, or data.too_long=cut (remove the end) or data.too_long=drop",
            )
        for name, one in fitted:
            if one.long:
                words = [f"{one.cut} cut" * bool(one.cut), f"{one.dropped} dropped" * bool(one.dropped)]
                words.append(f"{one.emptied} dropped without learnt tokens" * bool(one.emptied))
                counts = ", ".join(word for word in words if word)
                self._note(f"{name}: of chats longer than {self.config.seq_len + 1} tokens {counts}")
        for part in parts:
            if not len(part.train) or not len(part.validation):
                side = "training" if not len(part.train) else "held-out"
                rule = f"leaves no {side} chat of {part.name}"
                raise UserError("data.too_long", self.data.too_long, rule, "set a larger seq_len, or data.too_long=cut")

    def _write_chats(self, path: Path, source: FileSource, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        done = unlearnt = unthought = 0
        self.progress("tokenising chats", 0, source.size)
        with StoreWriter(
            path, tokenizer.vocab_size, tokenizer.json_text, tokenizer.fingerprint, source.size, supervised=True
        ) as writer:
            for task in tokenise_chats(source.documents(), tokenizer, template, source.field, source.name, self.data):
                writer.append(
                    task.ids_N, task.lengths_D, task.hashes_D, task.text_bytes, supervised_N=task.supervised_N
                )
                done, unlearnt = done + task.text_bytes, unlearnt + task.unlearnt
                unthought += task.unthought
                self.progress("tokenising chats", done, max(source.size, done))
            if writer.tokens == 0:
                rule = f"has no chat with learnt tokens ({unlearnt} chats have none)"
                raise UserError(source.field, source.name, rule, "check the weights of messages, and data.supervise")
            writer.more = {"unlearnt": unlearnt} | ({"unthought": unthought} if unthought else {})

    def _without_short(self, name: str, *sides: Documents) -> tuple[Documents, ...]:
        """Removes documents with fewer than data.min_tokens tokens. sides: training and held-out documents."""
        least = self.data.min_tokens
        if not least:
            return sides
        longest = min(int(side.lengths_D.max()) for side in sides)
        if longest < least:
            rule = f"leaves no training document or no held-out document of {name}: the longest has {longest} tokens"
            raise UserError("data.min_tokens", least, rule, f"use {longest} or less, or give longer documents")
        kept = tuple(long_documents(side, least) for side in sides)
        share = kept[-1].lengths_D.sum() / sides[-1].lengths_D.sum()
        documents = f"{len(kept[-1])} of {len(sides[-1])} documents"
        self._note(f"{name}: data.min_tokens = {least} keeps {documents}, {share:.0%} of the tokens")
        return kept

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _tokenizer(
        self, memmaps: dict[str, Path], sources: dict[str, DocumentSource], digests: dict[str, str]
    ) -> tuple[Tokenizer, str]:
        """Returns the tokenizer of tokenised data, or a newly trained one; and the tokenizer's name."""
        for key, path in memmaps.items():
            if not (path / "tokenizer.json").is_file():
                raise UserError(
                    key, path, "has no tokenizer.json", "set data.tokenizer to the file that made these tokens"
                )
            return load_tokenizer(str(path)), str(path)
        tokenizer = Tokenizer(self._trained(sources, digests))
        if tokenizer.vocab_size < self.config.model.vocab_size:
            self._note(
                f"the data has merges for only {tokenizer.vocab_size} token ids; the other rows of model.vocab_size = {self.config.model.vocab_size} stay unused"
            )
        return tokenizer, "null (trained on this data)"

    def _trained(self, sources: dict[str, DocumentSource], digests: dict[str, str]) -> str:
        """Returns the cached tokenizer.json of a BPE trained on these data."""
        rows = self.config.model.vocab_size
        if rows < SMALLEST_VOCAB:
            raise UserError(
                "model.vocab_size",
                rows,
                f"a byte-level BPE needs {SMALLEST_VOCAB} ids or more: 256 bytes, eos and three FIM tokens",
                f"set model.vocab_size={SMALLEST_VOCAB} or more",
            )
        entry = _hash(list(digests.values()), rows, self.data.validation_fraction)
        path = self.cache / "tokenizers" / f"{entry}.json"

        def ready() -> str | None:
            if not path.is_file():
                return None
            with contextlib.suppress(ValueError, KeyError, AttributeError, TypeError):
                kept = json.loads(path.read_bytes())
                if zlib.crc32(kept["json"].encode()) == kept["crc32"]:
                    return kept["json"]
            self._note(f"the cached tokenizer {path} was damaged; training it again")
            return None

        def make() -> str:
            size = min(SAMPLE_BYTES, sum(source.size for source in sources.values()))
            self.progress("training the tokenizer", 0, size)
            texts = training_texts(list(sources.values()), SAMPLE_BYTES, self.data.validation_fraction)
            trained = train_bpe(texts, rows)
            keep_text(path, json.dumps({"crc32": zlib.crc32(trained.encode()), "json": trained}))
            self.progress("training the tokenizer", size, size)
            return trained

        return self._once(path, ready, make)

    def _tokens(self, source: DocumentSource, digest: str, tokenizer: Tokenizer) -> TokenStore:
        """Returns the token folder of a source, from the cache or new."""
        path = self.cache / "tokens" / _hash(digest, tokenizer.fingerprint)
        return self._store(path, lambda path: self._write(path, source, tokenizer))

    def _store(self, path: Path, write: Callable[[Path], None]) -> TokenStore:
        """Opens the token folder. If it is missing or damaged, calls `write` first."""

        def ready() -> TokenStore | None:
            if not path.exists():
                return None
            try:
                return open_store(path, self.cache / "marks")
            except DamagedStore as damage:
                self._note(f"the cached tokens {path} were damaged ({damage}); tokenising again")
                return None

        def make() -> TokenStore:
            write(path)
            return open_store(path, self.cache / "marks")

        return self._once(path, ready, make)

    def _write(self, path: Path, source: DocumentSource, tokenizer: Tokenizer) -> None:
        total, done = source.size, 0
        self.progress("tokenising", 0, total)
        with StoreWriter(path, tokenizer.vocab_size, tokenizer.json_text, tokenizer.fingerprint, total) as writer:
            for task in tokenise(source.documents(), tokenizer, self.data.workers):
                writer.append(task.ids_N, task.lengths_D, task.hashes_D, task.text_bytes, task.continues)
                done += task.text_bytes
                self.progress("tokenising", done, max(total, done))
            if writer.tokens == 0:
                raise no_text(source)

    def _once(self, path: Path, ready: Callable, make: Callable):
        """Returns the result of `ready`. If this result is None, calls `make`, in one process at a time."""
        if (found := ready()) is not None:
            return found
        with locked(path, lambda: self.progress("waiting for another process with the same work", 0, 0)):
            return found if (found := ready()) is not None else make()

    def _open_memmap(self, path: Path, key: str, tokenizer: Tokenizer) -> TokenStore:
        """Opens a token folder that the user gives as data."""
        try:
            store = open_store(path, self.cache / "marks")
        except DamagedStore as damage:
            raise UserError(key, path, f"is damaged: {damage}", "create or copy it again") from damage
        except OSError as error:
            raise unreadable(error, key, path) from error
        if store.largest_id >= tokenizer.vocab_size:
            raise UserError(
                key,
                path,
                f"has token {store.largest_id}, and the tokenizer has only ids below {tokenizer.vocab_size}",
                "set data.tokenizer to the file that made these tokens",
            )
        if store.meta.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
            raise UserError(
                key, path, "was made with another tokenizer", "set data.tokenizer to the file that made these tokens"
            )
        return store


def _folder(path: str, key: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(key, path, "no such folder", "give the folder with tokens.bin and meta.json")
    return folder


def _name(source: MixSource) -> str:
    if not source.path or source.path.startswith("hf://"):
        return source.path or "stdlib"
    return str(Path(source.path).expanduser().absolute())


def _hash(*parts: object) -> str:
    return hashlib.blake2b(json.dumps([STORE_VERSION, *parts]).encode(), digest_size=16).hexdigest()
