"""Output, loss and labels that do not belong together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from trainrt.findings import program
from trainrt.findings.finding import Finding
from trainrt.findings.outcome import outcome
from trainrt.findings.rules import about, rule, rule_of_program
from trainrt.record.run import Run

LEARNT = 0.8
"""Skill from which on a contradiction is told as an info: Keras clips and normalises, and some of them still learn."""
POOR = 0.75
CATEGORICAL = ("categorical_crossentropy", "sparse_categorical_crossentropy", "categorical_focal_crossentropy")
BINARY = ("binary_crossentropy", "binary_focal_crossentropy")
DIFFERENCES = (
    "mean_squared_error",
    "mean_absolute_error",
    "huber",
    "huber_loss",
    "log_cosh",
    "mean_squared_logarithmic_error",
)
POSITIVE = ("poisson", "mean_squared_logarithmic_error", "kl_divergence")
RANGE = {
    "sigmoid": (0.0, 1.0),
    "hard_sigmoid": (0.0, 1.0),
    "softmax": (0.0, 1.0),
    "tanh": (-1.0, 1.0),
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
    "softplus": (0.0, math.inf),
    "exponential": (0.0, math.inf),
}
"""What an activation can put out."""
MARGIN = 0.05


@rule
def output_contradicts_loss(run: Run) -> Iterator[Finding]:
    """An output activation that is not what the loss expects.

    Means:   a softmax over one unit, which is always 1; a cross-entropy of probabilities on an output that is none; one
             that expects logits on a softmax or sigmoid; a ReLU in front of either; a softmax over another axis than
             the classes.
    Matters: the gradients are wrong or zero. Keras clips and normalises silently, so that the loss looks sane.
    Try:     no activation and from_logits=True, or softmax (one class of many), sigmoid (yes or no) without it.
    Source:  exact; UMLAUT and AUTOTRAINER have forms of it.

    >>> from trainrt.findings.examples import learning, stuck
    >>> layers = [{"name": "out", "class": "Dense", "config": {"units": 1, "activation": "softmax"}}]
    >>> [finding.causes[0] for finding in output_contradicts_loss(stuck(layers=layers))]
    ['wrong_output_activation']
    >>> layers = [{"name": "out", "class": "Dense", "config": {"units": 1, "activation": "sigmoid"}}]
    >>> list(output_contradicts_loss(stuck(layers=layers)))
    []
    """
    known = [(end.name, end.head) for end in program.ends(run)]
    if len(known) < 2:
        known = [("", program.head(run))]
    for name, head in known:
        said = _contradiction(head) if head is not None else None
        if head is None or said is None:
            continue
        causes, message, advice, certain = said
        ended = outcome(run).of(name)
        yield about(
            run,
            "output_contradicts_loss",
            "info" if ended.settled and ended.skill >= LEARNT and not certain else "error",
            0.97 if certain else 0.96,
            causes,
            message,
            {"activation": head.activation, "units": head.units, "loss": head.loss, "from_logits": head.logits},
            advice,
            where=(head.layer,) if head.layer else (),
        )


def _contradiction(head: program.Head) -> tuple[tuple[str, ...], str, tuple[str, ...], bool] | None:
    """Causes, message, advice, and whether nothing can be learnt at all."""
    name, loss, logits = head.activation, head.loss, head.logits
    if name == "softmax" and head.units == 1:
        return (
            ("wrong_output_activation", "output_units"),
            "The output is a softmax over one unit, which is 1 whatever comes in.",
            ("keras.layers.Dense(1, activation='sigmoid') with binary_crossentropy.",),
            True,
        )
    if name == "softmax" and head.axis != -1:
        return (
            ("wrong_softmax_axis", "wrong_output_activation"),
            f"The softmax runs over axis {head.axis}, not over the classes.",
            ("keras.layers.Softmax(axis=-1).",),
            False,
        )
    if head.activations.count("softmax") > 1:
        return (
            ("double_softmax", "wrong_output_activation"),
            "The output goes through a softmax twice: the second one leaves hardly a difference between the classes "
            f"(at most {math.e / (math.e + max(head.units, 2) - 1):.2g} for one of {head.units}).",
            ("Remove one of them: Dense(n, activation='softmax') needs no Softmax() after it.",),
            False,
        )
    if loss == "categorical_crossentropy" and head.units == 1:
        return (
            ("wrong_loss", "output_units"),
            "Categorical cross-entropy on one unit: Keras normalises the outputs of a sample to sum to 1, "
            "so the one is "
            "always 1, and loss and gradient are zero.",
            ("Yes or no: loss='binary_crossentropy' with a sigmoid. A number: loss='mean_squared_error'.",),
            True,
        )
    if loss not in CATEGORICAL + BINARY or not name:
        return None
    many = loss in CATEGORICAL
    usual = "softmax" if many else "sigmoid"
    if name in ("relu", "elu", "selu", "leaky_relu", "gelu", "relu6"):
        return (
            ("wrong_output_activation", "missing_softmax" if many else "dying_relu"),
            f"The output goes through {name!r} before {loss}: what is negative is lost, with its gradient.",
            (f"Dense({head.units}) with from_logits=True, or Dense({head.units}, activation={usual!r}) without it.",),
            False,
        )
    if logits is True and name in ("softmax", "sigmoid"):
        return (
            ("double_softmax" if name == "softmax" else "wrong_output_activation", "wrong_loss"),
            f"The loss expects logits (from_logits=True) and the output is a {name} already: it is applied twice.",
            ("Remove the activation of the last layer, or from_logits=True.",),
            False,
        )
    if logits is False and name in ("linear", "tanh"):
        first = (
            ("missing_softmax", "wrong_output_activation") if many else ("wrong_output_activation", "missing_softmax")
        )
        return (
            (*first, "wrong_loss"),
            f"{loss} expects probabilities and gets {'logits' if name == 'linear' else 'a tanh'}: Keras "
            "clips them to 0..1.",
            (f"loss=keras.losses.{_class(loss)}(from_logits=True), or activation={usual!r} on the last layer.",),
            False,
        )
    if logits is not True and name == "sigmoid" and many and head.units > 1:
        return (
            ("wrong_output_activation", "missing_softmax"),
            f"{loss} expects the shares of classes that exclude each other, and gets {head.units} sigmoids, "
            "which do not.",
            ("activation='softmax' on the last layer; or binary_crossentropy, if a sample may be of several classes.",),
            False,
        )
    return None


@rule_of_program
def labels_contradict_loss(run: Run) -> Iterator[Finding]:
    """Labels that the loss is not made for.

    Means:   labels outside 0..1 under a binary cross-entropy; a class number as large as the number of outputs; rows of
             several ones, or of numbers, under a categorical cross-entropy; class numbers where the loss takes rows of
             shares, rows where it takes numbers, or an output that nobody flattened.
    Matters: the loss has no lower bound, goes negative, or is NaN; or it asks for shares of classes that sum to 1 where
             the targets do not; or Keras ends the training over shapes.
    Try:     classes 0..n-1 with n outputs; -1/+1 as 0/1; several classes at once as sigmoids with binary_crossentropy.
    Source:  exact: the extremes are of every batch that was fed.

    >>> from trainrt.findings.examples import learning, stuck
    >>> layers = [{"name": "out", "class": "Dense", "config": {"units": 1, "activation": "sigmoid"}}]
    >>> both = {"min": -1.0, "max": 1.0, "labels": {"kind": "integer", "classes": 2, "counts": {"-1": 9, "1": 9}}}
    >>> [finding.causes[0] for finding in labels_contradict_loss(stuck(layers=layers, targets=both))]
    ['label_range']
    >>> list(labels_contradict_loss(stuck(layers=layers)))
    []
    """
    for end in program.ends(run):
        head, target = end.head, end.target
        said = _misfit(head, target) if head is not None else None
        if head is None or said is None:
            continue
        causes, message, advice = said
        yield about(
            run,
            "labels_contradict_loss",
            "error",
            0.97,
            causes,
            message,
            {"min": target.get("min"), "max": target.get("max"), "loss": head.loss, "units": head.units},
            advice,
            where=(head.layer,) if head.layer else (),
        )


def _misfit(head: program.Head, target: Mapping[str, Any]) -> tuple[tuple[str, ...], str, tuple[str, ...]] | None:
    low, high = program.number(target.get("min")), program.number(target.get("max"))
    labels = target.get("labels") or {}
    classes, kind = labels.get("classes") or 0, labels.get("kind")
    span = f"{low:.4g} to {high:.4g}"
    if (said := _other_axes(head, target, kind, low, high)) is not None:
        return said
    if head.loss in BINARY and (low < 0 or high > 1):
        if kind == "integer" and classes == 2:
            return (
                ("label_range", "wrong_loss", "labels_wrong"),
                f"The labels are {low:g} and {high:g}, and a binary cross-entropy takes 0 and 1: it has no "
                "lower bound here.",
                (f"y = (y == {high:g}).astype('float32').",),
            )
        if kind == "integer" and classes <= 50 and head.units == 1:
            return (
                ("output_units", "label_range", "wrong_loss"),
                f"{classes} classes, {span}, on one sigmoid with a binary cross-entropy, which takes 0 and 1.",
                (f"Dense({int(high) + 1}, activation='softmax') with loss='sparse_categorical_crossentropy'.",),
            )
        return (
            ("wrong_loss", "label_range", "targets_unnormalised"),
            f"The targets reach from {span}, and a binary cross-entropy takes 0 to 1: it has no lower bound here.",
            ("A number: loss='mean_squared_error' and no activation on the last layer.",),
        )
    # -1 or 255 for "no label".
    low, high = (math.nan if end == head.ignored else end for end in (low, high))
    if head.loss == "sparse_categorical_crossentropy" and head.units > 1 and (low < 0 or high >= head.units):
        return (
            ("label_range", "output_units"),
            f"Labels of {span} for {head.units} outputs: a class number must be under the number of outputs.",
            _from_zero(int(low), int(high), head.units),
        )
    if head.loss in POSITIVE and low < 0:
        return (
            ("wrong_loss", "label_range", "targets_unnormalised"),
            f"The targets reach from {span}, and {head.loss} is made for amounts that are not negative.",
            ("loss='mean_squared_error', or 'huber'.",),
        )
    shape = target.get("shape") or []
    width = shape[-1] if len(shape) > 1 else 1
    if head.loss in DIFFERENCES and head.units > 1 and width == 1 and (len(shape) <= 2 or len(shape) == head.rank):
        of = "sample" if len(shape) <= 2 else "place"
        return (
            ("wrong_loss", "output_units"),
            f"One number a {of} as target and {head.units} outputs: {head.loss} compares it with each of them.",
            ("Classes: loss='sparse_categorical_crossentropy' with a softmax. A number: Dense(1) at the end.",),
        )
    shares = head.loss == "categorical_crossentropy" or (head.loss in BINARY and head.activation == "softmax")
    if shares and head.units > 1 and kind != "one_hot":
        mean = target.get("mean")
        total = (
            sum(v for v in mean if v is not None) if isinstance(mean, list) and len(mean) == head.units else math.nan
        )
        if low < 0 or high > 1:
            return (
                ("wrong_loss", "label_range"),
                f"The targets reach from {span}, and a categorical cross-entropy takes shares of classes "
                "that sum to 1.",
                ("Numbers: loss='mean_squared_error' and no activation on the last layer.",),
            )
        if abs(total - 1) > MARGIN:
            return (
                ("wrong_output_activation", "wrong_loss"),
                f"A sample may be of several classes or of none (the targets of a row sum to {total:.2f} on "
                "average), and a "
                f"softmax {'with categorical cross-entropy ' if head.loss not in BINARY else ''}shares out exactly 1.",
                (f"Dense({head.units}, activation='sigmoid') with loss='binary_crossentropy'.",),
            )
    return None


def _from_zero(low: int, high: int, units: int) -> tuple[str, ...]:
    """What to do about class numbers that do not fit the outputs.

    >>> _from_zero(1, 10, 10)
    ('Labels from 0: y = y - 1.', 'Or Dense(11) at the end.')
    >>> _from_zero(0, 10, 10), _from_zero(-1, 9, 10)[0]
    (('Dense(11) at the end.',), 'Labels from 0: y = y + 1, with Dense(11) at the end.')
    """
    if low < 0:
        more = f", with Dense({high - low + 1}) at the end" if high - low >= units else ""
        none = f"Or loss=keras.losses.SparseCategoricalCrossentropy(ignore_class={low}), if that stands for no label."
        return (f"Labels from 0: y = y + {-low}{more}.", none)
    if low > 0 and high - low < units:
        return (f"Labels from 0: y = y - {low}.", f"Or Dense({high + 1}) at the end.")
    return (f"Dense({high + 1}) at the end.",)


def _other_axes(
    head: program.Head, target: Mapping[str, Any], kind: Any, low: float, high: float
) -> tuple[tuple[str, ...], str, tuple[str, ...]] | None:
    """Targets of other axes than the loss compares with the output: Keras's error gives the shapes, not the way out."""
    shape = list(target.get("shape") or [])
    single = len(shape) == 1 or (len(shape) == 2 and shape[-1] == 1)
    sparse = head.loss == "sparse_categorical_crossentropy"
    if sparse and kind == "one_hot" and len(shape) in (head.rank, 2) and shape[-1] == head.units > 1:
        return (
            ("wrong_loss",),
            f"The targets are rows of {head.units} numbers, one of them 1, and {head.loss} takes the number of the "
            "class.",
            ("loss='categorical_crossentropy'.", "Or the numbers of the classes: y = y.argmax(-1)."),
        )
    if sparse and single and head.rank > 2:
        return (
            ("output_shape",),
            f"One class a sample as target, and an output of {head.rank - 1} axes a sample: a class for each place "
            "of it.",
            ("keras.layers.Flatten() before the last layer; or GlobalAveragePooling of the places.",),
        )
    shares = head.loss == "categorical_crossentropy" or head.loss in BINARY
    if shares and single and head.units > 1 and kind in ("integer", "binary") and 0 <= low <= high < head.units:
        softmax = "" if head.activation == "softmax" or head.logits else " with activation='softmax' on the last layer"
        return (
            ("wrong_loss",),
            f"The targets are numbers of classes, one a sample, and {head.loss} takes a share for each of the "
            f"{head.units} outputs.",
            (f"loss='sparse_categorical_crossentropy'{softmax}.", "Or rows of shares: keras.ops.one_hot(y, n)."),
        )
    return None


