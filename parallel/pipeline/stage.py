"""A chunk of the model as a stage of torch's pipeline runtime, with timed actions and less memory.

torch's stage allocates the receive buffers of all micro-batches at its start, which may take 7 GB. Here, a buffer
exists from its receive to the end of its action. The graph of a loss is freed right after its backward.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.distributed.pipelining import PipelineStage

# Changes to torch's split backward: first of inputs, then of weights.


def kept_graph(output: Tensor) -> Node | None:
    """Return an object that keeps an output's graph alive for its backward of weights. Call this before the backward of
    inputs, which releases the graph.

    From torch 2.13 on, the result is None, because torch then keeps the needed nodes of the graph.
    """
    if torch.__version__ >= "2.13":
        return None
    with torch.enable_grad():
        return output.view_as(output).grad_fn


def backward_of_weights(groups: Sequence[dict[str, Any]]) -> None:
    """Run the backward of weights, in which GEMMs may add to `.grad` themselves, unlike in torch's version.

    groups: result of torch's stage_backward_input.
    """
    for group in groups:
        pairs = list(zip(group.pop("intermediates"), group.pop("grads"), strict=True))
        arrived = [
            (GradientEdge(node, i), one) for node, ones in pairs for i, one in enumerate(ones) if one is not None
        ]
        if not arrived:
            continue
        edges, gradients = zip(*arrived, strict=True)
        with ExitStack() as hooks:
            # The hook replaces a node's gradient by the stored one, so another node of the pairs cannot add to it.
            for node, ones in pairs if len(pairs) > 1 else ():
                hooks.callback(node.register_prehook(lambda _, ones=ones: ones).remove)
            torch.autograd.backward(edges, gradients, inputs=[node.variable for node in group["params"]])


class Stage(PipelineStage):
    """A torch PipelineStage whose tensor shapes are given in advance.

    inputs, outputs: example tensors of one micro-batch (shape, dtype, requires_grad). acting: returns a context
    manager for an action, like `Timeline.action`.
    """

    def __init__(
        self,
        module,
        stage_id,
        num_stages,
        device,
        group,
        inputs: Tensor,
        outputs: Tensor,
        acting: Callable[..., AbstractContextManager],
    ):
        super().__init__(
            module, stage_id, num_stages, device, input_args=(inputs,), output_args=(outputs,), group=group
        )
        self._acting = acting
        self._one_piece = getattr(module, "backward_in_one_piece", False)
        """Whether the module's backward cannot be split, and runs completely as the backward of inputs."""
        self._graphs: dict[int, Node | None] = {}
        """Graphs kept by `kept_graph` until the backward of weights, by micro-batch."""

    def _get_init_p2p_neighbors_ops(self):
        # torch 2.11 sends a first message to the neighbours of every stage. gloo cannot send it to the same rank.
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    # Receive buffers

    def _prepare_forward_infra(self, *args, **kwargs):
        with self._buffers_on_meta():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args, **kwargs):
        with self._buffers_on_meta():
            return super()._prepare_backward_infra(*args, **kwargs)

    @contextmanager
    def _buffers_on_meta(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def get_fwd_recv_ops(self, fwd_chunk_id: int):
        _move(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int):
        if self.has_backward and not self.is_last:
            _move(self.grad_recv_info[bwd_chunk_id], self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    # Actions

    def forward_one_chunk(self, fwd_chunk_id: int, *args, **kwargs):
        with self._acting("F", self.stage_index, fwd_chunk_id):
            return self.run_forward(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args, full_backward: bool = True, **kwargs) -> None:
        with self._acting("B" if full_backward else "I", self.stage_index, bwd_chunk_id):
            self.run_backward(bwd_chunk_id, *args, full_backward=full_backward, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args, **kwargs) -> None:
        if self._one_piece:
            return
        with self._acting("W", self.stage_index, bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
            del self._graphs[bwd_chunk_id]

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict, last_backward: bool = False):
        if backward_type != "weight":
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        backward_of_weights(bwd_kwargs["param_groups"])
        return (), None

    def run_forward(self, micro_batch: int, *args, **kwargs):
        """Run forward_one_chunk unrecorded, for a caller that records a pair as one action."""
        output = super().forward_one_chunk(micro_batch, *args, **kwargs)
        # The graph holds the activations, so the receive slot can release the input buffer.
        _move(self.args_recv_info[micro_batch], torch.device("meta"))
        return output

    def run_backward(self, micro_batch: int, loss: Tensor | None = None, full_backward: bool = True, **kwargs) -> None:
        """Run backward_one_chunk without recording an action."""
        full_backward = full_backward or self._one_piece
        if not full_backward:
            output = loss if self.is_last else self.fwd_cache[micro_batch][0][0]
            assert output is not None
            self._graphs[micro_batch] = kept_graph(output)
        super().backward_one_chunk(micro_batch, loss=loss, full_backward=full_backward, **kwargs)
        if not self.is_last:
            _move(self.grad_recv_info[micro_batch], torch.device("meta"))
        elif full_backward:
            # The schedule stores every loss, and so its graph, until the step ends.
            assert loss is not None
            loss.detach_()


def _move(infos: tuple, device: torch.device) -> None:
    """Replace these receive slots' buffers by new ones on the device."""
    for info in infos:
        buffer = getattr(info, "buffer", None)
        if buffer is not None:
            info.buffer = torch.empty_like(buffer, device=device, requires_grad=buffer.requires_grad)


# A stage of a rank that runs alone in a dry run, under torch's fake process group, which moves no data. It computes on
# random hidden states and gradients.

HIDDEN_STD, GRADIENT_STD = 0.02, 1e-5
"""Standard deviations of random hidden states and of random gradients."""


class LoneStage(Stage):
    """A stage without neighbours. Only the values of received tensors differ from a real run."""

    def get_fwd_recv_ops(self, fwd_chunk_id: int):
        ops = super().get_fwd_recv_ops(fwd_chunk_id)
        _fill(self.args_recv_info[fwd_chunk_id], HIDDEN_STD)
        return ops

    def get_bwd_recv_ops(self, bwd_chunk_id: int):
        ops = super().get_bwd_recv_ops(bwd_chunk_id)
        if ops:
            _fill(self.grad_recv_info[bwd_chunk_id], GRADIENT_STD)
        return ops

    # Real stages first exchange messages, for which a lone stage would wait forever.

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Tensor | None = None) -> Tensor:
        return torch.tensor([1], dtype=torch.int32, device=self.device)

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor:
        return torch.tensor([1], dtype=torch.int32, device=self.device)


@torch.no_grad()
def _fill(infos: tuple, std: float) -> None:
    for info in infos:
        if getattr(info, "buffer", None) is not None and info.buffer.is_floating_point():
            info.buffer.normal_(0, std)
