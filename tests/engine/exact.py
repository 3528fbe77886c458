"""The scenarios in fp64, where two orders of a sum differ by 1e-15 of its terms: gradients of every rank, added up."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conf.thresholds import lowered
from parallel.layout import read_layout
from parallel.mesh import build_mesh
from tests.engine.scenario import any_experts, config_of, policy_batch, rows_of, share
from tests.ranks import run_ranks
from train.kernels.choice import build_kernels
from train.kernels.plain.plain_attention import PlainAttention
from train.loop.training_engine import Engine
from train.model.moe import Experts
from train.parallelize import build_rank_model
from train.prove.double import in_double
from train.prove.proof_rank import LocalGradients
from train.rank_parts import ParallelModel, RankSetup

LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "gspo", "kl")


def exact(folder: Path, name: str, *more: str, world: int = 1) -> dict[str, Tensor]:
    """Log-probabilities, losses, gradients and biases of one step by every loss, with replayed experts in the last."""
    run_ranks(_run, str(folder), name, more, world_size=world, timeout=150)
    found: dict[str, Tensor] = {}
    for rank in range(world):
        for key, tensor in load_file(folder / f"{name}_{rank}.safetensors").items():
            found[key] = tensor if key not in found else found[key] + tensor
    return found


def _run(rank: int, folder: str, name: str, more: tuple[str, ...]) -> None:
    config = config_of(*more)
    mesh = build_mesh(read_layout(config, config.parallel.world), timedelta(seconds=60))
    setup, found = RankSetup(torch.device("cpu"), mesh), {}
    with in_double(), lowered():
        kernels = build_kernels("cpu", config.cluster.compiled, PlainAttention())
        model = build_rank_model(config, mesh, setup.device, kernels, restored=True)
        local = LocalGradients(model.chunks)
        parts = ParallelModel(model.chunks, model.pipeline, model.dispatcher, model.precision, model.share, local)
        for key, weight, first, _ in weights_of(parts):
            with torch.no_grad():
                weight.copy_(drawn(key, weight, config.model.experts)[first : first + len(weight)])
        for key, router in parts.routers().items():
            router.bias_E.copy_(0.02 * drawn(key, router.bias_E, 0))
        engine = Engine(config, parts, setup)
        batch = policy_batch(config)
        mine = share(config, batch, mesh.dp_rank)
        logprobs = torch.zeros(batch.tokens_BS.shape)
        values = engine.logprobs(mine)
        if mesh.pp_rank == 0 and mesh.cp_rank == 0:
            logprobs[mesh.dp_rank * len(values) : (mesh.dp_rank + 1) * len(values)] = values
        found["logprobs"] = logprobs
        for number, loss in enumerate([*LOSSES, "ppo"]):
            given, terms = mine, ("biases",) if number % 2 else None
            if number == len(LOSSES):
                given, terms = share(config, replace(batch, experts_BTLK=any_experts(config)), mesh.dp_rank), None
            half = len(given.tokens_BS) // 2
            calls = [given]
            if half % config.micro_batch_size == 0 and config.parallel.pp == 1:
                calls = [rows_of(given, 0, half), rows_of(given, half, len(given.tokens_BS))]
            total = engine.count(calls)
            for one in calls:
                engine.forward_backward(one, loss, last=one is calls[-1], total=total, terms=terms)
            measured = engine.update().measured
            if mesh.rank == 0:
                found[f"loss.{number}"] = torch.tensor(
                    [measured.main_loss, *measured.mtp_losses, measured.balance_loss]
                )
            for key, weight, first, whole in weights_of(parts):
                gradient = torch.zeros(whole, *weight.shape[1:])
                if weight.grad is not None:
                    gradient[first : first + len(weight)] = weight.grad / mesh.layout.stage_ranks
                weight.grad = None
                found[f"gradient.{number}.{key}"] = found.get(f"gradient.{number}.{key}", 0) + gradient
            if mesh.stage_rank == 0:
                found |= {f"bias.{number}.{key}": router.bias_E.clone() for key, router in parts.routers().items()}
    save_file({key: tensor.contiguous() for key, tensor in found.items()}, f"{folder}/{name}_{rank}.safetensors")


def weights_of(parts: ParallelModel) -> Iterator[tuple[str, Tensor, int, int]]:
    """Name, weight, the first of its rows in the whole weight, and rows of that."""
    seen: set[int] = set()
    for chunk in parts.chunks:
        for prefix, module in chunk.named_modules():
            for name, weight in module.named_parameters(recurse=False):
                if id(weight) not in seen:
                    seen.add(id(weight))
                    experts = isinstance(module, Experts)
                    first, rows = (module.local.start, chunk.config.experts) if experts else (0, len(weight))
                    yield f"{prefix}.{name}", weight, first, rows


def drawn(name: str, like: Tensor, experts: int) -> Tensor:
    """Values of a whole weight, by its name alone; norms are near 1."""
    seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    shape = (experts, *like.shape[1:]) if ".experts." in name else like.shape
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 1 + 0.1 * values if "norm" in name else 0.08 * values if like.dim() > 1 else values


def worst(found: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest difference over the largest element of its tensor."""
    assert found.keys() == want.keys()
    scales = {key: tensor.abs().max().clamp_min(1e-6) for key, tensor in want.items()}
    return max(((found[key] - want[key]).abs().max() / scales[key]).item() for key in want)
