"""Too little training: too few steps, or steps that would take a hundred times the run."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from trainrt.findings import program
from trainrt.findings.finding import Finding
from trainrt.findings.outcome import outcome
from trainrt.findings.rules import about, rule
from trainrt.findings.series import falls_late, loss_trend, pace, percentile, scalar
from trainrt.record.run import Run

FEW = 100
"""Updates under which even a good run has hardly begun: at 1e-3 of a kernel's size each, they move it by a tenth."""
POOR = 0.7
HANDFUL = 20
SLOW = 0.3
"""Skill under which a loss that still falls is far from done."""
SMALL_STEP = 5e-4
"""Of a kernel's size, under plain gradient descent, whose steps shrink with the gradient."""
LARGE_STEP = 5e-3


@rule
def unfinished(run: Run) -> Iterator[Finding]:
    """A run that ends before it has begun: too few updates.

    Means:   the run has fewer than 100 updates, the loss still falls at its end, and the model learnt little. Or it has
             more, has ended, learnt less, and the loss fell by a twentieth in its second half.
    Matters: nothing is wrong but the number of steps: epochs count passes, not updates.
    Try:     smaller batches, more epochs; or a larger learning rate where the steps are small.
    Source:  own judgement: 100 steps of 1e-3 of a kernel's size move it by a tenth; Masters & Luschi, 2018, on small
             batches.

    >>> from trainrt.findings.examples import learning, stuck
    >>> falling = np.linspace(0.69, 0.60, 8)
    >>> few = {"rows": 480, "batches": 2, "batch_size": [240, 240]}
    >>> [finding.causes[0] for finding in unfinished(stuck(steps=8, losses=falling, train=few, update_ratio=1e-2))]
    ['too_few_updates']
    >>> list(unfinished(learning(steps=8, losses=falling, train=few)))
    []
    """
    if len(run.steps) < 2:
        return
    updates = int(run.steps[-1, 1] - run.steps[0, 0] + 1)
    ended = outcome(run)
    few = updates < FEW and ended.poor(POOR if len(run.epochs) > 1 else SLOW)
    # The noise of so few losses hides their fall.
    few = few and (falls(run) or (updates <= HANDFUL and loss_trend(run).fall > 0))
    # A run of any length whose end is not the end of its learning.
    short = run.end is not None and ended.poor(SLOW) and falls_late(run)
    if not few and not short:
        return
    ratio, path = pace(run)
    train = program.side(run)
    batches = train.get("batches") or 0
    rate = percentile(scalar(run, "learning_rate"), 50)
    whole = batches == 1
    # What divides by the gradient's size moves at its own pace from the first step on.
    adaptive = ratio >= SMALL_STEP and program.optimizer(run).get("class") != "SGD"
    few_first = whole or ratio >= LARGE_STEP or len(run.epochs) == 1 or (updates <= HANDFUL and adaptive)
    causes: tuple[str, ...] = ("too_few_updates", "batch_size_too_large", "lr_too_low")
    if not few_first:
        causes = ("lr_too_low", "too_few_updates")
    size = (train.get("batch_size") or [None])[-1]
    smaller = (
        f"trainrt.fit(..., batch_size=32) instead of {size}" if size and size > 64 else "trainrt.fit(..., epochs=50)"
    )
    more = f"{smaller} makes more updates."
    faster = f"A larger rate: model.optimizer.learning_rate = {rate * 10:.1g}." if math.isfinite(rate) else ""
    advice = (more, faster) if few_first else (faster, more)
    yield about(
        run,
        "unfinished",
        "warning",
        0.85 if few else 0.4,
        causes,
        f"The run has {updates} updates"
        + (f", {batches} an epoch" if batches else "")
        + f", which moved the kernels by "
        f"{path:.2g} of their size in all ({ratio:.1g} a step); the loss still falls.",
        {"updates": updates, "path_over_weight": path, "update_ratio": ratio, "threshold": FEW, "skill": ended.skill},
        tuple(line for line in advice if line),
    )


@rule
def crawling(run: Run) -> Iterator[Finding]:
    """A loss that falls, steadily, and would need many times the run.

    Means:   the loss falls at the end as fast as before, the model is still worse than a constant prediction or little
             better, and at this pace it would take the run's length twice over to get to a constant's loss, or to half
             of it, where the steps of plain gradient descent are under 5e-4 of the kernels.
    Matters: nothing holds the model back but the length of its steps.
    Try:     ten times the learning rate; targets of unit size, if they are far from it.
    Source:  own judgement; the pace is a difference of medians over fifths of the run, beyond their noise.

    >>> from trainrt.findings.examples import learning, stuck
    >>> line = {"mean": [50.0], "std": [1.4], "labels": {"kind": "continuous"}}
    >>> slow = {"losses": np.linspace(2500, 2200, 200), "targets": line, "loss": "mean_squared_error"}
    >>> [finding.causes[0] for finding in crawling(stuck(**slow, logs={"loss": 2200.0, "val_loss": 2200.0}))]
    ['lr_too_low']
    >>> list(crawling(learning()))
    []
    """
    ended = outcome(run)
    if len(run.steps) < 25 or not ended.poor(SLOW):
        return
    loss = scalar(run, "data_loss") if np.isfinite(scalar(run, "data_loss")).any() else scalar(run, "loss")
    level = np.array([percentile(part, 50) for part in np.array_split(loss, 5)])
    if not np.isfinite(level).all():
        return
    noise = loss_trend(run).noise / math.sqrt(max(len(loss) / 5, 1))
    early, late = level[0] - level[2], level[2] - level[4]
    # A start is about as good as a constant: from there on half of it is the aim.
    constant = ended.constant if math.isfinite(ended.constant) else level[0]
    ratio, _ = pace(run)
    if level[4] <= 1.2 * constant and not (ratio < SMALL_STEP and program.optimizer(run).get("class") == "SGD"):
        return
    target = constant if level[4] > 1.2 * constant else constant / 2
    left = level[4] - target
    # Still at half of its early pace or more, and far from done.
    if not (late > 4 * noise and late > 0.4 * early and left > 4 * late):
        return
    rate = percentile(scalar(run, "learning_rate"), 50)
    yield about(
        run,
        "crawling",
        "error",
        0.8,
        ("lr_too_low", "too_few_updates"),
        f"The loss falls steadily, from {level[0]:.4g} to {level[4]:.4g}, but at this pace a constant's "
        f"loss of {target:.4g} "
        f"is {left / late * 0.4:.3g} times the run away; kernels move by {ratio:.1g} of their size a step.",
        {"levels": level.tolist(), "noise": noise, "target": target, "update_ratio": ratio},
        (
            f"Raise the learning rate: model.optimizer.learning_rate = {rate * 10:.1g}."
            if math.isfinite(rate)
            else "Raise the learning rate tenfold.",
            "Scale the targets to unit size, if they are far from it.",
        ),
    )


def falls(run: Run) -> bool:
    """Whether the second half's loss is under the first half's, beyond the noise."""
    loss = scalar(run, "loss")
    half = len(loss) // 2
    before, after = percentile(loss[:half], 50), percentile(loss[half:], 50)
    return bool(before - after > 2 * loss_trend(run).noise / math.sqrt(max(half, 1)) and after < before)
