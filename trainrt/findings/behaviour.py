"""How the loss behaves: the wrong way up, ruled by the smallest targets, or flat for no reason that "
"another rule knows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from trainrt.findings import program
from trainrt.findings.finding import Finding
from trainrt.findings.outcome import outcome
from trainrt.findings.rules import about, rule
from trainrt.findings.series import falls_late, kernel_ratio, kernels, loss_trend, pace, percentile, scalar
from trainrt.record.run import Run
from trainrt.record.vocabulary import UPDATE, WEIGHT

POOR = 0.6
TENTHS = 10
LONG = 0.1
"""Step over a kernel's size from which on it is no small one."""
NOTHING = 0.15
SMALL_STEP = 5e-4
"""Of a kernel's size: half of the usual 1e-3, under plain gradient descent, whose steps shrink with the gradient."""
FEWEST = 50
"""Steps of a run whose loss can be said to have come to rest."""
CHANCE = 10.0
"""Over the rows: a share of the targets that a feature explains by chance in one of a thousand."""
SMALL = 4
"""Units with which a hidden layer bends a task four times at most."""
RELATIVE = ("mean_absolute_percentage_error", "mape")


@rule
def upside_down(run: Run) -> Iterator[Finding]:
    """A loss that falls while the model gets worse: its sign is the wrong way round.

    Means:   the loss went below zero, or fell, the labels are in their range, and the accuracy ends at or under what
             always naming one class has.
    Matters: the training does what it was told, and maximises the error.
    Try:     look at the sign of the loss; a cross-entropy is -sum(y * log(p)).
    Source:  a cross-entropy of probabilities, and any loss of differences, is never negative.

    >>> from trainrt.findings.examples import learning, stuck
    >>> [f.causes[0] for f in upside_down(stuck(losses=np.linspace(-2, -13, 200), loss="my_loss"))]
    ['flipped_sign']
    >>> list(upside_down(learning()))
    []
    """
    ended, trend = outcome(run), loss_trend(run)
    if not (ended.poor(NOTHING) and trend.last < 0 and trend.last < trend.start - 0.1 * abs(trend.start)):
        return
    loss = program.loss_name(run)
    for target in program.leaves(run, "targets"):
        low, high = program.number(target.get("min")), program.number(target.get("max"))
        if "crossentropy" in loss or not (0 <= low <= high <= 1) or ended.kind != "classes":
            return  # labels out of range make a cross-entropy negative too
    yield about(
        run,
        "upside_down",
        "error",
        0.9,
        ("flipped_sign", "wrong_loss"),
        f"The loss fell from {trend.start:.4g} to {trend.last:.4g}, below zero, while the accuracy is no "
        "better than that "
        f"of naming one class (skill {ended.skill:.2f}): the loss seems to have the wrong sign.",
        {"loss": {"first": trend.start, "last": trend.last}, "skill": ended.skill, "loss_name": loss},
        ("Negate it: return -keras.ops.sum(y * keras.ops.log(p + 1e-7), axis=-1).", "Or use a loss of Keras."),
    )


