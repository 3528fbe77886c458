"""Generates tokens for a batch of prompts: prefill, then one token of every text per step.

Prompts are padded on the left. A row that has ended leaves the batch. The newest token of a text is not yet in the
cache.

Shapes: B rows, T tokens, V vocabulary.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Required, TypedDict, Unpack

import torch
from torch import Tensor

from cluster.comm_ring import got_on
from conf.errors import UserError
from train.generate.decoder import Decoder, RoutingTap
from train.generate.sampling import Sampler, draw, uniforms
from train.generate.source import LoadedModel
from train.generate.text import require_utf8


class EndReason(Enum):
    """Why a text ended."""

    document = "the document ended"
    tokens = "the maximum number of tokens is reached"
    context = "the context is full"


@dataclass(frozen=True)
class Limits:
    """Conditions that end a text."""

    tokens: int
    """Maximum tokens of one text."""
    context: int
    """Maximum tokens of prompt and text together."""
    end_ids: frozenset[int]
    """Tokens that end a text."""

    def __post_init__(self):
        if self.tokens < 1:
            raise UserError("tokens", self.tokens, "must be at least 1", "ask for 1 token or more")


@dataclass
class GenerationCounts:
    """Token counts and times of a generation."""

    decode_seconds: float = 0.0
    decoded: int = 0
    """Number of generated tokens, without the first token of every row."""


@dataclass
class _Row:
    index: int
    """Index of the row's prompt."""
    room: int
    """Number of tokens that the row may still generate."""
    full: EndReason
    """Why the row ends when `room` becomes 0."""
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    end: EndReason | None = None
    drawn: list[tuple[int, float, float]] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class DrawnText:
    """A model's text after a prompt, with its log-probabilities."""

    tokens: list[int]
    """Token ids, including the end token, if there is one."""
    logprobs: list[float]
    """Log-probabilities under softmax(logits / temperature); 0 at temperature 0."""
    cut_logprobs: list[float]
    """Log-probability of each token in the distribution after the top_p cut."""
    experts_TLK: Tensor | None
    """Ids of the experts that each token except the last was sent to, int64; None if not recorded."""


