"""The Keras function of real Dense layers, on Keras's torch backend, against `FlattenedInteractingLayer`.

Run by test_flattened.py in a process of its own: Keras takes its backend once, from KERAS_BACKEND.
"""

from __future__ import annotations

import copy
import math

import keras
import torch
from keras import layers, ops
from torch import Tensor

from autoint_fast import FlattenedInteractingLayer
from tests.layers import flattened
from tests.numerics import assert_close_to_truth

FIELDS, EMB_SIZE, HEADS = 5, 6, 3


class Function:
    """`interacting_layer(x, head_num)`: its five Dense layers are created in the order of its calls of Dense."""

    def __init__(self) -> None:
        width, size = HEADS * EMB_SIZE, FIELDS * EMB_SIZE
        self.dense = [layers.Dense(n, bias_initializer="normal") for n in (*[width] * 3, size, size)]
        self.flatten = layers.Flatten()

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
    """By the numerical rule, with Keras for the plain layer; in fp32, in which it multiplies whatever it is given."""
    assert keras.backend.backend() == "torch"
    torch.manual_seed(0)
    for batch in (64, FIELDS * EMB_SIZE + 1, FIELDS * EMB_SIZE):
        function = Function()
        x = torch.randn(batch, FIELDS, EMB_SIZE)
        leaves = [x.clone().requires_grad_(), x.clone().requires_grad_(), x.double().requires_grad_()]
        theirs = function(leaves[0])
        layer = FlattenedInteractingLayer(FIELDS, EMB_SIZE, HEADS)
        layer.load_keras_weights([w for dense in function.dense for w in dense.get_weights()])
        exact_layer = copy.deepcopy(layer).double()
        ours, truth = layer(leaves[1]), flattened(exact_layer, leaves[2], None)
        assert_close_to_truth("out", ours, theirs, truth)
        uncertain = ((ours > 0) != (truth > 0)) | ((theirs > 0) != (truth > 0))
        grad = torch.randn(ours.shape).masked_fill(uncertain, 0.0)
        variables = [w.value for dense in function.dense for w in dense.weights]
        results = [(theirs, [leaves[0], *variables]), (ours, [leaves[1], *layer.parameters()])]
        results.append((truth, [leaves[2], *exact_layer.parameters()]))
        grads = zip(*(torch.autograd.grad(out, inputs, grad.to(out.dtype)) for out, inputs in results), strict=True)
        for name, (their, our, true) in zip(("x", *(n for n, _ in layer.named_parameters())), grads, strict=True):
            if name == "w_ks.bias":
                assert not our.any()
                continue
            assert_close_to_truth(name, our, their if name == "x" else their.t(), true)
    print("agrees")


if __name__ == "__main__":
    main()
