"""Tokenising in parallel, in order and in bounded memory.

One process reads the documents and hands them, about a MiB of text at a time, to child processes over pipes; the tokens
come back in the order of the documents. A long document is cut into parts, which may be in several tasks, so that memory
does not grow with the length of documents. At most two tasks per child wait at any time. The children are plain
`python -m train.data.tokenise`, not multiprocessing: they neither inherit threads nor import the caller's main module, and
what crosses the pipes is text and numbers, no pickles.

D = documents of a task, N = their tokens.
"""

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import IO, BinaryIO

import numpy as np

from train.data.source_files import hash_id
from train.data.tokenizer import Tokenizer, in_parts

TASK_BYTES = 1 << 20
PER_WORKER = 4 << 20
"""Bytes of text that make it worth starting another child (each takes about half a second to start)."""


@dataclass(frozen=True)
class TokenisedSource:
    ids_N: np.ndarray
    """uint32, the documents one after another."""
    lengths_D: np.ndarray
    """Tokens of each document; 0 where a normaliser leaves nothing of a text."""
    hashes_D: np.ndarray
    """uint64, of the documents' ids."""
    text_bytes: int
    continues: bool
    """The first of these documents began in the task before."""


def tokenise(
    documents: Iterator[tuple[str, str]], tokenizer: Tokenizer, workers: int, size: int, advance: Callable[[int], None]
) -> Iterator[TokenisedSource]:
    """Tokens of the documents, task by task. workers: 0 for one per core; size: bytes to expect; advance is told the bytes of each finished task."""
    workers = min(workers or len(os.sched_getaffinity(0)), max(1, size // PER_WORKER))
    tasks = _tasks(documents, tokenizer.takes_parts)
    if workers == 1:
        for task in tasks:
            result = _assemble(task, tokenizer.encode_batch)
            advance(result.text_bytes)
            yield result
        return
    with ExitStack() as stack:
        free: SimpleQueue[_Child] = SimpleQueue()
        for _ in range(workers):
            free.put(stack.enter_context(_Child(tokenizer.json_text)))
        pool = stack.enter_context(ThreadPoolExecutor(workers))

        def work(task: _Task) -> TokenisedSource:
            child = free.get()
            try:
                return _assemble(task, child.encode)
            finally:
                free.put(child)

        waiting: deque[Future[TokenisedSource]] = deque()
        for task in tasks:
            waiting.append(pool.submit(work, task))
            if len(waiting) >= 2 * workers:
                yield _told(waiting.popleft().result(), advance)
        while waiting:
            yield _told(waiting.popleft().result(), advance)


def _told(result: TokenisedSource, advance: Callable[[int], None]) -> TokenisedSource:
    advance(result.text_bytes)
    return result


@dataclass
class _Task:
    names: list[str] = field(default_factory=list)
    """Name of the document that each part belongs to; parts of one document follow each other."""
    parts: list[str] = field(default_factory=list)
    size: int = 0
    continues: bool = False
    """The first part goes on with the document of the task before."""


def _tasks(documents: Iterator[tuple[str, str]], in_parts_: bool) -> Iterator[_Task]:
    task = _Task()
    for name, text in documents:
        for number, part in enumerate(in_parts(text) if in_parts_ else [text]):
            task.continues |= not task.names and number > 0
            task.names.append(name)
            task.parts.append(part)
            task.size += len(part)
            if task.size >= TASK_BYTES:
                yield task
                task = _Task()
    if task.names:
        yield task


def _assemble(task: _Task, encode: Callable[[list[str]], list]) -> TokenisedSource:
    ids = [np.asarray(each, dtype=np.uint32) for each in encode(task.parts)]
    lengths_D, hashes_D, before = [], [], None
    for name, part_ids in zip(task.names, ids, strict=True):
        if name == before:
            lengths_D[-1] += len(part_ids)
        else:
            lengths_D.append(len(part_ids))
            hashes_D.append(hash_id(name))
        before = name
    return TokenisedSource(
        np.concatenate(ids),
        np.array(lengths_D, dtype=np.int64),
        np.array(hashes_D, dtype=np.uint64),
        sum(len(part.encode()) for part in task.parts),
        task.continues,
    )


class _Child:
    """A child process that encodes; used by one thread at a time."""

    def __init__(self, tokenizer_json: str):
        root = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "train.data.tokenise"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=root,
            process_group=0,  # Ctrl-C is for the parent alone, which ends its children
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        _send(self._to, [tokenizer_json.encode()])

    def __enter__(self) -> "_Child":
        return self

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        try:
            _send(self._to, [text.encode() for text in texts])
            return [np.frombuffer(part, dtype=np.uint32) for part in _receive(self._from)]
        except (EOFError, BrokenPipeError) as error:
            code = self._process.wait()
            raise RuntimeError(f"a tokenising process ended with code {code} (-9: often out of memory)") from error

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._from.close()
        with suppress(BrokenPipeError):  # what a dead child did not read
            self._to.close()


def _send(stream: IO[bytes], parts: list[bytes]) -> None:
    """The number of parts and their lengths in bytes, as uint64, then the parts."""
    stream.write(np.array([len(parts), *map(len, parts)], dtype=np.uint64).tobytes())
    stream.writelines(parts)
    stream.flush()


def _receive(stream: IO[bytes]) -> list[bytes]:
    """What `_send` sent; EOFError where the other side ended before or meanwhile."""

    def read(count: int) -> bytes:
        data = stream.read(count)
        if len(data) < count:
            raise EOFError
        return data

    (count,) = np.frombuffer(read(8), dtype=np.uint64).tolist()
    return [read(length) for length in np.frombuffer(read(8 * count), dtype=np.uint64).tolist()]


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """The child's life: a tokenizer.json, then lists of texts until the parent is gone."""
    with suppress(EOFError, BrokenPipeError):  # the parent is gone, maybe in mid-sentence
        tokenizer = Tokenizer(_receive(requests)[0].decode())
        while True:
            texts = [part.decode() for part in _receive(requests)]
            # One at a time: an encoding takes 150 times the memory of its text.
            _send(answers, [np.array(tokenizer.encode_batch([text])[0], dtype=np.uint32).tobytes() for text in texts])


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one child per core is parallel enough
    _serve(sys.stdin.buffer, sys.stdout.buffer)