class Generation:
    """The generation of one batch. Iterate over `steps` only once."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: list[list[int]],
        sampler: Sampler,
        limits: Limits,
        *,
        seed: int,
        tap: RoutingTap | None = None,
        own_seeds: bool = False,
    ):
        """Raises UserError for a prompt that leaves no room in the context.

        - own_seeds: whether row i draws with seed + i; False: all rows draw with `seed`.
        - tap: a RoutingTap on the decoder's model, required for `drawn`.
        """
        assert prompts and all(prompts), "a prompt has at least the token that starts a document"
        self._decoder, self._sampler, self._limits = decoder, sampler, limits
        self._prompts = prompts
        self._rows = [_row(index, prompt, limits, seed + index * own_seeds) for index, prompt in enumerate(prompts)]
        self._tap = tap
        self._live = list(self._rows)
        starts = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
        self._cache = decoder.new_cache(starts)
        self.counts = GenerationCounts()

    @property
    def tokens(self) -> list[list[int]]:
        """Generated tokens of each prompt, without the end token."""
        return [row.tokens for row in self._rows]

    @property
    def ends(self) -> list[EndReason | None]:
        """Why each text ended; None: it has not ended."""
        return [row.end for row in self._rows]

    @property
    def drawn(self) -> list[DrawnText]:
        """Generated texts with log-probabilities. They are complete when the generation has ended. Requires `tap`."""
        found = []
        for row in self._rows:
            tokens, before, after = (list(part) for part in zip(*row.drawn, strict=True))
            found.append(DrawnText(tokens, before, after, torch.cat(row.experts) if row.experts else None))
        return found

    @torch.inference_mode()
    def steps(self) -> Iterator[dict[int, list[int]]]:
        """Run the generation. Each step yields {prompt index: new tokens}."""
        length = max(map(len, self._prompts))
        padded = [[prompt[0]] * (length - len(prompt)) + prompt for prompt in self._prompts]
        tokens_B = self._step(torch.tensor(padded, device=self._decoder.device))
        while True:
            yield self._emit(tokens_B.tolist())
            began = time.perf_counter()
            going = [place for place, row in enumerate(self._live) if row.end is None]
            if not going:
                return
            if len(going) < len(self._live):
                tokens_B = tokens_B[going]
                self._keep(going)
            tokens_B = self._step(tokens_B.unsqueeze(1))
            self.counts.decode_seconds += time.perf_counter() - began

    def _step(self, inputs_BT: Tensor) -> Tensor:
        """Feed uncached tokens. Returns each row's next token, (B,)."""
        logits_BV = self._decoder.logits(self._decoder.hidden(inputs_BT, self._cache)[:, -1])
        self._cache.commit(inputs_BT.size(1))
        p_BV = self._sampler.probabilities(logits_BV)
        next_B = draw(p_BV, uniforms([row.generator for row in self._live], self._decoder.device))
        self._record(next_B, logits_BV, p_BV, inputs_BT.size(1))
        return next_B

    def _record(self, tokens_B: Tensor, logits_BV: Tensor, p_BV: Tensor, length: int) -> None:
        """Record tokens for `drawn`. length: number of positions in a row, including left padding."""
        if self._tap is None:
            return
        tokens_B1 = tokens_B.unsqueeze(1)
        before_B = self._sampler.log_probabilities(logits_BV).gather(1, tokens_B1)[:, 0].tolist()
        after_B = p_BV.gather(1, tokens_B1)[:, 0].log().tolist()
        if self._tap.shape[0]:
            experts_BTLK = self._tap.take().unflatten(0, (len(tokens_B), length)).cpu()
            for row, experts_TLK in zip(self._live, experts_BTLK, strict=True):
                row.experts.append(experts_TLK if row.experts else experts_TLK[-len(self._prompts[row.index]) :])
        for row, *drawn in zip(self._live, tokens_B.tolist(), before_B, after_B, strict=True):
            row.drawn.append((drawn[0], drawn[1], drawn[2]))

    def _emit(self, tokens: list[int]) -> dict[int, list[int]]:
        """Add a token to each row, or end the row."""
        found = {}
        for row, token in zip(self._live, tokens, strict=True):
            found[row.index] = [token]
            if token in self._limits.end_ids:
                row.end, found[row.index] = EndReason.document, []
                continue
            self.counts.decoded += bool(row.tokens)
            row.tokens.append(token)
            row.room -= 1
            if row.room == 0:
                row.end = row.full
        return found

    def _keep(self, places: list[int]) -> None:
        self._live = [self._live[place] for place in places]
        self._cache.keep(places)


def _row(index: int, prompt: list[int], limits: Limits, seed: int) -> _Row:
    room = limits.context - len(prompt)
    if room <= 0:
        raise UserError(
            "generate.prompt",
            f"{len(prompt)} tokens",
            f"must be shorter than the model's context of {limits.context} tokens",
            "shorten the prompt, or use a model that was trained on longer sequences (seq_len)",
        )
    full = EndReason.context if room < limits.tokens else EndReason.tokens
    return _Row(index, min(room, limits.tokens), full, torch.Generator().manual_seed(seed))


# Functions that continue a prompt in one call.


class GenerationOptions(TypedDict, total=False):
    """Options of a generation: keyword arguments of `start`."""

    tokens: Required[int]
    temperature: float
    top_p: float
    seed: int


def start(
    source: LoadedModel,
    prompts: list[str],
    *,
    tokens: int,
    temperature: float = 0.8,
    top_p: float = 1.0,
    seed: int = 1,
) -> Generation:
    """Create a generation for these prompts.

    Raises UserError for a prompt that exceeds the context or is not UTF-8.
    """
    for prompt in prompts:
        require_utf8(prompt, "generate.prompt")
    return Generation(
        source.decoder,
        [[source.start_id, *source.tokenizer.encode(prompt)] for prompt in prompts],
        Sampler(source.tokenizer.vocab_size, temperature, top_p),
        Limits(tokens, source.context, frozenset(source.tokenizer.stop_ids)),
        seed=seed,
    )


def complete(source: LoadedModel, prompt: str, **how: Unpack[GenerationOptions]) -> str:
    """Return a prompt's continuation. how: options, such as `tokens`."""
    generation = start(source, [prompt], **how)
    for _ in generation.steps():
        got_on()
    return source.tokenizer.decode(generation.tokens[0])
