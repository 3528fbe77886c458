"""A stage whose neighbours are not there: it computes on made-up hidden states and gradients, and sends to nobody.

For a dry run, where one rank of a pipeline runs alone under torch's fake process group, which moves no data.
"""

import torch
from torch import Tensor

from parallel.pipeline.stage import Stage

HIDDEN_STD, GRADIENT_STD = 0.02, 1e-5
"""Standard deviations of the made-up values: what a block sees is normalised, and gradients of a mean over many tokens
are small."""


class LoneStage(Stage):
    """See above; everything but the values of what arrives is as in a run."""

    def get_fwd_recv_ops(self, fwd_chunk_id: int):
        ops = super().get_fwd_recv_ops(fwd_chunk_id)
        _fill(self.args_recv_info[fwd_chunk_id], HIDDEN_STD)
        return ops

    def get_bwd_recv_ops(self, bwd_chunk_id: int):
        ops = super().get_bwd_recv_ops(bwd_chunk_id)
        if ops:
            _fill(self.grad_recv_info[bwd_chunk_id], GRADIENT_STD)
        return ops

    # All stages would vote for static shapes; torch asks them by messages, which do not come.

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Tensor | None = None) -> Tensor:
        return torch.tensor([1], dtype=torch.int32, device=self.device)

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor:
        return torch.tensor([1], dtype=torch.int32, device=self.device)


@torch.no_grad()
def _fill(infos: tuple, std: float) -> None:
    for info in infos:
        if getattr(info, "buffer", None) is not None and info.buffer.is_floating_point():
            info.buffer.normal_(0, std)
