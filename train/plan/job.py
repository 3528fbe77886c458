"""Facts about the planned job: devices, layout and pipeline actions."""

from dataclasses import replace
from functools import lru_cache

from conf.errors import UserError
from conf.micro_batches import most_micro_batches
from conf.schema import Config, Hardware
from parallel.layout import Layout, read_layout
from parallel.pipeline.orders import Action, schedule_actions
from parallel.pipeline.simulate import Program
from train.kernels.fp8.hopper import has_mx_tiles


def require_hardware(hardware: Hardware) -> None:
    """Raise UserError if no hardware description was chosen."""
    if hardware.name is None:
        raise UserError(
            "hardware",
            "none",
            "a plan needs the devices",
            "choose hardware=h800, h100, h200, b200, gb200_nvl72, b300, gb300_nvl72 or cpu (conf/hardware)",
        )


def require_host(config: Config) -> None:
    """Raise UserError if the recipe offloads state but the host memory is unknown."""
    hardware = config.hardware
    asked = ["parallel.offload_optimizer"] * config.parallel.offload_optimizer + ["model.offload"] * bool(
        config.model.offload
    )
    if not asked or device_kind(config) == "cpu" or hardware.host_memory_bytes:
        return
    raise UserError(
        "hardware.host_memory_bytes",
        0,
        f"{' and '.join(asked)} use the host's memory, which hardware={hardware.name} does not describe",
        "set hardware.host_memory_bytes (of a node), hardware.rates.host.bandwidth and hardware.rates.host_memory.bandwidth, or "
        f"leave out {' and '.join(asked)}",
    )


def can_offload(config: Config) -> bool:
    """Whether the plan can offload: on GPUs with known host memory."""
    return device_kind(config) == "cuda" and config.hardware.host_memory_bytes > 0


def device_kind(config: Config) -> str:
    """Returns cpu or cuda, from the hardware, the recipe or this machine."""
    if config.hardware.name is not None:
        return "cpu" if config.hardware.device == "cpu" else "cuda"
    if config.cluster.device == "auto":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.cluster.device


def device_memory(config: Config) -> int:
    """Returns a device's memory in bytes; if unknown, a rank's share of this machine's memory."""
    if config.hardware.memory_bytes:
        return int(config.hardware.memory_bytes)
    import psutil

    return psutil.virtual_memory().total // layout_of(config).ranks_per_node


def layout_of(config: Config) -> Layout:
    """Returns the layout of a recipe on the planned hardware."""
    return read_layout(config, min(config.parallel.world, config.hardware.devices_per_node))


def host_ranks(config: Config) -> int:
    """Returns the number of ranks that share a host's memory."""
    ranks = layout_of(config).ranks_per_node
    return min(config.hardware.devices_per_host or ranks, ranks)


def require_matmuls(config: Config) -> None:
    """Raise UserError if the devices cannot run the recipe's FP8 GEMMs."""
    fp8, hardware = config.precision.fp8, config.hardware
    if fp8 is None or has_mx_tiles(fp8) or "fprop_mxfp8" not in hardware.rates:
        return
    rule = f"has tiles of 128, which only Hopper supports: {hardware.device} supports tiles of 32, so a run would end at its start"
    raise UserError("precision.name", config.precision.name, rule, "choose precision=mxfp8 (or bf16)")


def with_nodes(config: Config) -> Config:
    """Returns the recipe with the planned number of ranks per node."""
    nodes = replace(config.cluster, ranks_per_node=layout_of(config).ranks_per_node)
    return replace(config, cluster=nodes)


def micro_batches_of(config: Config) -> int:
    """Returns a rank's largest number of micro-batches at the full batch size."""
    return most_micro_batches(config)


STEADY = 4
"""A step with this many rounds (groups of at least `pp` micro-batches) has the same memory peak as a longer step."""


def actions_of(config: Config, shortest: bool = False) -> list[list[Action]]:
    """Returns the actions of every pipeline rank in a step, in order.

    shortest: plan only enough micro-batches to find the memory peak.
    """
    count, pp = micro_batches_of(config), config.parallel.pp
    if shortest:
        count = min(
            count, STEADY * (count // max(1, count // pp))
        )  # a multiple of a round's micro-batches, because torch needs rounds of equal size
    return schedule_actions(
        config.parallel.schedule, pp, count, config.parallel.virtual_stages, config.parallel.overlap
    )


def program_of(config: Config, micro_batches: int | None = None) -> Program:
    """Returns the pipeline's actions as a `Program`. micro_batches: their number; None for a complete step."""
    parallel = config.parallel
    count = micro_batches or micro_batches_of(config)
    return _program(parallel.schedule, parallel.pp, count, parallel.virtual_stages, parallel.overlap)


@lru_cache(maxsize=64)
def _program(schedule: str, pp: int, micro_batches: int, virtual: int, overlap: bool) -> Program:
    return Program(schedule_actions(schedule, pp, micro_batches, virtual, overlap))
