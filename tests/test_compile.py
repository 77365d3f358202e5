"""torch.compile, torch.export and what they stand on: operators, fakes, symbolic shapes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map_only

from autoint_fast import InteractingLayer, ReferenceInteractingLayer
from autoint_fast.weights import NEED_INPUT, NEED_WEIGHTS, InteractingParameters, Layout
from tests.cases import BACKENDS, LAYOUTS, MASK_SIZES, Shape, draw_mask, draw_problem
from tests.layers import Definition, FlattenedShape, PaperShape, draw_flattened, draw_paper, flattened, paper
from tests.numerics import assert_rule, errors, expected_output, state_names
from tests.suite import DTYPES, NO_SECOND_ORDER, short

SHAPE = Shape(4, 7, 16, 2)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before counts: the caches on disk know an operator's name, not what is behind it."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


def compiled_forward(backend: str, compiler: str) -> Callable[..., Tensor]:
    """As a `Forward`: the layer's parameters are inputs of the compiled function."""
    layer = InteractingLayer(SHAPE.h, SHAPE.e, backend=backend, device="meta")

    def call(p: dict[str, Tensor], x: Tensor, mask: Tensor | None) -> Tensor:
        return torch.func.functional_call(layer, p, (x, mask))

    compiled = torch.compile(call, fullgraph=True, backend=compiler)

    def forward(x: Tensor, p: InteractingParameters, n_head: int, mask: Tensor | None) -> Tensor:
        return compiled(dict(zip(state_names(layer), p, strict=True)), x, mask)

    return forward


# --- torch.compile ----------------------------------------------------------------------------------------


def test_inductor() -> None:
    """The whole way, as users compile a layer: same output and gradients as without."""
    layer = InteractingLayer(2, 16)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(4, 7, 16)
    for mask in (None, draw_mask("(B,1,F)", 4, 7)):
        given, other = (x.clone().requires_grad_() for _ in range(2))
        out, expected = compiled(given, mask), twin(other, mask)
        torch.testing.assert_close(out, expected)
        grad = torch.randn_like(out)
        out.backward(grad), expected.backward(grad)
        torch.testing.assert_close(given.grad, other.grad)
    for (name, p), q in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5, msg=name)
    assert torch.equal(layer.w_ks.bias.grad, torch.zeros(32))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_numbers(dtype: torch.dtype) -> None:
    forward = compiled_forward("torch", "aot_eager")
    assert_rule(forward, [draw_problem(SHAPE, dtype) for _ in range(8)])


@pytest.mark.parametrize("form", MASK_SIZES)
def test_masks(form: str) -> None:
    mask = draw_mask(form, SHAPE.b, SHAPE.f)
    assert_rule(compiled_forward("torch", "aot_eager"), [draw_problem(SHAPE, torch.float64, mask)])


@pytest.mark.parametrize("layout", ["fields_first", "transposed", "every_other_number", "one_sample_for_all"])
def test_strides(layout: str) -> None:
    """Compiled code may hand over any strides, and gets contiguous results, as the fakes promise."""
    problem = draw_problem(SHAPE, torch.float64)
    problem = problem._replace(x=LAYOUTS[layout](problem.x))
    assert_rule(compiled_forward("torch", "aot_eager"), [problem], lay_out=LAYOUTS[layout])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    layer = InteractingLayer(2, 16)
    x = torch.randn(4, 7, 16)

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return layer(x)

    eager = step(x)
    eager.float().square().sum().backward()
    grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    assert out.dtype == eager.dtype == dtype
    assert torch.equal(out, eager)
    out.float().square().sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], msg=name)


