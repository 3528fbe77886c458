"""`mode=evaluate`: checks the request, then starts the ranks."""

import importlib.util
import sys

from cluster.launch import launch
from cluster.place import Place, given_place
from conf.errors import UserError
from conf.load import write_config
from conf.run_paths import RunPaths
from conf.schema import Config
from train.data.corpus import build_corpus
from train.data.prepare_progress import show_progress
from train.evaluate.needle import make_needles
from train.evaluate.target import find_target
from train.program import install_words


def evaluate(config: Config, alone: bool) -> int:
    """Evaluate a checkpoint. alone: whether this process may run as the only rank."""
    if config.evaluate.tasks:
        _require_harness(config)
    target = find_target(config)
    with show_progress() as progress:
        corpus = build_corpus(target.config, progress)
    if config.evaluate.needle:
        make_needles(target.config, corpus.tokenizer)  # raises UserError for a length that is too short
    folder = RunPaths(config).path / "evaluate"
    command = [sys.executable, "-m", "train.evaluate.evaluation_rank", str(folder / "config.yaml")]
    if given_place() is None and (config.parallel.world > 1 or not alone):
        folder.mkdir(parents=True, exist_ok=True)
        write_config(config, command[-1])
    return launch(config, folder, command, _run_rank, alone)


def _run_rank(config: Config, place: Place) -> int:
    from train.evaluate.evaluation_rank import run_rank  # imports torch, which a driver does not need

    return run_rank(config, place)


def _require_harness(config: Config) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluate.tasks",
            config.evaluate.tasks,
            "tasks need lm-evaluation-harness, the package lm-eval, which is not installed",
            install_words("eval"),
        )
