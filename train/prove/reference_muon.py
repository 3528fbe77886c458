"""Reference for Muon and for QK-clip, the limit of attention scores.

Sources: Muon, arXiv 2502.16982, 2.2; QK-clip, arXiv 2507.20534, 2.1; Newton-Schulz, kellerjordan.github.io/posts/muon.
"""

import torch
from torch import Tensor

from train.prove.recipe_values import Values

NEWTON_SCHULZ = {
    "quintic": [(3.4445, -4.7750, 2.0315)] * 5,
    "polar_express": [  # arXiv 2505.16932, algorithm 1, with its safety factor 1.01
        (a / 1.01, b / 1.01**3, c / 1.01**5)
        for a, b, c in (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        )
    ],
    "deepseek_v4": [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2,
}


def newton_schulz(matrix: Tensor, name: str) -> Tensor:
    """Approximates the orthogonal factor U V^T of U S V^T by polynomials."""
    x = matrix / matrix.norm().clamp_min(1e-300)
    for a, b, c in NEWTON_SCHULZ[name]:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def is_matrix(name: str, dims: int) -> bool:
    """Returns whether Muon updates a weight: every matrix except the embedding, the head, routers (arXiv 2502.16982,
    2.2) and indexers, for which no paper gives a rule. AdamW updates all others.
    """
    return dims > 1 and not name.startswith(("embedding.", "head.")) and not {"router", "indexer"} & {*name.split(".")}


def split_matrices(config: Values, name: str, weight: Tensor) -> list[Tensor]:
    """Returns views of the matrices that Muon orthogonalises separately:

    - the matrices of each expert, with w1 separate from w3
    - the rows of kv_down for the latent, and for the rope key
    - with optim.muon.by_head, each head, with keys separate from values
    """
    model, heads = config.model, config.optim.muon.by_head
    part = name.removesuffix(".weight").rpartition(".")[2]
    stacked = list(weight) if weight.dim() == 3 else [weight]
    found = []
    for matrix in stacked:
        if part == "w13":
            found += matrix.chunk(2)
        elif part == "kv_down":
            found += matrix.split([model.kv_rank, model.rope_head_dim])
        elif part in ("q", "q_up") and heads:
            found += matrix.chunk(model.heads)
        elif part == "kv_up" and heads:
            found += matrix.split([model.nope_head_dim, model.v_head_dim] * model.heads)
        elif part == "out" and heads:
            found += matrix.chunk(model.heads, 1)
        else:
            found.append(matrix)
    return found


def muon(
    config: Values, name: str, lr: float, weight: Tensor, gradient: Tensor, momentum: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the weight and its momentum after an update (arXiv 2502.16982, 2.2).

    The update is scaled: its root mean square is about the same as that of an Adam update.
    """
    optim = config.optim
    momentum = optim.muon.momentum * momentum + gradient
    weight, looked_ahead = weight * (1 - lr * optim.weight_decay), gradient + optim.muon.momentum * momentum
    moved = (split_matrices(config, name, each) for each in (weight, looked_ahead))
    for matrix, direction in zip(*moved, strict=True):
        matrix -= lr * 0.2 * max(matrix.shape) ** 0.5 * newton_schulz(direction, optim.muon.iteration)
    return weight, momentum


def qk_factors(config: Values, name: str, scores_H: Tensor) -> dict[str, Tensor]:
    """Returns QK-clip's factors for query and key weights (arXiv 2507.20534, 2.1)."""
    model, limit = config.model, config.optim.qk_clip
    assert limit is not None
    eta_H1 = (limit / scores_H.double()).clamp(max=1.0).unsqueeze(1)
    nope, rope, value = (
        torch.ones(model.heads, width, dtype=torch.float64)
        for width in (model.nope_head_dim, model.rope_head_dim, model.v_head_dim)
    )
    queries = "q" if model.q_rank is None else "q_up"
    return {
        f"{name}.{queries}.weight": torch.cat([nope * eta_H1.sqrt(), rope * eta_H1], 1).flatten(),
        f"{name}.kv_up.weight": torch.cat([nope * eta_H1.sqrt(), value], 1).flatten(),
    }
