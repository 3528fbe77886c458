"""Rules over several fields: `check` raises UserError for the first broken rule."""

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

from conf.dispatches import DISPATCHES
from conf.errors import UserError
from conf.fields import check_fields, wrong_choice
from conf.micro_batches import batch_unit, check_batch
from conf.own_code import check_targets
from conf.pipeline_schedules import SCHEDULES
from conf.schema import (
    CHATS,
    FP8_OPERANDS,
    Adapter,
    AdapterTarget,
    Config,
    DataFormat,
    Fp8Backend,
    Mode,
    Model,
    MuonOptim,
    Offload,
    Recompute,
    ScoreFunction,
    Supervise,
    TooLong,
)

OF_STDLIB = (DataFormat.stdlib, DataFormat.docstrings)
"""Data formats that need no data.path."""
NEEDS_NO_DATA = (Mode.generate, Mode.score, Mode.plan, Mode.dry_run, Mode.prove)
NOT_CHATS, FOR_CHATS = (
    "applies to chats, and this recipe's data are not chats",
    "set data.format=chat, or leave it out",
)
MAX_EXPERTS = 32767
"""Maximum number of experts, because expert ids are int16."""
IN_EVERY_LAYER = (AdapterTarget.q_up, AdapterTarget.kv_up, AdapterTarget.down, AdapterTarget.out)
"""Adapter targets that exist in every block."""
ADDS_ADAPTERS = (Mode.evaluate, Mode.generate, Mode.score, Mode.export)
"""Modes that add the adapter of adapter.path to the weights."""
SMALLEST_SHARE = 1e-6
"""Smallest share of a source in a data mix; train/data/dataset.py treats smaller shares as zero."""
IN_PARTS = next(name for name, facts in SCHEDULES.items() if facts.stages is None)
"""Name of the schedule that reads parallel.virtual_stages."""
OPERAND = re.compile(r"(e4m3|e5m2)/((1x128|128x128|row|tensor)/(fp32|pow2)|1x32/pow2)")


class ConfigCheck(Protocol):
    """Type of a rule. If one condition cannot express a rule, the rule is a function."""

    def __call__(self, config: Config, /) -> None:
        """Raise UserError if the configuration breaks the rule."""


Text = str | Callable[[Config, Any], str]
"""Rule or fix of an error: a function, or a sentence with placeholders such as {v} (the value) or {model.layers}."""


@dataclass(frozen=True)
class JoinedRule:
    """A rule for one key. Its functions get the configuration `c` and the key's value `v`."""

    key: str
    holds: Callable[[Config, Any], Any]
    rule: Text
    cure: Text
    each: bool = False
    """Whether the rule applies to every element of a list."""
    named: str = ""
    """Name of the key in the error, unless it is `key`."""
    shown: Callable[[Config, Any], Any] = lambda c, v: v
    """Converts the value to the form that the error shows."""

    def __call__(self, config: Config) -> None:
        """Raise UserError if the configuration breaks the rule."""
        for error in self.errors(config):
            raise error

    def errors(self, config: Config) -> Iterator[UserError]:
        """Yield an error for every value that breaks the rule."""
        found = attrgetter(self.key)(config)
        for value in found if self.each else (found,):
            if not self.holds(config, value):
                rule, cure = (_written(text, config, value) for text in (self.rule, self.cure))
                yield UserError(self.named or self.key, self.shown(config, value), rule, cure)


def _written(text: Text, config: Config, value: Any) -> str:
    return text.format(**vars(config), v=value) if isinstance(text, str) else text(config, value)


@dataclass(frozen=True)
class ConditionalRules:
    """Rules that apply only to configurations for which the function `so` returns true."""

    so: Callable[[Config], Any]
    rules: Iterable[ConfigCheck]

    def __call__(self, config: Config) -> None:
        """Raise UserError for the first broken rule, if the rules apply to this configuration."""
        if self.so(config):
            hold(self.rules, config)


def hold(rules: Iterable[ConfigCheck], config: Config) -> None:
    """Raise UserError for the first rule that the configuration breaks."""
    for rule in rules:
        rule(config)


def check(config: Config) -> None:
    """Raise UserError for the first rule that the configuration breaks."""
    check_fields(config)
    hold(RULES, config)


def notes_of_typed_keys(config: Config, keys: Collection[str]) -> Iterator[str]:
    """Yield a sentence for every typed key without effect."""
    for error in (error for rule in WHERE_READ if rule.key in keys for error in rule.errors(config)):
        yield f"{error.field} does nothing here: it {error.rule}; {error.cure}"


def check_spread(config: Config) -> None:
    """Check only rules that a change of the layout can break."""
    check_batch(config)  # first, because it is fast and refuses most layouts of a search
    check_fields(config.parallel, "parallel.")
    hold((*OPTIM, *ADAPTERS, *PARALLEL), config)


def check_model(model: Model) -> None:
    """Check only the rules of section model."""
    check_fields(model, "model.")
    hold(MODEL, Config(model=model))


