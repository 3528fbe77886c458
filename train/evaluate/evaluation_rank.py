"""Runs one rank of an evaluation. The driver starts `python -m train.evaluate.evaluation_rank CONFIG`."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

import train.kernels.cpu.tuned  # noqa: F401  must be imported before torch allocates memory
from cluster.interrupts import leave  # before libraries, so that its exit handler runs after their handlers
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
from train.data.corpus import Corpus, CorpusPart, build_corpus
from train.data.dataset import ValidationData
from train.data.tokenizer import Tokenizer
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
from train.evaluate.needle import NEEDLE_DEPTHS, NEEDLE_TEXTS, NeedleCell, make_needles
from train.evaluate.result import EvaluatedSource, Evaluation, ObservedChunk, choose_sources, here, read, show_result
from train.evaluate.target import Target, find_target
from train.generate.decoder import Decoder
from train.generate.source import start_token
from train.kernels.choice import choose_kernels
from train.kernels.gpu_check import probe_in_turn
from train.kernels.precision import activation_dtype
from train.loop.validation import Sums, held_out_loss
from train.model.deepseek import DeepSeekV3
from train.model.sequence import Positions
from train.parallelize import build_pipeline
from train.rank import guarded, in_turn, set_up_rank
from train.show.report import write_report
from train.show.wandb_sink import evaluation_tables, wants_wandb
from train.show.writer import open_wandb

# The texts of the needle test (train/evaluate/needle.py) run in any layout.
#
# Each text is one sequence. Logits are computed only at the key's tokens, on the rank that has these tokens.
#
# Shapes: B texts, S = T + 1 tokens, N key tokens.


def read_fillers(config: Config, corpus: Corpus, part: CorpusPart) -> list[list[int]]:
    """Returns NEEDLE_TEXTS lists of held-out tokens, without eos."""
    longest, count = max(config.evaluate.needle), NEEDLE_TEXTS
    data = ValidationData(replace(corpus, parts=[part]), replace(config, seq_len=longest), count)
    tokens_BS, newline = data.batch(0, len(data)).tokens_BS, corpus.tokenizer.encode("\n")[-1]
    fillers = tokens_BS.masked_fill(tokens_BS == corpus.tokenizer.eos_id, newline).tolist()
    return [fillers[number % len(fillers)] for number in range(count)]


def search_needles(
    config: Config,
    pipeline: Pipeline[DeepSeekV3],
    mesh: Mesh,
    device: torch.device,
    tokenizer: Tokenizer,
    fillers: list[list[int]],
    start_id: int,
) -> list[NeedleCell]:
    """Runs the needle test. All ranks must call it.

    Returns one `NeedleCell` for each length and depth, equal on every rank. start_id: first token of every text.
    """
    needles = make_needles(config, tokenizer)
    keys = [len(needle.key) for needle in needles]
    watch = _Watch(pipeline.modules[-1] if pipeline.has_last else None)
    cells = []
    for length, depth in product(config.evaluate.needle, NEEDLE_DEPTHS):
        pairs = zip(needles, fillers, strict=True)
        tokens_BS = torch.tensor([needle.text(start_id, filler, length, depth) for needle, filler in pairs])
        found, nats = _score(pipeline, mesh, device, watch, tokens_BS, keys, config.micro_batch_size)
        cells.append(NeedleCell(length, depth, len(keys), found, nats))
    return cells


def _score(
    pipeline: Pipeline[DeepSeekV3],
    mesh: Mesh,
    device: torch.device,
    watch: "_Watch",
    tokens_BS: Tensor,
    keys: list[int],
    size: int,
) -> tuple[int, float]:
    """Returns the number of found pass keys, and a pass key's mean loss in nats.

    size: number of texts that a rank runs at a time.
    """
    sums_B2 = torch.zeros(len(keys), 2, dtype=torch.float64)
    for first in range(0, len(keys), size * mesh.layout.dp):
        # All ranks must run the same number of forward passes, because they exchange tokens. A rank without texts
        # repeats the first texts.
        mine = first + mesh.dp_rank * size
        rows = slice(mine, mine + size) if mine < len(keys) else slice(0, size)
        part_B2 = watch.over(
            keys[rows], lambda rows=rows: pipeline.evaluate(tokens_BS[rows].to(device), micro_batches=1)
        )
        if mine < len(keys):
            sums_B2[rows] += part_B2
    sums_B2 = sums_B2.to(device)
    dist.all_reduce(sums_B2)
    nats_B, missed_B = sums_B2.cpu().unbind(1)
    return int((missed_B == 0).sum()), nats_B.mean().item()


class _Watch:
    """Measures the losses of pass keys on the model's last chunk."""

    def __init__(self, last: DeepSeekV3 | None):
        self._keys: list[int] = []
        if last is not None:
            last.observer = partial(self._observe, last)

    def over(self, keys: list[int], forward: Callable[[], object]) -> Tensor:
        """Returns two sums per text over the pass-key tokens on this rank, (B, 2).

        The first sum is the loss in nats. The second is the number of tokens that the model does not rank first.

        keys: number of pass-key tokens in each text.
        """
        self._keys, self._sums_B2 = keys, torch.zeros(len(keys), 2, dtype=torch.float64)
        forward()
        return self._sums_B2

    @torch.no_grad()
    def _observe(self, last: DeepSeekV3, states: list[Tensor], tokens_BS: Tensor, positions: Positions) -> None:
        place_T = here(positions, tokens_BS.device)
        keys_B1 = torch.tensor(self._keys, device=tokens_BS.device).unsqueeze(1)
        text_N, at_N = (place_T >= positions.length - keys_B1).nonzero(as_tuple=True)
        if not len(text_N):
            return
        targets_N = positions.take(tokens_BS, 1)[text_N, at_N]
        named_N, nats_N = read(last, states[0][text_N, at_N], targets_N)
        sums_N2 = torch.stack([nats_N.double(), (named_N != targets_N).double()], 1).cpu()
        self._sums_B2.index_add_(0, text_N.cpu(), sums_N2)


