"""What of DeepSpeed's behaviour is copied here rather than asked of it: the plan counts buffers as DeepSpeed makes them.

A plan is made before anything starts, for machines that are not there, so it cannot run DeepSpeed. Each row names the functions that
were read, with the hash of their source. tests/zero/test_copied_behaviour.py holds these against the installed DeepSpeed: where
one differs, read it again, mend the copy if what it does has changed, and write the new hash here.
"""

from typing import NamedTuple

READ_FROM = "0.19.8"
"""The version of DeepSpeed that was read."""


class CopiedBehaviour(NamedTuple):
    """One thing that DeepSpeed does."""

    copy: str
    """Our file that does the same."""
    what: str
    file: str
    """Theirs, in the folder of the package."""
    owner: str
    """The class of the functions; empty for functions of the module."""
    functions: dict[str, str]
    """By name, the first 16 digits of the SHA-256 of the source, from `def` to the end."""


COPIED = (
    CopiedBehaviour(
        "train/plan/memory/step_end.py",
        "gradients go through a bucket to this rank's shard, and the update group by group",
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
        "with offload they go on to the host as they are reduced",
        "runtime/zero/stage_1_and_2.py",
        "DeepSpeedZeroOptimizer",
        {
            "async_accumulate_grad_in_cpu_via_gpu": "dae253b6e26de910",
            "async_inplace_copy_grad_to_fp32_buffer_from_gpu": "510fd0c923229df1",
        },
    ),
    CopiedBehaviour(
        "train/plan/memory/rank_weights.py",
        "a group is flattened and cut into equal parts of an even size",
        "runtime/zero/stage_1_and_2.py",
        "DeepSpeedZeroOptimizer",
        {"flatten_dense_tensors_aligned": "c94d061159d00587", "get_data_parallel_partitions": "2eb8690e0562a378"},
    ),
    CopiedBehaviour(
        "train/plan/memory/rank_weights.py",
        "at stage 3 every weight is cut for itself",
        "runtime/zero/partition_parameters.py",
        "Init",
        {"_partition_param": "ab56e8cdd24934a0", "_aligned_size": "0bb7465ed0701f59"},
    ),
    CopiedBehaviour(
        "train/plan/memory/zero3_gather.py",
        "what is gathered before a unit, how far ahead, and what goes after it",
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
        "what is gathered before a unit, how far ahead, and what goes after it",
        "runtime/zero/partition_parameters.py",
        "AllGatherHandle",
        {"wait": "267e0a19a4a68dab"},
    ),
    CopiedBehaviour(
        "train/plan/memory/zero3_gather.py",
        "what is gathered before a unit, how far ahead, and what goes after it",
        "runtime/zero/partition_parameters.py",
        "AllGatherCoalescedHandle",
        {"wait": "29caef31ebd83df6"},
    ),
    CopiedBehaviour(
        "train/plan/memory/zero3_scatter.py",
        "gradients wait in a bucket, and are reduced when the next has no room",
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
        "gradients wait in a bucket, and are reduced when the next has no room",
        "runtime/comm/coalesced_collectives.py",
        "",
        {"reduce_scatter_coalesced": "55b44f8e51c88034"},
    ),
)
