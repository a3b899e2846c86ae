"""Steps that are too small or too large for the weights they move."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from trainrt.findings import program
from trainrt.findings.finding import Finding
from trainrt.findings.outcome import Outcome, outcome
from trainrt.findings.rules import rule
from trainrt.findings.series import (
    Trend,
    clip_scale,
    clipped_share,
    kernel_ratio,
    kernels,
    loss_trend,
    middle,
    observed,
    percentile,
    scalar,
)
from trainrt.record.run import Run
from trainrt.record.vocabulary import GRADIENT, UPDATE, WEIGHT

LOW, HIGH = 1e-4, 1e-1
"""The band of update over weight, a step, in which kernels usually learn."""
LOW_SHARE = 0.9
"""Share of the steps that must be under the band. A schedule that ends low after a good run is not a fault."""
WARM_UP = 0.1
MIN_STEPS = 20
HIGH_STEPS = 5
LEARNT = 0.5
"""A loss that fell by more than this share of its first level is not held back."""
THROWS = 0.5
"""A step of half a kernel's size leaves little of its start."""
LEARNT_SKILL = 0.6
"""Skill from which on the steps are nobody's business; see `outcome`."""
MASTERED = 0.9
"""Skill from which on a run may stand where it began: it goes on with what has been learnt."""
STOOD = 0.1
"""A loss that fell by less than this share stands where it began."""
LATE = 0.25
"""Spread of the batches' losses over their level, beyond which a model is not at its start."""
VANISHING = 1e-3
"""Gradient of the first kernel over that of the last (Zhang et al., AUTOTRAINER, 2021)."""
ROSE = 3.0
"""Growth of the loss over its first level that is a divergence whatever the ratio."""
TIGHT = 0.05
"""A clip that lets through less than this of the gradient."""
ALWAYS = 0.9
"""Share of steps that is nearly all of them."""


@rule
def learning_rate(run: Run) -> Iterator[Finding]:
    """A learning rate out of band: the steps are too small, or too large, for the weights they move.

    Means:   too low: kernels move by less than 1e-4 of their size a step in nearly all steps, from the start on, and
             the loss has hardly fallen. Too high: they move by more than 1e-1 of their size for several steps and the
             loss is no better for it, or the loss grew far over its first level. Where a clip makes the steps small,
             the clip is named. Biases, weights that begin at zero and the warm-up are left out.
    Matters: too low is the usual reason for a loss that stagnates from the first epoch; too high destroys the weights'
             start within a few steps, often for good.
    Try:     too low: ten times the learning rate, or the clip threshold that the observed norms suggest. Too high: a
             tenth of the learning rate, a warm-up, or scaled inputs.
    Source:  Schoop et al., UMLAUT, 2021; Ben Braiek & Khomh, TheDeepChecker, 2022: log10 of the ratio in -4..-1.

    >>> from trainrt.record.vocabulary import Parameter
    >>> kernel = [Parameter("dense/kernel", "dense", (8, 8), "float32")]
    >>> stuck = np.linspace(2.30, 2.28, 64)
    >>> run = Run.synthetic(64, kernel, gradient_norm=1.0, update_ratio=1e-6, clip_scale=1e-4, loss=stuck)
    >>> [finding.causes[0] for finding in learning_rate(run)]
    ['clip_too_tight']
    >>> list(learning_rate(Run.synthetic(64, kernel, update_ratio=1e-3, loss=np.geomspace(2.3, 0.1, 64))))
    []
    """
    if not len(run.steps):
        return
    update, weight = run.moments(UPDATE), run.moments(WEIGHT)
    seen, matrices = observed(run, update), np.flatnonzero(kernels(run, weight))
    if np.nansum(seen) < HIGH_STEPS or not len(matrices):
        return
    ratio = np.full(update.shape, np.nan)
    ratio[:, matrices] = kernel_ratio(update[:, matrices], weight[:, matrices])
    if np.isnan(ratio).all():
        return
    trend = loss_trend(run)
    ended = outcome(run)
    if ended.settled and ended.skill >= LEARNT_SKILL and np.isfinite(trend.last) and not _found_so(ended, trend):
        return  # whatever the steps were, they led there
    high = None if ended.settled and ended.skill >= LEARNT_SKILL else _too_high(run, ratio, seen, trend)
    if high is not None:
        yield high
    elif np.nansum(seen) >= MIN_STEPS:
        low = _too_low(run, ratio, seen, trend)
        if low is not None:
            yield low


