"""cluster.deterministic: the same bits in every run on the same machines.

What could make two runs differ, and what is done about it:

    torch's kernels that add atomically        torch.use_deterministic_algorithms, which takes others or raises an error
    torch's attention in backward              flash and memory-efficient kernels repeat themselves in that mode; cuDNN's is left out
    cuBLAS with several streams                CUBLAS_WORKSPACE_CONFIG, read when CUDA starts
    NCCL's sums in the switches of NVLink      NCCL_NVLS_ENABLE=0; rings and trees add in an order that the layout fixes
    products chosen by a measurement (CPU)     chosen by what the CPU says that it has (train/kernels/cpu/libraries.py)
    DeepEP, DeepGEMM                           refused (conf/check.py)

Our own kernels, in Triton and in C++, add nothing atomically: a program or a thread owns each result, and what several have a part
in is added up by a second kernel in a fixed order. tests/kernels/test_deterministic.py looks for one that does.
"""

import os

from conf.errors import UserError

LIBRARY_VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"), "NCCL_NVLS_ENABLE": ("0",)}
"""Variables of the environment that libraries read when CUDA or NCCL starts, with the values that will do, the best first."""


def check_settings() -> None:
    """Raises UserError for a variable of the environment that is set otherwise."""
    for name, values in LIBRARY_VARIABLES.items():
        if os.environ.get(name, values[0]) not in values:
            raise UserError(
                name,
                os.environ[name],
                f"must be {' or '.join(values)} with cluster.deterministic=true",
                "unset it, or leave cluster.deterministic at false",
            )


def repeat_bits() -> None:
    """Make all that this process computes from here on repeat in every bit. Call before CUDA starts. Raises UserError
    as `check_settings` does.
    """
    import torch
    from torch.utils import deterministic

    check_settings()
    for name, values in LIBRARY_VARIABLES.items():
        os.environ.setdefault(name, values[0])
    torch.use_deterministic_algorithms(True)
    # What is read was written: filling it would cost a pass over memory.
    deterministic.fill_uninitialized_memory = False  # pyrefly: ignore[missing-attribute]  torch sets the module's class at run time
    torch.backends.cudnn.benchmark = False
