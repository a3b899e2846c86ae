"""How BAD was trained otherwise than GOOD, its model left out, and what each difference did as far as is recorded.

An examiner is a function from two runs to differences. Where the record holds what a setting did (how much the clip
took, the share of a penalty in the loss, the learning rate of each step), that is what counts, not the setting.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from trainrt.comparison.behaviour import level
from trainrt.comparison.difference import (
    BACKWARD,
    CONFIGURATION,
    EARLY,
    FORWARD,
    NOWHERE,
    START,
    UPDATE,
    Difference,
    entry,
    far_apart,
    said,
    saturating,
)
from trainrt.findings.series import percentile
from trainrt.record.run import Run

CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")
HYPERPARAMETERS = {
    "momentum": ("momentum_too_high",),
    "beta_1": ("momentum_too_high",),
    "beta_2": (),
    "rho": (),
    "epsilon": ("epsilon_dominates",),
    "nesterov": (),
    "amsgrad": (),
    "centered": (),
    "use_ema": (),
    "ema_momentum": (),
    "ema_overwrite_frequency": (),
    "loss_scale_factor": ("update_rounding",),
    "gradient_accumulation_steps": ("too_few_updates",),
    "initial_accumulator_value": ("lr_too_low",),
}
"""Options of optimizers, and the causes that they may be behind."""

QUIET = frozenset(
    """verbose logdir epochs x y validation_data validation_batch_size validation_freq validation_steps observe sinks
    trace callbacks shuffle clip batch_size sample_weight class_weight steps_per_epoch initial_epoch""".split()  # noqa: SIM905
)
"""Arguments of `fit` that change nothing, or that an examiner speaks of."""


def examine(good: Run, bad: Run) -> Iterator[Difference]:
    """All differences of configuration, in no order."""
    for examiner in (_clip, _optimizer, _compiled, _batches, _other_arguments, _seed):
        yield from examiner(good, bad)


def _clip(good: Run, bad: Run) -> Iterator[Difference]:
    words = [_clip_in_words(run) for run in (good, bad)]
    if words[0] == words[1]:
        return
    left, right = (_let_through(run) for run in (good, bad))
    norms = [level(run, "gradient_norm") for run in (good, bad)]
    if not (math.isfinite(left) and math.isfinite(right)):
        effect, did = 0.35, "What it let through was not recorded."
    else:
        effect = saturating(abs(math.log10(max(left, 1e-12) / max(right, 1e-12))), 2.5)
        did = f"It leaves {right:.2g} of the gradient in BAD and {left:.2g} in GOOD, in the median of the steps."
    tight = right < left
    yield Difference(
        CONFIGURATION,
        "clip",
        words[0],
        words[1],
        max(effect, 0.02),
        did,
        ("clip_too_tight",) if tight else ("exploding_gradient",),
        (UPDATE,),
        (f"Clip as GOOD does ({words[0]}); BAD's gradients have a norm of {norms[1]:.3g} in the median.",)
        if math.isfinite(norms[1])
        else (f"Clip as GOOD does ({words[0]}).",),
        evidence={"let_through": {"good": left, "bad": right}, "gradient_norm": norms},
    )


def _clip_in_words(run: Run) -> str:
    found = []
    if entry(run, "fit", "clip") is not None:
        found.append(said(entry(run, "fit", "clip")))
    for name in CLIPS:
        if entry(run, "optimizer", "config", name) is not None:
            found.append(f"{name}={said(entry(run, 'optimizer', 'config', name))}")
    return ", ".join(found) or "none"


def _let_through(run: Run) -> float:
    """The share of the gradient that the clip leaves, in the median of the steps; of an optimizer's own clip, which is
    not recorded, what its threshold would leave of the recorded norms. Between two runs the smaller counts."""
    if entry(run, "fit", "clip") is not None:
        return level(run, "clip_scale")
    threshold = entry(run, "optimizer", "config", "global_clipnorm") or entry(run, "optimizer", "config", "clipnorm")
    if threshold:
        norm = level(run, "gradient_norm")
        return min(1.0, float(threshold) / norm) if norm > 0 else float("nan")
    if entry(run, "optimizer", "config", "clipvalue"):
        peak = level(run, "gradient_absmax")
        return min(1.0, float(entry(run, "optimizer", "config", "clipvalue")) / peak) if peak > 0 else float("nan")
    return 1.0


def _optimizer(good: Run, bad: Run) -> Iterator[Difference]:
    kinds = [entry(run, "optimizer", "class") for run in (good, bad)]
    configs = [entry(run, "optimizer", "config") or {} for run in (good, bad)]
    steps = [level(run, "update_ratio", EARLY) for run in (good, bad)]
    apart = math.log10(steps[1] / steps[0]) if min(steps, default=0) > 0 and all(map(math.isfinite, steps)) else None
    did = ""
    if apart is not None:
        did = f"Kernels move by {steps[1]:.2g} of themselves a step in the first {EARLY}, in GOOD by {steps[0]:.2g}."
    rates = [_rate_in_words(run) for run in (good, bad)]
    if kinds[0] != kinds[1]:
        likelihood = max(0.6, saturating(abs(apart or 0.0), 1.6))
        causes = ("wrong_optimizer", *(() if apart is None else ("lr_too_low" if apart < 0 else "lr_too_high",)))
        yield Difference(
            CONFIGURATION,
            "optimizer",
            f"{kinds[0]}, learning rate {rates[0]}",
            f"{kinds[1]}, learning rate {rates[1]}",
            likelihood,
            did,
            causes,
            (UPDATE,),
            (f"Train with {kinds[0]} again, or look for a rate that suits {kinds[1]}: trainrt.lr_range(model, x, y).",),
            evidence={"update_ratio": steps},
        )
        return
    yield from _learning_rate(good, bad, rates, apart, did, steps)
    for name, causes in HYPERPARAMETERS.items():
        mine, yours = configs[0].get(name), configs[1].get(name)
        if mine != yours and not (
            name.startswith("ema_") and not (configs[0].get("use_ema") or configs[1].get("use_ema"))
        ):
            likelihood = far_apart(mine, yours, name)
            yield Difference(
                CONFIGURATION, f"optimizer.{name}", said(mine), said(yours), likelihood, did, causes, (UPDATE,)
            )
    decays = [configs[k].get("weight_decay") or 0.0 for k in (0, 1)]
    if decays[0] != decays[1] and all(isinstance(d, (int, float)) for d in decays):
        # Decoupled decay shrinks a weight by learning rate x decay a step, whatever the gradient says.
        shrinks = [decays[k] * level(run, "learning_rate") for k, run in enumerate((good, bad))]
        share = abs(shrinks[1] - shrinks[0]) / steps[0] if steps[0] > 0 else float("nan")
        yield Difference(
            CONFIGURATION,
            "optimizer.weight_decay",
            said(decays[0]),
            said(decays[1]),
            max(saturating(share, 2.0), 0.1),
            f"Decay alone shrinks the weights by {shrinks[1]:.2g} of their size a step, in GOOD by {shrinks[0]:.2g}.",
            ("weight_decay_too_high",) if decays[1] > decays[0] else ("overfitting",),
            (UPDATE,),
            evidence={"shrinks": shrinks, "update_ratio": steps},
        )


def _learning_rate(good, bad, rates, apart, did, steps) -> Iterator[Difference]:
    if "learning_rate" not in good.roster.scalars or "learning_rate" not in bad.roster.scalars:
        if rates[0] != rates[1]:
            yield Difference(
                CONFIGURATION, "optimizer.learning_rate", rates[0], rates[1], 0.6, did, ("lr_too_low",), (UPDATE,)
            )
        return
    mine, yours = _by_step(good, bad, "learning_rate")
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log10(yours / mine)
    ratio[(mine == yours) | ~np.isfinite(ratio)] = 0.0
    if not ratio.any() and rates[0] == rates[1]:
        return
    # The typical distance, or that of the steps in which it is largest: a schedule may end a run early.
    typical, largest = float(np.median(np.abs(ratio))) if len(ratio) else 0.0, _tail(np.abs(ratio))
    effect = max(typical, 0.7 * largest)
    sign = float(np.sign(ratio.sum()))
    changed = int(np.argmax(ratio != 0)) if ratio.any() else 0
    since = int(good.steps[min(changed, len(good) - 1), 0]) if len(good) else 0
    shown = list(rates)
    if shown[0] == shown[1] and len(mine):
        at = int(np.argmax(np.abs(ratio)))
        shown = [f"{rates[0]} ({v:.4g} where they are furthest apart)" for v in (mine[at], yours[at])]
    likelihood = saturating(effect, 1.6)
    when = f" from step {since} on" if since else ""
    causes = ("lr_too_high", "exploding_gradient") if sign > 0 else ("lr_too_low", "too_few_updates")
    yield Difference(
        CONFIGURATION,
        "optimizer.learning_rate",
        shown[0],
        shown[1],
        max(likelihood, 0.02),
        f"It is {10 ** (sign * typical):.3g} times GOOD's in the median of the steps{when}. {did}".strip(),
        (("lr_schedule",) if since else ()) + causes,
        (UPDATE,),
        (f"Train with GOOD's learning rate, {rates[0]}.",),
        evidence={"decades": typical, "largest_decades": largest, "since": since, "update_ratio": steps},
    )


def _by_step(good: Run, bad: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A scalar of both at the windows of GOOD that BAD reached."""
    if not (len(good) and len(bad)):
        return np.zeros(0), np.zeros(0)
    reached = good.steps[:, 0] <= bad.steps[-1, 1]
    at = np.clip(np.searchsorted(bad.steps[:, 1], good.steps[reached, 0]), 0, len(bad) - 1)
    return good.scalar(name)[reached], bad.scalar(name)[at]


