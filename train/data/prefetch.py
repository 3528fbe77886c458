"""Batches made in the background, a few ahead of the step that needs them."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from train.data.batch import Batch


class Prefetch:
    """Iterates over make(*request) for each request of a plan, which one daemon thread calls `ahead` requests early.

    An exception of make or of the plan is raised in the consumer, at the place where its batch would have come. Close it (or
    use it as a context) to stop the thread; after that it yields nothing.
    """

    def __init__(self, make: Callable[..., Batch], plan: Iterable[tuple[int, int]], ahead: int = 2):
        self.waited = 0.0
        """Seconds that the consumer has waited for batches."""
        self._queue: queue.Queue = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, args=(make, plan), name="data", daemon=True)
        self._thread.start()

    def _produce(self, make: Callable[..., Batch], plan: Iterable[tuple[int, int]]) -> None:
        try:
            for request in plan:
                if not self._put((make(*request), None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:
            self._put((None, error))

    def _put(self, item: tuple) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise StopIteration
        started = time.perf_counter()
        batch, error = self._get()
        self.waited += time.perf_counter() - started
        if error is not None:
            self._stop.set()
            raise error
        return batch

    def _get(self) -> tuple:
        while not self._stop.is_set():
            try:
                return self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
        return None, StopIteration()

    def close(self) -> None:
        """Stop the thread and wait for the batch that it is making."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
