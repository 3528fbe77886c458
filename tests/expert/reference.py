"""Expert-parallel dispatch in one process, written for reading: what the dispatchers are compared with.

Shapes: T tokens, D channels, K experts per token, E experts, F expert width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def fake_quantize(x_TD: Tensor, floor: float) -> Tensor:
    """E4M3 with power-of-two scales per 1x128 tile and back, by the formula of paper 3.3.3, in fp64."""
    tiles = []
    for tile in x_TD.double().split(128, dim=1):
        amax = tile.abs().amax(1, keepdim=True).clamp_min(floor)
        scale = torch.exp2(torch.ceil(torch.log2(amax / 448)))
        tiles.append((tile / scale).float().to(torch.float8_e4m3fn).double() * scale)
    return torch.cat(tiles, 1).to(x_TD.dtype)


def swiglu(rows_RD: Tensor, gates_R: Tensor, w13_2FD: Tensor, w2_DF: Tensor) -> Tensor:
    """One expert, its gate value inside."""
    gate_RF, up_RF = (rows_RD @ w13_2FD.t()).chunk(2, 1)
    return (F.silu(gate_RF) * up_RF * gates_R[:, None].to(rows_RD.dtype)) @ w2_DF.t()


def experts(rows_RD: Tensor, gates_R: Tensor, counts_E: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor) -> Tensor:
    """Rows sorted by expert through their experts."""
    parts = zip(
        rows_RD.split(counts_E.tolist()),
        gates_R.split(counts_E.tolist()),
        w13_E2FD.unbind(),
        w2_EDF.unbind(),
        strict=True,
    )
    return torch.cat([swiglu(*part) for part in parts])


def moe(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor) -> Tensor:
    """Sum over the chosen experts of every token, one expert after the other."""
    y_TD = torch.zeros_like(x_TD)
    for expert in range(w2_EDF.shape[0]):
        token, entry = torch.where(ids_TK == expert)
        y_TD = y_TD.index_add(0, token, swiglu(x_TD[token], gates_TK[token, entry], w13_E2FD[expert], w2_EDF[expert]))
    return y_TD
