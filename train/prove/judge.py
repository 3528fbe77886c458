"""What the ranks saw, held against the reference.

Every step is judged on its own: the reference starts from the state that the ranks had before it, which is what they were judged
to have after the step before. So differences do not grow from step to step, and each bound is that of one step; the steps
together are the run.

The order of the comparisons is that of the computation, so the first one that fails says where a fault begins:

    start          the state is that which the proof gave, or the checkpoint's, bit for bit
    forward        outputs of all parts, first to last; losses; loads
    backward       from the last part to the first: the gradient that comes back to a part, then those of its weights
    update         norm, masters, moments, average of the weights, biases
    validation     loss on held-out sequences

Shapes as in train/prove/reference.py.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from conf.schema import Config
from train.model.deepseek import DeepSeekV3
from train.model.init import initialise
from train.model.kernels import Kernels
from train.precision.build import build_precision
from train.prove import reference
from train.prove.bounds import UNIT, Bound, averaged, chosen, coarsest, computed, is_low, is_rounded
from train.prove.evidence import EVIDENCE, Evidence, read_all
from train.prove.layouts import PROOFS
from train.prove.reference import PlainModel, Watched
from train.prove.samples import HELD_OUT, Samples, initial_biases, initial_weights
from train.prove.shaken import ReferenceStep, Shaken, run_step
from train.run_folder import RunPaths

State = dict[str, Tensor]
"""Whole tensors by the name of their shards, fp64: master.NAME, exp_avg.NAME, exp_avg_sq.NAME, ema.NAME, bias.LAYER."""


@dataclass(frozen=True)
class Difference:
    """A comparison that failed."""

    proof: str
    part: int
    step: int
    phase: str
    quantity: str
    name: str
    """Of the tensor, or of the part of the model whose output it is."""
    rank: int | None
    """None where all ranks were put together."""
    got: float
    want: float
    error: float
    bound: float
    reason: str

    def text(self) -> str:
        """One sentence."""
        who = "" if self.rank is None else f", rank {self.rank}"
        return (
            f"pass {self.proof}, step {self.step}{who}, {self.phase}: {self.quantity} of {self.name} is {self.got:.9g} and "
            f"should be {self.want:.9g}, an error of {self.error:.2g} where {self.bound:.2g} is allowed"
        )


@dataclass
class ProofVerdict:
    """Of a pass, on one quantity."""

    proof: str
    quantity: str
    compared: int = 0
    worst: float = 0.0
    bound: float = 0.0
    where: str = ""
    reason: str = ""
    failed: int = 0
    untold: int = 0
    """Numbers that were compared with nothing, as rounding alone may move them by their own size; finite they must be."""

    @property
    def share(self) -> float:
        """The worst error, of what is allowed."""
        return _share(self.worst, self.bound)


@dataclass
class ProofFindings:
    """Of all passes."""

    verdicts: dict[tuple[str, str], ProofVerdict] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    """In the order of the computation."""
    device: str = "cpu"
    """Kind of device that the ranks had."""
    second_layout: str = ""
    """In which the checkpoint was read, and on how many ranks."""


def judge_all(config: Config) -> ProofFindings:
    """Every pass of a proof whose ranks have ended. config: that which they read."""
    findings = ProofFindings()
    for proof, as_run in PROOFS.items():
        Judge(proof, as_run(config), RunPaths(config).path / EVIDENCE, findings).judge()
    return findings


class Judge:
    """Judges one pass."""

    def __init__(self, proof: str, config: Config, folder: Path, findings: ProofFindings):
        """config: as the ranks ran it."""
        self.proof, self.config, self.findings = proof, config, findings
        self.model = config.model
        self.steps = read_all(folder, proof)
        self.samples = Samples(config)
        self.bound = computed(proof, config)
        self.is_low, self.is_rounded = is_low(proof, config), is_rounded(proof, config)
        self.phase = "start"
        self.part = self.step = 0
        self.want: ReferenceStep
        """Of the step that is judged."""
        self.shaken: Shaken | None = None
        """The same step, shaken by rounding; None in fp64."""

    def judge(self) -> None:
        before: State | None = None
        assert self.steps, f"no rank left evidence of pass {self.proof}"
        for (part, step), ranks in self.steps.items():
            self.part, self.step = part, step
            self.findings.device = ranks[0].info.device
            if part == 1:
                self.findings.second_layout = f"{ranks[0].info.layout}, {len(ranks)} ranks"
            judge = self._judge_step if step else self._judge_start
            before = judge(ranks, before if before is not None or step == 0 else self._given())

    # The state

    def _given(self) -> State:
        """What a proof starts from."""
        weights = {name: weight.double() for name, weight in initial_weights(self.config).items()}
        biases = {f"bias.{name}": bias.double() for name, bias in initial_biases(self.config).items()}
        state = {f"master.{name}": weight for name, weight in weights.items()} | biases
        for kind in ("exp_avg", "exp_avg_sq"):
            state |= {f"{kind}.{name}": torch.zeros_like(weight) for name, weight in weights.items()}
        if self.config.optim.ema_decay:
            state |= {f"ema.{name}": weight for name, weight in weights.items()}
        return state

    def _judge_start(self, ranks: list[Evidence], before: State | None) -> State:
        self.phase = "start" if before is None else "checkpoint"
        want = self._given() if before is None else before
        got = self._after(ranks)
        self._same_names("state", got, want)
        quantity = "state at the start" if before is None else "state from the checkpoint"
        for name in want:
            if name in got:
                self._compare(quantity, name, None, got[name], want[name], Bound(0.0, "bit for bit"))
        self._judge_own_biases(ranks, want)
        if self.proof == "fp32" and (drawn := assemble(ranks, "drawn")):
            self._judge_drawn(drawn, ranks[0].info.device)
        return got

    def _judge_drawn(self, drawn: State, device: str) -> None:
        """The weights that a run would have begun with: in every layout those of the model in one piece."""
        plain = build_precision(self.config.precision, torch.device("cpu"), Kernels())
        whole = DeepSeekV3.whole(self.model, plain, seq_len=self.config.seq_len, device="meta")
        initialise(whole, self.config.seed, device)
        want = {name: weight.double().cpu() for name, weight in whole.named_parameters()}
        self._same_names("initial weights", drawn, want)
        for name in want:
            self._compare("initial weights", name, None, drawn[name], want[name], Bound(0.0, "bit for bit"))

    def _after(self, ranks: list[Evidence]) -> State:
        """The state, put together from the shards of all ranks."""
        return {name: tensor for name, tensor in assemble(ranks, "after").items() if not name.startswith("running.")}

    def _judge_own_biases(self, ranks: list[Evidence], want: State) -> None:
        """Every rank's copy of the biases, not only the one that is saved."""
        for rank in ranks:
            for name, bias in rank.of_kind("own"):
                self._compare("biases", name, rank.info.rank, bias, want[name], self._bias_bound())

    def _bias_bound(self) -> Bound:
        unit = UNIT["fp64" if self.proof == "exact" else "fp32"]
        return Bound(4 * unit, "two roundings of a sum")

    # A step

    def _judge_step(self, ranks: list[Evidence], before: State) -> State:
        info = ranks[0].info
        plan = reference.plan_step(self.config, self.step)
        self.phase = "settings"
        for name, value in info.plan.items():
            self._number(
                "settings of the step", name, None, value, getattr(plan, name), Bound(1e-12, "a formula in fp64")
            )
        plain = self._plain(before, self._choices(ranks, plan.batch_size))
        self.want = run_step(plain, self.samples, plan)
        unit = UNIT[coarsest(self.config) if self.is_rounded else "fp32"]
        near = None if self.is_rounded else 2 * chosen(self.proof, self.config).value
        self.shaken = None if self.proof == "exact" else Shaken(plain, self.samples, plan, unit, near)
        seen = self.want.seen
        self._judge_forward(ranks, seen, plan.batch_size)
        self._judge_backward(ranks, plan.batch_size)
        if self.proof == "exact":
            self._judge_biases(ranks, before, seen, plan.bias_speed)
            return before
        return self._judge_update(ranks, before, seen, plan)

    def _plain(self, before: State, choices: dict[str, Tensor] | None = None) -> PlainModel:
        weights = {}
        for name, master in _under("master", before).items():
            rounded = master.bfloat16().double() if self.is_low else master
            weights[name] = rounded.clone().requires_grad_()
        return PlainModel(self.config, weights, _under("bias", before), choices)

    def _rows(self, rank: Evidence, number: int) -> slice:
        """Samples of a micro-batch, within the batch."""
        first = rank.info.first + number * rank.info.micro_batch_size
        return slice(first, first + rank.info.micro_batch_size)

    def _places(self, rank: Evidence, name: str, count: int | None = None) -> list[int]:
        """Positions of a sequence that a rank has of an output: of 2 cp pieces one from the front and one from the back.

        count: how many it has, if they may be more: embeddings reach behind every piece as far as MTP modules look.
        """
        info, last = rank.info, self.config.seq_len - depth_of(name)
        size = self.config.seq_len // (2 * info.cp)
        pieces = [info.cp_rank, 2 * info.cp - 1 - info.cp_rank] if info.cp > 1 else [0, 1]

        if info.cp == 1:
            return list(range(last))
        here = [t for piece in pieces for t in range(piece * size, min((piece + 1) * size, last))]
        if count is None or count == len(here):
            return here
        ends = [(piece + 1) * size for piece in pieces]
        return here + [t for end in ends for t in range(end, min(end + self.model.mtp_depth, last))]

    def _choices(self, ranks: list[Evidence], batch_size: int) -> dict[str, Tensor] | None:
        """Where rounding may choose other experts: those that the ranks chose, which `_judge_choices` then looks at."""
        if self.proof == "exact":
            return None
        parts: dict[str, dict[int, Tensor]] = {}
        for rank in ranks:
            for key, ids in rank.of_kind("forward"):
                name, number = key.rsplit("/", 1)
                if name.endswith(".ids"):
                    rows, places = self._rows(rank, int(number)), self._places(rank, name)
                    ids_BTK = ids.view(rows.stop - rows.start, -1, ids.size(-1))
                    whole = ids.new_empty(len(ids_BTK), self.config.seq_len - depth_of(name), ids.size(-1))
                    whole = parts.setdefault(name.removesuffix(".ids"), {}).setdefault(rows.start, whole)
                    whole[:, places] = ids_BTK
        return {name: torch.cat([ids[first] for first in sorted(ids)]).flatten(0, 1) for name, ids in parts.items()}

    def _judge_forward(self, ranks: list[Evidence], seen: Watched, batch_size: int) -> None:
        self.phase = "forward"
        made: dict[str, list[tuple[Evidence, int, Tensor]]] = {}
        for rank in ranks:
            for key, value in rank.of_kind("forward"):
                name, number = key.rsplit("/", 1)
                made.setdefault(name, []).append((rank, int(number), value))
        for name in seen.values:
            if name.endswith(".biased"):
                continue
            if name not in made and name == "embedding":
                continue  # where one rank holds it for two stages; the layer behind it tells as much
            if name not in made:
                self._fail("outputs", name, None, math.nan, math.nan, "no rank has made it")
                continue
            if name.endswith(".ids"):
                self._judge_choices(name.removesuffix(".ids"), made[name], seen, batch_size)
                continue
            scale = _size(seen.values[name], self.is_rounded)
            for rank, number, value in made[name]:
                rows = self._rows(rank, number)
                places = self._places(rank, name, value.size(1) if name == "embedding" else None)

                def part(
                    step: ReferenceStep, name: str = name, rows: slice = rows, places: list[int] = places
                ) -> Tensor:
                    return self._by_sample(step.seen.values[name], batch_size)[rows][:, places]

                self._compare_part("outputs", name, rank.info.rank, value, part, self.bound, scale)
        for rank in ranks:
            self._judge_losses(rank, seen)

    def _by_sample(self, value: Tensor, batch_size: int) -> Tensor:
        """(B, ...) also where rows of all samples lie in one axis."""
        return value if value.size(0) == batch_size else value.unflatten(0, (batch_size, -1))

    def _judge_choices(self, name: str, made: list, seen: Watched, batch_size: int) -> None:
        want = self._by_sample(seen.values[f"{name}.ids"], batch_size)
        bound = chosen(self.proof, self.config)
        for rank, number, ids in made:
            rows, places = self._rows(rank, number), self._places(rank, name)
            if self.proof != "exact":

                def scores(step: ReferenceStep, rows: slice = rows, places: list[int] = places) -> Tensor:
                    return self._by_sample(step.seen.values[f"{name}.biased"], batch_size)[rows][:, places]

                def widen(bound: Bound, _: float, scores: Callable[[ReferenceStep], Tensor] = scores) -> Bound:
                    """Two scores were compared, and each may be off."""
                    wider = self._widen(
                        scores, scores(self.want), Bound(bound.value / 2, bound.reason), 1.0, by_norm=False
                    )
                    return Bound(2 * wider.value, wider.reason)

                excess = choice_excess(self.model, scores(self.want).flatten(0, -2), ids)
                got, none = torch.tensor([excess]).double(), torch.zeros(1, dtype=torch.float64)
                self._compare("chosen experts", name, rank.info.rank, got, none, bound, 1.0, widen)
            else:
                self._compare("chosen experts", name, rank.info.rank, ids, want[rows][:, places], bound, 1.0)

    def _judge_losses(self, rank: Evidence, seen: Watched) -> None:
        info, who = rank.info, rank.info.rank
        bound = averaged(self.proof, self.config, int(info.plan["batch_size"]))
        parts: dict[str, tuple[float, Callable[[ReferenceStep], Tensor]]] = {
            "main_loss": (info.main_loss, lambda step: step.seen.main),
            "balance_loss": (info.balance_loss, lambda step: step.seen.balance),
        }
        for depth, (got, _) in enumerate(zip(info.mtp_losses, seen.mtp, strict=True)):
            parts[f"mtp_loss_{depth + 1}"] = got, lambda step, depth=depth: step.seen.mtp[depth]
        for name, (got, part) in parts.items():
            self._compare_part("losses", name, who, torch.tensor(got, dtype=torch.float64), part, bound)
        for got, name in zip(info.loads, seen.loads, strict=True):
            want = seen.loads[name].double()
            self._compare("loads", name, who, torch.tensor(got).double(), want, Bound(0.0, "whole numbers"))

    def _judge_backward(self, ranks: list[Evidence], batch_size: int) -> None:
        self.phase = "backward"
        came: dict[str, list[tuple[Evidence, int, Tensor]]] = {}
        for rank in ranks:
            for key, value in rank.of_kind("backward"):
                name, number = key.rsplit("/", 1)
                came.setdefault(name, []).append((rank, int(number), value))
        exact = self.proof == "exact"
        found = sum_over_ranks(ranks, reference.weight_shapes(self.model)) if exact else assemble(ranks, "reduced")
        gradients = self.want.gradients
        self._same_names("gradients of weights", found, gradients)
        for name in backward_order(list(gradients), list(came)):
            if name in gradients and name in found:

                def whole(step: ReferenceStep, name: str = name) -> Tensor:
                    return step.gradients[name]

                self._compare_part("gradients of weights", name, None, found[name], whole, self.bound)
            for rank, number, value in came.get(name, ()):
                gradient = self.want.seen.values[name].grad
                if gradient is None:
                    continue
                rows, times = self._rows(rank, number), rank.info.dp * rank.info.cp
                places = self._places(rank, name)

                def part(
                    step: ReferenceStep,
                    name: str = name,
                    rows: slice = rows,
                    times: int = times,
                    places: list[int] = places,
                ) -> Tensor:
                    return self._by_sample(step.seen.values[name].grad * times, batch_size)[rows][:, places]

                scale = _size(gradient * times, self.is_rounded)
                self._compare_part("gradients of outputs", name, rank.info.rank, value, part, self.bound, scale)

    def _judge_biases(self, ranks: list[Evidence], before: State, seen: Watched, speed: float) -> None:
        self.phase = "update"
        for rank in ranks:
            for name, bias in rank.of_kind("after"):
                layer = name.removeprefix("bias.")
                want = reference.move_bias(before[name], seen.loads[layer], speed)
                self._compare("biases", name, rank.info.rank, bias, want, self._bias_bound())

    def _judge_update(self, ranks: list[Evidence], before: State, seen: Watched, plan: reference.PlainPlan) -> State:
        """The update of the gradients that the ranks had, which were judged by themselves."""
        self.phase = "update"
        reduced, after, optim, info = assemble(ranks, "reduced"), self._after(ranks), self.config.optim, ranks[0].info
        norm = float(reference.global_norm(reduced))
        fp32 = Bound(16 * UNIT["fp32"], "sums of squares in fp32 by rows, 16 x 2^-24")
        for rank in ranks:
            self._number("global norm", "all weights", rank.info.rank, rank.info.grad_norm, norm, fp32)
        factor = reference.clip_factor(norm, optim)
        self._number("applied updates", "all weights", None, float(info.applied), 1.0, Bound(0.0, "every step counts"))
        for rank in ranks:
            updates = float(rank.info.updates)
            self._number(
                "applied updates", "Adam's count", rank.info.rank, updates, self.step, Bound(0.0, "one a step")
            )
        want: State = {}
        for name, gradient in reduced.items():
            names = [f"{kind}.{name}" for kind in ("master", "exp_avg", "exp_avg_sq")]
            new = reference.adamw(
                optim, plan.lr, self.step, before[names[0]], gradient * factor, before[names[1]], before[names[2]],
                gradient.dim() >= 2,
            )  # fmt: skip
            want |= dict(zip(names, new, strict=True))
            if optim.ema_decay:
                want[f"ema.{name}"] = reference.average(before[f"ema.{name}"], after[names[0]], optim.ema_decay)
        for layer, load in seen.loads.items():
            want[f"bias.{layer}"] = reference.move_bias(before[f"bias.{layer}"], load, plan.bias_speed)
        self._same_names("state", after, want)
        bounds = self._update_bounds(plan.lr)
        for name in want:
            if name in after:
                kind = name.split(".", 1)[0]
                self._compare(QUANTITIES[kind], name, None, after[name], want[name], bounds[kind])
        self._judge_own_biases(ranks, want)
        if info.validation_loss is not None:
            self._judge_validation(ranks, after)
        return after

    def _update_bounds(self, lr: float) -> dict[str, Bound]:
        moments = "bf16" if self.config.precision.moments == "bf16" else "fp32"
        fp32 = Bound(64 * UNIT["fp32"], "some ten roundings of fp32, each element by itself: 64 x 2^-24")
        moment = (
            fp32 if moments == "fp32" else Bound(1.5 * UNIT["bf16"], "moments are kept in bf16: rounded once, 2^-8")
        )
        return {"master": fp32, "ema": fp32, "exp_avg": moment, "exp_avg_sq": moment, "bias": self._bias_bound()}

    def _judge_validation(self, ranks: list[Evidence], after: State) -> None:
        self.phase = "validation"
        bound = averaged(self.proof, self.config, HELD_OUT)
        batch = self.samples.batch(-HELD_OUT, HELD_OUT)
        with torch.no_grad():
            want = float(self._plain(after).losses(batch.tokens_BS, batch.documents_BS, with_mtp=False).main)
        for rank in ranks:
            self._number("held-out loss", "main_loss", rank.info.rank, rank.info.validation_loss, want, bound)

    # Comparisons

    def _same_names(self, quantity: str, got: Iterable[str], want: Iterable[str]) -> None:
        for name in want:
            if name not in got:
                self._fail(quantity, name, None, math.nan, math.nan, "no rank has it")
        for name in got:
            if name not in want:
                self._fail(quantity, name, None, math.nan, math.nan, "the reference has no such tensor")

    def _number(
        self,
        quantity: str,
        name: str,
        rank: int | None,
        got: float,
        want: float,
        bound: Bound,
        scale: float | None = None,
    ) -> None:
        self._compare(quantity, name, rank, torch.tensor([got]).double(), torch.tensor([want]).double(), bound, scale)

    def _compare_part(
        self,
        quantity: str,
        name: str,
        rank: int | None,
        got: Tensor,
        part: Callable[[ReferenceStep], Tensor],
        bound: Bound,
        scale: float | None = None,
    ) -> None:
        """Compare with what `part` takes out of the reference's step. A step that is more sensitive than `bound` knows is given
        what rounding does to it.
        """
        want = part(self.want).detach()
        self._compare(quantity, name, rank, got, want, bound, scale, partial(self._widen, part, want))

    def _widen(
        self,
        part: Callable[[ReferenceStep], Tensor],
        want: Tensor,
        bound: Bound,
        scale: float,
        by_norm: bool | None = None,
    ) -> Bound:
        if self.shaken is None:
            return bound
        by_norm = self.is_rounded if by_norm is None else by_norm
        return max(bound, self.shaken.bound(part, want, scale, by_norm), key=lambda one: one.value)

    def _compare(
        self,
        quantity: str,
        name: str,
        rank: int | None,
        got: Tensor,
        want: Tensor,
        bound: Bound,
        scale: float | None = None,
        widen: Callable[[Bound, float], Bound] | None = None,
    ) -> None:
        """scale: what the difference is measured in; None for the size of `want`: its largest value, in low precision its norm."""
        low = self.is_rounded and quantity in LOOSE
        got, want = got.double().flatten(), want.detach().double().flatten()
        if got.numel() != want.numel():
            self._fail(quantity, name, rank, got.numel(), want.numel(), "another number of elements")
            return
        if not got.numel():
            return
        scale = _size(want, low) if scale is None else scale
        difference = (got - want).abs()
        size = (difference.square().mean().sqrt() if low else difference.max()).item()
        error = size / scale if scale else (0.0 if size == 0 else math.inf)
        error = math.inf if math.isnan(error) else error
        if error > bound.value and widen:
            bound = widen(bound, scale)
        verdict = self.findings.verdicts.setdefault((self.proof, quantity), ProofVerdict(self.proof, quantity))
        if bound.value >= MISSING and math.isfinite(error):
            verdict.untold += got.numel()
            return
        verdict.compared += got.numel()
        if _share(error, bound.value) >= verdict.share:
            verdict.worst, verdict.bound, verdict.reason = error, bound.value, bound.reason
            verdict.where = f"step {self.step}, {name}"
        if error > bound.value:
            verdict.failed += 1
            place = int(difference.nan_to_num(math.inf).argmax())
            self._differ(quantity, name, rank, got[place].item(), want[place].item(), error, bound)

    def _fail(self, quantity: str, name: str, rank: int | None, got: float, want: float, reason: str) -> None:
        verdict = self.findings.verdicts.setdefault((self.proof, quantity), ProofVerdict(self.proof, quantity))
        verdict.failed, verdict.worst, verdict.where = verdict.failed + 1, math.inf, f"step {self.step}, {name}"
        self._differ(quantity, name, rank, got, want, math.inf, Bound(0.0, reason))

    def _differ(self, quantity, name, rank, got: float, want: float, error: float, bound: Bound) -> None:
        self.findings.differences.append(
            Difference(
                self.proof,
                self.part,
                self.step,
                self.phase,
                quantity,
                name,
                rank,
                got,
                want,
                error,
                bound.value,
                bound.reason,
            )
        )


