"""How BAD was asked to train otherwise than GOOD, and what each difference did as far as the record shows it.

An examiner is a function from two runs to differences. Where the record holds what a setting did (how much the clip
took, the share of a penalty in the loss, the learning rate of each step), that is what counts, not the setting.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trainrt.comparison.behaviour import level
from trainrt.comparison.difference import (
    BACKWARD,
    FORWARD,
    NOWHERE,
    START,
    UPDATE,
    Difference,
    said,
    saturating,
)
from trainrt.findings.series import percentile
from trainrt.record.run import Run

CONFIGURATION = "configuration"
EARLY = 50
"""Steps over which the beginnings of two runs are compared: later they are elsewhere."""

CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")
REGULARISERS = ("kernel_regularizer", "bias_regularizer", "activity_regularizer", "recurrent_regularizer")
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
    for examiner in (_clip, _optimizer, _regularisers, _model, _compiled, _batches, _other_arguments, _seed):
        yield from examiner(good, bad)


def _of(run: Run, *path: str) -> Any:
    value: Any = run.environment
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


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
    if _of(run, "fit", "clip") is not None:
        found.append(said(_of(run, "fit", "clip")))
    for name in CLIPS:
        if _of(run, "optimizer", "config", name) is not None:
            found.append(f"{name}={said(_of(run, 'optimizer', 'config', name))}")
    return ", ".join(found) or "none"


def _let_through(run: Run) -> float:
    """The share of the gradient that the clip leaves, in the median of the steps; of an optimizer's own clip, which is
    not recorded, what its threshold would leave of the recorded norms. Between two runs the smaller counts."""
    if _of(run, "fit", "clip") is not None:
        return level(run, "clip_scale")
    threshold = _of(run, "optimizer", "config", "global_clipnorm") or _of(run, "optimizer", "config", "clipnorm")
    if threshold:
        norm = level(run, "gradient_norm")
        return min(1.0, float(threshold) / norm) if norm > 0 else float("nan")
    if _of(run, "optimizer", "config", "clipvalue"):
        peak = level(run, "gradient_absmax")
        return min(1.0, float(_of(run, "optimizer", "config", "clipvalue")) / peak) if peak > 0 else float("nan")
    return 1.0


def _optimizer(good: Run, bad: Run) -> Iterator[Difference]:
    kinds = [_of(run, "optimizer", "class") for run in (good, bad)]
    configs = [_of(run, "optimizer", "config") or {} for run in (good, bad)]
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
            likelihood = _of_numbers(mine, yours, name)
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
    value = _of(run, "optimizer", "config", "learning_rate")
    if value is None and "learning_rate" in run.roster.scalars:
        value = percentile(run.scalar("learning_rate")[:1], 50)
    return said(value)


def _of_numbers(mine: Any, yours: Any, name: str) -> float:
    """How much two values of an option differ: of what remembers the past, by how long it does."""
    if isinstance(mine, bool) or isinstance(yours, bool) or not all(isinstance(v, (int, float)) for v in (mine, yours)):
        return 0.3
    a, b = float(mine), float(yours)
    if name in ("momentum", "beta_1", "beta_2", "rho", "ema_momentum"):
        a, b = 1 / max(1 - a, 1e-6), 1 / max(1 - b, 1e-6)
    return saturating(abs(math.log10(b / a)), 0.8) if a > 0 and b > 0 else 0.4


def _layers(run: Run) -> list[Mapping[str, Any]]:
    layers = _of(run, "model", "layers")
    return [layer for layer in layers if isinstance(layer, Mapping)] if isinstance(layers, list) else []


def _pairs(good: Run, bad: Run) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]] | None:
    """The layers of both side by side; None where the models are made of other layers. Keras numbers the names of
    layers a process through, so that they do not tell."""
    mine, yours = _layers(good), _layers(bad)
    if [layer.get("class") for layer in mine] != [layer.get("class") for layer in yours]:
        return None
    return list(zip(mine, yours, strict=True))


def _regularisers(good: Run, bad: Run) -> Iterator[Difference]:
    words = [_penalties(run) for run in (good, bad)]
    if words[0] == words[1]:
        return
    shares = [_share_of_penalty(run) for run in (good, bad)]
    more = shares[1] > shares[0]
    yield Difference(
        CONFIGURATION,
        "regularizer",
        "; ".join(words[0]) or "none",
        "; ".join(words[1]) or "none",
        max(min(abs(shares[1] - shares[0]) * 1.3, 0.97), 0.1),
        f"Penalties are {shares[1]:.0%} of BAD's loss at the start, and {shares[0]:.0%} of GOOD's.",
        ("over_regularised",) if more else ("overfitting",),
        (FORWARD, BACKWARD),
        (f"Weaken it: GOOD has {'; '.join(words[0]) or 'none'}.",),
        evidence={"share_of_loss": {"good": shares[0], "bad": shares[1]}},
    )


def _penalties(run: Run) -> list[str]:
    found = []
    for index, layer in enumerate(_layers(run)):
        config = layer.get("config")
        for name in REGULARISERS:
            value = config.get(name) if isinstance(config, Mapping) else None
            if value is not None:
                found.append(f"{name} {said(value)} in layer {index} ({layer.get('class')})")
    return found


def _share_of_penalty(run: Run) -> float:
    """The largest that it has at the start, where it is largest, or in the first steps."""
    shares = [0.0]
    for steps in (1, EARLY):
        loss = level(run, "loss", steps)
        known = [level(run, n, steps) for n in ("regularization_loss", "added_loss") if n in run.roster.scalars]
        share = sum(known) / loss if known and loss > 0 else 0.0
        shares.append(share if math.isfinite(share) else 0.0)
    return max(shares)


def _trainable(size: Any) -> str:
    return f" ({size:,} trainable)" if isinstance(size, int) else ""


def _model(good: Run, bad: Run) -> Iterator[Difference]:
    pairs = _pairs(good, bad)
    sizes = [_of(run, "model", "trainable_parameters") for run in (good, bad)]
    if pairs is None:
        left, right = ([str(layer.get("class")) for layer in _layers(run)] for run in (good, bad))
        size = _of_numbers(sizes[0], sizes[1], "") if all(isinstance(s, int) for s in sizes) else 0.0
        if left or right:
            yield Difference(
                CONFIGURATION,
                "model.layers",
                _only_here(left, right) + _trainable(sizes[0]),
                _only_here(right, left) + _trainable(sizes[1]),
                max(0.6, size),
                "The models are made of other layers.",
                ("capacity",),
                (START, FORWARD),
            )
        return
    for index, (mine, yours) in enumerate(pairs):
        name = str(mine.get("name") or index)
        if mine.get("trainable") != yours.get("trainable") and mine.get("parameters"):
            total = _of(good, "model", "parameters") or 1
            frozen = not yours.get("trainable")
            yield Difference(
                CONFIGURATION,
                f"{name}.trainable",
                said(mine.get("trainable")),
                said(yours.get("trainable")),
                max(0.3, min(0.9, int(mine["parameters"]) / total)),
                f"{'Frozen in BAD' if frozen else 'Trained in BAD'}: {mine['parameters']:,} of {total:,} elements.",
                ("frozen_layers",) if frozen else ("overfitting",),
                (BACKWARD,),
            )
        if mine.get("dtype") != yours.get("dtype"):
            yield Difference(
                CONFIGURATION,
                f"{name}.dtype",
                said(mine.get("dtype")),
                said(yours.get("dtype")),
                0.4,
                "",
                ("update_rounding",),
                (FORWARD,),
            )
        a, b = mine.get("config"), yours.get("config")
        if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
            continue
        for key in dict.fromkeys((*a, *b)):
            if a.get(key) != b.get(key) and key not in (*REGULARISERS, "seed"):
                yield _of_layer(name, str(key), a.get(key), b.get(key))


def _of_layer(layer: str, key: str, mine: Any, yours: Any) -> Difference:
    likelihood = 0.35
    causes: tuple[str, ...] = ()
    acts: tuple[str, ...] = (FORWARD,)
    if key == "rate" and all(isinstance(v, (int, float)) for v in (mine, yours)):
        # What is kept counts: from 0.8 to 0.9 half of it goes.
        likelihood = saturating(abs(math.log2(max(1 - yours, 0.01) / max(1 - mine, 0.01))), 0.7)
        causes = ("dropout_too_high",) if yours > mine else ("overfitting",)
    elif "initializer" in key:
        likelihood, causes, acts = 0.55, ("bad_init",), (START,)
    elif "activation" in key:
        likelihood, causes = 0.6, ("hidden_activation", "wrong_output_activation")
    elif key in ("units", "filters", "kernel_size"):
        likelihood, causes, acts = 0.45, ("capacity",), (START, FORWARD)
    elif key in ("momentum", "epsilon"):
        causes = ("batchnorm_statistics",)
    return Difference(CONFIGURATION, f"{layer}.{key}", said(mine), said(yours), likelihood, "", causes, acts)


def _only_here(mine: list[str], yours: list[str]) -> str:
    rest = list(yours)
    own = [name for name in mine if not (name in rest and not rest.remove(name))]  # type: ignore[func-returns-value]
    return f"{len(mine)} layers" + (f", of them only here {', '.join(own[:6])}" if own else "")


def _compiled(good: Run, bad: Run) -> Iterator[Difference]:
    losses = [_of(run, "compile", "loss") for run in (good, bad)]
    if losses[0] != losses[1]:
        yield Difference(CONFIGURATION, "loss", said(losses[0]), said(losses[1]), 0.85, "", ("wrong_loss",), (FORWARD,))
    for name, likelihood, causes, acts in (
        ("loss_weights", 0.6, ("wrong_loss",), (FORWARD,)),
        ("jit_compile", 0.1, (), (FORWARD, BACKWARD, UPDATE)),
        ("run_eagerly", 0.05, (), (FORWARD, BACKWARD, UPDATE)),
    ):
        mine, yours = (_of(run, "compile", name) for run in (good, bad))
        if mine != yours:
            yield Difference(CONFIGURATION, name, said(mine), said(yours), likelihood, "", causes, acts)
    for name in ("precision", "floatx"):
        mine, yours = (_of(run, name) for run in (good, bad))
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
        mine, yours = (_of(run, "fit", name) for run in (good, bad))
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
    given = _of(run, "fit", "batch_size")
    if isinstance(given, int):
        return given
    seen = run.data.get("train", {}).get("batch_size")
    return int(seen[1]) if isinstance(seen, list) and len(seen) == 2 else None


def _other_arguments(good: Run, bad: Run) -> Iterator[Difference]:
    mine, yours = (_of(run, "fit") or {} for run in (good, bad))
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
    seeds = [_of(run, "seed") for run in (good, bad)]
    digests = [_of(run, "weights_digest") for run in (good, bad)]
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