@rule
def ascent(run: Run) -> Iterator[Finding]:
    """Steps that go uphill: the loss rises by what their gradients say that it falls by.

    Means:   from one tenth of the run to the next, in nine of ten, the loss rises by a fifth to twice of what gradient
             times update promises as its fall, and no kernel moves by a tenth of its size in a step.
    Matters: what is minimised is not the loss that is told: somewhere its sign is turned, or it is another one. Steps
             that are merely too long either jump to and fro or are long beside the weights.
    Try:     the sign of the loss, of the gradients and of the reward in a train step of one's own.
    Source:  Taylor's theorem: a small step changes the loss by the inner product of gradient and update.

    >>> from trainrt.findings.examples import learning, stuck
    >>> promised = {"gradient_norm": 6.7, "update_norm": 1e-3}  # of each of three kernels: 0.02 a step
    >>> [finding.causes[0] for finding in ascent(stuck(losses=np.linspace(1, 5, 200), **promised))]
    ['flipped_sign']
    >>> list(ascent(learning(**promised)))
    []
    """
    loss = scalar(run, "loss")
    known = int(np.argmin(np.isfinite(loss))) if not np.isfinite(loss).all() else len(loss)
    if known < 2 * TENTHS or not loss_trend(run).last - loss[0] > abs(loss[0]) / 2 + 3 * loss_trend(run).noise:
        return
    update, weight = run.moments(UPDATE), run.moments(WEIGHT)
    matrices = np.flatnonzero(kernels(run, weight))
    if not np.nanmax(kernel_ratio(update[:, matrices], weight[:, matrices])[:known], initial=0.0) < LONG:
        return
    steps = run.steps[:known, 1] - run.steps[:known, 0] + 1
    promised = np.nansum(run["predicted_decrease"][:known], axis=1) * steps
    parts = np.array_split(np.arange(known), TENTHS)
    level, fall = np.array([[loss[part].mean(), promised[part].sum()] for part in parts]).T
    # From the middle of one part to that of the next.
    rise, promise = np.diff(level), (fall[1:] + fall[:-1]) / 2
    share = rise / promise
    uphill = (promise > 0) & (share > 0.2) & (share < 2)
    if uphill.mean() < 0.85:
        return
    yield about(
        run,
        "ascent",
        "error",
        0.9,
        ("flipped_sign", "wrong_loss"),
        f"The loss rose from {loss[0]:.4g} to {level[-1]:.4g} in small steps, by {np.median(share):.2g} times what "
        "gradient times update promises as its fall: the training climbs it.",
        {"rise_over_promised_fall": share.tolist(), "thresholds": [0.2, 2.0], "loss": level.tolist()},
        (
            "Look for a minus too many or too few: in the train step, in the loss or reward, in the gradients.",
            "Tell the loss that is minimised: log and differentiate the same tensor.",
        ),
    )


@rule
def relative_error(run: Run) -> Iterator[Finding]:
    """A percentage error on targets that cross zero.

    Means:   the loss is the mean absolute percentage error, and the targets have both signs or come near zero.
    Matters: it divides by the target: the samples nearest to zero rule the loss, and predicting zero looks good.
    Try:     mean squared or absolute error on standardised targets.
    Source:  Hyndman & Koehler, Another look at measures of forecast accuracy, 2006.

    >>> from trainrt.findings.examples import learning, stuck
    >>> both = {"min": -2.0, "max": 2.0, "mean": [0.0], "std": [1.0], "labels": {"kind": "continuous"}}
    >>> name = "mean_absolute_percentage_error"
    >>> [f.causes[0] for f in relative_error(stuck(targets=both, loss=name))]
    ['wrong_loss']
    >>> list(relative_error(stuck(targets=both | {"min": 5.0}, loss=name)))
    []
    """
    if program.loss_name(run) not in RELATIVE:
        return
    for target in program.leaves(run, "targets"):
        low, high = program.number(target.get("min")), program.number(target.get("max"))
        quantiles = (target.get("labels") or {}).get("quantiles") or {}
        near = 0 < abs(program.number(quantiles.get("0.01"))) < 0.01 * abs(program.number(quantiles.get("0.5")))
        if not (low < 0 < high or near or low == 0):
            continue
        yield about(
            run,
            "relative_error",
            "error",
            0.93,
            ("wrong_loss",),
            f"The loss is a percentage of targets that reach from {low:.4g} to {high:.4g}: those near zero rule it.",
            {"min": low, "max": high},
            ("model.compile(..., loss='mean_squared_error'), or 'mean_absolute_error', on standardised targets.",),
        )
        return


