"""Rules that join several fields. Pure: reads the configuration, touches nothing, raises UserError."""

import itertools
import re

from conf.check_plan import check_plan
from conf.check_precision import check_precision
from conf.errors import UserError
from conf.fields import check_fields, wrong_choice
from conf.micro_batches import batch_unit, check_batch
from conf.schema import (
    Config,
    DataFormat,
    DispatchKind,
    Fp8Backend,
    Mode,
    Model,
    Offload,
    Phase,
    PipelineSchedule,
    Recompute,
)

NEEDS_NO_DATA = (Mode.generate, Mode.plan, Mode.dry_run, Mode.prove)
MAX_EXPERTS = 32767
"""Expert ids are sorted and sent as int16."""
SMALLEST_SHARE = 1e-6
"""Of a mix: what train/data/mix.py can tell from nothing."""


def check(config: Config) -> None:
    """Raise UserError for the first rule that the configuration breaks."""
    check_fields(config)
    _check_top(config)
    check_model(config.model)
    _check_optim(config)
    _check_data(config)
    _check_parallel(config)
    check_precision(config.precision)
    check_plan(config)
    _check_evaluate(config)
    _check_export(config)


def check_spread(config: Config) -> None:
    """The rules that another layout of a recipe can break, where the recipe keeps all others: those of its batch, ramp and section
    parallel."""
    check_batch(config)  # what most layouts of a search break, and costs nothing
    check_fields(config.parallel, "parallel.")
    _check_optim(config)
    _check_parallel(config)


def _require(ok: bool, field: str, value: object, rule: str, cure: str) -> None:
    if not ok:
        raise UserError(field, value, rule, cure)


def _check_top(config: Config) -> None:
    several = config.mode is Mode.report and config.name.startswith("[") and config.name.endswith("]")
    for name in config.name[1:-1].split(",") if several else [config.name]:
        _require(
            re.fullmatch(r"[\w.\-+=,]+(/\d+)?", name.strip()) is not None and name not in (".", ".."),
            "name",
            config.name,
            "must be a plain folder name: letters, digits, and . _ - + = ,",
            "choose a simpler name; mode=report also takes 'name=[A,B]'",
        )
    _require(
        config.seq_len <= config.model.max_seq_len,
        "seq_len",
        config.seq_len,
        f"must not exceed model.max_seq_len = {config.model.max_seq_len}",
        "shorten seq_len or raise model.max_seq_len",
    )
    _require(
        config.seq_len > config.model.mtp_depth,
        "seq_len",
        config.seq_len,
        f"must exceed model.mtp_depth = {config.model.mtp_depth}: each MTP module looks one token further",
        "lengthen seq_len or lower model.mtp_depth",
    )
    _require(
        config.init_from is None or config.resume in ("auto", "never"),
        "init_from",
        config.init_from,
        f"resume={config.resume} starts from a checkpoint, weights and all",
        "give one of the two",
    )
    check_batch(config)
    _require(
        config.checkpoint.every_memory == 0 or config.cluster.backend == "ray",
        "checkpoint.every_memory",
        config.checkpoint.every_memory,
        "needs the agents of cluster=ray, which keep the copies, and cluster.backend is local",
        "add cluster=ray, or leave checkpoint.every_memory at 0",
    )
    _require(
        config.checkpoint.memory_folder.startswith("/"),
        "checkpoint.memory_folder",
        config.checkpoint.memory_folder,
        "must be an absolute path, the same on every node",
        "take /dev/shm",
    )
    for tag in config.log.wandb_tags:
        _require(1 <= len(tag) <= 64, "log.wandb_tags", tag, "must have 1 to 64 characters, as W&B asks", "shorten it")
    _require(
        config.cluster.address is None or config.cluster.backend == "ray",
        "cluster.address",
        config.cluster.address,
        "is an address of Ray, and cluster.backend is local",
        "add cluster=ray",
    )
    _check_deterministic(config)


def _check_deterministic(config: Config) -> None:
    """Packages of others that make no promise to repeat their bits."""
    fp8, repeats = config.precision.fp8, config.cluster.deterministic
    _require(
        not (repeats and config.parallel.dispatch == DispatchKind.deepep),
        "parallel.dispatch",
        config.parallel.dispatch,
        "does not go with cluster.deterministic: DeepEP does not say that rows arrive in the same order in every run",
        "use parallel.dispatch=node_limited or flat",
    )
    _require(
        not (repeats and fp8 is not None and fp8.backend == Fp8Backend.deepgemm),
        "precision.fp8.backend",
        fp8 and fp8.backend,
        "does not go with cluster.deterministic: DeepGEMM does not say that its products repeat their bits",
        "use precision.fp8.backend=triton",
    )