def _tail(values: np.ndarray) -> float:
    return float(np.quantile(values, 0.9)) if len(values) else 0.0


def _rate_in_words(run: Run) -> str:
    value = entry(run, "optimizer", "config", "learning_rate")
    if value is None and "learning_rate" in run.roster.scalars:
        value = percentile(run.scalar("learning_rate")[:1], 50)
    return said(value)


def _compiled(good: Run, bad: Run) -> Iterator[Difference]:
    losses = [entry(run, "compile", "loss") for run in (good, bad)]
    if losses[0] != losses[1]:
        yield Difference(CONFIGURATION, "loss", said(losses[0]), said(losses[1]), 0.85, "", ("wrong_loss",), (FORWARD,))
    for name, likelihood, causes, acts in (
        ("loss_weights", 0.6, ("wrong_loss",), (FORWARD,)),
        ("jit_compile", 0.1, (), (FORWARD, BACKWARD, UPDATE)),
        ("run_eagerly", 0.05, (), (FORWARD, BACKWARD, UPDATE)),
    ):
        mine, yours = (entry(run, "compile", name) for run in (good, bad))
        if mine != yours:
            yield Difference(CONFIGURATION, name, said(mine), said(yours), likelihood, "", causes, acts)
    for name in ("precision", "floatx"):
        mine, yours = (entry(run, name) for run in (good, bad))
        if mine != yours:
            yield Difference(
                CONFIGURATION, name, said(mine), said(yours), 0.45, "", ("update_rounding",), (START, FORWARD)
            )


