"""How far a training came, against the best model that ignores its inputs: what tells a fault from a peculiarity.

Inputs of size 255 are a fault where nothing is learnt, and a matter of taste where everything is. *Skill* is 1 for a
perfect model, 0 for the best constant prediction, and negative for a worse one:

  classes   (accuracy - share of the largest class) / (1 - that share), kappa against a constant rater; where one
            class is nearly all, what the loss tells, if that is more
  numbers   1 - mean squared error / variance of the targets, the coefficient of determination; of absolute errors
            1 - (mean absolute error / mean absolute deviation from the median) squared
  otherwise how much of the way from the loss of the best constant to that of right predictions the loss has gone: the
            entropy of the labels, or what the first look into the model asked the loss itself, whatever loss it is
  several   the mean over the outputs, none of them counted as worse than -1
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from trainrt.findings import program
from trainrt.findings.looks import looks
from trainrt.findings.looks import value as number
from trainrt.findings.series import falls_late, loss_trend, penalty, scalar
from trainrt.record.run import Run

NAN = float("nan")
ACCURACIES = ("accuracy", "acc", "categorical_accuracy", "sparse_categorical_accuracy", "binary_accuracy")
SQUARED = ("mse", "mean_squared_error")
ABSOLUTE = ("mae", "mean_absolute_error")
ROOTS = ("rmse", "root_mean_squared_error")
EXPLAINED = ("r2_score", "r2")
SKEWED = 0.8
"""Share of the largest class from which on an accuracy says little."""
RESAMPLED = 0.1
"""Total variation distance between the classes of both sides, from which on they were not drawn alike."""
FEW = 3
EPOCHS, STEPS = 5, 500
HALF = 0.5
"""Share of the epochs asked for after which a run may be judged by how far it came."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Attributes:
    train: Skill on the training data in the last epoch; NaN where it is not known.
    validation: Skill on the validation data in the last epoch.
    best: Best validation skill of any epoch.
    constant: Loss of the best constant prediction of the training targets; NaN where it is not known.
    data_loss: The loss at the end, without regularisers; NaN where the run has none, as a GAN's.
    lost: Whether the loss at the end is not finite, of a run that has one.
    settled: Whether the run may be judged by this: enough of it is over, or its loss stands still.
    far: Whether enough of it is over.
    kind: What the skill is made from: "classes" (accuracy), "numbers" (differences), "loss", "several" outputs, or "".
    course: Validation skill of each epoch.
    outputs: Name of an output -> its training and validation skill, and its kind; empty where there is one output.
    """

    train: float
    validation: float
    best: float
    constant: float
    data_loss: float
    settled: bool
    far: bool
    kind: str
    lost: bool = False
    course: tuple[float, ...] = ()
    outputs: Mapping[str, tuple[float, float, str]] = dataclasses.field(default_factory=dict)

    def of(self, name: str) -> Outcome:
        """The outcome of one of several outputs."""
        train, validation, kind = self.outputs.get(name, (self.train, self.validation, self.kind))
        return dataclasses.replace(self, train=train, validation=validation, kind=kind)

    @property
    def skill(self) -> float:
        """The better of both sides: where either learnt, the training works. NaN where nothing is known."""
        known = [value for value in (self.train, self.validation) if math.isfinite(value)]
        return max(known) if known else NAN

    def poor(self, threshold: float) -> bool:
        """Whether the run is known to have stayed under a skill. A loss that is not finite any more is."""
        return self.settled and (self.skill < threshold or self.lost)


def outcome(run: Run) -> Outcome:
    """The outcome of a run so far."""
    return run.memo("outcome", lambda: _outcome(run))


def _outcome(run: Run) -> Outcome:
    trend = loss_trend(run)
    part = scalar(run, "data_loss")
    data_loss = float(np.nanmean(part[-max(1, len(part) // 5) :])) if np.isfinite(part[-1:]).any() else trend.last
    planned = program.number(program.asked(run, "epochs"))
    done = len(run.epochs)
    # A run that was interrupted has shown something after a few epochs.
    over = run.end is not None and (run.end.get("how") in ("finished", "stopped") or done >= FEW)
    far = over or not planned > 0 or done >= HALF * planned
    # What stands still for so long may be judged while it trains.
    settled = far or (done >= EPOCHS and run.steps[-1, 1] >= STEPS and not falls_late(run))
    lost = "loss" in run.roster.scalars and not math.isfinite(data_loss)
    constant = constant_loss(run, "train")
    if not done:
        return Outcome(NAN, NAN, NAN, constant, data_loss, settled and run.end is not None, far, "", lost)
    last = run.epochs[-1].logs
    extra = max(0.0, _regulariser(run))
    train, kind, learnt = _skills(run, last, "", "train", extra)
    validation, _, checked = _skills(run, last, "val_", "validation", extra)
    each = [_skills(run, epoch.logs, "val_", "validation", extra)[0] for epoch in run.epochs]
    best = max((value for value in each if math.isfinite(value)), default=NAN)
    outputs = {name: (skill, checked.get(name, (NAN, ""))[0], of) for name, (skill, of) in learnt.items()}
    return Outcome(train, validation, best, constant, data_loss, settled, far, kind, lost, tuple(each), outputs)


def _regulariser(run: Run) -> float:
    values = penalty(run)
    return float(np.nan_to_num(values[-1])) if len(values) else 0.0


def _skills(
    run: Run, logs: Mapping[str, float], prefix: str, side: str, extra: float
) -> tuple[float, str, dict[str, tuple[float, str]]]:
    """Skill and its kind, and both for each of several outputs."""
    ends = program.ends(run, side)
    if len(ends) == 1:
        return *_skill(run, logs, prefix, side, extra, ends[0]), {}
    # What is beside the data is in the total alone.
    each = {end.name: _skill(run, logs, f"{prefix}{end.name}_", side, 0.0, end) for end in ends}
    known = [max(skill, -1.0) for skill, _ in each.values() if math.isfinite(skill)]
    if not known or len(known) < len(each):
        # One that is not known may be the one that matters; the loss of all is.
        (constant, perfect), value = _asked(run), logs.get(prefix + "loss", NAN) - extra
        return ((constant - value) / (constant - perfect), "loss", each) if constant > 0 else (NAN, "", each)
    return sum(known) / len(known), "several", each


def _skill(
    run: Run, logs: Mapping[str, float], prefix: str, side: str, extra: float, end: program.End
) -> tuple[float, str]:
    target, loss = end.target, end.loss
    labels = target.get("labels") or {}
    weighted = _class_weights(run, target)
    if weighted is not None and side == "train":
        # The accuracy counts samples, the training counts their weights: the loss tells what was learnt.
        value = logs.get("loss", NAN) - extra
        return (1 - value / weighted, "loss") if weighted > 0 else (NAN, "")
    if weighted is not None or any(_vary(leaf) for leaf in program.leaves(run, "weights", side)):
        return NAN, ""
    chance, others = _chance(target), _other_shares(run, side, end)
    constant = _entropy(labels["counts"], others) if others and "entropy" in loss else _constant(target, loss)
    accuracy = next((float(logs[prefix + name]) for name in ACCURACIES if prefix + name in logs), NAN)
    # Whole numbers under a loss of differences are amounts; an accuracy says nothing about them.
    kinds = ("one_hot", "binary") if "squared" in loss or "absolute" in loss else ("one_hot", "binary", "integer")
    if math.isfinite(accuracy) and chance < 1 and labels.get("kind") in kinds:
        skill = (accuracy - chance) / (1 - chance)
        value = logs.get(prefix + "loss", NAN) - extra
        if (chance > SKEWED or others) and constant > 0 and math.isfinite(value):
            # Where one class is nearly all, its share is hard to beat though the probabilities are learnt.
            return max(skill, 1 - value / constant), "loss"
        return skill, "classes"
    value = logs.get(prefix + "loss", NAN)
    value = value - extra if math.isfinite(value) else value
    explained = next((float(logs[prefix + name]) for name in EXPLAINED if prefix + name in logs), NAN)
    if math.isfinite(explained):
        return explained, "numbers"
    squared = (
        value if loss in SQUARED else next((logs[prefix + name] for name in SQUARED if prefix + name in logs), NAN)
    )
    root = next((logs[prefix + name] for name in ROOTS if prefix + name in logs), NAN)
    squared = squared if math.isfinite(squared) else root**2
    spread = _variance(target)
    if math.isfinite(squared) and spread > 0:
        return 1 - squared / spread, "numbers"
    absolute = value if loss in ABSOLUTE else next((logs[prefix + n] for n in ABSOLUTE if prefix + n in logs), NAN)
    deviation = _deviation(target)
    if math.isfinite(absolute) and deviation > 0:
        return 1 - (absolute / deviation) ** 2, "numbers"
    perfect = 0.0
    asked = _asked(run) if not end.name else (NAN, NAN)
    if math.isnan(constant):
        constant, perfect = asked
    elif 0 < asked[1] < 0.95 * constant:
        perfect = asked[1]  # the floor of smoothed labels, or of a cross-entropy of shades of grey
    if constant > max(perfect, 0) and math.isfinite(value):
        return (constant - value) / (constant - perfect), "loss"
    return NAN, ""


def _other_shares(run: Run, side: str, end: program.End) -> dict[str, float]:
    """Counts of the training's labels, where the validation data have the classes in other shares, as when the rare
    ones were sampled more often for the training: a constant that was trained predicts by those."""
    ours = (end.target.get("labels") or {}).get("counts") or {}
    trained = next((one.target for one in program.ends(run) if one.name == end.name), {})
    theirs = (trained.get("labels") or {}).get("counts") or {}
    if side == "train" or len(ours) < 2 or not set(ours) <= set(theirs):
        return {}
    n, m = sum(ours.values()), sum(theirs.values())
    return theirs if sum(abs(ours.get(k, 0) / n - theirs[k] / m) for k in theirs) / 2 > RESAMPLED else {}


def _asked(run: Run) -> tuple[float, float]:
    """What a look heard from the loss about constant and right predictions; NaN where it likes wrong ones better."""
    reference = next((look["reference"] for look in looks(run) if look.get("reference")), None)
    constant, perfect, opposite = (number(reference, name) for name in ("constant", "perfect", "opposite"))
    return (constant, perfect) if perfect < constant < opposite else (NAN, NAN)


def constant_loss(run: Run, side: str = "train") -> float:
    """The loss of the best prediction that is the same for every sample; NaN where it is not known."""
    targets = program.leaves(run, "targets", side) or program.leaves(run, "targets", "train")
    return _constant(targets[0], program.loss_name(run)) if len(targets) == 1 else NAN


def _constant(target: Mapping[str, Any], loss: str) -> float:
    labels = target.get("labels") or {}
    if loss in ("categorical_crossentropy", "sparse_categorical_crossentropy"):
        if labels.get("kind") in ("one_hot", "integer", "binary") and "counts" in labels:
            return _entropy(labels["counts"])
        return NAN
    if loss == "binary_crossentropy":
        low, high = target.get("min"), target.get("max")
        if low is None or high is None or low < 0 or high > 1:
            return NAN
        shares = np.clip(_channels(target, "mean"), 1e-12, 1 - 1e-12)
        return float((-shares * np.log(shares) - (1 - shares) * np.log(1 - shares)).mean()) if len(shares) else NAN
    if loss in SQUARED:
        return _variance(target)
    return _deviation(target) if loss in ABSOLUTE else NAN


def _class_weights(run: Run, target: Mapping[str, Any]) -> float | None:
    """Loss of the best constant under the class weights of fit; None where there are none, NaN where it is "
    "not known."""
    given = program.asked(run, "class_weight")
    counts = (target.get("labels") or {}).get("counts")
    if not given:
        return None
    if not isinstance(given, Mapping) or not counts or "entropy" not in program.loss_name(run):
        return NAN
    weights = {k: n * program.number(given.get(k, 1.0)) for k, n in counts.items()}
    return sum(weights.values()) / sum(counts.values()) * _entropy(weights)


