"""Lists every private name of DeepSpeed that this folder uses, with the reason. Read this file before a DeepSpeed
upgrade.

`require_names` compares the list with the installed version when a rank starts. tests/zero/test_private_names.py
compares it with the code.

A second list names behaviour of DeepSpeed that Sluice's code imitates, such as the sizes of buffers in a plan. Each
entry has hashes of DeepSpeed's functions. If tests/zero/test_copied_behaviour.py finds another hash, read the function
again, correct Sluice's code if necessary, and write the new hash here.
"""

import inspect
import sys
from functools import cache
from importlib.metadata import version
from typing import NamedTuple

from conf.errors import UserError


class PrivateName(NamedTuple):
    """A private name of DeepSpeed, and why Sluice uses it.

    owner: the argument of `require_names` that must have the name. `require_names` does not check the names of the
        owners `import` and `constant`.
    is_fast: whether the name only saves time, so Sluice works without it.
    """

    owner: str
    name: str
    why: str
    is_fast: bool = False


PRIVATE_NAMES = (
    # Names of deepspeed.utils.groups, and the attributes that mark experts' weights
    PrivateName("module", "_EXPERT_PARALLEL_GROUP", "the expert groups, over which stage 3 averages gradients"),
    PrivateName("module", "_EXPERT_DATA_PARALLEL_GROUP", "the ranks over which experts' gradients are summed"),
    PrivateName(
        "module",
        "_EXPERT_DATA_PARALLEL_GROUP_RANKS",
        "the ranks over which experts' gradients are summed, as numbers, for broadcasts",
    ),
    PrivateName("param", "ds_zero_placement_family", "marks experts' weights for stage 3"),
    PrivateName("param", "ds_zero_partition_group_name", "names the group of experts' weights for stage 3"),
    PrivateName(
        "param", "ds_zero_partition_process_group", "the group of a weight that is sharded before the engine exists"
    ),
    # Names of DeepSpeedEngine
    PrivateName(
        "engine", "has_moe_layers", "set by hand, because experts are marked weights and not deepspeed.moe.MoE"
    ),
    PrivateName(
        "engine",
        "_do_optimizer_sanity_check",
        "overridden; otherwise bf16 with fp32 gradients selects BF16_Optimizer at stage 1",
    ),
    PrivateName("constant", "ZERO_OPTIMIZATION", "the overridden result: ZeRO's own optimizer"),
    PrivateName(
        "engine", "_validate_zero3_moe_compatibility", "overridden; it refuses experts that are not deepspeed.moe.MoE"
    ),
    PrivateName("import", "__compatible_ops__", "turns off DeepSpeed's own CPU collectives, which sometimes abort"),
    # Names for stages 1 and 2: DeepSpeedZeroOptimizer
    PrivateName(
        "optimizer12",
        "scaled_global_norm",
        "computes one norm over all ranks; DeepSpeed's version waits for ranks without experts",
    ),
    PrivateName("optimizer12", "check_overflow", "turned off, because the norm shows non-finite gradients"),
    PrivateName("optimizer12", "averaged_gradients", "the gradients for the norm"),
    PrivateName("optimizer12", "use_grad_accum_attribute", "keeps gradients in `.grad`, which is already fp32"),
    PrivateName(
        "optimizer12", "_gradient_reduction_buffer_dtype", "set to fp32; otherwise the bucket rounds gradients to bf16"
    ),
    PrivateName(
        "optimizer12",
        "unscale_and_clip_grads",
        "turned off, because the optimizer clips while it reads the gradients",
        True,
    ),
    PrivateName("import", "GradPartitionBufferGroup", "avoids copies of gradients that need no reduction", True),
    PrivateName("optimizer12", "update_lp_params", "rounds the master weights to the weights after loading"),
    PrivateName(
        "offload12",
        "temp_grad_buffer_for_gpu_offload",
        "freed: a buffer of the size of the largest weight that is never used",
        True,
    ),
    # Names for stage 3: DeepSpeedZeroOptimizer_Stage3, and the coordinator that gathers weights
    PrivateName(
        "optimizer3",
        "_grad_acc_hooks",
        "removed: these hooks reduce gradients in the order of arrival, which differs between ranks",
    ),
    PrivateName("optimizer3", "_leaf_module_hooks", "removed for the same reason"),
    PrivateName(
        "optimizer3",
        "reduce_independent_p_g_buckets_and_remove_grads",
        "adds one gradient to the bucket, in Sluice's order",
    ),
    PrivateName(
        "optimizer3", "independent_gradient_partition_epilogue", "reduces the remaining gradients of a micro-batch"
    ),
    PrivateName("optimizer3", "micro_step_id", "0 overwrites the sum over micro-batches, 1 adds to it"),
    PrivateName("optimizer3", "_get_norm_groups", "one norm over all ranks"),
    PrivateName(
        "optimizer3",
        "fp32_partitioned_groups_flat",
        "the master weights, whose moments are allocated before the first step",
    ),
    PrivateName("optimizer3", "fp16_groups", "the weights of each flat master"),
    PrivateName("param3", "ds_tensor", "this rank's shard of a weight"),
    PrivateName("optimizer3", "parameter_offload", "the object that has the coordinator"),
    PrivateName("offload", "get_param_coordinator", "the coordinator of gathers"),
    PrivateName("coordinator", "reset_step", "called at the start of a pass, because a chunk is called directly"),
    PrivateName("coordinator", "release_backward_leftovers", "releases weights of modules whose input has no gradient"),
    PrivateName(
        "coordinator",
        "_clean_inflight_param_registry",
        "releases weights that were prefetched for a backward that does not happen",
    ),
)


