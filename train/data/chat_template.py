"""From a chat to its text, and which characters of it the model learns: what it has to write itself, the stop token included.

A template in Jinja (the checkpoint's own, or ours, `plain`) runs in Jinja's sandbox, with what transformers gives one. Where it
marks the assistant's turns ({% generation %}), what is marked is learnt. Where it does not, the turns are found by what the
template does with them: with a character in the place of a content that is in no text, the text around it shows where the turn
begins and ends. What the model writes begins where the prompt of generation ends, and ends with the stop token; the line end
behind that is the template's.

A template may throw away reasoning or a message, and training would not show it. So contents of the assistant are put in place
where the template cuts them, and any other message that is not in the text is an error. Old reasoning is cut before, on request.
"""

import hashlib
import json
import re
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from conf.errors import UserError
from conf.read_json import read_json, read_plain_text
from conf.schema import Supervise
from train.data.chats import PLACE_MARKS, THOUGHT, Chat, Message
from train.data.tokenizer import Tokenizer

PLAIN = "plain"
TEMPLATE_FILES = {"default": "chat_template.jinja", "tool_use": "additional_chat_templates/tool_use.jinja"}
"""Beside tokenizer.json, as Hugging Face has them: for all chats, and for those with tools where they have one of their own."""
TURN_BEGIN, TURN_END = PLACE_MARKS
PROBE = TURN_BEGIN
PROBED_ANSWER = "an answer"
PROBED_TURNS = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": PROBED_ANSWER}]
"""A chat, behind whose last content the stop token is looked for."""
NAMED_TOKEN = re.compile(r"<\|[^<>|\s]+\|>|<\uff5c[^<>\uff5c\s]+\uff5c>")
"""How models spell tokens of their templates."""
Span = tuple[int, int]


@dataclass(frozen=True)
class RenderedChat:
    """A chat as text."""

    text: str
    learnt: list[Span]
    """First character and one behind the last, of what is learnt; in order."""


class CannotRender(Exception):
    """What is wrong with a chat and its template, and the cure."""

    def __init__(self, rule: str, cure: str):
        super().__init__(rule)
        self.rule, self.cure = rule, cure


class _Generation(Extension):
    """The tags that mark what the assistant wrote."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{TURN_BEGIN}{caller()}{TURN_END}"


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja's sandbox with the settings that transformers gives it."""

    def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = to_json
    made.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))  # pyrefly: ignore[bad-argument-type, no-matching-overload]  any function may be one
    return made