def _found_so(ended: Outcome, trend: Trend) -> bool:
    """Whether a middling skill is what the run began with: a random start may explain half of a smooth series."""
    return ended.skill < MASTERED and trend.first - trend.last < STOOD * abs(trend.first)


def _too_low(run: Run, ratio: np.ndarray, seen: np.ndarray, trend: Trend) -> Finding | None:
    settled = _after_warm_up(run)
    weights = np.where(settled, np.nan_to_num(seen), 0.0)
    typical = middle(ratio)
    known = np.isfinite(typical)
    share = _share(typical < LOW, weights * known)
    if not share >= LOW_SHARE or not trend.fall < LEARNT:
        return None
    below = [
        p for p in range(ratio.shape[1]) if _share(ratio[:, p] < LOW, weights * np.isfinite(ratio[:, p])) >= ALWAYS
    ]
    level = percentile(typical, 50, weights)
    if level == 0:
        return None  # nothing moves at all: that is a dead update, whose reason is known exactly
    rate, top = (
        percentile(scalar(run, "learning_rate"), 50),
        np.nanmax(scalar(run, "learning_rate", "max"), initial=0.0),
    )
    scale = percentile(clip_scale(run), 50, weights)
    clipped = clipped_share(run)
    held = _share(np.nan_to_num(clipped), weights * np.isfinite(clipped))
    path = float(np.nansum(typical * np.nan_to_num(seen)))
    evidence = {
        "update_ratio": level,
        "band": [LOW, HIGH],
        "share_of_steps_under_band": share,
        "path_over_weight": path,
        "learning_rate": rate,
        "clip_scale": scale,
        "clipped_share": held,
        "loss": {"first": trend.first, "last": trend.last, "noise": trend.noise},
    }
    loss = (
        f"the loss went from {trend.first:.4g} to {trend.last:.4g}" if np.isfinite(trend.last) else "no loss is known"
    )
    moves = f"kernels move by {level:.1g} of their size a step, and {loss}"
    if scale < TIGHT and held >= ALWAYS:
        norms = scalar(run, "gradient_norm")
        median, upper = percentile(norms, 50), percentile(norms, 90)
        evidence |= {"gradient_norm": {"median": median, "p90": upper}, "update_ratio_without_clip": level / scale}
        causes = ("clip_too_tight", *(("lr_too_low",) if level / scale < LOW else ()))
        message = f"The clip leaves {scale:.2g} of the gradient in {held:.0%} of the steps: {moves}."
        advice = _loosen(run, median, upper)
        return _finding(run, "error", 0.95, causes, below, message, evidence, advice)
    decayed = np.isfinite(rate) and rate < 0.01 * top
    depth = _depth_ratio(run, ratio, weights)
    vanishing = depth < VANISHING
    evidence["gradient_first_over_last"] = depth
    rates = scalar(run, "learning_rate")
    # A warm-up that goes on to the end was counted in other steps than these.
    rising = len(rates) > 10 and rates[-1] > 2 * rates[0] and rates[-1] > 1.05 * rates[len(rates) * 3 // 4]
    causes = ("lr_schedule", "lr_too_low") if decayed or rising else ("lr_too_low", "vanishing_gradient")
    if vanishing:
        causes = ("vanishing_gradient", *(cause for cause in causes if cause != "vanishing_gradient"))
    at = f"The learning rate of {rate:.3g}" if np.isfinite(rate) else "The learning rate"
    at += f" (it was up to {top:.3g})" if decayed else ""
    factor = 10 ** np.clip(np.round(np.log10(1e-3 / level)), 1, 4)
    advice = (
        (
            f"Raise it: model.optimizer.learning_rate = {rate * factor:.1g}, which makes the steps about 1e-3 of the "
            "weights.",
        )
        if np.isfinite(rate)
        else ("Raise it by powers of ten until the loss moves.",)
    )
    message = f"{at} is too low: {moves}."
    if vanishing:
        message = f"The gradient of the first kernel is {depth:.1g} of the last one's: {moves}."
        advice = (
            "Keep gradients alive: activation='relu' with he_normal kernels, BatchNormalization, residual connections.",
            *advice,
        )
    # Where batches differ so much the model has learnt what tells them apart: a late phase that may mean to rest.
    late = trend.noise > LATE * abs(trend.last)
    return _finding(run, "info" if late else "warning", 0.3 if late else 0.75, causes, below, message, evidence, advice)


def _depth_ratio(run: Run, ratio: np.ndarray, weights: np.ndarray) -> float:
    """Gradient of the first kernel over that of the last, root mean squares; 1 where there are not two."""
    matrices = np.flatnonzero(~np.isnan(ratio).all(axis=0))
    if len(matrices) < 2:
        return 1.0
    rms = run.moments(GRADIENT)[:, matrices[[0, -1]]].rms
    first, last = (percentile(column, 50, weights) for column in rms.T)
    return first / last if last > 0 else 1.0


def _loosen(run: Run, median: float, upper: float) -> tuple[str, ...]:
    advice = ("Leave the clip out until you know the norms: trainrt.fit(..., clip=None).",)
    if not np.isfinite(upper):
        return advice
    clip = (run.environment or {}).get("fit", {}).get("clip")
    now = f" instead of {clip}" if clip else ""
    return (
        f"trainrt.fit(..., clip={upper:.2g}){now}: the median gradient norm was {median:.3g}, and that is its 90th "
        "percentile, so that only the largest tenth is clipped.",
        *advice,
    )


def _too_high(run: Run, ratio: np.ndarray, seen: np.ndarray, trend: Trend) -> Finding | None:
    if not np.isfinite(trend.last):
        return None
    over = np.nan_to_num(seen) @ (np.nan_to_num(ratio) > HIGH)  # [P] observed steps over the band
    weights = [int(p) for p in np.flatnonzero(over >= HIGH_STEPS)]
    size = max(abs(trend.first), abs(trend.start), trend.noise)
    origin = min(trend.start, trend.first)
    rose = trend.last - max(trend.start, trend.first) > (ROSE - 1) * size + 3 * trend.noise
    # Without progress: it ends no lower than where it began, or far over what it had reached.
    stuck = trend.last > origin - 0.1 * size
    regressed = trend.last - trend.best > 0.5 * size + 3 * trend.noise
    if not (rose or (weights and (stuck or regressed))):
        return None
    top = float(np.nanmax(ratio))
    rate = percentile(scalar(run, "learning_rate"), 50)
    at = f"The learning rate of {rate:.3g}" if np.isfinite(rate) else "The learning rate"
    steps = int(over.max(initial=0))
    moved = f"kernels moved by up to {top:.2g} of their size a step" + (
        f", in {steps} steps by more than {HIGH:g}" if weights else ""
    )
    lower = (
        f"Lower it: model.optimizer.learning_rate = {rate / 10:.1g}." if np.isfinite(rate) else "Lower it to a tenth."
    )
    return _finding(
        run,
        "error",
        0.85 if weights and (rose or regressed or top > THROWS) else 0.7 if weights else 0.6,
        (
            "lr_too_high",
            *(("batch_size_too_small",) if 0 < (program.side(run).get("batch_size") or [0])[0] <= 2 else ()),
            *("exploding_gradient", "inputs_unnormalised"),
            *(() if weights else ("unstable_loss",)),
        ),
        weights,
        f"{at} is too high: {moved}, and the loss went from {trend.start:.4g} to {trend.last:.4g} "
        f"(at best {trend.best:.4g}, at worst {trend.worst:.4g}).",
        {
            "update_ratio_max": top,
            "band": [LOW, HIGH],
            "steps_over_band": steps,
            "learning_rate": rate,
            "loss": {"first": trend.start, "last": trend.last, "best": trend.best, "worst": trend.worst},
        },
        (
            lower,
            "Scale the inputs to about -1..1 and the targets to unit size: large values make large gradients.",
            "Clip the rare large gradient: trainrt.fit(..., clip=1.0).",
        ),
    )


def _after_warm_up(run: Run) -> np.ndarray:
    """[T] bool: windows past the first tenth of the steps."""
    first, last = run.steps[0, 0], run.steps[-1, 1]
    settled = run.steps[:, 0] >= first + WARM_UP * (last - first + 1)
    return settled if settled.any() else np.ones(len(run.steps), bool)


def _share(condition: np.ndarray, weights: np.ndarray) -> float:
    return float((condition * weights).sum() / weights.sum()) if weights.sum() else float("nan")


def _finding(run, severity, confidence, causes, weights, message, evidence, advice) -> Finding:
    return Finding(
        rule="learning_rate",
        severity=severity,
        confidence=confidence,
        causes=causes,
        where=tuple(run.roster.parameters[p].path for p in weights),
        steps=(int(run.steps[0, 0]), int(run.steps[-1, 1])),
        message=message,
        evidence=evidence,
        advice=advice,
    )
