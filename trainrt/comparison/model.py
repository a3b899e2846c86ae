"""How BAD's model differs from GOOD's: its layers, what they are made with, and what penalties they add."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from trainrt.comparison.behaviour import level
from trainrt.comparison.difference import (
    BACKWARD,
    CONFIGURATION,
    EARLY,
    FORWARD,
    START,
    Difference,
    entry,
    far_apart,
    said,
    saturating,
)
from trainrt.record.run import Run

REGULARISERS = ("kernel_regularizer", "bias_regularizer", "activity_regularizer", "recurrent_regularizer")


def examine(good: Run, bad: Run) -> Iterator[Difference]:
    """All differences of the model, in no order."""
    yield from _regularisers(good, bad)
    yield from _model(good, bad)


def _layers(run: Run) -> list[Mapping[str, Any]]:
    layers = entry(run, "model", "layers")
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
    sizes = [entry(run, "model", "trainable_parameters") for run in (good, bad)]
    if pairs is None:
        left, right = ([str(layer.get("class")) for layer in _layers(run)] for run in (good, bad))
        size = far_apart(sizes[0], sizes[1], "") if all(isinstance(s, int) for s in sizes) else 0.0
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
            total = entry(good, "model", "parameters") or 1
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
