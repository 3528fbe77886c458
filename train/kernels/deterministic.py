"""cluster.deterministic: bitwise identical results in every run on the same machines.

Sources of differences between two runs, and the measures against them:

    torch's kernels with atomic additions      torch.use_deterministic_algorithms, which replaces them or raises an error
    torch's attention in backward              flash and memory-efficient kernels are deterministic in that mode; cuDNN's is excluded
    cuBLAS with several streams                CUBLAS_WORKSPACE_CONFIG, read when CUDA starts
    NCCL's sums in the switches of NVLink      NCCL_NVLS_ENABLE=0; rings and trees add in an order that the layout fixes
    choice of matmuls by a timing (CPU)        chosen by the CPU's instruction sets (train/kernels/cpu/libraries.py)
    DeepEP, DeepGEMM                           refused (conf/check.py)

Sluice's own kernels, in Triton and C++, use no atomic additions. Each result belongs to one program or thread. A second
kernel adds partial sums of several programs in a fixed order. tests/kernels/test_deterministic.py searches for atomic
additions.
"""

import os

from conf.errors import UserError

LIBRARY_VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"), "NCCL_NVLS_ENABLE": ("0",)}
"""Environment variables that libraries read when CUDA or NCCL starts, with the allowed values, the best value first."""


def check_settings() -> None:
    """Raises UserError if one of these environment variables has another value."""
    for name, values in LIBRARY_VARIABLES.items():
        if os.environ.get(name, values[0]) not in values:
            raise UserError(
                name,
                os.environ[name],
                f"must be {' or '.join(values)} with cluster.deterministic=true",
                "unset it, or set cluster.deterministic=false",
            )


def repeat_bits() -> None:
    """Make all later computations of this process bitwise repeatable. Call before CUDA starts. Raises UserError like
    `check_settings`."""
    import torch
    from torch.utils import deterministic

    check_settings()
    for name, values in LIBRARY_VARIABLES.items():
        os.environ.setdefault(name, values[0])
    torch.use_deterministic_algorithms(True)
    # Every value is written before it is read; filling new memory would cost a pass over it.
    deterministic.fill_uninitialized_memory = False  # pyrefly: ignore[missing-attribute]  torch sets the module's class at run time
    torch.backends.cudnn.benchmark = False
