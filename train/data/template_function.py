"""A Python function as chat template, for a model that has no template (data.template_function).

    def render(messages, tools, add_generation_prompt, **keys) -> str

messages: [{role, content, ...}] as in Jinja templates. add_generation_prompt: whether the text ends where the model
begins its answer. The function must not change contents.
"""

import copy
import hashlib
import inspect
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.own_code import TARGET, CodeSection, make, require_arguments
from conf.schema import Data
from train.data.chat_template import (
    NAMED_TOKEN,
    PROBED_TURNS,
    CannotRender,
    ChatTemplate,
    load_template,
    refuse_unknown_token,
)
from train.data.chats import Chat, Message
from train.data.tokenizer import Tokenizer

KEY_OF_FUNCTION = "data.template_function"


class FunctionTemplate(ChatTemplate):
    """A chat template that calls a Python function instead of Jinja."""

    def __init__(self, section: CodeSection, eos: str = ""):
        """eos: the end-of-document token. Raises UserError for an unsuitable function."""
        self._section, self.name, self._tokens = section, str(section[TARGET]), {"eos_token": eos}
        self._function = make(KEY_OF_FUNCTION, section)
        require_arguments(KEY_OF_FUNCTION, section, self._function, 3, "messages, tools, add_generation_prompt")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the function's source file and of data.template_function."""
        function = getattr(self._function, "func", type(self._function))
        file = inspect.getsourcefile(function)
        code = Path(file).read_bytes() if file else b""
        return hashlib.blake2b(json.dumps(dict(self._section)).encode() + code, digest_size=16).hexdigest()

    @property
    def files(self) -> dict[str, str]:
        """Empty: a function has no template text."""
        return {}

    def require_tokens(self, tokenizer: Tokenizer) -> None:
        """Raise UserError if the function fails or writes unknown special tokens."""
        try:
            text = self.prompt(PROBED_TURNS)
        except CannotRender as error:
            raise UserError(f"{KEY_OF_FUNCTION}.{TARGET}", self.name, error.rule, error.cure) from error
        for token in NAMED_TOKEN.findall(text):
            refuse_unknown_token(token, tokenizer, f"{KEY_OF_FUNCTION}.{TARGET}", self.name)

    def _marks(self, chat: Chat) -> bool:
        return False

    def _run(self, messages: list[Message], tools: list[Any] | None, add_generation_prompt: bool = False) -> str:
        try:
            text = self._function(copy.deepcopy(messages), copy.deepcopy(tools), add_generation_prompt)
        except Exception as error:  # user code can raise any exception
            rule = f"{self.name} raised {type(error).__name__}: {error}"
            raise CannotRender(rule, "correct the chat or the function") from error
        if not isinstance(text, str):
            raise CannotRender(f"{self.name} gave a {type(text).__name__}", "return the text of the chat")
        return text


def template_of(data: Data, folder: Path | None, tokenizer: Tokenizer) -> ChatTemplate:
    """Returns the chat template or function that `data` names.

    If it names none, returns the folder's template. Raises UserError.
    """
    if not data.template_function:
        return load_template(data.template, folder, tokenizer, data.template_keys)
    made = FunctionTemplate(data.template_function, tokenizer.eos)
    made.require_tokens(tokenizer)
    return made