class ChatTemplate:
    """A template with the names of a tokenizer's special tokens."""

    def __init__(self, sources: dict[str, str], tokens: dict[str, str], field: str, name: str):
        """sources: the template, under `default`, and maybe one for chats with tools, under `tool_use`. field, name: for errors.
        Raises UserError for one that is broken.
        """
        self.name, self._field, self._tokens, self._sources = name, field, tokens, sources
        environment = _environment()
        self._templates = {}
        for kind, source in sources.items():
            try:
                self._templates[kind] = environment.from_string(source)
            except jinja2.TemplateSyntaxError as error:
                rule = f"line {error.lineno} of the template is no Jinja: {error.message}"
                raise UserError(field, name, rule, "correct this line") from error

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what decides the text of a chat."""
        known = json.dumps([sorted(self._sources.items()), sorted(self._tokens.items())])
        return hashlib.blake2b(known.encode(), digest_size=16).hexdigest()

    @property
    def files(self) -> dict[str, str]:
        """What a folder of weights keeps, by name of the file; empty where the template is no text."""
        return {TEMPLATE_FILES[kind]: source for kind, source in self._sources.items()}

    def require_tokens(self, tokenizer: Tokenizer) -> None:
        """Raise UserError where the template spells a token that the tokenizer would cut into letters."""
        for source in self._sources.values():
            for token in NAMED_TOKEN.findall(source):
                refuse_unknown_token(token, tokenizer, self._field, self.name)

    def render(self, chat: Chat, supervise: Supervise) -> RenderedChat:
        """Raises CannotRender."""
        text, turns = self._marked(chat) if self._marks(chat) else self._probed(chat)
        for message in chat.messages:
            content = message.get("content")
            if message["role"] != "assistant" and content and not self._has(text, content.strip(), chat):
                raise CannotRender(
                    f"the template leaves out a message of role {message['role']!r}",
                    "take a template that knows such messages (data.template=FILE)",
                )
        if supervise is Supervise.all:
            return RenderedChat(text, [(0, len(text))])
        wanted = [number for number, learnt in enumerate(chat.learnt) if learnt]
        if supervise is Supervise.last:
            last = max(n for n, message in enumerate(chat.messages) if message["role"] == "assistant")
            wanted = [number for number in wanted if number == last]
        return RenderedChat(text, [span for number in wanted for span in turns.get(number, ())])

    def prompt(self, chat_messages: Sequence[Message], tools: list[Any] | None = None) -> str:
        """What the model goes on from when it is to answer."""
        text = self._run(list(chat_messages), tools, add_generation_prompt=True)
        return text.replace(TURN_BEGIN, "").replace(TURN_END, "")

    def stop(self) -> str:
        """What ends a turn of the assistant, behind its content. Raises CannotRender."""
        behind = self._run(PROBED_TURNS, None).rpartition(PROBED_ANSWER)[2]
        return behind.partition(TURN_END)[0] if TURN_END in behind else behind.strip()

    def _has(self, text: str, content: str, chat: Chat) -> bool:
        """Whether every message of this content is in the text: several may be alike."""
        alike = [m for m in chat.messages if isinstance(m.get("content"), str) and m["content"].strip() == content]
        return text.count(content) >= len(alike)

    def _marks(self, chat: Chat) -> bool:
        return re.search(r"{%-?\s*generation\s*-?%}", self._sources[self._kind(chat.tools)]) is not None

    def _kind(self, tools: list[Any] | None) -> str:
        return "tool_use" if tools and "tool_use" in self._sources else "default"

    def _run(self, messages: list[Message], tools: list[Any] | None, add_generation_prompt: bool = False) -> str:
        try:
            return self._templates[self._kind(tools)].render(
                messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **self._tokens
            )
        except Exception as error:  # whatever a template does with a chat
            lines = [
                frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"
            ]
            where = f"line {lines[-1]} of the template" if lines else "the template"
            raise CannotRender(f"{where} ends with: {error}", "correct the chat or the template") from error

    # Templates that mark the turns

    def _marked(self, chat: Chat) -> tuple[str, dict[int, list[Span]]]:
        text, spans = _unmarked(self._run(chat.messages, chat.tools))
        numbers = [number for number, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if len(spans) != len(numbers):
            raise CannotRender(
                f"the template marks {len(spans)} turns, and the assistant has {len(numbers)}",
                "mark each turn of the assistant once ({% generation %})",
            )
        for number, (begin, end) in zip(numbers, spans, strict=True):
            content = chat.messages[number].get("content")
            if content and content.strip() not in text[begin:end]:
                raise CannotRender(
                    f"the template leaves out text of the assistant, in message {number + 1}: {content.strip():.60}",
                    "take a template that keeps it (data.template=FILE), or data.cut_reasoning=true for old reasoning",
                )
        return text, {number: [span] for number, span in zip(numbers, spans, strict=True)}

    # Templates that do not

    def _probed(self, chat: Chat) -> tuple[str, dict[int, list[Span]]]:
        """By a character in the place of every content of the assistant."""
        plain = self._run(chat.messages, chat.tools)
        numbers = [number for number, message in enumerate(chat.messages) if message["role"] == "assistant"]
        probed = [
            message | {"content": PROBE} if number in numbers else message
            for number, message in enumerate(chat.messages)
        ]
        contents = [chat.messages[number].get("content") or "" for number in numbers]
        pieces = self._run(probed, chat.tools).split(PROBE)
        if len(pieces) == len(numbers) + 1:
            around = [self._around(probed, number, chat.tools) for number in numbers]
            for filled in (contents, [content.strip() for content in contents]):
                if _filled(pieces, filled) == plain:
                    return plain, dict(zip(numbers, _spans(pieces, filled, around), strict=True))
            if any(THOUGHT in content for content in contents):
                pieces = [
                    piece.removesuffix(lead) if THOUGHT in content else piece
                    for piece, content, (lead, _) in zip(pieces, contents, around, strict=False)
                ] + pieces[-1:]
                around = [
                    ("" if THOUGHT in content else lead, tail)
                    for content, (lead, tail) in zip(contents, around, strict=True)
                ]
                return _filled(pieces, contents), dict(zip(numbers, _spans(pieces, contents, around), strict=True))
        return plain, {number: [self._by_prefix(plain, chat, number)] for number in numbers}

    def _around(self, probed: list[Message], number: int, tools: list[Any] | None) -> tuple[str, str]:
        """What the template writes before a turn's content that the prompt of generation has not, and behind it in the turn."""
        turn, given = self._run(probed[: number + 1], tools), self._run(probed[:number], tools, True)
        before, _, behind = turn.rpartition(PROBE)
        return before[_shared(before, given) :], behind.rstrip()

    def _by_prefix(self, plain: str, chat: Chat, number: int) -> Span:
        """Where a turn is, in templates that treat one without content in another way: the text up to a turn begins the whole text."""
        before, message = chat.messages[:number], chat.messages[number]
        turn = self._run([*before, message], chat.tools).rstrip()
        answer = self._run([*before, {"role": "assistant", "content": PROBE}], chat.tools)
        given = self._run(list(before), chat.tools, True)
        if not plain.startswith(turn):
            raise CannotRender(
                f"where message {number + 1}, of the assistant, is in the text of the template cannot be told",
                "mark the assistant's turns in the template ({% generation %}), or take data.template=FILE",
            )
        return min(_shared(given, answer), _shared(given, turn)), len(turn)


