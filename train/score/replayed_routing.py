"""Routing of given samples: which experts each token goes to, written down, or replayed from what another engine wrote down.

An inference engine and a training round in another way, so near equal scores its tokens go to other experts, and log-probabilities that a
loop of reinforcement learning compares differ by more than rounding. Replay takes the engine's experts; the gates are this model's own
scores of them. Hooks on the routers do both, and the model knows nothing of it.

Shapes: B = 1 sample, T positions (tokens but the last), L MoE layers of the main model in order, K = top_k, D width.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from train.model.deepseek import DeepSeekV3
from train.model.router import Router


class RoutingTap:
    """Sees the choices of all MoE layers, or makes them."""

    def __init__(self, model: DeepSeekV3):
        """model: of a decoder, whole, in eval mode."""
        self.given_TLK: Tensor | None = None
        """Experts that the next pass takes, int64 on the model's device; None for the routers' own choice."""
        self._chosen: list[Tensor] = []
        routers = [block.moe.router for block in model.layers.values() if hasattr(block, "moe")]
        self.shape = (len(routers), model.config.top_k, model.config.experts)
        """MoE layers, experts of a token and of a layer."""
        for number, router in enumerate(routers):
            router.register_forward_hook(self._hook(number))

    def take(self) -> Tensor:
        """Experts of the pass before, (T, L, K)."""
        chosen, self._chosen = self._chosen, []
        return torch.stack(chosen, 1)

    def _hook(self, number: int) -> Any:
        def hook(router: Router, inputs: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            if self.given_TLK is not None:
                ids_TK = self.given_TLK[:, number]
                output = gates_of(router, inputs[0], ids_TK), ids_TK
            self._chosen.append(output[1])
            return output

        return hook


def gates_of(router: Router, x_BTD: Tensor, ids_TK: Tensor) -> Tensor:
    """Gate values fp32 (B*T, K) of these experts, by the formula of train/model/router.py."""
    logits_TE = router.score(x_BTD, nullcontext()).flatten(0, 1)
    scores_TE = logits_TE.softmax(-1) if router.rule.softmax else logits_TE.sigmoid()
    chosen_TK = scores_TE.gather(-1, ids_TK)
    return chosen_TK * (router.rule.route_scale / (chosen_TK.sum(-1, keepdim=True) + 1e-20))