@rule
def binding_constraint(run: Run) -> Iterator[Finding]:
    """A constraint that undoes the updates.

    Means:   a layer's weights have a constraint, they sit on its bound at the end, and the model learnt little.
    Matters: each step is projected back: the gradients push, the weights stay.
    Try:     a looser bound, such as MaxNorm(3), or none.
    Source:  Srivastava et al., Dropout, 2014, use a max-norm of 3 to 4.

    >>> from trainrt.findings.examples import learning, stuck
    >>> bound = {"class": "MaxNorm", "max_value": 0.001}
    >>> layers = [{"name": "first", "class": "Dense", "config": {"kernel_constraint": bound}}]
    >>> run = stuck(layers=layers, weight_rms=0.001 / 4)
    >>> [finding.causes[0] for finding in binding_constraint(run)]
    ['constraint_binds']
    >>> list(binding_constraint(learning(layers=layers)))
    []
    """
    if not len(run.steps) or not outcome(run).poor(POOR):
        return
    last, held = run.moments(WEIGHT)[-1].rms, {}
    for p, parameter in enumerate(run.roster.parameters):
        config = program.configuration(run, parameter.layer)
        constraint = config.get(f"{parameter.path.rpartition('/')[2]}_constraint")
        if not constraint:
            continue
        given = constraint if isinstance(constraint, dict) else {"class": constraint}
        bound = program.number(given.get("max_value")) if "max_value" in given else 1.0
        # Of units whose norm is the bound, the root mean square over all is bound / sqrt(fan-in).
        norm = float(last[p]) * math.sqrt(max(math.prod(parameter.shape[:-1]), 1))
        if given.get("class") in ("MaxNorm", "UnitNorm", "MinMaxNorm") and not norm > 0.8 * bound:
            continue
        held[parameter.path] = (str(given.get("class")), bound, norm)
    if not held:
        return
    kind, bound, norm = next(iter(held.values()))
    yield about(
        run,
        "binding_constraint",
        "error",
        0.93 if bound < 0.5 else 0.6,
        ("constraint_binds", "capacity"),
        f"{kind}({bound:g}) holds the weights: their units' norm is {norm:.3g}, on the bound, and nothing was learnt.",
        {"held": {path: list(each) for path, each in held.items()}},
        ("Loosen it: kernel_constraint=keras.constraints.MaxNorm(3), or leave it out.",),
        where=tuple(held),
    )


@rule
def bottleneck(run: Run) -> Iterator[Finding]:
    """A layer too narrow for what must pass it.

    Means:   a hidden layer has one unit, or fewer than a fifth of the classes; or no hidden layer has more than 4, and
             the loss has come to rest; and the model learnt little.
    Matters: one number cannot tell ten classes apart; what is lost there no later layer brings back.
    Try:     at least as many units as classes.
    Source:  own judgement; TheDeepChecker's mutation "one neuron".

    >>> from trainrt.findings.examples import learning, stuck
    >>> narrow = [("a", "Dense", 64), ("b", "Dense", 1), ("c", "Dense", 10)]
    >>> layers = [{"name": n, "class": c, "parameters": 9, "config": {"units": u}} for n, c, u in narrow]
    >>> [finding.causes[0] for finding in bottleneck(stuck(layers=layers))]
    ['capacity']
    >>> list(bottleneck(learning(layers=layers)))
    []
    """
    if not outcome(run).poor(POOR):
        return
    inside = {layer["name"] for layer in program.hidden(run)}
    sizes = [
        (layer["name"], program.number(layer["config"].get("units", layer["config"].get("filters"))))
        for layer in program.layers(run)
        if layer.get("parameters")
    ]
    sizes = [(name, width) for name, width in sizes if width > 0]
    widths = [(name, width) for name, width in sizes[:-1] if name in inside]
    if not widths:
        return
    classes = max(width for name, width in sizes if (name, width) not in widths)
    # An autoencoder is narrow on purpose; what parts classes needs room for them.
    parts = any((end.target.get("labels") or {}).get("kind") in ("one_hot", "integer") for end in program.ends(run))
    narrow = [name for name, width in widths if width == 1 or (width < classes / 5 and parts)]
    small = max(width for _, width in widths) <= SMALL and _rests(run)
    if not narrow and not small:
        return
    certain, narrow = bool(narrow), narrow or [name for name, _ in widths]
    yield about(
        run,
        "bottleneck",
        "error" if certain else "warning",
        0.85 if certain else 0.5,
        ("capacity",),
        f"{', '.join(narrow)} {'has' if len(narrow) == 1 else 'have'} {min(w for n, w in widths if n in narrow):g} "
        f"unit(s) in front of {classes:g} outputs: what is lost there no later layer brings back.",
        {"widths": dict(widths)},
        (f"Give it at least {int(max(classes, 8))} units.",),
        where=tuple(narrow),
    )


