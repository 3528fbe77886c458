"""Changes DeepSpeed before Sluice builds its engine on it. Checked against DeepSpeed 0.19.8 and 0.19.9.

    sys.modules            Two unused Muon modules are empty. DeepSpeed's versions import torch's whole compiler
                           (0.9 s of a core).
    __compatible_ops__     On CPU, DeepSpeed's shared-memory collectives are off: their build takes two minutes and
                           sometimes aborts.
    environment            DS_ACCELERATOR, LOCAL_SIZE and LOCAL_RANK are set. Otherwise DeepSpeed searches for an
                           accelerator, starts numactl for every bucket of gradients, and puts stage 3's weights on
                           another device.
    groups' tables         Sluice's expert groups are added under the name that marks their parameters.
    DeepSpeedEngine        `has_moe_layers` says whether this rank holds sharded experts. The check of the optimizer's
                           type accepts Sluice's optimizers. The check of experts at stage 3 is skipped.

whole_weights.py and sharded_weights.py describe their changes to one DeepSpeed optimizer each.
"""

import logging
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from parallel.mesh import Mesh
from parallel.zero.private_names import require_names

DEEPSPEED_MUON = ("muon_optimizer", "original_muon")
"""Names of DeepSpeed's Muon modules that are replaced by empty modules."""


def import_deepspeed(on_cuda: bool) -> types.ModuleType:
    """Import DeepSpeed without log messages and, on CPU, without slow steps (see the top of the file)."""
    if not on_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ["LOCAL_SIZE"] = "1"
    os.environ["LOCAL_RANK"] = str(torch.cuda.current_device()) if on_cuda else "0"
    import deepspeed
    import deepspeed.ops

    # DeepSpeed warns about settings that Sluice chooses on purpose.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not on_cuda:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name in DEEPSPEED_MUON:
        module = types.ModuleType(f"deepspeed.runtime.zero.muon.{name}")
        module.__getattr__ = _unused_class  # pyrefly: ignore[bad-assignment]  a module attribute (PEP 562)
        sys.modules.setdefault(module.__name__, module)
    return deepspeed


def _unused_class(name: str) -> type:
    """Return a placeholder for any class that is imported from an emptied module."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def tell_groups(deepspeed: types.ModuleType, mesh: Mesh) -> None:
    """Register Sluice's expert groups in DeepSpeed's tables."""
    groups = deepspeed.utils.groups
    require_names(module=groups)
    name, layout, rank = f"ep_size_{mesh.layout.ep}", mesh.layout, mesh.rank
    groups._EXPERT_PARALLEL_GROUP[name] = mesh.ep_group
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.edp_group
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = next(g for g in layout.edp_groups() if rank in g)


@contextmanager
def own_engine(deepspeed: Any, has_experts: bool) -> Iterator[None]:
    """Make `deepspeed.initialize` build a `PatchedEngine` inside the block.

    has_experts: whether this rank holds sharded experts.
    """
    from deepspeed.runtime.engine import ZERO_OPTIMIZATION

    require_names(engine=deepspeed.DeepSpeedEngine)

    class PatchedEngine(deepspeed.DeepSpeedEngine):
        has_moe_layers = property(lambda self: has_experts, lambda self, found: None)

        def _do_optimizer_sanity_check(self, basic_optimizer) -> str:
            return ZERO_OPTIMIZATION

        def _validate_zero3_moe_compatibility(self) -> None:
            """Skip DeepSpeed's check, which refuses experts that are not deepspeed.moe.MoE."""

    original, deepspeed.DeepSpeedEngine = deepspeed.DeepSpeedEngine, PatchedEngine
    try:
        yield
    finally:
        deepspeed.DeepSpeedEngine = original


class MeshAsMpu:
    """Returns DeepSpeed's process groups. A pipeline is DeepSpeed's "model parallel" group."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

    def get_data_parallel_group(self):
        return self.mesh.stage_group

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.layout.stage_ranks

    def get_data_parallel_rank(self) -> int:
        return self.mesh.stage_rank

    def get_model_parallel_group(self):
        return self.mesh.stages_group

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.layout.pp

    def get_model_parallel_rank(self) -> int:
        return self.mesh.pp_rank

    def get_tensor_model_parallel_rank(self) -> int:
        return 0

    def get_tensor_model_parallel_world_size(self) -> int:
        return 1
