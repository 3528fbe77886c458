"""Runs standard tasks on our models through lm-evaluation-harness (the package lm-eval, extra `eval`).

Each text starts with eos, or with the begin token of a Hugging Face folder. A context that is too long loses its first
tokens.

Shapes: B rows, T positions, V vocabulary.
"""

import difflib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from conf.errors import UserError
from conf.schema import Config
from train.data.reach import hub, offline_reason
from train.data.tokenizer import Tokenizer
from train.generate.decoder import Decoder
from train.generate.generation import Generation, Limits
from train.generate.sampling import Sampler
from train.model.deepseek import DeepSeekV3

BOOTSTRAPS = 1000
"""Number of bootstrap samples for a standard error."""
NEW_TOKENS = 256
"""Maximum number of tokens of an answer, by default."""


def run_tasks(config: Config, model: DeepSeekV3, tokenizer: Tokenizer, start_id: int) -> dict[str, dict[str, float]]:
    """Runs the tasks. Returns a dict: task or group -> metric -> value. Raises UserError for unknown tasks.

    - model: a complete model in eval mode.
    - start_id: first token of every text.
    """
    wanted = config.evaluate
    found = simple_evaluate(
        model=Harness(model, tokenizer, start_id, config),
        tasks=list(wanted.tasks),
        task_manager=load_tasks(config),
        num_fewshot=wanted.shots,
        limit=wanted.task_limit or None,
        bootstrap_iters=BOOTSTRAPS,
        log_samples=False,
        random_seed=config.seed,
        numpy_random_seed=config.seed % 2**32,  # numpy accepts only 32 bits
        torch_random_seed=config.seed,
        fewshot_random_seed=config.seed,
    )
    return {task: _numbers(results) for task, results in found["results"].items()}


def load_tasks(config: Config) -> TaskManager:
    """Loads the configured tasks. Raises UserError for an unavailable task."""
    wanted = config.evaluate
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    offline = offline_reason()
    try:
        manager = TaskManager(include_path=wanted.task_path, include_defaults=wanted.task_path is None)
        _require_known(wanted.tasks, manager.all_tasks)
        manager.load(list(wanted.tasks))
    except (OSError, RuntimeError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        cure = "check evaluate.task_path and the task's data"
        if offline is not None:
            why = f"{why}; {hub()} cannot be reached ({offline}), and the tasks' data are not in the cache of this machine"
            cure = "run it once with network access, or use tasks with local data: evaluate.task_path"
        raise UserError("evaluate.tasks", wanted.tasks, f"cannot be loaded: {why}", cure) from error
    return manager


def _require_known(tasks: Sequence[str], known: Sequence[str]) -> None:
    for task in tasks:
        if task not in known:
            close = difflib.get_close_matches(task, known, n=3)
            cure = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(sorted(known)[:20])}"
            raise UserError("evaluate.tasks", task, "no such task", cure)


def _numbers(results: dict[str, Any]) -> dict[str, float]:
    """Returns a task's numeric results. The key `METRIC,none` is shortened to `METRIC`."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in results.items()
        if isinstance(value, int | float) and "," in name
    }


class Harness(TemplateLM):
    """Adapts a complete model in eval mode to the harness's interface."""

    def __init__(self, model: DeepSeekV3, tokenizer: Tokenizer, start_id: int, config: Config):
        super().__init__()
        self._model, self._ids, self._start_id = model, tokenizer, start_id
        self._seq_len, self._rows, self._seed = config.seq_len, config.micro_batch_size, config.seed
        self._device = model.head.weight.device

    @property
    def eot_token_id(self) -> int:
        return self._ids.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._start_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        start = [] if add_special_tokens is False else [self._start_id]
        return start + self._ids.encode(string)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns log p of each complete text, in windows of seq_len."""
        totals = []
        for (text,) in (request.args for request in requests):
            ids = self._ids.encode(text)
            windows = get_rolling_token_windows(ids, self._start_id, self._seq_len, context_len=1)
            pairs = [((text, ""), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(log_p for log_p, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns log p of each continuation, and whether it is greedy."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda place: -len(requests[place][1]) - len(requests[place][2]))
        for places in _cut(order, self._rows):
            for place, answer in zip(places, self._score([requests[place][1:] for place in places]), strict=True):
                found[place] = answer
        return found

    @torch.inference_mode()
    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Scores a batch of pairs (context, continuation). Rows are padded at their end."""
        for _, continuation in pairs:
            if len(continuation) > self._seq_len:
                raise UserError("seq_len", self._seq_len, f"an answer has {len(continuation)} tokens", "omit this task")
        rows = [(context + continuation)[-self._seq_len - 1 :] for context, continuation in pairs]
        longest = max(map(len, rows)) - 1
        inputs = [row[:-1] + [self._ids.eos_id] * (longest - len(row) + 1) for row in rows]
        logits_BTV = self._model.logits(torch.tensor(inputs, device=self._device))
        answers = []
        for row, logits_TV, (_, continuation) in zip(rows, logits_BTV, pairs, strict=True):
            ends = slice(len(row) - 1 - len(continuation), len(row) - 1)
            targets_T = torch.tensor(continuation, device=self._device)
            log_p_T = logits_TV[ends].log_softmax(-1).gather(-1, targets_T.unsqueeze(-1))
            greedy_T = logits_TV[ends, : self._ids.vocab_size].argmax(-1)
            answers.append((log_p_T.sum().item(), bool((greedy_T == targets_T).all())))
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns each context's continuation, up to its first stop word."""
        texts: list[str] = [""] * len(requests)
        asked: list[tuple[Any, ...]] = [request.args for request in requests]  # context and settings of each request
        for settings in {repr(one[1]): one[1] for one in asked}.values():
            places = [place for place, one in enumerate(asked) if one[1] == settings]
            for batch in _cut(places, self._rows):
                contexts = [asked[place][0] for place in batch]
                for place, text in zip(batch, self._generate(contexts, settings), strict=True):
                    texts[place] = text
        return texts

    def _generate(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        tokens = min(settings.get("max_gen_toks", NEW_TOKENS), self._seq_len // 2)  # leaves room for the context
        temperature = settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0
        prompts = [self.tok_encode(context)[-(self._seq_len - tokens) :] for context in contexts]
        generation = Generation(
            Decoder(self._model, self._seq_len),
            prompts,
            Sampler(self._ids.vocab_size, temperature, settings.get("top_p", 1.0)),
            Limits(tokens, self._seq_len, frozenset(self._ids.stop_ids)),
            seed=self._seed,
        )
        return _read(generation, self._ids.decode, stops)


def _read(generation: Generation, decode: Callable[[list[int]], str], stops: list[str]) -> list[str]:
    """Run the generation. Returns texts up to their first stop words."""
    texts: list[str] = []
    for _ in generation.steps():
        texts = [decode(ids) for ids in generation.tokens]
        if all(any(stop in text for stop in stops) for text in texts):
            break
    return [text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)] for text in texts]


def _cut(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
