"""mode=export: writes a checkpoint of any layout as a folder for Hugging Face's classes (train/hf/families.py).

An adapter becomes a folder for PEFT. With export.merge=true, the export adds the adapter to its base weights. A few
million elements are converted at a time. The target folder appears only when it is complete.
"""

import math
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.comm_ring import got_on
from conf.errors import EXIT_OK, UserError
from conf.files import new_folder, read_plain_text, written_whole
from conf.own_code import TARGET
from conf.schema import BaseFormat, Config, ExportType, Model, ModelFamily
from conf.words import one_line, say
from parallel.shard import Shard
from train.checkpoint.manifest import read_manifest
from train.checkpoint.read_shards import TORCH
from train.checkpoint.run_folder import find_checkpoint
from train.checkpoint.stored_weights import StoredWeights
from train.checkpoint.trained_with import tokenizer_of
from train.data.chat_template import load_template, stop_ids
from train.data.prepare_progress import ReportProgress, show_progress
from train.data.tokenizer import GENERATION_FILE, TEMPLATE_FILES, TOKENIZER_FILE, Tokenizer
from train.export.model_card import CARD_FILE, model_card
from train.export.written_tensors import (
    PieceWriter,
    PlannedFile,
    WrittenTensor,
    fates,
    index_json,
    left_out,
    lines,
    plan_files,
    source_name,
    write_json,
)
from train.hf.adapter_folder import ADAPTER_FILE, BASE_FORMAT, BASE_MARK, BASE_WEIGHTS, peft_config
from train.hf.blocks import requantize
from train.hf.config import GROUP_TOP_K, LATENT_NORM_EPS, SCALE_BLOCK, config_json
from train.hf.families import FAMILIES, INDEX_ROPE, PARAMS_FILE, FamilyFacts
from train.hf.folder import ADAPTER_CONFIG, index_of
from train.hf.tensor_names import tensors
from train.hf.tokenizer_files import with_words_of, write_tokenizer

SHARD_BYTES = 5e9
"""Maximum bytes of one weights file."""
EXPORTED_ELEMENTS = 1 << 24
"""Maximum elements that are converted at a time: 64 MB in fp32."""
SMALL_FILES = 64 << 20
"""Disk space in bytes for tokenizer, configuration and table of tensors."""


def export(config: Config) -> int:
    """Write the folder export.to, completely or not at all; returns the exit code."""
    with show_progress() as progress:
        said = write_export(config, progress)
    for line in said:
        say(one_line(line))
    return EXIT_OK