MISSING = 1.0
"""The error of a tensor that is missing: a bound from there on tells nothing."""
LOOSE = ("outputs", "losses", "gradients of weights", "gradients of outputs")
"""Quantities that pass recipe measures by their norm."""
QUANTITIES = {"master": "master weights", "exp_avg": "first moments", "exp_avg_sq": "second moments", "ema": "average of weights",
              "bias": "biases"}  # fmt: skip


def _share(error: float, bound: float) -> float:
    """Of what is allowed; where nothing is, an error is beyond all measure."""
    return error / bound if bound else (math.inf if error else 0.0)


def _size(tensor: Tensor, low: bool) -> float:
    tensor = tensor.detach().double()
    return (tensor.square().mean().sqrt() if low else tensor.abs().max()).item()


def _under(kind: str, state: State) -> State:
    return {name.removeprefix(f"{kind}."): tensor for name, tensor in state.items() if name.startswith(f"{kind}.")}


def assemble(ranks: list[Evidence], kind: str) -> State:
    """Whole tensors, fp64, from the shards of all ranks. What no rank has is not a number."""
    found: State = {}
    for rank in ranks:
        for name, tensor in rank.of_kind(kind):
            offset, shape = rank.places[f"{kind}/{name}"]
            whole = found.setdefault(name, torch.full(shape, math.nan, dtype=torch.float64))
            whole.view(-1)[offset : offset + tensor.numel()] = tensor.double()
    return found


