"""The models and their training loop. `import train` gives the Python interface; see train/docs/python.md."""

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
"""Maps each name for custom training loops to its module.

These modules import torch, so train/api.py does not import them.
"""


def __getattr__(name: str) -> Any:
    """Imports a name of train/api.py or FOR_LOOPS at its first use."""
    if name == "train_step":
        cure = "engine = train.open_engine(config); engine.forward_backward(train.Batch(tokens)); engine.update()"
        raise AttributeError(f"train.train_step is now the engine (train/docs/loops.md): {cure}")
    if name not in __all__:
        raise AttributeError(f"module 'train' has no attribute {name!r}")
    from train.program import other_system

    if problem := other_system():
        raise ImportError(problem)
    if name in FOR_LOOPS:
        return getattr(import_module(FOR_LOOPS[name]), name)
    from train import api

    return getattr(api, name)
