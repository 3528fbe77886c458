"""Reads the weights of a checkpoint or a Hugging Face folder, and adds a LoRA adapter if there is one:

    W + scale B A       computed in fp32; W: one of the adapter's base weights

A checkpoint of an adapter's run contains A and B, without the base weights. With adapter.path, A and B are in a PEFT
folder, and the checkpoint or Hugging Face folder contains the base weights. Only a few tensors are in memory at a time.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from torch import Tensor

from conf.errors import UserError
from conf.schema import Adapter, BaseFormat, Config, Model, ModelFamily
from conf.words import say_note
from parallel.exchange import gather
from parallel.mesh import Mesh
from parallel.pipeline.schedule import Pipeline
from parallel.shard import Shard, whole
from train.checkpoint.frozen_base import fill_rounded
from train.checkpoint.manifest import Manifest, holds_adapter, read_manifest
from train.checkpoint.read_shards import FolderFiles, fill_shards
from train.checkpoint.run_folder import find_checkpoint
from train.checkpoint.trained_with import describe_base, other_base, require_adapter, require_base
from train.checkpoint.weights_mark import FillShards, MarkedPart, WeightsMark, same_weights
from train.hf.adapter_folder import (
    ADAPTER_FIELD,
    ADAPTER_FILE,
    BASE_FORMAT,
    BASE_MARK,
    BASE_WEIGHTS,
    AdaptedTensor,
    adapted_tensors,
    open_adapter,
)
from train.hf.families import FAMILIES
from train.hf.folder import is_hf_folder, match, open_model
from train.hf.read import folder_reader, parts_of
from train.hf.tensor_names import PlacedTensor
from train.kernels.choice import build_kernels, choose_kernels
from train.kernels.plain.high import HighPrecision
from train.kernels.plain.plain_kernels import PlainKernels
from train.kernels.precision import activation_dtype, build_precision
from train.model.count import count_parameters
from train.model.deepseek import DeepSeekV3
from train.model.init import materialise
from train.model.operations import Kernels
from train.parallelize import build_chunks, build_pipeline, make_dispatcher, make_share

CACHED_TENSORS = 8
"""Number of cached adapter tensors. One tensor may contain a layer's experts."""


class StoredLora:
    """Adds the product of LoRA A and B to base weights."""

    def __init__(
        self,
        adapted: Iterable[AdaptedTensor],
        scale: float,
        read: Callable[[PlacedTensor], Tensor],
        base: BaseFormat,
        weights: str | None,
        other: UserError,
    ):
        """read: returns a LoRA A or B in fp32. base: storage format of the base weights in training.

        weights: fingerprint of the base weights in training, or None. other: the error to raise for other base weights.
        """
        self.adapted = list(adapted)
        self._mark, self._weights, self._other = WeightsMark(), weights, other
        self._by_place = {(one.base.ours, one.base.start): one for one in self.adapted}
        self._scale, self._read, self._base = scale, read, base

    def as_trained(self, fill_base: FillShards) -> FillShards:
        """Returns a function like `fill_base` that rounds as in training and computes the fingerprint."""
        fill = partial(fill_rounded, fill_base) if self._base is BaseFormat.fp8 else fill_base
        return fill if self._weights is None else self._mark.watching(fill)

    def require_base(self, gather: Callable[[list[MarkedPart]], Iterable[Iterable]] = lambda parts: [parts]) -> None:
        """Raise UserError if the adapter was trained with other base weights. Call this method after all
        base weights are read."""
        if self._weights is not None and not same_weights(self._mark.text(gather), self._weights):
            raise self._other

    def add_to(self, wanted: dict[str, Shard]) -> None:
        """Add scale * B A to adapted matrices in fp32 shards."""
        for part in parts_of([one.base for one in self.adapted], wanted):
            found, width = self._by_place[part.placed.ours, part.placed.start], part.placed.shape[1]
            row, end = part.start // width, -(-(part.start + part.target.numel()) // width)
            delta = self._read(found.b)[row:end] @ self._read(found.a)
            part.target.add_(delta.flatten()[part.start - row * width :][: part.target.numel()], alpha=self._scale)

    def fill_added(self, fill_base: FillShards, wanted: dict[str, Shard]) -> None:
        """Fill shards with the sum of base weights and adapter, computed in fp32 and then rounded."""
        fill_base = self.as_trained(fill_base)
        for name, shard in wanted.items():
            values = {name: Shard(torch.empty(shard.local.numel()), shard.offset, shard.shape)}
            fill_base(values)
            self.add_to(values)
            shard.local.detach().copy_(values[name].local)


