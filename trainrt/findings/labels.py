"""Labels and sample weights that teach nothing, or teach one class only; numbers in the data that are none."""

from __future__ import annotations

import math
from collections.abc import Iterator

from trainrt.findings import program
from trainrt.findings.finding import Finding
from trainrt.findings.outcome import outcome
from trainrt.findings.rules import about, rule
from trainrt.record.run import Run

MEMORISED = 0.25
"""Skill on the training data that only memory explains, where there is none on the validation data."""
NOTHING = 0.05
RARE = 10.0
"""Largest over smallest class (SageMaker's ClassImbalance)."""
ROWS = 50


@rule
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

    Means:   at least 90 % of the sample weights are exactly zero.
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
            yield about(
                run,
                "ignored_samples",
                "error",
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
             constant prediction; or a class that the targets have room for never occurs.
    Matters: inputs and labels are not of the same samples: shuffled apart, sorted apart, joined on the wrong key. Or
             labels were replaced on the way.
    Try:     print some samples with their labels; shuffle both by one permutation; trace the labels to their source.
    Source:  Zhang et al., Understanding deep learning requires rethinking generalization, 2017: networks fit random
             labels, and only the validation data tells.

    >>> from trainrt.findings.examples import learning
    >>> chance = {"val_accuracy": 0.5, "val_loss": 1.4}
    >>> [finding.causes[0] for finding in labels_of_noise(learning(logs=chance))]
    ['labels_wrong']
    >>> list(labels_of_noise(learning()))
    []
    """
    ended = outcome(run)
    rows = program.side(run, "validation").get("rows") or 0
    # Luck of so many rows, in skill.
    noise = 2 / math.sqrt(max(rows, 1))
    known = math.isfinite(ended.train) and math.isfinite(ended.best) and rows >= ROWS
    if known and ended.settled and ended.train > MEMORISED and ended.best < max(NOTHING, min(noise, 0.15)):
        yield about(
            run,
            "labels_of_noise",
            "error",
            0.87,  # a model that is merely too free does better at first
            ("labels_wrong", "overfitting", "train_val_mismatch"),
            f"The training data is learnt (skill {ended.train:.2f}), but no epoch did better on the "
            "validation data than "
            f"a constant prediction would (skill {ended.best:.2f}): the labels seem independent of the inputs.",
            {
                "skill_train": ended.train,
                "skill_validation_best": ended.best,
                "threshold": max(NOTHING, min(noise, 0.15)),
            },
            (
                "Look at some pairs: for i in range(5): print(x[i], y[i]).",
                "Shuffle inputs and labels by one permutation: order = rng.permutation(len(x)); x, y = "
                "x[order], y[order].",
            ),
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
    counts = ((program.leaves(run, "targets") or [{}])[0].get("labels") or {}).get("counts") or {}
    if len(counts) < 2 or len(counts) > 100:
        return
    ratio = max(counts.values()) / max(min(counts.values()), 1)
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
            f"trainrt.fit(..., class_weight={{{', '.join(f'{k}: {w}' for k, w in list(weights.items())[:5])}}}).",
            "Watch a metric that sees the rare class: metrics=[keras.metrics.AUC(), keras.metrics.Recall()].",
        ),
    )