def check_experts(experts: int, ep: int) -> None:
    """Raise UserError unless ep divides the number of experts."""
    if experts % ep:
        near = [size for size in range(1, experts + 1) if experts % size == 0]
        cure = f"set parallel.ep to one of {near}, or model.experts to a multiple of {ep}"
        raise UserError("parallel.ep", ep, f"must divide model.experts = {experts}", cure)
    if experts > MAX_EXPERTS:
        raise UserError("model.experts", experts, f"at most {MAX_EXPERTS} experts per layer", "use fewer experts")


def check_world(pp: int, dp: int, cp: int, world: int, given: str) -> None:
    """Raise UserError unless the layout has exactly `world` ranks. given: source of this number, as text for the
    error."""
    if pp * dp * cp != world:
        raise UserError(
            "parallel.pp x parallel.dp" if cp == 1 else "parallel.pp x parallel.dp x parallel.cp",
            f"{pp} x {dp}" if cp == 1 else f"{pp} x {dp} x {cp}",
            f"must equal {given}",
            f"set parallel.dp={max(1, world // (pp * cp))}, or start {pp * dp * cp} ranks",
        )


def _is_name(c: Config, v: str) -> bool:
    several = c.mode is Mode.report and v.startswith("[") and v.endswith("]")
    names = v[1:-1].split(",") if several else [v]
    return all(re.fullmatch(r"[\w.\-+=,]+(/\d+)?", name.strip()) and name not in (".", "..") for name in names)


def _parts(key: str, parts: Iterable[str]) -> ConfigCheck:
    """Return the rule for model.recompute or model.offload. parts: allowed words besides layer:N."""

    def check_parts(config: Config) -> None:
        words = attrgetter(key)(config)
        for word in words:
            if word not in parts and not re.fullmatch("layer:[1-9][0-9]*", word):
                usual = f"use [{','.join(parts)}], or layer:N for the first N blocks of every stage"
                raise wrong_choice(key, word, [*parts, "layer:N"], usual)
        whole = [word for word in words if word.startswith("layer")]
        if len(whole) > 1:
            raise UserError(key, whole, "limit the number of layers twice", f"keep [{whole[-1]}]")

    return check_parts


def _has_experts(c: Config) -> bool:
    return c.model.dense_layers < c.model.layers or c.model.mtp_depth > 0


def _reachable(model: Model) -> int:
    return model.experts // model.groups * model.top_groups


def _check_operands(config: Config) -> None:
    for name in FP8_OPERANDS:
        value = getattr(config.precision.fp8, name)
        if OPERAND.fullmatch(value) is None:
            rule = "must be FORMAT/GRANULARITY/SCALE: e4m3|e5m2 / 1x128|128x128|row|tensor / fp32|pow2, or e4m3|e5m2 / 1x32 / pow2"
            raise UserError(
                f"precision.fp8.{name}", value, rule, "use e4m3/1x128/fp32, or precision=bf16 for GEMMs in bf16"
            )


def adapted_targets(model: Model) -> list[AdapterTarget]:
    """Return the adapter targets of a model, the output head last."""
    has_experts = _has_experts(Config(model=model))
    lacking = {
        AdapterTarget.routed: not has_experts,
        AdapterTarget.shared: not (has_experts and model.shared_experts),
        AdapterTarget.dense: model.dense_layers == 0,
    }
    return [target for target in AdapterTarget if not lacking.get(target)]


def _mix_share(c: Config, source: Any) -> float:
    return source.weight / sum(each.weight for each in c.data.mix)


def _phases(key: str) -> tuple[ConfigCheck, ...]:
    return (
        JoinedRule(key, lambda c, v: v, "must have at least one phase", "give [{{until: 1.0, value: ...}}]"),
        JoinedRule(
            key,
            lambda c, v: all(a.until < b.until for a, b in itertools.pairwise(v)) and v[-1].until == 1.0,
            "phases must end at rising fractions in (0, 1], the last at 1.0",
            "set until of the last phase to 1.0",
            shown=lambda c, v: [phase.until for phase in v],
        ),
    )


def _pieces(key: str, each: bool = False) -> ConfigCheck:
    """Return the rules for a sequence length. parallel.cp splits the sequence into 2 x cp pieces of equal length.

    key: setting with the sequence length.
    """
    return ConditionalRules(
        lambda c: c.parallel.cp > 1,
        (
            JoinedRule(
                key,
                lambda c, v: v % (2 * c.parallel.cp) == 0,
                lambda c, v: (
                    f"must be a multiple of 2 x parallel.cp = {2 * c.parallel.cp}: each rank that shares a sequence has one "
                    "early and one late piece of it"
                ),
                lambda c, v: (
                    f"set {key} to {max(1, v // (2 * c.parallel.cp)) * 2 * c.parallel.cp}, or choose another parallel.cp"
                ),
                each,
            ),
            JoinedRule(
                key,
                lambda c, v: v // (2 * c.parallel.cp) > c.model.mtp_depth,
                lambda c, v: (
                    f"leaves pieces of {key} / (2 cp) = {v // (2 * c.parallel.cp)} tokens, which must exceed "
                    f"model.mtp_depth = {c.model.mtp_depth}: each MTP module has one position less"
                ),
                f"lower parallel.cp or lengthen {key}",
                each,
                named="parallel.cp",
                shown=lambda c, v: c.parallel.cp,
            ),
            JoinedRule(
                "parallel.cp",
                lambda c, v: c.mode not in (Mode.generate, Mode.score),
                "divides the sequences of a training among ranks, and mode={mode} does not divide sequences",
                "leave parallel.cp out",
            ),
        ),
    )


