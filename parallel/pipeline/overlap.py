"""Interleaves the forward of one micro-batch and the backward of another, so that compute hides communication.

Inside an expert layer, a pass cannot hide its own all-to-all, because its next GEMM needs the data. But each pass can
compute while the other communicates (paper 3.2.1). So both run as lanes that take turns. A lane launches an
asynchronous all-to-all, then calls `yield_point()`, and then waits. The backward lane goes first, which gives the
paper's order for each pair of layers:

    backward lane                          forward lane
    begin combine(B)           ->
                                           attn(F), begin dispatch(F)        combine(B) is hidden by attn(F)
                               <-
    wait, mlp(B) and mlp(W),
    begin dispatch(B)          ->                                            dispatch(F) is hidden by mlp(B), mlp(W)
                                           wait, mlp(F), begin combine(F)    dispatch(B) is hidden by mlp(F)
                               <-
    wait, attn(B), attn(W)     ->          wait                              combine(F) is hidden by attn(B), attn(W)

F is the forward, B the backward of inputs, W the backward of weights. The backward lane is a second thread, because
autograd cannot be paused otherwise. A token, called the baton, lets exactly one lane run at a time.

The ranks cannot deadlock, because all ranks of a group issue its collectives in the same order:

    - Ranks of an expert group, and ranks that share sequences, run the same actions of the same stages.
    - A lane passes the baton only at a yield point or at its end, never after some time.
    - Yield points depend on the stage's layers, never on data: a dispatcher yields even without rows.
    - Collectives of ranks that share sequences have no yield point: a lane issues and awaits them in one turn.
    - Pipeline sends and receives never occur while two passes take turns.
"""

import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

if TYPE_CHECKING:  # dispatchers need yield_point, so at run time this file must not load torch's pipelining
    from parallel.pipeline.stage import Stage

_FORWARD, _BACKWARD = 0, 1
_NAMES = ("forward", "backward")

_current: "_Pair | None" = None
# The pair that runs in this process, if any. It is global, because a dispatcher's backward runs in autograd's thread,
# which inherits neither thread-locals nor context variables.


def yield_point() -> None:
    """Let the other of two overlapped passes compute, if there is one.

    Call this between the launch of an asynchronous transfer and the wait for it.
    """
    if _current is not None:
        _current.hand_over()


class LaneStopped(RuntimeError):
    """Raised in a waiting lane if the other lane failed; the user sees the other error."""


class Lanes:
    """Runs a forward and a backward in turns, as lanes. One thread runs all backwards; `close` ends it.

    timeout: maximum seconds that a lane waits for its turn; more than the longest collective.
    """

    def __init__(self, device: torch.device, timeout: float = 600.0):
        self._device, self._timeout = device, timeout
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=_work_off, args=(self._work,), name="backward-lane", daemon=True).start()

    def run(self, forward: Callable[[], Any], backward: Callable[[], Any]) -> tuple[Any, Any]:
        """Run both functions as lanes, `forward` in the calling thread. Raises the first error of either lane."""
        global _current
        assert _current is None, "one pair at a time"
        _current = pair = _Pair(self._timeout)
        try:
            work = _in_same_modes(_on_current_stream(backward, self._device))
            self._work.put(partial(pair.run, _BACKWARD, work))
            pair.run(_FORWARD, forward)
            pair.await_end(_BACKWARD)
        finally:
            _current = None
        if pair.error is not None:
            raise pair.error
        return pair.results[_FORWARD], pair.results[_BACKWARD]

    def close(self) -> None:
        """End the thread of the backward lanes."""
        self._work.put(None)


def _work_off(work: "queue.SimpleQueue[Callable[[], None] | None]") -> None:
    """Runs all backward lanes. This is the function of their thread."""
    while (job := work.get()) is not None:
        job()
        del job  # the job holds its micro-batch's graph, which must be freed now


