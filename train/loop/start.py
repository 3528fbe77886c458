"""init_from: starts a new run from the weights of a Hugging Face folder, or of a Sluice checkpoint.

Balance biases are loaded too. The optimizer's moments start at 0.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.run_files import MANIFEST
from conf.files import read_json
from conf.optimizers import pretrained_with
from conf.schema import Config, Model, SparseAttention
from train.checkpoint.manifest import read_manifest
from train.checkpoint.run_folder import find_checkpoint
from train.checkpoint.trained_with import describe_base, refuse_adapter, require_model, require_tokenizer
from train.data.tokenizer import Tokenizer
from train.hf.config import check_recipe
from train.hf.families import CONFIG_FILE, FAMILIES
from train.hf.folder import Folder, match, open_model
from train.hf.tokenizer_files import check_tokenizer

INDEXER = ".indexer."
"""A part of the name of every indexer weight."""

if TYPE_CHECKING:
    from parallel.shard import Shard
    from train.checkpoint.weights_mark import FillShards
    from train.loop.state import RunState


def check_start(config: Config, tokenizer: Tokenizer) -> tuple[Folder, list[str]]:
    """Reads the headers of config.init_from. Returns folder and notes. Raises UserError."""
    assert config.init_from is not None
    path = Path(config.init_from).expanduser()
    folder, model, notes = open_model(path, text_only=config.text_only)
    notes += [*check_recipe(config, model, path), *other_optimizer(config, path)]
    match(folder, _model_of(config, folder))
    return folder, notes + check_tokenizer(path, tokenizer, config.data.tokenizer)


def _model_of(config: Config, folder: Folder) -> Model:
    """Returns the recipe's model, but without indexers if the folder's family has dense attention."""
    return config.model if FAMILIES[folder.family].is_sparse else replace(config.model, sparse=SparseAttention())


def _with_indexers(config: Config, fill: "FillShards", has: Callable[[str], bool]) -> "FillShards":
    """Returns a function that fills shards like `fill`, and draws the weights of indexers that the source lacks."""
    from train.model.init import draw_indexer  # this imports torch

    def fill_all(wanted: "dict[str, Shard]") -> None:
        fill({name: shard for name, shard in wanted.items() if has(name)})
        for name, shard in wanted.items():
            if not has(name):
                drawn = draw_indexer(name.removeprefix("master."), shard.shape, config.seed, config.model.init_std)
                shard.local.copy_(drawn.flatten()[shard.offset : shard.offset + shard.local.numel()])

    return fill_all


def other_optimizer(config: Config, folder: Path) -> list[str]:
    """Returns a note if the pretraining used another optimizer than this run."""
    path, own = folder / CONFIG_FILE, config.optim.facts.name
    body = read_json(path, "init_from", "download it again") if path.is_file() else {}
    known = pretrained_with(body.get("text_config") or body)
    if known is None or known[1] == own:
        return []
    return [
        f"{known[0]} was pretrained with {known[1]}, and this run has optim.name={own}; the optimizer of the pretraining usually gives the best results (train/docs/muon.md)"
    ]


def own_start(config: Config, tokenizer: Tokenizer) -> Path | None:
    """Returns the checkpoint of config.init_from; None for a Hugging Face folder. Raises UserError."""
    assert config.init_from is not None
    path = Path(config.init_from).expanduser()
    if not ((path / "checkpoints").is_dir() or (path / MANIFEST).is_file()):
        return None
    checkpoint = find_checkpoint(config, str(path), "init_from")
    meta = read_manifest(checkpoint).meta
    require_model(config, checkpoint, meta, adds_indexers=not config.adapter.on)  # an adapter does not train indexers
    require_tokenizer(tokenizer.fingerprint, config.data.tokenizer, checkpoint, meta)
    refuse_adapter(checkpoint, meta)
    return checkpoint


def start_from(config: Config, source: Folder | Path, state: "RunState") -> None:
    """Fill this rank's weights; in an adapter's run, its base weights."""
    from train.checkpoint.weights_mark import WeightsMark  # this imports torch

    mark = WeightsMark()
    if isinstance(source, Path):
        from train.checkpoint.read_shards import FolderFiles, fill_shards  # this imports torch

        manifest = read_manifest(source)
        read = partial(fill_shards, manifest, FolderFiles(source), rounded=config.adapter.on)
        has = lambda name: INDEXER not in name or name in manifest.tensors  # noqa: E731
        state.fill_base(_with_indexers(config, read, has), mark)
        family = manifest.meta.get("family")
    else:
        from train.hf.read import folder_reader  # this imports torch

        facts, read = FAMILIES[source.family], folder_reader(source, match(source, _model_of(config, source)))
        named = lambda wanted: read(  # noqa: E731
            {name: wanted[name] for name in wanted if facts.has_biases or not name.startswith("bias.")}
        )
        state.fill_base(_with_indexers(config, named, lambda name: INDEXER not in name or facts.is_sparse), mark)
        family = source.family
    if config.adapter.on:
        from parallel.exchange import from_rank_0, gather  # this imports torch

        state.base = from_rank_0(lambda: describe_base(source)) | {"weights": mark.text(gather)}
    meta = {"step": 0, "samples": 0, "skipped": 0, "updates": 0, "has_ema": False} | (
        {} if family is None else {"family": family}
    )
    state.finish_load(meta)
