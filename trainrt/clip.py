"""Clips: gradient moments in, one scale a weight out.

A clip spends the very norm that is recorded, so what the record shows is what was done. `trainrt.fit(clip=1.0)` means
`trainrt.clip.GlobalNorm(1.0)`. A clip of your own is any callable from moments [P, M] to scales [P].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import tensorflow as tf

from trainrt.record.vocabulary import DEVICE_MOMENTS

Clip = Callable[[tf.Tensor], tf.Tensor]
"""[P, 6] float64 moments of the gradients (columns as in `record.DEVICE_MOMENTS`; a NaN row is a weight without a
gradient) to [P] float64 scales in [0, 1] by which the gradients are multiplied."""

_SUMSQ, _ABSMAX = DEVICE_MOMENTS.index("sumsq"), DEVICE_MOMENTS.index("absmax")
_NONFINITE = DEVICE_MOMENTS.index("nonfinite")


@dataclasses.dataclass(frozen=True)
class Known:
    """A clip with a threshold that the native kernels compute too; `native` is its name there."""

    threshold: float
    native: ClassVar[str]

    def __post_init__(self):
        _positive("threshold", self.threshold)

    def __call__(self, moments: tf.Tensor) -> tf.Tensor:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class GlobalNorm(Known):
    """Scales all gradients together so that the L2 norm over all weights is at most `threshold`.

    A gradient with a NaN or an infinite element makes every scale NaN, as Keras's `global_clipnorm` does: there is no
    norm to clip to.

    Source: Pascanu et al., On the difficulty of training recurrent neural networks, 2013.
    """

    native = "global_norm"

    def __call__(self, moments: tf.Tensor) -> tf.Tensor:
        measured = tf.logical_not(tf.math.is_nan(moments[:, 0]))
        sumsq = tf.reduce_sum(tf.where(measured, moments[:, _SUMSQ], 0.0))
        broken = tf.reduce_any(tf.logical_and(measured, moments[:, _NONFINITE] > 0))
        scale = tf.where(broken, tf.constant(math.nan, tf.float64), _at_most(self.threshold, tf.sqrt(sumsq)))
        return tf.fill(tf.shape(moments)[:1], scale)


@dataclasses.dataclass(frozen=True)
class WeightNorm(Known):
    """Scales each gradient so that its own L2 norm is at most `threshold`, as Keras's `clipnorm`."""

    native = "weight_norm"

    def __call__(self, moments: tf.Tensor) -> tf.Tensor:
        return _unless_broken(moments, _at_most(self.threshold, tf.sqrt(moments[:, _SUMSQ])))


@dataclasses.dataclass(frozen=True)
class LargestMagnitude(Known):
    """Scales each gradient so that its largest magnitude is at most `threshold`.

    Unlike Keras's `clipvalue`, which cuts single elements, it keeps the direction of the gradient.
    """

    native = "largest_magnitude"

    def __call__(self, moments: tf.Tensor) -> tf.Tensor:
        return _unless_broken(moments, _at_most(self.threshold, moments[:, _ABSMAX]))


KNOWN = (GlobalNorm, WeightNorm, LargestMagnitude)


def own(optimizer) -> Known | None:
    """The clip that a Keras optimizer does itself; None for none.

    `clipvalue` cuts single elements, which is no scale; it is 1 unless the largest magnitude is cut, and then the share
    of that which is left.
    """
    if optimizer.clipnorm:
        return WeightNorm(optimizer.clipnorm)
    if optimizer.global_clipnorm:
        return GlobalNorm(optimizer.global_clipnorm)
    if optimizer.clipvalue:
        return LargestMagnitude(optimizer.clipvalue)
    return None


def resolve(clip: float | Clip | None) -> Clip | None:
    """What `fit(clip=...)` means: a number is a global norm.

    Raises:
      TypeError: Neither a number nor a callable.
      ValueError: A number that is not positive and finite.
    """
    if clip is None:
        return None
    if isinstance(clip, (int, float)) and not isinstance(clip, bool):
        return GlobalNorm(_positive("clip", clip))
    if isinstance(clip, type) or not callable(clip):
        raise TypeError(
            "`clip` must be a number (the global norm), a clip such as trainrt.clip.WeightNorm(1.0), or a callable "
            f"from moments [P, 6] to scales [P]. Received: clip={clip!r} of type {type(clip).__name__}."
        )
    return clip


def _positive(name: str, value: float) -> float:
    value = float(value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be a positive, finite norm. Received: {value!r}. For no clip pass clip=None.")
    return value


def _at_most(threshold: float, norm: tf.Tensor) -> tf.Tensor:
    return tf.where(norm > threshold, threshold / tf.where(norm > threshold, norm, tf.ones_like(norm)), 1.0)


def _unless_broken(moments: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    return tf.where(moments[:, _NONFINITE] > 0, tf.constant(math.nan, tf.float64), scale)
