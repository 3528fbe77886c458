"""checkpoint.every_memory: copies of the state in the memory of this node and the next (train/checkpoint/memory_copies.py)."""

from train.checkpoint.memory_copies import MemoryCopies
from train.loop.live_run import LiveRun
from train.metrics.names import Record


class CopiesInMemory:
    """Makes them every few steps, and one that the next attempt goes on from."""

    def __init__(self, copies: MemoryCopies | None):
        """copies: None for a run that keeps none."""
        self._copies = copies

    def give_up(self) -> None:
        """There is no room for them."""
        self._copies = None

    def on_step(self, run: LiveRun, step: int, record: Record) -> None:
        if self._copies is not None and step % run.config.checkpoint.every_memory == 0 and step < run.config.steps:
            self._copy(run, self._copies)

    def save_and_wait(self, run: LiveRun) -> bool:
        """Have the state in memory; returns whether it is there, whole. A checkpoint on its way to the disk gets there first."""
        return self._copies is not None and self._copy(run, self._copies, waits=True)

    def _copy(self, run: LiveRun, copies: MemoryCopies, waits: bool = False) -> bool:
        whole = False
        with run.beside("checkpoint"):
            state = run.state
            if waits:
                run.saver.checkpointer.finish()
                whole = copies.save_and_wait(state.step, state.shards(), run.saver.meta(run))
            else:
                run.saver.stall += copies.save(state.step, state.shards(), run.saver.meta(run))
            for warning in copies.poll():
                run.warn(warning)
        return whole