def check_model(model: Model) -> None:
    """The rules of the model section alone, for models that come from elsewhere."""
    check_fields(model, "model.")
    _check_parts("model.recompute", model.recompute, list(Recompute))
    _check_parts("model.offload", model.offload, list(Offload))
    _require(
        not model.offload or Recompute.layer not in model.recompute,
        "model.offload",
        model.offload,
        "has nothing to bring to the host: model.recompute has `layer`, so backward runs every block again and nothing of it is kept",
        "take `layer` out of model.recompute, or put layer:N in its place: the blocks behind the first N go to the host",
    )
    _require(
        Offload.layer not in model.offload or len(model.offload) == 1,
        "model.offload",
        model.offload,
        "says twice what goes to the host: `layer` is all of a block",
        "keep [layer]",
    )
    _require(
        model.rope_head_dim % 2 == 0,
        "model.rope_head_dim",
        model.rope_head_dim,
        "must be even: RoPE turns pairs",
        f"take {model.rope_head_dim + 1}",
    )
    _require(
        model.dense_layers <= model.layers,
        "model.dense_layers",
        model.dense_layers,
        f"must not exceed model.layers = {model.layers}",
        "lower it",
    )
    if model.dense_layers == model.layers and model.mtp_depth == 0:
        return
    for name in ("expert_width", "experts", "top_k", "groups", "top_groups", "route_scale"):
        value = getattr(model, name)
        _require(value > 0, f"model.{name}", value, "must be above 0 in a model with experts", "set 1 or more")
    for name in ("hidden", "expert_width"):
        value = getattr(model, name)
        _require(
            value % 8 == 0,
            f"model.{name}",
            value,
            "must be a multiple of 8: the grouped product of the experts wants rows of a multiple of 16 bytes",
            f"take {-(-value // 8) * 8}",
        )
    _require(
        model.experts % model.groups == 0,
        "model.experts",
        model.experts,
        f"must be a multiple of model.groups = {model.groups}",
        f"take {max(1, round(model.experts / model.groups)) * model.groups} experts, or another number of groups",
    )
    _require(
        model.top_groups <= model.groups,
        "model.top_groups",
        model.top_groups,
        f"must not exceed model.groups = {model.groups}",
        "lower it",
    )
    reachable = model.experts // model.groups * model.top_groups
    _require(
        model.top_k <= reachable,
        "model.top_k",
        model.top_k,
        f"must not exceed the experts in top_groups groups: {model.experts} / {model.groups} x {model.top_groups} = {reachable}",
        "lower model.top_k or raise model.top_groups",
    )
    if model.groups == 1:
        return
    per_group, size = model.resolved_group_top_k, model.experts // model.groups
    _require(
        model.group_top_k is None or per_group <= size,
        "model.group_top_k",
        model.group_top_k,
        f"must not exceed the experts of a group: {model.experts} / {model.groups} = {size}",
        f"take {size} or less",
    )
    _require(
        model.group_top_k is not None or (model.top_k % model.top_groups == 0 and per_group <= size),
        "model.top_k",
        model.top_k,
        f"must be a multiple of model.top_groups = {model.top_groups} when there are groups: a group's score is the sum of its "
        "top_k / top_groups best experts (paper 2.1.2)",
        f"take {max(1, per_group) * model.top_groups}, or set model.group_top_k",
    )


def _check_parts(field: str, words: list[str], parts: list[str]) -> None:
    """What is recomputed, or goes to the host. parts: all words but layer:N."""
    for word in words:
        if word not in parts and not re.fullmatch("layer:[1-9][0-9]*", word):
            usual = f"use [{','.join(parts)}], or layer:N for the first N blocks of every stage"
            raise wrong_choice(field, word, [*parts, "layer:N"], usual)
    whole = [word for word in words if word.startswith("layer")]
    if len(whole) > 1:
        raise UserError(field, whole, "say twice how many layers", f"keep [{whole[-1]}]")


def _check_phases(field: str, phases: list[Phase]) -> None:
    _require(len(phases) > 0, field, phases, "needs at least one phase", "give [{until: 1.0, value: ...}]")
    ends = [phase.until for phase in phases]
    _require(
        all(a < b for a, b in itertools.pairwise(ends)) and ends[-1] == 1.0,
        field,
        ends,
        "phases must end at rising fractions in (0, 1], the last at 1.0",
        "set until of the last phase to 1.0",
    )


