"""Rotary position embedding on adjacent pairs (paper 2.1.1), and its extension by YaRN (paper 4.3).

Pair j of the R rope elements at position t rotates by the angle t * theta^(-2j/R), as a complex multiplication in fp32.
YaRN keeps the frequency of fast pairs, divides that of slow pairs by `factor`, and interpolates linearly in between.

Models increase the attention scores in these ways:
- DeepSeek scales complete queries and keys by `mscale`.
- The YaRN paper (3.4) scales only the rotated parts by `attention_factor`. A model may use both factors.
- Mistral Large 3 scales each query by a factor that grows with its position (`Rope.grow`).

Shapes: B sequences, T positions, H heads, R rope width, Q qk width, V value width.
"""

import math

import torch
from torch import Tensor

from conf.schema import Model


class Rope:
    """The rotations for one run. Tables are built on first use and cached for each device.

    seq_len: tokens per sequence. YaRN applies if seq_len exceeds yarn.original_seq_len, or if yarn.always is set.
    """

    def __init__(self, config: Model, seq_len: int):
        self._config, self._seq_len = config, seq_len
        self._extended = config.yarn.always or seq_len > config.yarn.original_seq_len
        self._tables: dict[torch.device, Tensor] = {}

    @property
    def softmax_scale(self) -> float:
        """Factor of attention scores: 1/sqrt(qk width), or with YaRN mscale^2/sqrt(qk width)."""
        yarn = self._config.yarn
        scale = (self._config.nope_head_dim + self._config.rope_head_dim) ** -0.5
        if self._extended and yarn.factor > 1:
            scale *= (0.1 * yarn.mscale * math.log(yarn.factor) + 1) ** 2
        return scale

    def frequencies(self) -> Tensor:
        """Return each pair's rotation angle between neighbouring positions, fp32 (R/2,)."""
        width, theta = self._config.rope_head_dim, self._config.rope_theta
        plain = theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
        if not self._extended:
            return plain
        yarn = self._config.yarn
        low, high = self._pair_with_turns(yarn.beta_fast), self._pair_with_turns(yarn.beta_slow)
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        pairs = torch.arange(width // 2, dtype=torch.float32)
        slowed = ((pairs - low) / ((high - low) or 0.001)).clamp(0, 1)
        return plain / yarn.factor * slowed + plain * (1 - slowed)

    def _pair_with_turns(self, turns: float) -> float:
        """Return the fractional index of the rope pair with this many turns over the original length."""
        yarn, width = self._config.yarn, self._config.rope_head_dim
        return width * math.log(yarn.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(self._config.rope_theta))

    @property
    def grows(self) -> bool:
        """Whether the model scales queries by a factor that grows with the position."""
        return self._extended and bool(self._config.yarn.query_growth)

    def grow(self, q_BTX: Tensor, positions_T: Tensor) -> Tensor:
        """Multiply each query at position p by 1 + query_growth ln(1 + floor(p / original_seq_len)).

        Without query_growth, the queries do not change.
        """
        yarn = self._config.yarn
        if not self.grows:
            return q_BTX
        sizes_T = 1 + yarn.query_growth * torch.log1p((positions_T // yarn.original_seq_len).double())
        exact = torch.promote_types(q_BTX.dtype, torch.float32)
        return (q_BTX * sizes_T.to(exact).unsqueeze(-1)).to(q_BTX.dtype)

    def table(self, length: int, device: torch.device) -> Tensor:
        """Return exp(i angle) for the first positions, complex64 (T, R/2); YaRN multiplies by attention_factor."""
        table = self._tables.get(device)
        if table is None or table.size(0) < length:
            # The CPU computes the table for every device; on meta, no code reads it.
            maker = device if device.type == "meta" else torch.device("cpu")
            positions = torch.arange(max(length, self._seq_len), dtype=torch.float32, device=maker)
            angles = torch.outer(positions, self.frequencies().to(maker))
            size = self._config.yarn.attention_factor if self._extended else 1.0
            table = self._tables[device] = torch.polar(torch.full_like(angles, size), angles).to(device)
        return table[:length]


def rotate(x_BTHR: Tensor, table: Tensor) -> Tensor:
    """Multiply adjacent pairs of the last axis by the complex table (T, R/2), in fp32. Gradients need table.conj()."""
    pairs = torch.view_as_complex(x_BTHR.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table.unsqueeze(1)).flatten(-2)


def turn_queries(q_BTHQ: Tensor, table: Tensor, nope: int) -> Tensor:
    """Rotate the rope parts of queries, and move heads before positions: (B, H, T, Q). Differentiable."""
    turned = rotate(q_BTHQ[..., nope:], table).to(q_BTHQ.dtype)
    return torch.cat([q_BTHQ[..., :nope], turned], -1).transpose(1, 2)