def _batches(good: Run, bad: Run) -> Iterator[Difference]:
    sizes = [size for run in (good, bad) if (size := _batch_size(run))]
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        smaller = sizes[1] < sizes[0]
        yield Difference(
            CONFIGURATION,
            "batch_size",
            said(sizes[0]),
            said(sizes[1]),
            saturating(abs(math.log2(sizes[1] / sizes[0])), 0.35),
            f"BAD makes {sizes[0] / sizes[1]:.3g} times as many updates from the same data.",
            ("batch_size_too_small",) if smaller else ("batch_size_too_large", "too_few_updates"),
            (FORWARD,),
            (f"Train with batches of {sizes[0]}, or scale the learning rate with the batch.",),
        )
    for name, likelihood, causes in (
        ("class_weight", 0.6, ("class_imbalance",)),
        ("sample_weight", 0.5, ("sample_weights_zero",)),
        ("steps_per_epoch", 0.2, ("too_few_updates",)),
        ("initial_epoch", 0.2, ()),
    ):
        mine, yours = (entry(run, "fit", name) for run in (good, bad))
        if mine != yours:
            acts = (FORWARD,) if "weight" in name else (NOWHERE,)
            yield Difference(CONFIGURATION, f"fit.{name}", said(mine), said(yours), likelihood, "", causes, acts)
    trained = [int(run.steps[-1, 1] - run.steps[0, 0] + 1) if len(run) else 0 for run in (good, bad)]
    if all(trained) and trained[0] != trained[1]:
        fewer = trained[1] < trained[0]
        yield Difference(
            CONFIGURATION,
            "steps",
            f"{trained[0]:,}",
            f"{trained[1]:,}",
            saturating(math.log2(trained[0] / trained[1]), 0.35) if fewer else 0.03,
            "BAD trained for fewer steps." if fewer else "BAD trained for more steps.",
            ("too_few_updates",) if fewer else ("overfitting",),
            (NOWHERE,),
        )


