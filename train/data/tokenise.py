"""Tokenises documents in parallel, in order and in bounded memory.

One thread reads the documents and passes tasks of about 1 MiB of text to worker threads. At most two tasks per worker
wait.

D = documents of a task, N = their tokens.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from train.data.sources import hash_id
from train.data.tokenizer import Tokenizer, in_parts

TASK_BYTES = 1 << 20


@dataclass(frozen=True)
class TokenisedSource:
    ids_N: np.ndarray
    """Tokens of all documents, concatenated (uint32)."""
    lengths_D: np.ndarray
    """Number of tokens in each document; 0 if the normaliser removes all its text."""
    hashes_D: np.ndarray
    """Hashes of the documents' stable ids (uint64)."""
    text_bytes: int
    continues: bool
    """Whether the first document continues the last document of the previous task."""


def tokenise(documents: Iterator[tuple[str, str]], tokenizer: Tokenizer, workers: int) -> Iterator[TokenisedSource]:
    """Yields the tokens, task after task. workers: threads; 0: one per core."""
    workers = workers or len(os.sched_getaffinity(0))
    waiting: deque[Future[TokenisedSource]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for task in _tasks(documents, tokenizer.takes_parts):
            waiting.append(pool.submit(_assemble, task, tokenizer))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass
class _Task:
    names: list[str] = field(default_factory=list)
    """For each of `parts`, the stable id of its document. Parts of one document are adjacent."""
    parts: list[str] = field(default_factory=list)
    size: int = 0
    continues: bool = False
    """Whether this task begins inside a document, whose earlier text belongs to the previous task."""


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


def _assemble(task: _Task, tokenizer: Tokenizer) -> TokenisedSource:
    # One part at a time: encoding takes 150 times a text's memory.
    ids = [np.array(tokenizer.encode_batch([part])[0], dtype=np.uint32) for part in task.parts]
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