EVALUATION_FOLDER = "evaluate"
"""Subfolder of the run folder for an evaluation on several ranks."""


def run_rank(config: Config, place: Place, failures: Path | None = None) -> int:
    """Evaluate as one rank; returns the exit code. failures: see train.rank.guarded."""
    return guarded(place, failures, disk_errors(config)(lambda: _run(config, place)))


def _run(config: Config, place: Place) -> int:
    target = find_target(config)
    if config.evaluate.tasks:
        from train.data.reach import offline_reason

        offline_reason()  # called before the import of lm_eval, because lm_eval would try to reach the hub itself
        from train.evaluate.harness import load_tasks  # lm_eval takes seconds to import

        load_tasks(config)  # reports missing tasks before weights are read
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
    """Load the model. Raises UserError if it needs too much memory."""
    dtype = activation_dtype(target.config.precision)
    if mesh.layout.world == 1:
        item_bytes = dtype.itemsize + (4 if target.meta is not None else 0)  # a checkpoint is read in fp32
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
    if config.data.chats:  # no loss by position, because several chats share a sequence
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
    """Scores the answers of the model, the baselines and the initial weights."""
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
    scores.append(
        AnswerScore("these answers, each compared with another question", mean_rouge_l(to_other_questions(own), truth))
    )
    scores.append(AnswerScore(f"the most common answer: {common:.60}", mean_rouge_l([common] * len(truth), truth)))
    examples = [
        {"question": tokenizer.decode(questions[n].prompt), "true answer": truth[n]}
        | {whose: answers[n] for whose, answers in by_model.items()}
        for n in range(0, len(questions), -(-len(questions) // SHOWN_QUESTIONS))
    ]
    return JudgedAnswers(len(questions), scores, examples)


def _start_id(target: Target, corpus: Corpus) -> int:
    """Returns the token before every text: eos, or `start_token`."""
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
        show_result(evaluation, "no file: the disk is full or failed", console)
        raise
    show_result(evaluation, str(path), console)
    if answers is not None and RunPaths(config).metrics.exists():
        write_report(path.parent)
    _tell_wandb(config, evaluation, console)


def _tell_wandb(config: Config, evaluation: Evaluation, console: Console) -> None:
    """Add the results to the evaluated run's W&B run."""
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
