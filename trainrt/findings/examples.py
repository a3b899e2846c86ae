"""Runs for the examples in the rules' help pages: one that learnt, one that is stuck, with what a page is about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trainrt.record.run import Run
from trainrt.record.vocabulary import Document, Epoch, Parameter

STEPS = 200
INPUT = {"name": "", "dtype": "float32", "min": -3.0, "max": 3.0, "nan_share": 0.0, "inf_share": 0.0, "zero_share": 0.0}
INPUT |= {"mean": [0.0], "std": [1.0], "shape": [None, 64]}
TARGET = {"name": "", "dtype": "int64", "min": 0.0, "max": 1.0, "nan_share": 0.0, "inf_share": 0.0, "zero_share": 0.5}
TARGET |= {"mean": [0.5], "std": [0.5], "labels": {"kind": "binary", "classes": 2, "counts": {"0": 500, "1": 500}}}


def learning(**given: Any) -> Run:
    """A run whose loss fell and whose accuracy rose, on the training and the validation data."""
    return _example(np.geomspace(0.69, 0.02, STEPS), 0.99, given)


def stuck(**given: Any) -> Run:
    """A run that stays at the loss and the accuracy of a constant prediction."""
    return _example(np.full(STEPS, 0.69), 0.5, given)


def _example(loss: np.ndarray, accuracy: float, given: dict[str, Any]) -> Run:
    """Of `given`: `inputs`, `targets`, `validation`, `data`: more of the data passport; `loss`: name of the compiled
    loss; `layers`, `optimizer`, `fit`, `logs`: of the passport and the last epoch; the rest is of `Run.synthetic`."""
    inputs, target = {**INPUT, **given.pop("inputs", {})}, {**TARGET, **given.pop("targets", {})}
    train: dict[str, Any] = {"source": "arrays", "rows": 1000, "batches": 50, "shuffle": True}
    train |= {"inputs": [inputs], "targets": [target], "weights": [], **given.pop("train", {})}
    data = {"train": train, "validation": {**train, "rows": 300, **given.pop("validation", {})}}
    data |= given.pop("data", {})
    regression = (target.get("labels") or {}).get("kind") == "continuous"
    name = given.pop("loss", "binary_crossentropy")
    logs: Mapping[str, float] = {"loss": float(loss[-1]), "accuracy": accuracy}
    if regression:
        unexplained = float(np.square(target["std"]).mean()) * (0.02 if accuracy > 0.9 else 1.1)
        logs = {"loss": unexplained}
    logs = {**logs, **{f"val_{key}": value for key, value in logs.items()}, **given.pop("logs", {})}
    early = {**logs, **given.pop("early", {})}
    environment = {
        "compile": {"loss": name},
        "optimizer": {
            "class": "Adam",
            "config": {"learning_rate": 1e-3, "epsilon": 1e-7},
            **given.pop("optimizer", {}),
        },
        "fit": {"epochs": 4, **given.pop("fit", {})},
        "model": {"layers": given.pop("layers", [])},
    }
    epochs = [Epoch(i, (i + 1) * STEPS // 4 - 1, logs if i else early) for i in range(4)]
    kernels = [Parameter(f"{n}/kernel", n, (16, 16), "float32") for n in ("first", "middle", "last")]
    return Run.synthetic(
        given.pop("steps", STEPS),
        given.pop("parameters", kernels),
        loss=given.pop("losses", loss),
        environment=environment,
        epochs=epochs,
        documents=[Document("data", STEPS - 1, data), *given.pop("documents", [])],
        **given,
    )
