"""Peak memory of import and export for a narrow model with DeepSeek-V3's 61 layers, 256 experts and MTP module.

    python -m bench.hf_memory [--expert-width 64] [--ranks 8] [--dtype fp8] [--folder FOLDER]

Writes a Hugging Face folder, reads it as each of N ranks of ZeRO stage 3 (one after another, in one process) into a
checkpoint, exports that checkpoint, and compares the two folders tensor by tensor; exits 1 if they differ. Import and
export run in separate processes, so that each has its own peak. Figures are the memory beyond that of a process after
all imports, mapped files included.

Takes about 2 minutes.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open

from conf.load import compose
from conf.run_paths import RunPaths
from conf.schema import Config, ExportType
from parallel.shard import Shard
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.read_shards import TORCH
from train.data.tokenizer import Tokenizer, train_bpe
from train.export import run as exporting
from train.export.written_tensors import PieceWriter, WrittenTensor, index_json, plan_files, write_json
from train.hf.blocks import requantize
from train.hf.config import config_json, read_model
from train.hf.folder import index_of, match, open_folder
from train.hf.read import fill_from_folder
from train.hf.tensor_names import tensors

SHAPE = {
    "vocab_size": 1024,
    "hidden": 128,
    "layers": 61,
    "dense_layers": 3,
    "heads": 2,
    "q_rank": 48,
    "kv_rank": 16,
    "nope_head_dim": 16,
    "rope_head_dim": 8,
    "v_head_dim": 16,
    "dense_width": 320,
    "experts": 256,
    "groups": 8,
    "top_groups": 4,
    "top_k": 8,
    "mtp_depth": 1,
}


def configure(options: argparse.Namespace) -> Config:
    shape = [f"model.{key}={value}" for key, value in (SHAPE | {"expert_width": options.expert_width}).items()]
    out, dtype = options.folder / "out", options.dtype
    where = [f"runs={options.folder / 'runs'}", "name=a", "mode=export", f"export.to={out}", f"export.dtype={dtype}"]
    exporting.SHARD_BYTES = options.shard_mb * 1e6
    return compose("conf=tiny", *shape, *where)


def make(config: Config, folder: Path) -> None:
    """Writes a folder with random weights, one tensor at a time."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    files = plan_files(list(tensors(config.model)), config.export.dtype, exporting.SHARD_BYTES)
    shared = {
        name: torch.randn(config.model.vocab_size, config.model.hidden, generator=generator) * 0.02
        for name in ("master.embedding.weight", "master.head.weight")
    }  # the folder has each of these tensors twice, with equal values
    for file in files:
        with PieceWriter(folder / file.name, [out for written in file.written for out in written.outs]) as writer:
            for written in file.written:
                values = shared.get(written.placed.ours)
                if values is None:
                    values = torch.randn(written.placed.shape, generator=generator) * 0.02
                write(writer, written, values)
    write_json(folder / index_of("model"), index_json(files))
    write_json(folder / "config.json", config_json(config.model, config.seq_len, config.export.dtype, {}))


def write(writer: PieceWriter, written: WrittenTensor, values: torch.Tensor) -> None:
    out, *scales = written.outs
    if scales:
        values, scale = requantize(values)
        writer.write(scales[0].name, 0, scale)
    writer.write(out.name, 0, values.to(TORCH[out.dtype]))


def import_ranks(config: Config, source: Path, ranks: int) -> dict[str, float]:
    """Fills and saves each rank's shard of the master weights. The peak is measured at the first fill."""
    folder, paths = open_folder(source), RunPaths(config)
    placed = match(folder, read_model(source))
    tokenizer = Tokenizer(train_bpe(["a few words"], 300))
    meta = {"has_ema": False, "tokenizer": tokenizer.fingerprint, "seq_len": config.seq_len, "samples": 0}
    savers = [Checkpointer(paths.checkpoints, rank=rank, world_size=ranks, asynchronous=False) for rank in range(ranks)]
    base, found = peak(), {}
    for rank in reversed(range(ranks)):  # rank 0 comes last, because it waits for the files of the other ranks
        wanted = shares(config, rank, ranks)
        read = fill_from_folder(folder, placed, wanted)
        size = sum(shard.local.nbytes for shard in wanted.values())
        found = found or {"share": size, "import_read": read, "import_added": peak() - base}
        savers[rank].save(0, wanted, meta)
        savers[rank].finish(required=True)
        savers[rank] = None
    tokenizer.save(paths.path)
    files = [file.stat().st_size for file in source.glob("*.safetensors")]
    counts = sum(torch.Size(each.shape).numel() for each in placed if not each.copy)
    return found | {"largest_file": max(files), "folder": sum(files), "model_fp32": 4 * counts, "files": len(files)}


def shares(config: Config, rank: int, ranks: int) -> dict[str, Shard]:
    """The shards of a rank under ZeRO stage 3: an equal interval of every tensor."""
    found: dict[str, Shard] = {}
    for each in tensors(config.model):
        if each.ours in found:
            continue
        total = torch.Size(each.whole).numel()
        size = total if each.ours.startswith("bias.") else -(-total // ranks)
        low = 0 if each.ours.startswith("bias.") else min(rank * size, total)
        found[each.ours] = Shard(torch.empty(min(size, total - low)), low, each.whole)
    return found


def export(config: Config) -> dict[str, float]:
    base = peak()
    exporting.export(config)
    return {"export_added": peak() - base}


def different(first: Path, second: Path) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    files = [json.loads((folder / index_of("model")).read_text())["weight_map"] for folder in (first, second)]
    wrong = sorted(files[0].keys() ^ files[1].keys())
    with ExitStack() as opened:  # once per file: a header takes as long to read as many tensors
        readers = [
            {file: opened.enter_context(safe_open(folder / file, framework="pt")) for file in set(names.values())}
            for folder, names in zip((first, second), files, strict=True)
        ]
        for name in files[0].keys() & files[1].keys():
            one, other = (reader[names[name]].get_tensor(name) for reader, names in zip(readers, files, strict=True))
            if one.dtype != other.dtype or not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
                wrong.append(name)
    return wrong


def peak() -> int:
    """Largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Runs all steps, each in a separate process; the last step also compares the folders. Returns all figures."""
    found: dict[str, float] = {}
    for step in ("make", "import", "export"):
        command = [sys.executable, "-m", "bench.hf_memory", "--step", step, "--folder", str(options.folder)]
        for name in ("expert_width", "ranks", "dtype", "shard_mb"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{step}: {done.stdout}{done.stderr}")
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


def run_step(options: argparse.Namespace) -> dict[str, float]:
    config, source = configure(options), options.folder / "in"
    if options.step == "make":
        make(config, source)
        return {}
    if options.step == "import":
        return import_ranks(config, source, options.ranks)
    return export(config) | {"different": different(source, options.folder / "out")}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert-width", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--dtype", choices=[each.value for each in ExportType], default="fp8")
    parser.add_argument("--shard-mb", type=float, default=50.0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--step", choices=("make", "import", "export"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.step:
        found = run_step(options)
        print(json.dumps(found))
        return found
    with tempfile.TemporaryDirectory() as folder:
        options.folder = (options.folder or Path(folder)).absolute()
        found = measure(options)
    for name, value in found.items():
        print(f"{name:14} {value or 'none' if name in ('different', 'files') else f'{value / 1e6:,.1f} MB'}")
    return found


if __name__ == "__main__":
    sys.exit(bool(main().get("different")))
