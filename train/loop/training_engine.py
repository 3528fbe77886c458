"""Implements the engine of one rank: the operations that a training loop needs, in any layout.

    forward_backward    adds the gradients of a loss over a batch to the gradients so far
    update              clips and applies the gradients if loss and gradients are finite; adjusts the router biases by
                        the step's tokens per expert (paper 2.1.2)
    discard             deletes the gradients
    logprobs            computes log-probabilities of given tokens
    save, load          write and read checkpoints of any layout
    generate            generates text with the live model, in one process
    weights, fill       read and replace the weights under Hugging Face's names

All ranks make the same calls in the same order. Each data-parallel rank passes a different share of the batch. Its
pipeline and context-parallel ranks pass the same share. A step has these parts, in this order:

    weights     sets the weights of the loss terms and router losses
    passes      runs forward and backward of all micro-batches
    measures    sums losses, tokens per expert and times over all ranks
    reduction   reduces the gradients: for ZeRO 1 and 2 in the step's last call, for ZeRO 3 in every backward
    update      updates the weights with the optimizer
    balance     adjusts the router biases
"""

import inspect
import math
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
from train.data.batch import Batch, check_given_batch, require_mask
from train.loop.measure import Measure, MeasuredStep, to_device
from train.loop.stop import StopKind
from train.model.count import indexer_layers, moe_layers
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
"""Optional parts of a step: MTP's losses, the balance loss, and the adjustment of router biases."""


def set_weights(chunks: Sequence[DeepSeekV3], plan: StepPlan, balance_weight: float, index_weight: float) -> None:
    """Set the chunks' step index, and the weights of the MTP, balance and indexer losses."""
    for chunk in chunks:
        chunk.mtp_weight, chunk.step, chunk.index_weight = plan.mtp_weight, plan.step, index_weight
        for router in chunk.routers().values():
            router.balance_weight = balance_weight


class StepTotal(NamedTuple):
    """Counts of a step over all ranks, by which loss sums are divided."""

    rows: int
    """Number of token sequences."""
    targets: int | None
    """Number of learnt tokens; None if all are learnt."""
    samples: int
    """Number of samples. Without marked samples, each sequence counts as one."""


@dataclass(frozen=True)
class StepOutcome:
    """Results of a step, which may have skipped its update."""

    measured: MeasuredStep
    update: Update
    scores_LH: Tensor
    """Largest attention score of every local head; empty without optim.qk_clip."""


