"""Every undocumented name of torch that the product uses: read this file before an upgrade.

These are names with a leading underscore, and names of the pipeline runtime that torch's documentation lacks.
tests/test_torch_private.py compares the list with the product's real use and with the installed torch.
parallel/zero/private_names.py does the same for DeepSpeed.
"""

from typing import NamedTuple


class BorrowedName(NamedTuple):
    """owner: full path of the module or class that has the name."""

    owner: str
    name: str
    why: str
    since: str = ""
    """First torch version with the name, if the product also supports older versions, which do without it."""


_STAGE = "torch.distributed.pipelining.stage.PipelineStage"
_INFO = "torch.distributed.pipelining.stage._RecvInfo"
_ONE = "torch.distributed.pipelining.schedules.PipelineScheduleSingle"
_MULTI = "torch.distributed.pipelining.schedules.PipelineScheduleMulti"
_RUNTIME = "torch.distributed.pipelining.schedules._PipelineScheduleRuntime"
_ACTION = "torch.distributed.pipelining.schedules._Action"
_CONTEXT = "torch.distributed.pipelining.schedules._PipelineContext"

BORROWED = (
    # A stage: parallel/pipeline/stage.py
    BorrowedName(_STAGE, "_get_init_p2p_neighbors_ops", "greets neighbours, and oneself where a rank holds both"),
    BorrowedName(_STAGE, "_prepare_forward_infra", "makes the buffers of all micro-batches: on meta instead"),
    BorrowedName(_STAGE, "_prepare_backward_infra", "makes those of gradients: on meta instead"),
    BorrowedName(_STAGE, "get_fwd_recv_ops", "a receive is posted: its buffer is made"),
    BorrowedName(_STAGE, "get_bwd_recv_ops", "a receive of a gradient is posted: its buffer is made"),
    BorrowedName(_STAGE, "args_recv_info", "the buffers of what arrives"),
    BorrowedName(_STAGE, "grad_recv_info", "the buffers of gradients that arrive"),
    BorrowedName(_INFO, "buffer", "one of them"),
    BorrowedName(_STAGE, "forward_one_chunk", "an action, which is timed"),
    BorrowedName(_STAGE, "backward_one_chunk", "an action, which is timed"),
    BorrowedName(_STAGE, "backward_weight_one_chunk", "an action, which is timed"),
    BorrowedName(_STAGE, "backward_maybe_with_nosync", "the weights' half of a backward, which products add to themselves"),
    BorrowedName(_STAGE, "fwd_cache", "the output of a micro-batch, whose graph has to live on"),
    BorrowedName(_STAGE, "has_backward", "whether gradients arrive"),
    BorrowedName(_STAGE, "group_rank", "which neighbour is this rank itself"),
    BorrowedName(_STAGE, "_warmup_forward_vote", "ranks agree on shapes by messages, which a lone rank gets none of", "2.13"),
    BorrowedName(_STAGE, "_warmup_backward_result", "the answer to that vote", "2.13"),
    # An overlapped pair: parallel/pipeline/overlap.py
    BorrowedName(_RUNTIME, "register_custom_function", "what the runtime does at an overlapped pair"),
    BorrowedName("torch.distributed.pipelining.schedules", "OVERLAP_F_B", "the action that is one"),
    BorrowedName(_CONTEXT, "schedule_ref", "the schedule that runs"),
    BorrowedName(_CONTEXT, "arg_mbs", "inputs of every micro-batch"),
    BorrowedName(_CONTEXT, "kwarg_mbs", "named inputs of every micro-batch"),
    BorrowedName(_CONTEXT, "target_mbs", "targets of every micro-batch"),
    BorrowedName(_MULTI, "_stages", "the stages of this rank"),
    BorrowedName(_RUNTIME, "fwd_recv_ops", "receives that are posted"),
    BorrowedName(_RUNTIME, "bwd_recv_ops", "receives of gradients that are posted"),
    BorrowedName(_RUNTIME, "backward_counter", "which backward is a stage's last"),
    BorrowedName(_MULTI, "_maybe_get_loss", "the loss that a backward starts from"),
    BorrowedName(_MULTI, "_maybe_compute_loss", "the loss after a forward of the last stage"),
    BorrowedName(_STAGE, "set_local_fwd_input", "an output goes to the next stage of this rank"),
    BorrowedName(_STAGE, "set_local_bwd_input", "a gradient goes to the stage before, of this rank"),
    BorrowedName(_STAGE, "get_local_bwd_output", "that gradient"),
    # The order of a schedule without running it: parallel/pipeline/orders.py
    BorrowedName(_MULTI, "pipeline_order", "the actions of every rank"),
    BorrowedName(_RUNTIME, "_prepare_schedule_with_comms", "adds sends and receives, which take torch most of the time"),
    BorrowedName(_ACTION, "computation_type", "what an action is"),
    BorrowedName(_ACTION, "microbatch_index", "its micro-batch"),
    BorrowedName(_ACTION, "sub_actions", "the halves of an overlapped pair"),
    BorrowedName("torch.distributed.pipelining._backward", "stage_backward_input", "a plan runs a backward of inputs alone"),
    # Groups: parallel/mesh.py
    BorrowedName("torch.distributed.distributed_c10d", "_set_pg_timeout", "ranks wait longer for each other until a step is done"),
    # Ranks: parallel/exchange.py
    BorrowedName("torch.distributed.distributed_c10d", "_get_default_store", "where all ranks met, torchrun's too"),
    # Tensors and operations
    BorrowedName("torch.utils._python_dispatch", "_get_current_dispatch_mode_stack", "a second thread computes in the same modes"),
    BorrowedName("torch.utils._python_dispatch", "TorchDispatchMode", "sees every operation: a plan's ledger, a proof's fp64"),
    BorrowedName("torch.utils._python_dispatch", "_disable_current_modes", "what a stand-in makes for itself is no memory of a rank"),
    BorrowedName("torch.utils._pytree", "tree_map_only", "unpacks arguments that are rows in FP8"),
    BorrowedName("torch._C", "_disabled_torch_function_impl", "rows in FP8 are a tensor for autograd alone"),
    BorrowedName("torch.Tensor", "_make_wrapper_subclass", "makes such a tensor"),
    BorrowedName("torch._C", "_will_engine_execute_node", "which gradients the running pass wants"),
    BorrowedName("torch._C", "_FunctionBase", "a Function is called without what functorch asks of it first"),
    BorrowedName("torch.UntypedStorage", "_cdata", "tells whether two tensors share memory"),
    BorrowedName("torch.autograd", "_profiler_enabled", "a product has a name in a profile only"),
    BorrowedName("torch", "_fused_adamw_", "one pass over memory, and the reference of ours"),
    BorrowedName("torch", "_fused_rms_norm", "a GPU's norm"),
    BorrowedName("torch.ops.aten", "_fused_rms_norm_backward", "its backward"),
    BorrowedName("torch.ops.aten", "_grouped_mm", "has no fp64, which a proof computes in"),
    BorrowedName("torch.ops.aten", "_efficient_attention_forward", "attention with documents, and its log-sum-exp"),
    BorrowedName("torch.ops.aten", "_efficient_attention_backward", "its backward"),
    BorrowedName("torch.ops.aten", "_scaled_dot_product_efficient_attention", "attention with its log-sum-exp"),
    BorrowedName("torch.ops.aten", "_scaled_dot_product_efficient_attention_backward", "its backward"),
    BorrowedName("torch.ops.aten", "_flash_attention_forward", "attention with documents, and its log-sum-exp"),
    BorrowedName("torch.ops.aten", "_flash_attention_backward", "its backward"),
    BorrowedName("torch.ops.aten", "_scaled_dot_product_cudnn_attention", "attention with its log-sum-exp"),
    BorrowedName("torch.ops.aten", "_scaled_dot_product_cudnn_attention_backward", "its backward"),
)  # fmt: skip