@rule
def differences_of_classes(run: Run) -> Iterator[Finding]:
    """A loss of differences on classes.

    Means:   the labels are classes (one-hot, or 0 and 1), the loss is a squared or absolute error, and the model learnt
             little.
    Matters: behind a sigmoid or softmax its gradient vanishes just where the model is most wrong; without either it
             also punishes answers that are more than right.
    Try:     a cross-entropy.
    Source:  Golik et al., Cross-entropy vs. squared error training, 2013.

    >>> from trainrt.findings.examples import learning, stuck
    >>> [finding.causes[0] for finding in differences_of_classes(stuck(loss="mean_squared_error"))]
    ['wrong_loss']
    >>> list(differences_of_classes(learning(loss="mean_squared_error")))
    []
    """
    for end in program.ends(run):
        kind, loss, ended = (end.target.get("labels") or {}).get("kind"), end.loss, outcome(run).of(end.name)
        if kind not in ("one_hot", "binary") or loss not in DIFFERENCES or not ended.poor(0.6):
            continue
        usual = "binary_crossentropy" if kind == "binary" else "categorical_crossentropy"
        yield about(
            run,
            "differences_of_classes",
            "warning",
            0.5,
            ("wrong_loss", "wrong_output_activation"),
            f"The labels are classes and the loss is {loss}, and the model learnt little (skill {ended.skill:.2f}).",
            {"loss": loss, "labels": kind, "skill": ended.skill},
            (f"loss={usual!r} with activation={'sigmoid' if kind == 'binary' else 'softmax'!r} on the last layer.",),
            where=(end.head.layer,) if end.name and end.head else (),
        )


