"""Weights that do not move, each with the one reason why."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from trainrt.findings import program
from trainrt.findings.finding import Finding, shorten
from trainrt.findings.outcome import outcome
from trainrt.findings.rules import rule
from trainrt.findings.series import (
    clip_scale,
    clipped_share,
    kernel_ratio,
    kernels,
    loss_trend,
    observed,
    percentile,
    scalar,
)
from trainrt.record.run import Run
from trainrt.record.vocabulary import GRADIENT, UPDATE, WEIGHT, Moments, Parameter

UNCHANGED = 0.99
"""Share of the pushed elements that must stay bit-identical."""
STEPS = 3
SHARE_OF_RUN = 0.05
"""A schedule may end at nothing: only a stretch of this share of the run is worth a word."""
TIGHT = 0.05
"""A clip that lets through less than this of the gradient, on nearly all steps."""
LOPSIDED = 0.5
"""Mean over root mean square of a kernel; a start around zero has nearly none."""
THROWN = 0.1
"""A step of this share of a kernel's size may carry its units to where nothing brings them back."""
CONVERGED = 1e-3
"""Of its first level: a loss that has fallen so far has nothing left to push with."""
LEARNT = 0.9
"""Skill from which on updates that round away are the end of a good run; see `outcome`."""
SPACING = {"float16": 2.0**-10, "bfloat16": 2.0**-8}
"""Relative spacing of the dtypes in which updates are lost first."""


@rule
def dead_update(run: Run) -> Iterator[Finding]:
    """A weight that stays bit-identical although training goes on, with the one reason why.

    Means:   at least 99 % of the elements that could move did not change by a bit, over the last 3 observed steps or
             more. An embedding of which a batch touches few rows is alive as long as those rows move.
    Matters: the layer learns nothing from here on, and the loss cannot tell: other layers may still improve.
    Try:     depends on the reason, which is exactly one of: the loss does not reach the weight; the gradient is
             exactly zero; the gradient is not finite and the step was skipped; the learning rate is zero; the clip
             scales the gradient until the update rounds away; the update is under the spacing of the weight's dtype.
    Source:  SageMaker Debugger's UnchangedTensor (3 steps), made exact: equality of bits, not np.allclose.

    >>> run = Run.synthetic(steps=64, parameters=2, gradient_norm=1.0, learning_rate=1e-12, update_zero_share=1.0)
    >>> [(finding.causes[0], len(finding.where)) for finding in dead_update(run)]
    [('lr_too_low', 2)]
    >>> list(dead_update(Run.synthetic(steps=64, gradient_zero_share=0.999, update_zero_share=0.999)))
    []
    """
    if not len(run.steps) or not run.roster.parameters:
        return
    view = _View.of(run)
    groups: dict[tuple, list[tuple[_Reason, int]]] = {}
    for p in np.flatnonzero(view.start < len(run.steps)):
        reason = _reason(view, int(p))
        if reason is not None:
            groups.setdefault((reason.kind, reason.causes), []).append((reason, int(p)))
    for group in groups.values():
        yield _finding(view, max(group, key=lambda pair: pair[0].confidence)[0], [p for _, p in group])


@dataclasses.dataclass(frozen=True)
class _View:
    """A run's cubes, read once, and `start`: [P] first window of the stretch in which a weight is dead, T if alive."""

    run: Run
    gradient: Moments
    update: Moments
    weight: Moments
    start: np.ndarray

    @classmethod
    def of(cls, run: Run) -> _View:
        gradient, update, weight = (run.moments(subject) for subject in (GRADIENT, UPDATE, WEIGHT))
        return cls(run, gradient, update, weight, _since(run, gradient, update))

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self.run.roster.parameters

    def pushed(self, t: int) -> np.ndarray:
        """[P] largest share of elements with a gradient in any window from `t` on; 0 where there is none."""
        return np.fmax.reduce(np.nan_to_num(1 - self.gradient.zero_share[t:]), axis=0)


