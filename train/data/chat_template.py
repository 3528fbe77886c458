"""Renders a chat as text and finds the characters that the model learns: the assistant's text and the stop token.

A Jinja template runs in Jinja's sandbox with the settings of transformers. If it marks the assistant's turns ({%
generation %}), the marked text is learnt. Otherwise a second rendering replaces each content by a character that no
text contains. The text around this character shows where the turn begins and ends.

- The template gets reasoning in the field `reasoning_content`, or in the content if it does not know this field.
- A message that the template drops is an error. data.reasoning says what to do about dropped reasoning.
- Without a stop token after a turn, the first token of the next message is the stop token, as in GLM-4.6.
"""

import contextlib
import hashlib
import json
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from conf.errors import UserError
from conf.files import read_json, read_plain_text
from conf.schema import LostReasoning, Supervise
from train.data.chats import PLACE_MARKS, REASONING, THINK, THOUGHT, Chat, Message, with_field
from train.data.tokenizer import TEMPLATE_FILES, TOKENIZER_SETTINGS_FILE, Tokenizer

PLAIN = "plain"
TURN_BEGIN, TURN_END = PLACE_MARKS
PROBE = TURN_BEGIN
GIVEN = ("messages", "tools", "add_generation_prompt")
"""Template variables that this file sets. The user must not set them."""
PROBED_ANSWER = "an answer"
PROBED_QUESTION = {"role": "user", "content": "a question"}
PROBED_TURNS = [PROBED_QUESTION, {"role": "assistant", "content": PROBED_ANSWER}]
"""A chat with a question and an answer, with which templates are tested."""
PROBED_CALL = {"id": "0", "type": "function", "function": {"name": PROBED_ANSWER, "arguments": {}}}
OPENED = re.compile(rf"{THINK}\s*\Z")
CLOSED = re.compile(rf"(?:(?P<open>{THINK})(?P<gap>\s*))?{THOUGHT}\s*\Z")
EMPTY_THOUGHT = re.compile(rf"\s*(?:{THINK}\s*)?{THOUGHT}\s*")
NAMED_TOKEN = re.compile(r"<\|[^<>|\s]+\|>|<\uff5c[^<>\uff5c\s]+\uff5c>")
"""Matches special tokens `<|name|>`, with ASCII or full-width bars."""
Span = tuple[int, int]


@dataclass(frozen=True)
class PlacedTurn:
    """Position of one assistant turn in a text."""

    begin: int
    """Index of the first character after the generation prompt."""
    content: int
    """Index of the first character of the content."""
    end: int
    """Index after the last character, which includes the stop token."""
    cut: bool = False
    """Whether the template removed reasoning from the content."""

    def moved(self, count: int) -> "PlacedTurn":
        """Returns the turn with all positions increased by `count` characters."""
        return replace(self, begin=self.begin + count, content=self.content + count, end=self.end + count)


@dataclass(frozen=True)
class RenderedChat:
    """The text of a chat, and its learnt spans."""

    text: str
    learnt: list[Span]
    """Learnt spans in order: (first character, end (exclusive))."""
    unthought: int = 0
    """Number of learnt turns that contain no reasoning, although the prompt opens a reasoning block."""


class CannotRender(Exception):
    """The template cannot render a chat. cure: advice to the user."""

    def __init__(self, rule: str, cure: str):
        super().__init__(rule)
        self.rule, self.cure = rule, cure


class _Generation(Extension):
    """Adds the tags {% generation %} and {% endgeneration %} to Jinja."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{TURN_BEGIN}{caller()}{TURN_END}"


def _environment() -> ImmutableSandboxedEnvironment:
    """Returns Jinja's sandbox with the settings that transformers uses."""

    def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = to_json
    made.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))  # pyrefly: ignore[bad-argument-type, no-matching-overload]  any function may be one
    return made


