"""Builds the user's hooks from the list `callbacks` of a recipe. train/loop/live_run.py defines a hook.

A hook that works for minutes must call `run.got_on()` at intervals. Otherwise the driver ends the run as hung after
cluster.kill_after seconds.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from cluster.comm_ring import got_on
from cluster.patience import PATIENT_PHASES, STEP_HOOKS, STEP_PHASE
from conf.errors import UserError
from conf.own_code import TARGET, make, require_arguments
from conf.schema import Config
from train.checkpoint.manifest import HOOK_STATE
from train.loop.hooks.rank_progress import RankProgress
from train.loop.live_run import HOOK_METHODS, LiveRun


class Callback:
    """Wraps a user's callback as a hook with exactly the methods that the callback defines."""

    def __init__(self, made: Any, progress: RankProgress | None):
        """progress: receives a report when the callback starts work outside of steps."""
        self._progress = progress
        if hasattr(made, "close"):
            self.close = made.close
        for name in ("shards", "wanted", "meta"):
            if hasattr(made, name):
                setattr(self, name, partial(_as_kept, getattr(made, name)))
        if hasattr(made, "restore"):
            self.restore = lambda meta: made.restore(None if meta is None else _own(meta))
        for name in HOOK_METHODS:
            if hasattr(made, name):
                setattr(self, name, partial(self._tell, name, getattr(made, name)))

    def _tell(self, name: str, method: Callable, run: LiveRun, *what: Any) -> None:
        if self._progress is not None and name in PATIENT_PHASES:
            self._progress.say(run, name)
        method(run, *what)
        if self._progress is not None and name in STEP_HOOKS and name != "on_step":  # the step goes on
            self._progress.say(run, STEP_PHASE, run.plan.batch_size)
        got_on()


def _as_kept(give: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns a callback's values under their names in a checkpoint, with the prefix HOOK_STATE. give: a function that
    returns the values."""
    return {HOOK_STATE + name: value for name, value in give().items()}


def _own(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the callbacks' entries in a checkpoint's meta, under the callbacks' names."""
    return {name.removeprefix(HOOK_STATE): value for name, value in meta.items() if name.startswith(HOOK_STATE)}


def make_callbacks(config: Config, progress: RankProgress | None = None) -> list[Callback]:
    """Builds the callbacks of a recipe, in the recipe's order. Raises UserError.

    progress: receives a report when a callback starts work outside of steps; None if the callbacks are only validated.
    """
    found = []
    for place, section in enumerate(config.callbacks):
        key = f"callbacks[{place}]"
        made = make(key, section)
        methods = {name: getattr(made, name) for name in HOOK_METHODS if hasattr(made, name)}
        if not methods:
            rule = f"has none of the methods {', '.join(HOOK_METHODS)}"
            raise UserError(f"{key}.{TARGET}", section[TARGET], rule, "define at least one of these methods")
        if hasattr(made, "shards") and (lacking := [name for name in ("meta", "restore") if not hasattr(made, name)]):
            rule = f"has `shards` and lacks {', '.join(lacking)}"
            raise UserError(
                f"{key}.{TARGET}", section[TARGET], rule, "define them as described in train/loop/live_run.py"
            )
        for name, method in methods.items():
            words = HOOK_METHODS[name]
            require_arguments(key, section, method, words.count(",") + 1, f"{name}({words})")
        found.append(Callback(made, progress))
    return found
