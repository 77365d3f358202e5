"""The layer people have today, written out as it circulates: what ours replaces."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class OriginalLayer(nn.Module):
    """`fc_res` is declared on H*E inputs and applied to x of width E: it runs for n_head=1 only."""

    def __init__(self, n_head: int, emb_size: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.n_head = n_head
        self.emb_size = emb_size
        self.w_qs = nn.Linear(emb_size, n_head * emb_size)
        self.w_ks = nn.Linear(emb_size, n_head * emb_size)
        self.w_vs = nn.Linear(emb_size, n_head * emb_size)
        nn.init.normal_(self.w_qs.weight, mean=0, std=math.sqrt(2.0 / (emb_size + emb_size)))
        nn.init.normal_(self.w_ks.weight, mean=0, std=math.sqrt(2.0 / (emb_size + emb_size)))
        nn.init.normal_(self.w_vs.weight, mean=0, std=math.sqrt(2.0 / (emb_size + emb_size)))
        self.fc_attn = nn.Linear(n_head * emb_size, emb_size)
        nn.init.xavier_normal_(self.fc_attn.weight)
        self.fc_res = nn.Linear(n_head * emb_size, emb_size)
        nn.init.xavier_normal_(self.fc_res.weight)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, fields, size = x.shape
        heads = self.n_head

        def head_first(projected: Tensor) -> Tensor:
            split = projected.view(batch, fields, heads, size).permute(2, 0, 1, 3)
            return split.contiguous().view(heads * batch, fields, size)

        q, k, v = head_first(self.w_qs(x)), head_first(self.w_ks(x)), head_first(self.w_vs(x))
        attention = torch.bmm(q, k.transpose(1, 2)) / math.sqrt(size)
        if mask is not None:
            attention = attention.masked_fill(mask.repeat(heads, 1, 1), -math.inf)
        output = torch.bmm(torch.softmax(attention, dim=2), v)
        output = output.view(heads, batch, fields, size).permute(1, 2, 0, 3).reshape(batch, fields, -1)
        return torch.relu(self.fc_attn(output) + self.fc_res(x))
