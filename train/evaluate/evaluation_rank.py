"""One rank of an evaluation, top to bottom. `python -m train.evaluate.evaluation_rank CONFIG` is a rank that the driver started."""

import sys
from pathlib import Path

import train.kernels.cpu.tuned  # noqa: F401  before torch allocates anything

# isort: split
import torch
from rich.console import Console

from cluster.launch import Place, given_run
from conf.disk import disk_errors
from conf.errors import EXIT_OK
from conf.schema import Config
from conf.screen import Terminal
from conf.words import sentence
from parallel.mesh import Mesh
from parallel.pipeline.schedule import Pipeline
from train.checkpoint.run_folder import RunPaths
from train.checkpoint.trained_with import require_tokenizer
from train.checkpoint.weights import load_pipeline, require_memory
from train.data.corpus import Corpus, build_corpus
from train.evaluate.held_out_sources import EvaluatedSource, choose_sources
from train.evaluate.needle import NeedleCell
from train.evaluate.observed import ObservedChunk
from train.evaluate.result import Evaluation, show_result
from train.evaluate.retrieve import read_fillers, search_needles
from train.evaluate.target import Target, find_target
from train.generate.source import start_token
from train.hf.whole_model import load_hf_model
from train.kernels.choice import choose_kernels
from train.kernels.precision import activation_dtype
from train.loop.validation import Sums, held_out_loss
from train.metrics.wandb_items import evaluation_tables
from train.metrics.wandb_sink import wants_wandb
from train.metrics.writer import open_wandb
from train.model.deepseek import DeepSeekV3
from train.parallelize import build_pipeline
from train.rank import guarded, in_turn, set_up_rank

EVALUATION_FOLDER = "evaluate"
"""Beside the run's own files: configuration and logs of an evaluation on several ranks."""


def run_rank(config: Config, place: Place, failures: Path | None = None) -> int:
    """Evaluate as one rank; returns the exit code. failures: see train.rank.guarded."""
    return guarded(place, failures, disk_errors(config)(lambda: _run(config, place)))


def _run(config: Config, place: Place) -> int:
    target = find_target(config)
    if config.evaluate.tasks:
        from train.data.reach import offline_reason

        offline_reason()  # before lm_eval is imported, which would look for the hub itself
        from train.evaluate.harness import load_tasks  # lm_eval takes seconds

        load_tasks(config)  # what is missing is told before weights are read
    config, rank = target.config, set_up_rank(target.config, place)
    device, mesh = rank.device, rank.mesh
    corpus = in_turn(place, lambda progress: build_corpus(config, progress))
    if target.meta is not None:
        require_tokenizer(corpus.tokenizer.fingerprint, config.data.tokenizer, target.checkpoint, target.meta)
    sources = choose_sources(corpus, config, target.meta and target.meta["held_out"])
    pipeline = _load(target, mesh, device)
    losses = [(source, _loss(config, source, pipeline, mesh, device)) for source in sources]
    needle, tasks = [], {}
    if config.evaluate.needle:
        fillers = read_fillers(config, corpus, sources[0].part)
        needle = search_needles(config, pipeline, mesh, device, corpus.tokenizer, fillers, _start_id(target, corpus))
    if config.evaluate.tasks:
        from train.evaluate.harness import run_tasks

        tasks = run_tasks(config, pipeline.modules[0].eval(), corpus.tokenizer, _start_id(target, corpus))
    if place.rank == 0:
        _report(config, target, losses, needle, tasks)
    return EXIT_OK


def _load(target: Target, mesh: Mesh, device: torch.device) -> Pipeline[DeepSeekV3]:
    """Raises UserError where one process has all the weights and no memory for them."""
    dtype = activation_dtype(target.config.precision)
    if mesh.layout.world == 1:
        item_bytes = dtype.itemsize + (4 if target.meta is not None else 0)  # a checkpoint's are read in fp32
        require_memory(target.config.model, item_bytes, "evaluate.checkpoint", target.checkpoint)
    if target.meta is not None:
        return load_pipeline(target.config, mesh, device, target.checkpoint)
    kernels, _ = choose_kernels(target.config, device)
    _, model, _ = load_hf_model(target.checkpoint, dtype, "evaluate.checkpoint", kernels, target.config.text_only)
    return build_pipeline(target.config, mesh, device, [model.to(device)], [0], 1, overlap=False)


def _loss(
    config: Config, source: EvaluatedSource, pipeline: Pipeline[DeepSeekV3], mesh: Mesh, device: torch.device
) -> Sums:
    last = pipeline.modules[-1] if pipeline.has_last else None
    observed = ObservedChunk(config.model.mtp_depth, config.seq_len, last)
    return held_out_loss(pipeline, source.data, mesh, config.micro_batch_size, device, observed.take)


def _start_id(target: Target, corpus: Corpus) -> int:
    """Token in front of a text: the end of another one, as in our training, or what a Hugging Face folder asks for."""
    return corpus.tokenizer.eos_id if target.meta is not None else start_token(target.checkpoint, corpus.tokenizer)


def _report(
    config: Config,
    target: Target,
    losses: list[tuple[EvaluatedSource, Sums]],
    needle: list[NeedleCell],
    tasks: dict,
) -> None:
    evaluation = Evaluation(
        name=config.name,
        checkpoint=target.checkpoint,
        step=target.step,
        weights="ema" if config.evaluate.ema else "master",
        precision=config.precision.name,
        seq_len=config.seq_len,
        sources=losses,
        needle=needle,
        tasks=tasks,
    )
    console = Terminal()
    for note in (*target.notes, *(note for source, _ in losses for note in source.data.notes)):
        console.print(sentence(note, indent=2), soft_wrap=True, markup=False)
    try:
        path = evaluation.write(RunPaths(config).path)
    except OSError:
        show_result(evaluation, "no file: its disk refused it", console)
        raise
    show_result(evaluation, str(path), console)
    _tell_wandb(config, evaluation, console)


def _tell_wandb(config: Config, evaluation: Evaluation, console: Console) -> None:
    """Add the figures to the W&B run of the run that was evaluated, if it has one."""
    folder = RunPaths(config).path
    if wants_wandb(config.log.wandb) and (folder / "wandb" / "run_id").is_file():
        sink = open_wandb(config, folder, lambda text: console.print(text, soft_wrap=True, markup=False))
        sink.do(evaluation_tables(evaluation.plain()))
        sink.close()


def main() -> int:
    config, place = given_run()
    return run_rank(config, place, RunPaths(config).path / EVALUATION_FOLDER / "logs")


if __name__ == "__main__":
    sys.exit(main())
