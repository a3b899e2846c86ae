"""Looks into the model at a few steps of a run: the documents "model" and "probe".

At a probe the model runs on a small batch that is kept for the whole run: rows spread over the data when it lies in
arrays, the first rows that went by otherwise. Nothing of the training changes (see `forward`): no weight, statistic,
seed, metric or order. Probes are before the first step, then at about steps 20, 100, 400, 1600..., and after the last,
as far as they cost less than `SHARE` of the training so far and a small allowance, so that a short run gets some; one
that is too dear waits. In a fit of a model that is traced already, all of them together keep to that, the last one's
share set aside. What fails is told in the document, and the run goes on.

"model" is described in `anatomy`. Each probe is a document "probe" of its own (`run.documents`, oldest first). Floats
that are not finite are the strings "nan", "inf" and "-inf". Its content:

`step`      Steps done before this look.
`when`      "start", "schedule" or "end".
`skipped`   None, or why nothing was looked at; then there is nothing besides `step` and `when`.
`errors`    Part -> what it raised; such a part is None.
`rows`      Rows of the kept batch; `source`: "arrays" or "first rows".
`cost_s`    Seconds of training time that this look took; `spent_s`: all so far.
`layers`    For each layer that ran, in the order in which they ended: `path`, `class`, `activation`, and the numbers of
            `forward.describe` about its output in training mode: `zero_units`, `constant_units`, `equal_units`,
            `saturated_share`, `saturated_units`, `spread`, `mean`, `std`, `min`, `max`, `shape`, `units`,
            `nonfinite_share`, `zero_share`.
`outputs`   The same for each output of the model, and `sums_to_one`: the axes along which non-negative outputs sum to 1
            in every place, as [-1]; [0] is a softmax over the batch.
`loss`      Of the kept batch in training mode: `total`, `data` (what `compile` gave), `regularization` (regularisers
            and `add_loss`); `inference`: the data loss in inference mode, None where no layer behaves otherwise.
`reference` Data loss of made-up predictions for the same rows. `constant`: the best of the mean (of classes: their
            frequencies) and the median, whatever the input is; `perfect`: the targets, classes smoothed by 2 %;
            `opposite`: the wrong class, the mirror image of a number; `exact`: the targets as they are, not finite
            where the loss cannot take a probability of 0 or 1. None where targets and outputs do not fit together.
`accuracy`  Share of the rows whose class is right: `training`, `inference`, `constant` (always the commonest class);
            None for targets that are no classes.
`inference` Inference mode against training mode. `difference`: rms of the outputs' difference over their deviation
            in training mode; `batchnorm`: the same with dropout off in both, so that only the statistics of batch
            normalization differ; `batchnorm_loss`: the data loss with dropout off and the statistics of the batch, to
            compare with `loss.inference`. None without such layers.
`gradient`  Of the total loss, None at the end: `norm`; the paths `unreached` (they get none: the graph is cut), `zero`
            (exactly 0 everywhere), `nonfinite`; `regularised`: path -> [norm of the gradient without its regulariser,
            norm of the regulariser's].
`advance`   What the next execution of training did to the kept batch under the same dropout masks, None at the end:
            `steps` in it, `predicted` (gradient . update), `actual` (loss after - before), `before`, `after`,
            `update_norm`, `cosine` (of the update and the negative gradient). A good step has predicted < 0 and actual
            near it; actual > 0 where predicted < 0 is an overshoot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainrt import doors
from trainrt.looks import anatomy, forward
from trainrt.looks.look import Advance, Look, Sample, advance, content, take
from trainrt.looks.reference import Reference

SHARE = 0.01
"""Most of the training time that looks take, besides these allowances."""

ALLOWANCE_S = 0.02
PREPARED_SHARE = 0.1
"""The last look may always cost so many seconds, or this share of the time to the first step, which is that of tracing.
Those between may cost half of it together, the first twice as much: it makes TensorFlow's eager kernels. In a later fit
of a model that is traced already all of them together may cost so much."""

REPEATED_SHARE = 0.5
"""What a look takes, of the first one: 0.4 for a transformer and a CNN, 0.65 for an LSTM."""

FIRST, SECOND, GROWTH = 20, 100, 4
ROWS = 256
FEW_ROWS = 16
MACS = 4e7
"""Multiplications of a forward pass that a kept batch is cut to, down to `FEW_ROWS`."""


@dataclasses.dataclass
class Cost:
    """The least that looks into a model have taken so far, in seconds; None: there was none yet.

    Attributes:
      take: With a gradient.
      advance: What the step after it did.
      last: After the last step, without a gradient.
    """

    take: float | None = None
    advance: float | None = None
    last: float | None = None

    def note(self, part: str, seconds: float) -> None:
        """Takes note of what a part took."""
        known = getattr(self, part)
        setattr(self, part, seconds if known is None else min(known, seconds))

    @property
    def whole(self) -> float:
        return (self.take or 0.0) + (self.advance or 0.0)


class Prober:
    """Decides when to look, looks, and hands over what it saw.

    Args:
      model: The model that trains.
      arrays: Returns the arrays (x, y, sample_weight) and their number of rows, or None: a pipeline.
      first_rows: Returns the first rows of a pipeline that went by, or None.
      document: Writes a document, as `journal.document`.
      enabled: False: never looks.

    Attributes:
      cost: What a look takes. It holds for a later fit, too, as long as the model is the one that was traced.
    """

    def __init__(
        self,
        model: keras.Model,
        arrays: Callable[[], tuple[Any, int] | None],
        first_rows: Callable[[], Any],
        document: Callable[[str, Callable[[], Mapping[str, Any]]], None],
        enabled: bool,
    ):
        self._model = model
        self._arrays = arrays
        self._first_rows = first_rows
        self._document = document
        self._enabled = enabled
        self._made = time.monotonic()
        self._begun: float | None = None
        self._next = 0
        self._sample: Sample | None = None
        self._reference: Reference | None = None
        self._size: tuple[float, float] | None = None  # seconds of Python, and multiplications a row
        self.cost = Cost()
        self._practised = False  # whether `cost` was known when this fit began
        self._took = 0.0  # the look that was taken last
        self._first_cost = 0.0
        self._spent = 0.0
        self._pending: Look | None = None
        self._told_model: str | None = None
        self._skipped: str | None = None

    def room(self, step: int) -> int:
        """How many steps may run before the next look; 1 when one is due now, to see what a single step does."""
        if not self._enabled or self._skipped:
            return 1 << 30
        if step < self._next:
            return self._next - step
        return 1 if self._affordable("schedule") else 1 << 30

    def before(self, step: int) -> None:
        """Looks, if a look is due; to be called when the step is compiled and the next one has not run."""
        if not self._enabled or self._skipped or self._pending is not None:
            return
        if self._begun is None:
            self._begin()
            self._skipped = self._unfit()
        if step < self._next or self._skipped:
            return
        with self._timed():
            sample = self._ready()
            if sample is None:
                # Rows of a pipeline are there after its first batch, or never: asked at 1, 2, 4, ... steps, or the loop
                # would run a step a call, waiting for them.
                self._next = max(1, 2 * step)
            elif self._affordable("schedule"):
                self._pending = self._measured(sample, step, "start" if step == 0 else "schedule")
                while self._next <= step:
                    self._next = FIRST if self._next < FIRST else SECOND if self._next < SECOND else self._next * GROWTH

    def after(self, step: int, steps: int) -> None:
        """`steps` steps have run since `before`, and `step` are done."""
        if not self._enabled or not steps:
            return
        self._tell_model()
        look, self._pending = self._pending, None
        if look is not None:
            advanced = None
            with self._timed() as cost:
                advanced = advance(self._model, self._sample, look, steps) if self._sample else None
            if self.cost.advance is None:
                self._first_cost += cost[0]
                self.cost.advance = REPEATED_SHARE * cost[0]
            self.cost.note("advance", cost[0])
            cost[0] += self._took
            self._tell(look, advanced, cost)

    def end(self, step: int) -> None:
        """The last look, after the last step."""
        if not self._enabled or not step:
            return
        self._tell_model()
        if self._skipped:
            reason = self._skipped
            self._document("probe", lambda: {"step": step, "when": "end", "skipped": reason})
            return
        if self._begun is None:
            self._begin()
        look = None
        with self._timed() as cost:
            sample = self._ready()
            if sample is not None and self._affordable("end"):
                look = self._measured(sample, step, "end")
        if look is not None:
            self._tell(look, None, cost)
        elif self._told_model != "seen":
            why = self._skipped or ("too dear for so short a run" if sample else "no rows could be kept")
            self._document("probe", lambda: {"step": step, "when": "end", "skipped": why})

    # ------------------------------------------------------------------------------------------------ when, and on what

    def _unfit(self) -> str | None:
        """Why this model is not looked into; None: it is."""
        model = self._model
        if doors.makes_own_train_function(model) or not doors.has_keras_train_step(model):
            return "the model has a train step of its own"
        if model.distribute_strategy.num_replicas_in_sync > 1 or doors.made_under_strategy(model):
            return "the model trains under a distribution strategy"
        if model.run_eagerly and not all(map(forward.own, (model, *doors.layers_inside(model)))):
            return "layers of your own run eagerly, where one more call could change what they do next"
        return None

    def _begin(self) -> None:
        self._begun = time.monotonic()
        self._practised = self.cost.take is not None

    def _affordable(self, when: str) -> bool:
        begun = time.monotonic() if self._begun is None else self._begun
        allowance = max(ALLOWANCE_S, PREPARED_SHARE * (begun - self._made))
        earned = SHARE * (time.monotonic() - begun)
        known, ends = self.cost, when == "end"
        if known.take is None:
            return self._estimate() <= 2 * allowance + earned
        last = known.take / 2 if known.last is None else min(known.last, known.take)
        if self._practised:
            return self._spent + last + (0.0 if ends else known.whole) <= allowance + earned
        if ends:
            return last <= allowance + earned
        return self._spent - self._first_cost + known.whole <= allowance / 2 + earned

    def _estimate(self) -> float:
        """Seconds of a first look, roughly: Python's time for each layer, then arithmetic."""
        if self._size is None or not self._model.built:
            layers = forward.layers_of(self._model)
            steps = sum(max(_positions(layer), 1) for layer in layers if isinstance(layer, keras.layers.RNN))
            self._size = 3e-3 * len(layers) + 4e-3 * steps, _macs(layers)
        fixed, macs = self._size
        return fixed + 2e-10 * (self._sample.rows if self._sample else FEW_ROWS) * macs

    @contextlib.contextmanager
    def _timed(self):
        cost = [0.0]
        begun = time.monotonic()
        try:
            yield cost
        except Exception as error:  # a fault of ours, or a model that cannot be called so: the training goes on
            self._skipped = f"{type(error).__name__}: {error}"[:500]
        finally:
            cost[0] = time.monotonic() - begun
            self._spent += cost[0]

    def _ready(self) -> Sample | None:
        """The kept batch, once there is one."""
        if self._sample is None and self._model.built:
            macs = max(_macs(forward.layers_of(self._model)), 1)
            rows = int(np.clip(MACS / macs, FEW_ROWS, ROWS))
            arrays = self._arrays()
            batch = _spread(*arrays, rows) if arrays else _cut(self._first_rows(), rows)
            if batch is not None:
                x, y, sample_weight = doors.unpack(batch)
                count = next(int(a.shape[0]) for a in keras.tree.flatten(x) if a is not None)
                if count >= 2:
                    self._sample = Sample(x, y, sample_weight, count, "arrays" if arrays else "first rows")
        return self._sample

    # ----------------------------------------------------------------------------------------------------------- a look

    def _measured(self, sample: Sample, step: int, when: str) -> Look:
        begun = time.monotonic()
        look = take(self._model, sample, step, when, self._reference)
        self._reference = look.reference
        took = self._took = time.monotonic() - begun
        if self.cost.take is None:
            self._first_cost = took
            self.cost.take = REPEATED_SHARE * min(took, max(took / 4, self._estimate()))
        else:
            self.cost.note("last" if when == "end" else "take", took)
        return look

    # --------------------------------------------------------------------------------------------------------- telling

    def _tell_model(self) -> None:
        """Writes the document "model": at once, and again when the model has been seen running."""
        look = self._pending
        state = "seen" if look is not None else "unseen"
        if self._told_model in ("seen", state):
            return
        self._told_model = state
        model, sample = self._model, self._sample
        unreached = None
        if look is not None and look.gradients is not None:
            pairs = zip(model.trainable_variables, look.gradients, strict=True)
            unreached = [v.path for v, gradient in pairs if gradient is None]
        seen = look.training if look is not None else None
        why = self._skipped or (None if look is not None else "no look into the model yet")
        targets = sample.y if sample is not None and look is not None else None
        self._document("model", lambda: anatomy.describe(model, targets, seen, unreached, why))

    def _tell(self, look: Look, advanced: Advance | None, cost: list[float]) -> None:
        sample, spent = self._sample, self._spent
        paths = [v.path for v in self._model.trainable_variables]
        assert sample is not None, "there is no look without rows"
        head = {"step": look.step, "when": look.when, "rows": sample.rows, "source": sample.source}
        head |= {"cost_s": cost[0], "spent_s": spent, "skipped": None}
        if self._told_model != "seen":
            self._pending = look
            self._tell_model()
            self._pending = None
        self._document("probe", lambda: head | content(look, sample, paths, advanced))


