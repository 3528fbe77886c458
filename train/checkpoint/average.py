"""mode=average: writes a run folder with the mean weights of several checkpoints of any layouts.

The mean is computed in fp64 and written in the dtype of the sources. The folder has no optimizer state.
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from conf.changed_settings import Effect, effect_of, flat
from conf.errors import EXIT_OK, UserError
from conf.files import new_folder, written_whole
from conf.load import read_config, write_config
from conf.run_paths import RunPaths
from conf.schema import Average, Config, Mode
from conf.words import one_line, say, say_note
from parallel.shard import Shard
from train.checkpoint.commit import Committer, Save
from train.checkpoint.manifest import Manifest, checkpoints, holds_adapter, read_manifest
from train.checkpoint.read_shards import TORCH, FolderFiles, fill_shards, merge_indexes
from train.checkpoint.run_folder import find_checkpoint
from train.checkpoint.staging import StagingBuffers
from train.data.prepare_progress import ReportProgress, show_progress
from train.data.tokenizer import BESIDE, TOKENIZER_FILE

AVERAGED_ELEMENTS = 1 << 27
"""Maximum number of elements that are averaged at a time. Averaging them takes 2 GB of memory."""
AVERAGED_KINDS = ("master.", "bias.")
"""Name prefixes of the averaged tensors: weights and balance biases."""
NOT_COMPUTED = ("init_std", "max_seq_len")
"""Model fields that do not change a trained model's output."""
SOURCES_FIELD = "average.of"

WeightsPart = Mapping[str, tuple[int, int]]
"""Maps a tensor's name to (first element, number of elements)."""
StoredShapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Maps a tensor's name to its dtype name and shape."""


