"""The engine of one rank: what any loop needs of a model in any layout. Our own trainer is one of its clients.

    forward_backward    gradients of a loss over a batch; several calls add up
    update              gradients clipped and applied, unless loss or gradient is not finite; the biases of the routers move by the
                        loads of the step (paper 2.1.2)
    discard             the gradients are forgotten
    logprobs            log-probabilities of given tokens, which change nothing
    save, load          checkpoints, which any layout reads
    generate            text of the live model, of one process
    weights, fill       the weights under Hugging Face's names, given a bucket at a time, and taken

All ranks make the same calls in the same order. In every call each data-parallel rank gives its own share of the batch; ranks that share
it (stages of a pipeline, parts of sequences) give the same. A step in its order:

    weights     what losses and routers count
    passes      forward and backward of all micro-batches
    measures    losses, loads and times, summed over all ranks
    reduction   gradients are reduced, at ZeRO 1 and 2 not before the last call of the step; at ZeRO 3 in every backward
    update
    balance     the biases
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import UserError, causes
from conf.own_code import TARGET, import_target
from conf.pipeline_schedules import check_schedule
from conf.schema import Config
from parallel.mesh import Mesh
from parallel.update_result import Update
from train.data.batch import Batch
from train.loop.measure import Measure, MeasuredStep, to_device
from train.loop.stop import StopKind
from train.model.count import moe_layers
from train.model.deepseek import DeepSeekV3
from train.model.router import update_bias
from train.model.token_losses import NEEDED_TENSORS, TOKEN_LOSSES, TokenLoss, negative_logprob
from train.optim.qk_clip import QKClip
from train.optim.schedules import Schedules, StepPlan
from train.rank_parts import ParallelModel, RankSetup

if TYPE_CHECKING:
    from train.generate.generation import DrawnText
    from train.loop.live_model import LiveModel

TERMS = ("mtp", "balance", "biases")
"""What a step does beside its loss: MTP's losses, the balance loss of the routers, and the move of their biases."""


def set_weights(chunks: Sequence[DeepSeekV3], plan: StepPlan, balance_weight: float) -> None:
    """What routers and the MTP modules count in this step, and which it is. balance_weight: alpha / micro-batches."""
    for chunk in chunks:
        chunk.mtp_weight, chunk.step = plan.mtp_weight, plan.step
        for router in chunk.routers().values():
            router.balance_weight = balance_weight


class StepTotal(NamedTuple):
    """What all calls and ranks of a step learn together: what its sums are divided by."""

    rows: int
    """Sequences of tokens."""
    targets: int | None
    """Learnt tokens; None where all are learnt."""
    samples: int
    """Samples, or sequences where those are not told apart."""


@dataclass(frozen=True)
class StepOutcome:
    """What a step came to. Without an applied update the weights and biases are those before it."""

    measured: MeasuredStep
    update: Update
    scores_LH: Tensor
    """Largest attention score of every head of this rank's layers, as `QKClip.largest` gives them; none where nobody asks for them."""


