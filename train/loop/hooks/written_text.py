"""Generates sample text from checkpoints, every log.sample_every steps and at the end of a run.

sample.json contains the newest KEPT_SAMPLES texts, by step.
"""

import torch

from conf.files import atomic_write_json
from conf.run_paths import RunPaths
from conf.schema import Config
from train.checkpoint.manifest import newest_intact, read_manifest
from train.checkpoint.stored_weights import fits_here
from train.data.tokenizer import Tokenizer
from train.generate.generation import complete
from train.generate.source import from_checkpoint
from train.loop.live_run import LiveRun
from train.show.report import SAMPLE, read_written_texts
from train.show.screens import quoted_lines
from train.show.wandb_sink import sample_table

SAMPLE_TEMPERATURE = 0.8
KEPT_SAMPLES = 100
"""Maximum number of texts in sample.json. The newest texts are kept."""


class SampleTexts:
    """Shows a sample on rank 0 every log.sample_every steps, when the checkpoint of the step is complete.

    Other ranks wait for rank 0 in the next step.
    """

    def on_save(self, run: LiveRun, step: int) -> None:
        every, saving = run.config.log.sample_every, run.config.checkpoint.every
        if not every or not saving or step % saving or step % every >= saving or step == run.config.steps:
            return
        if run.writer is None:
            return
        run.saver.finish(run)
        with run.beside("validation"):
            text = sample(run.config, run.data.tokenizer, run.device)
            if text is not None:
                run.writer.show(sample_table(step, text))
                run.note("\n".join([f"text sampled after step {step}", *quoted_lines(text, "  ")]))


def sample(config: Config, tokenizer: Tokenizer, device: torch.device) -> str | None:
    """Generates text with the newest checkpoint and stores it in sample.json. Returns the text.

    If the run cannot generate text, returns the reason in parentheses. Returns None if samples are off or no checkpoint
    exists. All texts of a run use the same random draws.
    """
    paths = RunPaths(config)
    checkpoint = newest_intact(paths.checkpoints).path
    if not config.log.sample_tokens or checkpoint is None:
        return None
    if config.model.block:
        return "(none: custom blocks do not support text generation)"
    if not fits_here(config, device):
        return "(none: there is not enough memory for a second copy of the model)"
    source = from_checkpoint(config, checkpoint, tokenizer, device)
    text = complete(source, "", tokens=config.log.sample_tokens, temperature=SAMPLE_TEMPERATURE, seed=config.seed)
    step = read_manifest(checkpoint).step
    earlier = [one for one in read_written_texts(paths.path) if one["step"] < step]
    newest = {"step": step, "temperature": SAMPLE_TEMPERATURE, "text": text}
    atomic_write_json(paths.path / SAMPLE, newest | {"earlier": earlier[1 - KEPT_SAMPLES :]})
    return text
