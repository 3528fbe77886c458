"""Peak memory of this process."""

import resource

import torch


def peak_memory(device: torch.device) -> int:
    """Bytes: most CUDA memory allocated at a time, or on CPU the largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
