"""What is trained, and the loop. From Python: `import train`, see train/docs/python.md."""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"
__all__ = [
    "Batch",
    "Engine",
    "GivenSample",
    "RunFailed",
    "RunResult",
    "SessionFailed",
    "batch_of_samples",
    "build_model",
    "complete",
    "compose",
    "load",
    "open_engine",
    "open_run",
    "run",
    "session",
    "train_step",
]
FOR_LOOPS = {
    "Batch": "train.data.batch",
    "GivenSample": "train.data.batch",
    "batch_of_samples": "train.data.batch",
    "Engine": "train.loop.training_engine",
    "open_engine": "train.loop.open_engine",
    "session": "train.loop.session",
    "SessionFailed": "train.loop.session",
}
"""Where the names are that are not of train/api.py: they import torch."""


def __getattr__(name: str) -> Any:
    """The functions of train/api.py, and what loops of anyone's are made of; imported when one is asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'train' has no attribute {name!r}")
    from train.program import other_system

    if told := other_system():
        raise ImportError(told)
    if name in FOR_LOOPS:
        return getattr(import_module(FOR_LOOPS[name]), name)
    from train import api

    return getattr(api, name)