# The arguments of each rule have this order: key, condition, rule, fix.
# fmt: off
TOP: tuple[ConfigCheck, ...] = (
    JoinedRule("name", _is_name,
               "must be a plain folder name: letters, digits, and . _ - + = ,",
               "choose a plain name; only mode=report accepts a list of names, 'name=[A,B]'"),
    JoinedRule("seq_len", lambda c, v: v <= c.model.max_seq_len,
               "must not exceed model.max_seq_len = {model.max_seq_len}", "shorten seq_len or raise model.max_seq_len"),
    JoinedRule("seq_len", lambda c, v: v > c.model.mtp_depth,
               "must exceed model.mtp_depth = {model.mtp_depth}: each MTP module predicts one token further ahead",
               "lengthen seq_len or lower model.mtp_depth"),
    JoinedRule("init_from", lambda c, v: v is None or c.resume in ("auto", "never"),
               "excludes resume={resume}, which reads the weights from a checkpoint", "set only one of the two"),
    check_batch,
    check_targets,
    JoinedRule("checkpoint.every_memory", lambda c, v: v == 0 or c.cluster.backend == "ray",
               "needs cluster=ray, whose agents store the copies, and cluster.backend is local",
               "add cluster=ray, or leave checkpoint.every_memory at 0"),
    JoinedRule("checkpoint.memory_folder", lambda c, v: v.startswith("/"),
               "must be an absolute path, the same on every node", "use /dev/shm"),
    JoinedRule("checkpoint.weights_every", lambda c, v: v == 0 or (c.checkpoint.every > 0 and v % c.checkpoint.every == 0),
               "must be a multiple of checkpoint.every = {checkpoint.every}: the weights are written from a checkpoint",
               "set a multiple of it, with checkpoint.every above 0, or set 0"),
    JoinedRule("checkpoint.weights_every", lambda c, v: v == 0 or not (c.model.block or c.model.router),
               "writes folders for DeepSeek-V3 only, and this model has custom code", "leave it out"),
    JoinedRule("log.replicas_every", lambda c, v: v == 0 or c.parallel.zero < 3,
               "compares the ranks' copies of weights, and with parallel.zero=3 each weight exists only once", "leave log.replicas_every at 0"),
    JoinedRule("cluster.address", lambda c, v: v is None or c.cluster.backend == "ray",
               "is the address of a Ray cluster, and cluster.backend is local", "add cluster=ray"),
    JoinedRule("profile.steps", lambda c, v: not v or (len(v) == 2 and 1 <= v[0] <= v[1]),
               "must be two step numbers: the first and the last recorded step", "write 'profile.steps=[10,12]'"),
    JoinedRule("profile.steps", lambda c, v: not v or c.mode != Mode.train or v[1] <= c.steps,
               "must end at or before steps = {steps}", "raise steps, or choose earlier steps"),
    JoinedRule("profile.ranks", lambda c, v: 0 <= v < c.parallel.world,
               lambda c, v: f"must be a rank, 0 to {c.parallel.world - 1}", "use 0", each=True),
    ConditionalRules(
        lambda c: c.cluster.deterministic,  # packages of other projects do not promise bitwise repeatable results
        (
            JoinedRule("parallel.dispatch", lambda c, v: DISPATCHES[v].repeats,
                       "excludes cluster.deterministic=true: the order of its arriving rows may differ between runs",
                       f"use parallel.dispatch={' or '.join(name for name, facts in DISPATCHES.items() if facts.repeats)}"),
            JoinedRule("precision.fp8", lambda c, v: v is None or v.backend != Fp8Backend.deepgemm,
                       "excludes cluster.deterministic=true: DeepGEMM does not guarantee the same bits in every run",
                       "use precision.fp8.backend=triton", named="precision.fp8.backend", shown=lambda c, v: v.backend),
        ),
    ),
)