def _unmarked(text: str) -> tuple[str, list[Span]]:
    """The text without marks, and what was between them."""
    parts = re.split(f"([{TURN_BEGIN}{TURN_END}])", text)
    plain, begins, spans = "", [], []
    for part in parts:
        if part == TURN_BEGIN:
            begins.append(len(plain))
        elif part == TURN_END:
            spans.append((begins.pop(), len(plain)))
        else:
            plain += part
    return plain, spans


def _shared(one: str, other: str) -> int:
    """Characters with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _filled(pieces: Sequence[str], contents: Sequence[str]) -> str:
    return "".join(part for pair in zip(pieces, [*contents, ""], strict=True) for part in pair)


def _spans(pieces: Sequence[str], contents: Sequence[str], around: Sequence[tuple[str, str]]) -> Iterator[list[Span]]:
    """Where every turn is: from what leads to its content to what ends the turn behind it."""
    at = 0
    for piece, content, (lead, tail), behind in zip(pieces, contents, around, pieces[1:], strict=False):
        at += len(piece)
        begin = at - len(lead) if piece.endswith(lead) else at
        at += len(content)
        yield [(begin, at + _shared(tail, behind))]


def refuse_unknown_token(token: str, tokenizer: Tokenizer, field: str, name: str) -> None:
    """Raise UserError for a special token that the tokenizer has not. field, name: of the template, for the error."""
    if tokenizer.id_of(token) is None:
        rule = f"writes {token}, which the tokenizer has not: it would be cut into letters"
        raise UserError(
            field, name, rule, "take the tokenizer and the template of one checkpoint, or data.template=plain"
        )


def load_template(choice: str | None, folder: Path | None, tokenizer: Tokenizer) -> ChatTemplate:
    """The template that data.template names, or that of the tokenizer's folder. Raises UserError.

    folder: where the tokenizer lies, None where it is no file of ours.
    """
    tokens = _named_tokens(folder, tokenizer)
    if choice == PLAIN:
        sources, name = {"default": Path(__file__).with_name("plain_chat.jinja").read_text()}, PLAIN
    elif choice is not None:
        path = Path(choice).expanduser()
        if not path.is_file():
            cure = (
                "give the path of a Jinja file, or plain; or leave it out, which takes that of the tokenizer's folder"
            )
            raise UserError("data.template", choice, "there is no such file", cure)
        sources, name = {"default": _text(path)}, choice
    else:
        sources, name = _of_folder(folder)
    made = ChatTemplate(sources, tokens, "data.template", name)
    made.require_tokens(tokenizer)
    return made


def _text(path: Path) -> str:
    try:
        return read_plain_text(path)
    except ValueError as error:
        raise UserError("data.template", path, f"cannot be read: {error}", "give a Jinja file in UTF-8") from error


def _of_folder(folder: Path | None) -> tuple[dict[str, str], str]:
    if folder is not None and (path := folder / TEMPLATE_FILES["default"]).is_file():
        there = {kind: folder / name for kind, name in TEMPLATE_FILES.items()}
        return {kind: _text(file) for kind, file in there.items() if file.is_file()}, str(path)
    if folder is not None and (path := folder / "tokenizer_config.json").is_file():
        found = read_json(path, "data.tokenizer", "correct or remove this file").get("chat_template")
        if isinstance(found, str):
            return {"default": found}, str(path)
        if isinstance(found, list):
            named = {one["name"]: one["template"] for one in found if isinstance(one, dict) and "template" in one}
            if "default" in named:
                return {kind: named[kind] for kind in TEMPLATE_FILES if kind in named}, str(path)
    raise UserError(
        "data.template",
        None,
        "the tokenizer's folder has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)",
        "set data.template=plain for ours, in plain words, or data.template=FILE for a Jinja file",
    )


def _named_tokens(folder: Path | None, tokenizer: Tokenizer) -> dict[str, str]:
    """Special tokens by the names under which templates know them."""
    tokens = {"eos_token": tokenizer.eos}
    if folder is not None and (path := folder / "tokenizer_config.json").is_file():
        known = read_json(path, "data.tokenizer", "correct or remove this file")
        for key in ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token"):
            token = known.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                tokens[key] = token
    return tokens
