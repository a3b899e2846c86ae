"""What an optimizer is about to divide each element by, and how much of a weight it is about to decay.

Adam, AdamW, Nadam, RMSprop and Adagrad step along something divided by `sqrt(v + inside) + outside`, where v is a slot
of the weight, its second moment, and one of `inside` and `outside` is the optimizer's epsilon. How far one element goes
per unit of what is divided is then its own learning rate, `rate / (sqrt(v + inside) + outside)`. Here are these
scalars, read before the step and in the terms of Keras's own `update_step`:

| optimizer | v | rate | inside | outside | correction |
|---|---|---|---|---|---|
| Adam, AdamW | velocity, or velocity_hat under amsgrad | lr sqrt(1 - b2^t) / (1 - b1^t) | 0 | eps | 1 - b2^t |
| Nadam | velocity | lr sqrt(1 - b2^t) | 0 | eps sqrt(1 - b2^t) | 1 - b2^t |
| RMSprop | velocity | lr | eps | 0 | 1 |
| Adagrad | accumulator | lr | eps | 0 | 1 |

Any other optimizer has none: also a subclass with its own `update_step`, a centered RMSprop, which divides by a
variance, and gradient accumulation, where most steps divide by nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from trainrt import doors
from trainrt.record.vocabulary import DEVICE_MOMENTS

SUMSQ, ABSMAX = DEVICE_MOMENTS.index("sumsq"), DEVICE_MOMENTS.index("absmax")


@dataclasses.dataclass(frozen=True)
class Division:
    """What one optimizer divides by. Scalars [] float64.

    Attributes:
      slot: Name of the second moment.
      rate, inside, outside: As in the table above.
      floor: A second moment under it counts for less than epsilon does.
      correction: By which a second moment is divided to have no bias to zero.
    """

    slot: str
    rate: tf.Tensor
    inside: tf.Tensor
    outside: tf.Tensor
    floor: tf.Tensor
    correction: tf.Tensor


@dataclasses.dataclass(frozen=True)
class Part:
    """What one optimizer is about to do.

    Attributes:
      optimizer: The optimizer, not a wrapper.
      division: What it divides by; None if that is not known.
      decay: [] float64: the share of a decaying weight that it takes off; None if that is not known.
    """

    optimizer: keras.optimizers.Optimizer
    division: Division | None
    decay: tf.Tensor | None


@tf.autograph.experimental.do_not_convert
def coming(optimizer, learning_rate: tf.Tensor) -> list[Part]:
    """What the optimizers in `optimizer` will do in the coming step; `learning_rate`: the first one's."""
    parts = []
    for i, part in enumerate(doors.parts(optimizer)):
        rate = learning_rate if i == 0 else doors.learning_rate(part)
        single = not part.gradient_accumulation_steps
        known = single and doors.decays_as_keras(part)
        decay = tf.zeros([], tf.float64)
        if part.weight_decay is not None:
            decay = rate * tf.cast(part.weight_decay, tf.float64)
        parts.append(Part(part, _division(part, rate) if single else None, decay if known else None))
    return parts


def kind(optimizer) -> tuple[str, str] | None:
    """How an optimizer divides, "adam", "nadam" or "inside" (the root), and by which slot; None if it is not known."""
    kinds = keras.optimizers
    step = type(optimizer).update_step
    if step is kinds.Nadam.update_step:
        return "nadam", "velocity"
    if step is kinds.Adam.update_step:
        return "adam", "velocity_hat" if optimizer.amsgrad else "velocity"
    if step is kinds.RMSprop.update_step and not optimizer.centered:
        return "inside", "velocity"
    if step is kinds.Adagrad.update_step:
        return "inside", "accumulator"
    return None


def _division(optimizer, rate: tf.Tensor) -> Division | None:
    found = kind(optimizer)
    if found is None:
        return None
    how, slot = found

    def number(value) -> tf.Tensor:
        return tf.cast(value, tf.float64)

    zero, one = number(0.0), number(1.0)
    eps = number(optimizer.epsilon)
    if how == "inside":
        return Division(slot, rate, eps, zero, eps, one)
    t = number(optimizer.iterations + 1)
    correction = 1 - number(optimizer.beta_2) ** t
    root = tf.sqrt(correction)
    if how == "nadam":
        return Division(slot, rate * root, zero, eps * root, eps * eps * correction, correction)
    return Division(slot, rate * root / (1 - number(optimizer.beta_1) ** t), zero, eps, eps * eps, correction)


