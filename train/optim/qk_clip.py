"""QK-clip for MLA: bounds the attention scores of a training step by tau (Kimi K2's report, arXiv 2507.20534, 2.1).

    eta = min(1, tau / S),   S: the largest score of a head in the step, over all its tokens
    q_nope, k_nope  times  sqrt(eta),   q_rope  times  eta

So every score of the head is multiplied by eta. The rope key is not scaled, because all heads share it. QK-clip scales
rows of the fp32 master weights after the optimizer's update, before they are rounded. Momentum is not scaled.

S covers all training micro-batches of a step, on all ranks that have the head.

Shapes: L attention layers of this rank, H heads, R rows of a weight.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from conf.schema import Model
from train.model.attention import LargestScores
from train.model.mla import MLA


class QKClip:
    """Records the largest attention scores in this rank's chunks, and computes the factors for the weights.

    limit: tau. most: function that replaces a tensor (L, H) by its maximum over all ranks with these layers.
    """

    def __init__(self, chunks: Sequence[nn.Module], model: Model, limit: float, most: Callable[[Tensor], None]):
        self._model, self.limit, self._most = model, limit, most
        found = {name: module for chunk in chunks for name, module in chunk.named_modules() if isinstance(module, MLA)}
        self.layers = list(found)
        """Names of the attention modules."""
        self._watches = [LargestScores(model.heads, limit, one.kv_down.weight.device) for one in found.values()]
        for module, watch in zip(found.values(), self._watches, strict=True):
            module.watch = watch

    def clear(self) -> None:
        """Reset the recorded scores at the start of a step."""
        for watch in self._watches:
            watch.clear()

    def largest(self) -> Tensor:
        """Returns the step's largest score of every head: (L, H). Collective over the ranks with these layers."""
        scores_LH = torch.stack(
            [watch.most_H for watch in self._watches]
        )  # not empty, because a stage has at least one layer
        self._most(scores_LH)
        return scores_LH

    def factors(self, scores_LH: Tensor) -> dict[str, Tensor]:
        """Returns the factors of weights' rows, fp32 (R,), by name."""
        model, found = self._model, {}
        eta_LH = (self.limit / scores_LH).where(scores_LH > self.limit, 1.0)
        for name, eta_H in zip(self.layers, eta_LH, strict=True):
            nope, rope = model.nope_head_dim, model.rope_head_dim
            queries = "q" if model.q_rank is None else "q_up"
            found[f"{name}.{queries}.weight"] = _by_rows((eta_H.sqrt(), nope), (eta_H, rope))
            found[f"{name}.kv_up.weight"] = _by_rows((eta_H.sqrt(), nope), (torch.ones_like(eta_H), model.v_head_dim))
        return found


def _by_rows(*parts: tuple[Tensor, int]) -> Tensor:
    """Returns the factor of each row of a weight. A head has adjacent rows, in parts such as nope and rope.

    parts: for each part, its factor in every head, and its number of rows per head.
    """
    return torch.cat([factor_H.unsqueeze(1).expand(-1, rows) for factor_H, rows in parts], 1).flatten()
