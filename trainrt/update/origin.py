"""How far the weights have gone: copies of where they started, and the moments of the difference.

The copies cost the memory of the weights once more, which is why nobody makes them who did not ask.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf

from trainrt import doors
from trainrt.record.vocabulary import DISTANCE
from trainrt.update import moments
from trainrt.update.fused import Observation
from trainrt.update.generic import value_of


class Origins:
    """Copies of a built model's trainable weights.

    A checkpoint keeps them like every variable that the step reads, so that a resumed run measures from the same start.
    """

    def __init__(self, model: keras.Model):
        self._weights = {doors.variable_key(v): v for v in model.trainable_weights if v.value.dtype.is_floating}
        self._starts = {
            key: tf.Variable(v.value, trainable=False, name=f"start/{i}")
            for i, (key, v) in enumerate(self._weights.items())
        }

    def reset(self) -> None:
        """From here on."""
        for key, start in self._starts.items():
            start.assign(self._weights[key].value)

    def add(self, seen: Observation, variables: Sequence, kernels: bool) -> Observation:
        """The observation of a step with one more subject: weight after the step minus weight at the start."""
        starts = [self._starts.get(doors.variable_key(v)) for v in variables]
        apart = [None if s is None else value_of(v) - s for v, s in zip(variables, starts, strict=True)]
        rows = moments.measure(apart, kernels)
        cube = tf.concat([seen.cube, rows[:, None]], axis=1)
        return seen._replace(subjects=(*seen.subjects, DISTANCE), cube=cube)
