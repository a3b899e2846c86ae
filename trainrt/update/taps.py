"""Read a tensor of the step without changing how TensorFlow computes it.

Grappler, TensorFlow's graph optimizer, regroups sums and products: `lr * (a * b)` becomes `(lr * a) * b` when nothing
else reads `a * b`. One more reader, and the bits of the update are others. So a tensor that such an op makes is not
read; the op is made again, for the reader alone, with a mark on it that keeps the two from being merged.

Found with the arithmetic optimizer's own log on SGD and the scale of a BatchNormalization. The stages that look at the
number of readers are MinimizeBroadcasts, AddOpsRewrite and HoistCommonFactorOutOfAggregation, for the ops in
`REGROUPED`.
"""

from __future__ import annotations

import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2

REGROUPED = frozenset({"Mul", "Add", "AddV2", "AddN", "Sub"})
"""Ops that grappler regroups with their single reader."""

_TRANSPARENT = frozenset({"Identity", "Reshape", "StopGradient", "PreventGradient", "Squeeze", "ExpandDims"})
_CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
_DEPTH = 8


def tap(tensor: tf.Tensor | None, depth: int = _DEPTH) -> tf.Tensor | None:
    """The same value, in a tensor of its own where reading the given one could change it for others.

    Args:
      tensor: Any tensor; eager ones and those of other ops come back as they are.
    """
    if tensor is None or not _symbolic(tensor) or not depth or tensor.op.graph is not _graph():
        return tensor
    op = tensor.op
    if op.type in _TRANSPARENT and _makes_regrouped(op.inputs[0], depth - 1):
        source = tap(op.inputs[0], depth - 1)
        return tf.reshape(source, tensor.shape) if tensor.shape.is_fully_defined() else tensor
    if op.type not in REGROUPED:
        return tensor
    inputs = [tap(t, depth - 1) for t in op.inputs]
    copy = (
        tf.raw_ops.AddN(inputs=inputs) if op.type == "AddN" else getattr(tf.raw_ops, op.type)(x=inputs[0], y=inputs[1])
    )
    copy.op._set_attr("_trainrt_tap", attr_value_pb2.AttrValue(b=True))
    return copy


def is_regrouped(gradient) -> bool:
    """Whether grappler may compute the product of this gradient and a factor in another order than it is written.

    Gradients that come out of a call of a function count too: it is inlined first.
    """
    return _symbolic(gradient) and _makes_regrouped(gradient, _DEPTH, frozenset({"Mul"}) | _CALLS)


def _makes_regrouped(tensor: tf.Tensor, depth: int, kinds: frozenset[str] = REGROUPED) -> bool:
    op = tensor.op
    if op.type in _TRANSPARENT and depth:
        return _makes_regrouped(op.inputs[0], depth - 1, kinds)
    return op.type in kinds


def _symbolic(tensor) -> bool:
    return isinstance(tensor, tf.Tensor) and not hasattr(tensor, "numpy")


def _graph():
    return tf.compat.v1.get_default_graph()