@dataclasses.dataclass(frozen=True)
class _Reason:
    kind: str
    causes: tuple[str, ...]
    confidence: float
    severity: str
    text: str
    advice: tuple[str, ...]


def _since(run: Run, gradient: Moments, update: Moments) -> np.ndarray:
    pushed = np.nan_to_num(1 - gradient.zero_share)
    still = np.nan_to_num(update.zero_share, nan=1.0)
    # What moved must be next to nothing beside what was pushed; where nothing was pushed, nothing may move.
    dead = (1 - still <= (1 - UNCHANGED) * pushed) & ~(np.nan_to_num(update.nonfinite) > 0)
    dead &= ~(np.isnan(update.count) & ~np.isnan(gradient.count))
    start = len(dead) - np.logical_and.accumulate(dead[::-1], axis=0).sum(axis=0)
    steps = np.nan_to_num(observed(run, update))
    covered = np.append(np.cumsum(steps[::-1])[::-1], 0.0)
    # Between the steps of an accumulated gradient every weight rests.
    config = ((run.environment or {}).get("optimizer") or {}).get("config") or {}
    return np.where(covered[start] >= STEPS * int(config.get("gradient_accumulation_steps") or 1), start, len(dead))


def _reason(view: _View, p: int) -> _Reason | None:
    run, t = view.run, int(view.start[p])
    gradient = view.gradient[t:, p]
    if np.isnan(gradient.count).all():
        return _unreached(view, t)
    if percentile(gradient.nonfinite > 0, 10) == 1:
        return _Reason(
            "nonfinite",
            ("unstable_loss", "nan_in_data", "exploding_gradient"),
            0.7,
            "error",
            "every gradient has NaN or infinite elements, so each step was skipped",
            ("Find the first non-finite number: see the finding `nonfinite`.", "Check the data: np.isfinite(x).all()."),
        )
    if view.pushed(t)[p] == 0:
        return _unpushed(view, p, t)
    ended = outcome(run)
    if ended.settled and ended.skill >= LEARNT:
        return None  # what has been learnt to the last bit rests
    stretch = run.steps[-1, 1] - run.steps[t, 0] + 1
    if stretch < SHARE_OF_RUN * (run.steps[-1, 1] - run.steps[0, 0] + 1):
        return None
    return _rounded(view, p, t)


def _unreached(view: _View, t: int) -> _Reason | None:
    if np.isnan(view.gradient.count[t:]).all():
        return None  # no gradient of any weight was recorded: nothing is known
    return _Reason(
        "unreached",
        ("graph_cut",),
        0.95,
        "error",
        "the loss does not reach this part of the model: there is no gradient at all",
        (
            "Use the layer's output in the model's output, or set layer.trainable = False if it is meant to rest.",
            "Look for what cuts the graph in call(): tf.stop_gradient, .numpy(), tf.argmax, tf.cast to an integer, "
            "tf.round.",
        ),
    )