@rule
def linear_model(run: Run) -> Iterator[Finding]:
    """A linear model on a task that seems not to be linear.

    Means:   the model is one layer of weights, its loss has come to rest, and it learnt next to nothing.
    Matters: a line cannot part rings, nor learn an exclusive or, however long it trains.
    Try:     a hidden layer with an activation; or features that make the task linear.
    Source:  Minsky & Papert, Perceptrons, 1969.

    >>> from trainrt.findings.examples import learning, stuck
    >>> layers = [{"name": "out", "class": "Dense", "parameters": 3, "config": {"units": 1, "activation": "sigmoid"}}]
    >>> [finding.causes[0] for finding in linear_model(stuck(layers=layers))]
    ['capacity']
    >>> list(linear_model(learning(layers=layers)))
    []
    """
    ended = outcome(run)
    weighted = [layer for layer in program.layers(run) if layer.get("parameters")]
    weighted = [layer for layer in weighted if layer["class"] not in (*program.NORMALISERS, *program.PASSIVE)]
    if len(weighted) != 1 or weighted[0]["class"] != "Dense":
        return
    if not (ended.poor(0.1) and _rests(run) and math.isfinite(ended.data_loss)):
        return
    yield about(
        run,
        "linear_model",
        "warning",
        0.5,
        ("capacity", "missing_activation"),
        f"The model is one linear layer, its loss has come to rest at {ended.data_loss:.4g}, and it learnt "
        "next to nothing "
        f"(skill {ended.skill:.2f}): the task may not be linear.",
        {"skill": ended.skill},
        ("Put a hidden layer before it: keras.layers.Dense(32, activation='relu').",),
        where=(weighted[0]["name"],),
    )