def _spread(arrays: Any, samples: int, rows: int) -> Any:
    """Rows of arrays, drawn by a generator of our own so that no period of theirs meets one of ours."""
    generator = np.random.Generator(np.random.PCG64(0))
    few = samples <= 1 << 16  # of more a permutation takes milliseconds
    index = generator.permutation(samples)[:rows] if few else generator.choice(samples, rows, replace=False)
    index = np.sort(index)
    return keras.tree.map_structure(lambda a: None if a is None else tf.gather(a, index), arrays)


def _cut(batch: Any, rows: int) -> Any:
    if batch is None:
        return None
    return keras.tree.map_structure(lambda a: None if a is None else tf.convert_to_tensor(a[:rows]), batch)


def _positions(layer: Any) -> int:
    """Time steps of a recurrent layer, as far as they are known."""
    try:
        return int(layer.input.shape[1] or 1)
    except (AttributeError, ValueError, TypeError, IndexError):
        return 1


def _macs(layers: list) -> float:
    """Multiplications of a forward pass over one row, roughly: each kernel at each of the output's places."""
    total = 0.0
    for layer in layers:
        attends = isinstance(layer, (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention))
        if doors.layers_inside(layer) and not isinstance(layer, keras.layers.RNN) and not attends:
            continue
        size = sum(math.prod(v.shape) for v in layer.weights if len(v.shape) >= 2)
        if not size or isinstance(layer, keras.layers.Embedding):
            continue
        try:
            shape = [d or 1 for d in (layer.input if isinstance(layer, keras.layers.RNN) else layer.output).shape[1:]]
        except (AttributeError, ValueError):
            shape = []
        first = getattr(layer, "data_format", None) == "channels_first"
        places = (math.prod(shape[1:] if first else shape[:-1])) if shape else 1
        total += size * places
        if attends and shape:
            total += (
                2 * places**2 * shape[-1]
            )  # of about as many channels: queries by keys, and their weights by values
    return total
