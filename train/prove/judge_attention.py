"""Attention of single ranks, with whole sequences and with shared ones: see train/prove/judge_parts.py.

Shapes as in train/prove/reference.py; L positions of whole sequences, of which T are a rank's own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.prove import high_precision as high
from train.prove import low_precision as low
from train.prove.bounds import Bound
from train.prove.evidence import Evidence, depth_of, places_of
from train.prove.judge_parts import ELEMENTS, PartCall, PartsJudge
from train.prove.low_precision import FORMATS, FP32, Total

SCORES = 4 * 2.0**-9
"""Attention cores may keep probabilities and then their slopes in bf16, each rounded by 2^-9 of itself; where ranks share sequences
each block of keys is rounded for itself, and the sum once more."""


@dataclass(frozen=True)
class SharedCall:
    """Attention of a micro-batch where ranks share sequences."""

    name: str
    rank: Evidence
    number: int
    out: PartCall
    """The projection behind it."""
    q: Tensor
    k: Tensor
    v: Tensor
    unseen: Tensor
    places: list[int]
    """Places of the queries."""


class AttentionJudge(PartsJudge):
    """Judges attention, and what turns its queries and keys."""

    def _in_rows(self, terms: int) -> Bound:
        value = ELEMENTS + 8 * FP32 * max(terms, 1) ** 0.5
        return Bound(value, f"some products and a sum of {terms} terms in fp32, and one rounding of the result")

    def _attention(self, name: str) -> None:
        scale = high.softmax_scale(self.config)
        for call in self._shared(name):
            total = high.attend(call.q, call.k, call.v, scale, call.unseen)
            self._total(
                "attention", call.out, "x", _heads_of(call.out.get("x"), call.q.size(1)), total, self._in_scores()
            )
        for call in self.calls.get(name, []):
            q, k, v = (call.get(what) for what in "qkv")
            total = high.attend(q, k, v, scale, self._unseen(call))
            self._total("attention", call, "y", call.get("y"), total, self._in_scores())
            self._heads(name, call, (q, k, v))

    def _attention_back(self, name: str) -> None:
        scale = high.softmax_scale(self.config)
        for call in self._shared(name):
            self._shared_back(call, scale)
        for call in self.calls.get(name, []):
            if call.has("dy", "dq", "dk", "dv"):
                out = self._kept(self._of_same(f"{name}.out", call))
                dy, q, k, v = (call.get(what) for what in ("dy", "q", "k", "v"))
                slopes = high.attend_back(dy, q, k, v, out, scale, self._unseen(call))
                for what, total in zip(("dq", "dk", "dv"), slopes, strict=True):
                    self._total("attention", call, what, call.get(what), total, self._in_scores())

    def _heads(self, name: str, call: PartCall, heads: tuple[Tensor, ...]) -> None:
        """Queries, keys and values of the products' outputs: turned by their positions, and one rope key for all heads."""
        model, (q, k, v) = self.config.model, heads
        q_BTX, kv_BTX, down_BTX = (
            self._of_same(f"{name}.{part}", call).get("y") for part in (self._queries, "kv_up", "kv_down")
        )
        q_BHTQ, kv_BHTX = (one.unflatten(-1, (model.heads, -1)).transpose(1, 2) for one in (q_BTX, kv_BTX))
        q_BHTQ = self._grown(q_BHTQ, range(q_BHTQ.size(2)))
        rope = down_BTX[..., model.kv_rank :].unsqueeze(1).expand(-1, model.heads, -1, -1)
        nope = model.nope_head_dim
        bound = Bound(8 * ELEMENTS, "angles and turns in fp32, and one rounding of the result")
        for what, got, plain, part in (
            ("q", q, q_BHTQ[..., :nope], q_BHTQ[..., nope:]),
            ("k", k, kv_BHTX[..., :nope], rope),
        ):
            self._total(
                "heads", call, what, got[..., nope:], high.turned(part, self.config, range(part.size(-2))), bound
            )
            self._total("heads", call, what, got[..., :nope], Total(plain, plain.abs(), None), bound)
        values = kv_BHTX[..., nope:]
        self._total("heads", call, "v", v, Total(values, values.abs(), None), bound)

    def _kept(self, out: PartCall) -> Tensor:
        """Attention's output as its backward takes it: in the form in which the projection behind it keeps its input (3.3.3)."""
        kept = low.kept(out.rows("x"), self.rounding.output.kept).x
        return _heads_of(kept.view(out.tensors["x"].shape), self.config.model.heads)

    def _of_same(self, name: str, call: PartCall) -> PartCall:
        """The call of another part of the same rank and micro-batch."""
        return self._through(name, call.rank)[call.number]

    def _through(self, name: str, rank: Evidence, back: bool = True) -> list[PartCall]:
        """Calls of a part on a rank through which gradients went, or did not, in order: those of the micro-batches, and not those that
        are made again for a backward.
        """
        those = [one for one in self.calls.get(name, []) if one.rank is rank and one.has("dy") == back]
        return sorted(those, key=lambda one: one.number)

    def _unseen(self, call: PartCall) -> Tensor:
        length = call.tensors["q"].size(2)
        if self.batch.documents_BS is None:
            return high.unseen(length, None)
        return high.unseen(length, self.batch.documents_BS[call.rank.rows(call.number), :length])

    def _in_scores(self) -> Bound:
        if self.rounding.high == FORMATS["fp32"]:
            return self._in_rows(self.config.seq_len)
        return Bound(SCORES, "4 x 2^-9: probabilities and their slopes may be rounded to bf16, each by 2^-9 of itself")

    # Where ranks share sequences: each has the queries of its positions, and makes keys and values of all from latents that travel

    def _shared(self, name: str) -> Iterator["SharedCall"]:
        """Every micro-batch of every rank; of none where ranks have whole sequences."""
        blocks, depth = 2 * self.cp, depth_of(name)
        length = self.config.seq_len - depth
        for rank in self.ranks if self.cp > 1 else ():
            made = self._through(f"{name}.kv_up", rank, back=False)
            for number, out in enumerate(self._through(f"{name}.out", rank)):
                kv_BHLX = _heads_of(
                    torch.cat([one.get("y") for one in made[number * blocks : (number + 1) * blocks]], 1),
                    self.config.model.heads,
                )
                places = places_of(rank.info, self.config.seq_len, depth)
                rope_BLR = self._rope_keys(name, rank, number, length)
                q_BHTQ = self._turned_heads(self._through(f"{name}.{self._queries}", rank)[number].get("y"), places)
                nope = self.config.model.nope_head_dim
                k_BHLQ = torch.cat([kv_BHLX[..., :nope], rope_BLR.unsqueeze(1).expand(-1, q_BHTQ.size(1), -1, -1)], -1)
                documents = self.batch.documents_BS
                if documents is not None:
                    documents = documents[rank.rows(number), :length]
                seen = high.unseen(length, documents)[:, :, places]
                yield SharedCall(name, rank, number, out, q_BHTQ, k_BHLQ, kv_BHLX[..., nope:], seen, places)

    def _rope_keys(self, name: str, rank: Evidence, number: int, length: int) -> Tensor:
        """Turned, of all positions, from the ranks that have them: (B, L, R)."""
        whole = None
        for mate in (mate for mate in self.ranks if mate.info.dp_rank == rank.info.dp_rank):
            if calls := self._through(f"{name}.kv_down", mate):
                rope_BTR = calls[number].get("y")[..., self.config.model.kv_rank :]
                places = places_of(mate.info, self.config.seq_len, depth_of(name))
                made = low.nearest(high.turned(rope_BTR, self.config, places).x, self.rounding.high)
                whole = made.new_zeros(len(made), length, made.size(-1)) if whole is None else whole
                whole[:, places] = made
        assert whole is not None, f"no rank has {name}"
        return whole

    def _turned_heads(self, q_BTX: Tensor, places: Sequence[int]) -> Tensor:
        q_BHTQ, nope = _heads_of(q_BTX, self.config.model.heads), self.config.model.nope_head_dim
        q_BHTQ = self._grown(q_BHTQ, places)
        rope = low.nearest(high.turned(q_BHTQ[..., nope:], self.config, places).x, self.rounding.high)
        return torch.cat([q_BHTQ[..., :nope], rope], -1)

    def _grown(self, q_BHTQ: Tensor, places: Sequence[int]) -> Tensor:
        """Queries of these positions as they go to be turned: a model whose queries grow rounds them once more."""
        if not self.config.model.yarn.query_growth:
            return q_BHTQ
        return low.nearest(q_BHTQ * high.query_sizes(self.config, places), self.rounding.high)

    def _shared_back(self, call: "SharedCall", scale: float) -> None:
        """Queries, and of the keys and values what these queries give each block of positions."""
        nope, heads = self.config.model.nope_head_dim, call.q.size(1)
        if not call.out.has("dx"):
            return
        dout, out = _heads_of(call.out.get("dx"), heads), self._kept(call.out)
        slopes = high.attend_back(dout, call.q, call.k, call.v, out, scale, call.unseen)
        grown = high.query_sizes(self.config, call.places)
        slopes = slopes._replace(q=Total(slopes.q.x * grown, slopes.q.size * grown, None))
        queries = self._through(f"{call.name}.{self._queries}", call.rank)[call.number]
        got = _heads_of(queries.get("dy"), heads)
        plain = Total(slopes.q.x[..., :nope], slopes.q.size[..., :nope], None)
        self._total("attention", queries, "dy", got[..., :nope], plain, self._in_scores())
        turned = high.turned(slopes.q.x[..., nope:], self.config, call.places, back=True)
        size = high.turned(slopes.q.size[..., nope:], self.config, call.places).size
        self._total("attention", queries, "dy", got[..., nope:], Total(turned.x, size, None), self._in_scores())
        made = self._through(f"{call.name}.kv_up", call.rank, back=False)[call.number * 2 * self.cp :][: 2 * self.cp]
        first = 0
        for block in made:
            rows = slice(first, first + block.get("x").size(1))
            first = rows.stop
            for again in self._through(f"{call.name}.kv_up", call.rank):
                if torch.equal(again.tensors["x"], block.tensors["x"]):
                    got = _heads_of(again.get("dy"), heads)
                    for have, total, part in (
                        (got[..., :nope], slopes.k, slice(nope)),
                        (got[..., nope:], slopes.v, slice(None)),
                    ):
                        want = Total(total.x[:, :, rows, part], total.size[:, :, rows, part], None)
                        self._total("attention", again, "dy", have, want, self._in_scores())

    @property
    def _queries(self) -> str:
        return "q" if self.config.model.q_rank is None else "q_up"


def _heads_of(x_BTX: Tensor, heads: int) -> Tensor:
    """(B, T, H * X) as (B, H, T, X)."""
    return x_BTX.unflatten(-1, (heads, -1)).transpose(1, 2)