@pytest.mark.parametrize("train", [False, True], ids=["serving", "training"])
@pytest.mark.parametrize(
    ("backend", "masked"), [("auto", False), ("auto", True), ("torch", False), ("reference", True)]
)
def test_at_most_two_compilations_over_batches(backend: str, masked: bool, train: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    layer = InteractingLayer(2, 8, backend=backend, dtype=torch.float64).train(train)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(train):
        for batch in (4, 2, 3, 17, 64, 1000, 5):
            x = torch.randn(batch, 5, 8, dtype=torch.float64)
            mask = draw_mask("(B,1,F)", batch, 5) if masked else None
            out = compiled(x, mask)
            assert errors(out, expected_output(layer, x, mask)).maximum <= 1e-12
            if train:
                out.sum().backward()
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations"


def test_batches_of_one_and_none() -> None:
    layer = InteractingLayer(2, 8, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in (3, 1, 0, 2):
        x = torch.randn(batch, 5, 8, dtype=torch.float64)
        assert compiled(x).shape == (batch, 5, 8)
        assert errors(compiled(x), expected_output(layer, x)).maximum <= 1e-12


def test_no_compilation_for_new_weights() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    layer = InteractingLayer(2, 8, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for change in (optimizer.step, lambda: [p.data.mul_(0.9) for p in layer.parameters()], optimizer.step):
        x = torch.randn(4, 5, 8, dtype=torch.float64)
        out = compiled(x)
        assert errors(out, expected_output(layer, x)).maximum <= 1e-12
        optimizer.zero_grad()
        out.sum().backward()
        change()
    assert counter.frame_count == 1


def test_in_a_model_with_attention_and_a_subset_of_gradients() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 8, dtype=torch.float64)
            self.first = InteractingLayer(2, 8, backend="torch", dtype=torch.float64)
            self.second = InteractingLayer(3, 8, backend="torch", dtype=torch.float64)
            self.head = nn.Linear(40, 1, dtype=torch.float64)

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            h = self.first(self.table(ids))
            h, attention = self.second(h, ids[:, None] == 0, return_attention=True)
            return self.head(h.flatten(1)), attention

    model = Model()
    model.first.w_vs.requires_grad_(False)
    model.second.fc_res.requires_grad_(False)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.randint(0, 50, (6, 5))
    ids[0, :3] = 0
    for got, expected in zip(compiled(ids), twin(ids), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    sum(t.sum() for t in compiled(ids)).backward()
    sum(t.sum() for t in twin(ids)).backward()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        if q[1].grad is None:
            assert p.grad is None, name
        else:
            torch.testing.assert_close(p.grad, q[1].grad, rtol=0, atol=1e-11, msg=name)


def test_a_dict_changed_in_compiled_code() -> None:
    """Dynamo distrusts some global containers once traced code has changed any dict."""
    layer = InteractingLayer(2, 8, dtype=torch.float64)

    def call(x: Tensor) -> Tensor:
        kept = {}
        kept["x"] = x
        return layer(kept["x"])

    x = torch.randn(3, 5, 8, dtype=torch.float64)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert errors(compiled(x), expected_output(layer, x)).maximum <= 1e-12


def test_frozen() -> None:
    layer = InteractingLayer(2, 8, dtype=torch.float64).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 5, 8, dtype=torch.float64)
    expected = expected_output(layer, x)
    for change in (lambda: None, layer.freeze, layer.unfreeze):
        change()
        with torch.no_grad():
            assert errors(compiled(x), expected).maximum <= 1e-12
    layer.freeze()
    compiled(x)
    layer.train()
    layer.w_vs.weight.data.mul_(2)
    assert errors(compiled(x), expected_output(layer, x)).maximum <= 1e-12


def test_bad_arguments_are_still_named() -> None:
    compiled = torch.compile(InteractingLayer(2, 8), backend="aot_eager")
    with pytest.raises(ValueError, match=r"x: expected the shape \(B, F, 8\)"):
        compiled(torch.randn(3, 4, 9))
    with pytest.raises(TypeError, match="mask: expected"):
        compiled(torch.randn(3, 4, 8), torch.zeros(4))


def test_second_order_through_compiled_code_is_refused() -> None:
    layer = torch.compile(InteractingLayer(2, 4, backend="torch"), backend="eager")
    x = torch.randn(2, 3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=NO_SECOND_ORDER):
        grad.square().sum().backward()


# --- torch.export -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_export_with_a_dynamic_batch(backend: str, strict: bool, frozen: bool) -> None:
    layer = InteractingLayer(2, 8, backend=backend, dtype=torch.float64).eval()
    if frozen:
        layer.freeze()
    batch = torch.export.Dim("batch")
    x, mask = torch.randn(3, 5, 8, dtype=torch.float64), draw_mask("(B,1,F)", 3, 5)
    program = torch.export.export(layer, (x, mask), dynamic_shapes={"x": {0: batch}, "mask": {0: batch}}, strict=strict)
    for size in (3, 2, 64, 1001):
        x, mask = torch.randn(size, 5, 8, dtype=torch.float64), draw_mask("(B,1,F)", size, 5)
        assert errors(program.module()(x, mask), expected_output(layer, x, mask)).maximum <= 1e-12


def test_exported_program_is_saved_and_loaded(tmp_path: Any) -> None:
    layer = InteractingLayer(2, 8, dtype=torch.float64).eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    x = torch.randn(9, 5, 8, dtype=torch.float64)
    assert errors(loaded(x), expected_output(layer, x)).maximum <= 1e-12


def test_exported_for_training_has_gradients() -> None:
    layer = InteractingLayer(2, 8, backend="torch", dtype=torch.float64)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    module = program.module()
    x = torch.randn(6, 5, 8, dtype=torch.float64)
    module(x).square().sum().backward()
    layer(x).square().sum().backward()
    got = dict(module.named_parameters())
    for name, p in layer.named_parameters():
        torch.testing.assert_close(got[name].grad, p.grad, rtol=0, atol=1e-11, msg=name)


# --- operators, fakes, symbolic shapes --------------------------------------------------------------------

EVERY = (1 << 10) - 1  # of the ten parameters, those that are there


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=short)
def test_opcheck(dtype: torch.dtype, masked: bool) -> None:
    b, f, e, h = shape = Shape(3, 5, 4, 2)
    x, p, _, _ = draw_problem(shape, dtype)
    mask = torch.rand(b, 1, f) < 0.4 if masked else None
    ops, everything = torch.ops.autoint_fast, NEED_INPUT | NEED_WEIGHTS
    layout, scale = list(Layout(h, e, e, e)), 0.5
    packed = ops.fold(list(p), EVERY, layout, scale, "torch")
    out, _ = ops.interact(x, packed, mask, layout, "torch", 0)
    leaf, leaves = x.clone().requires_grad_(), [t.clone().requires_grad_() for t in p]
    differentiable = packed.clone().requires_grad_()
    torch.library.opcheck(ops.fold.default, (leaves, EVERY, layout, scale, "torch"))
    torch.library.opcheck(ops.fold.default, (list(p), EVERY, layout, scale, "torch"))
    torch.library.opcheck(
        ops.fold_backward.default, (torch.randn_like(packed), list(p), EVERY, layout, scale, "torch", [True] * 10)
    )
    wanted = [True, False] * 5
    torch.library.opcheck(
        ops.fold_backward.default, (torch.randn_like(packed), list(p), EVERY, layout, scale, "torch", wanted)
    )
    torch.library.opcheck(ops.interact.default, (leaf, differentiable, mask, layout, "torch", everything))
    torch.library.opcheck(ops.interact.default, (leaf, packed, mask, layout, "torch", NEED_INPUT))
    torch.library.opcheck(ops.interact.default, (x, differentiable, mask, layout, "torch", NEED_WEIGHTS))
    for needs in (everything, NEED_INPUT, NEED_WEIGHTS):
        torch.library.opcheck(
            ops.interact_backward.default, (torch.randn_like(out), x, packed, out, mask, layout, "torch", needs)
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fakes_give_the_strides_that_come(layout: str) -> None:
    """A fake that promises other strides than the operator's is a wrong number under Inductor."""
    b, f, e, h = shape = Shape(3, 5, 4, 2)
    x, p, _, _ = draw_problem(shape)
    x, grad = LAYOUTS[layout](x), LAYOUTS[layout](torch.randn(b, f, e))
    p = InteractingParameters(*(t.t().contiguous().t() if t.ndim == 2 else t for t in p))
    ops, layout, scale = torch.ops.autoint_fast, list(Layout(h, e, e, e)), 0.5
    packed = ops.fold(list(p), EVERY, layout, scale, "torch")
    out, _ = ops.interact(x, packed, None, layout, "torch", 0)
    calls = [
        (ops.fold, (list(p), EVERY, layout, scale, "torch")),
        (ops.fold_backward, (torch.randn_like(packed), list(p), EVERY, layout, scale, "torch", [True] * 10)),
        (ops.interact, (x, packed, None, layout, "torch", 0)),
        (ops.interact_backward, (grad, x, packed, out, None, layout, "torch", NEED_INPUT | NEED_WEIGHTS)),
    ]
    for function, arguments in calls:
        real = function(*arguments)
        with FakeTensorMode() as mode:
            fake = function(*tree_map_only(Tensor, mode.from_tensor, arguments))
        for one, two in zip(tree_leaves(real), tree_leaves(fake), strict=True):
            assert (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype), function


def test_fake_tensor_mode() -> None:
    with FakeTensorMode():
        layer = InteractingLayer(2, 8)
        x = torch.randn(3, 5, 8, requires_grad=True)
        out = layer(x, torch.zeros(3, 1, 5, dtype=torch.bool))
        assert out.shape == (3, 5, 8)
        out.sum().backward()
        assert x.grad.shape == x.shape and layer.w_ks.bias.grad.shape == (16,)


@pytest.mark.parametrize("tracing", ["fake", "symbolic"])
def test_make_fx(tracing: str) -> None:
    """Forward and backward in one graph that holds the operators, not what is inside of them."""
    layer = InteractingLayer(2, 8, backend="torch", dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def step(parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
        leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        out = torch.func.functional_call(layer, leaves, (x,))
        return (out, *torch.autograd.grad(out.square().sum(), list(leaves.values())))

    x = torch.randn(3, 5, 8, dtype=torch.float64)
    graph = make_fx(step, tracing_mode=tracing)(parameters, x)
    names = {str(node.target) for node in graph.graph.nodes}
    assert {f"autoint_fast.{n}.default" for n in ("fold", "interact", "fold_backward", "interact_backward")} <= names
    x = torch.randn(9 if tracing == "symbolic" else 3, 5, 8, dtype=torch.float64)
    for got, expected in zip(graph(parameters, x), step(parameters, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def test_compiled_layer_is_copied() -> None:
    """deepcopy of a compiled module, and pickle of the module inside of one."""
    compiled = torch.compile(InteractingLayer(2, 8, dtype=torch.float64), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    expected = compiled(x)
    assert torch.equal(copy.deepcopy(compiled)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(compiled._orig_mod))(x), expected)


def test_reference_layer_compiles() -> None:
    layer = ReferenceInteractingLayer(2, 8, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in (3, 4, 5):
        x = torch.randn(batch, 5, 8, dtype=torch.float64)
        assert errors(compiled(x), expected_output(layer, x)).maximum <= 1e-12


def test_width_of_one_in_training() -> None:
    """With E = 1 a transposed gradient is contiguous: an operator must not return a view of what it was given."""
    layer = InteractingLayer(1, 1, dtype=torch.float64)
    x = torch.randn(4, 5, 1, dtype=torch.float64)
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).sum().backward()
    got = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    layer(x).sum().backward()
    for one, p in zip(got, layer.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad, rtol=0, atol=1e-12)


# --- the layers of our own ------------------------------------------------------------------------------------------


def draw_layer(name: str) -> tuple[nn.Module, Tensor, Definition]:
    """A layer, fp64, an input and the layer's formula; of the flattened layer so many samples that it would fold."""
    if name == "flattened":
        return *draw_flattened(FlattenedShape(17, 4, 3, 2), torch.float64, backend="torch"), flattened
    layer, x = draw_paper(PaperShape(17, 4, 6, 4, 2), torch.float64, backend="torch")
    layer.form = name
    return layer, x, paper


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("name", ["folded", "factored", "flattened"])
def test_own_layers(name: str, frozen: bool) -> None:
    """One or two compilations serve every batch; output and gradients are those of the formula."""
    layer, samples, definition = draw_layer(name)
    counter = CompileCounterWithBackend("aot_eager")
    if frozen:
        layer.eval().freeze()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for batch in (4, 17, 3):
        x = samples[:batch].clone().requires_grad_()
        leaves = [x] if frozen else [x, *layer.parameters()]
        mask = draw_mask("(B,F,F)", batch, 4)
        out, expected = compiled(x, mask), definition(layer, x, mask)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        grad = torch.randn_like(out)
        got, truth = (torch.autograd.grad(o, leaves, grad) for o in (out, expected))
        torch.testing.assert_close(got, truth, rtol=0, atol=1e-11)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations"


@pytest.mark.parametrize("name", ["factored", "flattened"])
def test_own_layers_exported_with_a_dynamic_batch(name: str) -> None:
    layer, x, definition = draw_layer(name)
    batch = torch.export.Dim("batch")
    mask = draw_mask("(B,1,F)", 17, 4)
    program = torch.export.export(layer, (x, mask), dynamic_shapes={"x": {0: batch}, "mask": {0: batch}})
    for size in (17, 2):
        x, mask = torch.randn(size, *x.shape[1:], dtype=torch.float64), draw_mask("(B,1,F)", size, 4)
        assert errors(program.module()(x, mask), definition(layer, x, mask)).maximum <= 1e-12