class ChatTemplate:
    """A chat template and its variables, such as special tokens."""

    def __init__(self, sources: dict[str, str], tokens: dict[str, Any], field: str, name: str):
        """Compiles templates: `default`, and optionally `tool_use`. tokens: values of variables. Raises UserError."""
        self.name, self._field, self._tokens, self._sources = name, field, tokens, sources
        environment = _environment()
        self._templates = {}
        for kind, source in sources.items():
            try:
                self._templates[kind] = environment.from_string(source)
            except jinja2.TemplateSyntaxError as error:
                rule = f"line {error.lineno} of the template is not valid Jinja: {error.message}"
                raise UserError(field, name, rule, "correct this line") from error
            except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
                rule = f"the template cannot be compiled: too many nested brackets or blocks, or a number is too long: {type(error).__name__}"
                raise UserError(field, name, rule, "use the template of the model's publisher") from error

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the template and its variables."""
        known = json.dumps([sorted(self._sources.items()), sorted(self._tokens.items())])
        return hashlib.blake2b(known.encode(), digest_size=16).hexdigest()

    @property
    def files(self) -> dict[str, str]:
        """Texts of the template's files; empty if the template is a Python function."""
        return {TEMPLATE_FILES[kind]: source for kind, source in self._sources.items()}

    def require_tokens(self, tokenizer: Tokenizer) -> None:
        """Raise UserError for special tokens that the tokenizer does not know."""
        for source in self._sources.values():
            for token in NAMED_TOKEN.findall(source):
                refuse_unknown_token(token, tokenizer, self._field, self.name)

    def render(self, chat: Chat, supervise: Supervise, reasoning: LostReasoning | None = None) -> RenderedChat:
        """Renders a chat and finds its learnt spans. Raises CannotRender."""
        if reasoning is LostReasoning.drop:
            chat = chat.without_reasoning()
        chat = replace(chat, messages=self._fitting(chat.messages))
        text, turns = self._marked(chat) if self._marks(chat) else self._probed(chat)
        for message in chat.messages:
            content = message.get("content")
            if message["role"] != "assistant" and content and not self._has(text, content.strip(), chat):
                raise CannotRender(
                    f"the template leaves out a message of role {message['role']!r}",
                    "use a template that supports such messages (data.template=FILE)",
                )
        wanted = [number for number, learnt in enumerate(chat.learnt) if learnt]
        if supervise is Supervise.last:
            last = max(n for n, message in enumerate(chat.messages) if message["role"] == "assistant")
            wanted = [number for number in wanted if number == last]
        text, turns = self._with_reasoning(chat, text, turns, wanted, reasoning)
        text, turns = self._with_stops(chat, text, turns)
        if supervise is Supervise.all:
            return RenderedChat(text, [(0, len(text))])
        unthought = [n for n in wanted if self._opens() and not OPENED.search(text[: turns[n].begin])]
        return RenderedChat(text, [(turns[n].begin, turns[n].end) for n in wanted], len(unthought))

    def prompt(self, chat_messages: Sequence[Message], tools: list[Any] | None = None) -> str:
        """Returns the text after which the model writes its answer."""
        text = self._run(self._fitting(chat_messages), tools, add_generation_prompt=True)
        return text.replace(TURN_BEGIN, "").replace(TURN_END, "")

    @cache  # noqa: B019  a run has one template
    def stop(self, called: bool = False) -> str:
        """Returns the text that ends an assistant turn: the first of these. Raises CannotRender.

        - the text that the template writes after the content
        - the last special token before the content of the next message
        - the end-of-document token
        """
        if written := self._written_stop():
            return written
        follower: Message = {"role": "tool" if called else "user", "content": PROBE, "tool_call_id": "0"}
        answer = PROBED_TURNS[1] | ({"content": "", "tool_calls": [PROBED_CALL]} if called else {})
        between = self._run([PROBED_QUESTION, answer, follower], None).rpartition(PROBED_ANSWER)[2].partition(PROBE)[0]
        return (NAMED_TOKEN.findall(between) or [self._tokens.get("eos_token", "")])[-1]

    def stops(self) -> list[str]:
        """Returns the texts that end an assistant turn. Raises CannotRender."""
        found = [self.stop()]
        with contextlib.suppress(CannotRender):  # a template need not support tools
            found.append(self.stop(called=True))
        return list(dict.fromkeys(found))

    @cache  # noqa: B019
    def _written_stop(self) -> str:
        after = self._run(PROBED_TURNS, None).rpartition(PROBED_ANSWER)[2]
        return after.partition(TURN_END)[0] if TURN_END in after else after.strip()

    def _with_stops(self, chat: Chat, text: str, turns: dict[int, PlacedTurn]) -> tuple[str, dict[int, PlacedTurn]]:
        """Extends each turn to include its stop token. If it is missing at the end of the text, appends it."""
        if self._written_stop():
            return text, turns
        for number, turn in turns.items():
            called = bool(chat.messages[number].get("tool_calls"))
            if not text[turn.end :].strip():
                text = text[: turn.end] + (self.stop(called) or "")
                turns = turns | {number: replace(turn, end=len(text))}
            elif found := re.compile(rf"\s*(?:{NAMED_TOKEN.pattern})").match(text, turn.end):
                turns = turns | {number: replace(turn, end=found.end())}
        return text, turns

    # Methods for reasoning

    def _fitting(self, messages: Sequence[Message]) -> list[Message]:
        """Moves reasoning to `reasoning_content`, unless the template uses only the content."""
        thoughts = [
            message for message in messages if message["role"] == "assistant" and with_field(message) != message
        ]
        if not thoughts:
            return list(messages)
        return list(messages) if self._knows_contents_alone() else [with_field(message) for message in messages]

    @cache  # noqa: B019
    def _opens(self) -> bool:
        """Whether the generation prompt opens a reasoning block."""
        return OPENED.search(self.prompt([PROBED_QUESTION])) is not None

    @cache  # noqa: B019
    def _knows_contents_alone(self) -> bool:
        """Whether the template handles reasoning only as a part of the content."""
        thought, answer = f"{THINK}\n{PROBE}\n{THOUGHT}", PROBED_TURNS[1]
        text = self._run([PROBED_QUESTION, answer | {"content": f"{thought}\n\n{PROBED_ANSWER}"}], None)
        before, found, _ = text.partition(thought)
        mark = f"{PROBE}0{PROBE}"
        in_field = self._run([PROBED_QUESTION, answer | {REASONING: mark}], None)
        return bool(found) and not CLOSED.search(before) and mark not in in_field

    def _lost(self, chat: Chat) -> set[int]:
        """Returns the indices of the messages whose reasoning the template drops."""
        marks = {n: f"{PROBE}{n}{PROBE}" for n, message in enumerate(chat.messages) if message.get(REASONING)}
        if not marks:
            return set()
        messages = [m | {REASONING: marks[n]} if n in marks else m for n, m in enumerate(chat.messages)]
        text = self._run(messages, chat.tools)
        return {n for n, mark in marks.items() if mark not in text}

    def _with_reasoning(
        self,
        chat: Chat,
        text: str,
        turns: dict[int, PlacedTurn],
        wanted: list[int],
        choice: LostReasoning | None,
    ) -> tuple[str, dict[int, PlacedTurn]]:
        """Adds dropped reasoning to the text if `choice` is insert. Returns the new text and turns.

        Raises CannotRender if `choice` is None and a learnt turn's reasoning is dropped.
        """
        thoughts = {n: with_field(chat.messages[n]).get(REASONING) for n in turns}
        if not any(thoughts.values()):
            return text, turns
        lost = self._lost(chat) | {n for n, turn in turns.items() if turn.cut}
        if choice is None and (gone := [n for n in wanted if n in lost]):
            raise CannotRender(
                f"the template leaves out the reasoning of message {gone[0] + 1}: {thoughts[gone[0]]:.60}",
                "set data.reasoning=insert (add it), template (leave it out) or drop (remove all reasoning)",
            )
        grown, found = 0, {}
        for number, turn in turns.items():
            turn = turn.moved(grown)
            if (thought := thoughts[number]) and (number not in lost or choice is LostReasoning.insert):
                given = self._run(chat.messages[:number], chat.tools, add_generation_prompt=True)
                if number in wanted and CLOSED.search(given):
                    raise CannotRender(
                        f"message {number + 1} has reasoning, but the template's prompt declares that no reasoning follows",
                        "set the template's option, such as data.template_keys={thinking: true}, or data.reasoning=drop",
                    )
                if number in lost:
                    before = len(text)
                    text, turn = _inserted(text, turn, thought)
                    grown += len(text) - before
                if (opened := OPENED.search(given)) and text.startswith(opened[0], turn.begin):
                    turn = replace(turn, begin=turn.begin + len(opened[0]))
            found[number] = turn
        return text, found

    def _has(self, text: str, content: str, chat: Chat) -> bool:
        """Whether the text contains `content` at least as often as the chat has messages with this content."""
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
        except Exception as error:  # a template can raise any exception
            lines = [
                frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"
            ]
            where = f"line {lines[-1]} of the template" if lines else "the template"
            raise CannotRender(f"{where} ends with: {error}", "correct the chat or the template") from error

    # Methods for templates that mark the turns

    def _marked(self, chat: Chat) -> tuple[str, dict[int, PlacedTurn]]:
        text, spans = _unmarked(self._run(chat.messages, chat.tools))
        numbers = [number for number, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if len(spans) != len(numbers):
            raise CannotRender(
                f"the template marks {len(spans)} turns, but the assistant has {len(numbers)} turns",
                "mark each assistant turn once ({% generation %})",
            )
        turns = {}
        for number, (begin, end) in zip(numbers, spans, strict=True):
            content = (chat.messages[number].get("content") or "").strip()
            found = (each for each in _forms(content) if each[0].strip() in text[begin:end])
            form, cut = next(found, (content, False))
            if (place := text.find(form, begin, end)) < 0:
                raise CannotRender(
                    f"the template leaves out text of the assistant, in message {number + 1}: {content:.60}",
                    "use a template that keeps it (data.template=FILE)",
                )
            turns[number] = PlacedTurn(begin, place, end, cut)
        return text, turns

    # Methods for templates that do not mark the turns

    def _probed(self, chat: Chat) -> tuple[str, dict[int, PlacedTurn]]:
        """Finds turns by a second rendering with probe characters. Returns text and turns."""
        plain = self._run(chat.messages, chat.tools)
        numbers = [number for number, message in enumerate(chat.messages) if message["role"] == "assistant"]
        probed = [
            message | {"content": PROBE} if number in numbers else message
            for number, message in enumerate(chat.messages)
        ]
        contents = [chat.messages[number].get("content") or "" for number in numbers]
        pieces = self._run(probed, chat.tools).split(PROBE)
        turns: dict[int, PlacedTurn] = {}
        if (places := _aligned(plain, pieces, contents)) is not None:
            for number, (begin, end, cut), piece, after in zip(numbers, places, pieces, pieces[1:], strict=False):
                lead, tail = self._around(probed, number, chat.tools, piece)
                turns[number] = PlacedTurn(begin - lead, begin, end + _shared(tail, after), cut)
            return plain, turns
        at = 0
        for number in numbers:
            turns[number] = self._by_prefix(plain, chat, number, at)
            at = turns[number].end
        return plain, turns

    def _around(self, probed: list[Message], number: int, tools: list[Any] | None, piece: str) -> tuple[int, str]:
        """Returns the number of characters between the generation prompt and a turn's content, and the text after the
        content.

        probed: the chat with probe characters as contents. piece: the text between the probe characters of the
        previous turn and of this turn.
        """
        turn, given = self._run(probed[: number + 1], tools), self._run(probed[:number], tools, True)
        before, _, after = turn.rpartition(PROBE)
        lead = before[_shared(before, given) :]
        if piece.endswith(lead):
            return len(lead), after.rstrip()
        header = given[
            _shared(given, self._run(probed[:number], tools)) :
        ]  # an older turn has other text before the content
        place = piece.rfind(header) if header else -1
        return len(piece) - place - len(header) if place >= 0 else 0, after.rstrip()

    def _by_prefix(self, plain: str, chat: Chat, number: int, at: int) -> PlacedTurn:
        """Finds a turn if the template writes other text around a probe character than around the turn's real content.

        The method renders the chat up to the end of this turn. If the complete text `plain` lacks the turn's reasoning,
        the method searches for the turn without reasoning, from the previous turn's end `at` on.
        """
        before, message = chat.messages[:number], chat.messages[number]
        turn = self._run([*before, message], chat.tools).rstrip()
        answer = self._run([*before, {"role": "assistant", "content": PROBE}], chat.tools)
        given = self._run(list(before), chat.tools, True)
        begin = min(_shared(given, answer), _shared(given, turn))
        if plain.startswith(turn):
            empty = EMPTY_THOUGHT.match(plain, begin)
            return PlacedTurn(begin, empty.end() if empty else begin, len(turn))
        rest = turn[begin:].rpartition(THOUGHT)[2].lstrip()
        place = plain.find(rest, at) if rest else -1
        if place < 0:
            raise CannotRender(
                f"the position of assistant message {number + 1} in the template's text is ambiguous",
                "mark the assistant's turns in the template ({% generation %}), or use data.template=FILE",
            )
        header = given[_shared(given, self._run(list(before), chat.tools)) :]
        first = plain.rfind(header, at, place) if header else -1
        return PlacedTurn(first + len(header) if first >= 0 else place, place, place + len(rest))


def _unmarked(text: str) -> tuple[str, list[Span]]:
    """Removes the marks of turns. Returns the text and the marked spans."""
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
    """Returns the length of the common prefix.

    If the prefix ends inside <think> or </think>, the `<` is not counted.
    """
    pairs = enumerate(zip(one, other, strict=False))
    place = next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
    inside = place > 0 and {one[place - 1 :][: len(word)] for word in (THINK, THOUGHT)} & {THINK, THOUGHT}
    return place - 1 if inside else place


def _forms(content: str) -> Iterator[tuple[str, bool]]:
    """Yields the texts as which a template may write `content`, such as without its reasoning or outer whitespace.

    Each item is a pair: the text, and whether the reasoning is missing in it.
    """
    whole = [(content, False)]
    if THOUGHT in content:
        whole += [(content.rpartition(THOUGHT)[2], True), (content.partition(THOUGHT)[2], True)]
    for text, cut in whole:
        yield from ((form, cut) for form in (text, text.strip(), text.lstrip("\n"), text.strip("\n")))


def _aligned(plain: str, pieces: Sequence[str], contents: Sequence[str]) -> list[tuple[int, int, bool]] | None:
    """Finds the assistant's contents in a chat's text: (begin, end, whether reasoning was removed), or None.

    pieces: the text before, between and after the contents.
    """
    if len(pieces) != len(contents) + 1 or not plain.startswith(pieces[0]):
        return None
    at, found = len(pieces[0]), []
    for content, after in zip(contents, pieces[1:], strict=True):
        fits = (each for each in _forms(content) if plain.startswith(each[0] + after, at))
        if (fit := next(fits, None)) is None:
            return None
        found.append((at, at + len(fit[0]), fit[1]))
        at += len(fit[0]) + len(after)
    return found if at == len(plain) else None


def _inserted(text: str, turn: PlacedTurn, thought: str) -> tuple[str, PlacedTurn]:
    """Inserts reasoning before a turn's content. Returns the new text and turn."""
    closed = CLOSED.search(text[: turn.content])
    if closed is None:
        place = after = turn.content
        new = f"{THINK}\n{thought}\n{THOUGHT}\n\n"
    elif closed["open"]:
        half = len(closed["gap"]) // 2
        place, after = closed.start("gap"), closed.start("gap") + len(closed["gap"])
        new = closed["gap"][:half] + thought + closed["gap"][half:]
    else:
        place = after = closed.start()
        new = THINK + thought
    grown = len(new) - (after - place)
    begin = min(turn.begin, place)
    return text[:place] + new + text[after:], replace(
        turn, begin=begin, content=turn.content + grown, end=turn.end + grown
    )


def refuse_unknown_token(token: str, tokenizer: Tokenizer, field: str, name: str) -> None:
    """Raise UserError if the tokenizer does not know a special token."""
    if tokenizer.id_of(token) is None:
        rule = f"writes {token}, which is not a token of the tokenizer and would be split into characters"
        raise UserError(
            field, name, rule, "use the tokenizer and the template of the same checkpoint, or data.template=plain"
        )


def load_template(
    choice: str | None, folder: Path | None, tokenizer: Tokenizer, keys: Mapping[str, Any] | None = None
) -> ChatTemplate:
    """Returns the template of data.template or of `folder`. Raises UserError."""
    keys = keys or {}
    if wrong := [key for key in keys if key in GIVEN]:
        cure = "leave it out"
        raise UserError(
            f"data.template_keys.{wrong[0]}", keys[wrong[0]], "is a variable that is set for every chat", cure
        )
    tokens = tokenizer.special_tokens() | dict(keys)
    if choice == PLAIN:
        sources, name = {"default": Path(__file__).with_name("plain_chat.jinja").read_text()}, PLAIN
    elif choice is not None:
        path = Path(choice).expanduser()
        if not path.is_file():
            cure = "give the path of a Jinja file, or plain, or omit it to use the template in the tokenizer's folder"
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
    if folder is not None and (path := folder / TOKENIZER_SETTINGS_FILE).is_file():
        found = read_json(path, "data.tokenizer", "correct or remove this file").get("chat_template")
        if isinstance(found, str):
            return {"default": found}, str(path)
        if isinstance(found, list):
            pairs = [(one.get("name"), one.get("template")) for one in found if isinstance(one, dict)]
            named = {kind: source for kind, source in pairs if isinstance(kind, str) and isinstance(source, str)}
            if "default" in named:
                return {kind: named[kind] for kind in TEMPLATE_FILES if kind in named}, str(path)
    raise UserError(
        "data.template",
        None,
        "the tokenizer's folder has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)",
        "set data.template=plain for a built-in template, or data.template=FILE for a Jinja file",
    )


def stop_ids(template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of the tokens that end an answer, according to the tokenizer and the template.

    Raises UserError.
    """
    try:
        ends = [encoding.ids for encoding in tokenizer.encode_rendered(template.stops())]
    except CannotRender as error:
        raise UserError("data.template", template.name, error.rule, error.cure) from error
    # leave out a stop text of several ordinary tokens: its first token may occur in an answer
    own = [ids[0] for ids in ends if ids and (len(ids) == 1 or tokenizer.bytes_V[ids[0]] == 0)]
    return list(dict.fromkeys([*tokenizer.stop_ids, *own]))