def require_names(**owners: object) -> None:
    """Raise UserError if an argument, an object of DeepSpeed, lacks a name in PRIVATE_NAMES.

        module: deepspeed.utils.groups
        engine: DeepSpeedEngine
        optimizer12, optimizer3: optimizers of stages 1 and 2, and of stage 3
        offload12: optimizer12 with offload
        param3: a weight at stage 3
        coordinator: gathers the weights at stage 3

    Names with another `owner` are not checked here. If one is missing, its import or first use raises an error.
    """
    missing = [one for one in PRIVATE_NAMES if one.owner in owners and not _has(owners[one.owner], one.name)]
    if missing:
        raise UserError(
            "deepspeed",
            version("deepspeed"),
            f"lacks {', '.join(one.name for one in missing)}: {missing[0].why}",
            "install a version within the range in pyproject.toml",
        )


def _has(owner: object, name: str) -> bool:
    """Whether an object has the name. For a class, `self.NAME = ...` in its module counts too."""
    return hasattr(owner, name) or (isinstance(owner, type) and f"self.{name} =" in _source(owner.__module__))


@cache
def _source(module: str) -> str:
    return inspect.getsource(sys.modules[module])


READ_FROM = "0.19.8"
"""Version of DeepSpeed whose source was read for COPIED."""


class CopiedBehaviour(NamedTuple):
    """A behaviour of DeepSpeed that Sluice's code reimplements."""

    copy: str
    """Path of Sluice's file that reimplements the behaviour."""
    what: str
    file: str
    """Path of DeepSpeed's file, relative to the package folder."""
    owner: str
    """DeepSpeed's class that contains the `functions`; empty if the module itself contains them."""
    functions: dict[str, str]
    """For each function: 16 digits of the SHA-256 of its source."""


