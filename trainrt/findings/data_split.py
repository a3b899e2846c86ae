"""Rows in an order that hurts, and a validation set that is not what it should be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trainrt.findings import program
from trainrt.findings.finding import Finding
from trainrt.findings.outcome import outcome
from trainrt.findings.rules import about, rule
from trainrt.findings.series import scalar
from trainrt.record.run import Run

MIXED = 0.7
"""Entropy of the labels within batches over that of shuffled ones."""
RUNS = 4.0
"""Equal labels in a row over what a shuffle gives."""
SHIFT, SPREAD = 0.5, 2.0
"""Means that differ by so many deviations, or deviations by such a factor, are not of one distribution."""
VARIATION = 0.5
"""Total variation distance between the classes of both sets: half of one set has no counterpart in the other."""
SHARED = 0.05
JUMP = 2.0
"""Loss at the beginning of an epoch over that of the epoch."""
COPY = 0.999
POOR, LEARNS, LEARNT = 0.6, 0.75, 0.9
"""Skills: under the first the order does harm; from the second on it does none unless the loss saws, from the third on
none."""
WORSE = 1.5
"""Validation loss over training loss, where no skill is known."""


@rule
def unshuffled(run: Run) -> Iterator[Finding]:
    """Data that is sorted by label, or by the number to predict, and is not shuffled.

    Means:   batches hold far fewer classes than batches of a shuffle would, and equal labels come in long runs. Of
             numbers: they vary less within batches than after a shuffle, each epoch begins with a loss of twice the
             epoch's, since the model has run after the last rows, and it ends up poor. A series in its order may learn.
    Matters: each batch pulls the model to the class that it holds, and the next one back: the loss saws, and the model
             that is left at the end of an epoch favours the last class.
    Try:     shuffle=True in fit; in tf.data, shuffle before batch with a buffer as large as the data set.
    Source:  Bengio, Practical recommendations for gradient-based training, 2012, section 3.1 (order of the examples).

    >>> from trainrt.findings.examples import learning, stuck
    >>> labels = {"kind": "binary", "counts": {"0": 500, "1": 500}, "batch_entropy": 0.02, "run_length": 500.0}
    >>> labels |= {"batch_entropy_shuffled": 0.98, "run_length_shuffled": 2.0}
    >>> [finding.causes[0] for finding in unshuffled(learning(targets={"labels": labels}, train={"shuffle": False}))]
    ['unshuffled_data']
    >>> list(unshuffled(learning(targets={"labels": labels | {"batch_entropy": 0.97, "run_length": 2.1}})))
    []
    >>> numbers = {"labels": {"kind": "continuous", "batch_variance": 0.03, "batch_variance_shuffled": 0.97}}
    >>> saw = {"losses": np.tile(np.geomspace(9, 0.4, 50), 4), "loss": "mean_squared_error"}
    >>> [finding.causes[0] for finding in unshuffled(stuck(targets=numbers, **saw))]
    ['unshuffled_data']
    >>> list(unshuffled(learning(targets=numbers, loss="mean_squared_error")))
    []
    """
    train = program.side(run)
    for target in program.leaves(run, "targets"):
        labels = target.get("labels") or {}
        mixed, after = program.number(labels.get("batch_entropy")), program.number(labels.get("batch_entropy_shuffled"))
        length = program.number(labels.get("run_length"))
        usual = program.number(labels.get("run_length_shuffled"))
        # Of batches of a row or two the entropy says nothing; the runs do.
        sorted_batches, sorted_numbers = in_order(labels)
        varied, usually = (program.number(labels.get(f"batch_variance{of}")) for of in ("", "_shuffled"))
        how, advice = _unmixed(train)
        if sorted_numbers:
            restart = _restart(run)
            ended = outcome(run)
            known = ended.validation if math.isfinite(ended.validation) else ended.train
            if not (restart > JUMP and ended.far and known < POOR):
                continue
            yield about(
                run,
                "unshuffled",
                "error",
                0.9,
                ("unshuffled_data", "lr_too_high"),
                f"The rows come sorted by their targets ({how}): within a batch they vary {varied:.2g} times as much "
                f"as in all, {usually:.2g} times after a shuffle. Each epoch begins with {restart:.3g} times "
                "the loss of the epoch: the model runs after the rows that it saw last.",
                {"batch_variance": varied, "batch_variance_shuffled": usually, "restart": restart, "threshold": MIXED},
                advice,
            )
            return
        if not (sorted_batches and length > RUNS * usual):
            continue
        known = outcome(run).validation if math.isfinite(outcome(run).validation) else outcome(run).train
        # Some learn all the same: a series that changes its regime, say.
        works = known >= LEARNT or (known >= LEARNS and not _restart(run) > JUMP)
        yield about(
            run,
            "unshuffled",
            "info" if outcome(run).settled and works else "error",
            0.95,
            ("unshuffled_data",),
            f"The rows come sorted by label ({how}): {length:.3g} equal labels in a row where a shuffle has "
            f"{usual:.2g}; "
            f"the labels of a batch have {mixed:.2f} bits of entropy where a shuffle has {after:.2f}.",
            {"batch_entropy": mixed, "batch_entropy_shuffled": after, "run_length": length, "threshold": MIXED},
            advice,
        )
        return


def in_order(labels: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the classes, or the numbers to predict, differ far less within batches than after a shuffle."""
    pairs = [(labels.get(name), labels.get(f"{name}_shuffled")) for name in ("batch_entropy", "batch_variance")]
    classes, numbers = (program.number(b) > 0.2 and program.number(a) < MIXED * program.number(b) for a, b in pairs)
    return classes, numbers