def _unpushed(view: _View, p: int, t: int) -> _Reason | None:
    """Its gradient is exactly zero: what lies behind or before it is off."""
    pushed = view.pushed(t)
    everything = not (pushed > 0).any()
    loss = loss_trend(view.run)
    if everything and np.isfinite(loss.first) and abs(loss.last) <= CONVERGED * max(abs(loss.first), abs(loss.start)):
        if loss.start != 0:
            return None  # learnt by heart
        return _Reason(
            "loss zero",
            ("sample_weights_zero", "wrong_loss"),
            0.8,
            "error",
            "the gradient is exactly zero because the loss is exactly zero from the first step",
            (
                "Check the sample weights and masks: are they all zero?",
                "Check that the loss compares y with the model's output.",
            ),
        )
    if _underflows(view.run):
        return _Reason(
            "underflow",
            ("update_rounding", "vanishing_gradient"),
            0.8,
            "error",
            "the gradient is exactly zero: the model computes in float16, whose smallest number is 6e-8, and nothing "
            "scales the loss",
            (
                "Scale the loss: model.compile(..., auto_scale_loss=True), the default; in a train step of your own "
                "loss = self.optimizer.scale_loss(loss).",
                "bfloat16 needs none: keras.mixed_precision.set_global_policy('mixed_bfloat16').",
            ),
        )
    if everything:
        return _Reason(
            "constant loss",
            ("wrong_output_activation", "output_units", "dying_relu", "wrong_loss"),
            0.6,
            "error",
            "no weight has a gradient other than exactly zero: the loss does not depend on what the model computes",
            (
                "Look at the output layer: softmax over one unit is always 1, a ReLU there may be always 0.",
                "Print model(x[:8]): are all rows equal?",
            ),
        )
    unweighted = [end.name for end in program.ends(view.run) if end.weight == 0]
    if unweighted and t == 0 and view.run.steps[0, 0] == 0:
        harmless = all(outcome(view.run).of(name).skill >= LEARNT for name in unweighted)
        return _Reason(
            "loss weight zero",
            ("wrong_loss", "graph_cut"),
            0.9,
            "info" if harmless else "error",
            f"the gradient is exactly zero, and the loss of {shorten(unweighted)} has the weight 0",
            (f"model.compile(..., loss_weights={{{unweighted[0]!r}: 1.0}}), or leave loss_weights out.",),
        )
    matrices = [q for q, each in enumerate(view.parameters) if len(each.shape) >= 2]
    empty = [q for q in matrices if np.nan_to_num(view.weight.zero_share[t:, q]).min(initial=1.0) == 1]
    if empty:
        names = shorten([view.parameters[q].path for q in empty])
        return _Reason(
            "zero weights",
            ("bad_init",),
            0.85,
            "error",
            f"the gradient is exactly zero because every element of {names} is zero",
            ("Give the kernel a random start: kernel_initializer='glorot_uniform' (the default) or 'he_normal'.",),
        )
    first = matrices[0] if matrices else None
    layer = view.parameters[p].layer
    mates = [q for q, each in enumerate(view.parameters) if each.layer == layer and q != p]
    if p not in matrices and any(pushed[q] > 0 for q in mates if q in matrices):
        return None  # a bias that cancels, as in the difference of two passes, or before a normalisation
    if p == first and any(pushed[q] > 0 for q in mates) and not inputs_vary(view.run):
        return _Reason(
            "zero inputs",
            ("inputs_constant", "inputs_too_small"),
            0.8,
            "error",
            "the gradient is exactly zero while the layer's other weights have one: the inputs are all zero",
            ("Look at the inputs: x.min(), x.max(); an integer division or a cast may have made them zero.",),
        )
    if t == 0 and view.run.steps[0, 0] == 0:
        # From the very first step: no step that was too large can have killed the units.
        still = [q for q in matrices if pushed[q] == 0]
        begun = view.weight[0]
        balance = [begun.mean[q] / begun.rms[q] for q in still]
        if any(abs(value) > LOPSIDED for value in balance):
            return _Reason(
                "one-sided start",
                ("bad_init", "dying_relu", "saturated_activation"),
                0.8,
                "error",
                "the gradient is exactly zero from the first step, with kernels that are nearly all of one sign",
                ("Use an initializer around zero: kernel_initializer='he_normal'.",),
            )
        if first in still and not inputs_vary(view.run):
            return _Reason(
                "no input",
                ("inputs_constant", "inputs_too_small", "dying_relu"),
                0.7,
                "error",
                "the gradient is exactly zero from the first step, though the first kernel has a random start: the "
                "inputs seem to carry nothing",
                ("Look at the inputs: x.min(), x.max(), x.std(axis=0). Are they all zero, or of one sign and huge?",),
            )
    kind = _activation(view.run, layer)
    # Where the bias is pushed and the kernel is not, its inputs are zero: the layer before is off.
    if kind in ("sigmoid", "tanh", "hard_sigmoid", "softmax", "softsign") and not any(pushed[q] > 0 for q in mates):
        return _Reason(
            "saturated",
            ("saturated_activation", "bad_init", "lr_too_high"),
            0.8,
            "error",
            f"the gradient is exactly zero behind a {kind}: it is saturated, flat to the last bit",
            (
                "Look at its start: kernel_initializer='glorot_uniform', bias_initializer='zeros'.",
                "Scale the inputs to about -1..1, or use activation='relu' in hidden layers.",
            ),
        )
    thrown = _thrown(view, t)
    if thrown > THROWN:
        return _Reason(
            "thrown",
            ("lr_too_high", "dying_relu", "saturated_activation"),
            0.8,
            "error",
            f"the gradient is exactly zero since steps of up to {thrown:.2g} of the kernels' size: they "
            "threw the units "
            "to where they give the same output whatever comes in",
            (
                f"Lower the learning rate: model.optimizer.learning_rate = {_rate(view, t) / 10:.1g}.",
                "Scale the inputs and targets to about -1..1.",
            ),
        )
    return _Reason(
        "no push",
        ("dying_relu", "saturated_activation", "bad_init", "inputs_constant"),
        0.6,
        "error",
        "the gradient is exactly zero: the units at or behind it give the same output whatever comes in",
        (
            "Lower the learning rate: dead units usually died of one step that was too large.",
            "Use activation='leaky_relu' or 'elu' there, or a BatchNormalization before the activation.",
            "Scale the inputs to about -1..1.",
        ),
    )


