"""Norms, SwiGLU, output head and router of single ranks: what train/prove/judge_parts.py does for products, for the parts around them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from train.prove import high_precision as high
from train.prove import low_precision as low
from train.prove import reference
from train.prove.bounds import Bound
from train.prove.evidence import depth_of, places_of
from train.prove.judge_attention import AttentionJudge
from train.prove.judge_parts import ELEMENTS, PartCall, PartJudges, SumOverCalls, in_elements
from train.prove.low_precision import FORMATS, FP32, NearNumbers, Total

HALF = 2.0**-9
"""Relative: what a rounding to bf16 changes at most."""
NO_GRADIENT = Bound(0.0, "what is not learnt gives no gradient")
SPLIT = 2.0**-15
"""A GPU multiplies a router's gradient in fp32 as two numbers of bf16."""


class WholeJudge(AttentionJudge):
    """Judges all parts of a step."""

    def _parts(self) -> PartJudges:
        parts: PartJudges = []
        for name, judges in super()._parts():
            parts.append((name, judges))
            if name.endswith((".ffn.w13", ".shared.w13")):
                parts.append((name.removesuffix(".w13"), (self._swiglu, self._swiglu_back)))
            if name.endswith(".ffn_norm"):
                parts.append((name.removesuffix(".ffn_norm"), (self._sums, self._sums_back)))
            if name.endswith(".attention.kv_up"):
                parts.append((name.removesuffix(".kv_up"), (self._attention, self._attention_back)))
        return parts

    def _judges_of(self, name: str) -> tuple | None:
        if name.endswith("norm"):
            return self._norm, self._norm_back
        if name == "head":
            return self._head, self._head_back
        if name == "embedding":
            return self._embedding, self._embedding_back
        if name.endswith(".router"):
            return self._router, self._router_back
        return super()._judges_of(name)

    # Norms

    def _norm(self, name: str) -> None:
        gain = self.weights[f"{name}.weight"]
        for call in self.calls.get(name, []):
            total = high.rms_norm(call.rows("x"), gain, self._eps(name))
            self._total("norms", call, "y", call.rows("y"), total, self._in_rows(len(gain)))

    def _norm_back(self, name: str) -> None:
        gain, made = self.weights[f"{name}.weight"], SumOverCalls()
        for call in self.calls.get(name, []):
            if not call.has("dy"):
                continue
            dx, dgain = high.rms_norm_back(call.rows("dy"), call.rows("x"), gain, self._eps(name))
            if call.has("dx"):
                self._total("norms", call, "dx", call.rows("dx"), dx, self._in_rows(len(gain)))
            made.add(dgain, self.on_gpu, len(call.rows("dy")))
        self._gradient(f"{name}.weight", made, self._in_rows(made.terms))

    def _eps(self, name: str) -> float:
        model = self.config.model
        of_latents = name.endswith((".q_norm", ".kv_norm"))
        return model.resolved_latent_norm_eps if of_latents else model.norm_eps

    # Embedding

    def _embedding(self, name: str) -> None:
        for call in self.calls[name]:
            rows = self.weights[f"{name}.weight"][call.tensors["ids"].long()].flatten(0, -2)
            self._total(
                "embedding", call, "y", call.rows("y"), Total(rows, rows.abs(), None), Bound(0.0, "bit for bit")
            )

    def _embedding_back(self, name: str) -> None:
        """Summed in fp32 in every recipe: what comes back to each token's row, of all micro-batches and ranks."""
        made, table = SumOverCalls(), self.weights[f"{name}.weight"]
        for call in self.calls[name]:
            if call.has("dy"):
                ids, dy_ND = call.tensors["ids"].long().flatten(), call.rows("dy")
                summed, size = (torch.zeros_like(table).index_add_(0, ids, one) for one in (dy_ND, dy_ND.abs()))
                made.add(Total(summed, size, None), False, len(ids))
        self._gradient(f"{name}.weight", made)

    # What goes past attention and FFN, and is added to what they make

    def _sums(self, name: str) -> None:
        for call in self.calls[f"{name}.ffn_norm"]:
            (before,) = (one for one in self.calls[f"{name}.attention_norm"] if one.is_beside(call))
            attention, ffn = (self._seen(call, "forward", f"{name}{part}") for part in (".attention", self._ffn(name)))
            self._sum(call, f"{name}.attention and its input", call.rows("x"), before.rows("x"), attention)
            self._sum(call, name, self._seen(call, "forward", name), call.rows("x"), ffn)

    def _sums_back(self, name: str) -> None:
        for call in self.calls[f"{name}.ffn_norm"]:
            got, out = (self._seen(call, "backward", one) for one in (f"{name}.attention", name))
            self._sum(call, f"gradients behind {name}.attention", got, out, call.rows("dx"))

    def _sum(self, call: PartCall, name: str, got: Tensor, one: Tensor, other: Tensor) -> None:
        total = Total(one + other, one.abs() + other.abs(), None)
        bound = Bound(4 * FP32, "one addition and one rounding")
        self._near("sums past attention and FFN", name, call.rank.info.rank, got, total, bound, self.rounding.high)

    def _seen(self, call: PartCall, phase: str, name: str) -> Tensor:
        """What was seen of a call's micro-batch, by `EvidenceWatch`: (rows, width), fp64."""
        return call.rank.tensors[f"{phase}/{name}/{call.number}"].double().flatten(0, -2)

    def _ffn(self, name: str) -> str:
        return ".ffn" if f"{name}.ffn.w13" in self.calls else ".moe"

    # SwiGLU of dense layers and shared experts

    def _swiglu(self, name: str) -> None:
        for first, second in self._pairs(name):
            a_NF = low.swiglu(first.rows("y"), None)
            self._total("SwiGLU", second, "x", second.rows("x"), Total(a_NF, a_NF.abs(), None), in_elements())

    def _swiglu_back(self, name: str) -> None:
        for first, second in self._pairs(name):
            if second.has("dx") and first.has("dy"):
                back = low.swiglu_backward(
                    NearNumbers(first.rows("y")), None, NearNumbers(second.rows("dx")), self.rounding.high
                )
                self._total("SwiGLU", first, "dy", first.rows("dy"), back.dh, in_elements())

    def _pairs(self, name: str) -> Iterator[tuple[PartCall, PartCall]]:
        """Calls of both products of the same rows."""
        seconds = {(call.rank.info.rank, call.number): call for call in self.calls.get(f"{name}.w2", [])}
        for call in self.calls.get(f"{name}.w13", []):
            yield call, seconds[call.rank.info.rank, call.number]

    # Output head

    def _head(self, name: str) -> None:
        for call, made, _ in self._heads_calls():
            assert made.loss.off is not None
            bound = Bound(2 * ELEMENTS, "a logarithm and a sum in fp32")
            self._total(
                "output head",
                call,
                "y",
                call.get("y").view(1),
                low.Total(made.loss.x.view(1), made.loss.size.view(1), made.loss.off.view(1)),
                bound,
                FORMATS["fp32"],
            )

    def _head_back(self, name: str) -> None:
        made_of_all, order = SumOverCalls(), self._in_rows(self.config.model.vocab_size)
        for call, made, learnt_N in self._heads_calls():
            if not call.has("dx", "dy"):
                self._fail("parts", call.name, call.rank.info.rank, 0, 1, "not every micro-batch came back")
                continue
            slope = call.get("dy")
            x, weight = _times(made.x, low.nearest(slope, self.rounding.high)), _times(made.weight, slope)
            twice = low.spacing(x.x, self.rounding.high)  # the product is rounded, and its multiple
            x = Total(x.x, x.size, twice if x.off is None else twice + x.off)
            dx_ND = call.rows("dx")
            if learnt_N is not None:
                none = torch.zeros_like(dx_ND[~learnt_N])
                self._compare(
                    "gradients of what is not learnt",
                    call.name,
                    call.rank.info.rank,
                    dx_ND[~learnt_N],
                    none,
                    NO_GRADIENT,
                )
                dx_ND = dx_ND[learnt_N]
            self._total("output head", call, "dx", dx_ND, x, order)
            # Of a piece of the tokens, and on a CPU without instructions for bf16 of sums inside a piece as well.
            if self.config.optim.detach_mtp and call.name != "head.0":
                continue  # the head learns nothing of it
            pieces = 2 * HALF * weight.size if self.rounds_gradients else torch.zeros_like(weight.x)
            made_of_all.add(
                Total(weight.x, weight.size, pieces if weight.off is None else pieces + weight.off), False, len(x.x)
            )
        self._gradient("head.weight", made_of_all, self._in_rows(made_of_all.terms))

    def _heads_calls(self) -> Iterator[tuple[PartCall, high.HeadSlopes, Tensor | None]]:
        """The calls of heads of the main model and of every depth, with the rows that are learnt; None for all."""
        order, weight = self._in_rows(self.config.model.hidden).value, self.weights["head.weight"]
        for depth in range(1 + self.config.model.mtp_depth):
            for call in self.calls.get(f"head.{depth}", []):
                places = places_of(call.rank.info, self.config.seq_len, depth)
                targets = self.batch.tokens_BS[call.rank.rows(call.number)][:, [place + depth + 1 for place in places]]
                seats = reference.Seats.of(self.batch, depth)
                if seats.learnt_BT is None:
                    count = len(targets) * self.config.seq_len // self.cp
                    yield (
                        call,
                        high.head(call.rows("x"), weight, targets.flatten(), count, self.rounding.high, order),
                        None,
                    )
                    continue
                learnt_N = seats.learnt_BT[call.rank.rows(call.number)][:, places].flatten()
                count = self._learnt() / (self.shared * self._mean_micro_batches(call))
                x_ND, targets_N = call.rows("x")[learnt_N], targets.flatten()[learnt_N]
                yield call, high.head(x_ND, weight, targets_N, count, self.rounding.high, order), learnt_N

    def _learnt(self) -> int:
        """Tokens of the whole step that the main model learns."""
        learnt_BT = reference.Seats.of(self.batch, 0).learnt_BT
        assert learnt_BT is not None
        return int(learnt_BT.sum())

    def _mean_micro_batches(self, call: PartCall) -> float:
        """Micro-batches that a data-parallel rank has on average in this step."""
        info = call.rank.info
        return info.plan["batch_size"] / (info.micro_batch_size * info.dp)

    # Router

    def _router(self, name: str) -> None:
        model, weight = self.config.model, self.weights[f"{name}.weight"]
        for call in self.calls.get(name, []):
            ids_BTK, got = self._routed(call, "forward", "ids"), self._routed(call, "forward", "gates")
            assert ids_BTK is not None and got is not None
            scores_BTE, sizes_BTE = high.route_scores(call.get("x"), weight, model.scores == "softmax")
            order = self._in_rows(model.hidden)
            total = high.gates(scores_BTE, sizes_BTE, ids_BTK.long(), model.route_scale)
            self._total("router", call, "gates", got, total, order, FORMATS["fp32"])
            biased_NE = (scores_BTE + self.biases[self._layer(name)]).flatten(0, 1)
            excess = high.choice_excess(model, biased_NE, ids_BTK.long().flatten(0, 1))
            bound = Bound(order.value * (1 + sizes_BTE.max().item() / 4), "what rounding in fp32 does to a score")
            none = torch.zeros(1, dtype=torch.float64)
            self._compare(
                "router's choice", name, call.rank.info.rank, torch.tensor([excess]).double(), none, bound, 1.0
            )

    def _router_back(self, name: str) -> None:
        model, weight, made = self.config.model, self.weights[f"{name}.weight"], SumOverCalls()
        order = self._in_rows(max(model.experts, model.hidden))
        order = Bound(max(order.value, SPLIT), "a product of two parts of bf16") if self.on_gpu else order
        for call in self.calls.get(name, []):
            dgates, ids_BTK = self._routed(call, "backward", "gates"), self._routed(call, "forward", "ids")
            if dgates is None or ids_BTK is None:
                continue
            x_BTD, ids_BTK = call.get("x"), ids_BTK.long()
            balance, off = self._balance(call, weight)
            slopes = high.route_back(
                dgates, x_BTD, weight, ids_BTK, model.route_scale, balance, off, model.scores == "softmax"
            )
            if call.has("dx"):
                self._total("router", call, "dx", call.rows("dx"), slopes.x, order)
            made.add(slopes.weight, False, ids_BTK[..., 0].numel())
        if self.config.optim.freeze_routers:
            return  # its gradient is nothing, as other passes show
        self._gradient(f"{name}.weight", made, Bound(order.value + self._in_rows(made.terms).value, order.reason))

    def _balance(self, call: PartCall, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What the balance loss (eq. 17-20) multiplies shares of scores with, (B, T, E), counted over whole sequences, or over each
        sample of them, and by how much near ties may move it.
        """
        model, info, length = self.config.model, call.rank.info, self.config.seq_len - depth_of(call.name)
        mates = [
            one for one in self.calls[call.name] if one.number == call.number and one.rank.info.dp_rank == info.dp_rank
        ]
        seats = reference.Seats.of(self.batch, depth_of(call.name))
        often_BTE = torch.zeros(info.micro_batch_size, length, model.experts, dtype=torch.float64)
        may_BTE = torch.zeros_like(often_BTE)
        for one in mates:
            places = places_of(one.rank.info, self.config.seq_len, depth_of(call.name))
            score_BTE, size_BTE = high.route_scores(one.get("x"), weight, model.scores == "softmax")
            often_BTE[:, places] = high.among_best(score_BTE, model.top_k)
            if model.top_k < model.experts:
                kth = score_BTE.sort(dim=-1, descending=True).values[..., model.top_k - 1 : model.top_k + 1]
                near = FP32 * (
                    1 + size_BTE.amax(-1, keepdim=True)
                )  # some roundings of the sum, a sigmoid's slope of 1/4
                is_tie = kth[..., :1] - kth[..., 1:] <= 2 * near
                close = ((score_BTE - kth[..., :1]).abs() <= 2 * near) | ((score_BTE - kth[..., 1:]).abs() <= 2 * near)
                may_BTE[:, places] = (is_tie & close).double()
        samples_BT, count = torch.zeros(often_BTE.shape[:2]), info.plan["batch_size"]
        if seats.samples_BT is not None:
            samples_BT, count = seats.samples_BT[call.rank.rows(call.number)], seats.samples
        together_BTT = ((samples_BT[:, :, None] == samples_BT[:, None]) & (samples_BT >= 0)[:, None]).double()
        length_BT1 = together_BTT.sum(-1, keepdim=True).clamp_min(1)
        factor_BT1 = (
            self.config.optim.balance_loss * self.shared / count * model.experts / (model.top_k * length_BT1**2)
        )
        here = places_of(info, self.config.seq_len, depth_of(call.name))
        often_BTE, may_BTE = ((factor_BT1 * (together_BTT @ one))[:, here] for one in (often_BTE, may_BTE))
        return often_BTE, may_BTE

    def _routed(self, call: PartCall, phase: str, what: str) -> Tensor | None:
        """(B, T, K), fp64."""
        found = call.rank.tensors.get(f"{phase}/{call.name}.{what}/{call.number}")
        return None if found is None else found.double().view(*call.tensors["x"].shape[:2], -1)

    def _layer(self, name: str) -> str:
        return name.removesuffix(".moe.router").removesuffix(".block")


def _times(one: Total, factor: Tensor) -> Total:
    return Total(one.x * factor, one.size * factor.abs(), None if one.off is None else one.off * factor.abs())
