"""Defines Sluice's commands as Python functions. `import train` makes them available.

    config = train.compose("conf=tiny", "steps=20", "name=first")
    run = train.run(config)
    model = train.load(run.folder)
    print(train.complete(model, "def main(", tokens=40))

Settings are strings, as on the command line. An invalid setting raises conf.errors.UserError.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf import load as load_settings
from conf.disk import disk_errors
from conf.errors import EXIT_OK, EXIT_STOPPED, UserError
from conf.run_paths import RunPaths
from conf.schema import Config
from conf.yaml_file import escaped
from train.checkpoint.manifest import newest_intact
from train.metrics.jsonl import METRICS_FILE, read_heads
from train.program import environment_of_children, keep_environment

if TYPE_CHECKING:
    import pandas

    from train.generate.source import LoadedModel
    from train.model.deepseek import DeepSeekV3

__all__ = ["RunFailed", "RunResult", "build_model", "complete", "compose", "load", "open_run", "run"]


class RunFailed(RuntimeError):
    """A run ended with a nonzero exit code (conf/errors.py)."""

    def __init__(self, folder: Path, code: int):
        super().__init__(f"the run in {folder} ended with exit code {code}; see its last output")
        self.folder, self.code = folder, code


@dataclass(frozen=True)
class RunResult:
    """The results in a run folder. The run may still train."""

    folder: Path
    code: int = EXIT_OK
    """Exit code of the last command; 75 if a signal stopped it."""

    @property
    def checkpoint(self) -> Path | None:
        """Path of the newest intact checkpoint, or None."""
        return newest_intact(self.folder / "checkpoints").path

    def records(self) -> list[dict[str, Any]]:
        """Returns scalars and events of each recorded step (train/metrics/names.py). Non-finite values are NaN."""
        path = self.folder / METRICS_FILE
        return list(read_heads(path)) if path.is_file() else []

    def frame(self) -> "pandas.DataFrame":
        """Returns the records as a data frame, indexed by step. Raises UserError without pandas."""
        try:
            import pandas
        except ImportError as error:
            rule = "needs pandas for a data frame, which is not installed"
            raise UserError("frame", self.folder, rule, "pip install pandas, or use records()") from error
        records = self.records()
        return pandas.DataFrame(records).set_index("step") if records else pandas.DataFrame()


def compose(*words: str) -> Config:
    """Composes and checks settings from arguments. Raises UserError for an unknown, invalid or conflicting setting."""
    return load_settings.compose(*words)


def run(config: Config) -> RunResult:
    """Run config.mode like the command `sluice`: train (or resume), evaluate, export, plan, ...

    Ranks are separate processes, so this process can start more runs. Raises UserError if the start is refused, and
    RunFailed if the run fails later.
    """
    from train.__main__ import do

    folder = RunPaths(config).path
    children = environment_of_children()
    with disk_errors(config), keep_environment(children):
        os.environ |= children
        code = do(config, alone=False)
    if code not in (EXIT_OK, EXIT_STOPPED):
        raise RunFailed(folder, code)
    return RunResult(folder, code)


def open_run(folder: Path | str) -> RunResult:
    """Opens an existing run, which may still train. Raises UserError if the folder is not a run."""
    folder = Path(folder).expanduser().absolute()
    if not (folder / "config.yaml").is_file():
        raise UserError("folder", folder, "is not a run: it has no config.yaml", "give runs/NAME of a run")
    return RunResult(folder)


def build_model(config: Config, device: str = "cpu") -> "DeepSeekV3":
    """Builds a recipe's model in this process, with the initial weights of a run, in train mode.

    - `model(tokens)`: token ids (B, T + 1); returns the loss (1,) in nats per token: the next-token loss plus MTP's
      loss times `model.mtp_weight`
    - `model.logits(tokens)`: token ids (B, T); returns logits (B, T, vocabulary)

    For training steps, use `open_engine`. Raises UserError if the memory is too small.
    """
    import torch

    from train.checkpoint.stored_weights import require_memory
    from train.kernels.choice import choose_kernels
    from train.kernels.precision import activation_dtype, build_precision
    from train.model.deepseek import DeepSeekV3
    from train.model.init import initialise
    from train.parallelize import make_loss

    require_memory(config.model, 4, "model", Path(config.name))
    place = torch.device(device)
    precision = build_precision(config.precision, place, choose_kernels(config, place)[0])
    model = DeepSeekV3.whole(config.model, precision, seq_len=config.seq_len, device="meta")
    initialise(model, config.seed, device)
    for param in model.parameters():
        param.data = param.data.to(activation_dtype(config.precision))
    if config.optim.extra_loss:
        model.add_loss(make_loss(config.optim.extra_loss))
    return model


def load(path: Path | str, *overrides: str) -> "LoadedModel":
    """Loads a model from a run, a checkpoint or a Hugging Face folder, for `complete`. Raises UserError if the source
    is missing, damaged or too large for the memory.

    `decoder.model` of the result is the torch module, in eval mode. overrides: settings such as cluster.device=cpu.
    """
    from cluster.place import Place
    from train.generate.source import open_weights
    from train.rank import choose_device

    config = compose("mode=generate", f"generate.checkpoint={_quoted(escaped(str(path)))}", *overrides)
    return open_weights(config, choose_device(config, Place()), config.generate.checkpoint)


def complete(model: "LoadedModel", prompt: str, *, tokens: int = 200, **how: Any) -> str:
    """Returns the continuation of a prompt.

    tokens: maximum number of new tokens. how: temperature, top_p and seed, as in section `generate`.
    """
    from train.generate.generation import complete as continuation

    return continuation(model, prompt, tokens=tokens, **how)


def _quoted(text: str) -> str:
    """Quotes a value for Hydra: a backslash is special only before a quote."""
    return '"' + re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ("\\" + found[2] if found[2] else ""), text) + '"'
