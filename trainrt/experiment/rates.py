"""Which learning rate: it is raised step by step, and the loss falls fastest where it fits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import keras
import numpy as np

from trainrt.experiment import changes
from trainrt.experiment.charts import Line, chart
from trainrt.experiment.replay import Replay, assert_counts, loss_of

SMOOTH = 0.9
DIVERGED = 4.0
"""Times the lowest loss at which a range test ends."""
DROP = 0.05
"""Share of its first value that the loss must lose in a range test for a suggestion."""
LEAST_STEPS = 5
"""Of a range test: fewer are no curve."""


@dataclasses.dataclass(frozen=True)
class Range:
    """A learning-rate range test.

    Attributes:
      rates: [T] The learning rates, rising.
      losses: [T] The loss of the step at each, mean over the replays.
      smooth: [T] The same, smoothed.
      suggestion: The rate at which the loss falls fastest, a tenth of the rate of its lowest value at most. None when
        it does not fall at any rate: something else holds the model back.
      current: The rate that the optimizer has.
    """

    rates: np.ndarray
    losses: np.ndarray
    smooth: np.ndarray
    suggestion: float | None
    current: float | None

    def svg(self, width: int = 640, height: int = 320) -> str:
        """A plot of the loss over the learning rate, as an SVG element."""
        marks = {"suggested": self.suggestion, "now": self.current}
        return chart(
            [Line("loss of a step", self.rates, self.losses, faint=True), Line("smoothed", self.rates, self.smooth)],
            x_label="learning rate",
            y_label="loss",
            logarithmic=True,
            marks={name: value for name, value in marks.items() if value is not None},
            size=(width, height),
        )

    def save(self, path: str) -> None:
        """Writes the plot: an `.svg`, or a page that opens in a browser."""
        text = self.svg()
        if not str(path).endswith(".svg"):
            text = f"<!doctype html><meta charset='utf-8'><title>Learning rate range</title><p>{self}</p>{text}"
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)

    def _repr_html_(self) -> str:
        return f"<p>{self}</p>{self.svg()}"

    def __str__(self) -> str:
        if self.suggestion is None:
            return (
                f"The loss falls at no learning rate from {self.rates[0]:.1g} to {self.rates[-1]:.1g}: something else "
                "holds the model back. trainrt.explain(model, x, y) tries what."
            )
        now = f", now {self.current:.3g}" if self.current is not None else ""
        lowest = self.rates[int(np.nanargmin(self.smooth))]
        return f"Suggested learning rate: {self.suggestion:.2g}{now}. The loss is lowest at {lowest:.2g}."


def lr_range(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    sample_weight: Any = None,
    batch_size: int | None = None,
    shuffle: bool = True,
    clip: Any = None,
    low: float = 1e-6,
    high: float = 10.0,
    steps: int = 120,
    replays: int = 3,
) -> Range:
    """Raises the learning rate from `low` to `high` step by step, and suggests one. The model is left as it is.

    Args:
      model: A compiled model, in the state from which it is to be trained.
      x, y, sample_weight, batch_size, shuffle, clip: As for `explain`.
      low, high: The range.
      steps: Steps of a pass through the range.
      replays: Passes, in other orders of the batches; the loss is the mean of theirs.

    Returns:
      A `Range`, which prints and plots itself.

    Raises:
      TypeError: Not a model, an argument of another type, data that can be read only once, or a model without a
        compiled optimizer.
      ValueError: A model that is not compiled, a range that does not rise, or too few steps.
    """
    if not all(isinstance(end, (int, float, np.number)) for end in (low, high)):
        raise TypeError(f"`low` and `high` must be numbers. Received: low={low!r}, high={high!r}.")
    if not 0 < low < high < math.inf:
        raise ValueError(f"The range must rise, from above zero to a finite end. Received: low={low}, high={high}.")
    assert_counts(steps=steps, replays=replays, batch_size=32 if batch_size is None else batch_size)
    if steps < LEAST_STEPS:
        raise ValueError(f"A curve takes {LEAST_STEPS} steps or more. Received: steps={steps}.")
    replay = Replay(
        model, x, y, sample_weight,
        batch_size=batch_size, batches=min(steps, 64), shuffle=shuffle, clip=changes.clip_of(clip),
    )  # fmt: skip
    if not isinstance(model.optimizer, keras.optimizers.Optimizer):
        raise TypeError("`lr_range` raises the rate of the model's compiled optimizer. Received: a model without one.")
    rates = np.geomspace(low, high, steps)
    curves = np.full((replays, steps), np.nan)
    current = _current_rate(model)
    with replay.undone(), changes.adjustable_rate(replay) as set_rate:
        step = replay.stepper()
        for number in range(replays):
            with replay.undone():
                replay.draw(number)
                lowest = math.inf
                for t, batch in enumerate(replay.order(number, steps)):
                    set_rate(rates[t])
                    model.reset_metrics()
                    loss = loss_of(step(replay.batches[batch]))
                    if not math.isfinite(loss) or loss > DIVERGED * max(lowest, 1e-12):
                        break
                    curves[number, t] = loss
                    lowest = min(lowest, loss)
    reached = int((~np.isnan(curves)).all(axis=0).sum())
    losses = curves[:, : max(reached, 1)].mean(axis=0)
    smooth = _smoothed(losses)
    return Range(rates[: len(losses)], losses, smooth, _suggestion(rates[: len(losses)], smooth), current)


def _current_rate(model: keras.Model) -> float | None:
    try:
        return float(model.optimizer.learning_rate)
    except (TypeError, ValueError):
        return None


def _smoothed(losses: np.ndarray) -> np.ndarray:
    """[T] Moving averages to both sides, so that the curve is not late."""

    def one_way(values):
        mean, weight, result = 0.0, 0.0, []
        for value in values:
            mean, weight = SMOOTH * mean + (1 - SMOOTH) * value, SMOOTH * weight + (1 - SMOOTH)
            result.append(mean / weight)
        return np.array(result)

    return (one_way(losses) + one_way(losses[::-1])[::-1]) / 2


def _suggestion(rates: np.ndarray, smooth: np.ndarray) -> float | None:
    """Where the smoothed loss falls fastest on the logarithm of the rate, before its lowest value."""
    lowest = int(np.nanargmin(smooth)) if len(smooth) and np.isfinite(smooth).any() else 0
    if lowest < 2 or smooth[0] - smooth[lowest] < DROP * abs(smooth[0]):
        return None
    slope = np.gradient(smooth[: lowest + 1], np.log(rates[: lowest + 1]))
    return float(min(rates[int(np.argmin(slope))], rates[lowest] / 10))
