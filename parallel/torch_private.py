"""Lists every undocumented name of torch that Sluice uses. Read this file before an upgrade of torch.

tests/test_torch_private.py compares the list with the code and the installed torch. For DeepSpeed, see
parallel/zero/private_names.py.
"""

from typing import NamedTuple


class BorrowedName(NamedTuple):
    """An undocumented name that Sluice uses. owner: its module or class."""

    owner: str
    name: str
    why: str
    since: str = ""
    """First torch version that has the name, if Sluice also works without it; empty if Sluice needs it in all versions.
    """


_STAGE = "torch.distributed.pipelining.stage.PipelineStage"
_INFO = "torch.distributed.pipelining.stage._RecvInfo"
_ONE = "torch.distributed.pipelining.schedules.PipelineScheduleSingle"
_MULTI = "torch.distributed.pipelining.schedules.PipelineScheduleMulti"
_RUNTIME = "torch.distributed.pipelining.schedules._PipelineScheduleRuntime"
_ACTION = "torch.distributed.pipelining.schedules._Action"
_CONTEXT = "torch.distributed.pipelining.schedules._PipelineContext"

BORROWED = (
    # Names for a stage: parallel/pipeline/stage.py
    BorrowedName(_STAGE, "_get_init_p2p_neighbors_ops", "sends a first message to the neighbours, and to the rank itself if it holds both stages"),
    BorrowedName(_STAGE, "_prepare_forward_infra", "allocates receive buffers of all micro-batches; replaced by meta tensors"),
    BorrowedName(_STAGE, "_prepare_backward_infra", "allocates gradient buffers of all micro-batches; replaced by meta tensors"),
    BorrowedName(_STAGE, "get_fwd_recv_ops", "posts a receive; allocates its buffer"),
    BorrowedName(_STAGE, "get_bwd_recv_ops", "posts a receive of a gradient; allocates its buffer"),
    BorrowedName(_STAGE, "args_recv_info", "buffers of received hidden states"),
    BorrowedName(_STAGE, "grad_recv_info", "buffers of received gradients"),
    BorrowedName(_INFO, "buffer", "one receive buffer"),
    BorrowedName(_STAGE, "forward_one_chunk", "an action, for the timeline"),
    BorrowedName(_STAGE, "backward_one_chunk", "an action, for the timeline"),
    BorrowedName(_STAGE, "backward_weight_one_chunk", "an action, for the timeline"),
    BorrowedName(_STAGE, "backward_maybe_with_nosync", "the weight half of a backward, whose matmuls add to the gradient themselves"),
    BorrowedName(_STAGE, "fwd_cache", "the output of a micro-batch, whose graph is still needed"),
    BorrowedName(_STAGE, "has_backward", "whether the stage receives gradients"),
    BorrowedName(_STAGE, "group_rank", "the rank in the group, to find a neighbour stage on the same rank"),
    BorrowedName(_STAGE, "_warmup_forward_vote", "messages about shapes, which a lone rank does not receive", "2.13"),
    BorrowedName(_STAGE, "_warmup_backward_result", "the result of these messages", "2.13"),
    # Names for an overlapped pair: parallel/pipeline/overlap.py
    BorrowedName(_RUNTIME, "register_custom_function", "registers the function for an overlapped pair"),
    BorrowedName("torch.distributed.pipelining.schedules", "OVERLAP_F_B", "the kind of action for an overlapped pair"),
    BorrowedName(_CONTEXT, "schedule_ref", "the running schedule"),
    BorrowedName(_CONTEXT, "arg_mbs", "inputs of every micro-batch"),
    BorrowedName(_CONTEXT, "kwarg_mbs", "named inputs of every micro-batch"),
    BorrowedName(_CONTEXT, "target_mbs", "targets of every micro-batch"),
    BorrowedName(_MULTI, "_stages", "the stages of this rank"),
    BorrowedName(_RUNTIME, "fwd_recv_ops", "posted receives"),
    BorrowedName(_RUNTIME, "bwd_recv_ops", "posted receives of gradients"),
    BorrowedName(_RUNTIME, "backward_counter", "counts backwards, to find a stage's last"),
    BorrowedName(_MULTI, "_maybe_get_loss", "the loss from which a backward starts"),
    BorrowedName(_MULTI, "_maybe_compute_loss", "the loss after a forward of the last stage"),
    BorrowedName(_STAGE, "set_local_fwd_input", "passes an output to the next stage on this rank"),
    BorrowedName(_STAGE, "set_local_bwd_input", "passes a gradient to the previous stage on this rank"),
    BorrowedName(_STAGE, "get_local_bwd_output", "the gradient for the previous stage on this rank"),
    # Names for the order of a schedule that does not run: parallel/pipeline/orders.py
    BorrowedName(_MULTI, "pipeline_order", "the actions of every rank"),
    BorrowedName(_RUNTIME, "_prepare_schedule_with_comms", "adds sends and receives, which needs most of torch's time"),
    BorrowedName(_ACTION, "computation_type", "the kind of an action"),
    BorrowedName(_ACTION, "microbatch_index", "the micro-batch of an action"),
    BorrowedName(_ACTION, "sub_actions", "the halves of an overlapped pair"),
    BorrowedName("torch.distributed.pipelining._backward", "stage_backward_input", "runs only the input half of a backward, for a plan"),
    # Names for groups: parallel/mesh.py
    BorrowedName("torch.distributed.distributed_c10d", "_set_pg_timeout", "sets a longer timeout before the first step"),
    # Names for ranks: parallel/exchange.py
    BorrowedName("torch.distributed.distributed_c10d", "_get_default_store", "the rendezvous store of all ranks, also under torchrun"),
    # Names for tensors and operations
    BorrowedName("torch.utils._python_dispatch", "_get_current_dispatch_mode_stack", "copies the active modes to a second thread"),
    BorrowedName("torch.utils._python_dispatch", "TorchDispatchMode", "intercepts every operation, for a plan's memory ledger and a proof's fp64"),
    BorrowedName("torch.utils._python_dispatch", "_disable_current_modes", "excludes the stand-ins' own tensors from a rank's memory"),
    BorrowedName("torch.utils._pytree", "tree_map_only", "unpacks arguments with rows in FP8"),
    BorrowedName("torch._C", "_disabled_torch_function_impl", "makes rows in FP8 a tensor only for autograd"),
    BorrowedName("torch.Tensor", "_make_wrapper_subclass", "creates the tensor for rows in FP8"),
    BorrowedName("torch._C", "_will_engine_execute_node", "whether the current backward pass needs a gradient"),
    BorrowedName("torch._C", "_FunctionBase", "calls a Function without functorch's checks"),
    BorrowedName("torch.UntypedStorage", "_cdata", "tells whether two tensors share memory"),
    BorrowedName("torch.autograd", "_profiler_enabled", "whether a profiler runs, so that kernels are named"),
    BorrowedName("torch", "_fused_adamw_", "AdamW in one pass over memory, and the reference for Sluice's kernel"),
    BorrowedName("torch", "_fused_rms_norm", "RMSNorm on a GPU"),
    BorrowedName("torch.ops.aten", "_fused_rms_norm_backward", "the backward of the previous entry"),
    BorrowedName("torch.ops.aten", "_grouped_mm", "lacks fp64, so a proof replaces it"),
    BorrowedName("torch.ops.aten", "_efficient_attention_forward", "attention with documents, and its log-sum-exp"),
    BorrowedName("torch.ops.aten", "_efficient_attention_backward", "the backward of the previous entry"),
    BorrowedName("torch.ops.aten", "_scaled_dot_product_efficient_attention", "attention with its log-sum-exp"),
    BorrowedName("torch.ops.aten", "_scaled_dot_product_efficient_attention_backward", "the backward of the previous entry"),
    BorrowedName("torch.ops.aten", "_flash_attention_forward", "attention with documents, and its log-sum-exp"),
    BorrowedName("torch.ops.aten", "_flash_attention_backward", "the backward of the previous entry"),
    BorrowedName("torch.ops.aten", "_scaled_dot_product_cudnn_attention", "attention with its log-sum-exp"),
    BorrowedName("torch.ops.aten", "_scaled_dot_product_cudnn_attention_backward", "the backward of the previous entry"),
)  # fmt: skip
