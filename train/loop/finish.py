"""The end of a run as its user sees it: a sample of text, the report, and one screen with the results and paths."""

import shlex
import sys
from pathlib import Path

import torch

from conf.disk import explain
from conf.errors import EXIT_OK, EXIT_STOPPED, UserError
from conf.schema import Config
from train.checkpoint.manifest import newest_intact, read_manifest
from train.data.tokenizer import Tokenizer
from train.generate.complete import complete
from train.generate.source import from_checkpoint
from train.metrics.headline import tail_mean
from train.metrics.jsonl import read_heads
from train.metrics.planned import plan_rows, plan_words
from train.metrics.report import write_report
from train.metrics.screens import final_screen, stopped_screen
from train.metrics.series import read_series
from train.program import typed_command
from train.run_folder import RunPaths
from train.weights import fits_here

SAMPLE_TEMPERATURE = 0.8


def finish(
    config: Config, code: int, tokenizer: Tokenizer, device: torch.device, seconds: float, wandb: str | None
) -> None:
    """Called on rank 0 when the run has ended with this exit code. seconds: wall time of the training."""
    paths = RunPaths(config)
    checkpoint = newest_intact(paths.checkpoints).path
    report = _report(config, paths.path)
    if code == EXIT_STOPPED:
        step = read_manifest(checkpoint).step if checkpoint else 0
        # resume= told where to start; to go on is what happens without it.
        typed = typed_command()
        command = (
            shlex.join([*typed, *(word for word in sys.argv[1:] if not word.startswith("resume="))])
            if typed
            else "the same command"
        )
        stopped_screen(config.name, step, config.steps, "a signal asked for it", checkpoint=checkpoint, command=command)
    elif code == EXIT_OK:
        last, series = last_validation(paths.metrics), read_series(paths.metrics)
        final_screen(
            config.name,
            config.steps,
            seconds=seconds,
            training_loss=tail_mean(series.finite("main_loss")),
            validation_loss=last.get("validation_loss"),
            bits_per_byte=last.get("validation_bits_per_byte"),
            plan=plan_words(plan_rows(paths.path, series)),
            sample=sample(config, checkpoint, tokenizer, device),
            checkpoint=checkpoint,
            report=report,
            wandb=wandb,
        )


def _report(config: Config, folder: Path) -> Path | str:
    """The report that was written, or why it was not: the training is done in any case."""
    try:
        return write_report(folder)
    except OSError as error:
        why = explain(error)
    except UserError as error:  # a file of the run folder is damaged
        why = f"{error.value} {error.rule}"
    return f"not written ({why}); later: python -m train mode=report name={config.name} runs={config.runs}"


def sample(config: Config, checkpoint: Path | None, tokenizer: Tokenizer, device: torch.device) -> str | None:
    """Generated text, or why there is none; None when the run wants none."""
    if not config.log.sample_tokens or checkpoint is None:
        return None
    if not fits_here(config, device):
        return "(none: the model does not fit beside the run)"
    source = from_checkpoint(config, checkpoint, tokenizer, device)
    return complete(source, "", tokens=config.log.sample_tokens, temperature=SAMPLE_TEMPERATURE, seed=config.seed)


def last_validation(metrics: Path) -> dict[str, float]:
    """The newest record with a validation in it."""
    found: dict[str, float] = {}
    for record in read_heads(metrics):
        if "validation_loss" in record:
            found = record
    return found