def _underflows(run: Run) -> bool:
    """Whether layers compute in float16 while nothing scales the loss."""
    low = any("float16" in str(layer.get("dtype")).replace("bfloat16", "") for layer in program.layers(run))
    return low and not any(name.startswith("loss_scale") for name in run.roster.scalars)


def _thrown(view: _View, t: int) -> float:
    """The largest step of any kernel up to window `t`, over its size; 0 where there is none before."""
    matrices = np.flatnonzero(kernels(view.run, view.weight))
    ratio = kernel_ratio(view.update[: t + 1, matrices], view.weight[: t + 1, matrices])
    known = ratio[np.isfinite(ratio)]
    return float(known.max()) if len(known) else 0.0


def _activation(run: Run, path: str) -> str:
    """Activation of the layer of that path, "" where it is not known."""
    kind = program.configuration(run, path).get("activation")
    return kind if isinstance(kind, str) else ""


def _rate(view: _View, t: int) -> float:
    return percentile(scalar(view.run, "learning_rate")[: t + 1], 50)


def inputs_vary(run: Run) -> bool:
    """Whether the data passport knows inputs that differ from row to row."""
    for leaf in program.leaves(run, "inputs"):
        spread = leaf.get("std")
        known = list(spread.values()) if isinstance(spread, dict) else spread or []
        constant = leaf.get("constant_features") or {}
        if any(value is not None and value > 0 for value in known) and constant.get("count", 0) < constant.get("of", 1):
            return True
    return False