@rule
def output_out_of_reach(run: Run) -> Iterator[Finding]:
    """Targets that the output activation cannot reach.

    Means:   a loss of differences, and a good part of the targets (beyond the 1st or 99th percentile, or one deviation
             from the mean) outside of what the activation can put out; and the model did not learn all the same.
    Matters: what is out of reach saturates the output, or kills it: a ReLU that should be negative has no gradient.
    Try:     no activation on the last layer of a regression.
    Source:  exact for the range; DeepDiagnosis's "out of range" compares the same, without the outcome.

    >>> from trainrt.findings.examples import learning, stuck
    >>> layers = [{"name": "out", "class": "Dense", "config": {"units": 1, "activation": "relu"}}]
    >>> both = {"min": -2.0, "max": 2.0, "mean": [0.0], "std": [1.0], "labels": {"kind": "continuous"}}
    >>> run = stuck(layers=layers, targets=both, loss="mean_squared_error")
    >>> [finding.causes[0] for finding in output_out_of_reach(run)]
    ['wrong_output_activation']
    >>> list(output_out_of_reach(stuck(layers=layers, targets=both | {"mean": [5.0]}, loss="mean_squared_error")))
    []
    """
    for end in program.ends(run):
        said = _out_of_reach(end)
        if said is None or end.head is None:
            continue
        (low, high), (least, most) = said
        ended = outcome(run).of(end.name)
        span = f"{low:g} to {high:g}" if math.isfinite(high) else f"{low:g} and above"
        target, head = end.target, end.head
        yield about(
            run,
            "output_out_of_reach",
            "info" if ended.settled and ended.skill >= 0.9 else "error",
            0.95,
            ("wrong_output_activation", "targets_unnormalised"),
            f"The output's {head.activation} puts out {span}, and the targets reach from {target.get('min'):.4g} to "
            f"{target.get('max'):.4g}: those outside cannot be learnt.",
            {"range": [low, high], "targets": [least, most], "activation": head.activation},
            (
                f"No activation at the end: keras.layers.Dense({head.units or 'n'}).",
                "Or scale the targets into its range.",
            ),
            where=(head.layer,) if head.layer else (),
        )