def _check_optim(config: Config) -> None:
    optim = config.optim
    for name in ("lr_schedule", "mtp_weight", "bias_speed"):
        _check_phases(f"optim.{name}", getattr(optim, name))
    _require(
        len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas),
        "optim.betas",
        optim.betas,
        "must be two numbers in [0, 1)",
        "use [0.9, 0.95]",
    )
    start, share = optim.batch_ramp_start, batch_unit(config)
    _require(
        (start is None) == (optim.batch_ramp_steps == 0),
        "optim.batch_ramp_steps",
        optim.batch_ramp_steps,
        "a ramp needs both batch_ramp_start and batch_ramp_steps",
        "set both or neither",
    )
    if start is not None:
        _require(
            start <= config.batch_size,
            "optim.batch_ramp_start",
            start,
            f"must be between 1 and batch_size = {config.batch_size}",
            "lower it",
        )
        for name, value in (("batch_ramp_start", start), ("batch_ramp_increment", optim.batch_ramp_increment)):
            _require(
                value % share == 0,
                f"optim.{name}",
                value,
                f"must be a multiple of micro_batch_size x {'ranks in lockstep' if config.parallel.uneven else 'parallel.dp'} = {share}",
                f"take {share}",
            )
        _require(
            start % optim.batch_ramp_increment == 0 and config.batch_size % optim.batch_ramp_increment == 0,
            "optim.batch_ramp_increment",
            optim.batch_ramp_increment,
            "must divide batch_ramp_start and batch_size",
            f"take {share}",
        )


def _check_data(config: Config) -> None:
    data = config.data
    _require(
        data.path != "",
        "data.path",
        data.path,
        "is empty, as a shell leaves it where a variable is not set",
        "set data.path=FOLDER_OR_FILE, or leave it out for the recipe's own data",
    )
    _require(
        not (data.path and data.mix),
        "data.mix",
        [source.path for source in data.mix],
        "data.path and data.mix exclude each other",
        "put every source into data.mix",
    )
    _require(
        not data.mix or data.text_key == "text",
        "data.text_key",
        data.text_key,
        "does not reach the sources of data.mix, which have their own",
        "set text_key in the entries of data.mix",
    )
    _require(
        bool(data.path or data.mix) or data.format == DataFormat.stdlib or config.mode in NEEDS_NO_DATA,
        "data.path",
        data.path,
        "this recipe brings no data of its own",
        "set data.path=FOLDER_OR_FILE, or take data=stdlib",
    )
    for source in data.mix:
        _require(
            bool(source.path) or source.format == DataFormat.stdlib,
            "data.mix.path",
            source.path,
            "every part of a mix needs a path, unless its format is stdlib",
            "give it",
        )
    total = sum(source.weight for source in data.mix)
    for source in data.mix:
        _require(
            source.weight / total >= SMALLEST_SHARE,
            "data.mix.weight",
            source.weight,
            f"is {source.weight / total:.1g} of the mix, and with less than {SMALLEST_SHARE:g} a source may never be read",
            f"raise it or drop {source.path}",
        )


def _check_parallel(config: Config) -> None:
    parallel = config.parallel
    numbers = isinstance(parallel.split, list) and all(type(each) is int and each >= 0 for each in parallel.split)
    _require(
        numbers or parallel.split in ("cost", "even"),
        "parallel.split",
        parallel.split,
        "must be cost, even, or a list with the number of layers of every stage",
        "leave it at cost, or write a list such as 'parallel.split=[1,2,2,1]'",
    )
    _require(
        parallel.stage_ranks % parallel.ep == 0,
        "parallel.ep",
        parallel.ep,
        f"must divide parallel.dp = {parallel.dp}"
        if parallel.cp == 1
        else f"must divide parallel.dp x parallel.cp = {parallel.stage_ranks}",
        "ranks that share experts are data-parallel ranks: raise dp or lower ep",
    )
    _check_pieces(config, "seq_len", config.seq_len)
    _require(
        parallel.schedule == PipelineSchedule.interleaved or parallel.virtual_stages == 2,
        "parallel.virtual_stages",
        parallel.virtual_stages,
        f"is for schedule=interleaved alone: with {parallel.schedule} every rank has "
        f"{'one stage' if parallel.schedule == PipelineSchedule['1f1b'] else 'two stages'}",
        "add parallel.schedule=interleaved, or leave parallel.virtual_stages out",
    )
    _require(
        parallel.pp == 1 or parallel.zero == 1,
        "parallel.zero",
        parallel.zero,
        "must be 1 with pipelines: stage 2 would keep whole gradients until the step ends anyway, and stage 3 would gather "
        "the weights again for every micro-batch",
        "use parallel.zero=1",
    )
    _require(
        not (parallel.offload_optimizer and parallel.zero == 3),
        "parallel.offload_optimizer",
        parallel.offload_optimizer,
        "needs parallel.zero=1 or 2: stage 3 already cuts weights and gradients too, and gathers them from the device",
        "use parallel.zero=1 or 2, or leave parallel.offload_optimizer at false",
    )
    _require(
        not (parallel.zero == 3 and parallel.schedule == PipelineSchedule.dualpipev and parallel.overlap),
        "parallel.overlap",
        parallel.overlap,
        "must be false with parallel.zero=3 and schedule=dualpipev: weights are gathered for one pass at a time, and here a "
        "forward and a backward take turns",
        "use parallel.overlap=false, another schedule, or parallel.zero=1 or 2",
    )
    if config.model.dense_layers < config.model.layers or config.model.mtp_depth > 0:
        check_experts(config.model.experts, parallel.ep)