@dataclasses.dataclass(frozen=True)
class Table:
    """The same for each of P weights.

    Attributes:
      slots: The optimizer's slots: name -> a variable or None for each weight.
      rows: [P, 6] float64: inside, outside, floor, rate and correction, the last two NaN where nothing is divided; and
        the share of the weight that is about to be taken off, NaN where that is not known.
      momentum, second: For each weight which of the slots is, in their order; -1: none.
    """

    slots: dict[str, list]
    rows: tf.Tensor
    momentum: list[int]
    second: list[int]

    @classmethod
    @tf.autograph.experimental.do_not_convert
    def of(cls, parts: Sequence[Part], optimizer, variables: Sequence, gradients: Sequence) -> Table:
        """Of a built optimizer."""
        nan, zero = tf.constant(np.nan, tf.float64), tf.zeros([], tf.float64)
        slots = doors.slots(optimizer, variables)
        names = list(slots)
        second = [-1] * len(variables)
        rows = [tf.stack([zero, zero, zero, nan, nan, nan])]  # of a weight that no part has
        which = np.zeros(len(variables), np.int32)
        at = {doors.variable_key(v): i for i, v in enumerate(variables)}
        for part in parts:
            d = part.division
            row = [zero, zero, zero, nan, nan]
            if d is not None:
                row = [d.inside, d.outside, d.floor, d.rate, d.correction]
            rows += [tf.stack([*row, zero]), tf.stack([*row, nan if part.decay is None else part.decay])]
            for key in map(doors.variable_key, doors.trained_variables(part.optimizer)):
                if key not in at:
                    continue
                i = at[key]
                decays = part.decay is None or doors.decays(part.optimizer, variables[i])
                which[i] = len(rows) - (1 if decays and gradients[i] is not None else 2)
                if d is not None and slots.get(d.slot, second)[i] is not None:
                    second[i] = names.index(d.slot)
        momentum = [-1] * len(variables)
        for i, (slot, variable) in enumerate(zip(slots.get("momentum", ()), variables, strict=False)):
            if slot is not None and slot.shape == variable.shape:
                momentum[i] = names.index("momentum")
        return cls(slots, tf.gather(tf.stack(rows), which), momentum, second)

    def pick(self, slots: Mapping[str, list]) -> tuple[list, list]:
        """The momentum and the second moment of each weight, or None, of what is given for each slot by its name."""
        rows = list(slots.values())
        momentums, seconds = (
            [rows[k][i] if k >= 0 else None for i, k in enumerate(which)] for which in (self.momentum, self.second)
        )
        return momentums, seconds

    def columns(self, measured: tf.Tensor, slots: Sequence[tf.Tensor], gradient: tf.Tensor) -> dict[str, tf.Tensor]:
        """The [P] joint sums of a step.

        Args:
          measured: [P, 5] float64 of `moments.measure_adaptive`.
          slots: [P, 6] moments of each slot.
          gradient: [P, 6] moments.
        """
        nan = tf.fill([measured.shape[0]], tf.constant(np.nan, tf.float64))
        inside, outside, rate, correction = (self.rows[:, i] for i in (0, 1, 3, 4))

        def of(which: list[int], column: int) -> tf.Tensor:
            result = nan
            for k in set(which) - {-1}:
                result = tf.where(np.equal(which, k), slots[k][:, column], result)
            return result

        lowest, highest = measured[:, 3], of(self.second, ABSMAX)
        lowest = tf.where(tf.math.is_finite(lowest), lowest, nan)
        highest = tf.where(tf.math.is_finite(lowest), highest, nan)
        seen = np.maximum(self.momentum, self.second) >= 0
        return {
            "slot_steps": tf.constant(seen, tf.float64),
            "gradient_momentum": measured[:, 0],
            "momentum_norms": tf.sqrt(gradient[:, SUMSQ]) * tf.sqrt(of(self.momentum, SUMSQ)),
            "normalized_gradient": measured[:, 1] * correction,
            "under_epsilon": measured[:, 4],
            "rates": rate * measured[:, 2],
            "largest_rate": rate / (tf.sqrt(lowest + inside) + outside),
            "smallest_rate": rate / (tf.sqrt(highest + inside) + outside),
        }
