"""Labels and sample weights that teach nothing, or teach one class only; numbers in the data that are none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trainrt.findings import program
from trainrt.findings.data_split import in_order
from trainrt.findings.finding import Finding
from trainrt.findings.outcome import outcome
from trainrt.findings.rules import about, rule, rule_of_program
from trainrt.findings.series import loss_trend, scalar
from trainrt.record.run import Run

MEMORISED = 0.25
"""Skill on the training data that only memory explains, where there is none on the validation data."""
NOTHING = 0.05
LEARNS, LEARNT = 0.75, 0.5
"""Skill, or share of the first loss that is gone, from which on few samples were enough."""
RARE = 10.0
"""Largest over smallest class (SageMaker's ClassImbalance)."""
ROWS = 50
LEARNABLE = 0.1
"""Skill on training rows never seen before that labels of noise do not allow."""
BEGINNER = 0.05
"""Skill under which a model has not been trained on these rows before."""
DUPLICATES = 0.05
_PAIRS = (
    "Look at some pairs: for i in range(5): print(x[i], y[i]).",
    "Shuffle inputs and labels by one permutation: order = rng.permutation(len(x)); x, y = x[order], y[order].",
    "Hold back training rows instead, validation_split=0.2: if those are predicted, the validation data are at fault.",
)
_SIDES = (
    "Make both by one function: the same vocabulary, scale, order of channels, of columns and of class names.",
    "Hold back training rows instead, validation_split=0.2: those will do well.",
    "Look at some pairs of both: for i in range(5): print(x_val[i], y_val[i]).",
)


@rule_of_program
def bad_numbers(run: Run) -> Iterator[Finding]:
    """NaN or infinite values in the data.

    Means:   the inputs or the targets that were fed hold NaN or infinities.
    Matters: one such row makes the loss of its batch NaN, then every weight, for good.
    Try:     drop or fill the rows; clip before a logarithm or a division.
    Source:  exact: counted in the batches as they were fed.

    >>> from trainrt.findings.examples import learning
    >>> [finding.causes[0] for finding in bad_numbers(learning(inputs={"nan_share": 0.01}))]
    ['nan_in_data']
    >>> list(bad_numbers(learning()))
    []
    """
    for side in ("train", "validation"):
        for role in ("inputs", "targets", "weights"):
            for leaf in program.leaves(run, role, side):
                share = (leaf.get("nan_share") or 0.0) + (leaf.get("inf_share") or 0.0)
                if not share > 0:
                    continue
                what = f"the {role} of the {'training' if side == 'train' else side} data"
                yield about(
                    run,
                    "bad_numbers",
                    "error",
                    0.98,
                    ("nan_in_data",),
                    f"NaN or infinities in {what}: {share:.2g} of the elements.",
                    {"side": side, "role": role, "name": leaf.get("name"), "share": share, "threshold": 0.0},
                    (
                        "Drop the rows: keep = np.isfinite(x).reshape(len(x), -1).all(1); x, y = x[keep], y[keep].",
                        "Find where they come from: a logarithm of 0, a division by 0, a missing value in a table.",
                    ),
                )
                return


@rule
def ignored_samples(run: Run) -> Iterator[Finding]:
    """Sample weights that are zero nearly everywhere.

    Means:   at least 90 % of the sample weights are exactly zero. An info where the model learnt all the same: on a
             graph, say, few nodes have labels.
    Matters: those samples have no gradient: the model is trained on the few that are left.
    Try:     print the weights; leave sample_weight out; look at masks and at class_weight for a class of weight 0.
    Source:  own judgement: a tenth of the data may be all that a task weights; less is an accident.

    >>> from trainrt.findings.examples import learning
    >>> [finding.causes[0] for finding in ignored_samples(learning(train={"weights": [{"zero_share": 0.998}]}))]
    ['sample_weights_zero']
    >>> list(ignored_samples(learning(train={"weights": [{"zero_share": 0.5}]})))
    []
    """
    for leaf in program.leaves(run, "weights"):
        share = program.number(leaf.get("zero_share"))
        if share >= 0.9:
            ended = outcome(run)
            # Without a validation the loss of those few samples is all there is to tell.
            learnt = ended.skill >= LEARNS if math.isfinite(ended.skill) else loss_trend(run).fall > LEARNT
            yield about(
                run,
                "ignored_samples",
                "info" if ended.settled and learnt else "error",
                0.98,
                ("sample_weights_zero",),
                f"{share:.1%} of the sample weights are exactly zero: those samples teach nothing.",
                {"zero_share": share, "threshold": 0.9},
                ("Print (sample_weight > 0).mean(), or leave it out: trainrt.fit(..., sample_weight=None).",),
            )
            return


@rule
def labels_of_noise(run: Run) -> Iterator[Finding]:
    """Labels that have nothing to do with the inputs.

    Means:   the model learns its training data by heart, while on the validation data it never does better than a
             constant prediction; or a class that the targets have room for never occurs. Where it predicted training
             rows in the first pass, before it had seen them, the labels do follow from the inputs, and the validation
             data are to blame.
    Matters: inputs and labels are not of the same samples: shuffled apart, sorted apart, joined on the wrong key. Or
             labels were replaced on the way. Of the validation data: another vocabulary or order of the classes.
    Try:     print some samples with their labels; shuffle both by one permutation; trace the labels to their source.
    Source:  Zhang et al., Understanding deep learning requires rethinking generalization, 2017: networks fit random
             labels, and only the validation data tells; Dawid, 1984, on judging by predictions before the fact.

    >>> from trainrt.findings.examples import learning
    >>> chance = {"val_accuracy": 0.5, "val_loss": 1.4}
    >>> by_heart = np.append(np.full(50, 0.69), np.geomspace(0.69, 0.02, 150))  # a pass has 50 batches
    >>> [finding.causes[0] for finding in labels_of_noise(learning(logs=chance, losses=by_heart))]
    ['labels_wrong']
    >>> [finding.causes[0] for finding in labels_of_noise(learning(logs=chance))]
    ['train_val_mismatch']
    >>> list(labels_of_noise(learning()))
    []
    """
    ended = outcome(run)
    rows = program.side(run, "validation").get("rows") or 0
    # Luck of so many rows, in skill.
    noise = 2 / math.sqrt(max(rows, 1))
    known = math.isfinite(ended.train) and math.isfinite(ended.best) and rows >= ROWS
    if known and ended.settled and ended.train > MEMORISED and ended.best < max(NOTHING, min(noise, 0.15)):
        new = _of_new_rows(run, ended.constant)
        learnable = new > LEARNABLE
        yield about(
            run,
            "labels_of_noise",
            "error",
            0.87,  # a model that is merely too free does better at first
            ("train_val_mismatch", "labels_wrong", "overfitting")
            if learnable
            else ("labels_wrong", "overfitting", "train_val_mismatch"),
            f"The training data is learnt (skill {ended.train:.2f}), but no epoch did better on the "
            "validation data than "
            f"a constant prediction would (skill {ended.best:.2f}): "
            + (
                f"training rows that it had not seen before were predicted in the first pass (skill {new:.2f}), so the "
                "validation rows, or their labels, seem to be made in another way."
                if learnable
                else "the labels seem independent of the inputs."
            ),
            {
                "skill_train": ended.train,
                "skill_validation_best": ended.best,
                "skill_new_rows": new,
                "threshold": max(NOTHING, min(noise, 0.15)),
            },
            _SIDES if learnable else _PAIRS,
        )
        return
    for target in program.leaves(run, "targets"):
        labels = target.get("labels") or {}
        counts, classes = labels.get("counts") or {}, labels.get("classes") or 0
        width = classes if labels.get("kind") == "one_hot" else 0
        empty = [k for k in range(width) if str(k) not in counts]
        if (
            width
            and empty
            and width <= 100
            and ended.poor(0.85)
            and sum(counts.values()) > 30 * width
            and len(empty) <= width / 4
        ):
            yield about(
                run,
                "labels_of_noise",
                "warning",
                0.7,
                ("labels_wrong", "output_units"),
                f"Class {', '.join(map(str, empty[:5]))} of {width} never occurs among {sum(counts.values())} labels.",
                {"empty_classes": empty, "classes": width},
                ("Count them where they come from: np.unique(labels, return_counts=True).",),
            )
            return


def _of_moments(target: Mapping[str, Any]) -> dict[str, float]:
    """Shares of 0 and 1 in a mask of one channel, whose elements nobody counts one by one; empty for other numbers."""
    moments = [one for one in map(target.get, ("mean", "std")) if isinstance(one, list) and len(one) == 1]
    if len(moments) < 2:
        return {}
    share, spread = (program.number(one[0]) for one in moments)
    # Of numbers between 0 and 1 only those that are all one or the other vary so much.
    if not 0 < share < 1 or not math.isclose(spread, math.sqrt(share * (1 - share)), rel_tol=1e-3):
        return {}
    return {"0": 1 - share, "1": share} if target.get("min") == 0 and target.get("max") == 1 else {}


def _of_new_rows(run: Run, constant: float) -> float:
    """Skill at the end of the first pass, on rows that the model had not been trained on; NaN where it is not known."""
    train = program.side(run)
    again = program.number((train.get("duplicates") or {}).get("share"))
    if not run.epochs or again > DUPLICATES or program.asked(run, "class_weight") or program.leaves(run, "weights"):
        return math.nan
    # Of sorted rows the last ones tell the next.
    orders = [in_order(target.get("labels") or {}) for target in program.leaves(run, "targets")]
    if any(any(order) for order in orders):
        return math.nan
    loss = scalar(run, "data_loss") if np.isfinite(scalar(run, "data_loss")).any() else scalar(run, "loss")
    loss = loss[run.steps[:, 1] < min(run.epochs[0].step + 1, train.get("batches") or 0)]
    begun, tail = loss[: max(1, len(loss) // 10)], loss[-(len(loss) // 4) :]
    if not constant > 0 or len(tail) < 3 or not 1 - begun.mean() / constant < BEGINNER:
        return math.nan
    error = float(tail.std() / math.sqrt(len(tail)))
    return 1 - (float(tail.mean()) + 2 * error) / constant


@rule
def imbalance(run: Run) -> Iterator[Finding]:
    """One class so frequent that predicting it always is what the model does.

    Means:   the largest class is over 10 times the smallest, nothing weights them, and the accuracy is no better than
             that of always naming the largest.
    Matters: the loss is lowest for a constant at first, and the rare class has too few samples in a batch to pull away.
    Try:     class_weight, sampling the rare class more often, and a metric that sees it (AUC, recall).
    Source:  SageMaker Debugger's ClassImbalance (ratio 10).

    >>> from trainrt.findings.examples import stuck, learning
    >>> rare = {"labels": {"kind": "binary", "counts": {"0": 950, "1": 50}}, "mean": [0.05], "std": [0.22]}
    >>> [finding.causes[0] for finding in imbalance(stuck(targets=rare, logs={"accuracy": 0.95, "val_accuracy": 0.95}))]
    ['class_imbalance']
    >>> list(imbalance(learning(targets=rare)))
    []
    """
    ended = outcome(run)
    if (
        program.asked(run, "class_weight")
        or program.asked(run, "sample_weight")
        or ended.kind not in ("classes", "loss")
    ):
        return
    target = (program.leaves(run, "targets") or [{}])[0]
    counts = (target.get("labels") or {}).get("counts") or _of_moments(target)
    if len(counts) < 2 or len(counts) > 100:
        return
    ratio = max(counts.values()) / min(counts.values())
    if not ratio >= RARE or not ended.poor(0.1):
        return
    weights = {k: round(sum(counts.values()) / len(counts) / n, 3) for k, n in counts.items()}
    yield about(
        run,
        "imbalance",
        "error",
        0.85,
        ("class_imbalance",),
        f"The largest class is {ratio:.3g} times the smallest, and the model does no better than naming it always "
        f"(skill {ended.skill:.2f}).",
        {"ratio": ratio, "skill": ended.skill, "threshold": RARE, "counts": counts},
        (
            f"trainrt.fit(..., class_weight={{{', '.join(f'{k}: {w}' for k, w in list(weights.items())[:5])}}})."
            if len(target.get("shape") or ()) <= 2
            else "A loss that counts the classes alike: keras.losses.Dice(), or BinaryFocalCrossentropy().",
            "Watch a metric that sees the rare class: metrics=[keras.metrics.AUC(), keras.metrics.Recall()].",
        ),
    )