def _batch_size(run: Run) -> int | None:
    given = entry(run, "fit", "batch_size")
    if isinstance(given, int):
        return given
    seen = run.data.get("train", {}).get("batch_size")
    return int(seen[1]) if isinstance(seen, list) and len(seen) == 2 else None


def _other_arguments(good: Run, bad: Run) -> Iterator[Difference]:
    mine, yours = (entry(run, "fit") or {} for run in (good, bad))
    callbacks = [_named(each.get("callbacks")) for each in (mine, yours)]
    if callbacks[0] != callbacks[1]:
        words = [said(each) for each in callbacks]
        yield Difference(CONFIGURATION, "fit.callbacks", words[0], words[1], 0.2, "", (), (UPDATE, NOWHERE))
    for name in dict.fromkeys((*mine, *yours)):
        if name not in QUIET and mine.get(name) != yours.get(name):
            yield Difference(
                CONFIGURATION, f"fit.{name}", said(mine.get(name)), said(yours.get(name)), 0.15, "", (), (NOWHERE,)
            )


def _named(callbacks: Any) -> Any:
    return None if callbacks in (None, []) else callbacks


def _seed(good: Run, bad: Run) -> Iterator[Difference]:
    seeds = [entry(run, "seed") for run in (good, bad)]
    digests = [entry(run, "weights_digest") for run in (good, bad)]
    if seeds[0] != seeds[1]:
        yield Difference(
            CONFIGURATION,
            "seed",
            said(seeds[0]),
            said(seeds[1]),
            0.1,
            "Other first weights and another order of the data. A result that hangs on the seed was luck.",
            ("bad_init",),
            (START, FORWARD),
            ("Train GOOD with a second seed, and give it too: trainrt compare GOOD BAD --good GOOD2.",),
        )
    elif None not in digests and digests[0] != digests[1] and seeds[0] is not None:
        yield Difference(
            CONFIGURATION,
            "first weights",
            str(digests[0]),
            str(digests[1]),
            0.35,
            "The seed is the same and the first weights are not: other initialisers, weights that were loaded, or a "
            "model that draws random numbers in another order.",
            ("bad_init",),
            (START,),
        )
    elif None not in digests and digests[0] != digests[1]:
        yield Difference(
            CONFIGURATION,
            "first weights",
            str(digests[0]),
            str(digests[1]),
            0.1,
            "No seed was set, so every run begins elsewhere.",
            ("bad_init",),
            (START,),
            ("keras.utils.set_random_seed(1) before the model is made.",),
        )
