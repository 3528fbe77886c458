"""One rank of an evaluation, top to bottom. `python -m train.evaluate.evaluation_rank CONFIG` is a rank that the driver started."""

import sys
from dataclasses import replace
from pathlib import Path

import train.kernels.cpu.tuned  # noqa: F401  before torch allocates anything
from cluster.farewell import leave  # before libraries, see there

# isort: split
import torch
from rich.console import Console

from cluster.launch import given_run
from cluster.place import Place
from conf.disk import disk_errors
from conf.errors import EXIT_OK
from conf.run_paths import RunPaths
from conf.schema import Config
from conf.screen import Terminal
from conf.words import sentence
from parallel.mesh import Mesh
from parallel.pipeline.schedule import Pipeline
from train.checkpoint.stored_weights import load_hf_model, load_pipeline, require_memory
from train.checkpoint.trained_with import require_tokenizer
from train.data.corpus import Corpus, build_corpus
from train.evaluate.answers import (
    SHOWN_QUESTIONS,
    AnswerScore,
    JudgedAnswers,
    answer_questions,
    commonest_answer,
    find_questions,
    mean_rouge_l,
    text_of,
    to_other_questions,
)
from train.evaluate.needle import NeedleCell
from train.evaluate.observed import ObservedChunk
from train.evaluate.result import EvaluatedSource, Evaluation, choose_sources, show_result
from train.evaluate.retrieve import read_fillers, search_needles
from train.evaluate.target import Target, find_target
from train.generate.decoder import Decoder
from train.generate.source import start_token
from train.kernels.choice import choose_kernels
from train.kernels.gpu_check import probe_in_turn
from train.kernels.precision import activation_dtype
from train.loop.validation import Sums, held_out_loss
from train.metrics.report import write_report
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
    probe_in_turn(config, place, device)
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
    answers = None
    if config.evaluate.answers:
        answers = _answers(target, pipeline, corpus, sources, losses, mesh, device)
    if config.evaluate.tasks:
        from train.evaluate.harness import run_tasks

        tasks = run_tasks(config, pipeline.modules[0].eval(), corpus.tokenizer, _start_id(target, corpus))
    if place.rank == 0:
        _report(config, target, losses, needle, tasks, answers)
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
    _, model, _ = load_hf_model(
        target.checkpoint,
        dtype,
        "evaluate.checkpoint",
        kernels,
        target.config.text_only,
        target.config.adapter.path,
    )
    return build_pipeline(target.config, mesh, device, [model.to(device)], [0], 1, overlap=False)


def _loss(
    config: Config, source: EvaluatedSource, pipeline: Pipeline[DeepSeekV3], mesh: Mesh, device: torch.device
) -> Sums:
    if config.data.chats:  # whose positions are those of the chats that share a sequence
        return held_out_loss(pipeline, source.data, mesh, config.micro_batch_size, device)
    last = pipeline.modules[-1] if pipeline.has_last else None
    observed = ObservedChunk(config.model.mtp_depth, config.seq_len, last)
    return held_out_loss(pipeline, source.data, mesh, config.micro_batch_size, device, observed.take)


def _answers(
    target: Target,
    pipeline: Pipeline[DeepSeekV3],
    corpus: Corpus,
    sources: list[EvaluatedSource],
    losses: list[tuple[EvaluatedSource, Sums]],
    mesh: Mesh,
    device: torch.device,
) -> JudgedAnswers:
    """Answers of these weights, and of those that the run started from if they are still there, to questions of the first source."""
    config, part, tokenizer = target.config, sources[0].part, corpus.tokenizer
    questions = find_questions(part.validation, config.evaluate.answers)
    truth = [text_of(tokenizer, each.answer) for each in questions]

    def answer(pipeline: Pipeline[DeepSeekV3]) -> list[str]:
        decoder = Decoder(pipeline.modules[0].eval(), config.seq_len)
        return answer_questions(decoder, tokenizer, questions, config.seq_len)

    by_model = {f"{target.checkpoint.name}, these weights": answer(pipeline)}
    of_losses = [sum((sums for _, sums in losses), Sums()).loss]
    if config.init_from is not None and Path(config.init_from).expanduser().exists():
        section = replace(config.evaluate, checkpoint=config.init_from, ema=False)
        start = _load(find_target(replace(config, evaluate=section)), mesh, device)
        by_model[f"{config.init_from}, before the tune"] = answer(start)
        of_losses.append(sum((_loss(config, source, start, mesh, device) for source in sources), Sums()).loss)
    scores = [
        AnswerScore(whose, mean_rouge_l(answers, truth), loss)
        for (whose, answers), loss in zip(by_model.items(), of_losses, strict=True)
    ]
    own, common = next(iter(by_model.values())), commonest_answer(part.train, tokenizer)
    scores.append(AnswerScore("these answers, each to another question", mean_rouge_l(to_other_questions(own), truth)))
    scores.append(AnswerScore(f"the commonest answer: {common:.60}", mean_rouge_l([common] * len(truth), truth)))
    examples = [
        {"question": tokenizer.decode(questions[n].prompt), "true answer": truth[n]}
        | {whose: answers[n] for whose, answers in by_model.items()}
        for n in range(0, len(questions), -(-len(questions) // SHOWN_QUESTIONS))
    ]
    return JudgedAnswers(len(questions), scores, examples)


def _start_id(target: Target, corpus: Corpus) -> int:
    """Token in front of a text: the end of another one, as in our training, or what a Hugging Face folder asks for."""
    return corpus.tokenizer.eos_id if target.meta is not None else start_token(target.checkpoint, corpus.tokenizer)


def _report(
    config: Config,
    target: Target,
    losses: list[tuple[EvaluatedSource, Sums]],
    needle: list[NeedleCell],
    tasks: dict,
    answers: JudgedAnswers | None,
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
        answers=answers,
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
    if answers is not None and RunPaths(config).metrics.exists():
        write_report(path.parent)
    _tell_wandb(config, evaluation, console)


def _tell_wandb(config: Config, evaluation: Evaluation, console: Console) -> None:
    """Add the figures to the W&B run of the run that was evaluated, if it has one."""
    folder = RunPaths(config).path
    if wants_wandb(config.log.wandb) and (folder / "wandb" / "run_id").is_file():
        sink = open_wandb(config, folder, lambda text: console.print(text, soft_wrap=True, markup=False))
        sink.write(evaluation_tables(evaluation.plain()))
        sink.close()


def main() -> int:
    config, place = given_run()
    return run_rank(config, place, RunPaths(config).path / EVALUATION_FOLDER / "logs")


if __name__ == "__main__":
    sys.exit(leave(main()))
