"""Other libraries, imported as far as they are needed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import typing
from types import MappingProxyType, ModuleType

# Packages whose own code is not run. DeepCTR-Torch's starts a thread that asks PyPI for newer versions and imports all
# its models; pytorch-widedeep's imports all it has, with what that needs for images and texts.
BARE = MappingProxyType(
    {
        "deepctr_torch": ("deepctr_torch", "deepctr_torch.models"),
        "pytorch_widedeep": (
            "pytorch_widedeep",
            "pytorch_widedeep.utils",
            "pytorch_widedeep.models",
            "pytorch_widedeep.models.rec",
            "pytorch_widedeep.models.tabular",
        ),
    }
)
# A module that names the types of all models: importing it would import them.
NAMES_OF_TYPES = "pytorch_widedeep.wdtypes"


class Unable(Exception):
    """Why something cannot take part, and which package it wants, if that is it."""

    def __init__(self, why: str, package: str = "") -> None:
        super().__init__(why)
        self.package = package


def load(name: str) -> ModuleType:
    """The module called `name`. Raises Unable where it is not installed or cannot be imported."""
    root = name.partition(".")[0]
    try:
        if root not in sys.modules:
            for package in BARE.get(root, ()):
                _install_bare(package)
        return importlib.import_module(name)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == root
        raise Unable("not installed" if missing else f"cannot be imported: {error}", root) from None


def _install_bare(name: str) -> None:
    """Makes modules of the package `name` importable without running the package's own `__init__`."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    package = sys.modules[name] = ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations or ())
    package.__spec__ = spec
    if name == NAMES_OF_TYPES.rpartition(".")[0]:
        types = sys.modules[NAMES_OF_TYPES] = ModuleType(NAMES_OF_TYPES)
        vars(types).update({known: getattr(typing, known) for known in typing.__all__}, __getattr__=_any_type)


def _any_type(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(name)
    return typing.Any
