"""Weights in and out again through every layout: masters are exact, and the folder that comes out is the one that went in.

Expected masters are made here by plain arithmetic from the folder's tensors; the folder itself is written and read by
safetensors' own functions.
"""

import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from conf.load import compose
from conf.run_paths import RunPaths
from conf.schema import Config, Model
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.shard import Shard
from tests.hf.small import FP8, random_tensors, read_folder, write_folder
from tests.ranks import run_ranks
from tests.small import MODEL, arguments
from train.checkpoint.checkpointer import Checkpointer
from train.data.tokenizer import Tokenizer, train_bpe
from train.export.run import export
from train.hf.tensor_names import tensors
from train.kernels.choice import build_kernels
from train.loop.hooks.averaged_weights import weight_averages
from train.loop.start import check_start, start_from
from train.loop.state import RunState
from train.parallelize import parallelize

torch.set_num_threads(1)

SHAPE = MODEL | {"hidden": 136, "dense_width": 144}  # ragged blocks at every edge
LAYOUTS = {
    "one": (1, []),
    "zero3": (2, ["parallel.dp=2", "parallel.zero=3"]),
    "zero2_ep2": (2, ["parallel.dp=2", "parallel.ep=2", "parallel.zero=2"]),
    "pp2_dp2_ep2": (4, ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2"]),
    "pp2_dualpipev": (2, ["parallel.pp=2", "parallel.schedule=dualpipev"]),
}
CASES = [
    ("one", "fp32"),
    ("zero3", "fp8"),
    pytest.param("zero2_ep2", "bf16", marks=pytest.mark.slow),
    ("pp2_dp2_ep2", "fp8"),
    ("pp2_dualpipev", "bf16"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe(["a small text with a few words in it"], 300))


def plain(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """fp32 values of a folder's weights, block by block."""
    values = {}
    for name, tensor in found.items():
        if name.endswith("_scale_inv"):
            continue
        values[name] = tensor.float()
        if name + "_scale_inv" in found:
            scale = found[name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            values[name] *= scale[: tensor.size(0), : tensor.size(1)]
    return values


def expected_masters(model: Model, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors, flat; put together by hand for the stacked ones, which train/hf/tensor_names.py would place."""
    values, ours = plain(found), {}
    for each in tensors(model):
        if each.whole == each.shape and not each.copy:
            ours[each.ours] = values[each.theirs].flatten()
    blocks = [(f"model.layers.{i}.", f"layers.{i}.") for i in range(model.layers)]
    blocks += [(f"model.layers.{model.layers + k}.", f"mtp.{k}.block.") for k in range(model.mtp_depth)]
    for index, (theirs, here) in enumerate(blocks):
        ffn = "mlp." if index < model.dense_layers else "mlp.shared_experts."
        name = "ffn.w13.weight" if index < model.dense_layers else "moe.shared.w13.weight"
        halves = [values[f"{theirs}{ffn}{half}_proj.weight"] for half in ("gate", "up")]
        ours[f"master.{here}{name}"] = torch.cat(halves).flatten()
        if index < model.dense_layers:
            continue
        experts = [
            [values[f"{theirs}mlp.experts.{e}.{part}_proj.weight"] for part in ("gate", "up", "down")] for e in range(8)
        ]
        ours[f"master.{here}moe.experts.w13"] = torch.stack([torch.cat(each[:2]) for each in experts]).flatten()
        ours[f"master.{here}moe.experts.w2"] = torch.stack([each[2] for each in experts]).flatten()
    return ours


def start_and_save(rank: int, config: Config, kind: str, tokenizer_json: str) -> None:
    parallel = config.parallel
    mesh = build_mesh(Layout(parallel.pp, parallel.dp, parallel.ep, 4), timedelta(seconds=60))
    parts = parallelize(config, mesh, torch.device("cpu"), build_kernels("cpu"))
    averages = weight_averages(config, parts.zero)
    state = RunState(config, mesh, parts, averages)
    tokenizer = Tokenizer(tokenizer_json)
    folder, notes = check_start(config, tokenizer)
    assert len(notes) == 1 and "has no tokenizer.json" in notes[0]
    start_from(config, folder, state)
    expected = expected_masters(config.model, random_tensors(config.model, kind))
    held = state.wanted({"has_ema": False})
    assert {name.split(".")[0] for name in held} == {"master", "bias", "exp_avg", "exp_avg_sq", "running"}
    for name, shard in held.items():
        if name.startswith(("master.", "bias.")):
            part = expected[name][shard.offset : shard.offset + shard.local.numel()]
            assert torch.equal(shard.local, part), name
        else:
            assert not shard.local.any(), name
    [kept] = [each.wanted() for each in averages]
    assert kept and all(torch.equal(a.local, held[f"master.{name[4:]}"].local) for name, a in kept.items())
    if parallel.zero < 3:  # the weights that the products use follow the masters
        name, param = next(iter(parts.chunks[-1].named_parameters()))
        assert torch.equal(param.detach().float().flatten(), expected[f"master.{name}"].to(param.dtype).float()), name
    paths = RunPaths(config)
    saver = Checkpointer(paths.checkpoints, rank=rank, world_size=mesh.layout.world, asynchronous=False, timeout=60)
    if mesh.layout.world > 1:
        torch.distributed.barrier()  # as a training's first step: rank 0 has removed what earlier attempts left
    meta = state.meta() | {"tokenizer": tokenizer.fingerprint, "seq_len": config.seq_len}
    saver.save(0, state.shards(), meta)
    saver.finish(required=True)
    if rank == 0:
        tokenizer.save(paths.path)


def same(out: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert out.keys() == found.keys()
    for name, tensor in found.items():
        assert out[name].dtype == tensor.dtype and out[name].shape == tensor.shape, name
        assert torch.equal(out[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_import_is_exact_and_export_gives_the_same_bits(tmp_path, tokenizer, layout, kind, monkeypatch):
    monkeypatch.setattr("train.export.run.SHARD_BYTES", 3e5)
    world, overrides = LAYOUTS[layout]
    model = Model(**SHAPE)
    found = random_tensors(model, kind)
    folder = write_folder(tmp_path / "in", model, found, **(FP8 if kind == "fp8" else {}))
    shape = [f"model.{key}={value}" for key, value in SHAPE.items()]
    base = arguments(tmp_path, "name=a", "precision=bf16", "optim.ema_decay=0.9", "micro_batch_size=1", *shape)
    config = compose(*base, f"init_from={folder}", *overrides)
    run_ranks(start_and_save, config, kind, tokenizer.json_text, world_size=world)

    out = tmp_path / "out"
    assert export(compose(*base, "mode=export", f"export.to={out}", f"export.dtype={kind}")) == 0
    same(read_folder(out), found)
    assert len(list(out.glob("*.safetensors"))) >= 3
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == found.keys()
    rows = json.loads((out / "export.json").read_text())["tensors"]
    assert {row["tensor"] for row in rows if row["tensor"]} == found.keys()
    left = {row["from"].split(".")[0] for row in rows if row["tensor"] is None}
    assert left == {"exp_avg", "exp_avg_sq", "ema", "running"}
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".out")] == []


@pytest.mark.slow
def test_other_types_and_averages(tmp_path, tokenizer):
    """fp32 gives the masters, bf16 their rounding; export.ema gives the averages, which here are twice the weights."""
    model = Model(**MODEL)
    found = random_tensors(model, "fp32")
    folder = write_folder(tmp_path / "in", model, found)
    base = arguments(tmp_path, "name=a", "optim.ema_decay=0.9")
    run_ranks(start_and_save, compose(*base, f"init_from={folder}"), "fp32", tokenizer.json_text, world_size=1)
    double_averages(RunPaths(compose(*base)).checkpoints)
    for dtype, ema in (("bf16", False), ("fp32", True)):
        out = tmp_path / f"out_{dtype}"
        export(compose(*base, "mode=export", f"export.to={out}", f"export.dtype={dtype}", f"export.ema={ema}"))
        exported = read_folder(out)
        for name, tensor in found.items():
            if name.endswith("e_score_correction_bias"):
                assert torch.equal(exported[name], tensor)
            else:
                assert torch.equal(exported[name], tensor * 2 if ema else tensor.bfloat16()), name


def double_averages(checkpoints: Path) -> None:
    """Write the newest checkpoint again, with averages that differ from the weights."""
    from tests.checkpoint.world import checkpointers, save
    from train.checkpoint.manifest import newest_intact, read_manifest
    from train.checkpoint.read_shards import TORCH, load_shards

    manifest = read_manifest(newest_intact(checkpoints).path)
    shards = {}
    for name, entry in manifest.tensors.items():
        count = sum(size for *_, size in entry.intervals)
        shards[name] = Shard(torch.empty(count, dtype=TORCH[entry.dtype]), 0, entry.shape)
    load_shards(manifest.folder, shards)
    for name, shard in shards.items():
        if name.startswith("ema."):
            shard.local.mul_(2)
    meta = {key: value for key, value in manifest.meta.items() if key != "step"}
    save(checkpointers(checkpoints, 1, attempt=manifest.attempt + 1), 1, [shards], **meta)
