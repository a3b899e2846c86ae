"""Tries a fused update on a device: a few steps of small random weights, beside Keras's own optimizer, bit for bit.

The parity tests do the same at length, on the CPU. A GPU has other instructions, and TensorFlow other kernels for it,
so there a process tries each optimizer that it meets before it trusts the fused pass with a model. What is compared:
every weight and every slot, to the bit, and the statistics with what the tensors themselves say in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainrt import doors
from trainrt.record.vocabulary import DEVICE_MOMENTS, JOINT, Moments
from trainrt.update import cuda, native_ops

SHAPES = ((), (3,), (33,), (7, 5), (1031,), (130, 129))
STEPS = 3


def complaint(
    optimizer: keras.optimizers.Optimizer, dtype: str, device: str, fuse: Callable[[Any, list], Any]
) -> str | None:
    """What a fused update does otherwise than the optimizer.

    Args:
      optimizer: An optimizer; it is not touched, others are made from its configuration.
      dtype: Of the weights.
      device: Where to try it.
      fuse: (built optimizer, weights) -> the fused pass, a `fused.Fused`.

    Returns:
      None if all agrees; else what does not, as the end of a sentence.
    """
    rng, loss_scale = np.random.default_rng(0), optimizer.loss_scale_factor or 1.0
    with tf.init_scope(), tf.device(device):
        theirs, ours = ([_variable(rng_, dtype, i) for i, rng_ in _seeds()] for _ in range(2))
        reference, mine = (_copy(optimizer, weights) for weights in (theirs, ours))
        fused = fuse(mine, ours)
        keras_step = tf.function(lambda gradients: reference.apply(gradients, theirs), autograph=False)
        step = tf.function(lambda gradients: tuple(fused.apply(gradients)[1:3]), autograph=False)
        for _ in range(STEPS):
            gradients = [tf.cast(tf.constant(rng.standard_normal(s) * 0.1), dtype) for s in SHAPES]
            before = [_array(w) for w in ours]
            keras_step(gradients)
            cube, joint = step(gradients)
            for one, other in zip([*theirs, *reference.variables], [*ours, *mine.variables], strict=True):
                if different := _different(_array(one), _array(other)):
                    return f"{different} of {one.path} are not Keras's"
            slots = [getattr(mine, attribute) for attribute in fused.rule.slots.values()]
            for i, weight in enumerate(ours):
                after, gradient = _array(weight), _wide(gradients[i].numpy()) / loss_scale
                subjects = [gradient, after - before[i], after, *(_array(row[i]) for row in slots)]
                if wrong := _wrong_moments(cube[i].numpy(), subjects):
                    return wrong
                product = gradient * _wide(subjects[1])
                column = float(joint[i, JOINT.index("gradient_update")])
                if abs(column - product.sum()) > 1e-6 * np.abs(product).sum():
                    return "the inner product of gradient and update is wrong"
    return None


@tf.autograph.experimental.do_not_convert
def refusal(variables: Sequence) -> str | None:
    """Why the kernels may not touch these weights; None if they may: on the host, or where they passed their trial."""
    if (reason := cuda.refusal(variables)) is not None or not cuda.on_gpu(variables[0]):
        return reason
    device = doors.raw(variables[0]).device
    return cuda.distrust(("statistics", device), lambda: statistics_complaint(device))


def statistics_complaint(device: str) -> str | None:
    """What the kernels that only look say otherwise on a device than on the host; None if nothing."""
    rng = np.random.default_rng(0)
    draws = [[rng.standard_normal(s).astype("float32") * 0.1 for s in SHAPES] for _ in range(4)]
    draws[3] = [np.abs(x) for x in draws[3]]
    rows = [[0.0, 1e-3, 1e-6, 0.01, 0.5, 0.1]] * len(SHAPES)
    seen = []
    with tf.init_scope():
        for place in ("/CPU:0", device):
            with tf.device(place):
                before, gradients, momentum, second = ([tf.constant(x) for x in draw] for draw in draws)
                after = [w - 0.01 * g for w, g in zip(before, gradients, strict=True)]
                measured, scale = native_ops.measure_and_clip(gradients, "global_norm", 0.5)
                cube, joint = native_ops.observe(
                    before, after, gradients, [momentum, second], measured=None, scale=scale,
                    table=tf.constant(rows, tf.float64), momentum=[0] * len(SHAPES), second=[1] * len(SHAPES),
                )  # fmt: skip
            seen.append([x.numpy() for x in (measured, scale, cube, joint)])
    for name, here, there in zip(("moments", "scale", "cube", "joint"), *seen, strict=True):
        size = np.abs(here) + (np.sqrt(here[..., 2:3] * here[..., :1]) if name in ("moments", "cube") else 0)
        if name == "joint":  # the inner products cancel: what bounds them is in the cube
            norms = np.sqrt(seen[0][2][:, :, 2])
            size[:, JOINT.index("gradient_update")] = norms[:, 0] * norms[:, 1]
            size[:, JOINT.index("gradient_momentum")] = norms[:, 0] * norms[:, 3]
        if not (np.abs(here - there) <= 2e-6 * size).all():
            return f"the {name} are not those of the host"
    return None


def key(optimizer: keras.optimizers.Optimizer, dtype: str, device: str) -> tuple[str, str, str, str]:
    """What a trial depends on: its result holds for all that have the same key."""
    with tf.init_scope():  # the learning rate is a variable
        config = optimizer.get_config()
    config = {k: v for k, v in config.items() if k not in ("name", "learning_rate")}
    return type(optimizer).__name__, device, dtype, json.dumps(config, sort_keys=True, default=str)


def _seeds():
    return [(i, np.random.default_rng(i)) for i in range(len(SHAPES))]


def _variable(rng: np.random.Generator, dtype: str, index: int) -> keras.Variable:
    value = (rng.standard_normal(SHAPES[index]) * 0.1).astype("float32")
    return keras.Variable(value, dtype=dtype, name=f"trial_{index}")


def _copy(optimizer, weights: list) -> keras.optimizers.Optimizer:
    copy = type(optimizer).from_config({**optimizer.get_config(), "learning_rate": 0.01})
    copy.build(weights)
    return copy


def _array(variable) -> np.ndarray:
    return np.asarray(variable.value.numpy())


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def _different(a: np.ndarray, b: np.ndarray) -> int:
    """How many elements differ in their bits; a NaN is a NaN."""
    if a.dtype.kind in "iu":
        return int((a != b).sum())
    bits = f"u{a.dtype.itemsize}"
    same = (a.view(bits) == b.view(bits)) | (np.isnan(_wide(a)) & np.isnan(_wide(b)))
    return int((~same).sum())


def _wrong_moments(rows: np.ndarray, subjects: Sequence[np.ndarray]) -> str | None:
    """What of [S, 6] moments is not what the tensors say."""
    for row, subject in zip(rows, subjects, strict=True):
        wide = _wide(subject)
        twin = Moments.of(wide).array[: len(DEVICE_MOMENTS)]
        for name, got, want in zip(DEVICE_MOMENTS, row, twin, strict=True):
            size = np.abs(wide).sum() if name == "sum" else abs(want)
            if not abs(got - want) <= (1e-6 * size if name in ("sum", "sumsq", "absmax") else 0):
                return f"the statistic {name} is {got:.9g} and not {want:.9g}"
    return None