class StoredWeights:
    """Reads all weights of a checkpoint, or a part of them."""

    def __init__(self, config: Config, checkpoint: Path, kind: str = "master"):
        """Opens the checkpoint, without reading weights. kind: `master` or `ema`. Raises UserError."""
        self.manifest, self._kind = read_manifest(checkpoint), kind
        self._own = partial(fill_shards, self.manifest, FolderFiles(checkpoint))
        self._base: FillShards | None = None
        family = ModelFamily(self.manifest.meta.get("family", ModelFamily.deepseek_v3))
        adapter, self._whole = config.adapter, lru_cache(CACHED_TENSORS)(self._read_whole)
        if not holds_adapter(self.manifest.meta):
            self.lora = open_lora(adapter.path, config.model, family, self._own)
            if self.lora is not None:
                self._own = self.lora.as_trained(self._own)
            return
        if adapter.path is not None:
            raise UserError(ADAPTER_FIELD, adapter.path, f"{checkpoint} already has an adapter", "leave it out")
        require_adapter(config, checkpoint, self.manifest.meta)
        adapted = adapted_tensors(config.model, family, adapter.targets, adapter.rank)
        meta = self.manifest.meta
        other, mark = other_base(config.init_from, checkpoint, meta), meta["base"].get("weights")
        self.lora = StoredLora(adapted, adapter.scale, self.read, adapter.base, mark, other)
        self._base = self.lora.as_trained(open_base(config, self.manifest))

    def fill(self, wanted: dict[str, Shard]) -> None:
        """Fill shards with weights in fp32. This method is a `FillShards`."""
        here = {name: shard for name, shard in wanted.items() if self._base is None or name in self.manifest.tensors}
        self._own(here)
        if self._base is not None:
            self._base({plain_name(name): shard for name, shard in wanted.items() if name not in here})
        if self.lora is not None:
            self.lora.add_to({plain_name(name): shard for name, shard in wanted.items()})

    def base_mark(self, model: Model) -> str:
        """Returns the fingerprint of the adapter's base weights (see `mark_of`)."""
        assert self._base is not None
        return mark_of(self._base, model)

    def read(self, placed: PlacedTensor) -> Tensor:
        """Returns one A or B of the checkpoint's adapter in fp32."""
        values = self._whole(placed.ours, placed.whole)
        return values[placed.start : placed.start + placed.count].view(placed.shape)

    def _read_whole(self, ours: str, shape: tuple[int, ...]) -> Tensor:
        name = f"{self._kind}.{ours.removeprefix('master.')}"
        values = torch.empty(shape)
        self._own({name: Shard(values.view(-1), 0, shape)})
        return values.view(-1)


def plain_name(name: str) -> str:
    """Returns the checkpoint name of a weight or of its moving average."""
    return f"master.{name.removeprefix('ema.')}" if name.startswith("ema.") else name


