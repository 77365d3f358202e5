"""Mixed precision: autocast, gradient scaling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autoint_fast import InteractingLayer
from autoint_fast.weights import InteractingParameters
from tests.cases import BACKENDS, MASK_SIZES, Shape, draw_mask, draw_problem
from tests.numerics import Forward, assert_rule, einsum, expected_output, layer_forward

LOW = (torch.bfloat16, torch.float16)
SHAPE = Shape(4, 7, 16, 2)


def autocast_forward(backend: str, dtype: torch.dtype, x_dtype: torch.dtype) -> Forward:
    inner = einsum if backend == "plain" else layer_forward(backend)

    def forward(x: Tensor, p: InteractingParameters, n_head: int, mask: Tensor | None) -> Tensor:
        with torch.autocast("cpu", dtype):
            return inner(x.to(x_dtype), p, n_head, mask)

    return forward


@pytest.mark.parametrize("form", [None, "(B,F,F)"])
@pytest.mark.parametrize(
    ("dtype", "x_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
def test_numbers(dtype: torch.dtype, x_dtype: torch.dtype, form: str | None) -> None:
    """fp32 weights; the backward runs outside of the region."""
    problems = [draw_problem(SHAPE, mask=None if form is None else draw_mask(form, 4, 7)) for _ in range(8)]
    problems = [q._replace(x=q.x.to(x_dtype).float()) for q in problems]
    assert_rule(
        autocast_forward("torch", dtype, x_dtype),
        problems,
        plain=autocast_forward("plain", dtype, x_dtype),
        unit=dtype,
    )


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend: str, dtype: torch.dtype, x_dtype: torch.dtype, inside: bool) -> None:
    layer = InteractingLayer(2, 8, backend=backend)
    x = torch.randn(3, 5, 8).to(x_dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        out = layer(x)
        if inside:
            out.sum().backward()
    if not inside:
        out.sum().backward()
    assert out.dtype == dtype and x.grad.dtype == x_dtype
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    assert torch.equal(layer.w_ks.bias.grad, torch.zeros(16)) or backend == "reference"


def test_backward_inside_and_outside_agree() -> None:
    """The region must not reach the engine's own products."""
    layer = InteractingLayer(2, 8, backend="torch")
    x = torch.randn(3, 5, 8)
    grads = []
    for inside in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(x).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


def test_folding_is_done_in_full_precision() -> None:
    """What the frozen layer keeps is the same inside of a region and outside."""
    layer = InteractingLayer(2, 8).eval()
    x = torch.randn(3, 5, 8)
    outside = layer.freeze()(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer.freeze()
    assert torch.equal(layer(x), outside)


def test_disabled_region_changes_nothing() -> None:
    layer, x = InteractingLayer(2, 8), torch.randn(3, 5, 8)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert torch.equal(layer(x), layer(x)) and layer(x).dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp64_stays_fp64(backend: str) -> None:
    """As torch's own: autocast leaves double precision alone."""
    layer = InteractingLayer(2, 8, backend=backend, dtype=torch.float64)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected_output(layer, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_and_attention(backend: str) -> None:
    layer = InteractingLayer(2, 8, backend=backend)
    x = torch.randn(3, 5, 8)
    for form in MASK_SIZES:
        mask = draw_mask(form, 3, 5)
        with torch.autocast("cpu", torch.bfloat16):
            out, attention = layer(x, mask, return_attention=True)
            assert torch.equal(out, layer(x, mask))
        assert out.dtype == torch.bfloat16 and attention.shape == (3, 2, 5, 5)
        assert not attention[mask.broadcast_to(3, 5, 5)[:, None].expand_as(attention)].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_a_model(backend: str) -> None:
    """Between layers that autocast rounds, two of ours, trained."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(8, 8),
        InteractingLayer(2, 8, backend=backend),
        InteractingLayer(1, 8, backend=backend),
        nn.Linear(8, 1),
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x = torch.randn(32, 5, 8)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(x).float() - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_grad_scaler() -> None:
    """An infinite gradient skips the step; a finite one is unscaled to what an unscaled run gives."""
    layer = InteractingLayer(2, 8, backend="torch")
    x = torch.randn(3, 5, 8)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with torch.autocast("cpu", torch.float16):
        layer(x).float().mean().backward()
    expected = {name: p.grad.clone() for name, p in layer.named_parameters()}
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = layer(x).float().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-2, atol=1e-4, msg=name)
    scaler.step(optimizer)
    scaler.update()
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = layer(x).float().sum() * torch.inf
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scale = scaler.get_scale()
    scaler.update()
    assert scaler.get_scale() == scale / 2
    assert all(torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))
