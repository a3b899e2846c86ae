"""What flows forward through the layers, as the looks into the model saw it, and what a single step does."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from trainrt.findings.finding import Finding, shorten
from trainrt.findings.looks import layers, looks, span, value
from trainrt.findings.outcome import outcome
from trainrt.findings.rules import about, rule
from trainrt.record.run import Run

POOR = 0.6
"""Skill under which what the units do is a fault; see `outcome`."""
DEAD = 0.9
SATURATED = 0.7
"""Shares of a layer's units. DeepChecker and SageMaker Debugger warn from a half on; healthy wide layers have that."""
ALIVE = 0.5
OVERSHOT = 2.0
"""The loss rose by more than this many times what it should have fallen by."""
RECTIFIERS = ("relu", "relu6")
CURVES = ("sigmoid", "tanh", "hard_sigmoid", "hard_tanh")


@rule
def dead_units(run: Run) -> Iterator[Finding]:
    """A layer of rectifiers that puts out nothing.

    Means:   nine tenths of the units of a hidden layer are exactly zero for every row of the kept batch, in the last
             look into the model, and the model learnt little. Whether they began so tells a bad start from a death.
    Matters: a unit that is zero for every input has no gradient: it stays so, and the layers before it learn nothing.
    Try:     a lower learning rate, scaled inputs, biases that begin at zero, kernel_initializer='he_normal', or an
             activation that is nowhere flat.
    Source:  AUTOTRAINER (Zhang et al., 2021) and TheDeepChecker judge by gradients and by half of the units; ok-looking
             wide layers reach that, so here it is nine tenths of the units in the forward pass.

    >>> from trainrt.findings.examples import learning, stuck
    >>> from trainrt.findings.looks import example, layer
    >>> dead = example(199, layers=[layer("first", zero_units=1.0), layer("last", activation="sigmoid")])
    >>> [finding.causes[0] for finding in dead_units(stuck(documents=[example(0), dead]))]
    ['dying_relu']
    >>> list(dead_units(learning(documents=[example(0), dead])))
    []
    """
    seen = looks(run)
    if not seen or not outcome(run).poor(POOR):
        return
    dead = [one for one in layers(seen[-1], *RECTIFIERS) if value(one, "zero_units") >= DEAD]
    if not dead:
        return
    began = {one["path"]: value(one, "zero_units") for one in layers(seen[0])}
    at_once = [one["path"] for one in dead if began.get(one["path"], 0.0) >= DEAD and seen[0] is not seen[-1]]
    later = not at_once and any(began.get(one["path"], 1.0) < ALIVE for one in dead)
    jumped = any(_overshot(look) for look in seen)
    causes = ("dying_relu", "lr_too_high") if later else ("dying_relu", "bad_init", "lr_too_high")
    if later and jumped:
        causes = ("lr_too_high", "dying_relu")
    paths = tuple(one["path"] for one in dead)
    how = "from the start" if at_once else "since they began alive" if later else "in the last look"
    yield about(
        run,
        "dead_units",
        "error",
        0.75,
        causes,
        f"{shorten(paths)}: {value(dead[0], 'zero_units'):.0%} of the units are zero for every row, {how}: no gradient "
        "passes.",
        {"zero_units": {one["path"]: value(one, "zero_units") for one in dead}, "at_first": began, "threshold": DEAD},
        (
            "bias_initializer='zeros', kernel_initializer='he_normal' and inputs of unit size: a start with units that "
            "are on."
            if at_once
            else "A tenth of the learning rate: a large step pushes units where they are always off.",
            "keras.layers.LeakyReLU() or activation='elu', which are nowhere flat.",
        ),
        where=paths,
        steps=span(seen),
    )


@rule
def saturated_units(run: Run) -> Iterator[Finding]:
    """A hidden layer of sigmoids or tanhs that is driven to its flat ends.

    Means:   seven tenths of the units of a hidden layer are where the derivative is under a hundredth of the steepest,
             in 95 % of the rows, in the last look, and the model learnt little.
    Matters: hardly any gradient passes: the layer and those before it stay where they are.
    Try:     scale the inputs, start with smaller weights and zero biases, a lower learning rate, ReLU.
    Source:  Glorot & Bengio, 2010; TheDeepChecker and SageMaker Debugger warn from half of the units on.

    >>> from trainrt.findings.examples import learning, stuck
    >>> from trainrt.findings.looks import example, layer
    >>> flat = [layer("first", activation="tanh", saturated_units=0.9), layer("last", activation="sigmoid")]
    >>> [finding.causes[0] for finding in saturated_units(stuck(documents=[example(199, layers=flat)]))]
    ['saturated_activation']
    >>> list(saturated_units(learning(documents=[example(199, layers=flat)])))
    []
    """
    seen = looks(run)
    if not seen or not outcome(run).poor(POOR):
        return
    flat = [one for one in layers(seen[-1], *CURVES) if value(one, "saturated_units") >= SATURATED]
    if not flat:
        return
    began = {one["path"]: value(one, "saturated_units") for one in layers(seen[0], *CURVES)}
    at_once = any(began.get(one["path"], 0.0) >= SATURATED for one in flat)
    paths = tuple(one["path"] for one in flat)
    yield about(
        run,
        "saturated_units",
        "error",
        0.75,
        ("saturated_activation", "bad_init" if at_once else "lr_too_high", "inputs_unnormalised"),
        f"{shorten(paths)}: {value(flat[0], 'saturated_units'):.0%} of the units sit at the flat ends of "
        f"{flat[0]['activation']} for nearly every row{' from the start' if at_once else ''}.",
        {"saturated_units": {one["path"]: value(one, "saturated_units") for one in flat}, "at_first": began},
        (
            "Scale the inputs to unit deviation, let biases begin at zero, and use the default initialisers.",
            "activation='relu' in the hidden layers.",
        ),
        where=paths,
        steps=span(seen),
    )


