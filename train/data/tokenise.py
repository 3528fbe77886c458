"""Tokenising in parallel, in order and in bounded memory.

One process reads the documents and hands them, about a MiB of text at a time, to child processes over pipes; the tokens
come back in the order of the documents. At most two tasks per child wait at any time. The children are plain
`python -m train.data.tokenise`, not multiprocessing: they neither inherit threads nor import the caller's main module.

D = documents of a task, N = their tokens.
"""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO

import numpy as np

from train.data.files import hash_id
from train.data.tokenizer import Tokenizer

TASK_BYTES = 1 << 20
PER_WORKER = 4 << 20
"""Bytes of text that make it worth starting another child (each takes about half a second to start)."""


@dataclass(frozen=True)
class Tokenised:
    ids_N: np.ndarray
    """uint32, the documents one after another."""
    lengths_D: np.ndarray
    hashes_D: np.ndarray
    """uint64, of the documents' ids."""
    text_bytes: int


def tokenise(
    documents: Iterator[tuple[str, str]], tokenizer: Tokenizer, workers: int, size: int, advance: Callable[[int], None]
) -> Iterator[Tokenised]:
    """Tokens of the documents, task by task. workers: 0 for one per core; size: bytes to expect; advance is told the bytes of each finished task."""
    workers = min(workers or len(os.sched_getaffinity(0)), max(1, size // PER_WORKER))
    tasks = _tasks(documents)
    if workers == 1:
        for names, texts in tasks:
            result = _assemble(names, texts, tokenizer.encode_batch)
            advance(result.text_bytes)
            yield result
        return
    with ExitStack() as stack:
        free: SimpleQueue[_Child] = SimpleQueue()
        for _ in range(workers):
            free.put(stack.enter_context(_Child(tokenizer.json_text)))
        pool = stack.enter_context(ThreadPoolExecutor(workers))

        def work(names: list[str], texts: list[str]) -> Tokenised:
            child = free.get()
            try:
                return _assemble(names, texts, child.encode)
            finally:
                free.put(child)

        waiting: deque[Future[Tokenised]] = deque()
        for names, texts in tasks:
            waiting.append(pool.submit(work, names, texts))
            if len(waiting) >= 2 * workers:
                yield _told(waiting.popleft().result(), advance)
        while waiting:
            yield _told(waiting.popleft().result(), advance)


def _told(result: Tokenised, advance: Callable[[int], None]) -> Tokenised:
    advance(result.text_bytes)
    return result


def _tasks(documents: Iterator[tuple[str, str]]) -> Iterator[tuple[list[str], list[str]]]:
    names, texts, size = [], [], 0
    for name, text in documents:
        names.append(name)
        texts.append(text)
        size += len(text)
        if size >= TASK_BYTES:
            yield names, texts
            names, texts, size = [], [], 0
    if names:
        yield names, texts


def _assemble(names: list[str], texts: list[str], encode: Callable[[list[str]], list]) -> Tokenised:
    ids = [np.asarray(each, dtype=np.uint32) for each in encode(texts)]
    lengths_D = np.array([len(each) for each in ids], dtype=np.int64)
    hashes_D = np.array([hash_id(name) for name in names], dtype=np.uint64)
    return Tokenised(
        np.concatenate(ids),
        lengths_D[lengths_D > 0],  # a normaliser may leave nothing of a text
        hashes_D[lengths_D > 0],
        sum(len(text.encode()) for text in texts),
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
        _send(self._process.stdin, tokenizer_json)

    def __enter__(self) -> "_Child":
        return self

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        try:
            _send(self._process.stdin, texts)
            return pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            code = self._process.wait()
            raise RuntimeError(f"a tokenising process ended with code {code} (-9: often out of memory)") from error

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        with suppress(BrokenPipeError):  # what a dead child did not read
            self._process.stdin.close()


def _send(stream: BinaryIO, message: object) -> None:
    pickle.dump(message, stream, pickle.HIGHEST_PROTOCOL)
    stream.flush()


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """The child's life: a tokenizer.json, then lists of texts until the parent is gone."""
    with suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):  # the parent is gone, maybe in mid-sentence
        tokenizer = Tokenizer(pickle.load(requests))
        while True:
            texts = pickle.load(requests)
            _send(answers, [np.array(ids, dtype=np.uint32) for ids in tokenizer.encode_batch(texts)])


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one child per core is parallel enough
    _serve(sys.stdin.buffer, sys.stdout.buffer)
