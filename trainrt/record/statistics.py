"""Statistics: arithmetic on recorded moments, done when somebody reads. Each is defined once, here or by a user.

The names of a function's arguments say what it needs, all over the windows of a run:

  gradient, update, weight, or a slot such as `velocity`     `Moments` of shape [T, P]
  steps, scale, rounded, or another name in `record.JOINT`   joint sums, [T, P]
  learning_rate, loss, or any other scalar                   its means over the windows, [T, 1]

It returns [T, P], float64. NaN: not measured, or undefined, such as the mean of no element. As nothing is computed
while the model trains, a statistic that is written next year reads the runs of today.

A *quantity* is a statistic of one tensor and has the name `<subject>_<quantity>` for every subject of a run: the
quantity `norm` is the statistic `gradient_norm`, and `velocity_norm` where the optimizer has a velocity.

A window may hold several steps. A norm is then the root of the mean of the squared norms of its steps, a ratio the
ratio of such means, and a share that of the elements of all its steps. In a window of one step they are what their
names say.

>>> @statistic(unit="1")
... def momentum_ratio(velocity, weight):
...     "Root mean square of the velocity over that of the weight."
...     return velocity.rms / weight.rms
>>> three, four = Moments.of(np.full(5, 3.0))[None, None], Moments.of(np.full(5, 4.0))[None, None]
>>> momentum_ratio(three, four)
array([[0.75]])
>>> del STATISTICS["momentum_ratio"]
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import numpy as np

from trainrt.record.vocabulary import GRADIENT, JOINT, UPDATE, WEIGHT, Moments

Function = Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A named formula.

    Attributes:
      name: Name of its function.
      unit: `"1"` for a ratio or a share, otherwise what it is measured in.
      needs: Names of its arguments that have no default.
      function: Arguments -> [T, P].
    """

    name: str
    unit: str
    needs: tuple[str, ...]
    function: Function

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.function) or ""

    def __call__(self, arguments: Mapping[str, Any]) -> np.ndarray:
        """Computes it from its arguments by name."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
            return np.asarray(self.function(**{name: arguments[name] for name in self.needs}), np.float64)


STATISTICS: dict[str, Statistic] = {}
"""The statistics by name, without the quantities of single tensors."""

QUANTITIES: dict[str, Statistic] = {}
"""The quantities by name: functions of one tensor's moments and of the steps of a window."""


@overload
def statistic(function: Function) -> Function: ...
@overload
def statistic(*, unit: str = "1") -> Callable[[Function], Function]: ...
def statistic(function=None, *, unit="1"):
    """Makes a function a statistic, which any `Run` then has under the function's name.

    Raises:
      TypeError: An argument is not a name that could be recorded, e.g. `*args`.
      ValueError: The package has a statistic of that name, or the function has no name or no argument.
    """
    if function is None:
        return functools.partial(_register, unit)
    return _register(unit, function)


def _register(unit: str, function: Function) -> Function:
    name = function.__name__
    if not name.isidentifier() or not _needs(function):
        raise ValueError(
            "A statistic has the name of its function, whose arguments name what it is made from: "
            f"def my_ratio(update, weight). Received: {function!r}."
        )
    known = STATISTICS.get(name)
    if known is not None and known.function.__module__ == __name__ != function.__module__:
        raise ValueError(f"{name!r} is a statistic of trainrt, and a name means one thing. Give yours another name.")
    STATISTICS[name] = Statistic(name, unit, _needs(function), function)
    return function


def quantity(unit: str) -> Callable[[Function], Function]:
    """Makes a function of `(tensor, steps)` a quantity of every subject."""

    def register(function: Function) -> Function:
        QUANTITIES[function.__name__] = Statistic(function.__name__, unit, _needs(function), function)
        return function

    return register


def names(subjects: Iterable[str] = (GRADIENT, UPDATE, WEIGHT)) -> list[str]:
    """The names of all statistics of a run with these subjects; some may need more than it recorded."""
    return [f"{subject}_{name}" for subject in subjects for name in QUANTITIES] + list(STATISTICS)


