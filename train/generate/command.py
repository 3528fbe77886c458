"""`mode=generate`: writes a model's text to standard output, and notes and statistics to standard error.

The prompt is `generate.prompt`, a typed line, or a line of standard input.
"""

import io
import itertools
import os
import readline  # noqa: F401, gives input() its history and editing
import sys
from collections.abc import Iterator

from cluster.interrupts import every_interrupt
from cluster.place import Place
from conf.errors import EXIT_INTERRUPTED, EXIT_OK, UserError
from conf.load import report
from conf.schema import Config
from conf.words import say_folded, sentence
from train.generate.cache import bytes_per_token, multi_head_bytes_per_token
from train.generate.conversation import Conversation, answer_each_line, converse
from train.generate.generation import Generation, start
from train.generate.source import LoadedModel, open_weights
from train.generate.text import TextStream, write
from train.rank import choose_device

LINES_AT_ONCE = 16
"""Number of lines of standard input that form one batch."""


def generate(config: Config) -> int:
    """Runs `mode=generate` and returns the exit code. Raises UserError."""
    source = open_weights(config, choose_device(config, Place()), config.generate.checkpoint)
    writer = Writer(config, source)
    conversation = Conversation(config, source, _say) if config.generate.chat else None
    for line in (writer.headline(), *source.notes):
        _say(line)
    try:
        if conversation is not None:
            _answer(config, conversation)
        elif config.generate.prompt is not None:
            writer.show([config.generate.prompt])
        elif sys.stdin.isatty():
            _converse(writer)
        else:
            for prompts in _batches(_lines_of_stdin()):
                writer.show(prompts, titles=True)
    except KeyboardInterrupt:
        write("\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_OK


def _answer(config: Config, conversation: Conversation) -> None:
    if config.generate.prompt is not None:
        answer_each_line(conversation, iter([config.generate.prompt]))
    elif sys.stdin.isatty():
        converse(conversation)
    else:
        answer_each_line(conversation, _lines_of_stdin())


def _lines_of_stdin() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # in any locale, bytes that are not UTF-8 are rejected later
    return (line.rstrip("\r\n") for line in sys.stdin)


class Writer:
    """Continues prompts with the settings of the section `generate`."""

    def __init__(self, config: Config, source: LoadedModel):
        self._settings, self._source = config.generate, source

    def headline(self) -> str:
        """Return one line about the model and its cache memory."""
        decoder = self._source.decoder
        latent = bytes_per_token(decoder.config, decoder.dtype.itemsize)
        heads = multi_head_bytes_per_token(decoder.config, decoder.dtype.itemsize)
        dtype = str(decoder.dtype).removeprefix("torch.")
        return (
            f"{self._source.title}: {dtype} on {decoder.device}, up to {self._source.context:,} tokens; "
            f"{latent:,} bytes of cache per token, {heads:,} for equal multi-head attention ({heads / latent:.1f} times)"
        )

    def show(self, prompts: list[str], titles: bool = False) -> None:
        """Continue prompts in one batch. titles: whether to print prompts too."""
        how = self._settings
        generation = start(
            self._source, prompts, tokens=how.tokens, temperature=how.temperature, top_p=how.top_p, seed=how.seed
        )
        streams = [TextStream(self._source.tokenizer) for _ in prompts]
        texts = ["" for _ in prompts]
        alone = len(prompts) == 1
        if alone:
            self._title(prompts[0], titles)
        for new in generation.steps():
            for index, ids in new.items():
                piece = streams[index].feed(ids) + (streams[index].finish() if generation.ends[index] else "")
                if alone:
                    write(piece)
                else:
                    texts[index] += piece
        for prompt, text in zip(prompts, texts, strict=True):
            if not alone:
                self._title(prompt, titles)
                write(text)
            write("\n\n" if titles else "\n")
        _say(_statistics(generation))

    def _title(self, prompt: str, titles: bool) -> None:
        if titles:
            write(f">>> {prompt}\n")
        else:
            write(prompt, sys.stderr)


def _statistics(generation: Generation) -> str:
    """Return one line about speed and why texts ended."""
    counts = generation.counts
    ends = " and ".join(dict.fromkeys(end.value for end in generation.ends if end is not None))
    said = f"[{sum(map(len, generation.tokens))} tokens"
    if counts.decoded:
        said += f", {counts.decoded / counts.decode_seconds:.1f} tokens/s"
    return f"{said}; {ends}]"


def _converse(writer: Writer) -> None:
    """Read prompts until end of file. Ctrl-C stops a text."""
    _say("Type the beginning of a text and press Enter. Ctrl-C stops a text, Ctrl-D ends.")
    with every_interrupt():
        while True:
            try:
                writer.show([input("> ")])
            except EOFError:
                write("\n")
                return
            except KeyboardInterrupt:
                write("\n")
            except UserError as error:
                report(error)


def _batches(lines: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(itertools.islice(lines, LINES_AT_ONCE)):
        yield batch


def _say(text: str) -> None:
    say_folded(sentence(text, indent=2), 2, sys.stderr)
