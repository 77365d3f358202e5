"""FuxiCTR's interacting layer, which is in its model zoo and in no package, restated with its names."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScaledDotProductAttention(nn.Module):
    def __init__(self, dropout_rate: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout_rate) if dropout_rate > 0 else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        scores = q @ k.transpose(-1, -2)
        p = torch.softmax(scores / scale if scale else scores, dim=-1)
        return (p if self.dropout is None else self.dropout(p)) @ v


class MultiHeadSelfAttention(nn.Module):
    """relu(norm(heads + residual)), as FuxiCTR 2.3.10 has it."""

    def __init__(
        self,
        input_dim: int,
        attention_dim: int | None = None,
        num_heads: int = 1,
        dropout_rate: float = 0.0,
        use_residual: bool = True,
        use_scale: bool = False,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        width = input_dim if attention_dim is None else attention_dim
        self.head_dim, self.num_heads, self.use_residual = width // num_heads, num_heads, use_residual
        self.scale = self.head_dim**0.5 if use_scale else None
        self.W_q, self.W_k, self.W_v = (nn.Linear(input_dim, width, bias=False) for _ in range(3))
        self.W_res = nn.Linear(input_dim, width, bias=False) if use_residual and input_dim != width else None
        self.dot_attention = ScaledDotProductAttention(dropout_rate)
        self.layer_norm = nn.LayerNorm(width) if layer_norm else None

    def forward(self, x: Tensor) -> Tensor:
        projected = (w(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for w in (self.W_q, self.W_k, self.W_v))
        out = self.dot_attention(*projected, self.scale).transpose(1, 2).flatten(-2)
        if self.use_residual:
            out += x if self.W_res is None else self.W_res(x)
        return torch.relu(out if self.layer_norm is None else self.layer_norm(out))