def find(name: str, subjects: Iterable[str] = (GRADIENT, UPDATE, WEIGHT)) -> Statistic:
    """The statistic of that name, in a run with these subjects.

    Raises:
      KeyError: There is none; the message lists those of a similar name.
    """
    if name in STATISTICS:
        return STATISTICS[name]
    subjects = tuple(subjects)
    for subject in subjects:
        found = QUANTITIES.get(name.removeprefix(f"{subject}_"))
        if found is not None and name == f"{subject}_{found.name}":
            return _of_subject(found, subject)
    known = names(subjects)
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5) or sorted(known)
    raise KeyError(
        f"There is no statistic {name!r} for the subjects {', '.join(subjects)}. Like it: {', '.join(close)}."
    )


def _of_subject(quantity: Statistic, subject: str) -> Statistic:
    needs = tuple(subject if need == "tensor" else need for need in quantity.needs)

    def function(**arguments):
        return quantity.function(*(arguments[need] for need in needs))

    function.__doc__ = f"Of the {subject}: {quantity.doc}"
    unit = subject if quantity.unit == "tensor" else quantity.unit
    return Statistic(f"{subject}_{quantity.name}", unit, needs, function)


def _needs(function: Function) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise TypeError(
                "The names of a statistic's arguments say what it needs, such as `gradient` or `learning_rate`. "
                f"Received: {function.__name__}{inspect.signature(function)}. Name each argument."
            )
    return tuple(parameter.name for parameter in parameters if parameter.default is parameter.empty)


# --------------------------------------------------------------------------------------------- quantities of a tensor


@quantity(unit="tensor")
def norm(tensor: Moments, steps: np.ndarray) -> np.ndarray:
    """L2 norm, of the finite elements. Over several steps: root of the mean squared norm.

    >>> float(norm(Moments.of(np.array([3.0, 4.0, np.nan])), 1))
    5.0
    """
    return tensor.norm_over(steps)


@quantity(unit="tensor")
def rms(tensor: Moments) -> np.ndarray:
    """Root mean square of the finite elements: a norm that does not grow with the size.

    >>> float(rms(Moments.of(np.array([3.0, -3.0, np.inf]))))
    3.0
    """
    return tensor.rms


@quantity(unit="tensor")
def mean(tensor: Moments) -> np.ndarray:
    """Mean of the finite elements.

    >>> float(mean(Moments.of(np.array([1.0, 3.0, np.nan]))))
    2.0
    """
    return tensor.mean


@quantity(unit="tensor")
def absmax(tensor: Moments) -> np.ndarray:
    """Largest magnitude of a finite element, in any step of the window; 0 if none is finite.

    >>> float(absmax(Moments.of(np.array([1.0, -3.0, np.nan]))))
    3.0
    """
    return tensor.absmax


@quantity(unit="1")
def zero_share(tensor: Moments) -> np.ndarray:
    """Share of the elements that are exactly zero.

    >>> float(zero_share(Moments.of(np.array([0.0, -0.0, 3.0, np.nan]))))
    0.5
    """
    return tensor.zero_share


@quantity(unit="1")
def nonfinite_share(tensor: Moments) -> np.ndarray:
    """Share of the elements that are NaN or infinite.

    >>> float(nonfinite_share(Moments.of(np.array([0.0, np.inf, 3.0, np.nan]))))
    0.5
    """
    return tensor.nonfinite_share


@quantity(unit="elements/step")
def nonfinite(tensor: Moments, steps: np.ndarray) -> np.ndarray:
    """Elements of a step that are NaN or infinite.

    >>> float(nonfinite(Moments.of(np.array([0.0, np.inf, 3.0, np.nan])), 1))
    2.0
    """
    return tensor.nonfinite / steps


@quantity(unit="tensor")
def peak_norm(tensor: Moments) -> np.ndarray:
    """The largest L2 norm of any one step in the window: no spike hides in a wide window.

    >>> float(peak_norm(Moments(np.stack([Moments.of(np.ones(4)).array, Moments.of(np.zeros(4)).array])).merge()))
    2.0
    """
    return tensor.peak_norm


@quantity(unit="tensor")
def trough_norm(tensor: Moments) -> np.ndarray:
    """The smallest L2 norm of any one step in the window.

    >>> float(trough_norm(Moments(np.stack([Moments.of(np.ones(4)).array, Moments.of(np.zeros(4)).array])).merge()))
    0.0
    """
    return tensor.trough_norm


# ------------------------------------------------------------------------------------------ statistics of a parameter


