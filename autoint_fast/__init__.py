"""AutoInt's interacting layer, fused into one pass over each sample.

from autoint_fast import InteractingLayer

layer = InteractingLayer(n_head=2, emb_size=16)
out = layer(x)  # x (B, F, 16) -> (B, F, 16)

The layers of a model built on another library: print(autoint_fast.accelerate(model)).
"""

from pathlib import Path as _Path

# From the repository's root, the folder autoint_fast shadows a regular or strict editable install, and the engines
# lie beside it instead of in it.
if not (_Path(__path__[0]) / "kernels").is_dir():
    __path__.append(str(_Path(__path__[0]).parent))

from .flattened import FlattenedInteractingLayer
from .fused import why
from .layer import InteractingLayer
from .libraries import register_adapter
from .model import AutoInt
from .paper import PaperInteractingLayer
from .reference import ReferenceInteractingLayer, interacting_reference
from .swap import Report, accelerate, restore
from .version import __version__
from .weights import InteractingParameters, Interaction

__all__ = [
    "AutoInt",
    "FlattenedInteractingLayer",
    "InteractingLayer",
    "InteractingParameters",
    "Interaction",
    "PaperInteractingLayer",
    "ReferenceInteractingLayer",
    "Report",
    "__version__",
    "accelerate",
    "interacting_reference",
    "register_adapter",
    "restore",
    "why",
]