def write_export(config: Config, progress: ReportProgress) -> list[str]:
    """Write the folder export.to, completely or not at all; returns lines about it."""
    target = new_folder(config.export.to, "export.to")
    for key, own in (("model.block", config.model.block), ("model.router", config.model.router)):
        if own:
            rule = "is custom code, and programs that load a Hugging Face folder only compute DeepSeek-V3"
            raise UserError(f"{key}.{TARGET}", own[TARGET], rule, "keep the checkpoint; this model cannot be exported")
    checkpoint = find_checkpoint(config, config.export.checkpoint, "export.checkpoint")
    manifest = read_manifest(checkpoint)
    ema = config.export.ema
    if ema and not manifest.meta["has_ema"]:
        raise UserError("export.ema", ema, f"{checkpoint} holds no average of the weights", "omit export.ema")
    tokenizer = tokenizer_of(config, manifest)
    family = family_of(config, ModelFamily(manifest.meta.get("family", ModelFamily.deepseek_v3)))
    stored = StoredWeights(config, checkpoint, "ema" if ema else "master")
    if config.export.merge and stored.lora is None:
        rule = f"merges an adapter into its base, and {checkpoint} has whole weights"
        raise UserError("export.merge", True, rule, "omit it, or name an adapter: adapter.path=FOLDER")
    adapted = stored.lora.adapted if stored.lora is not None and not config.export.merge else []
    alone = bool(adapted)
    check_family(config, family, alone)
    placed = [part for one in adapted for part in (one.a, one.b)] or list(tensors(config.model, family))
    rest = left_out(manifest, placed, ema)
    files = plan_files(placed, config.export.dtype, SHARD_BYTES, FAMILIES[family].stem)
    if alone:
        files = [PlannedFile(ADAPTER_FILE, [written for file in files for written in file.written])]
    _check_room(target, files)
    rows, notes = fates(files, rest, ema), list(_notes(config.model, FAMILIES[family]))
    if config.data.chats and config.data.template_keys:
        given = ", ".join(f"{key}={value}" for key, value in config.data.template_keys.items())
        notes.append(f"note: this model was tuned on prompts with {given}; pass the same to apply_chat_template")
    if alone and config.adapter.base is BaseFormat.fp8:
        notes.append(
            "note: this adapter was trained with a base in block FP8; a base in another format has other weights. Serve it with a folder in FP8, or merge it (export.merge=true)"
        )
    run = manifest.folder.absolute().parents[1]
    tokenizer = with_words_of(tokenizer, run, _tokenizer_folder(config, tokenizer))
    ends = _ends(config, run, tokenizer)
    body = config_json(config.model, manifest.meta["seq_len"], config.export.dtype, ends, family)
    length = body.get(FAMILIES[family].section, body)["max_position_embeddings"]
    with written_whole(target, "export.to") as folder:
        mark = {}
        if alone:
            weights = manifest.meta["base"].get("weights")
            mark = {BASE_MARK: stored.base_mark(config.model), BASE_FORMAT: config.adapter.base}
            mark |= {BASE_WEIGHTS: weights} if weights else {}
        _write_weights(folder, files, stored, ema, progress, mark)
        if stored.lora is not None and not alone:
            stored.lora.require_base()
        if alone:
            write_json(folder / ADAPTER_CONFIG, peft_config(config.adapter, adapted, str(config.init_from)))
        else:
            write_json(folder / index_of(FAMILIES[family].stem), index_json(files))
            write_json(folder / FAMILIES[family].config_file, body)
            (folder / CARD_FILE).write_text(model_card(config, manifest, family, notes, length), encoding="utf-8")
        write_tokenizer(folder, tokenizer, length)
        write_json(folder / GENERATION_FILE, tokenizer.settings(GENERATION_FILE) | ends)
        source = {"checkpoint": str(checkpoint.absolute()), "step": manifest.step, "ema": ema}
        write_json(folder / "export.json", {**source, "family": family, "dtype": config.export.dtype, "tensors": rows})
    return [*lines(rows), *notes, f"Exported step {manifest.step} of {checkpoint} to {target}"]


def _tokenizer_folder(config: Config, tokenizer: Tokenizer) -> Path | None:
    """Returns the folder of the run's tokenizer, or None if it has changed."""
    for choice in (config.data.tokenizer, config.init_from):
        folder = Path(choice).expanduser() if choice else None
        if folder is not None and (folder / TOKENIZER_FILE).is_file() and not (folder / "config.yaml").is_file():
            try:
                if read_plain_text(folder / TOKENIZER_FILE) == tokenizer.json_text:
                    return folder
            except ValueError as error:
                raise UserError("data.tokenizer", folder / TOKENIZER_FILE, str(error), "download it again") from error
    return None


