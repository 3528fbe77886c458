"""One small model on ranks of any layout: some calls of an engine, and their results as tensors in files that a test
compares."""

import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conf.load import compose
from conf.micro_batches import share_of
from conf.schema import Config
from parallel.layout import read_layout
from parallel.mesh import build_mesh
from tests.ranks import run_ranks
from tests.small import MODEL
from train.data.batch import Batch
from train.kernels.choice import choose_kernels
from train.loop.live_model import LiveModel
from train.loop.state import RunState
from train.loop.training_engine import Engine
from train.parallelize import parallelize
from train.rank_parts import ParallelModel, RankSetup

SMALL = [
    *(f"model.{key}={value}" for key, value in MODEL.items()),
    *("precision=fp32", "steps=20", "seq_len=24", "batch_size=8", "micro_batch_size=1", "optim.warmup_steps=0"),
    *("cluster.threads=1", "cluster.device=cpu", "data.path=none", "log.wandb=disabled", "model.loss_chunk=16"),
]
LAYOUTS = {
    "dp2": (2, ["parallel.dp=2"]),
    "dp2_zero2": (2, ["parallel.dp=2", "parallel.zero=2"]),
    "ep2_zero3": (2, ["parallel.dp=2", "parallel.ep=2", "parallel.zero=3"]),
    "pp2_1f1b": (2, ["parallel.pp=2"]),
    "pp2_interleaved": (2, ["parallel.pp=2", "parallel.schedule=interleaved"]),
    "pp2_zbv": (2, ["parallel.pp=2", "parallel.schedule=zbv"]),
    "pp2_dualpipev": (2, ["parallel.pp=2", "parallel.schedule=dualpipev"]),
    "cp2": (2, ["parallel.cp=2", "micro_batch_size=2"]),
    "ep4_nodes": (4, ["parallel.dp=4", "parallel.ep=4", "parallel.dispatch=node_limited", "cluster.ranks_per_node=2"]),
    "pp2_dp2_ep2_again": (
        4,
        [
            *("parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.schedule=dualpipev"),
            "model.recompute=[norm,layer:2]",
        ],
    ),
    "pp2_cp2_zbv": (4, ["parallel.pp=2", "parallel.cp=2", "parallel.schedule=zbv", "micro_batch_size=2"]),
    "cp2_dp2_ep4_zero3": (
        4,
        ["parallel.cp=2", "parallel.dp=2", "parallel.ep=4", "parallel.zero=3", "micro_batch_size=2"],
    ),
}


def config_of(*more: str) -> Config:
    return compose(*SMALL, *more)


def policy_batch(config: Config, seed: int = 3) -> Batch:
    """Prompts and answers of unequal length for all ranks together, two samples in most sequences, with all tensors and some filling."""
    draw = torch.Generator().manual_seed(seed)
    shape = config.batch_size, config.seq_len + 1
    tokens_BS = torch.randint(config.model.vocab_size, shape, generator=draw)
    documents_BS = torch.full(shape, -1, dtype=torch.int32)
    supervised_BS = torch.zeros(shape, dtype=torch.bool)
    for row in range(shape[0]):
        first, second = 6 + row, 16 + row  # the end of each sample
        documents_BS[row, :first], documents_BS[row, first:second] = 0, 1
        supervised_BS[row, 3:first], supervised_BS[row, first + 2 : second - row % 3] = True, True
    advantages_BS = torch.where(documents_BS == 0, 0.7, -1.3)
    tensors = {
        "advantages": advantages_BS,
        "old_logprobs": -5.7 + 0.3 * torch.randn(shape, generator=draw),
        "ref_logprobs": -5.7 + 0.3 * torch.randn(shape, generator=draw),
        "temperatures": torch.full(shape, 0.8),
        "weights": 0.5 + torch.rand(shape, generator=draw),
    }
    return Batch(tokens_BS, documents_BS, supervised_BS, tensors)


