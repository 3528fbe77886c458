"""cluster.deterministic: makes the results of all runs on the same machines bitwise identical.

Each line has a reason why two runs may differ, and what prevents it:

    torch's kernels with atomic additions      torch.use_deterministic_algorithms replaces them or raises an error
    torch's attention in backward              flash and memory-efficient kernels are deterministic in that mode;
                                               cuDNN's kernel is not used
    cuBLAS with several streams                CUBLAS_WORKSPACE_CONFIG, which cuBLAS reads when CUDA starts
    NCCL's sums in the switches of NVLink      NCCL_NVLS_ENABLE=0; rings and trees add in a fixed order
    choice of matmuls by a timing (CPU)        the CPU's instruction sets decide (train/kernels/cpu/libraries.py)
    DeepEP, DeepGEMM                           the settings check refuses them (conf/check.py)

Sluice's own kernels do not use atomic additions (tests/kernels/test_deterministic.py).
"""

import os

from conf.errors import UserError

LIBRARY_VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"), "NCCL_NVLS_ENABLE": ("0",)}
"""Environment variables of CUDA and NCCL, with allowed values, the default first."""


def check_settings() -> None:
    """Raises UserError if a variable in LIBRARY_VARIABLES has a value that is not allowed."""
    for name, values in LIBRARY_VARIABLES.items():
        if os.environ.get(name, values[0]) not in values:
            raise UserError(
                name,
                os.environ[name],
                f"must be {' or '.join(values)} with cluster.deterministic=true",
                "unset it, or set cluster.deterministic=false",
            )


def repeat_bits() -> None:
    """Make all later computations of this process bitwise repeatable. Call this before CUDA starts.

    Raises UserError like `check_settings`.
    """
    import torch
    from torch.utils import deterministic

    check_settings()
    for name, values in LIBRARY_VARIABLES.items():
        os.environ.setdefault(name, values[0])
    torch.use_deterministic_algorithms(True)
    # Sluice never reads memory that it has not written, so torch need not fill it.
    deterministic.fill_uninitialized_memory = False  # pyrefly: ignore[missing-attribute]  torch sets the module's class at run time
    torch.backends.cudnn.benchmark = False