def _ends(config: Config, run: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns bos_token_id and eos_token_id. For chats, the chat template gives eos_token_id."""
    stops = tokenizer.stop_ids
    if config.data.chats and (run / TEMPLATE_FILES["default"]).is_file():
        stops = stop_ids(load_template(None, run, tokenizer, config.data.template_keys), tokenizer)
    own = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    bos = tokenizer.settings(GENERATION_FILE).get("bos_token_id")
    return {"bos_token_id": own if bos is None else bos, "eos_token_id": stops if len(stops) > 1 else stops[0]}


def family_of(config: Config, started: ModelFamily) -> ModelFamily:
    """Returns export.family, or by default the family `started` of the folder that the run started from. If the run
    added indexers to dense attention, the default is DeepSeek-V3.2, or GLM-5 if only GLM-5 has such indexers."""
    sparse, own = config.model.sparse, started
    if sparse.heads and not FAMILIES[started].is_sparse:
        as_glm = sparse.interleaved or "S" in sparse.pattern
        own = ModelFamily.glm_moe_dsa if as_glm else ModelFamily.deepseek_v32
    return config.export.family or own


def check_family(config: Config, family: ModelFamily, alone: bool) -> None:
    """Raise UserError if the model cannot be exported in this family. alone: whether only the adapter is exported."""
    facts, model = FAMILIES[family], config.model
    is_sparse = model.sparse.heads > 0
    fitting = [row.name for row in FAMILIES.values() if (row.scores, row.is_sparse) == (model.scores, is_sparse)]
    other = (
        f"use export.family={fitting[0]}"
        if fitting
        else "no family has indexers and softmax scores; train such a model with model.scores=sigmoid"
    )
    for wrong, field, value, rule, cure in (
        (
            alone and not facts.loader,
            "export.family",
            family,
            f"has tensor names that PEFT cannot read: transformers has no class for {facts.title}",
            "add export.merge=true, which writes whole weights",
        ),
        (
            alone and config.export.dtype == ExportType.fp8,
            "export.dtype",
            config.export.dtype,
            "is not a format for adapters",
            "use bf16 or fp32, or add export.merge=true",
        ),
        (
            facts.scores != model.scores,
            "export.family",
            family,
            f"needs routers with {facts.scores}, and the model has {model.scores}",
            other,
        ),
        (
            facts.is_sparse != is_sparse,
            "export.family",
            family,
            f"has {'sparse' if facts.is_sparse else 'dense'} attention, and the model has model.sparse.heads = {model.sparse.heads}",
            other,
        ),
        (
            "S" in model.sparse.pattern and not facts.shares,
            "export.family",
            family,
            "needs an indexer in every layer, and model.sparse.pattern lets some layers use the keys of another layer",
            f"use export.family={ModelFamily.glm_moe_dsa}",
        ),
        (
            model.yarn.query_growth > 0 and facts.config_file != PARAMS_FILE,
            "export.family",
            family,
            f"does not support query growth, and model.yarn.query_growth is {model.yarn.query_growth}",
            f"use export.family={ModelFamily.mistral_large_3}",
        ),
        (
            not facts.has_mtp and model.mtp_depth > 0,
            "export.family",
            family,
            f"does not support MTP modules, and the model has {model.mtp_depth}",
            "use another family",
        ),
        (
            not facts.has_fp8 and config.export.dtype == ExportType.fp8,
            "export.dtype",
            config.export.dtype,
            f"is not the FP8 format of {facts.title}",
            "take bf16",
        ),
    ):
        if wrong:
            raise UserError(field, value, rule, cure)


def _check_room(target: Path, files: list[PlannedFile]) -> None:
    """Raise UserError if the disk lacks space for the folder."""
    needed = SMALL_FILES + sum(written.nbytes for file in files for written in file.written)
    existing = next(folder for folder in target.parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            "export.to",
            target,
            f"no disk space: the folder takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            "free space, or give a folder on a larger disk",
        )


def _write_weights(
    folder: Path,
    files: list[PlannedFile],
    stored: StoredWeights,
    ema: bool,
    progress: ReportProgress,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write every weights file, a few rows at a time. metadata: added to the files' headers."""
    total, done = sum(written.placed.count for file in files for written in file.written), 0
    for file in files:
        outs = [out for written in file.written for out in written.outs]
        with PieceWriter(folder / file.name, outs, metadata) as writer:
            for batch in _batches(file.written):
                spans = _read(stored, batch, ema)
                for cut in batch:
                    _write(writer, cut, cut.of(spans[source_name(cut.written.placed, ema)]))
                    done += cut.count
                got_on()
                progress("exporting", done, total)


@dataclass(frozen=True)
class ExportSlice:
    """A range of rows of one Hugging Face tensor."""

    written: WrittenTensor
    first: int
    """Index of the first element in the flattened Hugging Face tensor."""
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def start(self) -> int:
        """Index of the first element in the flattened Sluice tensor."""
        return self.written.placed.start + self.first

    def of(self, span: Shard) -> Tensor:
        """Returns the slice's values. span: a Sluice interval that contains the slice."""
        return span.local[self.start - span.offset :][: self.count].view(self.shape)


def _batches(written: list[WrittenTensor]) -> Iterator[list[ExportSlice]]:
    """Yields the slices in groups of at most EXPORTED_ELEMENTS elements."""
    batch, room = [], EXPORTED_ELEMENTS
    for cut in (cut for each in written for cut in _cuts(each)):
        if batch and cut.count > room:
            yield batch
            batch, room = [], EXPORTED_ELEMENTS
        batch.append(cut)
        room -= cut.count
    yield batch


def _cuts(written: WrittenTensor) -> Iterator[ExportSlice]:
    """Yields slices of a tensor that do not split 128 x 128 blocks."""
    rows, *rest = written.placed.shape
    width = math.prod(rest)
    step = max(1, EXPORTED_ELEMENTS // width // SCALE_BLOCK) * SCALE_BLOCK
    for row in range(0, rows, step):
        yield ExportSlice(written, row * width, (min(step, rows - row), *rest))


def _read(stored: StoredWeights, batch: list[ExportSlice], ema: bool) -> dict[str, Shard]:
    """Reads one interval of each Sluice tensor, which contains all these slices of it."""
    spans: dict[str, Shard] = {}
    needed = defaultdict(list)
    for cut in batch:
        needed[source_name(cut.written.placed, ema)].append(cut)
    for name, cuts in needed.items():
        low, high = min(cut.start for cut in cuts), max(cut.start + cut.count for cut in cuts)
        spans[name] = Shard(torch.empty(high - low), low, cuts[0].written.placed.whole)
    stored.fill(spans)
    for name, span in spans.items():
        if not torch.isfinite(span.local).all():
            raise UserError(
                "export.checkpoint",
                stored.manifest.folder,
                f"{name} has values that are not finite",
                "give an earlier checkpoint",
            )
    return spans


def _write(writer: PieceWriter, cut: ExportSlice, values: Tensor) -> None:
    out, *scales = cut.written.outs
    if not scales:
        writer.write(out.name, cut.first, values.to(TORCH[out.dtype]))
        return
    q, scale = requantize(values)
    writer.write(out.name, cut.first, q)
    first_row = cut.first // cut.shape[1] // SCALE_BLOCK
    writer.write(scales[0].name, first_row * scale.shape[1], scale)


def _notes(model: Model, family: FamilyFacts) -> Iterator[str]:
    """Yields notes about what transformers computes differently, and about parts that the export lacks."""
    if family.others:
        yield (
            f"note: this is only the language model of {family.title}: {' and '.join(f'{part}*' for part in family.others)} and their "
            f"part of {family.config_file} must come from the original folder"
        )
    if model.top_groups < model.groups and model.resolved_group_top_k != GROUP_TOP_K:
        yield (
            f"note: this model ranks groups of experts by their best {model.resolved_group_top_k}, but transformers always by their best {GROUP_TOP_K}, as for DeepSeek-V3, so it will choose other experts"
        )
    if model.resolved_latent_norm_eps != LATENT_NORM_EPS:
        yield (
            f"note: this model has eps {model.resolved_latent_norm_eps} in the norms of its latents, but transformers always uses {LATENT_NORM_EPS}, so its logits will differ"
        )
    if family.is_sparse and model.sparse.interleaved != family.interleaved:
        yield (
            f"note: this model has model.sparse.interleaved={str(model.sparse.interleaved).lower()}, but transformers ignores {INDEX_ROPE} and uses {str(family.interleaved).lower()} for {family.title}, so it will choose other keys"
        )
