"""optim.max_bad_steps: counts and explains steps without an update. Too many of them in a row end the run."""

import math
from collections.abc import Sequence
from itertools import chain

from conf.errors import EXIT_DIVERGED, RunEnded
from conf.micro_batches import share_of
from parallel.exchange import gather
from train.loop.hooks.nonfinite import SHOWN_TENSORS, Origin, RankSightings, Watch, bad_weights, find_origin
from train.loop.live_run import LiveRun


class RunDiverged(RunEnded):
    """Too many consecutive steps had a non-finite loss or gradient."""

    code = EXIT_DIVERGED


class SkippedSteps:
    """Handles the steps without an update."""

    def __init__(self) -> None:
        self._bad_in_a_row, self._has_updated = 0, False

    def on_update(self, run: LiveRun, step: int) -> None:
        self._bad_in_a_row, self._has_updated = 0, True

    def on_skip(self, run: LiveRun, step: int) -> None:
        """Repeat the step on all ranks if it is the first or the last bad step in a row, to find where non-finite
        values began.

        Raises RunDiverged after optim.max_bad_steps bad steps in a row. In the last step of the run, two bad steps
        suffice, or one if this attempt has made no update. Otherwise the run would end with a state that may be
        damaged.
        """
        run.state.skipped += 1
        self._bad_in_a_row += 1
        finite = math.isfinite(run.outcome.measured.main_loss)
        at_end = step == run.config.steps and (self._bad_in_a_row > 1 or not self._has_updated)
        last = at_end or self._bad_in_a_row >= run.config.optim.max_bad_steps
        if (
            self._bad_in_a_row > 1 and not last
        ):  # the origin is searched only in the first and the last bad step of a row
            run.note(f"step {step} skipped: again a non-finite {'gradient' if finite else 'loss'}")
            return
        origin = self._find_origin(run, finite, run.outcome.update.bad_parameters)
        run.note(f"step {step} skipped: {origin.text}")
        if last:
            run.saver.checkpointer.finish()  # complete the save in progress, so that the user can resume from it
            samples = samples_of(run, origin.ranks if origin.alone else ())
            advice = origin.advice(run.parts.zero.client.updates, samples)
            raise RunDiverged(
                f"{self._bad_in_a_row} steps in a row (optim.max_bad_steps, or at the end of the run) had a non-finite loss or gradient. The last was step {step}: {origin.text}. {advice}",
                origin.ranks,
            )

    def _find_origin(self, run: LiveRun, finite_loss: bool, bad: Sequence[str]) -> Origin:
        """Repeat the step on all ranks with a `Watch`. Weights and moments do not change."""
        zero, last = run.parts.zero, run.engine.measure.last
        loss = None if last is None else bool(last.losses.means().isfinite().all())
        masters = ((name, shard.local) for name, shard in zero.shards().items() if name.startswith("master."))
        held = ((name, param) for param, name in zero.names.items() if param.numel())
        weights = bad_weights((name.removeprefix("master."), weight) for name, weight in chain(masters, held))
        with zero.accumulate(), Watch(run.chunks) as watch:
            run.engine.run_passes(run.batch)
        zero.step(valid=False)
        mine = RankSightings(
            run.rank, run.mesh.dp_rank, loss, sorted(bad)[:SHOWN_TENSORS], weights, watch.forward, watch.backward
        )
        return find_origin(finite_loss, [RankSightings.from_plain(plain) for plain in gather(mine.plain())])


def samples_of(run: LiveRun, ranks: Sequence[int]) -> str:
    """Describes the samples that these ranks read in the current step. ranks: empty for all ranks."""
    plan = run.plan
    if not ranks:
        return f"{plan.first_sample} to {plan.first_sample + plan.batch_size - 1}"
    replicas = sorted({run.mesh.layout.dp_rank(rank) for rank in ranks})
    shares = (share_of(run.config, plan.batch_size, replica) for replica in replicas)
    firsts = ((plan.first_sample + first, count) for first, count in shares)
    return ", ".join(f"{first} to {first + count - 1}" for first, count in firsts)
