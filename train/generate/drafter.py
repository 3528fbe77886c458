"""MTP modules that guess the next tokens (paper 2.2 and 5.4.3).

Depth k (from 1) at position i joins the state of depth k-1 at i with token i+k, and predicts token i+k+1. With the last
sure token at n+1 and the main model's states up to n, depth 1 drafts token n+2 from position n, depth 2 takes that draft as
token n+2 and drafts n+3, and so on: D depths, D drafts, a pass of one block each.

Every depth has a cache of its own. An entry of depth k at position i is sure once token i+k is: after m new tokens, m more
entries are, and the k-1 behind them, made from drafts, are made again next time. For that, each depth keeps its last sure
state, as the next depth starts one position further back. A row's first k-1 columns at depth k stand before its text: they
are counted as padding.

Rows may have different numbers m of new tokens; a shorter row's inputs end in junk that nothing before it sees and that is
not committed.

Shapes: B rows, M the largest m, L = M + k - 1 inputs of depth k, D width, V vocabulary, K drafts.
"""

import torch
from torch import Tensor

from train.generate.cache import LatentCache
from train.generate.decoder import Decoder
from train.generate.sampling import Sampler, draw


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
        """Drafts (B, K) and the distributions they were drawn from, (B, K, V).

        hidden_BMD: the main model's states at the positions that are new, the first counts[row] of each row. tokens_BM:
        the tokens behind those positions. u_BK: a number in [0, 1) for each draft.
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
        """Let go of all other rows."""
        self._last_sure = [state_BD[rows] for state_BD in self._last_sure]
        for cache in self.caches:
            cache.keep(rows)
