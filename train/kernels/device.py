"""Checks that torch and Triton can use the GPU, and configures torch's allocator and its recorder of collectives."""

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from conf.errors import UserError
from conf.schema import Config
from train.kernels.gpu.host_compiler import require_for_triton

if TYPE_CHECKING:
    import torch

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""torch's environment variables for its allocator: current name, older name."""
FLIGHTS = "flight_recorder_rank_"
"""Prefix of the file with a rank's last collectives, before the rank's index."""
GPUS = ("/dev/nvidia[0-9]*", "/dev/dxg")
"""Patterns of NVIDIA's device files, on Linux and on Windows (WSL)."""


def check_memory(config: Config, state_bytes: int) -> None:
    """Raise UserError if the ranks on this machine's CPU lack memory for weights and optimizer state."""
    if config.cluster.backend == "ray" or (config.cluster.device != "cpu" and gpu_files()):
        return
    total = psutil.virtual_memory().total
    if state_bytes > total:
        raise UserError(
            "cluster.device",
            config.cluster.device,
            f"the ranks run on this machine's CPU, and its {total / 1e9:.0f} GB of memory do not hold weights and optimizer state, "
            f"{state_bytes / 1e9:.0f} GB",
            "mode=plan predicts the machines that the job needs; conf=tiny fits this machine",
        )


def usable_gpu(wanted: str) -> bool:
    """Returns whether runs can use a GPU. wanted: the value of cluster.device, auto or cuda.

    Raises UserError like `sees_gpu`, and if Triton cannot start kernels on the GPU.
    """
    if not sees_gpu(wanted):
        return False
    require_for_triton(wanted)
    return True


def sees_gpu(wanted: str) -> bool:
    """Returns whether torch can use a GPU. Does not check Triton.

    Raises UserError if torch cannot, and one of these holds:
    - cluster.device requires a GPU.
    - The machine has a GPU, and torch is built with CUDA.
    """
    import torch

    if torch.cuda.is_available():
        return True
    if wanted == "cuda":
        rule = f"needs a CUDA device that torch can use: {_why_not()}"
        raise UserError("cluster.device", wanted, rule, "install the named part, or use cluster.device=cpu")
    if gpu_files() and torch.version.cuda is not None and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        rule = f"finds {', '.join(gpu_files())}, which torch cannot use: {_why_not()}"
        cure = "update the driver, install a suitable build of torch, or set cluster.device=cpu"
        raise UserError("cluster.device", wanted, rule, cure)
    return False


def idle_gpu(config: Config, device: "torch.device") -> str | None:
    """Returns a note for the user if torch lacks CUDA for the machine's GPU."""
    import torch

    if device.type == "cpu" and config.cluster.device == "auto" and gpu_files() and torch.version.cuda is None:
        return f"this machine has a GPU, and torch {torch.__version__} is built without CUDA: the run uses the CPU"
    return None


def grow_segments() -> None:
    """Let torch's allocator extend its segments, unless the user has configured it. Call this before CUDA allocates
    memory.

    Experts' row counts change in each step and would fragment fixed segments.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def bind_to_numa_node(device: "torch.device", folder: Path = Path("/sys")) -> None:
    """Let all later threads of this process run only on the cores of the GPU's NUMA node.

    The host optimizer and copies to the GPU are slower with another node's memory. Does nothing if the node is unknown,
    or if the process may use none of its cores.
    """
    import torch

    gpu: Any = torch.cuda.get_device_properties(device)  # torch's type stubs lack the PCI address
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    try:
        node = int((folder / f"bus/pci/devices/{address}/numa_node").read_text())
        text = (folder / f"devices/system/node/node{node}/cpulist").read_text()
    except (OSError, ValueError):  # a machine without NUMA, or a container without /sys
        return
    ranges = [part.split("-") for part in text.strip().split(",") if part]
    cores = {core for ends in ranges for core in range(int(ends[0]), int(ends[-1]) + 1)}
    if allowed := cores & os.sched_getaffinity(0):
        os.sched_setaffinity(0, allowed)


def record_collectives(logs: Path) -> None:
    """Make every rank record its last 2000 collectives.

    When a collective times out, the rank writes them to logs/flight_recorder_rank_N. torch 2.11 to 2.13 reads the
    environment variables set here when it creates a process group. The user's values stay.
    """
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    if "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in os.environ:
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(logs / FLIGHTS))
        logs.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def gpu_files() -> list[str]:
    return sorted(path for pattern in GPUS for path in glob.glob(pattern))


def _why_not() -> str:
    """Returns the reason why torch cannot use a GPU."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built only for CPUs"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return "it finds no device"
