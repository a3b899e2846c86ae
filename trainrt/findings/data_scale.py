"""Inputs and targets far from the scale on which a network's start and step sizes are made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trainrt.findings import program
from trainrt.findings.finding import Finding
from trainrt.findings.outcome import outcome
from trainrt.findings.rules import about, rule
from trainrt.record.run import Run

LARGE = 5.0
"""Root mean square of an input feature from which on its weights' gradients outweigh the bias's 25-fold. Unit variance
is what the usual initializers assume (LeCun et al., Efficient BackProp, 1998; He et al., 2015)."""
HUGE = 30.0
TINY = 0.03
"""The same below: a layer passes on a thirtieth of what its start is made for."""
TARGETS = 10.0
FAR = 300.0
NEARLY_ALL = 0.95
"""Share of the loss of several outputs that leaves the others a twentieth of the gradient, in layers they have in
common."""
POOR = 0.6
"""Skill under which a scale is a fault; see `outcome`."""
EMPTY = 0.95
"""Share of exact zeros in inputs that are no counts or indicators."""


@rule
def unscaled_inputs(run: Run) -> Iterator[Finding]:
    """Inputs that are not normalised: features of a size for which the start of the weights is not made.

    Means:   a feature's root mean square is over 5, nothing normalises it in front of the first weights, and the model
             learnt little or diverged. Embeddings and lookups take indices and are left out.
    Matters: the first layer's gradients grow with the inputs, so that no learning rate suits both it and the rest:
             large ones kill ReLUs or diverge, small ones do not move the other features.
    Try:     standardise each feature, or put a keras.layers.Normalization (adapted) or Rescaling first.
    Source:  LeCun et al., Efficient BackProp, 1998, section 4.3; UMLAUT warns of values outside -1..1 whatever comes of
             it, which flags most healthy programs.

    >>> from trainrt.findings.examples import learning, stuck
    >>> [finding.causes[0] for finding in unscaled_inputs(stuck(inputs={"mean": [120.0], "std": [70.0]}))]
    ['inputs_unnormalised']
    >>> list(unscaled_inputs(learning(inputs={"mean": [120.0], "std": [70.0]})))
    []
    """
    found = _features(run)
    if found is None:
        return
    leaf, sizes = found
    size = float(sizes.max())
    ended = outcome(run)
    if not size > LARGE or not ended.poor(POOR):
        return
    offset = _offset(leaf)
    yield about(
        run,
        "unscaled_inputs",
        "error",
        0.88 if size > HUGE else 0.65 if ended.poor(0.3) else 0.5,
        ("inputs_unnormalised", "lr_too_high"),
        f"The inputs are not normalised: the largest feature has a root mean square of {size:.3g}"
        + (f" and lies {offset:.2g} deviations from zero" if offset > 2 else "")
        + f", values from {leaf.get('min'):.4g} to {leaf.get('max'):.4g}.",
        {"rms_largest": size, "rms_smallest": float(sizes.min()), "threshold": LARGE, "skill": ended.skill},
        (
            "Standardise: x = (x - x_train.mean(0)) / (x_train.std(0) + 1e-8), with the training set's numbers "
            "everywhere.",
            "Or in the model: norm = keras.layers.Normalization(); norm.adapt(x_train); put it first."
            if leaf.get("min") is None or leaf["min"] < 0 or leaf["max"] > 255
            else "Or in the model: keras.layers.Rescaling(1 / 255) as the first layer.",
        ),
    )


@rule
def tiny_inputs(run: Run) -> Iterator[Finding]:
    """Inputs that are too small to matter: all features far under unit size.

    Means:   the largest feature's root mean square is under 0.03, nothing normalises it, and the model learnt little.
             Typical: pixels divided by 255 twice.
    Matters: the first layer's outputs and gradients shrink with the inputs: the loss stays at the constant's.
    Try:     look at x.min(), x.max(), x.std() right before fit; remove the second normalisation.
    Source:  LeCun et al., Efficient BackProp, 1998; TheDeepChecker's mutation "over-scaled features".

    >>> from trainrt.findings.examples import learning, stuck
    >>> [finding.causes[0] for finding in tiny_inputs(stuck(inputs={"mean": [0.002], "std": [0.001]}))]
    ['inputs_too_small']
    >>> list(tiny_inputs(learning(inputs={"mean": [0.002], "std": [0.001]})))
    []
    """
    found = _features(run)
    if found is None:
        return
    leaf, sizes = found
    size, ended = float(sizes.max()), outcome(run)
    if not 0 < size < TINY or not ended.poor(POOR):
        return
    yield about(
        run,
        "tiny_inputs",
        "error",
        0.9,
        ("inputs_too_small", "lr_too_low"),
        f"The inputs are tiny: no feature has a root mean square over {size:.2g} (values from {leaf.get('min'):.3g} to "
        f"{leaf.get('max'):.3g}). Were they divided twice?",
        {"rms_largest": size, "threshold": TINY, "skill": ended.skill},
        (
            f"Scale them to unit size: x = x * {1 / size:.2g}, or standardise them.",
            "Look for a second normalisation: a Rescaling layer in the model and x / 255 before it.",
        ),
    )


@rule
def constant_inputs(run: Run) -> Iterator[Finding]:
    """Inputs that carry nothing: features that are constant, or nearly all exact zeros.

    Means:   every feature has the same value in all rows looked at; or 95 % of the elements are exactly zero, or half
             of the features never change, or 90 % and a third together, and the model learnt less than it might.
    Matters: what does not vary cannot tell samples apart; the model can only learn the mean of the targets.
    Try:     print x[:3]; look for an integer division (//), a cast to an integer, a mask that hides all.
    Source:  TheDeepChecker: constant features.

    >>> from trainrt.findings.examples import learning, stuck
    >>> run = stuck(inputs={"mean": [0.0], "std": [0.0], "constant_features": {"count": 64, "of": 64, "rows": 100}})
    >>> [finding.causes[0] for finding in constant_inputs(run)]
    ['inputs_constant']
    >>> list(constant_inputs(learning(inputs={"zero_share": 0.99})))
    []
    """
    inputs = program.leaves(run, "inputs")
    ended = outcome(run)
    for leaf in inputs:
        constant = leaf.get("constant_features") or {}
        share = constant.get("count", 0) / max(constant.get("of", 0), 1)
        zeros = program.number(leaf.get("zero_share"))
        # Rows of one number are constant only when that number is.
        whole = share == 1 and constant.get("rows", 0) >= 32 and len(inputs) == 1
        empty = ended.poor(POOR) and (zeros > EMPTY or (share > 0.5 and constant.get("of", 0) > 1))
        # Nearly all zeros and a good part that never changes, together, weigh as much.
        if not (whole or empty or (ended.poor(0.8) and zeros > 0.9 and share > 0.3)):
            continue
        padded = not whole and program.first_layer(run) in program.LOOKUPS
        if padded and any(layer["config"].get("mask_zero") for layer in program.layers(run)):
            continue  # what is masked is not seen
        what = (
            "all features have one and the same value in every row"
            if whole
            else f"{zeros:.1%} of the elements are exactly zero, and {share:.0%} of the features never change"
        )
        yield about(
            run,
            "constant_inputs",
            "error",
            0.97 if whole else 0.85,
            ("inputs_constant", "inputs_too_small"),
            f"The inputs {'are mostly padding' if padded else 'carry next to nothing'}: {what}.",
            {"constant_share": share, "zero_share": zeros, "thresholds": {"zero_share": EMPTY, "constant_share": 0.5}},
            (
                "keras.layers.Embedding(..., mask_zero=True), which makes recurrent layers pass over index 0.",
                "Pad in front and no longer than needed: keras.utils.pad_sequences(x, maxlen, padding='pre').",
            )
            if padded
            else (
                "Print x[:3] and x.std(axis=0).",
                "Divide with /, not //, and convert to float first: x = x.astype('float32') / 255.",
            ),
        )
        return


@rule
def unscaled_targets(run: Run) -> Iterator[Finding]:
    """Targets that are far from unit size, in a regression that does not reach them.

    Means:   the root mean square of the targets is over 10, the loss is one of differences, and the model explains
             little of their variance, or diverged; or theirs is 95 % of the loss of several outputs, and another output
             learnt little.
    Matters: a network starts at outputs around zero and moves by about the learning rate a step under Adam: a target of
             a million is a million steps away. Under SGD the gradients grow with the targets, and diverge.
    Try:     train on standardised targets and scale the predictions back; or start the output's bias at their mean.
    Source:  TheDeepChecker's over-scaled targets; Goodfellow et al., Deep Learning, 2016, section 8.7 on conditioning.

    >>> from trainrt.findings.examples import learning, stuck
    >>> big = {"mean": [1e6], "std": [2e5], "min": 1e5, "max": 2e6, "labels": {"kind": "continuous"}}
    >>> [f.causes[0] for f in unscaled_targets(stuck(targets=big, loss="mean_squared_error"))]
    ['targets_unnormalised']
    >>> list(unscaled_targets(learning(targets=big, loss="mean_squared_error")))
    []
    """
    for end in program.ends(run):
        loss, ended = end.loss, outcome(run).of(end.name)
        if not any(word in loss for word in ("squared", "absolute", "huber", "cosh")):
            continue
        mean, spread = _list(end.target.get("mean")), _list(end.target.get("std"))
        if not len(mean) or len(mean) != len(spread):
            continue
        size = float(np.hypot(np.abs(mean), spread).max())
        starved = _starved(run, end)
        if not size > TARGETS or not (ended.poor(0.3) or starved) or "logarithmic" in loss or "percentage" in loss:
            continue
        m, s = float(mean[np.argmax(np.abs(mean))]), float(spread.max())
        of = f" of {end.name!r}" if end.name else ""
        yield about(
            run,
            "unscaled_targets",
            "error",
            0.92 if size > FAR else 0.6,
            ("targets_unnormalised", "lr_too_high" if not math.isfinite(ended.data_loss) else "lr_too_low"),
            f"The targets{of} are far from unit size: mean {m:.4g}, deviation {s:.4g}. "
            + (
                f"Their loss is nearly all of it, and {' and '.join(map(repr, starved))} learnt little beside it."
                if starved
                else "A network starts at outputs near zero."
            ),
            {"target_rms": size, "target_mean": m, "target_std": s, "threshold": TARGETS, "skill": ended.skill},
            (
                "Standardise them: y = (y - y_train.mean()) / y_train.std(), and undo it in the predictions.",
                f"Or start at their mean: Dense(1, bias_initializer=keras.initializers.Constant({m:.4g})).",
            ),
            where=(end.head.layer,) if end.name and end.head else (),
        )


def _starved(run: Run, end: program.End) -> list[str]:
    """The outputs that learnt little while the loss of this one was nearly all that was minimised."""
    logs = run.epochs[-1].logs if run.epochs else {}
    own = end.weight * program.number(logs.get(f"{end.name}_loss"))
    if not end.name or not own > NEARLY_ALL * program.number(logs.get("loss")):
        return []
    others = [other.name for other in program.ends(run) if other.name != end.name]
    return [name for name in others if outcome(run).of(name).poor(0.3)]


def _features(run: Run) -> tuple[Mapping[str, Any], np.ndarray] | None:
    """The widest input that nothing normalises, and the root mean square of each of its channels."""
    first = program.first_layer(run)
    if first in program.NORMALISERS or first in program.LOOKUPS:
        return None
    best = None
    for leaf in program.leaves(run, "inputs"):
        kind = str(leaf.get("dtype", ""))
        mean, spread = _list(leaf.get("mean")), _list(leaf.get("std"))
        if not (kind.startswith(("float", "bfloat")) or kind == "uint8") or not len(mean) or len(mean) != len(spread):
            continue
        sizes = np.hypot(np.abs(mean), spread)
        if best is None or sizes.max() > best[1].max():
            best = leaf, sizes
    return best


def _offset(leaf: Mapping[str, Any]) -> float:
    mean, spread = _list(leaf.get("mean")), _list(leaf.get("std"))
    return float(np.max(np.abs(mean) / np.maximum(spread, 1e-12))) if len(mean) == len(spread) and len(mean) else 0.0


def _list(value: Any) -> np.ndarray:
    """[channels], or the lowest, median and highest of very many."""
    known = list(value.values()) if isinstance(value, Mapping) else value or []
    return np.array([v if v is not None else np.nan for v in known], np.float64)