COPIED = (
    CopiedBehaviour(
        "train/plan/memory/step_end.py",
        "gradients pass through a bucket to this rank's shard; the update runs group by group",
        "runtime/zero/stage_1_and_2.py",
        "DeepSpeedZeroOptimizer",
        {
            "reduce_independent_p_g_buckets_and_remove_grads": "8b5fdb6f58748be9",
            "reduce_ipg_grads": "ae2e2d516045e918",
            "average_tensor": "fcc1c0bff0e09112",
            "allreduce_and_scatter": "30690e2a8a6cffe6",
            "allreduce_and_copy_with_multiple_ranks": "b939d338b6a3ad90",
            "copy_grads_in_partition": "8d248dcb3b536027",
            "get_flat_partition": "648bba72ef03545b",
            "_use_compact_grad_partition_buffer": "e3e6ecfe6fe0d379",
            "_build_compact_grad_partition_buffer": "4c67521e3b57aa3e",
            "independent_gradient_partition_epilogue": "40809d01358e95db",
            "setup_buckets": "a3dbd04712ac54cd",
            "_release_ipg_buffers": "acb5f51f8853c133",
            "step": "050c36d7948f2613",
            "_optimizer_step": "4e3006f600d8838c",
        },
    ),
    CopiedBehaviour(
        "train/plan/memory/step_end.py",
        "with offload, reduced gradients are copied to the host at once",
        "runtime/zero/stage_1_and_2.py",
        "DeepSpeedZeroOptimizer",
        {
            "async_accumulate_grad_in_cpu_via_gpu": "dae253b6e26de910",
            "async_inplace_copy_grad_to_fp32_buffer_from_gpu": "510fd0c923229df1",
        },
    ),
    CopiedBehaviour(
        "train/plan/memory/rank_weights.py",
        "a group is flattened and divided into equal parts of an even size",
        "runtime/zero/stage_1_and_2.py",
        "DeepSpeedZeroOptimizer",
        {"flatten_dense_tensors_aligned": "c94d061159d00587", "get_data_parallel_partitions": "2eb8690e0562a378"},
    ),
    CopiedBehaviour(
        "train/plan/memory/rank_weights.py",
        "at stage 3 every weight is divided separately",
        "runtime/zero/partition_parameters.py",
        "Init",
        {"_partition_param": "ab56e8cdd24934a0", "_aligned_size": "0bb7465ed0701f59"},
    ),
    CopiedBehaviour(
        "train/plan/memory/zero3_gather.py",
        "the weights gathered before a unit, the prefetch, and the weights released after it",
        "runtime/zero/partitioned_param_coordinator.py",
        "PartitionedParameterCoordinator",
        {
            "fetch_sub_module": "072f3e0bd0704e6b",
            "_fetch_sub_module_impl": "a87d53ce5b059a30",
            "release_sub_module": "b6ecb865a53ede9e",
            "__all_gather_params": "bb692abb4c7ccdf5",
            "__all_gather_params_": "b2282c0b5f11fec0",
            "__release_param": "ff5eaced7d531cf6",
            "__params_to_release": "8ed240b99540e3aa",
        },
    ),
    CopiedBehaviour(
        "train/plan/memory/zero3_gather.py",
        "the weights gathered before a unit, the prefetch, and the weights released after it",
        "runtime/zero/partition_parameters.py",
        "AllGatherHandle",
        {"wait": "267e0a19a4a68dab"},
    ),
    CopiedBehaviour(
        "train/plan/memory/zero3_gather.py",
        "the weights gathered before a unit, the prefetch, and the weights released after it",
        "runtime/zero/partition_parameters.py",
        "AllGatherCoalescedHandle",
        {"wait": "29caef31ebd83df6"},
    ),
    CopiedBehaviour(
        "train/plan/memory/zero3_scatter.py",
        "gradients collect in a bucket, which is reduced when the next gradient does not fit",
        "runtime/zero/stage3.py",
        "DeepSpeedZeroOptimizer_Stage3",
        {
            "reduce_independent_p_g_buckets_and_remove_grads": "7085d5d24604a9c4",
            "__add_grad_to_ipg_bucket": "816a05376105d9af",
            "__reduce_and_partition_ipg_grads": "630bd8b84d7fa6cd",
            "__avg_scatter_contiguous_grads": "6358995b84c77e80",
            "__avg_scatter_grads": "b65814261dcda8fc",
            "partition_grads": "59d6e026081e3f8e",
        },
    ),
    CopiedBehaviour(
        "train/plan/memory/zero3_scatter.py",
        "gradients collect in a bucket, which is reduced when the next gradient does not fit",
        "runtime/comm/coalesced_collectives.py",
        "",
        {"reduce_scatter_coalesced": "55b44f8e51c88034"},
    ),
)
