"""What the model and its loss are, by what they do: the loss asked about made-up predictions, and modes compared."""

from __future__ import annotations

import math
from collections.abc import Iterator

from trainrt.findings.finding import Finding
from trainrt.findings.looks import looks, span, value
from trainrt.findings.outcome import outcome
from trainrt.findings.rules import about, rule
from trainrt.findings.series import scalar
from trainrt.record.run import Run

POOR = 0.6
LEARNS = 0.3
"""Skill that no loss with the wrong sign leads to."""
GAP = 0.5
"""Deviations of the outputs between batch statistics and moving ones."""
LOST = 0.5
"""Share of what the model gained over a constant prediction that inference mode loses again."""
DEAF = 1e-4


@rule
def loss_upside_down(run: Run) -> Iterator[Finding]:
    """A loss that likes wrong predictions better than right ones.

    Means:   asked about predictions made up from the targets of the kept batch, the loss is lower for the wrong class,
             or the mirror image of the number, than for the truth; and the model learnt nothing, or the loss is
             negative. An info where it is not known what the model learnt: outputs may be distances or policies.
    Matters: the training does what it was told, and maximises the error.
    Try:     the sign: a cross-entropy is -sum(y * log(p)); the order of arguments: loss(y_true, y_pred).
    Source:  exact: the compiled loss itself was asked.

    >>> from trainrt.findings.examples import learning, stuck
    >>> from trainrt.findings.looks import example
    >>> wrong = example(0, reference={"constant": -2.3, "perfect": -0.02, "opposite": -6.2, "exact": 0.0})
    >>> [finding.causes[0] for finding in loss_upside_down(stuck(documents=[wrong]))]
    ['flipped_sign']
    >>> list(loss_upside_down(stuck(documents=[example(0)])))
    []
    """
    seen, reference = _asked(run)
    perfect, opposite, constant = (value(reference, name) for name in ("perfect", "opposite", "constant"))
    losses = run.document("model").get("losses") or []
    if not (opposite < perfect and constant < perfect) or (losses and not any(loss.get("custom") for loss in losses)):
        return  # those of Keras have the right sign, whatever shapes they are given
    ended = outcome(run)
    if ended.settled and ended.skill >= LEARNS:
        return
    # What a loss of one's own takes for a prediction may be a distance or a policy: there "right" means something else.
    sure = ended.poor(LEARNS) or (constant < 0 and opposite < 0)
    yield about(
        run,
        "loss_upside_down",
        "error" if sure else "info",
        0.98 if sure else 0.4,
        ("flipped_sign", "wrong_loss"),
        f"The loss has the wrong sign: right predictions would cost {perfect:.4g}, a constant one {constant:.4g}, "
        f"wrong ones {opposite:.4g}.",
        {"reference": reference},
        ("Negate it: return -keras.ops.sum(y * keras.ops.log(p + 1e-7), axis=-1).", "Or use a loss of Keras."),
        steps=span(seen),
    )


@rule
def deaf_loss(run: Run) -> Iterator[Finding]:
    """A loss that does not depend on what the model says.

    Means:   right, wrong and constant predictions made up for the kept batch cost the same.
    Matters: there is nothing to learn from: the gradients are zero or arbitrary. A categorical cross-entropy over one
             unit is such: Keras normalises the outputs of a row to sum to 1.
    Try:     binary_crossentropy for one unit and two classes, mean_squared_error for a number.
    Source:  exact: the compiled loss itself was asked.

    >>> from trainrt.findings.examples import learning, stuck
    >>> from trainrt.findings.looks import example
    >>> deaf = example(0, reference={"constant": 0.0, "perfect": 0.0, "opposite": 0.0, "exact": 0.0})
    >>> [finding.causes[0] for finding in deaf_loss(stuck(documents=[deaf]))]
    ['wrong_loss']
    >>> list(deaf_loss(stuck(documents=[example(0)])))
    []
    """
    seen, reference = _asked(run)
    answers = [value(reference, name) for name in ("perfect", "opposite", "constant")]
    if not all(map(math.isfinite, answers)):
        return
    size = max(map(abs, answers))
    if max(answers) - min(answers) > DEAF * size + 1e-30 or _targets_are_constant(run):
        return
    yield about(
        run,
        "deaf_loss",
        "error",
        0.96,
        ("wrong_loss", "output_units"),
        f"The loss does not depend on the predictions: right, wrong and constant ones all cost {answers[0]:.4g}.",
        {"reference": reference},
        (
            "One unit: loss='binary_crossentropy' with a sigmoid for two classes, loss='mean_squared_error' for "
            "a number. Several classes: one unit for each, and 'categorical_crossentropy'.",
        ),
        steps=span(seen),
    )


