"""The whole model as plainly as possible: formulas of the paper on a dictionary of weights, one loop per expert.

Shares no code with train/model. Everything in the dtype of the weights, no fused kernels, full logits.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.schema import Model


class Plain:
    """weights: our parameter names, and `...router.bias_E`. documents_BT: attention stays inside a document."""

    def __init__(self, config: Model, weights: dict[str, Tensor]):
        self.config, self.weights = config, weights
        self.balance: list[Tensor] = []
        self.load: dict[str, Tensor] = {}

    def norm(self, name: str, x: Tensor) -> Tensor:
        eps = self.config.norm_eps
        if name.endswith(("q_norm", "kv_norm")) and self.config.latent_norm_eps is not None:
            eps = self.config.latent_norm_eps
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * self.weights[name + ".weight"]

    def rope(self, x_BTHR: Tensor) -> Tensor:
        width = x_BTHR.size(-1)
        out = torch.zeros_like(x_BTHR)
        for t in range(x_BTHR.size(1)):
            for j in range(width // 2):
                angle = torch.tensor(t * self.config.rope_theta ** (-2 * j / width), dtype=x_BTHR.dtype)
                a, b = x_BTHR[:, t, :, 2 * j], x_BTHR[:, t, :, 2 * j + 1]
                out[:, t, :, 2 * j] = a * angle.cos() - b * angle.sin()
                out[:, t, :, 2 * j + 1] = a * angle.sin() + b * angle.cos()
        return out

    def attention(self, prefix: str, x: Tensor, documents_BT: Tensor | None) -> Tensor:
        c, w = self.config, lambda name: self.weights[f"{prefix}.{name}.weight"]
        batch, length, _ = x.shape
        q = x @ w("q").T if c.q_rank is None else self.norm(prefix + ".q_norm", x @ w("q_down").T) @ w("q_up").T
        q_nope, q_rope = q.view(batch, length, c.heads, -1).split([c.nope_head_dim, c.rope_head_dim], -1)
        latent, k_rope = (x @ w("kv_down").T).split([c.kv_rank, c.rope_head_dim], -1)
        kv = (self.norm(prefix + ".kv_norm", latent) @ w("kv_up").T).view(batch, length, c.heads, -1)
        k_nope, v = kv.split([c.nope_head_dim, c.v_head_dim], -1)
        q = torch.cat([q_nope, self.rope(q_rope)], -1)
        k = torch.cat([k_nope, self.rope(k_rope.unsqueeze(2)).expand(-1, -1, c.heads, -1)], -1)
        scores = torch.einsum("bthd,bshd->bhts", q, k) * (c.nope_head_dim + c.rope_head_dim) ** -0.5
        allowed = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, length, length)
        if documents_BT is not None:
            allowed = allowed & (documents_BT[:, :, None] == documents_BT[:, None, :])
        scores = scores.masked_fill(~allowed[:, None], -torch.inf)
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2) @ w("out").T

    def ffn(self, x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        gate, up = (x @ w13.T).chunk(2, -1)
        return (F.silu(gate) * up) @ w2.T

    def choose(self, biased_E: Tensor) -> list[int]:
        """Experts of one token."""
        c = self.config
        size, per_group = c.experts // c.groups, c.group_top_k or c.top_k // c.top_groups
        groups = sorted(
            range(c.groups),
            key=lambda g: -biased_E[g * size : (g + 1) * size].sort(descending=True).values[:per_group].sum().item(),
        )[: c.top_groups]
        allowed = [e for g in sorted(groups) for e in range(g * size, (g + 1) * size)]
        return sorted(allowed, key=lambda e: -biased_E[e].item())[: c.top_k]

    def moe(self, prefix: str, x_BTD: Tensor) -> Tensor:
        c, w = self.config, lambda name: self.weights[f"{prefix}.{name}"]
        scores = torch.sigmoid(x_BTD @ w("router.weight").T)
        load = torch.zeros(c.experts, dtype=torch.int64)
        rows = []
        for scores_TE, x_TD in zip(scores, x_BTD, strict=True):
            frequency = torch.zeros(c.experts, dtype=scores.dtype)
            for s, x in zip(scores_TE, x_TD, strict=True):
                chosen = self.choose(s.detach() + w("router.bias_E"))
                gates = s[chosen] / s[chosen].sum() * c.route_scale
                y = sum(
                    g * self.ffn(x, w("experts.w13")[e], w("experts.w2")[e]) for g, e in zip(gates, chosen, strict=True)
                )
                if c.shared_experts:
                    y = y + self.ffn(x, w("shared.w13.weight"), w("shared.w2.weight"))
                rows.append(y)
                load[chosen] += 1
                frequency[s.detach().topk(c.top_k).indices] += c.experts / (c.top_k * len(x_TD))
            share = (scores_TE / scores_TE.sum(-1, keepdim=True)).mean(0)
            self.balance.append((frequency * share).sum() / len(x_BTD))
        self.load[prefix] = load
        return torch.stack(rows).view(x_BTD.shape)

    def block(self, prefix: str, x: Tensor, documents_BT: Tensor | None, dense: bool) -> Tensor:
        x = x + self.attention(prefix + ".attention", self.norm(prefix + ".attention_norm", x), documents_BT)
        h = self.norm(prefix + ".ffn_norm", x)
        if dense:
            return x + self.ffn(h, self.weights[prefix + ".ffn.w13.weight"], self.weights[prefix + ".ffn.w2.weight"])
        return x + self.moe(prefix + ".moe", h)

    def losses(self, tokens_BS: Tensor, documents_BS: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Main loss, and the loss of every MTP depth."""
        c, head = self.config, self.weights["head.weight"]
        batch, length = tokens_BS.size(0), tokens_BS.size(1) - 1
        embedded = self.weights["embedding.weight"][tokens_BS]
        documents_BT = None if documents_BS is None else documents_BS[:, :length]
        h = embedded[:, :length]
        for i in range(c.layers):
            h = self.block(f"layers.{i}", h, documents_BT, dense=i < c.dense_layers)
        h = self.norm("norm", h)
        main = F.cross_entropy((h @ head.T).flatten(0, 1), tokens_BS[:, 1:].flatten())
        mtp = []
        for k in range(1, c.mtp_depth + 1):
            p = f"mtp.{k - 1}"
            left, right = length - k, slice(k, length)
            e = self.norm(p + ".embedding_norm", embedded[:, right])
            joined = torch.cat([e, self.norm(p + ".hidden_norm", h[:, :left])], -1)
            documents = None if documents_BT is None else documents_BT[:, :left]
            h = self.block(p + ".block", joined @ self.weights[p + ".projection.weight"].T, documents, dense=False)
            h = self.norm(p + ".norm", h)
            total = F.cross_entropy((h @ head.T).flatten(0, 1), tokens_BS[:, k + 1 :].flatten(), reduction="sum")
            mtp.append(total / (batch * length))
        return main, mtp