@statistic(unit="1")
def update_ratio(update: Moments, weight: Moments) -> np.ndarray:
    """Root mean square of the update over that of the weight after it: how much of itself a weight changes a step.

    Infinite where the weight is all zeros after a step from elsewhere, NaN where it is zero and stays.
    About 1e-3 is usual (Karpathy, "Building makemore part 3", 2022).

    >>> float(update_ratio(Moments.of(np.full(5, 0.001)), Moments.of(np.full(5, -1.0))))
    0.001
    """
    return update.rms / weight.rms


@statistic(unit="1")
def gradient_ratio(gradient: Moments, weight: Moments) -> np.ndarray:
    """Root mean square of the gradient, before any clip, over that of the weight after the step.

    >>> float(gradient_ratio(Moments.of(np.full(5, 3.0)), Moments.of(np.full(5, 4.0))))
    0.75
    """
    return gradient.rms / weight.rms


@statistic(unit="1")
def norm_share(gradient: Moments) -> np.ndarray:
    """The weight's share of the squared global norm of the gradient, before any clip. NaN where that norm is zero.

    Over the weights of the run that is asked: in one narrowed by `select` they are all its weights.

    >>> norm_share(Moments(np.stack([Moments.of(np.ones(3)).array, Moments.of(np.ones(1)).array])))
    array([0.75, 0.25])
    """
    return gradient.sumsq / np.nansum(gradient.sumsq, axis=-1, keepdims=True)


