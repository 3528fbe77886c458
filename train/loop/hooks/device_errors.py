"""Explains errors of the device and of NCCL on one screen: the failed operation, its layer, and the fix.

The layer is found in the frames of the error's traceback:
- In a forward pass, the variable `self` of a frame is the module.
- In a backward pass, a weight among the variables of a frame shows the layer.
- torch's own backward operations have no Python frame, so the text names only the stage.
"""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conf.errors import RunEnded, causes
from conf.files import open_plain
from conf.schema import SELECTIVE, Config, Recompute
from conf.words import harmless
from parallel.pipeline.host_store import HostMemoryFull
from train.kernels.device import FLIGHTS
from train.metrics.quantities import gib

CPU_MEMORY = "DefaultCPUAllocator: can't allocate memory"
NCCL = "NCCL error"
NO_MEMORY = re.compile(r"Cuda failure[^\n]*out of memory|Failed to CUDA (c|m)alloc")
"""Matches the messages with which NCCL reports that it cannot allocate its buffers."""
LESS_ON_HOST = "a smaller model.offload (layer:N, attention, ffn), a smaller micro_batch_size, or more ranks of a pipeline (parallel.pp); mode=plan predicts the memory of a node"
PHASES = {
    "forward_one_chunk": "forward",
    "run_forward": "forward",
    "backward_one_chunk": "backward",
    "run_backward": "backward",
    "backward_weight_one_chunk": "backward of weights",
    "held_out_loss": "validation",
    "parallelize": "building of the model",
    "restore": "reading of a checkpoint",
    "_save": "saving",
    "_copy": "copying of the state",
}
"""Maps the name of a function to the phase of a step in which the function runs.

If several frames of a traceback have such names, the innermost frame decides.
"""
UPDATE = ("step", "Zero"), ("accumulate", "WholeWeights"), ("accumulate", "ShardedWeights")
"""Functions that run after the last backward pass: pairs of function name and class name."""
SHOWN_CHARACTERS = 400
"""Maximum number of characters that are quoted from a library's message."""


class ExplainedError(RunEnded):
    """An error of the device or the network. A file in the log folder contains its traceback."""


@contextmanager
def raise_explained(config: Config, rank: int, logs: Path) -> Iterator[None]:
    """Returns a context that raises `ExplainedError` for out-of-memory and NCCL errors.

    It also writes the traceback and the summary of torch's allocator to a file in `logs`.
    """
    try:
        yield
    except Exception as error:
        text = _explain(config, error)
        if text is None:
            raise
        file = logs / f"rank_{rank}.explained.txt"
        raise ExplainedError(f"{text}\n  written: {file}" if _write(file, error) else text) from error


def _explain(config: Config, error: Exception) -> str | None:
    """Returns the explanation of an out-of-memory or NCCL error, with the headline first; None for any other error."""
    chain = list(causes(error, contexts=True))
    for one in chain:
        said = str(one)
        if isinstance(one, HostMemoryFull):
            return "\n".join([f"out of the host's memory{_place(chain)}", *_memory(said), f"  cure: {LESS_ON_HOST}"])
        if isinstance(one, torch.OutOfMemoryError) or (isinstance(one, RuntimeError) and CPU_MEMORY in said):
            return "\n".join([f"out of memory{_place(chain)}", *_memory(said), f"  cure: {_lighter(config)}"])
        if isinstance(one, RuntimeError) and NCCL in said and NO_MEMORY.search(said):
            head = f"NCCL found no memory for a communicator{_place(chain)}"
            return "\n".join([head, *_memory(said), f"  cure: leave memory for it: {_lighter(config)}"])
        if isinstance(one, dist.DistBackendError) and NCCL in said:
            return "\n".join([f"NCCL failed{_place(chain)}", f"  NCCL: {_words(said)}", f"  cure: {_network(said)}"])
    return None


def _place(chain: list[BaseException]) -> str:
    """Returns text that names the layer, the phase and the pipeline stage of an error, as far as known."""
    frames = [frame for error in chain for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]
    modules, weights = _names(frames)
    layer = next((name for frame in frames if (name := _layer(frame, modules, weights))), None)
    phase, stage = _phase(frames)
    if layer is None:
        return f" in the {phase}{stage}" if phase else ""
    return f" in {layer}, {phase}{stage}" if phase else f" in {layer}"