def _out_of_reach(end: program.End) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """The range of the output and that of most targets, where the one does not hold the other."""
    if end.head is None or end.head.loss not in DIFFERENCES or end.head.activation not in RANGE:
        return None
    low, high = RANGE[end.head.activation]
    quantiles = (end.target.get("labels") or {}).get("quantiles") or {}
    mean, spread = end.target.get("mean"), end.target.get("std")
    least, most = program.number(quantiles.get("0.01")), program.number(quantiles.get("0.99"))
    if math.isnan(least) and isinstance(mean, list) and isinstance(spread, list):
        sides = [(m - s, m + s) for m, s in zip(mean, spread, strict=False) if m is not None and s is not None]
        least, most = min((a for a, _ in sides), default=math.nan), max((b for _, b in sides), default=math.nan)
        # Between the extremes that were seen.
        least = max(least, program.number(end.target.get("min")))
        most = min(most, program.number(end.target.get("max")))
    room = MARGIN * max(abs(most - least), 1e-12)
    if not (least < low - room or most > high + room):
        return None
    return (low, high), (least, most)


@rule
def no_hidden_activation(run: Run) -> Iterator[Finding]:
    """Hidden layers without an activation: a stack of matrices is one matrix.

    Means:   every hidden dense or convolution layer is linear, nothing between them bends, and the model learnt little.
    Matters: however deep, the model is a linear one.
    Try:     activation='relu' in the hidden layers.
    Source:  UMLAUT's missing activation, which warns of any linear layer.

    >>> from trainrt.findings.examples import learning, stuck
    >>> stack = [("a", 64, "linear"), ("b", 32, "linear"), ("out", 1, "sigmoid")]
    >>> layers = [{"name": n, "class": "Dense", "config": {"units": u, "activation": a}} for n, u, a in stack]
    >>> [finding.causes[0] for finding in no_hidden_activation(stuck(layers=layers))]
    ['missing_activation']
    >>> list(no_hidden_activation(learning(layers=layers)))
    []
    """
    linear: list[str] = []
    known = program.layers(run)
    if not known or not outcome(run).poor(POOR):
        return
    inside = {layer["name"] for layer in program.hidden(run)}
    body = [layer for layer in known if layer["class"] not in program.PASSIVE]
    for layer in [layer for layer in body[:-1] if layer["name"] in inside]:
        if layer["class"] in ("Dense", "Conv1D", "Conv2D", "Conv3D", "SeparableConv2D", "EinsumDense"):
            if layer["config"].get("activation") != "linear":
                return  # or not known
            linear.append(layer["name"])
        elif layer["class"] not in (*program.NORMALISERS, *program.LOOKUPS, "Lambda", "Add", "Concatenate"):
            return  # pools, activations, recurrent and own layers bend, or may
    if len(linear) < 1 or len(body) < 2 or "Dense" not in body[-1]["class"]:
        return
    yield about(
        run,
        "no_hidden_activation",
        "error",
        0.85,
        ("missing_activation", "capacity"),
        f"No hidden layer has an activation ({len(linear)} of them are linear): together they are one linear layer.",
        {"linear": linear},
        ("Give each hidden layer one: keras.layers.Dense(64, activation='relu').",),
        where=tuple(linear),
    )


def _class(loss: str) -> str:
    """
    >>> _class("sparse_categorical_crossentropy")
    'SparseCategoricalCrossentropy'
    """
    return "".join(part.capitalize() for part in loss.split("_"))
