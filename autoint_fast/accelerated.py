"""The classes of accelerated modules, each made from the class a module had, and importable by a name that says which.

From `pkg.mod.Layer` comes the attribute `pkg/mod:Layer` of this module, where pickle and spawned processes find it.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from .libraries import find


def accelerated_class(cls: Any) -> type:
    """The one class that derives from `cls` and what accelerates it. Raises LookupError where no adapter is known."""
    found = find(cls)
    if found is None:
        raise LookupError(f"no adapter for {cls.__module__}.{cls.__qualname__}; call register_adapter first")
    bases = (found[1], cls)
    # The classes themselves remember, for as long as there is a use for it.
    made = next((subclass for subclass in cls.__subclasses__() if subclass.__bases__ == bases), None)
    name = f"{cls.__module__}:{cls.__qualname__}".replace(".", "/")
    return made or type(cls.__name__, bases, {"__module__": __name__, "__qualname__": name, "__doc__": cls.__doc__})


def is_made(cls: type) -> bool:
    """Whether `cls` is what `accelerated_class` has made, rather than derived from that."""
    return cls.__module__ == __name__ and len(cls.__bases__) == 2


def original_class(cls: type) -> type:
    """What `accelerated_class` made `cls` from."""
    return cls.__bases__[1]


def class_of(module: nn.Module) -> type:
    """The module's class, without the one that `torch.nn.utils.parametrize` derived for it."""
    cls = type(module)
    return cls.__bases__[0] if cls.__module__ == parametrize.__name__ else cls


def change_class(module: nn.Module, new: type) -> None:
    """Puts `new` in the place of `class_of(module)`."""
    cls = type(module)
    if cls is not class_of(module):
        # Copies of the module share that class, and may stay as they are.
        kept = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        new = type(cls.__name__, (new,), kept)
    module.__class__ = new


def __getattr__(name: str) -> Any:
    # Where no adapter is known, that LookupError gets through pickle, which replaces an AttributeError by its own.
    module, colon, qualname = name.replace("/", ".").partition(":")
    if not colon:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return accelerated_class(functools.reduce(getattr, qualname.split("."), importlib.import_module(module)))
