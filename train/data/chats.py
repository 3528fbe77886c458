"""Reads a chat from a JSONL or Parquet record: messages, tools, and the turns to learn.

The record's keys show which of three forms it has:
  messages        [{role, content, ...}], and `tools` at the same level.
                  `weight: 0` excludes an assistant message from the loss.
  prompt, completion  texts or messages; only the completion is learnt
  conversations   ShareGPT's [{from, value}]

Reasoning is under `reasoning_content`, `reasoning` or `thinking`, or is <think>...</think> before the content. A key
with a null counts as absent, because Parquet rows have all keys.
"""

import ast
import inspect
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from conf.errors import UserError
from train.data.readers import SURROGATE, SourceFile, read_text

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
REASONING = "reasoning_content"
REASONING_NAMES = (REASONING, "reasoning", "thinking")
THINK, THOUGHT = "<think>", "</think>"
LEADING_THOUGHT = re.compile(rf"\s*(?:{THINK})?(.*?){THOUGHT}(.*)", re.DOTALL)
"""Matches reasoning and the content after it. The opening <think> may be missing."""
CHAT_KEYS = ("messages", "prompt", "completion", "conversations", "tools", "system")
"""Columns to read from a Parquet file, if they exist."""
NO_TOOLS = (None, "", "[]", "null", [], {})
"""Values of `tools` in a chat without tools. Data sets whose tools are JSON texts have the texts."""
PLACE_MARKS = "\ufdd0\ufdd1"
"""Two Unicode noncharacters that mark positions in a text (train/data/chat_template.py)."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """A chat in the form that templates take."""

    messages: list[Message]
    tools: list[Any] | None
    learnt: list[bool]
    """Whether the model learns each message; false if it is not the assistant's."""

    def without_old_reasoning(self) -> "Chat":
        """Returns a copy of the chat. In it, messages before the user's last message have no reasoning."""
        last = max((n for n, message in enumerate(self.messages) if message["role"] == "user"), default=0)
        return replace(
            self,
            messages=[_cut(message) if n < last else message for n, message in enumerate(self.messages)],
        )

    def without_reasoning(self) -> "Chat":
        """Returns a copy without any reasoning."""
        return replace(self, messages=[_cut(message) for message in self.messages])


def _cut(message: Message) -> Message:
    content = message.get("content")
    message = {key: value for key, value in message.items() if key != REASONING}
    if message["role"] != "assistant" or not isinstance(content, str):
        return message
    return message | {"content": content.rpartition(THOUGHT)[2].lstrip("\n")}


def with_field(message: Message) -> Message:
    """Moves reasoning from the start of the content to `reasoning_content`."""
    found = LEADING_THOUGHT.fullmatch(message.get("content") or "") if message["role"] == "assistant" else None
    if found is None or REASONING in message:
        return message
    return message | {REASONING: found[1].strip("\n"), "content": found[2].lstrip("\n")}


def read_chat(record: Any, place: str, field: str) -> Chat:
    """Reads a record. place: file and line for errors. Raises UserError."""

    def refuse(rule: str, cure: str) -> UserError:
        return UserError(field, place, rule, cure)

    if not isinstance(record, dict):
        raise refuse(f"is a {type(record).__name__}, and must be an object", "write one object per line")
    record, skip = without_nulls(record), 0
    if "messages" in record:
        messages = _list(record["messages"], "messages", refuse)
    elif "prompt" in record and "completion" in record:
        before, messages = _turns(record, "prompt", "user", refuse), _turns(record, "completion", "assistant", refuse)
        skip, messages = len(before), [*before, *messages]
    elif "conversations" in record:
        messages = [_from_sharegpt(one, refuse) for one in _list(record["conversations"], "conversations", refuse)]
        if isinstance(record.get("system"), str):
            messages = [{"role": "system", "content": record["system"]}, *messages]
    else:
        raise refuse(
            f"has none of messages, prompt with completion, and conversations; only: {', '.join(list(record)[:8])}",
            "write chats in one of these forms (train/docs/fine_tuning.md)",
        )
    tools = None if record.get("tools") in NO_TOOLS else _list(record["tools"], "tools", refuse)
    written = "".join(_texts([messages, tools]))
    if SURROGATE.search(written) or any(mark in written for mark in PLACE_MARKS):
        raise refuse("is not Unicode text: it has a lone surrogate, or U+FDD0 or U+FDD1", "correct or remove it")
    found = [_message(one, number, refuse) for number, one in enumerate(messages)]
    learnt = [
        message["role"] == "assistant" and weight and number >= skip for number, (message, weight) in enumerate(found)
    ]
    if not any(message["role"] == "assistant" for message, _ in found):
        raise refuse("has no turn of the assistant, so there is nothing to learn", "remove it, or add the answer")
    return Chat([message for message, _ in found], tools, learnt)


def without_nulls(value: Any) -> Any:
    """Returns the value without keys whose value is null."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def _texts(value: Any) -> Iterator[str]:
    """Yields all strings in the value, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def _list(value: Any, key: str, refuse: Any) -> list:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise refuse(f"has a text under {key!r} that is not JSON: {error}", "write a list") from error
    if not isinstance(value, list) or not value:
        raise refuse(f"has no list under {key!r}, or an empty one", f"write {key} as a list of objects")
    return value


