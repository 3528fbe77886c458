"""Every private name of DeepSpeed that this folder touches, and why: the one place to read before DeepSpeed is upgraded.

A name is private where DeepSpeed's own documentation promises nothing about it. `require_names` holds the list against the
installed version when a rank starts, and tests/zero/test_private_names.py against what the files of this folder really use.
"""

import inspect
import sys
from functools import cache
from importlib.metadata import version
from typing import NamedTuple

from conf.errors import UserError


class PrivateName(NamedTuple):
    """owner: what has the name, see `require_names`. is_fast: without it the result would be the same, only later."""

    owner: str
    name: str
    why: str
    is_fast: bool = False


PRIVATE_NAMES = (
    # deepspeed.utils.groups, and what marks experts' weights
    PrivateName(
        "module", "_EXPERT_PARALLEL_GROUP", "our expert groups, over which stage 3 takes the mean of gradients"
    ),
    PrivateName("module", "_EXPERT_DATA_PARALLEL_GROUP", "the ranks over which experts' gradients are summed"),
    PrivateName("module", "_EXPERT_DATA_PARALLEL_GROUP_RANKS", "the same as numbers of ranks, for broadcasts"),
    PrivateName("param", "ds_zero_placement_family", "stage 3 knows experts' weights by this"),
    PrivateName("param", "ds_zero_partition_group_name", "and their group by this"),
    PrivateName(
        "param", "ds_zero_partition_process_group", "the same where a weight is sharded before the engine is made"
    ),
    # DeepSpeedEngine
    PrivateName("engine", "has_moe_layers", "experts are known by their marked weights, not by deepspeed.moe.MoE"),
    PrivateName(
        "engine", "_do_optimizer_sanity_check", "else bf16 with fp32 gradients takes BF16_Optimizer at stage 1"
    ),
    PrivateName("constant", "ZERO_OPTIMIZATION", "its answer: ZeRO's own optimizer"),
    PrivateName("engine", "_validate_zero3_moe_compatibility", "would refuse experts that are not deepspeed.moe.MoE"),
    PrivateName("import", "__compatible_ops__", "without its own CPU collectives, which have been seen to abort"),
    # stages 1 and 2: DeepSpeedZeroOptimizer
    PrivateName(
        "optimizer12", "scaled_global_norm", "one norm over all ranks; its own waits for ranks without experts"
    ),
    PrivateName("optimizer12", "check_overflow", "the same; the norm tells what is not finite"),
    PrivateName("optimizer12", "averaged_gradients", "what the norm is taken over"),
    PrivateName("optimizer12", "use_grad_accum_attribute", "gradients stay in `.grad`, which is fp32 already"),
    PrivateName(
        "optimizer12", "_gradient_reduction_buffer_dtype", "else fp32 gradients are rounded to bf16 in the bucket"
    ),
    PrivateName("optimizer12", "unscale_and_clip_grads", "the optimizer clips as it reads the gradients", True),
    PrivateName("import", "GradPartitionBufferGroup", "gradients that need no reduction are not copied", True),
    PrivateName("optimizer12", "update_lp_params", "makes the weights the rounded masters after loading"),
    PrivateName(
        "offload12", "temp_grad_buffer_for_gpu_offload", "as large as the largest weight, and never used", True
    ),
    # stage 3: DeepSpeedZeroOptimizer_Stage3 and its coordinator of gathers
    PrivateName("optimizer3", "_grad_acc_hooks", "take gradients as they come, which mixes up weights between ranks"),
    PrivateName("optimizer3", "_leaf_module_hooks", "the same"),
    PrivateName(
        "optimizer3", "reduce_independent_p_g_buckets_and_remove_grads", "hands one gradient over, in our order"
    ),
    PrivateName("optimizer3", "independent_gradient_partition_epilogue", "reduces what is left of a micro-batch"),
    PrivateName("optimizer3", "micro_step_id", "0 overwrites the sum over micro-batches, 1 adds to it"),
    PrivateName("optimizer3", "_get_norm_groups", "one norm over all ranks"),
    PrivateName(
        "optimizer3", "fp32_partitioned_groups_flat", "the masters, whose moments are made before the first step"
    ),
    PrivateName("optimizer3", "fp16_groups", "whose weights lie in which of these"),
    PrivateName("param3", "ds_tensor", "this rank's shard of a weight"),
    PrivateName("optimizer3", "parameter_offload", "has the coordinator"),
    PrivateName("offload", "get_param_coordinator", "the coordinator of gathers"),
    PrivateName("coordinator", "reset_step", "the chunk is called itself: a pass begins"),
    PrivateName("coordinator", "release_backward_leftovers", "weights of modules whose input has no gradient"),
    PrivateName(
        "coordinator", "_clean_inflight_param_registry", "weights fetched ahead for a backward that does not come"
    ),
)


def require_names(**owners: object) -> None:
    """Raise UserError where the installed DeepSpeed lacks a listed name of these owners: module (deepspeed.utils.groups), engine
    (DeepSpeedEngine), optimizer12, offload12 (the same with offload) and optimizer3 (the two optimizers, built), param3 (a weight at stage 3) and
    coordinator. The other owners of the list fail as they are imported or called.
    """
    missing = [one for one in PRIVATE_NAMES if one.owner in owners and not _has(owners[one.owner], one.name)]
    if missing:
        raise UserError(
            "deepspeed",
            version("deepspeed"),
            f"lacks {', '.join(one.name for one in missing)}: {missing[0].why}",
            "install a version within the range that pyproject.toml names",
        )


def _has(owner: object, name: str) -> bool:
    """Whether an object has the name, or the module of a class gives it to objects: to find the class alone in there takes 0.2 s."""
    return hasattr(owner, name) or (isinstance(owner, type) and f"self.{name} =" in _source(owner.__module__))


@cache
def _source(module: str) -> str:
    return inspect.getsource(sys.modules[module])
