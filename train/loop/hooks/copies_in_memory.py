"""checkpoint.every_memory: copies the state to the memory of this node and of the next node.

See train/checkpoint/memory_copies.py.
"""

from train.checkpoint.memory_copies import MemoryCopies
from train.loop.live_run import LiveRun
from train.metrics.names import Record


class CopiesInMemory:
    """Copies the state to memory every checkpoint.every_memory steps.

    The hook also copies the state at the end of an attempt if the next attempt starts at once.
    """

    def __init__(self, copies: MemoryCopies | None):
        """copies: writes the copies; None for a run without copies in memory."""
        self._copies = copies

    def give_up(self) -> None:
        """Stop making copies, because the memory is too small for them."""
        self._copies = None

    def on_step(self, run: LiveRun, step: int, record: Record) -> None:
        if self._copies is not None and step % run.config.checkpoint.every_memory == 0 and step < run.config.steps:
            self._copy(run, self._copies)

    def save_and_wait(self, run: LiveRun) -> bool:
        """Copy the state to memory and return whether the copy is complete.

        First waits for a checkpoint that is being written.
        """
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