@statistic(unit="1")
def clip_scale(scale: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """What the clip multiplied the gradient with, mean over the steps; 1 where nothing was clipped.

    >>> clip_scale(np.array([[0.5 + 1.0]]), np.array([[2.0]]))
    array([[0.75]])
    """
    return scale / steps


@statistic(unit="1")
def clip_share(clipped: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Share of the steps in which the clip scaled the gradient down.

    >>> clip_share(np.array([[1.0]]), np.array([[2.0]]))
    array([[0.5]])
    """
    return clipped / steps


@statistic(unit="gradient")
def clipped_gradient_norm(gradient: Moments, scale: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """L2 norm of the gradient after the clip: the norm before it times the scale.

    Exact in a window of one step; in a wider one the mean scale stands for the scales of its steps.

    >>> clipped_gradient_norm(Moments.of(np.array([[3.0, 4.0]])), np.array([[0.2]]), np.array([[1.0]]))
    array([[1.]])
    """
    return gradient.norm_over(steps) * (scale / steps)


@statistic(unit="gradient")
def clipped_gradient_rms(gradient: Moments, scale: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Root mean square of the gradient after the clip. Exact in a window of one step, as `clipped_gradient_norm`.

    >>> clipped_gradient_rms(Moments.of(np.array([5.0, -5.0]))[None], np.array([0.2]), np.array([1.0]))
    array([1.])
    """
    return gradient.rms * (scale / steps)


@statistic(unit="gradient")
def clipped_gradient_mean(gradient: Moments, scale: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Mean of the gradient after the clip. Exact in a window of one step, as `clipped_gradient_norm`.

    >>> clipped_gradient_mean(Moments.of(np.array([5.0, -1.0]))[None], np.array([0.5]), np.array([1.0]))
    array([1.])
    """
    return gradient.mean * (scale / steps)


@statistic(unit="gradient")
def clipped_gradient_absmax(gradient: Moments, scale: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Largest magnitude of the gradient after the clip. Exact in a window of one step, as `clipped_gradient_norm`.

    What is zero or not finite stays so under a clip: `gradient_zero_share` and `gradient_nonfinite_share` are of both.

    >>> clipped_gradient_absmax(Moments.of(np.array([5.0, -1.0]))[None], np.array([0.2]), np.array([1.0]))
    array([1.])
    """
    return gradient.absmax * (scale / steps)


@statistic(unit="1")
def unchanged_share(update: Moments) -> np.ndarray:
    """Share of the elements that a step left as they were.

    >>> float(unchanged_share(Moments.of(np.array([0.0, 0.0, 1e-9, 1.0]))))
    0.5
    """
    return update.zero_share


@statistic(unit="1")
def rounded_share(rounded: np.ndarray, update: Moments) -> np.ndarray:
    """Share of the elements that stayed as they were though their gradient was not zero: the step was rounded away.

    >>> rounded_share(np.array([1.0]), Moments.of(np.array([0.0, 0.0, 1e-9, 1.0]))[None])
    array([0.25])
    """
    return rounded / update.count


@statistic(unit="1")
def unpushed_share(rounded: np.ndarray, update: Moments) -> np.ndarray:
    """Share of the elements that stayed as they were and whose gradient was zero: nothing pushed them.

    With `rounded_share` it makes up `unchanged_share`.

    >>> unpushed_share(np.array([1.0]), Moments.of(np.array([0.0, 0.0, 1e-9, 1.0]))[None])
    array([0.25])
    """
    return (update.zeros - rounded) / update.count


@statistic(unit="1")
def gradient_update_cosine(gradient_update: np.ndarray, gradient: Moments, update: Moments) -> np.ndarray:
    """Cosine between gradient and update; -1 is a step of plain gradient descent, above 0 one uphill.

    Over several steps: of the gradients one behind the other and the updates likewise. NaN where either is zero.

    >>> gradient_update_cosine(np.array([-2.0]), Moments.of(np.array([2.0]))[None], Moments.of(np.array([-1.0]))[None])
    array([-1.])
    """
    return gradient_update / (np.sqrt(gradient.sumsq) * np.sqrt(update.sumsq))


@statistic(unit="1")
def gradient_momentum_cosine(gradient_momentum: np.ndarray, momentum_norms: np.ndarray) -> np.ndarray:
    """Cosine between the gradient, before any clip, and the slot "momentum" after the step.

    Adam's momentum is an average of gradients: near 1 they agree from step to step, near 0 they are noise, below 0 the
    gradient has turned. SGD's is the next displacement, downhill, and its signs are the other way round. NaN where
    either is zero, or the optimizer has no momentum. Over several steps, and by layer: their mean, weighted by the
    norms. Of every 8th step (`record.SLOTS_EVERY`).

    >>> gradient_momentum_cosine(np.array([1.0]), np.array([2.0]))
    array([0.5])
    """
    return gradient_momentum / momentum_norms


def _slot_elements(slot_steps: np.ndarray, steps: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Elements seen in the steps in which the gradient was held against the slots."""
    return slot_steps * (count / steps)


@statistic(unit="1")
def normalized_gradient_rms(
    normalized_gradient: np.ndarray, gradient: Moments, slot_steps: np.ndarray, steps: np.ndarray
) -> np.ndarray:
    """Root mean square of the gradient, after the clip, over the root of its second moment, epsilon included.

    Near 1 while the second moment knows how large gradients are; above about 2.3 it has fallen behind them, which
    foretells a spike of the loss (Wortsman et al., "Stable and low-precision training for large-scale vision-language
    models", 2023: there with max(second moment, epsilon^2), which differs where epsilon outweighs). A clip by the value
    counts as one by the norm. NaN where the optimizer divides by no second moment that it keeps, as plain SGD. Of every
    8th step (`record.SLOTS_EVERY`).

    >>> one, four = np.ones(1), Moments.of(np.full(4, 0.5))[None]
    >>> normalized_gradient_rms(np.array([16.0]), four, one, one)
    array([2.])
    """
    return np.sqrt(normalized_gradient / _slot_elements(slot_steps, steps, gradient.count))


@statistic(unit="1")
def epsilon_share(under_epsilon: np.ndarray, weight: Moments, slot_steps: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Share of the elements in whose divisor the optimizer's epsilon outweighs the second moment.

    The root of the second moment is under epsilon there (Adam, Nadam), or the moment itself (RMSprop and Adagrad, which
    take the root of the sum). Such elements move by their gradient's size and no longer by its sign. NaN without a
    second moment. Of every 8th step (`record.SLOTS_EVERY`).

    >>> epsilon_share(np.array([1.0]), Moments.of(np.ones(4))[None], np.ones(1), np.ones(1))
    array([0.25])
    """
    return under_epsilon / _slot_elements(slot_steps, steps, weight.count)


@statistic(unit="update/gradient")
def element_rate(rates: np.ndarray, weight: Moments, slot_steps: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Mean over the elements of each one's own learning rate, bias correction included.

    An element moves by this times its momentum (or gradient): learning rate / (root of the second moment + epsilon).
    NaN without a second moment. Of every 8th step (`record.SLOTS_EVERY`).

    >>> element_rate(np.array([0.4]), Moments.of(np.ones(4))[None], np.ones(1), np.ones(1))
    array([0.1])
    """
    return rates / _slot_elements(slot_steps, steps, weight.count)


@statistic(unit="update/gradient")
def element_rate_max(largest_rate: np.ndarray) -> np.ndarray:
    """The largest learning rate of any one element, in any step of the window: of the smallest second moment.

    Of every 8th step (`record.SLOTS_EVERY`).

    >>> element_rate_max(np.array([0.4]))
    array([0.4])
    """
    return largest_rate


@statistic(unit="update/gradient")
def element_rate_min(smallest_rate: np.ndarray) -> np.ndarray:
    """The smallest learning rate of any one element, in any step of the window: of the largest second moment.

    Of every 8th step (`record.SLOTS_EVERY`).

    >>> element_rate_min(np.array([0.1]))
    array([0.1])
    """
    return smallest_rate


@statistic(unit="weight")
def decay_norm(decay: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """L2 norm of what weight decay alone took off: learning rate * weight decay * the weight.

    The weight is the one after the step, in place of the one before it: off by no more than the update's norm over the
    weight's. The update holds it besides what the optimizer did. Over several steps: root of the mean squared norm. 0
    for a weight that does not decay; NaN where the optimizer decays in a way of its own (Muon) or accumulates
    gradients. A regularizer is no decay: it is part of the gradient.

    >>> decay_norm(np.array([[0.18]]), np.array([[2.0]]))
    array([[0.3]])
    """
    return np.sqrt(decay / steps)


@statistic(unit="1")
def decay_ratio(decay: np.ndarray, update: Moments) -> np.ndarray:
    """Norm of what weight decay alone took off over the norm of the whole update.

    Near 1 the weight only shrinks. Above 1 decay and the optimizer's step cancel. NaN where nothing moves.

    >>> decay_ratio(np.array([0.04]), Moments.of(np.array([0.4]))[None])
    array([0.5])
    """
    return np.sqrt(decay) / np.sqrt(update.sumsq)


@statistic(unit="1")
def skipped_share(skipped: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Share of the steps that a `LossScaleOptimizer` left out since a scaled gradient was not finite.

    A few are how it finds its scale. 0 for an optimizer that never skips.

    >>> skipped_share(np.array([[1.0]]), np.array([[4.0]]))
    array([[0.25]])
    """
    return skipped / steps


@statistic(unit="time constants")
def second_moment_age(bias_correction: np.ndarray, weight: Moments) -> np.ndarray:
    """How long an optimizer has averaged its second moment, in time constants of that average: about t (1 - beta_2).

    Under 1 bias correction carries the step and a single gradient weighs much; after 3 the average holds 95 % of what
    it will. Of the model's first optimizer; NaN where its second moment needs no correction.

    >>> second_moment_age(np.array([[1 - 0.999**1000]]), Moments.of(np.ones(4))[None, None]).round(3)
    array([[1.001]])
    """
    return np.where(np.isnan(weight.count), np.nan, -np.log1p(-bias_correction))


@statistic(unit="loss/step")
def predicted_decrease(gradient_update: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """By how much a step lowers the loss to first order: minus the inner product of gradient and update, a step.

    Positive: the loss is expected to fall. The sum over the weights is the prediction for the step.

    >>> predicted_decrease(np.array([[-0.5]]), np.array([[1.0]]))
    array([[0.5]])
    """
    return -gradient_update / steps


@statistic(unit="update/gradient")
def effective_learning_rate(update: Moments, gradient: Moments) -> np.ndarray:
    """Root mean square of the update over that of the gradient before any clip.

    The learning rate itself under plain gradient descent without a clip. NaN where neither moves, infinite where the
    update is not zero and the gradient is, as under weight decay alone.

    >>> float(effective_learning_rate(Moments.of(np.full(5, -0.25)), Moments.of(np.full(5, 0.5))))
    0.5
    """
    return update.rms / gradient.rms


@statistic(unit="update/learning rate")
def unit_update(update: Moments, learning_rate: np.ndarray) -> np.ndarray:
    """Root mean square of the update over the learning rate: near 1 or below under Adam, whatever the gradient.

    >>> unit_update(Moments.of(np.full(5, -0.25))[None, None], np.array([[0.5]]))
    array([[0.5]])
    """
    return update.rms / learning_rate


def kind(name: str, subjects: Iterable[str], scalars: Iterable[str]) -> str | None:
    """What an argument of that name is in a run: `"subject"`, `"joint"`, `"scalar"`, or None if it has none."""
    if name in JOINT:
        return "joint"
    if name in subjects:
        return "subject"
    return "scalar" if name in scalars else None