def _check_pieces(config: Config, field: str, length: int) -> None:
    """Sequences that cp ranks share are cut into 2 cp pieces of one length. field: which key says how long they are."""
    cp = config.parallel.cp
    if cp == 1:
        return
    _require(
        length % (2 * cp) == 0,
        field,
        length,
        f"must be a multiple of 2 x parallel.cp = {2 * cp}: each of the ranks that share a sequence has an early and a late "
        "piece of it",
        f"set {field} to {max(1, length // (2 * cp)) * 2 * cp}, or take another parallel.cp",
    )
    _require(
        length // (2 * cp) > config.model.mtp_depth,
        "parallel.cp",
        cp,
        f"leaves pieces of {field} / (2 cp) = {length // (2 * cp)} tokens, which must exceed model.mtp_depth = "
        f"{config.model.mtp_depth}: each MTP module is one position shorter",
        f"lower parallel.cp or lengthen {field}",
    )
    _require(
        config.mode != Mode.generate,
        "parallel.cp",
        cp,
        "is how a training spreads its sequences, and mode=generate takes whole ones",
        "leave parallel.cp out",
    )


def check_experts(experts: int, ep: int) -> None:
    """Raise UserError unless every one of ep ranks gets the same number of experts."""
    if experts % ep:
        near = [size for size in range(1, experts + 1) if experts % size == 0]
        cure = f"set parallel.ep to one of {near}, or model.experts to a multiple of {ep}"
        raise UserError("parallel.ep", ep, f"must divide model.experts = {experts}", cure)
    if experts > MAX_EXPERTS:
        raise UserError("model.experts", experts, f"at most {MAX_EXPERTS} experts per layer", "use fewer experts")


def check_world(pp: int, dp: int, cp: int, world: int, given: str) -> None:
    """Raise UserError unless the layout takes all ranks that were started. given: what says how many."""
    _require(
        pp * dp * cp == world,
        "parallel.pp x parallel.dp" if cp == 1 else "parallel.pp x parallel.dp x parallel.cp",
        f"{pp} x {dp}" if cp == 1 else f"{pp} x {dp} x {cp}",
        f"must equal {given}",
        f"set parallel.dp={max(1, world // (pp * cp))}, or start {pp * dp * cp} ranks",
    )


def _check_export(config: Config) -> None:
    export = config.export
    _require(
        config.mode != Mode.export or bool(export.to),
        "export.to",
        export.to,
        "mode=export needs a folder to write to",
        "set export.to=FOLDER",
    )


def _check_evaluate(config: Config) -> None:
    evaluate = config.evaluate
    _require(
        bool(evaluate.tasks) or not (evaluate.task_path or evaluate.task_limit or evaluate.shots),
        "evaluate.tasks",
        evaluate.tasks,
        "task_path, task_limit and shots are about tasks, and there are none",
        "name some: evaluate.tasks=[NAME]",
    )
    _require(
        config.mode != Mode.evaluate or config.cluster.backend == "local",
        "cluster.backend",
        config.cluster.backend,
        "mode=evaluate starts its ranks on this machine, or is started by torchrun",
        "leave cluster=ray out",
    )
    _require(
        not evaluate.tasks or config.parallel.world == 1,
        "evaluate.tasks",
        evaluate.tasks,
        "tasks run in one process",
        "set parallel.pp=1 parallel.dp=1 parallel.ep=1 and leave parallel.cp out, or leave the tasks out",
    )
    for depth in evaluate.needle_depths:
        _require(0 <= depth <= 1, "evaluate.needle_depths", depth, "is a share of the text, from 0 to 1", "take 0.5")
    _require(
        bool(evaluate.needle_depths) or not evaluate.needle,
        "evaluate.needle_depths",
        evaluate.needle_depths,
        "must say where the keys of evaluate.needle stand",
        "leave it out",
    )
    for length in evaluate.needle:
        _require(length > 0, "evaluate.needle", length, "is a length in tokens, 1 or more", "take seq_len")
        _require(
            config.mode != Mode.evaluate or length <= config.seq_len,
            "evaluate.needle",
            length,
            f"must not exceed seq_len = {config.seq_len}, the context of the model",
            f"take {config.seq_len} or less, or set seq_len too, which asks the model for more than it was trained with",
        )
        _check_pieces(config, "evaluate.needle", length)