def _rounded(view: _View, p: int, t: int) -> _Reason:
    """It is pushed and does not move: the step is too small for its dtype, for one of these reasons."""
    run = view.run
    rate = scalar(run, "learning_rate", "max")
    recent, peak = np.nanmax(rate[t:], initial=-np.inf), np.nanmax(rate, initial=-np.inf)
    if recent == 0:
        if peak > 0:
            return _Reason(
                "rate decayed",
                ("lr_schedule",),
                0.95,
                "error",
                f"the learning rate is 0 (it was up to {peak:.3g})",
                (
                    "Check the schedule's unit: it counts optimizer steps, not epochs.",
                    "Give the schedule or ReduceLROnPlateau a floor: alpha=0.01, or min_lr=1e-5.",
                ),
            )
        return _Reason(
            "rate zero",
            ("lr_too_low", "lr_schedule"),
            0.95,
            "error",
            "the learning rate is 0 from the first step",
            ("Set it: model.optimizer.learning_rate = 1e-3.", "A schedule that warms up must leave 0."),
        )
    scale = percentile(clip_scale(run)[t:], 50)
    if scale < TIGHT and percentile(clipped_share(run)[t:], 10) > 0.9:
        norms = scalar(run, "gradient_norm")[t:]
        typical, high = percentile(norms, 50), percentile(norms, 90)
        advice = ["Loosen the clip or leave it out: clip=None."]
        if np.isfinite(high):
            advice.insert(
                0,
                f"trainrt.fit(..., clip={high:.2g}) clips a tenth of these gradients, whose "
                f"median norm is {typical:.3g}.",
            )
        return _Reason(
            "clip",
            ("clip_too_tight",),
            0.95,
            "error",
            f"the clip multiplies the gradient by {scale:.2g}, so that the update is rounded away",
            tuple(advice),
        )
    dtype = run.roster.parameters[p].dtype
    if dtype in SPACING:
        return _Reason(
            f"rounding {dtype}",
            ("update_rounding", "lr_too_low"),
            0.9,
            "error",
            f"the updates are under the spacing of {dtype}, about {SPACING[dtype]:.1g} of the weight",
            ("Keep the weights in float32: keras.mixed_precision.set_global_policy('mixed_bfloat16').",),
        )
    alive = view.start >= len(run.steps)
    if not ((view.pushed(t) > 0) & alive & kernels(run, view.weight)).any():
        text = f", with a learning rate of {recent:.2g}" if np.isfinite(recent) else ""
        decayed = recent < 0.01 * peak
        return _Reason(
            "rate low",
            ("lr_schedule", "lr_too_low") if decayed else ("lr_too_low", "update_rounding"),
            0.9,
            "error",
            f"the updates are so small that they are rounded away{text}" + (f" (it was {peak:.2g})" if decayed else ""),
            ("Raise the learning rate by powers of ten until the loss moves: model.optimizer.learning_rate = 1e-3.",),
        )
    return _Reason(
        "vanishing",
        ("vanishing_gradient", "update_rounding"),
        0.7,
        "error",
        "the gradient is so small that the updates are rounded away, while other weights move",
        (
            "Keep gradients alive: ReLU-like activations, he_normal kernels, normalisation, residual connections.",
            "An adaptive optimizer such as Adam gives each weight a step of its own.",
        ),
    )


def _finding(view: _View, reason: _Reason, weights: list[int]) -> Finding:
    run = view.run
    paths = tuple(run.roster.parameters[p].path for p in weights)
    t = int(min(view.start[p] for p in weights))
    steps = int(run.steps[t, 0]), int(run.steps[-1, 1])
    gradient, update = view.gradient[t:], view.update[t:]
    share = np.where(np.isnan(update.zero_share), 1.0, update.zero_share)[:, weights].mean()
    all_of = len(paths) == len(run.roster.parameters)
    which = "No weight moves" if all_of else f"{shorten(paths)} {'does' if len(paths) == 1 else 'do'} not move"
    return Finding(
        rule="dead_update",
        severity=reason.severity,
        confidence=reason.confidence,
        causes=reason.causes,
        where=paths,
        steps=steps,
        message=f"{which}: {reason.text}.",
        evidence={
            "reason": reason.kind,
            "unchanged_share": float(share),
            "unchanged_threshold": UNCHANGED,
            "gradient_nonzero_share": {
                path: percentile(1 - gradient.zero_share[:, p], 50) for path, p in zip(paths, weights, strict=True)
            },
            "learning_rate": float(percentile(scalar(run, "learning_rate")[t:], 50)),
            "clip_scale": float(percentile(clip_scale(run)[t:], 50)),
        },
        advice=reason.advice,
    )
