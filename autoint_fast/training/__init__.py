"""Training AutoInt on a prepared click log, and what a trained model is good for.

Needs autoint_fast[train]. The commands of `python -m autoint_fast` are these functions.
"""

from .evaluate import Metrics, evaluate
from .explain import Explanation, explain
from .export import Exported, export
from .predict import predict
from .settings import Settings
from .train import NonFiniteLoss, Outcome, Progress, train

__all__ = [
    "Explanation",
    "Exported",
    "Metrics",
    "NonFiniteLoss",
    "Outcome",
    "Progress",
    "Settings",
    "evaluate",
    "explain",
    "export",
    "predict",
    "train",
]