class Engine:
    """Makes the steps of one rank; every rank makes the same ones."""

    def __init__(self, config: Config, parts: ParallelModel, rank: RankSetup, live: "LiveModel | None" = None):
        """live: what is saved, loaded, handed out and written with; None for a caller that does none of it."""
        self._live = live
        self._config, self._parts, self._device = config, parts, rank.device
        self.mesh = rank.mesh
        """This rank among the others: `dp_rank` says which share of a batch is its own."""
        self._layout, self._schedules = rank.mesh.layout, Schedules(config)
        self.step = 0
        """Steps that are made, set by whoever goes on from others: which part of the recipe's schedules the next one has."""
        self._sequences = config.micro_batch_size * rank.mesh.layout.dp
        """Sequences of one micro-batch of every data-parallel rank."""
        self._mean_micro_batches = 0.0
        """Mean micro-batches of a data-parallel rank in this step: what losses are divided by, so that all tokens of
        the batch weigh the same where shares differ (parallel.uneven)."""
        self._open: ExitStack | None = None
        """What ends with the last call of the step that is under way; None between steps."""
        self._is_reduced = False
        """The last call of a step is made."""
        self._moves_biases = True
        self.has_failed = False
        """A call has failed while it computed, so that other ranks may wait for this one."""
        self._reduce_ahead = parts.pipeline.on_chunk_end
        self.on_phase: Callable[[str], None] = lambda ended: None
        """Called at the ends of `schedule` (forward and backward), `reduction` and `update`."""
        self.clip = self._watch_scores(config.optim.qk_clip, parts, rank.mesh)
        self.measure = Measure(config.model, parts, rank, self.clip)
        self._moe_layers = sum(not name.startswith("mtp") for name in moe_layers(config.model))

    # A loop of anyone's

    def forward_backward(
        self,
        batch: Batch,
        loss: str | TokenLoss = "cross_entropy",
        *,
        last: bool = True,
        total: StepTotal | None = None,
        terms: Collection[str] | None = None,
        **settings: float,
    ) -> None:
        """Add the gradients of a loss over this rank's share of a batch to those of the step.

        loss: a name of `TOKEN_LOSSES`, or a function as of train/model/token_losses.py or its import path; settings: its further arguments. last: the last
        call of the step, with which gradients are reduced. total: what all calls of the step learn, of `count`; needed where there are
        several, as sums over tokens are divided by it. None: this call is the whole step. terms: of `TERMS`; None for all, but of a batch
        with replayed experts, whose loads are no choice of the routers, without `biases`. Raises UserError.
        """
        token_loss = self._find_loss(loss, batch, settings)
        chosen = self._terms(terms, batch)
        batch = self._checked(batch)
        if self.clip is not None and batch.supervised_BS is not None:
            rule = "counts the scores of all positions, also of filling, and this batch has some"
            raise UserError("optim.qk_clip", self._config.optim.qk_clip, rule, "leave it out")
        if total is None and not (last and self._open is None):
            rule = "must be given where a step has several calls: what their sums are divided by"
            raise UserError("total", None, rule, "give `engine.count(batches)` of all batches of the step to each call")
        total = total or self.count([batch])
        if total.targets == 0:
            rule = "must mark a learnt token on some rank"
            raise UserError("batch.supervised_BS", f"{total.rows} sequences", rule, "leave the step out")
        plan = self._schedules.plan(min(self.step + 1, self._config.steps))
        if "mtp" not in chosen:
            plan = replace(plan, mtp_weight=0.0)
        self._moves_biases = "biases" in chosen
        self._pass(plan, batch, total, last, token_loss, "balance" in chosen)

    def update(self, step: int | None = None, *, lr: float | None = None) -> StepOutcome:
        """Clip and apply the gradients of the step, as number `step` of the recipe's schedules; None for the next. Nothing is applied
        where loss or gradient is not finite. lr: instead of the schedule's. Raises UserError.
        """
        number = self.step + 1 if step is None else step
        if not 1 <= number <= self._config.steps:
            rule = f"must be a step of the recipe, 1 to {self._config.steps}"
            raise UserError("step", number, rule, "set steps= to more")
        if not self._is_reduced:
            rule = "needs gradients, and no forward_backward with last=True came before"
            raise UserError("update", number, rule, "call forward_backward with last=True first")
        plan = self._schedules.plan(number)
        return self._update(plan if lr is None else replace(plan, lr=lr))

    def discard(self) -> None:
        """Forget the gradients of the step."""
        if self._open is not None:
            self._close()
        if self._is_reduced:
            self._is_reduced = False
            self._parts.zero.step(valid=False)

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> Tensor:
        """log p(token | those before it) of every token of this rank's share, fp32 (B, S) on the host, alike on all ranks that have this
        share; 0 for the first of a sequence. The logits are divided by the tensor `temperatures`, if the batch has it; nothing is
        cut off. Changes nothing: routers count nothing, and adapters drop nothing. Raises UserError.
        """
        batch, head = self._checked(batch), self.measure.last
        wanted = {name: tensor for name, tensor in batch.tensors.items() if name == "temperatures"}
        if head is not None:
            head.head.gives_logprobs = True
        try:
            found = self._parts.pipeline.forward(**self._inputs(replace(batch, tensors=wanted)))
        finally:
            if head is not None:
                head.head.gives_logprobs = False
        values_BT = torch.zeros(len(batch.tokens_BS), batch.tokens_BS.size(1) - 1, device=self._device)
        if found:
            torch.cat(found, out=values_BT)
        if self._layout.pp > 1:  # those of the last stage, and zeros
            dist.all_reduce(values_BT, group=self.mesh.stages_group)
        return torch.nn.functional.pad(values_BT, (1, 0)).cpu()

    def count(self, batches: Sequence[Batch], rows: int | None = None) -> StepTotal:
        """What the batches of all ranks learn together. Collective over all ranks, except where rows, their sequences over all ranks, are
        known and every token is learnt.
        """
        if rows is not None and all(batch.supervised_BS is None for batch in batches):
            return StepTotal(rows, None, rows)
        totals = torch.tensor(_counts(batches), dtype=torch.int64, device=self._device)
        if self._layout.world > 1:
            dist.all_reduce(totals)
        alike = self._layout.pp * self._layout.cp  # ranks that have the same share
        found = _total((totals // alike).tolist())
        return found if rows is None else found._replace(rows=rows)

    def save(self, folder: Path) -> Path:
        """Write a checkpoint of the last step into a folder of checkpoints, and wait until it is whole; returns its path,
        FOLDER/step_00000012. Training goes on from it in any layout, and every mode reads it. Raises DiskFailed.
        """
        return self._between_steps("save").save(folder, self.step)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of any layout: weights, optimizer's state, balance biases and the number of the step. Raises UserError
        where it is damaged or of another model.
        """
        self.step = self._between_steps("load").load(path)

    def weights(
        self, *, merged: bool = True, stacked: bool = False, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face's names and tensors, in the order of a folder, alike on all ranks. Collective: every rank takes all of them, and a
        tensor lives until the next. Balance biases are among them, fp32. merged: of an adapter's run, added to the base; else the
        adapter alone, under PEFT's names. stacked: experts of a layer as one tensor. dtype: None for that of the recipe. Raises UserError.
        """
        return self._between_steps("weights").weights(merged=merged, stacked=stacked, dtype=dtype)

    def fill(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take weights and balance biases under Hugging Face's names, as `weights` of another engine gives them: for a sampler of one
        process beside a session. The optimizer's state stays. Raises UserError for a name or shape that the model does not have.
        """
        self._between_steps("fill").fill(weights)

    def generate(
        self,
        prompts: list[list[int]],
        *,
        tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        end_ids: Collection[int] = (),
        seed: int = 1,
    ) -> "list[DrawnText]":
        """What the live model writes behind prompts of any lengths, token ids, in one batch; of one process, with its weights whole. At most
        so many tokens each, and none behind an end token. Row i draws from seed + i. Raises UserError.
        """
        how = {"temperature": temperature, "top_p": top_p, "end_ids": end_ids, "seed": seed}
        return self._between_steps("generate").generate(prompts, tokens=tokens, **how)

    # The trainer's loop

    def run(
        self,
        plan: StepPlan,
        batch: Batch,
        *,
        stopping: StopKind = StopKind.none,
        on_phase: Callable[[str], None] = lambda _: None,
    ) -> StepOutcome:
        """A whole step by the recipe's own loss. batch: this rank's share. stopping: how this rank was asked to stop, which all ranks then
        know. on_phase: see there.
        """
        self.on_phase, self._moves_biases = on_phase, True
        self._pass(plan, batch, self.count([batch], plan.batch_size), stopping=stopping)
        return self._update(plan)

    def run_passes(self, batch: Batch) -> None:
        """Forward and backward of all micro-batches."""
        self._parts.pipeline.step(**self._inputs(batch), mean=self._mean_micro_batches)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what the passes took is part of what all ranks are told

    # Parts of a step

    def _pass(
        self,
        plan: StepPlan,
        batch: Batch,
        total: StepTotal,
        last: bool = True,
        token_loss: TokenLoss | None = None,
        with_balance: bool = True,
        stopping: StopKind = StopKind.none,
    ) -> None:
        with self._accumulating(plan):
            self._set_weights(plan, batch, total, with_balance)
            if self.measure.last is not None:
                self.measure.last.head.token_loss = token_loss
            self._parts.pipeline.on_chunk_end = self._reduce_ahead if last else _nothing
            self.run_passes(batch)
            if last:
                self._parts.precision.end_passes()
                self.on_phase("schedule")
                self._collected = self.measure.collect(stopping)
                if self.clip is not None:
                    self._parts.zero.scale_rows(self.clip.factors(self._collected.scores_LH))
        if last:
            self._close()
            self.on_phase("reduction")

    @contextmanager
    def _accumulating(self, plan: StepPlan) -> Iterator[None]:
        """A call of the step that is under way, or of a new one. An error in it ends the step."""
        if self._is_reduced:
            rule = "came after the last call of a step, and update or discard did not"
            raise UserError("forward_backward", "another call", rule, "call update, or give last=False before it")
        opened, self._open = self._open, None
        with opened or ExitStack() as step:
            if opened is None:
                step.enter_context(self._parts.zero.accumulate())
                step.callback(self._parts.precision.end_passes)
                self.measure.clear()
                self._parts.precision.start_step(plan.step, self._config.holds_weights)
            try:
                yield
            except Exception as error:  # torch wraps what fails in a pipeline
                self.has_failed = True
                if refused := next((one for one in causes(error) if isinstance(one, UserError)), None):
                    raise refused from None
                raise
            self._open = step.pop_all()

    def _close(self) -> None:
        """Reduce the gradients."""
        assert self._open is not None
        opened, self._open = self._open, None
        opened.close()
        self._is_reduced = True

    def _update(self, plan: StepPlan) -> StepOutcome:
        self._is_reduced, collected, zero = False, self._collected, self._parts.zero
        zero.set_lr(plan.lr)
        update = zero.step(collected.finite)
        measured = collected.read()  # the update has waited for the norm of the gradients
        self.on_phase("update")
        if update.applied and self._moves_biases:
            self._update_biases(collected.loads_LE, plan)
        self.step = plan.step
        return StepOutcome(measured, update, collected.scores_LH)

    def _watch_scores(self, limit: float | None, parts: ParallelModel, mesh: Mesh) -> QKClip | None:
        if limit is None:
            return None

        def most(scores: Tensor) -> None:
            if mesh.layout.stage_ranks > 1:
                dist.all_reduce(scores, dist.ReduceOp.MAX, group=mesh.stage_group)

        return QKClip(parts.chunks, self._config.model, limit, most)

    def _inputs(self, batch: Batch) -> dict:
        """What the pipeline takes of a batch; tensors per token where the head is, experts everywhere."""
        more = {} if self.measure.last is None else dict(batch.tensors)
        if batch.experts_BTLK is not None:
            more["experts_BTLK"] = batch.experts_BTLK
        return {
            "tokens_BS": to_device(batch.tokens_BS, self._device),
            "documents_BS": batch.documents_BS,
            "supervised_BS": batch.supervised_BS,
            "micro_batches": self._micro_batches(batch),
            **{name: to_device(tensor, self._device) for name, tensor in more.items()},
        }

    def _micro_batches(self, batch: Batch) -> int:
        return len(batch.tokens_BS) // self._config.micro_batch_size

    def _set_weights(self, plan: StepPlan, batch: Batch, total: StepTotal, with_balance: bool = True) -> None:
        self._mean_micro_batches = self.measure.micro_batches = total.rows / self._sequences
        balance_weight = self._config.optim.balance_loss * self._sequences / total.samples
        set_weights(self._parts.chunks, plan, balance_weight if with_balance else 0.0)
        for chunk in self._parts.chunks:
            chunk.loss_divisor = None
            if total.targets is not None:
                chunk.loss_divisor = total.targets / (self._layout.stage_ranks * self._mean_micro_batches)

    def _update_biases(self, loads_LE: Tensor, plan: StepPlan) -> None:
        for name, router in self.measure.routers.items():
            update_bias(router.bias_E, loads_LE[self.measure.layers.index(name)], plan.bias_speed)

    def _between_steps(self, method: str) -> "LiveModel":
        """Raises UserError inside a step, as gradients are no part of what is saved or handed out."""
        assert self._live is not None, "this engine was made for steps alone"
        if self._open is not None or self._is_reduced:
            raise UserError(method, "in a step", "comes between steps", "call update or discard before it")
        return self._live

    # What a caller gives

    def _find_loss(self, loss: str | TokenLoss, batch: Batch, settings: Mapping[str, float]) -> TokenLoss | None:
        """None for the cross-entropy that the head computes in one piece. Raises UserError."""
        if isinstance(loss, str):
            if loss not in TOKEN_LOSSES and "." not in loss:
                known = ", ".join(TOKEN_LOSSES)
                raise UserError("loss", loss, f"must be one of {known}, or the import path of a function", "correct it")
            loss = import_target("loss", {TARGET: loss}) if "." in loss else TOKEN_LOSSES[loss]
        if missing := [name for name in NEEDED_TENSORS.get(loss, ()) if name not in batch.tensors]:
            rule = f"must be among the batch's tensors for {loss.__name__}: {', '.join(NEEDED_TENSORS[loss])}"
            raise UserError("batch.tensors", missing[0], rule, "add it to the batch")
        if loss is negative_logprob and not batch.tensors:
            return None
        return partial(loss, **settings) if settings else loss

    def _terms(self, terms: Collection[str] | None, batch: Batch) -> Collection[str]:
        if terms is None:
            return TERMS if batch.experts_BTLK is None else TERMS[:-1]
        if unknown := [term for term in terms if term not in TERMS]:
            raise UserError("terms", unknown[0], f"must be of {', '.join(TERMS)}", "correct it")
        if "biases" in terms and batch.experts_BTLK is not None:
            rule = "follow loads that the routers chose, and the experts of this batch are replayed"
            raise UserError("terms", "biases", rule, "leave out one of the two")
        return terms

    def check(self, batch: Batch, micro_batches: int) -> None:
        """Raise UserError where this layout cannot take a batch, of one rank or of all. micro_batches: of a rank."""
        tokens_BS, config = batch.tokens_BS, self._config
        (rows, length), cp = tokens_BS.shape, self._layout.cp
        if (length - 1) % (2 * cp if cp > 1 else 1) or length < 2:
            rule = f"must have one token more than a multiple of {2 * cp if cp > 1 else 1} positions, which {cp} ranks share"
            raise UserError("batch.tokens_BS", f"{length} tokens", rule, "fill the sequences up, with document -1")
        if rows % config.micro_batch_size or not rows:
            rule = f"must be a multiple of micro_batch_size={config.micro_batch_size} on every data-parallel rank"
            raise UserError("batch.tokens_BS", f"{rows} sequences", rule, "fill up with sequences of document -1")
        parallel = config.parallel
        check_schedule(parallel.schedule, parallel.pp, micro_batches, config.model.layers, parallel.virtual_stages)
        vocabulary = config.model.vocab_size
        if wrong := tokens_BS[(tokens_BS < 0) | (tokens_BS >= vocabulary)].tolist():
            raise UserError(
                "batch.tokens_BS", wrong[0], f"must be token ids, 0 to {vocabulary - 1}", "use this model's tokenizer"
            )
        given = {"documents_BS": batch.documents_BS, "supervised_BS": batch.supervised_BS, **batch.tensors}
        for name, tensor in given.items():
            if tensor is not None and tensor.shape != tokens_BS.shape:
                rule = f"must have one value a token: {tuple(tokens_BS.shape)}"
                raise UserError(f"batch.{name}", tuple(tensor.shape), rule, "fill it up as the tokens are")
        if batch.experts_BTLK is not None:
            self._experts(batch)

    def _checked(self, batch: Batch) -> Batch:
        """The batch, complete. Raises UserError."""
        self.check(batch, self._micro_batches(batch))
        batch = _completed(batch)
        return batch if batch.experts_BTLK is None else replace(batch, experts_BTLK=self._experts(batch))

    def _experts(self, batch: Batch) -> Tensor:
        """Replayed experts (B, T, L, K), with any that are allowed where a position does not count: of filling, and the last of each sample. Raises
        UserError.
        """
        ids, model = batch.experts_BTLK, self._config.model
        assert ids is not None
        rows, length = batch.tokens_BS.shape
        wanted = (rows, length - 1, self._moe_layers, model.top_k)
        if ids.shape != wanted:
            rule = f"must be {wanted}: sequences, tokens but the last, MoE layers of the main model, experts of a token"
            raise UserError("batch.experts_BTLK", tuple(ids.shape), rule, "give them as mode=score writes them")
        ids = ids.long()
        if batch.documents_BS is not None:
            here, following = batch.documents_BS[:, :-1], batch.documents_BS[:, 1:]
            counts = (here >= 0) & ((here == following) | (batch.supervised_BS is None))
            ids = ids.where(counts[..., None, None], torch.arange(model.top_k))
        ordered = ids.sort(-1).values
        good = (ordered[..., 0] >= 0) & (ordered[..., -1] < model.experts)
        good &= (ordered.diff(dim=-1) > 0).all(-1)
        rule = f"must be {model.top_k} different experts, 0 to {model.experts - 1}"
        if model.top_groups < model.groups:
            group = ordered // (model.experts // model.groups)
            good &= (group.diff(dim=-1) > 0).sum(-1) < model.top_groups
            rule += f", of at most {model.top_groups} of {model.groups} groups"
        if not good.all():
            row, token, layer = (~good).nonzero()[0].tolist()
            value = f"{ids[row, token, layer].tolist()} (sequence {row}, token {token}, MoE layer {layer})"
            raise UserError("batch.experts_BTLK", value, rule, "replay what an engine of this model chose")
        return ids


def total_of(batches: Sequence[Batch]) -> StepTotal:
    """What these batches, of all ranks, learn together."""
    return _total(_counts(batches))


def _counts(batches: Sequence[Batch]) -> list[int]:
    """Rows, learnt tokens, samples, and batches in which tokens are marked as learnt."""
    whole = [_completed(batch) for batch in batches]
    marked = sum(batch.supervised_BS is not None for batch in whole)
    return [
        sum(len(batch.tokens_BS) for batch in whole),
        sum(b.targets for b in whole),
        sum(b.sequences for b in whole),
        marked,
    ]


def _total(counts: list[int]) -> StepTotal:
    rows, targets, samples, marked = counts
    return StepTotal(rows, targets if marked else None, samples)


def _completed(batch: Batch) -> Batch:
    """With documents where tokens are marked as learnt: one sample a sequence."""
    if batch.supervised_BS is None or batch.documents_BS is not None:
        return batch
    return replace(batch, documents_BS=torch.zeros(batch.tokens_BS.shape, dtype=torch.int32))


def _nothing(chunk: int) -> None:
    """No gradients are whole before the last call of a step."""
