"""Checks torch, Triton and the FP8 GEMMs on the GPU, before the run reads data."""

import importlib.util
import os
from datetime import timedelta
from typing import TYPE_CHECKING

from cluster.place import Place
from conf.errors import UserError
from conf.schema import Config
from train.kernels.device import gpu_files, usable_gpu
from train.kernels.fp8.hopper_probe import probe

if TYPE_CHECKING:
    import torch

PROBED = "SLUICE_PROBED"
"""Environment variable with the FP8 recipe that passed the probe."""
PROBE_PATIENCE = timedelta(hours=1)
"""Longest time that ranks wait for their machine's probe."""


def check_gpu(config: Config) -> None:
    """Check the GPU in the driver process, if the driver starts the ranks on its own machine. Raises UserError.

    With cluster=ray, the ranks check their own machines.
    """
    wanted, fp8 = config.cluster.device, config.precision.fp8
    if wanted == "cpu" or config.cluster.backend == "ray" or not (wanted == "cuda" or gpu_files()):
        return
    if not usable_gpu(wanted):
        return
    require_dispatch(config)
    if fp8 is not None and os.environ.get(PROBED) != str(fp8):
        probe(config)
        os.environ[PROBED] = str(fp8)


def require_dispatch(config: Config) -> None:
    """Raises UserError if the package for parallel.dispatch is not installed."""
    package = config.parallel.dispatch_facts.package
    if package is not None and config.parallel.ep > 1 and importlib.util.find_spec(package) is None:
        rule = f"needs the package {package}, which is not installed"
        cure = "build it from github.com/deepseek-ai/DeepEP, or set parallel.dispatch=node_limited"
        raise UserError("parallel.dispatch", config.parallel.dispatch, rule, cure)


def probe_in_turn(config: Config, place: Place, device: "torch.device") -> None:
    """Test the FP8 GEMMs on every machine's first rank, while others wait. A failure raises on all ranks."""
    fp8 = config.precision.fp8
    if device.type == "cuda":
        require_dispatch(config)
    if device.type != "cuda" or fp8 is None or os.environ.get(PROBED) == str(fp8):
        return
    from parallel.exchange import gather, patient_group

    refused = None
    with patient_group(PROBE_PATIENCE) as everybody:
        if place.local_rank == 0:
            try:
                probe(config, device.index)
            except UserError as error:
                refused = [str(part) for part in error.args]
        everyone = gather(refused, everybody)
    for rank, args in enumerate(everyone):
        if args is not None:
            field, value, rule, cure = args
            raise UserError(field, value, rule if place.world == 1 else f"{rule}\n        seen by: rank {rank}", cure)