def open_base(config: Config, manifest: Manifest) -> FillShards:
    """Returns a function that reads the base weights of a checkpoint's adapter. Raises UserError.

    Their path is in the checkpoint's meta. If this path does not exist, init_from must name them.
    """
    meta = manifest.meta
    path = Path(meta["base"]["path"])
    if not path.exists():
        path = Path(config.init_from or path).expanduser()
    if not path.exists():
        rule = f"must name the base weights of the adapter in {manifest.folder}; their path was {path}"
        raise UserError("init_from", config.init_from, rule, "set init_from to their current path")
    if is_hf_folder(path):
        folder, _, _ = open_model(path, text_only=config.text_only)
        require_base(config, manifest.folder, meta, describe_base(folder))
        return folder_reader(folder, match(folder, config.model))
    checkpoint = find_checkpoint(config, str(path), "init_from")
    require_base(config, manifest.folder, meta, describe_base(checkpoint))
    return partial(fill_shards, read_manifest(checkpoint), FolderFiles(checkpoint))


def mark_of(fill_base: FillShards, model: Model) -> str:
    """Returns a fingerprint of base weights: a hash of the final norm's weight and of the embedding of token 0."""
    norm, vector = torch.empty(model.hidden), torch.empty(model.hidden)
    fill_base(
        {
            "master.norm.weight": Shard(norm, 0, (model.hidden,)),
            "master.embedding.weight": Shard(vector, 0, (model.vocab_size, model.hidden)),
        }
    )
    bits = torch.cat([norm, vector]).bfloat16().view(torch.int16).numpy().tobytes()
    return hashlib.sha256(bits).hexdigest()[:16]


def open_lora(path: str | None, model: Model, family: ModelFamily, fill_base: FillShards) -> StoredLora | None:
    """Opens the LoRA matrices in a PEFT folder; None without a path. Raises UserError."""
    if path is None:
        return None
    found = open_adapter(Path(path).expanduser(), model, family)
    opened = safe_open(found.folder.path / ADAPTER_FILE, framework="pt", backend="pread")
    said = opened.metadata() or {}
    mark, weights = said.get(BASE_MARK), said.get(BASE_WEIGHTS)
    other = found.folder.refuse(
        f"is an adapter of other base weights: it was trained on {found.base}",
        "give the base that it was trained on, without the adapter merged",
    )
    if mark is not None and mark != mark_of(fill_base, model):
        raise other
    if mark is not None and weights is None:
        say_note(
            f"{found.folder.path}: this adapter of an earlier version identifies its base by only two rows, so it is unknown whether it is already merged into these weights. It was trained on {found.base}"
        )

    def read(placed: PlacedTensor) -> Tensor:
        values = opened.get_tensor(placed.theirs).float()
        if not torch.isfinite(values).all():
            raise found.folder.refuse(f"{placed.theirs} holds values that are not finite", "give another adapter")
        return values

    base = said.get(BASE_FORMAT, BaseFormat.plain)
    if base not in list(BaseFormat):
        raise found.folder.refuse(
            f"was trained with a base in format {base!r:.80}, which this version does not know",
            "use the version that wrote it",
        )
    return StoredLora(found.adapted, found.scale, read, BaseFormat(base), weights, other)


def weight_bytes(config: Model, item_bytes: int) -> int:
    """Returns the bytes of all weights, with MTP modules."""
    counts = count_parameters(config)
    return item_bytes * (counts.total + counts.mtp)


def fits_here(config: Config, device: torch.device) -> bool:
    """Whether fp32 weights need less than half of the free memory."""
    room = psutil.virtual_memory().available
    if device.type == "cuda":
        room = min(room, torch.cuda.mem_get_info(device)[0])
    return weight_bytes(config.model, 4) < room / 2


def require_memory(model: Model, item_bytes: int, field: str, what: Path) -> None:
    """Raise UserError if the weights do not fit into free memory."""
    needed, free = weight_bytes(model, item_bytes), psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            field,
            what,
            f"needs {needed / 1e9:.1f} GB of memory in one process, and {free / 1e9:.1f} GB are free",
            "use a machine with more memory, or a smaller model",
        )


