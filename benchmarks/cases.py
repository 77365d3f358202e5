"""What is compared: the named shapes, the batch sizes, and a case, which is one of each in one mode."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import NamedTuple

import torch

from autoint_fast.weights import Layout

FORWARD = "forward"
TRAINING = "forward+backward"
MODES = (FORWARD, TRAINING)

DTYPES = MappingProxyType({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16})

# A batch of this size or less is a request being served, and those get one thread each.
ONE_THREAD_BATCH = 512


class Shape(NamedTuple):
    """Fields, embedding size and heads of a layer's input."""

    name: str
    fields: int
    emb_size: int
    n_head: int

    def __str__(self) -> str:
        return f"{self.name} {self.fields}x{self.emb_size}x{self.n_head}"


SHAPES = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            Shape("criteo", 39, 16, 2),
            Shape("avazu", 24, 16, 2),
            Shape("kdd12", 13, 16, 2),
            Shape("movielens", 7, 16, 2),
            Shape("wide", 200, 16, 2),
            Shape("criteo-1head", 39, 16, 1),
            Shape("criteo-4heads", 39, 16, 4),
            Shape("criteo-e10", 39, 10, 2),
            Shape("criteo-e40", 39, 40, 2),
            Shape("criteo-e64", 39, 64, 4),
            Shape("wide64", 64, 16, 2),
            Shape("wide100", 100, 32, 4),
            Shape("wide300", 300, 64, 8),
        )
    }
)

# Few enough for two cores and two minutes: short rows and long ones, serving and training.
DEFAULT_BATCHES = MappingProxyType(
    {"criteo": (32, 512, 4096), "avazu": (1024,), "movielens": (32, 4096), "wide": (32, 64)}
)
FULL_BATCHES = (32, 128, 512, 1024, 4096, 16_384, 65_536)


class Case(NamedTuple):
    """One comparison: a layer of `shape` over `batch` samples.

    criteo: the path of a Criteo log whose rows are the input; None for random numbers.
    """

    shape: Shape
    batch: int
    mode: str
    threads: int
    dtype: str = "fp32"
    device: str = "cpu"
    criteo: str | None = None

    @property
    def training(self) -> bool:
        return self.mode == TRAINING

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]

    @property
    def layout(self) -> Layout:
        return Layout(self.shape.n_head, self.shape.emb_size, self.shape.emb_size, self.shape.emb_size)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        return f"{self.shape}, B={self.batch:,}, {self.mode}"


def parse_shape(text: str) -> Shape:
    """The shape called `text`, or that of a text like "39x16x2": fields, embedding size, heads.

    Raises ValueError for anything else.
    """
    if text in SHAPES:
        return SHAPES[text]
    if re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text, re.ASCII):
        shape = Shape("custom", *map(int, text.split("x")))
        return next((known for known in SHAPES.values() if known[1:] == shape[1:]), shape)
    raise ValueError(f"expected FxExH, as in 39x16x2, or one of {', '.join(SHAPES)}; got {text!r}")


def batches(shape: Shape, full: bool) -> tuple[int, ...]:
    """The batch sizes a shape is run at where none are asked for."""
    return FULL_BATCHES if full else DEFAULT_BATCHES.get(shape.name, (32, 1024))


def threads_for(batch: int, asked: int | None) -> int:
    """The CPU threads a case runs on: those asked for, else one for a small batch and torch's own number."""
    if asked is not None:
        return asked
    return 1 if batch <= ONE_THREAD_BATCH else torch.get_num_threads()
