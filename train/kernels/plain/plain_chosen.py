"""Attention over chosen keys, and the indexer loss over them, in torch operations on any device: the reference.

train/model/chosen_attention.py has the formulas. One matmul applies W_UK or W_UV to a block of queries. The gathered
latents are the largest tensor, so they are gathered for a part of the block at a time. All arithmetic is in fp32.

Shapes as in train/model/chosen_attention.py; C queries of a block, R = kv_rank, I width of the indexer's heads.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from conf.thresholds import THRESHOLDS
from train.model.chosen_attention import ChosenInput, ChosenOutput
from train.model.indexer import IndexLoss, IndexVectors


class PlainChosen:
    """Attention over chosen keys. Subclasses replace the computation of a block."""

    def operand_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype of matmul operands. dtype: the queries' dtype."""
        return torch.float32

    def add_product(self, left: Tensor, right: Tensor, into: Tensor) -> None:
        """Adds left @ right to fp32 sums."""
        into.baddbmm_(left, right)

    def forward(self, given: ChosenInput) -> ChosenOutput:
        q, latents, _, nope, scale, chosen = given
        (B, T, H, _), dtype = q.shape, self.operand_dtype(q.dtype)
        w_uk_HPR, w_uv_HVR = given.split_weight(dtype)
        made = ChosenOutput(
            q.new_empty(B, T, H, w_uv_HVR.size(1)),
            torch.empty(B, T, H, device=q.device),
            torch.empty(B, T, H, device=q.device),
            torch.empty(chosen.shape, device=q.device),
        )
        latents = latents.to(dtype)
        for b, block in _blocks(B, T):
            q_CHX = absorbed(q[b, block].to(dtype), w_uk_HPR, nope)
            out_CHR, *rest = self.attend(q_CHX, latents[b], chosen[b, block], w_uv_HVR.size(2), scale)
            made.out_BTHV[b, block] = torch.bmm(out_CHR.transpose(0, 1), w_uv_HVR.mT).transpose(0, 1)
            for into, part in zip(made[1:], rest, strict=True):
                into[b, block] = part
        return made

    def backward(
        self, dout_BTHV: Tensor, given: ChosenInput, out_BTHV: Tensor, lse_BTH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, latents, weight, nope, scale, chosen = given
        dtype = self.operand_dtype(q.dtype)
        w_uk_HPR, w_uv_HVR = given.split_weight(dtype)
        rank, operands = w_uv_HVR.size(2), latents.to(dtype)
        dq, dlatents = torch.empty_like(q), torch.zeros(latents.shape, device=q.device)
        dw_uk, dw_uv = (torch.zeros(one.shape, device=q.device) for one in (w_uk_HPR, w_uv_HVR))
        for b, block in _blocks(*q.shape[:2]):
            mean_CH = torch.linalg.vecdot(dout_BTHV[b, block].float(), out_BTHV[b, block].float())
            dout_CHV, q_CHQ = dout_BTHV[b, block].to(dtype), q[b, block].to(dtype)
            du_CHR = torch.bmm(dout_CHV.transpose(0, 1), w_uv_HVR).transpose(0, 1)
            q_CHX = absorbed(q_CHQ, w_uk_HPR, nope)
            dq_CHX, out_CHR = self.attend_backward(
                q_CHX, operands[b], chosen[b, block], du_CHR, mean_CH, lse_BTH[b, block], scale, dlatents[b]
            )
            dq_HCR = dq_CHX[..., :rank].transpose(0, 1)
            self.add_product(q_CHQ[..., :nope].permute(1, 2, 0), dq_HCR, dw_uk)
            self.add_product(dout_CHV.permute(1, 2, 0), out_CHR.transpose(0, 1), dw_uv)
            dq[b, block, :, :nope] = torch.bmm(dq_HCR, w_uk_HPR.mT).transpose(0, 1)
            dq[b, block, :, nope:] = dq_CHX[..., rank:]
        return dq, dlatents.to(latents.dtype), torch.cat([dw_uk, dw_uv], 1).view(weight.shape)

    def attend(
        self, q_CHX: Tensor, latents_SX: Tensor, chosen_CK: Tensor, rank: int, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes a block.

        Returns for each query the weighted sums of latents (C, H, rank), the log-sum-exps (C, H), the largest scores
        (C, H), and the attention probabilities averaged over heads (C, K).
        """
        parts = []
        for some in _some(chosen_CK, q_CHX):
            latents_CKX, none_C1K = gathered(latents_SX, chosen_CK[some])
            scores_CHK = torch.bmm(q_CHX[some], latents_CKX.mT).mul_(scale).masked_fill_(none_C1K, -torch.inf)
            largest_CH, p_CHK = scores_CHK.amax(-1), scores_CHK.softmax(-1)
            p_CHK.masked_fill_((largest_CH == -torch.inf).unsqueeze(-1), 0)  # a query without keys
            lse_CH = torch.where(largest_CH == -torch.inf, largest_CH, largest_CH - p_CHK.amax(-1).log_())
            parts.append((torch.bmm(p_CHK, latents_CKX[..., :rank]), lse_CH, largest_CH, p_CHK.mean(1)))
        out, lse, largest, shares = (torch.cat(part) for part in zip(*parts, strict=True))
        return out, lse, largest, shares

    def attend_backward(
        self,
        q_CHX: Tensor,
        latents_SX: Tensor,
        chosen_CK: Tensor,
        du_CHR: Tensor,
        mean_CH: Tensor,
        lse_CH: Tensor,
        scale: float,
        dlatents_SX: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Computes the backward of a block. Returns the gradients of q (C, H, X), and the weighted sums of latents (C,
        H, rank).

        du_CHR: gradient of the weighted sums.
        mean_CH: scalar product of du and the weighted sums.
        dlatents_SX: the gradients of the latents are added to it.
        """
        rank, dq, out = du_CHR.size(-1), torch.empty_like(q_CHX), torch.empty_like(du_CHR)
        for some in _some(chosen_CK, q_CHX):
            (latents_CKX, none_C1K), q, du = gathered(latents_SX, chosen_CK[some]), q_CHX[some], du_CHR[some]
            p_CHK = torch.bmm(q, latents_CKX.mT).mul_(scale).sub_(lse_CH[some].unsqueeze(-1)).exp_()
            p_CHK.masked_fill_(none_C1K, 0)
            out[some] = torch.bmm(p_CHK, latents_CKX[..., :rank])
            ds_CHK = torch.bmm(du, latents_CKX[..., :rank].mT).sub_(mean_CH[some].unsqueeze(-1)).mul_(p_CHK).mul_(scale)
            dq[some] = torch.bmm(ds_CHK, latents_CKX)
            rows_CKX = torch.bmm(ds_CHK.mT, q)
            rows_CKX[..., :rank].baddbmm_(p_CHK.mT, du)
            dlatents_SX.index_add_(0, chosen_CK[some].flatten().clamp(min=0), rows_CKX.flatten(0, 1))
        return dq, out


def absorbed(q_CHQ: Tensor, w_uk_HPR: Tensor, nope: int) -> Tensor:
    """Returns queries to multiply by latents: [W_UK^T q_nope | q_rope], (C, H, X)."""
    return torch.cat([torch.bmm(q_CHQ[..., :nope].transpose(0, 1), w_uk_HPR).transpose(0, 1), q_CHQ[..., nope:]], -1)


def gathered(rows_SX: Tensor, chosen_CK: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the chosen rows (C, K, X) and a mask (C, 1, K) of missing keys (index -1)."""
    rows_CKX = rows_SX.index_select(0, chosen_CK.flatten().clamp(min=0)).view(*chosen_CK.shape, -1)
    return rows_CKX, (chosen_CK < 0).unsqueeze(1)


def _blocks(batch: int, length: int) -> Iterator[tuple[int, slice]]:
    """Yields blocks of queries: index of the sequence, slice of queries."""
    for b in range(batch):
        for first in range(0, length, THRESHOLDS.attention_queries):
            yield b, slice(first, min(first + THRESHOLDS.attention_queries, length))


def _some(chosen_CK: Tensor, q_CHX: Tensor, elements: int | None = None) -> Iterator[slice]:
    """Yields slices of queries whose keys are gathered together.

    elements: maximum number of gathered elements and scores; None: the default for a CPU.
    """
    (count, keys), (_, heads, width) = chosen_CK.shape, q_CHX.shape
    size = max(1, (elements or THRESHOLDS.attention_scores) // (keys * (width + heads)))
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def chosen_index_loss(
    index: IndexVectors, chosen_BTK: Tensor, shares_BTK: Tensor, weight_BT: Tensor, elements: int | None = None
) -> IndexLoss:
    """Implements `train.model.operations.Kernels.chosen_index_loss`."""
    q_BTHI, k_BSI, w_BTH = index
    grads = IndexVectors(*(torch.zeros(t.shape, device=t.device) for t in index))
    loss, k32_BSI = torch.zeros((), device=q_BTHI.device), k_BSI.float()
    for b, block in _blocks(*q_BTHI.shape[:2]):
        for part in _some(chosen_BTK[b, block], q_BTHI[b, block], elements):
            some = slice(block.start + part.start, block.start + part.stop)
            chosen_CK, p_CK, weight_C1 = chosen_BTK[b, some], shares_BTK[b, some], weight_BT[b, some].unsqueeze(-1)
            q_CHI, w_CH1 = q_BTHI[b, some].float(), w_BTH[b, some].float().unsqueeze(-1)
            k_CKI, none_C1K = gathered(k32_BSI[b], chosen_CK)
            products_CHK = torch.bmm(q_CHI, k_CKI.mT).relu_()
            scores_CK = (products_CHK * w_CH1).sum(1).masked_fill_(none_C1K.squeeze(1), -torch.inf)
            log_CK = scores_CK.log_softmax(-1)
            apart_CK = torch.xlogy(p_CK, p_CK) - (p_CK * log_CK).masked_fill_(p_CK == 0, 0)
            loss += (apart_CK * weight_C1).sum()
            dscores_C1K = ((log_CK.exp_() - p_CK) * weight_C1).unsqueeze(1)
            grads.w_BTH[b, some] = (products_CHK * dscores_C1K).sum(-1)
            dproducts_CHK = products_CHK.sign_().mul_(dscores_C1K).mul_(w_CH1)
            grads.q_BTHI[b, some] = torch.bmm(dproducts_CHK, k_CKI)
            rows_CKI = torch.bmm(dproducts_CHK.mT, q_CHI)
            grads.k_BSI[b].index_add_(0, chosen_CK.flatten().clamp(min=0), rows_CKI.flatten(0, 1))
    return IndexLoss(loss, IndexVectors(*(grad.to(of.dtype) for grad, of in zip(grads, index, strict=True))))