@rule
def equal_units(run: Run) -> Iterator[Finding]:
    """A hidden layer whose units all do the same.

    Means:   all units of a hidden layer with 2 or more put out the same numbers in every look, from before the first
             step to the end, and the model learnt little.
    Matters: units that begin equal get equal gradients: they stay one unit, whatever the width is, and kernels that
             begin at zero on both sides pass no gradient at all.
    Try:     an initialiser that draws: 'glorot_uniform' (the default), 'he_normal'.
    Source:  Goodfellow et al., Deep Learning, 2016, 8.4: initial parameters need to break the symmetry.

    >>> from trainrt.findings.examples import learning, stuck
    >>> from trainrt.findings.looks import example, layer
    >>> same = [layer("first", activation="elu", equal_units=1.0), layer("last", activation="sigmoid")]
    >>> documents = [example(0, layers=same), example(199, layers=same)]
    >>> [finding.causes[0] for finding in equal_units(stuck(documents=documents))]
    ['bad_init']
    >>> list(equal_units(learning(documents=documents)))
    []
    """
    seen = looks(run)
    if len(seen) < 2 or seen[0].get("when") != "start" or not outcome(run).poor(POOR):
        return

    known = run.document("model").get("layers") or []
    drawn = {one["path"] for one in known if any(len(w["shape"]) > 1 and w["trainable"] for w in one["weights"])}

    def same(look) -> set[str]:
        # A dead rectifier, and one fed with zeros, is another matter.
        found = [one for one in layers(look) if one["units"] >= 2 and value(one, "equal_units") >= 1]
        found = [one for one in found if one["path"] in drawn or not drawn]
        return {one["path"] for one in found if one.get("activation") not in (*RECTIFIERS, *CURVES) or _varies(one)}

    paths = tuple(sorted(set.intersection(*map(same, seen))))
    if not paths:
        return
    yield about(
        run,
        "equal_units",
        "error",
        0.9,
        ("bad_init",),
        f"{shorten(paths)}: all units put out the same numbers, since before the first step: they began equal.",
        {"layers": list(paths), "looks": len(seen)},
        ("kernel_initializer='glorot_uniform' (the default) or 'he_normal' in place of a constant.",),
        where=paths,
        steps=span(seen),
    )


@rule
def overshoot(run: Run) -> Iterator[Finding]:
    """Steps that jump over the minimum: the loss rises where the gradient says that it falls.

    Means:   in the looks at single steps, the loss of the kept batch was to fall (gradient times update under zero) and
             rose by more than twice as much, in the first look or in most, and the model learnt little.
    Matters: this is what too high a learning rate is, measured and not guessed: curvature outweighs slope.
    Try:     a tenth of the learning rate, less momentum, a warm-up.
    Source:  Schneider et al., Cockpit, 2021 (alpha > 1); the descent lemma.

    >>> from trainrt.findings.examples import learning, stuck
    >>> from trainrt.findings.looks import example
    >>> jump = {"steps": 1, "predicted": -15.0, "actual": 1450.0, "before": 2.3, "after": 1452.3}
    >>> [finding.causes[0] for finding in overshoot(stuck(documents=[example(0, advance=jump)]))]
    ['lr_too_high']
    >>> list(overshoot(stuck(documents=[example(0)])))
    []
    """
    seen = [look for look in looks(run) if value(look.get("advance"), "steps") == 1]
    if not seen or not outcome(run).poor(POOR):
        return
    jumps = [look for look in seen if _overshot(look)]
    if not jumps or not (jumps[0] is seen[0] or len(jumps) > len(seen) / 2):
        return
    worst = max(jumps, key=lambda look: np.nan_to_num(value(look["advance"], "actual"), posinf=1e300))
    predicted, actual = (value(worst["advance"], name) for name in ("predicted", "actual"))
    yield about(
        run,
        "overshoot",
        "error",
        0.8 if len(jumps) > 1 or actual > 10 * abs(predicted) else 0.6,
        ("lr_too_high", "momentum_too_high", "inputs_unnormalised"),
        f"At step {worst['step']} the loss of the same batch was to fall by {-predicted:.3g} and changed by "
        f"{actual:+.3g}: the step is too long for the curvature ({len(jumps)} of {len(seen)} steps looked at).",
        {"jumps": [{"step": look["step"], **look["advance"]} for look in jumps], "looked_at": len(seen)},
        ("Lower the learning rate to a tenth: model.optimizer.learning_rate = model.optimizer.learning_rate / 10.",),
        steps=span(jumps),
    )


def _overshot(look) -> bool:
    advance = look.get("advance")
    predicted, actual = value(advance, "predicted"), value(advance, "actual")
    margin = 0.05 * abs(value(advance, "before"))
    return predicted < 0 and actual > max(OVERSHOT * abs(predicted), margin)


def _varies(layer) -> bool:
    return value(layer, "spread") > 1e-3