@rule
def fragile_loss(run: Run) -> Iterator[Finding]:
    """A loss of the user's that is not finite for certain predictions.

    Means:   the loss is not Keras's, and for probabilities of exactly 0 and 1, or the model's first outputs, it is NaN
             or infinite. An error when the run became so, an info while it has not.
    Matters: log(0) is minus infinity, and 0 * log(0) is NaN: one row that the model is sure of ends the training.
    Try:     a loss of Keras, which takes care of it, or an epsilon inside the logarithm.
    Source:  exact: the compiled loss itself was asked.

    >>> from trainrt.findings.examples import learning, stuck
    >>> from trainrt.findings.looks import example
    >>> from trainrt.record.vocabulary import Document
    >>> mine = Document("model", 0, {"losses": [{"name": "mine", "custom": True}]})
    >>> sharp = example(0, reference={"constant": 2.3, "perfect": 0.02, "opposite": 6.2, "exact": "nan"})
    >>> [f.causes[0] for f in fragile_loss(stuck(documents=[mine, sharp], losses=[math.nan] * 200))]
    ['unstable_loss']
    >>> list(fragile_loss(learning(documents=[mine, example(0)])))
    []
    """
    seen, reference = _asked(run)
    custom = any(loss.get("custom") for loss in run.document("model").get("losses") or [])
    exact = (reference or {}).get("exact")
    if not custom or not isinstance(exact, str):
        return
    if not all(math.isfinite(value(reference, name)) for name in ("perfect", "constant")):
        return  # it was asked the wrong way
    loss = scalar(run, "loss")
    broke = len(loss) > 0 and not all(map(math.isfinite, loss.tolist()))
    yield about(
        run,
        "fragile_loss",
        "error" if broke else "info",
        0.9 if broke else 0.3,
        ("unstable_loss", "wrong_output_activation"),
        f"The loss is {exact} for predictions of exactly 0 and 1, {value(reference, 'perfect'):.3g} for nearly those"
        + (": and it became so." if broke else "."),
        {"reference": reference},
        (
            "Put an epsilon into the logarithm: keras.ops.log(p + keras.config.epsilon()), or use a loss of Keras.",
            "Give it probabilities: activation='softmax' or 'sigmoid' on the last layer.",
        ),
        steps=span(seen),
    )


