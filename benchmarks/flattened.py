"""The Keras function's layer: its formula as PyTorch spells it, against `FlattenedInteractingLayer`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from autoint_fast import FlattenedInteractingLayer

from .cases import FORWARD


class UnfusedFlattenedLayer(nn.Module):
    """The Keras function `interacting_layer(x, head_num)`, call by call, around the projections of `layer`."""

    def __init__(self, layer: FlattenedInteractingLayer) -> None:
        super().__init__()
        self.n_head = layer.n_head
        self.w_qs, self.w_ks, self.w_vs = layer.w_qs, layer.w_ks, layer.w_vs
        self.fc_out, self.fc_res = layer.fc_out, layer.fc_res

    def forward(self, x: Tensor) -> Tensor:
        heads = []
        for q, k, v in zip(*(w(x).chunk(self.n_head, dim=2) for w in (self.w_qs, self.w_ks, self.w_vs)), strict=True):
            p = torch.softmax(q @ k.mT / math.sqrt(x.shape[2]), dim=-1)
            heads.append((p @ v).flatten(1))
        return nnf.relu(self.fc_out(torch.cat(heads, dim=1)) + self.fc_res(x.flatten(1)))


def steps(
    batch: int,
    fields: int,
    emb_size: int,
    n_head: int,
    mode: str = FORWARD,
    *,
    backend: str = "auto",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Callable[[], object]]:
    """By name, one call as it is timed: without gradients, or with those of the input and of all parameters.

    The unfused layer, ours on `backend`, and without gradients ours frozen, all with the same weights and input.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = FlattenedInteractingLayer(fields, emb_size, n_head, backend=backend).to(device, dtype)
        x = torch.randn(batch, fields, emb_size).to(device, dtype)
    contestants = {"unfused": UnfusedFlattenedLayer(layer), "ours": layer}
    if mode == FORWARD:
        frozen = FlattenedInteractingLayer(fields, emb_size, n_head, backend=backend).to(device, dtype).eval()
        frozen.load_state_dict(layer.state_dict())
        contestants["ours, frozen"] = frozen.freeze()
    else:
        x.requires_grad_()
    leaves, grad = [x, *layer.parameters()], torch.randn_like(x).flatten(1).detach()

    def step(module: nn.Module) -> Callable[[], object]:
        def forward() -> object:
            with torch.no_grad():
                return module(x)

        def training() -> object:
            return torch.autograd.grad(module(x), leaves, grad)

        return forward if mode == FORWARD else training

    return {name: step(module) for name, module in contestants.items()}