def _names(frames: list[FrameType]) -> tuple[dict[int, str], dict[int, str]]:
    """Returns the names of the modules in a traceback's frames, as two maps: by id of module, by address of weight."""
    modules: dict[int, str] = {}
    weights: dict[int, str] = {}
    for frame in frames[::-1]:
        own = frame.f_locals.get("self")
        root = own if isinstance(own, nn.Module) else getattr(own, "submod", None)
        if not isinstance(root, nn.Module) or id(root) in modules:
            continue
        for name, module in root.named_modules():
            modules.setdefault(id(module), name)
            for param in module.parameters(recurse=False):
                if param.numel():  # with ZeRO 3 a parameter may have no memory
                    weights.setdefault(param.data_ptr(), name)
    return modules, weights


def _layer(frame: FrameType, modules: dict[int, str], weights: dict[int, str]) -> str | None:
    """Returns the name of the module that a frame belongs to, or None."""
    own = frame.f_locals.get("self")
    if isinstance(own, nn.Module):
        return modules.get(id(own)) or None  # the chunk is the root module, whose name is empty
    tensors = (value for value in frame.f_locals.values() if isinstance(value, Tensor))
    with suppress(RuntimeError):  # `data_ptr` fails for a tensor without storage
        return next((weights[one.data_ptr()] for one in tensors if one.numel() and one.data_ptr() in weights), None)
    return None


def _phase(frames: list[FrameType]) -> tuple[str, str]:
    """Returns the phase of the step, and a text that names the pipeline stage. Both are empty if unknown."""
    for frame in frames:
        function, own = frame.f_code.co_name, frame.f_locals.get("self")
        if function in PHASES:
            stage = getattr(own, "stage_index", None)
            return PHASES[function], "" if stage is None else f" of stage {stage}"
        if (function, type(own).__name__) in UPDATE:
            return "reduction of gradients or the update of weights", ""
    return "", ""


def _memory(said: str) -> list[str]:
    """Returns lines about the memory that was requested and, on a GPU, about how the GPU's memory is used."""
    lines = [f"  requested: {_words(said)}"]
    if torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        used, kept = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        lines.append(
            f"  memory: {gib(used)} in tensors (most {gib(torch.cuda.max_memory_allocated())}), {gib(kept - used)} cached by torch's allocator, {gib(total - free - kept)} other (CUDA, NCCL), {gib(free)} free of {gib(total)}"
        )
    return lines


def _words(said: str) -> str:
    """Returns a library's message as one line."""
    line = " ".join(said.split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]} ..."


def _lighter(config: Config) -> str:
    """Suggests changes to the recipe that reduce the memory of a run."""
    parallel, model = config.parallel, config.model
    changes = []
    if config.micro_batch_size > 1:
        changes.append(f"micro_batch_size={config.micro_batch_size // 2} (now {config.micro_batch_size})")
    missing = [what for what in SELECTIVE if what not in model.recompute]
    if missing:
        changes.append(f"'model.recompute=[{','.join(SELECTIVE)}]' ({', '.join(missing)} missing)")
    elif model.repeated_layers < model.layers:
        changes.append(f"'model.recompute=[{','.join(Recompute)}]' (layer is missing: recomputes whole layers)")
    if torch.cuda.is_initialized() and not model.offload and model.repeated_layers < model.layers:
        changes.append("'model.offload=[layer]' (stores activations in the host's memory)")
    changes.append(f"a smaller model.loss_chunk (now {model.loss_chunk})")
    if parallel.pp == 1 and parallel.dp > 1 and parallel.zero < 3:
        changes.append(f"parallel.zero={parallel.zero + 1} (now {parallel.zero})")
    changes.append(f"more ranks (parallel.pp={parallel.pp}, dp={parallel.dp}, ep={parallel.ep})")
    return "one of these changes; mode=plan predicts which one fits:" + "".join(
        f"\n        - {change}" for change in changes
    )


def _network(said: str) -> str:
    if "Duplicate GPU" in said or "ncclInvalidUsage" in said:
        return "each rank needs its own GPU: start at most one rank per GPU"
    if "ncclUnhandledCudaError" in said:
        return "a rank's GPU failed: dmesg shows its Xid, and CUDA_LAUNCH_BLOCKING=1 shows the call"
    if "timed out" in said.lower() or "timeout" in said.lower():
        return f"a rank did not join within cluster.timeout; torchfrtrace reads logs/{FLIGHTS}N"
    return "if a rank ended first, it is the cause; otherwise check the network: NCCL_DEBUG=INFO shows more, and NCCL_SOCKET_IFNAME selects the interface"


def _write(file: Path, error: Exception) -> bool:
    """Write the traceback and the summary of torch's allocator to the file. Returns whether that succeeded."""
    parts = ["".join(traceback.format_exception(error))]
    if torch.cuda.is_initialized():
        parts.append(torch.cuda.memory_summary())
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "w", opener=open_plain) as opened:
            opened.write(harmless("\n".join(parts)))
    except OSError:
        return False
    return True