def write_average(config: Config) -> int:
    """Write the run folder average.to, completely or not at all. Returns the exit code. Raises UserError."""
    target = new_folder(config.average.to, "average.to")
    sources = _sources(config)
    first = sources[-1]
    for other in sources:
        _require_equal(first, other)
    _check_room(target, first)
    run = first.folder.parents[1]
    settings = run / "config.yaml"
    if not settings.is_file():
        raise UserError(
            SOURCES_FIELD,
            first.folder,
            f"does not belong to a run: {run} has no config.yaml",
            "give checkpoints in runs/NAME",
        )
    own = replace(
        read_config(str(settings)), name=target.name, runs=str(target.parent), mode=Mode.train, average=Average()
    )
    names = [f"{source.folder.parents[1].name}/{source.folder.name}" for source in sources]
    meta = {**first.meta, "has_ema": False, "name": target.name, "averaged": names}
    with written_whole(target, "average.to") as folder, show_progress() as progress:
        for name in (TOKENIZER_FILE, *BESIDE):
            if (run / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(run / name, folder / name)
        write_config(own, str(folder / "config.yaml"))
        _write(folder / "checkpoints", sources, meta, progress)
    if len({source.meta.get("seed") for source in sources}) > 1:
        say_note(
            "these runs have different seeds: a mean of weights with different initial values is rarely useful; evaluate it first"
        )
    say(one_line(f"The mean of {', '.join(names)} is in {target}"))
    return EXIT_OK


def _sources(config: Config) -> list[Manifest]:
    """Returns the checkpoints of average.of, oldest first. Raises UserError."""
    found: list[Manifest] = []
    for given in config.average.of or [str(RunPaths(config).path)]:
        folder = Path(given).expanduser().absolute()
        if (folder / "checkpoints").is_dir():
            found += checkpoints(folder / "checkpoints")[: config.average.last]
        else:
            found.append(read_manifest(find_checkpoint(config, str(folder), SOURCES_FIELD)))
    if len({source.folder for source in found}) < 2:
        rule = f"must name at least two checkpoints; these are {len({source.folder for source in found})}"
        cure = "average.last=3 averages the last three checkpoints of a run, 'average.of=[A,B]' any checkpoints"
        raise UserError(SOURCES_FIELD, ", ".join(config.average.of) or RunPaths(config).path, rule, cure)
    return sorted({source.folder: source for source in found}.values(), key=lambda source: source.step)


def _require_equal(one: Manifest, other: Manifest) -> None:
    """Raise UserError if two checkpoints differ in model or tokenizer, or lack weights."""

    def refuse(what: str) -> UserError:
        return UserError(
            SOURCES_FIELD, other.folder, f"has {what} than {one.folder}", "average checkpoints of one model"
        )

    mine, theirs = (flat(source.meta.get("config", {}).get("model", {})) for source in (one, other))
    computes = [key for key in mine.keys() & theirs.keys() if effect_of(f"model.{key}") is Effect.training]
    if differ := [key for key in computes if key not in NOT_COMPUTED and mine[key] != theirs[key]]:
        differences = ", ".join(f"model.{key} = {theirs[key]} and not {mine[key]}" for key in sorted(differ))
        raise refuse(f"another model ({differences})")
    if holds_adapter(one.meta):
        rule = f"{one.folder} holds an adapter: the mean of A and B of two adapters is not the mean of their products"
        raise UserError(
            SOURCES_FIELD, other.folder, rule, "average checkpoints of whole weights, or exports with merged adapters"
        )
    if _shapes(one) != _shapes(other):
        raise refuse(f"other tensors ({min(map(str, _shapes(one).items() ^ _shapes(other).items()))})")
    if one.meta["tokenizer"] != other.meta["tokenizer"]:
        raise refuse("another tokenizer")


def _shapes(manifest: Manifest) -> StoredShapes:
    """Returns the dtype and shape of every averaged tensor."""
    return {
        name: (entry.dtype, entry.shape) for name, entry in manifest.tensors.items() if name.startswith(AVERAGED_KINDS)
    }


def _weight_bytes(shapes: StoredShapes) -> int:
    return sum(TORCH[dtype].itemsize * math.prod(shape) for dtype, shape in shapes.values())


def _check_room(target: Path, source: Manifest) -> None:
    """Raise UserError if the disk lacks space for the weights."""
    needed = _weight_bytes(_shapes(source))
    free = shutil.disk_usage(next(folder for folder in target.parents if folder.is_dir())).free
    if free < needed:
        rule = f"no disk space: the weights take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        raise UserError("average.to", target, rule, "free space, or give a folder on a larger disk")


def _write(root: Path, sources: Sequence[Manifest], meta: dict, progress: ReportProgress) -> None:
    """Write the checkpoint. Each part of the weights becomes one file."""
    shapes = _shapes(sources[0])
    parts = list(_parts({name: math.prod(shape) for name, (_, shape) in shapes.items()}))
    committer = Committer(root, attempt=1, world_size=len(parts), timeout=60.0)
    committer.enter(0)
    save, buffers = Save(sources[-1].step, 1), StagingBuffers(pinned=False)
    done, total = 0, _weight_bytes(shapes)
    for rank, part in enumerate(parts):
        means = {
            name: Shard(mean, part[name][0], shapes[name][1]) for name, mean in _means(sources, part, shapes).items()
        }
        folder = committer.begin(save, rank)
        buffers.copy(means)
        index = buffers.write(folder, rank)
        committer.vote(save, rank, {"rank": rank, "step": save.step, "attempt": committer.attempt, **index})
        done += sum(TORCH[shapes[name][0]].itemsize * count for name, (_, count) in part.items())
        progress("averaging", done, total)
    committer.commit(save, merge_indexes(committer.await_votes(save), meta))


def _parts(sizes: Mapping[str, int]) -> Iterator[WeightsPart]:
    """Splits the elements of all tensors into parts. sizes: number of elements of each tensor."""
    part: dict[str, tuple[int, int]] = {}
    room = AVERAGED_ELEMENTS
    for name, size in sorted(sizes.items()):
        start = 0
        while start < size or (not size and name not in part):
            part[name] = start, (count := min(room, size - start))
            start, room = start + count, room - count
            if not room:
                yield part
                part, room = {}, AVERAGED_ELEMENTS
    if part:
        yield part


def _means(sources: Sequence[Manifest], part: WeightsPart, shapes: StoredShapes) -> dict[str, Tensor]:
    """Returns the means of this part's elements. Raises UserError for non-finite values."""
    sums = {name: torch.zeros(count, dtype=torch.float64) for name, (_, count) in part.items()}
    read = {name: torch.empty(count, dtype=TORCH[shapes[name][0]]) for name, (_, count) in part.items()}
    for source in sources:
        fill_shards(source, FolderFiles(source.folder), {n: Shard(read[n], part[n][0], shapes[n][1]) for n in part})
        for name, values in read.items():
            if not torch.isfinite(values).all():
                raise UserError(SOURCES_FIELD, source.folder, f"{name} has values that are not finite", "leave it out")
            sums[name] += values
    return {name: read[name].copy_(total.div_(len(sources))) for name, total in sums.items()}
