"""The Keras function of real Dense layers, on Keras's torch backend, against `FlattenedInteractingLayer`.

Run by test_flattened.py in a process of its own: Keras takes its backend once, from KERAS_BACKEND.
"""

from __future__ import annotations

import math

import keras
import torch
from keras import layers, ops
from torch import Tensor

from autoint_fast import FlattenedInteractingLayer

FIELDS, EMB_SIZE, HEADS = 5, 6, 3


class Function:
    """`interacting_layer(x, head_num)`: its five Dense layers are created in the order of its calls of Dense."""

    def __init__(self) -> None:
        width, size = HEADS * EMB_SIZE, FIELDS * EMB_SIZE
        self.dense = [layers.Dense(n, bias_initializer="normal", dtype="float64") for n in (*[width] * 3, size, size)]
        self.flatten = layers.Flatten(dtype="float64")

    def __call__(self, x: Tensor) -> Tensor:
        q, k, v = (dense(x) for dense in self.dense[:3])
        heads = []
        for h in range(HEADS):
            part = slice(h * EMB_SIZE, (h + 1) * EMB_SIZE)
            logits = ops.matmul(q[..., part], ops.transpose(k[..., part], (0, 2, 1))) / math.sqrt(EMB_SIZE)
            heads.append(self.flatten(ops.matmul(ops.softmax(logits, axis=-1), v[..., part])))
        out = self.dense[3](ops.concatenate(heads, axis=1))
        return ops.relu(out + self.dense[4](self.flatten(x)))


def main() -> None:
    assert keras.backend.backend() == "torch"
    torch.manual_seed(0)
    for batch in (4, FIELDS * EMB_SIZE + 1):
        function = Function()
        x = torch.randn(batch, FIELDS, EMB_SIZE, dtype=torch.float64, requires_grad=True)
        expected = function(x)
        weights = [w for dense in function.dense for w in dense.get_weights()]
        variables = [w.value for dense in function.dense for w in dense.weights]
        layer = FlattenedInteractingLayer(FIELDS, EMB_SIZE, HEADS, dtype=torch.float64)
        layer.load_keras_weights(weights)
        out = layer(x)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        grad = torch.randn_like(expected)
        got = torch.autograd.grad(out, [x, *layer.parameters()], grad)
        truth = torch.autograd.grad(expected, [x, *variables], grad)
        for ours, theirs in zip(got, truth, strict=True):
            torch.testing.assert_close(ours, theirs if ours.shape == x.shape else theirs.t(), rtol=0, atol=1e-11)
    print("agrees")


if __name__ == "__main__":
    main()