@rule
def softmax_over_rows(run: Run) -> Iterator[Finding]:
    """A softmax over the rows of the batch, or another axis than the classes.

    Means:   in every look the outputs are not negative and sum to 1 along the batch, or an inner axis, and not along
             the last one.
    Matters: what a row is given depends on which other rows are in the batch; it cannot be learnt, nor used for one.
    Try:     softmax over axis -1.
    Source:  exact, by the numbers, so that it is seen behind a Lambda too.

    >>> from trainrt.findings.examples import learning, stuck
    >>> from trainrt.findings.looks import example
    >>> outputs = [{"shape": [256, 10], "units": 10, "spread": 0.5, "sums_to_one": [0]}]
    >>> [finding.causes[0] for finding in softmax_over_rows(stuck(documents=[example(0, outputs=outputs)]))]
    ['wrong_softmax_axis']
    >>> list(softmax_over_rows(stuck(documents=[example(0)])))
    []
    """
    seen = looks(run)
    axes = [{tuple(output.get("sums_to_one") or ()) for output in look.get("outputs") or []} for look in seen]
    wrong = set.intersection(*axes) - {()} if axes else set()
    wrong = {one for one in wrong if -1 not in one}
    if not wrong:
        return
    axis = min(wrong)[0]
    yield about(
        run,
        "softmax_over_rows",
        "error",
        0.97,
        ("wrong_softmax_axis", "wrong_output_activation"),
        f"The outputs sum to 1 along axis {axis}{', that of the rows' if axis == 0 else ''}, not along the classes.",
        {"axis": axis, "looks": len(seen)},
        ("keras.layers.Softmax(axis=-1), or keras.ops.softmax(x, axis=-1).",),
        steps=span(seen),
    )


@rule
def stale_statistics(run: Run) -> Iterator[Finding]:
    """Batch normalization whose moving statistics are not those of the data.

    Means:   at the end, with dropout off, the outputs differ by more than half a deviation between the statistics of
             the batch and the moving ones, and inference mode loses half of what the model gained over a constant.
    Matters: evaluate, predict and validation use the moving statistics: they show another, worse model.
    Try:     momentum=0.9 where there are few steps (0.99 needs some 500), larger batches, no training on data of
             another scale; do not freeze the layer halfway.
    Source:  Ioffe & Szegedy, Batch normalization, 2015; the gap itself is measured.

    >>> from trainrt.findings.examples import learning, stuck
    >>> from trainrt.findings.looks import example
    >>> loss = {"total": 0.1, "data": 0.1, "regularization": 0.0, "inference": 2.0}
    >>> modes = {"difference": 1.2, "batchnorm": 1.2, "batchnorm_loss": 0.1}
    >>> [f.causes[0] for f in stale_statistics(learning(documents=[example(199, loss=loss, inference=modes)]))]
    ['batchnorm_statistics']
    >>> same = {"difference": 0.1, "batchnorm": 0.1, "batchnorm_loss": 0.1}
    >>> list(stale_statistics(learning(documents=[example(199, loss=loss | {"inference": 0.11}, inference=same)])))
    []
    """
    seen = looks(run)
    if not seen or not outcome(run).settled:
        return
    last = seen[-1]
    gap, batch = (value(last.get("inference"), name) for name in ("batchnorm", "batchnorm_loss"))
    inference, constant = value(last.get("loss"), "inference"), value(last.get("reference"), "constant")
    gained = constant - batch
    if not (gap > GAP and gained > 0.1 * abs(constant) and inference - batch > LOST * gained):
        return
    yield about(
        run,
        "stale_statistics",
        "error" if inference > constant else "warning",
        0.9 if inference > constant else 0.8,  # the same rows, in two modes: nothing else can be the cause
        ("batchnorm_statistics", "train_val_mismatch"),
        f"With the moving statistics of batch normalization the same rows cost {inference:.3g}, with their own "
        f"{batch:.3g} (a constant prediction: {constant:.3g}); the outputs differ by {gap:.2g} deviations.",
        {"gap": gap, "inference_loss": inference, "batch_loss": batch, "constant_loss": constant},
        (
            "keras.layers.BatchNormalization(momentum=0.9), which follows the data ten times faster than 0.99.",
            "Larger batches, if they are smaller than about 16: their statistics are noise.",
        ),
        steps=(int(last["step"]), int(last["step"])),
    )


def _asked(run: Run):
    seen = looks(run)
    reference = next((look["reference"] for look in seen if look.get("reference")), None)
    return seen, reference


def _targets_are_constant(run: Run) -> bool:
    targets = run.document("model").get("targets") or []
    return any(target.get("distinct") == 1 for target in targets)
