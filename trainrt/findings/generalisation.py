"""Too much freedom, or too little: memory instead of rule, or regularisers that leave nothing to learn."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from trainrt.findings import program
from trainrt.findings.finding import Finding
from trainrt.findings.outcome import outcome
from trainrt.findings.rules import about, rule
from trainrt.findings.series import penalty, scalar
from trainrt.record.run import Run

POOR = 0.65
"""Skill under which a regulariser is a fault; see `outcome`. Classes survive probabilities that are squashed."""
GAP = 0.35
"""Skill on the training data beyond that on the validation data."""
ROSE = 1.3
"""Validation loss at the end over its best."""
OUTWEIGHS = 0.5
"""Share of the loss that is not about the data."""
KEPT = 0.3
"""Share of the units that all dropouts on the way leave on."""


@rule
def overfit(run: Run) -> Iterator[Finding]:
    """A model that learnt its training data by heart.

    Means:   the skill on the training data is 0.35 above that on the validation data, and the validation loss ends at
             1.3 times its best or more.
    Matters: the later epochs made the model worse where it counts.
    Try:     stop at the best epoch, a smaller model, more data or augmentation, weight decay or dropout.
    Source:  Prechelt, Early stopping: but when?, 1998 (generalisation loss); SageMaker's Overfit takes 10 % of
             the loss, which flags every model that fits its data well.

    >>> from trainrt.findings.examples import learning
    >>> worse = {"val_accuracy": 0.65, "val_loss": 2.0}
    >>> [f.causes[0] for f in overfit(learning(logs=worse, early={"val_accuracy": 0.7, "val_loss": 0.6}))]
    ['overfitting']
    >>> list(overfit(learning()))
    []
    """
    ended = outcome(run)
    losses = np.array([epoch.logs.get("val_loss", math.nan) for epoch in run.epochs])
    known = losses[np.isfinite(losses)]
    if len(known) < 3 or not ended.train - ended.validation > GAP or not ended.settled:
        return
    best, last = float(known.min()), float(np.median(known[-3:]))
    if not last > best + (ROSE - 1) * abs(best) or not ended.train > 0.5:
        return
    at = int(np.nanargmin(losses))
    steps = (run.epochs[at].step + 1, run.epochs[-1].step)
    yield about(
        run,
        "overfit",
        "error" if ended.train - ended.validation > 2 * GAP else "warning",
        0.85,
        ("overfitting", "capacity"),
        f"The model learns its training data by heart: the validation loss was best in epoch {at + 1} at "
        f"{best:.4g} and "
        f"is {last:.4g} now, with a skill of {ended.train:.2f} on the training and {ended.validation:.2f} on the "
        "validation data.",
        {
            "best_epoch": at,
            "val_loss_best": best,
            "val_loss_last": last,
            "skill_train": ended.train,
            "skill_validation": ended.validation,
            "thresholds": {"gap": GAP, "rise": ROSE},
        },
        (
            f"Stop there: keras.callbacks.EarlyStopping(patience={max(2, len(losses) // 10)}, "
            "restore_best_weights=True).",
            "Fewer units, dropout between 0.1 and 0.5, or kernel_regularizer=keras.regularizers.L2(1e-4).",
            "More data, or augmentation.",
        ),
        steps=steps if steps[0] <= steps[1] else None,
    )


@rule
def outweighing_regulariser(run: Run) -> Iterator[Finding]:
    """A regulariser that outweighs the data.

    Means:   more than half of the loss is the regularisers' (of weights, of activities, or a loss that a layer adds),
             at the start or at the end of a run that learnt little.
    Matters: the gradients push the weights to zero instead of to the data.
    Try:     a tenth or a hundredth of the factor; watch the data's part of the loss, which trainrt records alone.
    Source:  TheDeepChecker: the regularisation's part over the data's.

    >>> from trainrt.findings.examples import learning, stuck
    >>> parts = {"data_loss": 0.69, "regularization_loss": 1.4}
    >>> [finding.causes[0] for finding in outweighing_regulariser(stuck(scalars=parts))]
    ['over_regularised']
    >>> list(outweighing_regulariser(learning(scalars=parts)))
    []
    """
    beside, data = penalty(run), scalar(run, "data_loss")
    ended = outcome(run)
    if not len(beside) or not np.isfinite(beside).any() or not ended.poor(POOR):
        return
    # It may have won within a few steps, and then be small, as the weights are.
    heads, tail = (slice(1), slice(max(1, len(beside) // 50))), slice(-max(1, len(beside) // 5), None)
    pairs = [(float(np.nanmedian(beside[head])), float(np.nanmedian(np.abs(data[head])))) for head in heads]
    early, first = max(pairs, key=lambda pair: np.nan_to_num(pair[0] / max(sum(pair), 1e-300)))
    late, rest = float(np.nanmedian(beside[tail])), float(np.nanmedian(np.abs(data[tail])))
    share = max(late / max(late + rest, 1e-300), early / max(early + first, 1e-300))
    if not share > OUTWEIGHS:
        return
    yield about(
        run,
        "outweighing_regulariser",
        "error",
        0.92,
        ("over_regularised", "weight_decay_too_high"),
        f"The regularisers outweigh the data: they are {share:.0%} of the loss (at first {early:.3g} beside "
        f"{first:.3g}, in "
        f"the end {late:.3g} beside {rest:.3g}).",
        {"share": share, "penalty": late, "data_loss": rest, "threshold": OUTWEIGHS, "skill": ended.skill},
        (
            *(
                ("self.add_loss(1e-3 * kl), or a factor that grows from 0 over the first epochs.",)
                if np.isfinite(scalar(run, "added_loss")).any()
                else ()
            ),
            "Divide the factors by 100, as in kernel_regularizer=keras.regularizers.L2(1e-4), and watch the "
            "data's loss: "
            'history.run.scalar("data_loss").',
        ),
        where=_regularised(run),
    )


@rule
def drowning_dropout(run: Run) -> Iterator[Finding]:
    """Dropout that leaves too little to learn from.

    Means:   one rate is 0.7 or more, or all of them in a row leave fewer than 30 % on, and the model learnt little.
    Matters: the gradients become noise: each step sees another, tiny network.
    Try:     rates of 0.1 to 0.5, after the widest layers; none in a small model.
    Source:  Srivastava et al., Dropout, 2014, section 7.3: keeping 0.4 to 0.8 of hidden units works, less does not;
             UMLAUT warns above 0.5.

    >>> from trainrt.findings.examples import learning, stuck
    >>> layers = [{"name": "drop", "class": "Dropout", "config": {"rate": 0.95}}]
    >>> [finding.causes[0] for finding in drowning_dropout(stuck(layers=layers))]
    ['dropout_too_high']
    >>> list(drowning_dropout(learning(layers=layers)))
    []
    """
    rates = {
        layer["name"]: program.number(layer["config"].get("rate"))
        for layer in program.layers(run)
        if "Dropout" in layer["class"]
    }
    rates = {name: rate for name, rate in rates.items() if 0 < rate < 1}
    if not rates:
        return
    ended = outcome(run)
    kept, worst = math.prod(1 - rate for rate in rates.values()), max(rates.values())
    # Evaluation runs without dropout: a model that does well there is not held back.
    if not (worst >= 0.7 or kept < KEPT) or not ended.poor(0.75 if worst >= 0.8 else POOR):
        return
    yield about(
        run,
        "drowning_dropout",
        "error",
        0.9 if worst >= 0.7 else 0.6,
        ("dropout_too_high", "over_regularised"),
        f"Dropout of {', '.join(f'{rate:g}' for rate in rates.values())} leaves {kept:.1%} of the paths on: "
        "each step trains "
        "another, tiny network.",
        {"rates": rates, "kept": kept, "thresholds": {"rate": 0.7, "kept": KEPT}, "skill": ended.skill},
        ("Use rates of 0.1 to 0.5: keras.layers.Dropout(0.2).",),
        where=tuple(name for name, rate in rates.items() if rate >= 0.5) or tuple(rates),
    )


def _regularised(run: Run) -> tuple[str, ...]:
    """Paths of the layers that have a regulariser."""
    return tuple(
        layer["name"]
        for layer in program.layers(run)
        if any(key.endswith("_regularizer") and value for key, value in layer["config"].items())
    )