def _vary(leaf: Mapping[str, Any]) -> bool:
    """Whether sample weights differ from sample to sample."""
    low, high = program.number(leaf.get("min")), program.number(leaf.get("max"))
    return low != high


def _chance(target: Mapping[str, Any]) -> float:
    """Accuracy of the best constant prediction; NaN where the targets are no classes."""
    labels = target.get("labels") or {}
    counts = labels.get("counts")
    return max(counts.values()) / sum(counts.values()) if counts else NAN


def _channels(target: Mapping[str, Any], name: str) -> np.ndarray:
    """[channels] means or deviations; of very many their lowest, median and highest."""
    value = target.get(name)
    known = list(value.values()) if isinstance(value, Mapping) else value or []
    return np.array([v for v in known if v is not None], np.float64)


def _variance(target: Mapping[str, Any]) -> float:
    spread = _channels(target, "std")
    return float(np.square(spread).mean()) if len(spread) else NAN


def _deviation(target: Mapping[str, Any]) -> float:
    """Mean absolute deviation from the median, from the quantiles; of several channels that of normal ones."""
    quantiles = (target.get("labels") or {}).get("quantiles")
    if not quantiles:
        spread = _channels(target, "std")
        return float(spread.mean() * math.sqrt(2 / math.pi)) if len(spread) else NAN
    points = sorted((float(share), float(value)) for share, value in quantiles.items())
    middle = dict(points).get(0.5, NAN)
    parts = ((q - p) * (abs(a - middle) + abs(b - middle)) / 2 for (p, a), (q, b) in itertools.pairwise(points))
    return float(sum(parts))


def _entropy(counts: Mapping[str, float], predicted: Mapping[str, float] | None = None) -> float:
    """Cross-entropy of the best constant; of the one that is best for other counts, where those are given."""
    predicted = predicted or counts
    n, m = sum(counts.values()), sum(predicted.values())
    return -sum(count / n * math.log(predicted[k] / m) for k, count in counts.items() if count > 0)
