"""An optimizer whose settings stand in its own way."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from trainrt.findings import program
from trainrt.findings.finding import Finding
from trainrt.findings.outcome import outcome
from trainrt.findings.rules import about, rule
from trainrt.findings.series import kernel_ratio, kernels, loss_trend, middle, percentile, scalar
from trainrt.record.run import Run
from trainrt.record.vocabulary import GRADIENT, UPDATE, WEIGHT

POOR = 0.6
"""Skill under which a setting is a fault; see `outcome`."""
SQUARES = ("velocity", "accumulated_gradient", "accumulator")
"""Slots that hold a mean of squared gradients, by the names of Keras's optimizers."""
MOMENTUM, EXTREME = 0.98, 0.99
DECAY = 0.02
"""Share of a weight that decay removes a step: it forgets what it learnt 50 steps ago."""
SHRUNK = 0.5
ALONG = 0.5
MOST = 0.5
"""Share of a kernel's elements, or of its update."""
IDLE = 0.9
"""Share of a kernel's gradient that is exactly zero, from which on there is nothing to divide."""
RAISED = 1e-4
"""An epsilon over Keras's 1e-7 by so much was chosen."""


@rule
def drowning_epsilon(run: Run) -> Iterator[Finding]:
    """An epsilon that outweighs the gradients it should only guard: the optimizer is adaptive no more.

    Means:   for most elements of the kernels that have a gradient, epsilon is more than what the optimizer divides by
             besides it, over the first half of the run, and the model learnt little. It is counted in the step
             (`run["epsilon_share"]`); of records without the count, the root mean square of the slot is held against
             epsilon.
    Matters: the step is then learning_rate * gradient / epsilon: as tiny as the gradients are, whatever the loss.
    Try:     bring the loss to its proper scale (a mean, no factor of 1e-8), or lower epsilon.
    Source:  Kingma & Ba, Adam, 2015: epsilon is there against division by zero; the update is invariant to the scale of
             the gradients only as long as it is small beside them.

    >>> from trainrt.findings.examples import learning, stuck
    >>> small = {"slots": ["velocity"], "velocity_rms": 1e-18, "epsilon_share": 1.0}
    >>> [finding.causes[0] for finding in drowning_epsilon(stuck(**small))]
    ['epsilon_dominates']
    >>> list(drowning_epsilon(stuck(slots=["velocity"], velocity_rms=1e-6)))
    []
    """
    config = program.optimizer(run)
    epsilon = program.number(config.get("epsilon"))
    slot = next((s for s in SQUARES if s in run.roster.slots), None)
    if slot is None or not epsilon > 0 or len(run.steps) < 10 or not outcome(run).poor(POOR):
        return
    matrices = np.flatnonzero(kernels(run, run.moments(WEIGHT)))
    if not len(matrices):
        return
    half = max(len(run.steps) // 2, 1)
    squares = run.moments(slot)[:half]
    idle = np.nan_to_num(run.moments(GRADIENT).zero_share[:half, matrices], nan=1.0)
    # The slot starts at zero: Adam divides by its age, which matters in the first tenth of a thousand steps.
    age = 1 - np.minimum(program.number(config.get("beta_2")), 0.9999999) ** (run.steps[:half, 1] + 1.0)
    age = np.where(np.isfinite(age), age, 1.0)
    root = np.sqrt(squares.rms[:, matrices] / age[:, None])
    # Where a gradient is exactly zero, that is the finding.
    level = percentile(middle(np.where(idle < IDLE, root / epsilon, np.nan)), 50)
    share = run["epsilon_share"][:half, matrices]
    share = percentile(middle(np.where(idle < IDLE, (share - idle) / (1 - idle), np.nan)), 50)
    if not (share > MOST if math.isfinite(share) else level < 1):
        return
    counted = f" in {share:.0%} of the elements" if math.isfinite(share) else ""
    yield about(
        run,
        "drowning_epsilon",
        "error",
        0.95 if share > 0.9 else 0.93,
        ("epsilon_dominates", "lr_too_low"),
        f"The optimizer's epsilon of {epsilon:.2g} outweighs the gradients it divides by{counted}: they are "
        f"{level:.2g} of its size, and the steps shrink with them.",
        {
            "root_mean_square_over_epsilon": level,
            "elements_under_epsilon": share,
            "epsilon": epsilon,
            "thresholds": {"elements_under_epsilon": MOST, "root_mean_square_over_epsilon": 1.0},
        },
        _of_epsilon(str(config.get("class") or "Adam"), epsilon, level * epsilon),
        where=tuple(run.roster.parameters[p].path for p in matrices),
    )


def _of_epsilon(optimizer: str, epsilon: float, size: float) -> tuple[str, ...]:
    """What to try: an epsilon that somebody raised, or a loss that is divided by too much."""
    usual = f"keras.optimizers.{optimizer}(epsilon={min(size / 1e3, 1e-7):.1g})."
    scale = f"Look at the scale of the loss: is it divided by too much? Its gradients are of size {size:.1g}."
    return (f"Lower epsilon: {usual}", scale) if epsilon > RAISED else (scale, f"Lower epsilon: {usual}")


@rule
def heavy_momentum(run: Run) -> Iterator[Finding]:
    """A momentum so high that the optimizer cannot stop.

    Means:   SGD's momentum (or Adam's beta_1) is 0.98 or more, the model learnt little, and the steps do not go where
             the gradients point: the cosine between both (`run["gradient_momentum_cosine"]`) is under 0.5. It is about
             0.5 at a momentum of 0.9, and near 1 where gradients agree from step to step and momentum does no harm.
             Or they ran past what they had reached: the loss ends far above its best.
    Matters: a gradient is felt for 1 / (1 - momentum) steps: at 0.999 the effective learning rate is a thousand times
             the one that was set, and the model overshoots for a thousand steps.
    Try:     0.9; or multiply the learning rate by (1 - momentum).
    Source:  Goodfellow et al., Deep Learning, 2016, section 8.3.2: 0.5, 0.9 and 0.99 are in use, and the terminal step
             is the learning rate over (1 - momentum).

    >>> from trainrt.findings.examples import learning, stuck
    >>> heavy = {"class": "SGD", "config": {"learning_rate": 0.3, "momentum": 0.999}}
    >>> [finding.causes[0] for finding in heavy_momentum(stuck(optimizer=heavy))]
    ['momentum_too_high']
    >>> list(heavy_momentum(learning(optimizer=heavy)))
    []
    """
    config = program.optimizer(run)
    name = "momentum" if config.get("class") == "SGD" else "beta_1"
    momentum = program.number(config.get(name))
    ended = outcome(run)
    # Its swings may end far from where the batches of the last epoch were met.
    worse = momentum >= EXTREME and ended.settled and ended.validation < 0
    if not MOMENTUM <= momentum < 1 or not (ended.poor(0.75) or worse):
        return
    along, trend = _along(run, name), loss_trend(run)
    # Who agrees with the gradients and does no harm does not run past what had been reached.
    ran_past = trend.last - trend.best > 0.5 * abs(trend.first) + 3 * trend.noise
    if along > ALONG and not ran_past:
        return
    rate = percentile(scalar(run, "learning_rate"), 50)
    times = 1 / (1 - momentum)
    where = f" The steps hardly follow the gradient (cosine {along:.2g})." if along <= ALONG else ""
    where += f" The loss was {trend.best:.3g} at best, and is {trend.last:.3g}." if ran_past else ""
    effective = f", so the effective learning rate is {rate * times:.3g}" if name == "momentum" else ""
    yield about(
        run,
        "heavy_momentum",
        "error",
        0.93 if momentum >= EXTREME else 0.75,
        ("momentum_too_high", "lr_too_high"),
        f"{name} = {momentum:.6g}: each gradient is felt for {times:.4g} steps{effective}, and little was "
        f"learnt.{where}",
        {name: momentum, "threshold": MOMENTUM, "learning_rate": rate, "gradient_momentum_cosine": along},
        (f"Lower it: {name}=0.9.", f"Or lower the learning rate to {rate * (1 - momentum) * 10:.2g}."),
    )


def _along(run: Run, name: str) -> float:
    """Median cosine between gradient and momentum over kernels and steps; NaN where it was not measured."""
    matrices = np.flatnonzero(kernels(run, run.moments(WEIGHT)))
    if "momentum" not in run.roster.slots or not len(matrices):
        return math.nan
    cosine = percentile(middle(run["gradient_momentum_cosine"][:, matrices]), 50)
    return -cosine if name == "momentum" else cosine  # SGD's slot is the next displacement, downhill


@rule
def consuming_decay(run: Run) -> Iterator[Finding]:
    """A weight decay that takes away more than the gradients bring.

    Means:   the kernels shrank to half their start or less, the model learnt little, and it was decay: it removes over
             0.02 of each kernel a step, or was most of the update until half was gone. Both are measured in the step
             (`run["decay_norm"]`, `run["decay_ratio"]`).
    Matters: the weights go to zero, the outputs to a constant.
    Try:     1e-4 to 1e-2; Keras multiplies it with the learning rate, other libraries do not.
    Source:  Loshchilov & Hutter, Decoupled weight decay regularization, 2019: the memory is
             1 / (rate * decay) steps.

    >>> from trainrt.findings.examples import learning, stuck
    >>> heavy = {"class": "SGD", "config": {"learning_rate": 0.1, "weight_decay": 2.0}}
    >>> shrinking = np.geomspace(1, 1e-4, 200)
    >>> run = stuck(optimizer=heavy, learning_rate=0.1, weight_norm=shrinking, decay_ratio=0.98)
    >>> [finding.causes[0] for finding in consuming_decay(run)]
    ['weight_decay_too_high']
    >>> list(consuming_decay(learning(optimizer=heavy, learning_rate=0.1)))
    []
    """
    config = program.optimizer(run)
    decay = program.number(config.get("weight_decay"))
    if not decay > 0 or not outcome(run).poor(POOR):
        return
    rate = percentile(scalar(run, "learning_rate"), 50)
    weight = run.moments(WEIGHT)
    matrices = np.flatnonzero(kernels(run, weight))
    if not len(matrices):
        return
    size = middle(weight.rms[:, matrices] / weight.rms[:1, matrices])
    shrunk = float(size[-1])
    if not shrunk < SHRUNK:
        return
    gone = int(np.argmax(size < SHRUNK)) + 1  # windows until half was gone
    share = percentile(middle((run["decay_norm"] / run["weight_norm"])[:gone, matrices]), 50)
    of_update = percentile(middle(run["decay_ratio"][:gone, matrices]), 50)
    share = share if math.isfinite(share) else rate * decay
    if not (share >= DECAY or of_update >= MOST):
        return
    yield about(
        run,
        "consuming_decay",
        "error",
        0.94,
        ("weight_decay_too_high", "over_regularised"),
        f"Weight decay removes {share:.2g} of each kernel a step (learning rate {rate:.3g} times {decay:.3g}): they "
        f"shrank to {shrunk:.2g} of their start.",
        {
            "share_a_step": share,
            "share_of_update": of_update,
            "kernel_over_start": shrunk,
            "thresholds": {"share_a_step": DECAY, "share_of_update": MOST, "kernel_over_start": SHRUNK},
        },
        (f"Lower it: weight_decay={min(1e-3 / rate, 0.01):.1g}. Keras multiplies it with the learning rate.",),
        where=tuple(run.roster.parameters[p].path for p in matrices),
    )


@rule
def slow_optimizer(run: Run) -> Iterator[Finding]:
    """An optimizer at a learning rate that is made for another one.

    Means:   Adadelta, Adagrad or Ftrl runs at a tenth of its paper's learning rate or less, as Keras's default of 0.001
             is, and the model learnt little.
    Matters: these divide by an ever-growing sum, or scale the steps by themselves: 0.001 is far too small for them.
    Try:     Adam(1e-3); or Adadelta(1.0), Adagrad(0.01).
    Source:  Zeiler, 2012 (1.0); Duchi et al., 2011; the notes in Keras's documentation of Adadelta.

    >>> from trainrt.findings.examples import learning, stuck
    >>> slow = {"class": "Adadelta", "config": {"learning_rate": 0.001}}
    >>> [finding.causes[0] for finding in slow_optimizer(stuck(optimizer=slow))]
    ['wrong_optimizer']
    >>> list(slow_optimizer(learning(optimizer=slow)))
    []
    """
    kind = program.optimizer(run).get("class", "")
    usual = program.DEFAULT_RATE.get(kind)
    rate = percentile(scalar(run, "learning_rate"), 50)
    # A rate is a number of 32 bits: 0.001 is 0.00100000005.
    if usual is None or not rate <= 1.001 * usual / 10 or not outcome(run).poor(POOR):
        return
    update, weight = run.moments(UPDATE), run.moments(WEIGHT)
    matrices = np.flatnonzero(kernels(run, weight))
    ratio = (
        percentile(middle(kernel_ratio(update[:, matrices], weight[:, matrices])), 50) if len(matrices) else math.nan
    )
    if ratio > 1e-2:
        return
    trend = loss_trend(run)
    yield about(
        run,
        "slow_optimizer",
        "error",
        0.9,
        ("wrong_optimizer", "lr_too_low"),
        f"{kind} runs at a learning rate of {rate:.3g}, made for {usual:g}: kernels move by {ratio:.1g} of "
        "their size a "
        f"step, and the loss went from {trend.first:.4g} to {trend.last:.4g}.",
        {"learning_rate": rate, "usual": usual, "update_ratio": ratio},
        (f"keras.optimizers.{kind}(learning_rate={usual:g}), or keras.optimizers.Adam(1e-3).",),
    )


@rule
def lost_updates(run: Run) -> Iterator[Finding]:
    """Updates that are lost in the rounding of the weights' dtype.

    Means:   for weights of 16 bits, half of the elements or more have a gradient and stay as they are, mostly, and
             the model learnt little.
    Matters: an update under half of the spacing of the weight's dtype (2^-8 of it in bfloat16, 2^-10 in float16) is
             rounded to nothing, however many steps follow.
    Try:     weights in float32: mixed precision, not pure 16 bits; or larger steps.
    Source:  Micikevicius et al., Mixed precision training, 2018, section 3.1.

    >>> from trainrt.findings.examples import learning, stuck
    >>> [finding.causes[0] for finding in lost_updates(stuck(dtype="bfloat16", parameters=2, rounded_share=0.9))]
    ['update_rounding']
    >>> list(lost_updates(learning(dtype="bfloat16", parameters=2, rounded_share=0.9)))
    []
    """
    low = [p for p, parameter in enumerate(run.roster.parameters) if parameter.dtype in ("bfloat16", "float16")]
    # A bias starts at zero, where the spacing is fine.
    low = [p for p in low if len(run.roster.parameters[p].shape) >= 2] or low
    if not low or not outcome(run).poor(POOR):
        return
    share = run.joint("rounded")[:, low] / run.moments(UPDATE).count[:, low]
    typical = [percentile(share[:, i], 50) for i in range(len(low))]
    lost = [p for p, each in zip(low, typical, strict=True) if each > 0.5]
    if not lost or percentile(np.array(typical), 50) < 0.5:
        return
    dtype = run.roster.parameters[lost[0]].dtype
    yield about(
        run,
        "lost_updates",
        "error",
        0.9,
        ("update_rounding", "lr_too_low"),
        f"{percentile(np.array(typical), 50):.0%} of the elements in {dtype} have a gradient and stay as "
        "they are: the updates "
        "are under the spacing of their dtype.",
        {"rounded_share": float(np.nanmedian(typical)), "threshold": 0.5},
        ("Keep the weights in float32: keras.mixed_precision.set_global_policy('mixed_bfloat16').",),
        where=tuple(run.roster.parameters[p].path for p in lost),
    )


@rule
def collapsing_loss_scale(run: Run) -> Iterator[Finding]:
    """A loss scale that falls and falls: step after step is skipped.

    Means:   the dynamic loss scale ends at a thousandth of its start or less, or under 1.
    Matters: each halving is a step that was skipped because a gradient was not finite; under 1 the scale makes small
             gradients vanish, and at 0 the next step makes every weight NaN.
    Try:     bfloat16 needs no loss scale; look for what overflows: a loss in float16, a mask of -1e9.
    Source:  Micikevicius et al., Mixed precision training, 2018; Keras's LossScaleOptimizer has no floor.

    >>> from trainrt.findings.examples import learning
    >>> falling = 2.0 ** np.linspace(15, 0, 200)
    >>> [finding.causes[0] for finding in collapsing_loss_scale(learning(scalars={"loss_scale": falling}))]
    ['unstable_loss']
    >>> list(collapsing_loss_scale(learning(scalars={"loss_scale": 2.0**15})))
    []
    """
    scale = scalar(run, "loss_scale")
    scale = scale[np.isfinite(scale)]
    if len(scale) < 20 or not (scale[-1] < 1 or scale[-1] <= scale[0] / 1000):
        return
    yield about(
        run,
        "collapsing_loss_scale",
        "error" if scale[-1] < 1 else "warning",
        0.8,
        ("unstable_loss", "exploding_gradient"),
        f"The loss scale fell from {scale[0]:.4g} to {scale[-1]:.4g}: steps are skipped because gradients overflow.",
        {"first": float(scale[0]), "last": float(scale[-1])},
        (
            "Use bfloat16: keras.mixed_precision.set_global_policy('mixed_bfloat16').",
            "Compute the loss in float32: keras.layers.Activation('softmax', dtype='float32') at the end.",
        ),
    )