def _unmixed(train: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """What does not mix the rows, and what would."""
    if train.get("source") == "arrays":
        how = "shuffle=False" if train.get("shuffle") is False else "no shuffle mixes them"
        return how, ("Shuffle: trainrt.fit(..., shuffle=True).",)
    shuffles = (train.get("pipeline") or {}).get("shuffles") or []
    small = [s for s in shuffles if s.get("buffer") and s.get("cardinality") and s["buffer"] < s["cardinality"]]
    buffer = f"a buffer of {small[0]['buffer']} for {small[0]['cardinality']} elements" if small else "no shuffle"
    return (
        f"the pipeline has {buffer}",
        ("dataset.shuffle(number_of_samples).batch(size): before batch, the buffer as large as the data.",),
    )


def _restart(run: Run) -> float:
    """Loss of the first window of an epoch over the median of all, later epochs; NaN where epochs share a window."""
    starts = [epoch.step + 1 for epoch in run.epochs[len(run.epochs) // 2 : -1]]
    loss, at = scalar(run, "loss"), np.searchsorted(run.steps[:, 0], starts)
    if not starts or at[-1] >= len(loss) or not (run.steps[at, 0] == starts).all():
        return math.nan
    return float(np.median(loss[at]) / np.median(loss[len(loss) // 2 :]))


@rule
def validation_differs(run: Run) -> Iterator[Finding]:
    """Validation data of another distribution than the training data.

    Means:   the inputs' means differ by half a deviation, or their deviations by a factor of 2, or the classes' shares
             by a total variation of 0.5; and the model does clearly worse on the validation data: by 0.1 of skill, or
             at 1.5 times the loss where no skill is known.
    Matters: what is measured there says nothing about the training: usually one of both was scaled and the other was
             not, or the split cut a sorted file.
    Try:     the same preprocessing for both, with the training set's numbers; shuffle before you split.
    Source:  Rabanser et al., Failing loudly, 2019 (shift of moments and of labels); Keras takes validation_split from
             the end of the arrays, unshuffled.

    >>> from trainrt.findings.examples import learning
    >>> worse = {"val_accuracy": 0.5, "val_loss": 3.0}
    >>> shifted = {"inputs": [{"mean": [0.0], "std": [0.02], "dtype": "float32"}]}
    >>> [finding.causes[0] for finding in validation_differs(learning(validation=shifted, logs=worse))]
    ['train_val_mismatch']
    >>> list(validation_differs(learning(logs=worse)))
    []
    """
    rows = program.side(run, "validation").get("rows") or 0
    if rows < 16:
        return
    ended = outcome(run)
    known = math.isfinite(ended.train) and math.isfinite(ended.validation)
    if known and not ended.validation < ended.train - 0.1:
        return
    logs = run.epochs[-1].logs if run.epochs else {}
    if not known and not logs.get("val_loss", math.nan) > WORSE * abs(logs.get("loss", math.nan)):
        return
    pairs = zip(program.leaves(run, "inputs"), program.leaves(run, "inputs", "validation"), strict=False)
    shift, ratio = 0.0, 1.0
    for ours, theirs in pairs:
        one = _apart(ours, theirs, rows)
        shift, ratio = max(shift, one[0]), max(ratio, one[1])
    distance = _label_distance(run)
    if not (shift > SHIFT or ratio > SPREAD or distance > VARIATION):
        return
    if distance > VARIATION:
        message = f"The classes of the validation data differ from those of the training data: distance {distance:.2f}."
        advice: tuple[str, ...] = (
            "Shuffle before you split: order = rng.permutation(len(x)); x, y = x[order], y[order]. validation_split "
            "takes the last rows as they are.",
        )
    else:
        message = (
            f"The validation inputs differ from the training inputs: means by {shift:.2g} deviations, "
            f"deviations by a factor of {ratio:.3g}."
        )
        advice = (
            "Give both the same preprocessing, with the training set's numbers: (x_val - x_train.mean(0)) / "
            "x_train.std(0).",
            "Or put the normalisation into the model, where it cannot be forgotten.",
        )
    evidence: dict[str, Any] = {"mean_shift": shift, "std_factor": ratio, "label_distance": distance}
    evidence |= {"thresholds": {"mean_shift": SHIFT, "std_factor": SPREAD, "label_distance": VARIATION}}
    strong = ratio > 2 * SPREAD or shift > 2 * SHIFT or distance > VARIATION
    yield about(
        run,
        "validation_differs",
        "error",
        0.92 if strong else 0.7,
        ("train_val_mismatch",),
        message,
        evidence,
        advice,
    )


@rule
def validation_seen(run: Run) -> Iterator[Finding]:
    """Validation rows that are training rows.

    Means:   more of the validation rows are, bit for bit, rows of the training data than the data's own duplicates
             explain; and sample weights leave some rows to both sides.
    Matters: the validation metrics then measure memory; a model that overfits looks perfect.
    Try:     split before you augment or oversample; drop duplicates before you split; split by group.
    Source:  Kapoor & Narayanan, Leakage and the reproducibility crisis, 2023; Barz & Denzler, 2020 (CIFAR duplicates).

    >>> from trainrt.findings.examples import learning
    >>> seen = {"overlap": {"sampled_rows": 300, "shared": 300, "share": 1.0}}
    >>> [finding.causes[0] for finding in validation_seen(learning(data=seen))]
    ['train_val_overlap']
    >>> list(validation_seen(learning(data={"overlap": {"sampled_rows": 300, "shared": 0, "share": 0.0}})))
    []
    >>> sides = lambda zeros: {side: {"weights": [{"zero_share": zeros}]} for side in ("train", "validation")}
    >>> [len(list(validation_seen(learning(data={**seen, **sides(zeros)})))) for zeros in (0.1, 0.6)]
    [1, 0]
    """
    overlap = run.data.get("overlap") or {}
    if _idle(run, "train") + _idle(run, "validation") >= 1:
        return  # those with a weight may be other rows on each side, as the nodes of a graph
    share, rows = program.number(overlap.get("share")), overlap.get("sampled_rows") or 0
    duplicates = program.number((program.side(run).get("duplicates") or {}).get("share"))
    duplicates = 0.0 if math.isnan(duplicates) else duplicates
    # Where a quarter of the training rows repeat, the inputs have few values, and any split shares rows.
    if not (share > SHARED and rows >= 16) or duplicates > 0.25 or share < 3 * duplicates:
        return
    yield about(
        run,
        "validation_seen",
        "error" if share > 0.5 else "warning",
        0.93 if share > 0.5 else 0.8,
        ("train_val_overlap",),
        f"{share:.0%} of the validation rows are training rows, bit for bit, so the validation metrics measure memory.",
        {"share": share, "rows": rows, "duplicates_in_training": duplicates, "threshold": SHARED},
        (
            "Split once, before anything is copied: x_train, x_val, y_train, y_val = train_test_split(x, y).",
            "Drop duplicates first: np.unique(x, axis=0, return_index=True).",
        ),
    )


def _idle(run: Run, name: str) -> float:
    """Share of the rows of a side whose sample weight is zero."""
    shares = (program.number(leaf.get("zero_share")) for leaf in program.leaves(run, "weights", name))
    return max((share for share in shares if math.isfinite(share)), default=0.0)


@rule
def leaking_feature(run: Run) -> Iterator[Finding]:
    """A feature that gives the label away.

    Means:   one column of a table explains at least 98 % of the targets' variance (of classes: between-class variance
             over all, the correlation ratio), of several, and no other explains half of it; or 99.9 %, and no other
             nine tenths, as neighbours in a series do.
    Matters: the model needs nothing else, and fails where that feature is not known yet, as in production.
    Try:     look at what the feature means and when it is known; drop it and train again.
    Source:  Kaufman et al., Leakage in data mining, 2012.

    >>> from trainrt.findings.examples import learning
    >>> relation = {"features": 11, "rows": 400, "largest": [[10, 1.0], [2, 0.2]]}
    >>> [finding.causes[0] for finding in leaking_feature(learning(train={"relation": relation}))]
    ['label_leakage']
    >>> list(leaking_feature(learning(train={"relation": {**relation, "largest": [[10, 0.4], [2, 0.3]]}})))
    []
    """
    relation = program.side(run).get("relation") or {}
    largest = relation.get("largest") or []
    if relation.get("features", 0) < 3 or relation.get("rows", 0) < 32 or len(largest) < 2:
        return
    (feature, share), (_, second) = largest[0], largest[1]
    # In a sequence or an image an element is no feature: to find the one that counts may be the task.
    table = all(len(leaf.get("shape") or ()) == 2 for leaf in program.leaves(run, "inputs"))
    alone = (share >= 0.98 and second < 0.5) or (share >= COPY and second < 0.9)
    if not alone or not table:
        return
    yield about(
        run,
        "leaking_feature",
        "error",
        0.93,
        ("label_leakage",),
        f"Feature {feature} alone explains {share:.1%} of the targets; the next best {second:.0%}. Is it "
        "made from them?",
        {"feature": feature, "explained": share, "second": second, "threshold": 0.98},
        (
            f"Look at it, then leave it out: x = np.delete(x, {feature}, axis=1).",
            "Ask when the value is known: after the label is too late.",
        ),
    )


def _apart(ours: Mapping[str, Any], theirs: Mapping[str, Any], rows: int) -> tuple[float, float]:
    """How far two sets' channels are apart: means in deviations beyond what so few rows may show, and the factor
    between their overall deviations."""
    a, b = (np.array(_list(leaf.get("mean")), np.float64) for leaf in (ours, theirs))
    s, t = (np.array(_list(leaf.get("std")), np.float64) for leaf in (ours, theirs))
    if not len(a) or len(a) != len(b) or not len(s) or len(s) != len(t):
        return 0.0, 1.0
    wide = s > 1e-6 * max(float(np.abs(a).max()), 1e-12)
    if not wide.any():
        return 0.0, 1.0
    shift = np.abs(a - b)[wide] / np.maximum(s[wide], t[wide]) - 4 / math.sqrt(rows)
    # Of many channels single ones may differ: the middle one counts.
    together = np.sqrt(np.square(t[wide] / s[wide]).mean())
    middle = float(np.median(np.where(t[wide] > 0, t[wide] / s[wide], np.nan)))
    factor = math.sqrt(together * middle) if middle > 0 else together
    return float(np.median(shift)), max(factor, 1 / factor if factor > 0 else math.inf)


def _label_distance(run: Run) -> float:
    ours, theirs = program.leaves(run, "targets"), program.leaves(run, "targets", "validation")
    if len(ours) != 1 or len(theirs) != 1:
        return 0.0
    a, b = ((leaf[0].get("labels") or {}).get("counts") for leaf in (ours, theirs))
    if not a or not b or len(a) > 50 or sum(b.values()) < 20:
        return 0.0
    n, m = sum(a.values()), sum(b.values())
    return 0.5 * sum(abs(a.get(k, 0) / n - b.get(k, 0) / m) for k in {*a, *b})


def _list(value: Any) -> list[float]:
    known = list(value.values()) if isinstance(value, Mapping) else value or []
    return [v if v is not None else float("nan") for v in known]