def load_model(config: Config, checkpoint: Path, device: torch.device) -> DeepSeekV3:
    """Loads a checkpoint of any layout into one model in eval mode."""
    kernels = build_kernels(device.type, config.cluster.compiled)
    dtype, precision = activation_dtype(config.precision), build_precision(config.precision, device, kernels)
    model = DeepSeekV3.whole(config.model, precision, seq_len=config.seq_len, device="meta")
    materialise(model, "cpu")
    stored = StoredWeights(config, checkpoint)
    read_into_chunks([model], stored)
    if stored.lora is not None:
        stored.lora.require_base()
    for param in model.parameters():
        param.data = param.data.to(dtype)
    return model.to(device).eval()


def load_pipeline(config: Config, mesh: Mesh, device: torch.device, checkpoint: Path) -> Pipeline[DeepSeekV3]:
    """Loads this rank's part of the model from a checkpoint, for evaluation."""
    dispatcher = None if mesh.layout.ep == 1 else make_dispatcher(config, mesh)
    kernels, _ = choose_kernels(config, device)
    precision = build_precision(config.precision, device, kernels)
    share = None if mesh.layout.cp == 1 else make_share(mesh)
    plain = replace(config, adapter=Adapter())  # the loaded weights already include the adapter
    chunks, stage_ids, num_stages = build_chunks(plain, mesh, device, dispatcher, precision, restored=True, share=share)
    kind = "ema" if config.evaluate.ema else "master"
    stored = StoredWeights(config, checkpoint, kind)
    read_into_chunks(chunks, stored, kind, mesh.ep_rank, mesh.layout.ep)
    if stored.lora is not None:
        stored.lora.require_base(gather)
    return build_pipeline(config, mesh, device, chunks, stage_ids, num_stages, overlap=False)


@torch.no_grad()
def read_into_chunks(
    chunks: list[DeepSeekV3], stored: StoredWeights, kind: str = "master", ep_rank: int = 0, ep: int = 1
) -> None:
    """Read weights and balance biases into chunks. kind: `master` or `ema`."""
    weights, wanted = {}, {}
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            offset, shape = 0, tuple(param.shape)
            if ".experts." in name:  # the ep ranks split this weight along its first dimension
                offset, shape = ep_rank * math.prod(shape), (shape[0] * ep, *shape[1:])
            in_place = param.dtype == torch.float32 and param.device.type == "cpu"
            weights[param] = param.view(-1) if in_place else torch.empty(param.numel(), dtype=torch.float32)
            wanted[f"{kind}.{name}"] = Shard(weights[param], offset, shape)
        wanted |= {f"bias.{name}": whole(router.bias_E) for name, router in chunk.routers().items()}
    stored.fill(wanted)
    for param, weight in weights.items():
        param.copy_(weight.view(param.shape))


def load_hf_model(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    field: str = "init_from",
    kernels: Kernels | None = None,
    text_only: bool = False,
    adapter: str | None = None,
) -> tuple[Model, DeepSeekV3, Path | None]:
    """Loads all weights of a Hugging Face folder into one model on the CPU, in eval mode.

    Returns the configuration, the model, and the path of tokenizer.json or None. text_only: leave out tensors of other
    modalities. adapter: PEFT folder to add. Raises UserError.
    """
    path = Path(folder).expanduser()
    headers, config, _ = open_model(path, field, text_only)
    placed = match(headers, config)
    seq_len = min(config.max_seq_len, config.yarn.original_seq_len)
    model = DeepSeekV3.whole(
        config, HighPrecision(dtype, kernels or PlainKernels()), seq_len=seq_len, dtype=dtype, device="meta"
    )
    materialise(model, "cpu")
    wanted = {f"master.{name}": whole(param) for name, param in model.named_parameters()}
    if FAMILIES[headers.family].has_biases:
        wanted |= {f"bias.{name}": whole(router.bias_E) for name, router in model.routers().items()}
    read = folder_reader(headers, placed)
    lora = open_lora(adapter, config, headers.family, read)
    if lora is None:
        read(wanted)
    else:
        lora.fill_added(read, wanted)
        lora.require_base()
    tokenizer = path / "tokenizer.json"
    return config, model.eval(), tokenizer if tokenizer.is_file() else None