def any_experts(config: Config, seed: int = 5) -> Tensor:
    """Experts for every token but the last of all ranks, inside the limit of groups."""
    model, draw = config.model, torch.Generator().manual_seed(seed)
    shape = config.batch_size, config.seq_len, model.layers - model.dense_layers
    groups = torch.rand(*shape, model.groups, generator=draw).argsort(-1)[..., : model.top_groups]
    size = model.experts // model.groups
    allowed = (groups.unsqueeze(-1) * size + torch.arange(size)).flatten(-2)
    order = torch.rand(allowed.shape, generator=draw).argsort(-1)[..., : model.top_k]
    return allowed.gather(-1, order)


def share(config: Config, batch: Batch, dp_rank: int) -> Batch:
    """The part of a data-parallel rank."""
    first, count = share_of(config, len(batch.tokens_BS), dp_rank)
    return rows_of(batch, first, first + count)


def rows_of(batch: Batch, first: int, end: int) -> Batch:
    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[first:end]

    tensors = {name: tensor[first:end] for name, tensor in batch.tensors.items()}
    tokens = batch.tokens_BS[first:end]
    documents, supervised = cut(batch.documents_BS), cut(batch.supervised_BS)
    return Batch(tokens, documents, supervised, tensors, cut(batch.experts_BTLK), cut(batch.keys_BTLK))


class Played:
    """One rank's engine and what it found, by name."""

    def __init__(self, config: Config, rank: int):
        self.config = config
        mesh = build_mesh(read_layout(config, config.parallel.world), timedelta(seconds=60))
        self.rank = RankSetup(torch.device("cpu"), mesh)
        kernels, _ = choose_kernels(config, self.rank.device)
        self.parts: ParallelModel = parallelize(config, mesh, self.rank.device, kernels)
        live = LiveModel(config, self.rank, self.parts.chunks, RunState(config, mesh, self.parts))
        self.engine = Engine(config, self.parts, self.rank, live)
        self.found: dict[str, Tensor] = {}
        self.parts.zero.observer = self._keep_gradients
        self._updates = 0

    def update(self) -> None:
        """A step at a rate of 0: the next has the same weights, so that no rounding grows over steps; biases move."""
        self._updates += 1
        outcome = self.engine.update(lr=0.0)
        assert outcome.update.applied
        measured = outcome.measured
        numbers = [measured.main_loss, *measured.mtp_losses, measured.balance_loss, outcome.update.grad_norm]
        if self.rank.mesh.rank == 0:
            self.found[f"numbers.{self._updates}"] = torch.tensor(numbers, dtype=torch.float64)
            self.found[f"loads.{self._updates}"] = measured.loads_LE
        if self.rank.mesh.stage_rank == 0:
            for name, router in self.parts.routers().items():
                self.found[f"bias.{self._updates}.{name}"] = router.bias_E.clone()

    def _keep_gradients(self, shards: dict) -> None:
        for name, shard in shards.items():
            whole = torch.full((math.prod(shard.shape),), torch.nan)
            whole[shard.offset : shard.offset + shard.local.numel()] = shard.local
            self.found[f"gradient.{self._updates}.{name}"] = whole


def play(folder: Path, name: str, act: Callable[[Played], None], *more: str, world: int = 1) -> dict[str, Tensor]:
    """Let every rank act, and put together what they found; of a tensor whose parts ranks hold, nan where a rank holds none."""
    run_ranks(_act, str(folder), name, act, more, world_size=world, timeout=120)
    found: dict[str, Tensor] = {}
    for rank in range(world):
        for key, tensor in load_file(folder / f"{name}_{rank}.safetensors").items():
            found[key] = tensor if key not in found else torch.where(tensor.isnan(), found[key], tensor)
    return found


def _act(rank: int, folder: str, name: str, act: Callable[[Played], None], more: tuple[str, ...]) -> None:
    played = Played(config_of(*more), rank)
    act(played)
    save_file({key: tensor.contiguous() for key, tensor in played.found.items()}, f"{folder}/{name}_{rank}.safetensors")


def worst_difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest difference of any tensor, over the largest element of that."""
    assert got.keys() == want.keys()
    assert not any(tensor.isnan().any() for tensor in (*got.values(), *want.values()))
    return max(
        ((got[key] - want[key]).abs().max() / want[key].abs().max().clamp_min(1e-3)).item()
        for key in want
        if want[key].numel()
    )
