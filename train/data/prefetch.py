"""Builds batches in a background thread, a few steps ahead."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from cluster.comm_ring import got_on
from train.data.batch import Batch


class Prefetch:
    """Iterates over the batches of a plan, which a thread builds in advance.

    make: builds one batch. plan: yields the arguments of `make`. If `make` or `plan` raises an exception, the
    iterator raises it instead of returning the batch.
    """

    def __init__(self, make: Callable[..., Batch], plan: Iterable[tuple[int, int]], ahead: int = 2):
        self.waited = 0.0
        """Total seconds that the consumer has waited for batches."""
        self._make, self._plan = make, iter(plan)
        self._pool = ThreadPoolExecutor(1, "data")
        self._coming = deque(self._pool.submit(self._make_next) for _ in range(ahead))

    def _make_next(self) -> Batch:
        batch = self._make(*next(self._plan))  # StopIteration of the plan ends the consumer's loop
        got_on()
        return batch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._coming:
            raise StopIteration
        self._coming.append(self._pool.submit(self._make_next))
        started = time.perf_counter()
        batch = self._coming.popleft().result()
        self.waited += time.perf_counter() - started
        return batch

    def close(self) -> None:
        """Stop the thread and wait for its current batch."""
        self._coming.clear()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