def _turns(record: dict[str, Any], key: str, role: str, refuse: Any) -> list:
    text = record[key]
    return [{"role": role, "content": text}] if isinstance(text, str) else _list(text, key, refuse)


def _from_sharegpt(turn: Any, refuse: Any) -> Message:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise refuse("has a turn of conversations without from or value", 'write {"from": "human", "value": "..."}')
    role = SHAREGPT.get(str(turn["from"]))
    if role is None:
        known = ", ".join(SHAREGPT)
        raise refuse(f"has a turn from {turn['from']!r}; known senders are {known}", "rename it, or remove the chat")
    return {"role": role, "content": turn["value"]} | ({"weight": turn["weight"]} if "weight" in turn else {})


def _message(given: Any, number: int, refuse: Any) -> tuple[Message, bool]:
    """Returns the message for templates, and whether its `weight` is 1."""
    where = f"message {number + 1}"
    if not isinstance(given, dict):
        raise refuse(f"{where} is a {type(given).__name__}, not an object", 'write {"role": ..., "content": ...}')
    message = {key: value for key, value in given.items() if value is not None}
    role, weight = message.get("role"), message.pop("weight", 1)
    if role not in ROLES:
        cure = f"use one of {', '.join(ROLES)}"
        raise refuse(f"{where} has {'no role' if role is None else f'the role {role!r}, which is unknown'}", cure)
    if weight not in (0, 1):
        raise refuse(f"{where} has weight {weight!r}", "a weight must be 0 (not learnt) or 1 (learnt)")
    content = message.get("content", "")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise refuse(f"{where} has parts that are not text", "remove parts that are not text")
        content = "".join(map(str, parts))
    if not isinstance(content, str):
        raise refuse(f"{where} has a {type(content).__name__} as content", "content must be text")
    thoughts = {key: thought for key in REASONING_NAMES if (thought := message.pop(key, None))}
    for key, thought in thoughts.items():
        if role != "assistant" or not isinstance(thought, str):
            raise refuse(f"{where} has {key} that is not text of the assistant", "correct this message")
        if message.setdefault(REASONING, thought) != thought:
            raise refuse(
                f"{where} has different reasoning under {key} and {next(iter(thoughts))}", "keep one of the two"
            )
    if not content and not message.get("tool_calls") and role == "user":
        raise refuse(f"{where}, of the user, is empty", "remove the chat, or write the question")
    if content or "content" in given or not message.get("tool_calls"):
        message["content"] = content
    if message.get("tool_calls") and given.get("content") is None and not content:
        message["content"] = None  # OpenAI's form has a null content here, which some templates expect
    return message, weight == 1


# Builds example chats from the docstrings of Python code, which every machine has.
#
#     user        What does the function textwrap.dedent(text) do?
#     assistant   Remove any common leading whitespace from every line in `text`.
#
# The answer is the docstring's first paragraph. The file's name is the stable id, so whole files are held out. With the
# same data.validation_fraction, conf=tiny holds out the same files.

SHORTEST_ANSWER, LONGEST_ANSWER = 12, 240
"""Minimum and maximum length of an answer, in characters."""
LONGEST_SIGNATURE = 80
"""Maximum characters of a parameter list. A longer list becomes `...`."""
Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def read_docstring_chats(file: SourceFile, field: str) -> Iterator[tuple[str, Chat]]:
    """Yields the chats of a Python file, with its name as stable id."""
    code = "".join(text for _, text in read_text(file, field, None))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about the library's code do not concern the user
            module = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return
    name = file.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for question, answer in _pairs(module, name):
        yield file.name, read_chat({"prompt": question, "completion": answer}, f"{file.path}: {question}", field)


def _pairs(module: ast.Module, name: str) -> Iterator[tuple[str, str]]:
    if answer := _answer(module):
        yield f"What is the module {name}?", answer
    yield from _of_definitions(module, name)


def _of_definitions(parent: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, str]]:
    for node in parent.body:
        if not isinstance(node, Documented) or node.name.startswith("_"):
            continue
        whole, answer = f"{name}.{node.name}", _answer(node)
        if isinstance(node, ast.ClassDef):
            if answer:
                yield f"What is the class {whole}?", answer
            yield from _of_definitions(node, whole)
        elif answer:
            kind = "method" if isinstance(parent, ast.ClassDef) else "function"
            yield f"What does the {kind} {whole}({_parameters(node)}) do?", answer


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    text = ast.unparse(function.args)
    return text if len(text) <= LONGEST_SIGNATURE else "..."


def _answer(node: ast.Module | Documented) -> str | None:
    text = ast.get_docstring(node, clean=False)
    paragraph = " ".join(inspect.cleandoc(text).partition("\n\n")[0].split()) if text else ""
    return paragraph if SHORTEST_ANSWER <= len(paragraph) <= LONGEST_ANSWER and " " in paragraph else None
