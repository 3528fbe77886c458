"""Objects of the user's own that are told of a run: of every step, of every checkpoint and of the end.

A callback has any of these methods, and every rank calls those of its own object, one after another:

    on_step(run, step, record)        after every step; record: metric name -> value (train/metrics/names.py), those of all ranks together
    on_checkpoint(run, step, path)    a checkpoint is whole; on other ranks than 0: this rank has done its part of it. Told when
                                      the next one is due, or at the end, as saving goes on beside the training
    on_end(run, code)                 the last checkpoint is written; code: of conf/errors.py

They look on: what they change in weights or records is theirs to answer for. One that works for minutes calls `run.got_on()` now and then: a
run without progress counts as hung after a while (cluster.kill_after).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.got_on import got_on
from conf.errors import UserError
from conf.own_code import TARGET, make, require_arguments
from conf.schema import Config
from train.model.deepseek import DeepSeekV3

HOOKS = {"on_step": "run, step, record", "on_checkpoint": "run, step, path", "on_end": "run, code"}


@dataclass(frozen=True)
class RunView:
    """What a callback sees of its run."""

    rank: int
    folder: Path
    """Folder of the run."""
    chunks: list[DeepSeekV3]
    """This rank's part of the model."""

    def got_on(self) -> None:
        """The callback has done a piece of its work, and does not hang."""
        got_on()


class Callbacks:
    """The callbacks of a recipe, in its order."""

    def __init__(self, config: Config, run: RunView | None = None):
        """run: None where they are only to be checked. Raises UserError."""
        self._run = run
        self._objects = []
        for place, section in enumerate(config.callbacks):
            key = f"callbacks[{place}]"
            made = make(key, section)
            hooks = {hook: getattr(made, hook) for hook in HOOKS if hasattr(made, hook)}
            if not hooks:
                rule = f"has none of the methods {', '.join(HOOKS)}"
                raise UserError(f"{key}.{TARGET}", section[TARGET], rule, "define one of them")
            for hook, method in hooks.items():
                require_arguments(key, section, method, HOOKS[hook].count(",") + 1, f"{hook}({HOOKS[hook]})")
            self._objects.append(made)

    def have(self, hook: str) -> bool:
        """Whether any has this method."""
        return any(hasattr(each, hook) for each in self._objects)

    def tell(self, hook: str, *what: Any) -> None:
        """Call this method of those that have it. What it raises ends the run."""
        for each in self._objects:
            if hasattr(each, hook):
                getattr(each, hook)(self._run, *what)
                got_on()
