"""Generates tokens for a batch of prompts: prefill, then one token per step, or up to 1 + K with drafts.

Prompts are padded on the left. A row ends at an end token, at its maximum number of tokens, or at the end of the
context, and then leaves the batch. The first token of a row follows its whole prompt. Each later step feeds the last
token (and the drafts after it), so the cache is always one token shorter than the text.

Shapes: B rows, T tokens, L = 1 + K tokens of a step, K drafts (0 without speculation), D width, V vocabulary.
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
from train.generate.cache import LatentCache
from train.generate.decoder import Decoder, RoutingTap
from train.generate.sampling import Sampler, accept_drafts, draw, uniforms
from train.generate.source import LoadedModel
from train.generate.text import require_utf8

# MTP modules that draft the next tokens (paper 2.2 and 5.4.3).
#
# Depth k (from 1) at position i joins the state of depth k-1 at i with token i+k, and predicts token i+k+1. With the
# last confirmed token at n+1 and the main model's states up to n, depth 1 drafts token n+2 from position n, depth 2
# takes that draft as token n+2 and drafts n+3, and so on: D depths, D drafts, and one pass of one block per depth.
#
# Every depth has its own cache. An entry of depth k at position i is confirmed once token i+k is. After m new tokens, m
# more entries are confirmed, and the k-1 entries after them, which were made from drafts, are computed again next time.
# For that, each depth keeps its last confirmed state, because the next depth starts one position further back. The
# first k-1 columns of a row at depth k precede its text; they count as padding.
#
# Rows may have different numbers m of new tokens. The inputs of a shorter row end in arbitrary values, which no earlier
# position sees and which are not committed.
#
# Shapes: B rows, M the largest m, L = M + k - 1 inputs of depth k, D width, V vocabulary, K drafts.


class Drafter:
    """Drafts for a batch. starts: padding columns of every row in the main model's cache."""

    def __init__(self, decoder: Decoder, sampler: Sampler, starts: list[int]):
        self._decoder, self._sampler = decoder, sampler
        depths = range(decoder.config.mtp_depth)
        self.caches: list[LatentCache] = [
            decoder.new_cache([start + depth for start in starts], layers=1) for depth in depths
        ]
        zeros_BD = torch.zeros(len(starts), decoder.config.hidden, dtype=decoder.dtype, device=decoder.device)
        self._last_sure: list[Tensor] = [zeros_BD for _ in depths]

    def draft(self, hidden_BMD: Tensor, tokens_BM: Tensor, counts: list[int], u_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Return drafts (B, K) and the distributions that they were drawn from, (B, K, V).

        hidden_BMD: the main model's states at the new positions, the first counts[row] of each row. tokens_BM: the
        tokens after those positions. u_BK: a number in [0, 1) for each draft.
        """
        device = tokens_BM.device
        rows_B, counts_B = torch.arange(len(counts), device=device), torch.tensor(counts, device=device)
        drafts, distributions = [], []
        states_BLD, tokens_BL = hidden_BMD, tokens_BM
        for depth, cache in enumerate(self.caches):
            states_BLD = self._decoder.mtp_hidden(depth, states_BLD, tokens_BL, cache)
            cache.commit(counts)
            p_BV = self._sampler.probabilities(self._decoder.logits(states_BLD[rows_B, counts_B + depth - 1]))
            drafts.append(draw(p_BV, u_BK[:, depth]))
            distributions.append(p_BV)
            if depth + 1 == len(self.caches):
                break
            previous_BD, self._last_sure[depth] = self._last_sure[depth], states_BLD[rows_B, counts_B - 1]
            states_BLD = torch.cat([previous_BD.unsqueeze(1), states_BLD], 1)
            tokens_BL = torch.cat([tokens_BL, tokens_BL[:, :1]], 1)
            tokens_BL[rows_B, counts_B + depth] = drafts[-1]
        return torch.stack(drafts, 1), torch.stack(distributions, 1)

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        self._last_sure = [state_BD[rows] for state_BD in self._last_sure]
        for cache in self.caches:
            cache.keep(rows)


class EndReason(Enum):
    """Why a text ended."""

    document = "the document ended"
    tokens = "the number of tokens is reached"
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


@dataclass
class GenerationCounts:
    """Counts and times of a generation."""

    decode_seconds: float = 0.0
    decoded: int = 0
    """Tokens after the first of every row."""
    row_steps: int = 0
    """Steps times the rows in them."""
    accepted: int = 0
    """Accepted drafts."""
    drafted: int = 0


@dataclass
class _Row:
    index: int
    """Index of its prompt."""
    room: int
    """Number of tokens that may still follow."""
    full: EndReason
    """The end reason if no room is left."""
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
    """Log-probability of each token under the softmax of logits / temperature, which training compares with its own;
    0 at temperature 0.
    """
    cut_logprobs: list[float]
    """Log-probability of each token in the distribution it was drawn from, after the top_p cut."""
    experts_TLK: Tensor | None
    """Experts of every token of prompt and text except the last, int64; None for a model without experts."""


class Generation:
    """One batch. Iterate over `steps` once; `tokens`, `ends` and `counts` grow meanwhile."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: list[list[int]],
        sampler: Sampler,
        limits: Limits,
        *,
        seed: int,
        speculative: bool = False,
        tap: RoutingTap | None = None,
        own_seeds: bool = False,
    ):
        """Raises UserError for a prompt that leaves no room in the context.

        All rows have the same seed; with own_seeds, row i has seed + i. speculative: let the MTP modules draft; the
        model must have some. tap: of the decoder's model, for `drawn`, without speculation.
        """
        assert not (speculative and tap), "drafts are not recorded"
        assert prompts and all(prompts), "a prompt has at least the token that starts a document"
        self._decoder, self._sampler, self._limits = decoder, sampler, limits
        self._prompts = prompts
        self._rows = [_row(index, prompt, limits, seed + index * own_seeds) for index, prompt in enumerate(prompts)]
        self._tap = tap
        self._live = list(self._rows)
        starts = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
        self._cache = decoder.new_cache(starts)
        self._drafter = Drafter(decoder, sampler, starts) if speculative else None
        self.drafts = decoder.config.mtp_depth if speculative else 0
        """Drafts per step."""
        self.counts = GenerationCounts()

    @property
    def tokens(self) -> list[list[int]]:
        """Tokens so far for each prompt, without the end token."""
        return [row.tokens for row in self._rows]

    @property
    def ends(self) -> list[EndReason | None]:
        """Why each text ended; None while it continues."""
        return [row.end for row in self._rows]

    @property
    def drawn(self) -> list[DrawnText]:
        """The recorded text of each prompt, available after all texts have ended, if there is a tap."""
        found = []
        for row in self._rows:
            tokens, before, after = (list(part) for part in zip(*row.drawn, strict=True))
            found.append(DrawnText(tokens, before, after, torch.cat(row.experts) if row.experts else None))
        return found

    @torch.inference_mode()
    def steps(self) -> Iterator[dict[int, list[int]]]:
        """Yield the new tokens by prompt, step after step."""
        hidden_BTD, tokens_BT = self._prefill()
        counts = [tokens_BT.size(1)] * len(self._live)
        new = tokens_BT[:, -1:].tolist()
        while True:
            yield self._emit(new)
            began = time.perf_counter()
            going = [place for place, row in enumerate(self._live) if row.end is None]
            if not going:
                return
            if len(going) < len(self._live):
                hidden_BTD, tokens_BT, counts = hidden_BTD[going], tokens_BT[going], [counts[place] for place in going]
                self._keep(going)
            hidden_BTD, tokens_BT, counts = self._step(hidden_BTD, tokens_BT, counts)
            new = [row[:count] for row, count in zip(tokens_BT.tolist(), counts, strict=True)]
            self.counts.decode_seconds += time.perf_counter() - began

    def _prefill(self) -> tuple[Tensor, Tensor]:
        """Return the states of all columns (B, T, D), and the token after each (B, T); the last column's token is
        the first new one.
        """
        length = max(map(len, self._prompts))
        padded = [[prompt[0]] * (length - len(prompt)) + prompt for prompt in self._prompts]
        tokens_BT = torch.tensor(padded, device=self._decoder.device)
        hidden_BTD = self._decoder.hidden(tokens_BT, self._cache)
        self._cache.commit([length] * len(padded))
        logits_BV = self._decoder.logits(hidden_BTD[:, -1])
        p_BV = self._sampler.probabilities(logits_BV)
        first_B = draw(p_BV, self._uniforms(1)[:, 0])
        self._record(first_B, logits_BV, p_BV, length)
        return hidden_BTD, torch.cat([tokens_BT[:, 1:], first_B.unsqueeze(1)], 1)

    def _step(self, hidden_BTD: Tensor, tokens_BT: Tensor, counts: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Run one step: take the states, following tokens and position counts that the last step confirmed, and
        return the new ones.
        """
        last = torch.tensor(counts, device=tokens_BT.device).unsqueeze(1) - 1
        inputs_BL = tokens_BT.gather(1, last)
        u_BX = self._uniforms(2 * self.drafts + 1)  # for the drafts, for their tests, for the token after them
        drafted = None
        if self._drafter is not None:
            drafted = self._drafter.draft(hidden_BTD, tokens_BT, counts, u_BX[:, : self.drafts])
            inputs_BL = torch.cat([inputs_BL, drafted[0]], 1)
        hidden_BLD = self._decoder.hidden(inputs_BL, self._cache)
        logits_BLV = self._decoder.logits(hidden_BLD)
        p_BLV = self._sampler.probabilities(logits_BLV)
        if drafted is None:
            following_BL = draw(p_BLV[:, 0], u_BX[:, 0]).unsqueeze(1)
            self._record(following_BL[:, 0], logits_BLV[:, 0], p_BLV[:, 0], 1)
            counts = [1] * len(counts)
        else:
            drafts_BK, q_BKV = drafted
            accepted_B, next_B = accept_drafts(drafts_BK, q_BKV, p_BLV, u_BX[:, self.drafts :])
            following_BL = torch.cat([drafts_BK, next_B.unsqueeze(1)], 1).scatter_(
                1, accepted_B.unsqueeze(1), next_B.unsqueeze(1)
            )
            counts = (accepted_B + 1).tolist()
            self.counts.accepted += sum(counts) - len(counts)
            self.counts.drafted += self.drafts * len(counts)
        self._cache.commit(counts)
        self.counts.row_steps += len(counts)
        return hidden_BLD, following_BL, counts

    def _record(self, tokens_B: Tensor, logits_BV: Tensor, p_BV: Tensor, length: int) -> None:
        """Record the drawn tokens for `drawn`. length: positions of this step, including left padding."""
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

    def _emit(self, new: list[list[int]]) -> dict[int, list[int]]:
        """Add tokens to the live rows until each ends."""
        found = {}
        for row, ids in zip(self._live, new, strict=True):
            before = len(row.tokens)
            for token in ids:
                if token in self._limits.end_ids:
                    row.end = EndReason.document
                    break
                row.tokens.append(token)
                row.room -= 1
                if row.room == 0:
                    row.end = row.full
                    break
            found[row.index] = row.tokens[before:]
            self.counts.decoded += len(row.tokens) - before if before else 0
        return found

    def _keep(self, places: list[int]) -> None:
        self._live = [self._live[place] for place in places]
        self._cache.keep(places)
        if self._drafter is not None:
            self._drafter.keep(places)

    def _uniforms(self, count: int) -> Tensor:
        return uniforms([row.generator for row in self._live], count, self._decoder.device)


def _row(index: int, prompt: list[int], limits: Limits, seed: int) -> _Row:
    room = limits.context - len(prompt)
    if room <= 0:
        raise UserError(
            "generate.prompt",
            f"{len(prompt)} tokens",
            f"must be shorter than the model's context of {limits.context} tokens",
            "shorten the prompt, or take a model that was trained on longer sequences (seq_len)",
        )
    full = EndReason.context if room < limits.tokens else EndReason.tokens
    return _Row(index, min(room, limits.tokens), full, torch.Generator().manual_seed(seed))


# One call from a prompt to its continuation.


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of `start`."""

    tokens: Required[int]
    temperature: float
    top_p: float
    seed: int
    speculative: bool


def start(
    source: LoadedModel,
    prompts: list[str],
    *,
    tokens: int,
    temperature: float = 0.8,
    top_p: float = 1.0,
    seed: int = 1,
    speculative: bool = False,
) -> Generation:
    """Create a generation for these prompts, without starting it.

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
        speculative=speculative,
    )


def complete(source: LoadedModel, prompt: str, **how: Unpack[GenerationOptions]) -> str:
    """Return the continuation of a prompt, of at most `tokens` tokens. how: keyword arguments of `start`."""
    generation = start(source, [prompt], **how)
    for _ in generation.steps():
        got_on()
    return source.tokenizer.decode(generation.tokens[0])