@rule
def oscillation(run: Run) -> Iterator[Finding]:
    """Epochs that undo each other: the validation result jumps up and down.

    Means:   in the second half of the run the skill on the validation data changes by more than 0.08 an epoch (median),
             beyond what so few rows may show, in turns up and down, and ends 0.1 under its best.
    Matters: the steps are longer than the valley is wide; where the run ends is luck.
    Try:     a tenth of the learning rate, or one that decays; larger batches; less momentum.
    Source:  Zhang et al., AUTOTRAINER, 2021: swings of 0.03 in a fifth of the epochs, which small validation sets have
             by chance.

    >>> from trainrt.findings.examples import learning, stuck
    >>> from trainrt.record.vocabulary import Epoch
    >>> run = learning()
    >>> run.epochs = [Epoch(i, 9 * i, {"val_accuracy": 0.9 - 0.3 * (i % 2), "accuracy": 0.8}) for i in range(12)]
    >>> [finding.causes[0] for finding in oscillation(run)]
    ['lr_too_high']
    >>> list(oscillation(learning()))
    []
    """
    ended = outcome(run)
    rows = program.side(run, "validation").get("rows") or 0
    skill = np.array(ended.course, np.float64)
    late = skill[len(skill) // 2 :]
    changes = np.diff(late)
    if not ended.far or len(changes) < 4 or not np.isfinite(changes).all() or not rows:
        return
    turns = float((changes[1:] * changes[:-1] < 0).mean())
    swing, drop = float(np.median(np.abs(changes))), float(skill.max() - np.median(late))
    if not (swing > max(0.08, 2 / math.sqrt(rows)) and turns >= 0.5 and drop > 0.1):
        return
    rate = percentile(scalar(run, "learning_rate"), 50)
    yield about(
        run,
        "oscillation",
        "warning",
        0.65,
        ("lr_too_high", "momentum_too_high", "batch_size_too_small"),
        f"The validation result jumps from epoch to epoch, by {swing:.2f} of skill, up and down: the steps "
        "are too long.",
        {"swing": swing, "turns": turns, "drop": drop, "thresholds": {"swing": 0.08, "turns": 0.5, "drop": 0.1}},
        (
            f"Lower the learning rate: model.optimizer.learning_rate = {rate / 10:.1g}.",
            "Or let it decay, or use larger batches.",
        ),
    )


@rule
def stagnation(run: Run) -> Iterator[Finding]:
    """A model that does hardly better than a constant prediction, for a reason that is not seen.

    Means:   half of the run is over, its loss has come to rest, and the skill is under 0.15 (accuracy or
             variance explained, beyond those of the best constant prediction). Where another rule knows why, this is
             its consequence.
    Matters: the training does not work.
    Try:     overfit one batch first: trainrt.fit(model, x[:32], y[:32], epochs=200) must reach a loss near zero.
    Source:  TheDeepChecker's one-batch test; the skill is defined in trainrt.findings.outcome.

    >>> from trainrt.findings.examples import learning, stuck
    >>> [finding.rule for finding in stagnation(stuck())]
    ['stagnation']
    >>> list(stagnation(learning()))
    []
    """
    ended, trend = outcome(run), loss_trend(run)
    if not (ended.poor(NOTHING) and _rests(run)):
        return
    moves = abs(trend.fall) > 0.3
    rate = percentile(scalar(run, "learning_rate"), 50)
    causes: tuple[str, ...] = (
        ("lr_too_high", "labels_wrong", "wrong_loss") if moves else ("labels_wrong", "lr_too_high", "capacity")
    )
    ratio, _ = pace(run)
    if ratio < SMALL_STEP and program.optimizer(run).get("class") == "SGD":
        causes = ("lr_too_low", "labels_wrong", "capacity")
    if not math.isfinite(ended.data_loss):
        causes = ("unstable_loss", "lr_too_high")
    what = f"skill {ended.skill:.2f}" if math.isfinite(ended.skill) else "a loss that is not finite"
    yield about(
        run,
        "stagnation",
        "info" if _all_there_is(run) else "warning",
        0.3,
        causes,
        f"The model does hardly better than a constant prediction ({what}); the loss went from {trend.first:.4g} to "
        f"{trend.last:.4g}" + (f", and a constant's is {ended.constant:.4g}." if np.isfinite(ended.constant) else "."),
        {"skill_train": ended.train, "skill_validation": ended.validation, "constant_loss": ended.constant},
        (
            "Overfit one batch: trainrt.fit(model, x[:32], y[:32], epochs=200) must reach a loss near zero. "
            "If it does not, "
            "the model or the loss is wrong; if it does, look at the data.",
            f"Try a tenth and ten times of the learning rate ({rate:.3g}).",
        ),
    )


def _all_there_is(run: Run) -> bool:
    """Whether the model explains what the best feature does, and that is more than chance: the data are noisy."""
    relation = program.side(run).get("relation") or {}
    largest, rows = relation.get("largest") or [], relation.get("rows") or 0
    best = program.number(largest[0][1]) if largest else math.nan
    return bool(best > CHANCE / max(rows, 1) and outcome(run).skill >= 0.8 * best)


def _rests(run: Run) -> bool:
    """Whether the loss has come to rest: half of the run is over, in steps enough to tell, and it falls no more."""
    return bool(run.steps[-1, 1] + 1 >= FEWEST and outcome(run).far and not falls_late(run))
