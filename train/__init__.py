"""What is trained, and the loop. From Python: `import train`, see train/docs/python.md."""

from typing import Any

__version__ = "0.2.0"
__all__ = ["RunFailed", "RunResult", "build_model", "complete", "compose", "load", "open_run", "run", "train_step"]


def __getattr__(name: str) -> Any:
    """The functions of train/api.py, which is imported when one is asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'train' has no attribute {name!r}")
    from train.program import other_system

    if told := other_system():
        raise ImportError(told)
    from train import api

    return getattr(api, name)
