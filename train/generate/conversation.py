"""Answers questions turn by turn (generate.chat=true), with the chat template of the weights.

If the turns no longer fit into the context, the oldest turns are left out.

In a terminal, Ctrl-D and /quit end the conversation, and /reset removes all turns. Ctrl-C stops an answer, which still
becomes a turn. Without a terminal, each line of standard input is a question.
"""

import shutil
import sys
from collections.abc import Callable, Generator, Iterator

from cluster.interrupts import every_interrupt
from conf.errors import UserError
from conf.load import report
from conf.schema import Config
from train.data.chat_template import CannotRender, ChatTemplate, stop_ids
from train.data.chats import Message
from train.data.template_function import template_of
from train.generate.generation import EndReason, Generation, Limits
from train.generate.sampling import Sampler
from train.generate.source import LoadedModel
from train.generate.text import TextStream, require_utf8, write

RESET, QUIT = "/reset", "/quit"
HELP = f"Type a question and press Enter. Ctrl-C ends an answer, {RESET} clears the conversation, {QUIT} or Ctrl-D ends the program."


class Conversation:
    """A conversation: the turns of the user and of the model."""

    def __init__(self, config: Config, source: LoadedModel, say: Callable[[str], None]):
        """say: prints a sentence for the user.

        Raises UserError if there is no chat template.
        """
        self._settings, self._source, self.tell = config.generate, source, say
        self._template = _template(config, source)
        self._stops = frozenset(stop_ids(self._template, source.tokenizer))
        self.turns: list[Message] = []
        self._asked = 0
        self._told = False

    def forget(self) -> None:
        """Start a new conversation."""
        self.turns = []

    def answer(self, question: str) -> Generator[str]:
        """Yield the text of an answer in pieces that end at complete characters.

        Question and answer become turns, even if the caller stops early. A question that exceeds the context raises
        UserError and adds no turn.
        """
        prompt = self._prompt([*self.turns, {"role": "user", "content": question}])
        how, decoder = self._settings, self._source.decoder
        generation = Generation(
            decoder,
            [prompt],
            Sampler(self._source.tokenizer.vocab_size, how.temperature, how.top_p),
            Limits(how.tokens, self._source.context, self._stops),
            seed=how.seed + self._asked,
        )
        stream, text = TextStream(self._source.tokenizer), ""
        self._asked += 1
        try:
            for new in generation.steps():
                piece = stream.feed(new.get(0, [])) + (stream.finish() if generation.ends[0] else "")
                piece = piece if text else piece.lstrip()
                text += piece
                yield piece
        finally:
            self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": text.strip()}]
        if (end := generation.ends[0]) is not None and end is not EndReason.document:
            self.tell(f"[{end.value}]")

    def _prompt(self, turns: list[Message]) -> list[int]:
        """Return the tokens of the turns, without the oldest turns if the context is too small.

        The answer needs room for generate.tokens tokens, but at most half of the context.
        """
        most = self._source.context - min(self._settings.tokens, self._source.context // 2)
        while len(ids := self._encode(self._rendered(turns))) > most and len(turns) > 2:
            turns = turns[2:]
            if not self._told:
                self.tell(
                    f"[more turns than the {self._source.context} tokens of the model's context: the oldest turns are left out]"
                )
                self._told = True
        if len(ids) >= self._source.context:
            rule = f"must be shorter than the model's context of {self._source.context} tokens"
            raise UserError("generate.chat", f"{len(ids)} tokens", rule, "shorten the question")
        return ids

    def _rendered(self, turns: list[Message]) -> str:
        try:
            return self._template.prompt(turns)
        except CannotRender as error:
            raise UserError("data.template", self._template.name, error.rule, error.cure) from error

    def _encode(self, text: str) -> list[int]:
        require_utf8(text, "generate.chat")
        return self._source.tokenizer.encode_rendered([text])[0].ids


def _template(config: Config, source: LoadedModel) -> ChatTemplate:
    try:
        return template_of(config.data, source.words, source.tokenizer)
    except UserError as error:
        if config.data.template is not None or config.data.template_function:
            raise
        rule = f"needs a chat template, and {source.title} has none: the model was not tuned on chats, or its template is elsewhere"
        cure = "tune it on chats (train/docs/fine_tuning.md), or name a template: data.template=FILE, or data.template=plain"
        raise UserError("generate.chat", True, rule, cure) from error


def converse(conversation: Conversation) -> None:
    """Answer a person's questions until Ctrl-D or /quit."""
    conversation.tell(HELP)
    with every_interrupt():
        while True:
            try:
                question = input("> ").strip()
            except EOFError:
                write("\n")
                return
            except KeyboardInterrupt:
                write("\n")
                continue
            if question == QUIT:
                return
            try:
                if question:
                    _one_turn(conversation, question)
            except KeyboardInterrupt:
                continue  # the unfinished answer has become a turn
            except UserError as error:
                report(error)


def answer_each_line(conversation: Conversation, lines: Iterator[str]) -> None:
    """Answer each non-empty line until /quit. Each question is printed above its answer."""
    for line in lines:
        if (question := line.strip()) == QUIT:
            return
        if question:
            _one_turn(conversation, question, f"> {question}\n")


def _one_turn(conversation: Conversation, question: str, title: str = "") -> None:
    if question == RESET:
        conversation.forget()
        conversation.tell("[forgotten]")
        return
    if question.startswith("/"):
        conversation.tell(HELP)
        return
    write(title)
    wrap = _WordWrap(shutil.get_terminal_size().columns) if sys.stdout.isatty() else None
    answer = conversation.answer(question)
    try:
        for piece in answer:
            write(wrap.feed(piece) if wrap else piece)
    finally:
        answer.close()
        write((wrap.finish() if wrap else "") + "\n\n")


class _WordWrap:
    """Breaks a growing text into lines, between words."""

    def __init__(self, columns: int):
        self._columns, self._at, self._word = columns, 0, ""

    def feed(self, piece: str) -> str:
        shown = ""
        for character in piece:
            if not character.isspace():
                self._word += character
                continue
            shown += self.finish()
            if character == "\n" or self._at < self._columns - 1:
                shown += character
                self._at = 0 if character == "\n" else self._at + 1
        return shown

    def finish(self) -> str:
        """Return the last word, which `feed` held back."""
        word, self._word = self._word, ""
        breaks = self._at > 0 and self._at + len(word) >= self._columns
        self._at = len(word) if breaks else self._at + len(word)
        return "\n" + word if breaks else word