MODEL: tuple[ConfigCheck, ...] = (
    _parts("model.recompute", list(Recompute)),
    _parts("model.offload", list(Offload)),
    JoinedRule("model.offload", lambda c, v: not v or Recompute.layer not in c.model.recompute,
               "has no tensors to offload: model.recompute has `layer`, so the backward pass recomputes every block and keeps no activations",
               "remove `layer` from model.recompute, or replace it by layer:N: then the blocks after the first N are offloaded"),
    JoinedRule("model.offload", lambda c, v: Offload.layer not in v or len(v) == 1,
               "has other parts beside `layer`, which already includes all parts of a block", "keep [layer]"),
    JoinedRule("model.rope_head_dim", lambda c, v: v % 2 == 0,
               "must be even: RoPE rotates pairs of elements", lambda c, v: f"use {v + 1}"),
    ConditionalRules(lambda c: c.model.sparse.heads > 0, (
        JoinedRule("model.q_rank", lambda c, v: v is not None,
                   "must be set with sparse attention: the indexer computes its queries from the query latent",
                   "set model.q_rank, or model.sparse.heads=0"),
        JoinedRule("model.sparse.head_dim", lambda c, v: v >= c.model.rope_head_dim,
                   "must be at least model.rope_head_dim = {model.rope_head_dim}, the rotated part", "raise it"),
        JoinedRule("model.sparse.pattern", lambda c, v: not v or (len(v) == c.model.layers and re.fullmatch("F[FS]*", v)),
                   "must have one letter, F or S, for each of the model.layers = {model.layers} layers, and begin with F",
                   "set it to an empty string for an indexer in every layer"),
    )),
    JoinedRule("model.dense_layers", lambda c, v: v <= c.model.layers,
               "must not exceed model.layers = {model.layers}", "lower it"),
    ConditionalRules(
        _has_experts,
        (
            *(
                JoinedRule(f"model.{name}", lambda c, v: v > 0, "must be above 0 for a model with experts", "set 1 or more")
                for name in ("expert_width", "experts", "top_k", "groups", "top_groups", "route_scale")
            ),
            *(
                JoinedRule(f"model.{name}", lambda c, v: v % 8 == 0,
                           "must be a multiple of 8: the grouped GEMM of the experts needs rows of a multiple of 16 bytes",
                           lambda c, v: f"use {-(-v // 8) * 8}")
                for name in ("hidden", "expert_width")
            ),
            JoinedRule("model.experts", lambda c, v: v % c.model.groups == 0,
                       "must be a multiple of model.groups = {model.groups}",
                       lambda c, v: f"use {max(1, round(v / c.model.groups)) * c.model.groups} experts, or another number of groups"),
            JoinedRule("model.top_groups", lambda c, v: v <= c.model.groups,
                       "must not exceed model.groups = {model.groups}", "lower it"),
            JoinedRule("model.top_k", lambda c, v: v <= _reachable(c.model),
                       lambda c, v: "must not exceed the experts in top_groups groups: "
                       f"{c.model.experts} / {c.model.groups} x {c.model.top_groups} = {_reachable(c.model)}",
                       "lower model.top_k or raise model.top_groups"),
        ),
    ),
    ConditionalRules(
        lambda c: _has_experts(c) and c.model.groups > 1,
        (
            JoinedRule("model.group_top_k", lambda c, v: v is None or v <= c.model.experts // c.model.groups,
                       lambda c, v: f"must not exceed the experts of a group: {c.model.experts} / {c.model.groups} = {c.model.experts // c.model.groups}",
                       lambda c, v: f"use {c.model.experts // c.model.groups} or less"),
            JoinedRule("model.top_k", lambda c, v: c.model.group_top_k is not None
                       or (v % c.model.top_groups == 0 and c.model.resolved_group_top_k <= c.model.experts // c.model.groups),
                       "must be a multiple of model.top_groups = {model.top_groups} if model.groups is above 1: a group's score is the sum of its "
                       "top_k / top_groups best experts (paper 2.1.2)",
                       lambda c, v: f"use {max(1, c.model.resolved_group_top_k) * c.model.top_groups}, or set model.group_top_k"),
        ),
    ),
)

def _set_here(section: MuonOptim | Adapter) -> dict[str, Any]:
    """Return the keys of a section that differ from their defaults."""
    plain = vars(type(section)())
    return {key: value for key, value in vars(section).items() if value != plain[key]}


OPTIM: tuple[ConfigCheck, ...] = (
    *_phases("optim.lr_schedule"),
    *_phases("optim.mtp_weight"),
    *_phases("optim.bias_speed"),
    JoinedRule("optim.bias_speed", lambda c, v: c.model.scores == ScoreFunction.sigmoid or not any(phase.value for phase in v),
               "must be 0 with model.scores=softmax: these routers have no balance bias", "set 'optim.bias_speed=[{{value: 0}}]'",
               shown=lambda c, v: [phase.value for phase in v]),
    ConditionalRules(lambda c: c.optim.index_warmup, (
        JoinedRule("optim.index_warmup", lambda c, v: c.model.sparse.heads > 0,
                   "trains indexers, and the model has none: model.sparse.heads is 0", "set model.sparse.heads, or leave it out"),
        JoinedRule("optim.index_warmup", lambda c, v: not c.adapter.on, "trains only the indexers, which an adapter does not train",
                   "leave out one of the two"),
        JoinedRule("optim.index_warmup", lambda c, v: not (c.optim.extra_loss or c.model.block or c.model.router),
                   "trains only the indexers, and does not support custom code", "leave out one of the two"),
        JoinedRule("optim.index_loss", lambda c, v: v > 0, "must be above 0 with optim.index_warmup: it is the only loss", "set 1"),
        JoinedRule("optim.bias_speed", lambda c, v: not any(phase.value for phase in v),
                   "must be 0 with optim.index_warmup: balance biases are frozen", "set 'optim.bias_speed=[{{value: 0}}]'",
                   shown=lambda c, v: [phase.value for phase in v]),
        JoinedRule("optim.qk_clip", lambda c, v: v is None, "scales weights that optim.index_warmup does not train", "leave it out"),
    )),
    JoinedRule("optim.betas", lambda c, v: len(v) == 2 and all(0 <= beta < 1 for beta in v),
               "must be two numbers in [0, 1)", "use [0.9, 0.95]"),
    JoinedRule("optim.muon", lambda c, v: v == MuonOptim() or c.optim.facts.matrices.is_whole,
               "is read only by optim=muon, and this run has optim={optim.name}",
               lambda c, v: f"add optim=muon, or leave out {', '.join(f'optim.muon.{key}' for key in _set_here(v))}",
               shown=lambda c, v: ", ".join(f"{key}={value}" for key, value in _set_here(v).items())),
    JoinedRule("optim.batch_ramp_steps", lambda c, v: (c.optim.batch_ramp_start is None) == (v == 0),
               "needs both batch_ramp_start and batch_ramp_steps", "set both, or neither of them"),
    ConditionalRules(
        lambda c: c.optim.batch_ramp_start is not None,
        (
            JoinedRule("optim.batch_ramp_start", lambda c, v: v <= c.batch_size,
                       "must be between 1 and batch_size = {batch_size}", "lower it"),
            *(
                JoinedRule(f"optim.{name}", lambda c, v: v % batch_unit(c) == 0,
                           lambda c, v: f"must be a multiple of micro_batch_size x {'ranks in lockstep' if c.parallel.uneven else 'parallel.dp'} = {batch_unit(c)}",
                           lambda c, v: f"use {batch_unit(c)}")
                for name in ("batch_ramp_start", "batch_ramp_increment")
            ),
            JoinedRule("optim.batch_ramp_increment", lambda c, v: c.optim.batch_ramp_start % v == 0 and c.batch_size % v == 0,
                       "must divide batch_ramp_start and batch_size", lambda c, v: f"use {batch_unit(c)}"),
        ),
    ),
)

ADAPTERS: tuple[ConfigCheck, ...] = (
    JoinedRule("adapter", lambda c, v: v.on or v == Adapter(path=v.path),
               "has values, and this run has no adapter: it trains the weights themselves",
               lambda c, v: f"add adapter=lora, or leave out {', '.join(f'adapter.{key}' for key in _set_here(v))}",
               shown=lambda c, v: ", ".join(f"{key}={value}" for key, value in _set_here(v).items())),
    JoinedRule("adapter.path", lambda c, v: v is None or c.mode in ADDS_ADAPTERS, "names an adapter, and this mode does not support adapters",
               f"leave it out, or choose mode={', '.join(ADDS_ADAPTERS)}"),
    JoinedRule("adapter.path", lambda c, v: v is None or c.mode is not Mode.export or c.export.merge,
               "names an adapter, and without export.merge=true the export would equal this adapter", "add export.merge=true"),
    ConditionalRules(lambda c: c.adapter.on, (
        JoinedRule("adapter.targets", lambda c, v: v, "must have at least one target", "leave it out for all targets of the model except the head"),
        JoinedRule("adapter.targets", lambda c, v: len(set(v)) == len(v), "has a target twice", "name each target once",
                   shown=lambda c, v: [str(target) for target in v]),
        JoinedRule("adapter.targets", lambda c, v: v in adapted_targets(c.model),
                   lambda c, v: f"is no target of this model, which has {', '.join(adapted_targets(c.model))}",
                   "leave it out of adapter.targets", each=True, shown=lambda c, v: str(v)),
        JoinedRule("adapter.targets", lambda c, v: c.parallel.pp == 1 or set(v) & set(IN_EVERY_LAYER),
                   f"must have one of {', '.join(IN_EVERY_LAYER)} with parallel.pp > 1: a pipeline stage without an adapter trains nothing",
                   f"add {IN_EVERY_LAYER[0]}, or use parallel.pp=1", shown=lambda c, v: [str(target) for target in v]),
        JoinedRule("adapter.targets", lambda c, v: AdapterTarget.head not in v or not (c.optim.detach_mtp or c.optim.extra_loss),
                   "must not have the target head with optim.detach_mtp or optim.extra_loss, which use the head's weight without an adapter",
                   "leave head out of adapter.targets", shown=lambda c, v: [str(target) for target in v]),
        JoinedRule("adapter.rank", lambda c, v: v % 8 == 0 or AdapterTarget.routed not in c.adapter.targets,
                   "must be a multiple of 8 with the target routed: the grouped GEMM of the experts needs rows of a multiple of 16 bytes",
                   lambda c, v: f"use {-(-v // 8) * 8}, or leave routed out of adapter.targets"),
        JoinedRule("init_from", lambda c, v: v or c.mode is not Mode.train,
                   "is missing: an adapter needs the weights of a trained model",
                   "set init_from to a folder of weights, or to a run"),
        JoinedRule("optim.name", lambda c, v: not c.optim.facts.matrices.is_whole,
                   "orthogonalises whole weight matrices, and A and B of an adapter are factors of one", "set optim.name=adamw"),
        JoinedRule("optim.bias_speed", lambda c, v: not any(phase.value for phase in v),
                   "must be 0 with an adapter: the balance biases belong to the frozen base",
                   "add optim=tune, or set 'optim.bias_speed=[{{value: 0}}]'", shown=lambda c, v: [phase.value for phase in v]),
        JoinedRule("optim.qk_clip", lambda c, v: v is None, "scales weights of the base, which are frozen with an adapter",
                   "leave it out with an adapter"),
    )),
)

DATA: tuple[ConfigCheck, ...] = (
    JoinedRule("data.path", lambda c, v: v != "",
               "is empty, perhaps from a shell variable that is not set",
               "set data.path=FOLDER_OR_FILE, or leave it out for the recipe's own data"),
    JoinedRule("data.mix", lambda c, v: not (c.data.path and v),
               "excludes data.mix",
               "move every source into data.mix", shown=lambda c, v: [source.path for source in v]),
    JoinedRule("data.source", lambda c, v: not (v and (c.data.path or c.data.mix)),
               "provides all data, so data.path and data.mix must not be set", "keep only one of them", shown=lambda c, v: v["_target_"]),
    *(
        JoinedRule(f"data.{name}", lambda c, v: not (v and c.data.source),
                   "does not apply to data.source, whose documents are used unchanged", "leave it out, and process the documents in data.source")
        for name in ("fim_rate", "min_tokens")
    ),
    JoinedRule("data.text_key", lambda c, v: not c.data.mix or v == "text",
               "does not apply to data.mix, whose sources have their own text_key", "set text_key in the entries of data.mix"),
    JoinedRule("data.path", lambda c, v: v or c.data.mix or c.data.source or c.data.format in OF_STDLIB or c.mode in NEEDS_NO_DATA,
               "is missing, and this recipe has no data of its own", "set data.path=FOLDER_OR_FILE, or use data=stdlib"),
    JoinedRule("data.mix", lambda c, v: v.path or v.format in OF_STDLIB,
               f"must be set for every source of a mix, unless its format is {' or '.join(OF_STDLIB)}",
               "set it", each=True, named="data.mix.path", shown=lambda c, v: v.path),
    JoinedRule("data.mix", lambda c, v: _mix_share(c, v) >= SMALLEST_SHARE,
               lambda c, v: f"is {_mix_share(c, v):.1g} of the mix; a source with a share below {SMALLEST_SHARE:g} may never be read",
               "raise it, or remove {v.path}", each=True, named="data.mix.weight", shown=lambda c, v: v.weight),
    JoinedRule("checkpoint.keep_best", lambda c, v: not v or c.log.validate_every or c.mode is not Mode.train,
               "needs the validation loss during the training", "set log.validate_every=N, in steps"),
    ConditionalRules(lambda c: not c.data.chats, (
        JoinedRule("data.template", lambda c, v: v is None or c.generate.chat, NOT_CHATS, FOR_CHATS),
        JoinedRule("data.template_function", lambda c, v: not v or c.generate.chat, NOT_CHATS, FOR_CHATS, shown=lambda c, v: v["_target_"]),
        JoinedRule("data.template_keys", lambda c, v: not v or c.generate.chat, NOT_CHATS, FOR_CHATS),
        JoinedRule("data.reasoning", lambda c, v: v is None, NOT_CHATS, FOR_CHATS),
        JoinedRule("data.supervise", lambda c, v: v is Supervise.assistant, NOT_CHATS, FOR_CHATS),
        JoinedRule("data.too_long", lambda c, v: v is TooLong.refuse, NOT_CHATS, FOR_CHATS),
        JoinedRule("data.cut_reasoning", lambda c, v: not v, NOT_CHATS, FOR_CHATS),
        JoinedRule("mode", lambda c, v: v is not Mode.show_data, "shows the learnt tokens of chats, and this recipe has no chats", FOR_CHATS),
    )),
    JoinedRule("data.template_function", lambda c, v: not v or c.data.template is None,
               "formats chats, and so does data.template", "keep only one of them", shown=lambda c, v: v["_target_"]),
    JoinedRule("data.template_keys", lambda c, v: not (v and c.data.template_function),
               "are variables of a Jinja template, and data.template_function is not a Jinja template", "set the values in data.template_function"),
    ConditionalRules(lambda c: c.data.chats, (
        JoinedRule("model.yarn.query_growth", lambda c, v: v == 0 or c.seq_len <= c.model.yarn.original_seq_len,
                   "counts positions from the start of a sequence, which holds several chats",
                   "set seq_len={model.yarn.original_seq_len} or less"),
        JoinedRule("data.mix", lambda c, v: all(source.format in CHATS for source in v),
                   "mixes chats and other text, which cannot be trained on together", "set format: chat for every source, or for none",
                   shown=lambda c, v: [str(source.format) for source in v]),
        JoinedRule("data.fim_rate", lambda c, v: v == 0, "rearranges text, and does not apply to chats", "set data.fim_rate=0"),
        JoinedRule("data.mask_documents", lambda c, v: not v, "applies to packed text; chats in a sequence are always separate", "leave it out"),
        JoinedRule("data.min_tokens", lambda c, v: v == 0, "applies to long documents; chats of any length are kept", "leave it out"),
        JoinedRule("optim.qk_clip", lambda c, v: v is None,
                   "uses the scores of all positions, including the padding after chats", "leave it out with chats"),
        JoinedRule("data.source", lambda c, v: not v, "provides text, and chats are read from files", "leave out one of the two"),
        JoinedRule("evaluate.needle", lambda c, v: not v, "hides keys in plain text, and the data are chats", "leave it out with chats"),
    )),
)

# train/loop/layout_check.py (`check_schedule`) checks layers and micro-batches of a pipeline, in modes that build a
# pipeline. `check_world` checks the number of ranks once it is known.
PARALLEL: tuple[ConfigCheck, ...] = (
    JoinedRule("parallel.split", lambda c, v: all(type(n) is int and n >= 0 for n in v) if isinstance(v, list) else v in ("cost", "even"),
               "must be cost, even, or a list with the number of layers of every stage",
               "set cost, or a list such as 'parallel.split=[1,2,2,1]'"),
    JoinedRule("parallel.ep", lambda c, v: c.parallel.stage_ranks % v == 0,
               lambda c, v: f"must divide parallel.dp {'x parallel.cp ' if c.parallel.cp > 1 else ''}= {c.parallel.stage_ranks}",
               "raise parallel.dp or lower parallel.ep: an expert group consists of data-parallel ranks"),
    _pieces("seq_len"),
    JoinedRule("parallel.virtual_stages", lambda c, v: c.parallel.schedule_facts.stages is None or v == 2,
               lambda c, v: f"applies only to schedule={IN_PARTS}: with {c.parallel.schedule} every rank has "
               f"{'one stage' if c.parallel.schedule_facts.stages == 1 else 'two stages'}",
               f"add parallel.schedule={IN_PARTS}, or leave parallel.virtual_stages out"),
    JoinedRule("parallel.zero", lambda c, v: c.parallel.pp == 1 or v == 1,
               "must be 1 with parallel.pp > 1: ZeRO stage 2 would keep whole gradients until the end of the step, and stage 3 would gather "
               "the weights for every micro-batch",
               "use parallel.zero=1"),
    JoinedRule("parallel.offload_optimizer", lambda c, v: not (v and c.parallel.zero == 3),
               "needs parallel.zero=1 or 2: ZeRO stage 3 also shards weights and gradients, and gathers them from the device",
               "use parallel.zero=1 or 2, or set parallel.offload_optimizer=false"),
    JoinedRule("parallel.overlap", lambda c, v: not (c.parallel.zero == 3 and c.parallel.schedule_facts.pairs and v),
               "must be false with parallel.zero=3 and schedule={parallel.schedule}: stage 3 gathers weights for one pass at a time, and "
               "this schedule overlaps a forward and a backward",
               "use parallel.overlap=false, another schedule, or parallel.zero=1 or 2"),
    ConditionalRules(_has_experts, (lambda c: check_experts(c.model.experts, c.parallel.ep),)),
)

PRECISION: tuple[ConfigCheck, ...] = (
    JoinedRule("precision.fp8", lambda c, v: (v is not None) == ("fp8" in c.precision.name),
               "must be set for a recipe with FP8 GEMMs, and only for such a recipe",
               "choose precision=fp8, which sets it", shown=lambda c, v: "null" if v is None else "set"),
    JoinedRule("precision.fp8", lambda c, v: not (v and v.hold_weights and c.parallel.zero == 3),
               "must be false with parallel.zero=3, which gathers each weight for a pass and then frees it",
               "set it to false", named="precision.fp8.hold_weights", shown=lambda c, v: True),
    ConditionalRules(lambda c: c.precision.fp8 is not None, (_check_operands,)),
)

PLAN: tuple[ConfigCheck, ...] = (
    JoinedRule("hardware.currency", lambda c, v: re.fullmatch("[A-Z]{3}", v),
               "must be three capital letters (ISO 4217)", "use USD"),
    JoinedRule("plan.devices", lambda c, v: not v or c.plan.search,
               "is the number of devices for a search, and plan.search is false", "add plan.search=true, or set parallel.pp and dp"),
    JoinedRule("plan.write", lambda c, v: v is None or c.plan.search,
               "is the file for the best layout of a search, and plan.search is false", "add plan.search=true"),
    JoinedRule("plan.write", lambda c, v: v is None or re.fullmatch(r"[a-z]\w*", v),
               "must be a plain name: lower-case letters, digits and _", "choose a plain name"),
    JoinedRule("dry_run.rank", lambda c, v: v == "worst" or (v.isdecimal() and int(v) < c.parallel.world),
               lambda c, v: f"must be worst or the number of a rank, 0 to {c.parallel.world - 1} = parallel.pp x parallel.dp - 1",
               "use worst"),
)

EVALUATE: tuple[ConfigCheck, ...] = (
    JoinedRule("evaluate.tasks", lambda c, v: v or not (c.evaluate.task_path or c.evaluate.task_limit or c.evaluate.shots),
               "apply to tasks, and evaluate.tasks is empty", "add tasks: 'evaluate.tasks=[NAME]'"),
    JoinedRule("cluster.backend", lambda c, v: c.mode != Mode.evaluate or v == "local",
               "must be local: mode=evaluate starts its ranks on this machine, or is started by torchrun", "leave cluster=ray out"),
    JoinedRule("evaluate.tasks", lambda c, v: not v or c.parallel.world == 1,
               "must be empty with several ranks: tasks run in one process",
               "set parallel.pp=1 parallel.dp=1 parallel.ep=1 and leave parallel.cp out, or leave the tasks out"),
    JoinedRule("evaluate.needle", lambda c, v: v > 0, "must be a number of tokens, 1 or more", "use seq_len", each=True),
    JoinedRule("evaluate.needle", lambda c, v: c.mode != Mode.evaluate or v <= c.seq_len,
               "must not exceed seq_len = {seq_len}, the context of the model",
               "use {seq_len} or less, or raise seq_len beyond the training context", each=True),
    _pieces("evaluate.needle", each=True),
    ConditionalRules(lambda c: c.mode is Mode.evaluate and c.evaluate.answers, (
        JoinedRule("evaluate.answers", lambda c, v: c.data.chats, "are generated for questions of chats, and the data are not chats", "set evaluate.answers=0"),
        JoinedRule("evaluate.answers", lambda c, v: c.parallel.world == 1, "must be 0 with several ranks: answers are generated in one process",
                   "leave parallel out, or set evaluate.answers=0"),
        JoinedRule("evaluate.answers", lambda c, v: not c.model.block,
                   "must be 0 with a custom block: answers are generated only by DeepSeek-V3's own block", "set evaluate.answers=0"),
    )),
)

SCORE: tuple[ConfigCheck, ...] = (
    JoinedRule("score.data", lambda c, v: c.mode != Mode.score or v,
               "is missing: mode=score needs a file of samples", "set score.data to a .jsonl or .parquet file of samples"),
    JoinedRule("score.to", lambda c, v: c.mode != Mode.score or v,
               "is missing: mode=score needs the name of the file to write", "set score.to to the name of a new .parquet file"),
)

EXPORT: tuple[ConfigCheck, ...] = (
    JoinedRule("export.to", lambda c, v: c.mode != Mode.export or v,
               "is missing: mode=export needs a folder to write", "set export.to=FOLDER"),
    JoinedRule("average.to", lambda c, v: c.mode != Mode.average or v,
               "is missing: mode=average needs a run folder to write", "set average.to=runs/NAME"),
)

_ON_RAY = ("cluster.wait", "cluster.heartbeat", "cluster.restarts", "cluster.standby")
_OF_SPARSE = (*(f"model.sparse.{key}" for key in ("head_dim", "top_k", "interleaved", "pattern")), "optim.index_loss")
_OF_MTP = ("optim.mtp_weight", "optim.detach_mtp")
_OF_EXPERTS = ("optim.balance_loss", "optim.bias_speed", "optim.freeze_routers", "parallel.dispatch", "parallel.wire")
WHERE_READ: tuple[JoinedRule, ...] = (
    *(JoinedRule(key, lambda c, v: c.cluster.backend == "ray", "is read only with cluster=ray", "add cluster=ray, or leave it out") for key in _ON_RAY),
    *(JoinedRule(key, lambda c, v: c.model.mtp_depth > 0, "applies to MTP modules, and this model has none", "set model.mtp_depth, or leave it out")
      for key in _OF_MTP),
    *(JoinedRule(key, lambda c, v: _has_experts(c), "applies to experts, and this model has none", "leave it out") for key in _OF_EXPERTS),
    *(JoinedRule(f"parallel.{key}", lambda c, v: c.parallel.ep > 1 or not _has_experts(c),
                 "applies to rows that are sent to experts on other ranks, and parallel.ep is 1", "set parallel.ep, or leave it out")
      for key in ("dispatch", "wire")),
    JoinedRule("parallel.split", lambda c, v: c.parallel.pp > 1, "assigns layers to pipeline stages, and parallel.pp is 1",
               "set parallel.pp, or leave it out"),
    JoinedRule("checkpoint.memory_folder", lambda c, v: c.checkpoint.every_memory > 0, "is the folder of the copies of checkpoint.every_memory, which is 0",
               "set checkpoint.every_memory, or leave it out"),
    JoinedRule("log.sample_every", lambda c, v: v == 0 or c.log.sample_tokens > 0, "applies to generated samples, and log.sample_tokens is 0",
               "set log.sample_tokens, or leave it out"),
    *(JoinedRule(key, lambda c, v: c.model.sparse.heads > 0, "applies to sparse attention, and model.sparse.heads is 0",
                 "set model.sparse.heads, or leave it out") for key in _OF_SPARSE),
    JoinedRule("text_only", lambda c, v: not v or c.init_from, "applies to weights of init_from, which is not set",
               "set init_from, or leave it out"),
)
"""Conditions under which the program reads a key. Otherwise, a user who types the key gets a note."""
# fmt: on
RULES = (*TOP, *MODEL, *OPTIM, *ADAPTERS, *DATA, *PARALLEL, *PRECISION, *PLAN, *EVALUATE, *SCORE, *EXPORT)