def sum_over_ranks(ranks: list[Evidence], shapes: dict[str, tuple[int, ...]]) -> State:
    """The mean over the ranks of a stage of the gradients that ranks made: here, and not by the product's own reduction."""
    found: State = {}
    for rank in ranks:
        for name, tensor in rank.of_kind("local"):
            offset, _ = rank.places[f"local/{name}"]
            whole = found.setdefault(name, torch.zeros(shapes.get(name, tensor.shape), dtype=torch.float64))
            whole.view(-1)[offset : offset + tensor.numel()] += tensor.double().flatten() / (
                rank.info.dp * rank.info.cp
            )
    return found


def depth_of(name: str) -> int:
    """How many positions fewer than the main model an output has: those of MTP modules."""
    return int(name.split(".")[1]) + 1 if name.startswith("mtp.") else 0


def choice_excess(model, biased_NE: Tensor, ids_NK: Tensor) -> float:
    """By how much scores must have been off for the choice to be right: 0 for the reference's own."""
    count = model.top_k // model.top_groups if model.group_top_k is None else model.group_top_k
    excess = 0.0
    open_NE = torch.ones_like(biased_NE, dtype=torch.bool)
    size = model.experts // model.groups
    if model.top_groups < model.groups:
        groups_NG = reference.group_scores(model, biased_NE)
        least_N1 = groups_NG.sort(dim=-1, descending=True).values[:, model.top_groups - 1 : model.top_groups]
        behind_NK = (least_N1 - groups_NG.gather(1, ids_NK // size)).clamp_min(0)
        excess = behind_NK.max().item() / (2 * count)
        # A group that is open beyond doubt stands out by more than that excess.
        open_NE = (groups_NG >= least_N1 + 2 * count * excess).repeat_interleave(size, 1)
    inside_NE = biased_NE.masked_fill(~open_NE, -math.inf)
    kth_N1 = inside_NE.sort(dim=-1, descending=True).values[:, model.top_k - 1 : model.top_k]
    behind_NK = (kth_N1 - biased_NE.gather(1, ids_NK)).clamp_min(0)
    return max(excess, behind_NK.max().item() / 2)


def backward_order(weights: list[str], outputs: list[str]) -> list[str]:
    """Names of weights and of outputs in the order in which their gradients are made: those of the last part come first, that of
    an output before those of the weights that made it.
    """
    place = {name: float(number) for number, name in enumerate(weights)}

    def after(output: str) -> tuple[float, int]:
        prefix = output.removesuffix(".gates") + "."
        inside = [number for name, number in place.items() if name.startswith(prefix)]
        return max(inside, default=-1.0) + 0.5, -len(output)

    order = sorted(
        [*((number, -math.inf, name) for name, number in place.items()), *((*after(name), name) for name in outputs)]
    )
    return [name for *_, name in reversed(order)]
