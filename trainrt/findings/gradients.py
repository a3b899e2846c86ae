"""Gradients along depth: too little of them arrives at the first layers, or too much, and starts that make it so."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trainrt.findings import program
from trainrt.findings.finding import Finding
from trainrt.findings.outcome import outcome
from trainrt.findings.rules import about, rule
from trainrt.findings.series import percentile, scalar
from trainrt.record.run import Run
from trainrt.record.vocabulary import GRADIENT, UPDATE, WEIGHT

POOR = 0.6
"""Skill under which a gradient is a fault; see `outcome`."""
VANISHED = 1e-3
"""Gradient of the first kernels over that of the last (AUTOTRAINER)."""
EARLY = 5
"""A fifth of the run: later the gradients of what has been learnt are small everywhere."""
GAIN = 4.0
"""Standard deviation of a kernel's start times the root of its fan-in: sqrt(2) for He, about 1 for Glorot and LeCun."""
EXCESS = 30.0
"""Product of the gains over that of He's starts."""
BOUNDED = ("tanh", "sigmoid", "hard_sigmoid", "softsign", "hard_tanh")
SATURATES = ("sigmoid", "hard_sigmoid")


@rule
def vanishing(run: Run) -> Iterator[Finding]:
    """Gradients that die out on the way to the first layers.

    Means:   in the first fifth of the run a kernel's gradient is a thousandth of the last kernel's or less, with at
             least 4 kernels or a recurrent layer of sigmoids, and the model learnt little.
    Matters: the first layers stay at their random start; the last one learns from noise.
    Try:     ReLU-like activations with he_normal, normalisation layers, residual connections; gated cells (GRU, LSTM).
    Source:  Glorot & Bengio, 2010; Zhang et al., AUTOTRAINER, 2021 (ratio 1e-3); Bengio et al., 1994, for recurrence.

    >>> from trainrt.findings.examples import learning, stuck
    >>> deep = [f"layer{i}/kernel" for i in range(8)]
    >>> from trainrt.record.vocabulary import Parameter
    >>> deep = [Parameter(path, path[:6], (16, 16), "float32") for path in deep]
    >>> small = np.geomspace(1e-7, 1, 8) * np.ones((200, 1))
    >>> [finding.causes[0] for finding in vanishing(stuck(parameters=deep, gradient_norm=small))]
    ['vanishing_gradient']
    >>> list(vanishing(learning(parameters=deep, gradient_norm=small)))
    []
    """
    if not len(run.steps) or not outcome(run).poor(POOR):
        return
    saturating = [layer["name"] for layer in program.hidden(run) if layer["config"].get("activation") in SATURATES]
    cells = [
        layer["name"]
        for layer in program.layers(run)
        if layer["class"] == "SimpleRNN" and layer["config"].get("activation") in SATURATES
    ]
    matrices = [p for p, parameter in enumerate(run.roster.parameters) if len(parameter.shape) >= 2]
    early = run.moments(GRADIENT)[: max(len(run.steps) // EARLY, 1)].rms
    rms = np.array([percentile(early[:, p], 50) for p in matrices])
    ratio = rms[0] / rms[-1] if len(matrices) >= 4 and rms[-1] > 0 else math.nan
    if 0 < ratio < VANISHED and not _arrives(run, early, matrices):
        weak = [p for i, p in enumerate(matrices) if rms[i] < VANISHED * rms[-1]]
        causes = ("vanishing_gradient", *(("hidden_activation",) if saturating else ()), "bad_init")
        yield about(
            run,
            "vanishing",
            "error",
            0.9,
            causes,
            f"The gradient dies out along depth: the first kernel's is {ratio:.1g} of the last one's"
            + (f", behind {len(saturating)} layers of sigmoids." if len(saturating) > 1 else "."),
            {"first_over_last": float(ratio), "threshold": VANISHED, "sigmoids": saturating},
            (
                "Use activation='relu' (or 'gelu') with kernel_initializer='he_normal' in the hidden layers.",
                "Put keras.layers.BatchNormalization() or LayerNormalization() between them, or add x + layer(x).",
            ),
            where=tuple(run.roster.parameters[p].path for p in weak),
        )
    elif cells:
        yield about(
            run,
            "vanishing",
            "error",
            0.85,
            ("vanishing_gradient", "hidden_activation"),
            f"A recurrent layer of sigmoids ({cells[0]}) multiplies its gradient by at most a quarter a "
            "time step: what "
            "came some steps ago is forgotten, and nothing was learnt.",
            {"cells": cells},
            ("Use keras.layers.GRU or LSTM with their own activations.", "Bring what matters closer to the end."),
            where=tuple(cells),
        )


def _arrives(run: Run, early: np.ndarray, matrices: list[int]) -> bool:
    """Whether the first layer's bias is pushed like the last one's: a kernel's gradient is what comes from behind times
    what comes in, a bias's the former alone. Then it is the inputs that differ in size."""
    biases = {p.layer: i for i, p in enumerate(run.roster.parameters) if p.path.endswith("bias") and len(p.shape) == 1}
    ends = [biases.get(run.roster.parameters[matrices[at]].layer) for at in (0, -1)]
    if None in ends:
        return False
    first, last = (percentile(early[:, i], 50) for i in ends if i is not None)
    return last > 0 and first > 10 * VANISHED * last


@rule
def wild_start(run: Run) -> Iterator[Finding]:
    """Kernels that start far too large: each layer multiplies what comes in.

    Means:   the kernels' initial deviation times the root of their fan-in is over 4 (geometric mean; He's start has
             1.4), or over 2 and 30 times He's over all layers; and the model learnt little or diverged.
    Matters: with depth the factors multiply: outputs and gradients of 1e4 and more in the first step.
    Try:     kernel_initializer='he_normal' for ReLU, 'glorot_uniform' (the default) for the rest.
    Source:  He et al., Delving deep into rectifiers, 2015; Glorot & Bengio, 2010.

    >>> from trainrt.findings.examples import learning, stuck
    >>> [finding.causes[0] for finding in wild_start(stuck(weight_rms=3.0, gradient_norm=50.0))]
    ['bad_init']
    >>> list(wild_start(stuck(weight_rms=0.3)))
    []
    """
    if not len(run.steps) or not outcome(run).poor(POOR):
        return
    # After the first step: the start is at most one update away.
    first = run.moments(WEIGHT)[0].rms - np.nan_to_num(run.moments(UPDATE)[0].rms)
    gains = {}
    for p, parameter in enumerate(run.roster.parameters):
        if len(parameter.shape) < 2 or "embedding" in parameter.path.rpartition("/")[2]:
            continue
        fan_in = math.prod(parameter.shape[:-1])
        deviation = _deviation(program.configuration(run, parameter.layer).get("kernel_initializer"))
        if deviation is None:
            deviation = float(first[p]) if np.isfinite(first[p]) else 0.0
        gains[parameter.path] = max(deviation, 0.0) * math.sqrt(fan_in)
    if not gains:
        return
    positive = [gain for gain in gains.values() if gain > 0]
    if len(positive) < len(gains) or not positive:
        return
    mean = math.exp(sum(map(math.log, positive)) / len(positive))
    excess = math.prod(gain / math.sqrt(2) for gain in positive)
    if not (mean > GAIN or (mean > GAIN / 2 and excess > EXCESS)):
        return
    yield about(
        run,
        "wild_start",
        "error",
        0.94,
        ("bad_init", "exploding_gradient"),
        f"The kernels start too large: each layer multiplies its input by about {mean:.3g} where 1 to 1.4 "
        "keeps the scale, "
        f"{mean ** len(positive):.2g}-fold over {len(positive)} layers. The first loss was "
        f"{scalar(run, 'loss')[0]:.4g}.",
        {"gain": mean, "gains": gains, "threshold": GAIN},
        ("Use kernel_initializer='he_normal' with ReLU, 'glorot_uniform' (the default) otherwise.",),
        where=tuple(path for path, gain in gains.items() if gain > GAIN),
    )


@rule
def unbounded_cell(run: Run) -> Iterator[Finding]:
    """A recurrent layer whose cell has no bound: ReLU or no activation where tanh belongs.

    Means:   an LSTM, GRU or SimpleRNN has an activation without an upper bound, and the model learnt little.
    Matters: the state is multiplied by the same matrix every time step: without a bound it grows with the length of the
             sequence, or the units die for all later steps.
    Try:     leave `activation` out: tanh is the default.
    Source:  Pascanu et al., On the difficulty of training recurrent networks, 2013; Le et al., 2015, need an identity
             start to make ReLU cells work.

    >>> from trainrt.findings.examples import learning, stuck
    >>> cell = [{"name": "gru", "class": "GRU", "config": {"units": 4, "activation": "relu"}}]
    >>> [finding.causes[0] for finding in unbounded_cell(stuck(layers=cell))]
    ['hidden_activation']
    >>> list(unbounded_cell(learning(layers=cell)))
    []
    """
    if not outcome(run).poor(POOR):
        return
    cells = {
        layer["name"]: layer["config"].get("activation")
        for layer in program.layers(run)
        if layer["class"] in ("LSTM", "GRU", "SimpleRNN") and "activation" in layer["config"]
    }
    cells = {name: str(kind) for name, kind in cells.items() if isinstance(kind, str) and kind not in BOUNDED}
    if not cells:
        return
    name, kind = next(iter(cells.items()))
    yield about(
        run,
        "unbounded_cell",
        "error",
        0.92,
        ("hidden_activation", "exploding_gradient", "dying_relu"),
        f"The recurrent layer {name} has {kind!r} where tanh bounds the state: it grows with the length of "
        "the sequence, "
        "or dies.",
        {"cells": cells},
        (f"Leave it out: keras.layers.GRU(units), not activation={kind!r}.",),
        where=tuple(cells),
    )


@rule
def runaway_activation(run: Run) -> Iterator[Finding]:
    """A hidden layer whose activation grows faster than its input: an exponential.

    Means:   a hidden dense or convolution layer has activation='exponential', and the model learnt little or diverged.
    Matters: e to the power of e to the power of e: two such layers in a row leave the range of the numbers, and their
             gradients with them.
    Try:     relu, gelu or tanh inside; exponential belongs on an output that is an amount.
    Source:  Glorot et al., Deep sparse rectifier networks, 2011, on why hidden activations are linear or bounded.

    >>> from trainrt.findings.examples import learning, stuck
    >>> layers = [{"name": n, "class": "Dense", "config": {"units": 9, "activation": "exponential"}} for n in "ab"]
    >>> [(finding.causes[0], finding.where) for finding in runaway_activation(stuck(layers=layers))]
    [('hidden_activation', ('a',))]
    >>> list(runaway_activation(learning(layers=layers)))
    []
    """
    known = [layer for layer in program.hidden(run) if layer["config"].get("activation") == "exponential"]
    if not known or not outcome(run).poor(POOR):
        return
    names = tuple(layer["name"] for layer in known)
    yield about(
        run,
        "runaway_activation",
        "error",
        0.9,
        ("hidden_activation", "exploding_gradient"),
        f"The hidden layer {names[0]} puts out the exponential of its input"
        + (
            f", and so do {len(names) - 1} more: one in the other, they leave the range of numbers."
            if names[1:]
            else "."
        ),
        {"layers": list(names)},
        ("activation='relu' there; 'exponential' belongs on an output that is an amount.",),
        where=names,
    )


@rule
def exploding(run: Run) -> Iterator[Finding]:
    """Gradients that grow along depth, or from step to step.

    Means:   in the first fifth of the run the first kernel's gradient is over 70 times the last one's, with at least 4
             kernels, and the model learnt little.
    Matters: no learning rate suits both ends; the first layers are thrown about.
    Try:     he_normal or glorot starts, normalisation layers, a clip.
    Source:  Zhang et al., AUTOTRAINER, 2021 (ratio 70).

    >>> from trainrt.findings.examples import learning, stuck
    >>> from trainrt.record.vocabulary import Parameter
    >>> deep = [Parameter(f"layer{i}/kernel", f"layer{i}", (16, 16), "float32") for i in range(8)]
    >>> large = np.geomspace(1e4, 1, 8) * np.ones((200, 1))
    >>> [finding.causes[0] for finding in exploding(stuck(parameters=deep, gradient_norm=large))]
    ['exploding_gradient']
    >>> list(exploding(learning(parameters=deep, gradient_norm=large)))
    []
    """
    if not len(run.steps) or not outcome(run).poor(POOR):
        return
    matrices = [p for p, parameter in enumerate(run.roster.parameters) if len(parameter.shape) >= 2]
    if len(matrices) < 4:
        return
    rms = run.moments(GRADIENT)[: max(len(run.steps) // EARLY, 1)].rms
    first, last = rms[:, matrices[0]], rms[:, matrices[-1]]
    known = (first > 0) & (last > 0)
    if not known.any():
        return
    ratio = float(np.median(first[known] / last[known]))
    if not ratio > 70:
        return
    yield about(
        run,
        "exploding",
        "error",
        0.7,
        ("exploding_gradient", "bad_init", "lr_too_high"),
        f"The gradient grows along depth: the first kernel's is {ratio:.3g} times the last one's.",
        {"first_over_last": ratio, "threshold": 70.0},
        (
            "Use kernel_initializer='he_normal' or 'glorot_uniform', and normalisation layers between.",
            "Clip: trainrt.fit(..., clip=1.0).",
        ),
    )


def _deviation(initializer: Any) -> float | None:
    """Standard deviation that an initializer gives whatever the shape; None where it scales by the fan, or "
    "is unknown."""
    given = initializer if isinstance(initializer, Mapping) else {"class": initializer}
    kind = given.get("class")
    if kind in ("RandomNormal", "TruncatedNormal"):
        return float(given.get("stddev", 0.05)) * (0.88 if kind == "TruncatedNormal" else 1.0)
    if kind == "RandomUniform":
        low, high = float(given.get("minval", -0.05)), float(given.get("maxval", 0.05))
        return math.sqrt((low * low + low * high + high * high) / 3)
    return None