class Engine:
    """Runs the steps of one rank, the same on all ranks."""

    def __init__(self, config: Config, parts: ParallelModel, rank: RankSetup, live: "LiveModel | None" = None):
        """live: implements `save`, `load`, `weights`, `fill` and `generate`, or None."""
        self._live = live
        self._config, self._parts, self._device = config, parts, rank.device
        self.mesh = rank.mesh
        """This rank's position in the layout. Its field `dp_rank` determines the rank's share of a batch."""
        self._layout, self._schedules = rank.mesh.layout, Schedules(config)
        self.step = 0
        """Number of completed steps. The next step uses the recipe's schedules at `step` + 1. Set it to resume a run.
        """
        self._sequences = config.micro_batch_size * rank.mesh.layout.dp
        """Number of sequences in one micro-batch, summed over the data-parallel ranks."""
        self._mean_micro_batches = 0.0
        """Losses are divided by this number: the mean number of micro-batches per data-parallel rank."""
        self._open: ExitStack | None = None
        """Exit stack with the context managers of an open step; None if no step is open."""
        self._is_reduced = False
        """Whether the step's gradients are reduced, ready for `update` or `discard`."""
        self._moves_biases = True
        self.has_failed = False
        """Whether a call failed; other ranks may wait for this rank."""
        self._reduce_ahead = parts.pipeline.on_chunk_end
        self.on_phase: Callable[[str], None] = lambda ended: None
        """Called with the phase's name at the end of the phases `schedule`, `reduction` and `update`."""
        self.clip = self._watch_scores(config.optim.qk_clip, parts, rank.mesh)
        self.measure = Measure(config.model, parts, rank, self.clip)
        self._moe_layers = sum(not name.startswith("mtp") for name in moe_layers(config.model))

    # Methods for custom loops

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
        """Add the gradients of a loss over this rank's share of a batch to the step's gradients. Raises UserError.

        - loss: name in `TOKEN_LOSSES`, function as in train/model/token_losses.py, or its import path
        - settings: further arguments of the loss
        - last: whether this is the step's last call, which reduces the gradients
        - total: result of `count` for all batches of the step, by which sums are divided; may be None if the step has a
          single call
        - terms: parts of `TERMS` to use; None: all parts, but without `biases` if experts are replayed
        """
        batch = self._checked(batch)
        require_mask(batch)
        token_loss = self._find_loss(loss, batch, settings)
        chosen = self._terms(terms, batch)
        if (length := batch.tokens_BS.size(1)) < (least := self._config.model.mtp_depth + 2):
            rule = f"must be {least} or more: {self._config.model.mtp_depth} MTP modules predict later tokens"
            raise UserError("batch.tokens_BS", f"{length} tokens", rule, "pad the sequences, with document -1")
        if self.clip is not None and batch.supervised_BS is not None:
            rule = "uses the scores of all positions, including padding, and this batch has padding"
            raise UserError("optim.qk_clip", self._config.optim.qk_clip, rule, "leave it out")
        if total is None and not (last and self._open is None):
            rule = "must be given in a step with several calls: it is the divisor of their sums"
            raise UserError("total", None, rule, "pass `engine.count(batches)` of all batches of the step to each call")
        total = total or self.count([batch])
        if total.targets == 0:
            rule = "must mark a learnt token on some rank"
            raise UserError("batch.supervised_BS", f"{total.rows} sequences", rule, "leave the step out")
        plan = self._schedules.plan(min(self.step + 1, self._config.steps))
        if "mtp" not in chosen:
            plan = replace(plan, mtp_weight=0.0)
        self._moves_biases = "biases" in chosen and (self._open is None or self._moves_biases)
        self._pass(plan, batch, total, last, token_loss, "balance" in chosen)

    def update(self, step: int | None = None, *, lr: float | None = None) -> StepOutcome:
        """Clip and apply the gradients of the step. If the loss or a gradient is not finite, the weights stay
        unchanged. Raises UserError.

        step: index in the recipe's schedules; None: the next step. lr: replaces the schedule's learning rate.
        """
        number = self.step + 1 if step is None else step
        if not 1 <= number <= self._config.steps:
            rule = f"must be a step of the recipe, 1 to {self._config.steps}"
            raise UserError("step", number, rule, "set steps= to more")
        if not self._is_reduced:
            rule = "needs gradients from a forward_backward with last=True"
            raise UserError("update", number, rule, "call forward_backward with last=True first")
        if lr is not None and not 0 <= lr < math.inf:
            raise UserError("lr", lr, "must be a number of 0 or more", "correct it")
        plan = self._schedules.plan(number)
        return self._update(plan if lr is None else replace(plan, lr=lr))

    def discard(self) -> None:
        """Delete the gradients of the step."""
        if self._open is not None:
            self._close()
        if self._is_reduced:
            self._is_reduced = False
            self._parts.zero.step(valid=False)

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> Tensor:
        """Returns log p(token | earlier tokens) of this rank's share: fp32 (B, S) on the host. Raises UserError.

        The value of a sequence's first token is 0. The batch's `temperatures` divide the logits. Top-p is not applied.
        Routers do not count tokens, and adapters do not use dropout.
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
        if self._layout.pp > 1:  # the last stage has the values, and other stages have zeros
            dist.all_reduce(values_BT, group=self.mesh.stages_group)
        return torch.nn.functional.pad(values_BT, (1, 0)).cpu()

    def count(self, batches: Sequence[Batch], rows: int | None = None) -> StepTotal:
        """Counts learnt tokens, sequences and samples in the batches of all ranks.

        rows: number of sequences over all ranks, if known. The call is collective, unless `rows` is given and every
        token is learnt. Raises UserError if ranks have different numbers of sequences, unless parallel.uneven is set.
        """
        if rows is not None and all(batch.supervised_BS is None for batch in batches):
            return StepTotal(rows, None, rows)
        counts, world = _counts(batches), self._layout.world
        totals = torch.tensor([*counts, counts[0] ** 2], dtype=torch.int64, device=self._device)
        if world > 1:
            dist.all_reduce(totals)
        *totals, squares = totals.tolist()
        if world * squares != totals[0] ** 2 and not self._config.parallel.uneven:
            rule = "must be as many on every data-parallel rank, and some rank has others"
            cure = "fill up with sequences of document -1, or set parallel.uneven=true"
            raise UserError("batch.tokens_BS", f"{counts[0]} sequences on this rank", rule, cure)
        alike = self._layout.pp * self._layout.cp  # number of ranks that pass the same share
        found = _total([count // alike for count in totals])
        return found if rows is None else found._replace(rows=rows)

    def save(self, folder: Path) -> Path:
        """Write a checkpoint of the last step, and wait for it. Returns its path, such as FOLDER/step_00000012.

        Any layout and every mode can read the checkpoint. Raises DiskFailed.
        """
        return self._between_steps("save").save(folder, self.step)

    def load(self, path: Path) -> None:
        """Load weights, optimizer state, balance biases and the step count from a checkpoint of any layout.

        Raises UserError if the checkpoint is damaged or belongs to another model.
        """
        self.step = self._between_steps("load").load(path)

    def weights(
        self, *, merged: bool = True, stacked: bool = False, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields tensors under Hugging Face's names, in the order of a Hugging Face folder. Raises UserError.

        Collective: every rank must read all tensors, and gets the same tensors. A tensor is valid until the caller
        reads the next one. Balance biases are included, in fp32.

        - merged: add the adapter to the base weights; otherwise yield only the adapter, under PEFT's names
        - stacked: yield a layer's experts as one tensor
        - dtype: None for the recipe's dtype
        """
        return self._between_steps("weights").weights(merged=merged, stacked=stacked, dtype=dtype)

    def fill(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace weights and balance biases. The optimizer's state does not change.

        weights: pairs of Hugging Face name and tensor, such as a result of `Session.weights`. Raises UserError for an
        unknown name or a wrong shape.
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
        """Returns completions of prompts by the live model, in an engine of one process. Raises UserError.

        - prompts: lists of token ids, of any lengths
        - tokens: maximum number of new tokens for each prompt
        - end_ids: tokens that end a completion
        - seed: row i uses the random seed `seed` + i
        """
        how = {"temperature": temperature, "top_p": top_p, "end_ids": end_ids, "seed": seed}
        return self._between_steps("generate").generate(prompts, tokens=tokens, **how)

    # Methods for the trainer

    def run(
        self,
        plan: StepPlan,
        batch: Batch,
        *,
        stopping: StopKind = StopKind.none,
        on_phase: Callable[[str], None] = lambda _: None,
    ) -> StepOutcome:
        """Run a whole step with the recipe's loss.

        - batch: this rank's share
        - stopping: how this rank was asked to stop; the engine sends this to all ranks
        - on_phase: new value of the field `on_phase`
        """
        self.on_phase, self._moves_biases = on_phase, True
        self._pass(plan, batch, self.count([batch], plan.batch_size), stopping=stopping)
        return self._update(plan)

    def run_passes(self, batch: Batch) -> None:
        """Run forward and backward of all micro-batches."""
        self._parts.pipeline.step(**self._inputs(batch), mean=self._mean_micro_batches)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the measurements of all ranks include the time of the passes

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
        """Returns a context manager for one `forward_backward`. An error ends the step."""
        if self._is_reduced:
            rule = "was called after the last call of a step, without update or discard"
            raise UserError(
                "forward_backward", "another call", rule, "call update, or pass last=False in the previous call"
            )
        opened, self._open = self._open, None
        with opened or ExitStack() as step:
            if opened is None:
                step.enter_context(self._parts.zero.accumulate())
                step.callback(self._parts.precision.end_passes)
                self.measure.clear()
                self._parts.precision.start_step(plan.step, self._config.holds_weights)
            try:
                yield
            except Exception as error:  # torch wraps errors in a pipeline
                self.has_failed = True
                if refused := next((one for one in causes(error) if isinstance(one, UserError)), None):
                    raise refused from None
                raise
            self._open = step.pop_all()

    def _close(self) -> None:
        """Reduce the gradients and exit the step's context managers."""
        assert self._open is not None
        opened, self._open = self._open, None
        opened.close()
        self._is_reduced = True

    def _update(self, plan: StepPlan) -> StepOutcome:
        self._is_reduced, collected, zero = False, self._collected, self._parts.zero
        zero.set_lr(plan.lr)
        update = zero.step(collected.finite)
        measured = collected.read()  # does not wait: the update has already waited
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
        """Returns the pipeline's inputs.

        Every rank gets replayed experts and keys. Only the rank with the output head gets the other tensors per token.
        """
        more = {} if self.measure.last is None else dict(batch.tensors)
        if batch.experts_BTLK is not None:
            more["experts_BTLK"] = batch.experts_BTLK
        return {
            "tokens_BS": to_device(batch.tokens_BS, self._device),
            "documents_BS": batch.documents_BS,
            "supervised_BS": batch.supervised_BS,
            "micro_batches": self._micro_batches(batch),
            **({} if batch.keys_BTLK is None else {"keys_BTLK": batch.keys_BTLK}),
            **{name: to_device(tensor, self._device) for name, tensor in more.items()},
        }

    def _micro_batches(self, batch: Batch) -> int:
        return len(batch.tokens_BS) // self._config.micro_batch_size

    def _set_weights(self, plan: StepPlan, batch: Batch, total: StepTotal, with_balance: bool = True) -> None:
        self._mean_micro_batches = self.measure.micro_batches = total.rows / self._sequences
        balance_weight = self._config.optim.balance_loss * self._sequences / total.samples
        index_weight = 0.0 if self._config.adapter.on else self._config.optim.index_loss / self._mean_micro_batches
        set_weights(self._parts.chunks, plan, balance_weight if with_balance else 0.0, index_weight)
        for chunk in self._parts.chunks:
            chunk.loss_divisor = None
            if total.targets is not None:
                chunk.loss_divisor = total.targets / (self._layout.stage_ranks * self._mean_micro_batches)

    def _update_biases(self, loads_LE: Tensor, plan: StepPlan) -> None:
        for name, router in self.measure.routers.items():
            update_bias(router.bias_E, loads_LE[self.measure.layers.index(name)], plan.bias_speed)

    def _between_steps(self, method: str) -> "LiveModel":
        """Returns the live model. Raises UserError inside a step."""
        assert self._live is not None, "this engine only supports whole steps"
        if self._open is not None or self._is_reduced:
            raise UserError(method, "in a step", "must be called between steps", "call update or discard before it")
        return self._live

    # Checks of a caller's arguments

    def _find_loss(self, loss: str | TokenLoss, batch: Batch, settings: Mapping[str, float]) -> TokenLoss | None:
        """Returns the loss function; None for cross-entropy. Raises UserError."""
        if isinstance(loss, str):
            if loss not in TOKEN_LOSSES and "." not in loss:
                known = ", ".join(TOKEN_LOSSES)
                raise UserError("loss", loss, f"must be one of {known}, or the import path of a function", "correct it")
            loss = import_target("loss", {TARGET: loss}) if "." in loss else TOKEN_LOSSES[loss]
        try:
            inspect.signature(loss).bind(None, None, **settings)
        except (TypeError, ValueError) as error:
            rule = f"must be a function of (logprobs, tokens) and the settings given: {error}"
            raise UserError(
                "loss", getattr(loss, "__name__", loss), rule, "correct the function or its settings"
            ) from None
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
            raise UserError("terms", unknown[0], f"must be some of {', '.join(TERMS)}", "correct it")
        if "biases" in terms and batch.experts_BTLK is not None:
            rule = "need loads that the routers chose, and the experts of this batch are replayed"
            raise UserError("terms", "biases", rule, "omit one of the two")
        return terms

    def check(self, batch: Batch, micro_batches: int) -> Batch:
        """Returns the batch with all fields set. Raises UserError if this layout cannot process it.

        micro_batches: number of micro-batches of each rank.
        """
        config = self._config
        check_given_batch(batch, config.model.vocab_size)
        (rows, length), cp = batch.tokens_BS.shape, self._layout.cp
        if (length - 1) % (2 * cp if cp > 1 else 1) or length < 2:
            rule = f"must have one token more than a multiple of {2 * cp if cp > 1 else 1} positions, which {cp} ranks share"
            raise UserError("batch.tokens_BS", f"{length} tokens", rule, "pad the sequences, with document -1")
        if rows % config.micro_batch_size or not rows:
            rule = f"must be a multiple of micro_batch_size={config.micro_batch_size} on every data-parallel rank"
            raise UserError("batch.tokens_BS", f"{rows} sequences", rule, "fill up with sequences of document -1")
        parallel = config.parallel
        check_schedule(parallel.schedule, parallel.pp, micro_batches, config.model.layers, parallel.virtual_stages)
        batch = _completed(batch)
        experts = None if batch.experts_BTLK is None else self._experts(batch)
        return replace(batch, experts_BTLK=experts, keys_BTLK=None if batch.keys_BTLK is None else self._keys(batch))

    def _checked(self, batch: Batch) -> Batch:
        """Checks this rank's share of a batch and returns it with all fields set. Raises UserError."""
        return self.check(batch, self._micro_batches(batch))

    def _keys(self, batch: Batch) -> Tensor:
        """Checks replayed keys (B, T, L, K) and returns them. Raises UserError.

        A position that `_counting` excludes gets only itself as key.
        """
        keys, model = batch.keys_BTLK, self._config.model
        assert keys is not None
        rows, length = batch.tokens_BS.shape
        wanted = (rows, length - 1, indexer_layers(model), model.sparse.top_k)
        if keys.shape != wanted or not wanted[2]:
            rule = f"must be {wanted}: sequences, tokens but the last, layers of the main model that choose, keys of a token"
            raise UserError("batch.keys_BTLK", tuple(keys.shape), rule, "use the format of mode=score")
        own_T11 = torch.arange(length - 1)[:, None, None]
        first = torch.zeros(rows, length - 1, 1, 1, dtype=torch.long)
        keys = keys.long()
        if batch.documents_BS is not None:
            counts_BT, here = _counting(batch), batch.documents_BS[:, :-1]
            alone = torch.full_like(keys, -1)
            alone[..., 0] = own_T11[..., 0]
            begins = torch.nn.functional.pad(here[:, 1:] != here[:, :-1], (1, 0), value=True)
            first = (begins * torch.arange(length - 1)).cummax(1).values[..., None, None]
            keys = keys.where(counts_BT[..., None, None], alone)
            first = first.where(counts_BT[..., None, None], own_T11)
        ordered = keys.sort(-1, descending=True).values
        wanted_keys = (own_T11 - first + 1).clamp(max=model.sparse.top_k)
        real = torch.arange(model.sparse.top_k) < wanted_keys
        good = ((ordered >= first) & (ordered <= own_T11)) == real
        good[..., 1:] &= (ordered.diff(dim=-1) < 0) | ~real[..., 1:]
        good &= real | (ordered == -1)
        if not good.all():
            row, token, layer = (~good.all(-1)).nonzero()[0].tolist()
            value = f"{keys[row, token, layer].tolist()} (sequence {row}, token {token}, layer {layer} of those that choose)"
            rule = f"must be {model.sparse.top_k} different positions of the token's document up to its own, or all of them and then -1"
            raise UserError("batch.keys_BTLK", value, rule, "replay the keys that an engine of this model chose")
        return keys.int()

    def _experts(self, batch: Batch) -> Tensor:
        """Checks replayed experts (B, T, L, K) and returns them. Raises UserError."""
        ids, model = batch.experts_BTLK, self._config.model
        assert ids is not None
        rows, length = batch.tokens_BS.shape
        wanted = (rows, length - 1, self._moe_layers, model.top_k)
        if ids.shape != wanted:
            rule = (
                f"must be {wanted}: sequences, tokens without the last, MoE layers of the main model, experts per token"
            )
            raise UserError("batch.experts_BTLK", tuple(ids.shape), rule, "use the format of mode=score")
        ids = ids.long()
        if batch.documents_BS is not None:
            ids = ids.where(_counting(batch)[..., None, None], torch.arange(model.top_k))
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
            raise UserError("batch.experts_BTLK", value, rule, "replay the experts that an engine of this model chose")
        return ids


def total_of(batches: Sequence[Batch]) -> StepTotal:
    """Returns counts of learnt tokens, sequences and samples in the batches of all ranks."""
    return _total(_counts(batches))


def _counts(batches: Sequence[Batch]) -> list[int]:
    """Returns counts of sequences, learnt tokens, samples, and batches with a mask of supervised tokens."""
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


def _counting(batch: Batch) -> Tensor:
    """Returns a mask, bool (B, T): whether the loss depends on the replayed experts and keys of a position.

    It is False for padding. With supervised tokens, it is also False for the last position of a sample.
    """
    assert batch.documents_BS is not None
    here, following = batch.documents_BS[:, :-1], batch.documents_BS[:, 1:]
    return (here >= 0) & ((here == following) | (batch.supervised_BS is None))


def _completed(batch: Batch) -> Batch:
    """Returns a batch whose samples are marked. If only supervised tokens are marked, each sequence is one sample."""
    if batch.supervised_BS is None or batch.documents_BS is not None:
        return batch
    return replace(batch, documents_BS=torch.zeros(batch.tokens_BS.shape, dtype=torch.int32))


def _nothing(chunk: int) -> None:
    """A no-op that replaces the gradient reduction in a step's calls of `forward_backward`, except in the last call."""