def _on_current_stream(work: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Return a function that runs `work` on the current stream, not its thread's default stream."""
    if device.type != "cuda":
        return work
    stream = torch.cuda.current_stream(device)

    def run() -> Any:
        with torch.cuda.stream(stream):
            return work()

    return run


def _in_same_modes(work: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that runs `work` in another thread under the caller's torch dispatch modes."""
    modes = _get_current_dispatch_mode_stack()
    if not modes:
        return work

    def run() -> Any:
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            return work()

    return run


class _Pair:
    """One run of two lanes: the lane whose turn it is, and the results of both lanes."""

    def __init__(self, timeout: float):
        self.results: list[Any] = [None, None]
        self.error: BaseException | None = None
        self._timeout = timeout
        self._turn = _BACKWARD
        self._ended = [threading.Event(), threading.Event()]
        self._baton = [threading.Semaphore(0), threading.Semaphore(0)]
        self._baton[_BACKWARD].release()

    def run(self, lane: int, work: Callable[[], Any]) -> None:
        """Run one lane: wait for its turn, run `work`, and let the other lane run, even if `work` raised an error."""
        try:
            self._await_turn(lane)
            self.results[lane] = work()
        except BaseException as error:  # Lanes.run raises the error once both lanes have ended
            if self.error is None:
                self.error = error
        self._turn = 1 - lane
        self._ended[lane].set()
        self._baton[1 - lane].release()

    def hand_over(self) -> None:
        """Let the other lane run, and wait for the next turn."""
        lane = self._turn
        if self._ended[1 - lane].is_set():
            return
        self._turn = 1 - lane
        self._baton[1 - lane].release()
        self._await_turn(lane)

    def await_end(self, lane: int) -> None:
        """Wait until this lane has ended, even with an error. Raises TimeoutError if it does not."""
        if not self._ended[lane].wait(self._timeout):
            raise TimeoutError(f"the {_NAMES[lane]} lane did not end within {self._timeout} s") from self.error

    def _await_turn(self, lane: int) -> None:
        if not self._baton[lane].acquire(timeout=self._timeout):
            raise TimeoutError(
                f"the {_NAMES[lane]} lane waited {self._timeout} s for the {_NAMES[1 - lane]} lane to yield or end"
            )
        if self.error is not None:
            raise LaneStopped(f"the {_NAMES[1 - lane]} lane failed") from self.error


def overlapped_pair(lanes: Lanes, acting: Callable[..., AbstractContextManager]) -> Callable[[Any, Any], None]:
    """Return the function that torch's runtime runs for DualPipeV's action OVERLAP_F_B.

    Like torch's own function, the pair waits for the inputs of both halves and, at its end, sends the results of both.
    """

    def run_pair(action: Any, context: Any) -> None:
        schedule = context.schedule_ref
        stages: dict[int, Stage] = {stage.stage_index: stage for stage in schedule._stages}
        (f_stage, _, f_batch, _), (b_stage, _, b_batch, _) = action.sub_actions
        _receive(schedule.fwd_recv_ops, f_stage, f_batch, local=f_stage == 0 or f_stage - 1 in stages)
        _receive(schedule.bwd_recv_ops, b_stage, b_batch, local=stages[b_stage].is_last or b_stage + 1 in stages)
        loss = schedule._maybe_get_loss(stages[b_stage], b_batch)
        schedule.backward_counter[b_stage] += 1

        def forward() -> Any:
            output = stages[f_stage].run_forward(
                f_batch, context.arg_mbs[f_batch], context.kwarg_mbs[f_batch], save_forward_output=False
            )
            schedule._maybe_compute_loss(stages[f_stage], output, context.target_mbs, f_batch)
            return output

        with acting("FB", f_stage, f_batch, (b_stage, b_batch)):
            output, _ = lanes.run(forward, lambda: stages[b_stage].run_backward(b_batch, loss=loss))
        if f_stage + 1 in stages:
            stages[f_stage + 1].set_local_fwd_input(output, f_batch)
        if b_stage - 1 in stages:
            stages[b_stage - 1].set_local_bwd_input(stages[b_stage].get_local_bwd_output(b_batch), b_batch)

    return run_pair


def _receive(posted: dict, stage: int, micro_batch: int, local: bool) -> None:
    """Wait for a neighbouring stage's message. local: whether this rank also has the neighbouring stage; then there is
    no message."""
    if not local:
        for work in posted.pop((stage, micro_batch)):
            work.wait()
