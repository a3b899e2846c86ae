"""`trainrt demo`: the same model on the same digits, once healthy and once strangled by its clip."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from trainrt.banners import without_banners
from trainrt.findings import Finding
from trainrt.findings.finding import shorten

EPOCHS = 8
CLIPS = {"healthy": 1.0, "stagnating": 1e-4}
"""Global norms. The gradients of this model have norms around 1, so the second lets a ten-thousandth through."""


def run(logdir: Path, epochs: int = EPOCHS) -> int:
    """Trains both runs, tells what was found in each, and how to look at them.

    Args:
      logdir: The runs are written under it, each under its name.
      epochs: Epochs of each run.

    Returns:
      The exit status: 0, or 2 when `logdir` cannot be written.
    """
    try:
        logdir.mkdir(parents=True, exist_ok=True)
        if not os.access(logdir, os.W_OK):
            raise PermissionError("no permission")
    except OSError as error:
        print(f"trainrt: {logdir} cannot be written: {error}. Name a directory: --logdir DIR.", file=sys.stderr)
        return 2
    print("Loading TensorFlow ...", flush=True)
    with without_banners():
        import keras

        from trainrt import digits, fit

    train, test = digits.load()
    for name, clip in CLIPS.items():
        keras.utils.set_random_seed(1)
        directory = logdir / name
        print(
            f"\n== {name}: SGD with momentum, clip={clip:g}, on {len(train[1])} digits, into {directory}\n", flush=True
        )
        history = fit(
            build(), *train, batch_size=32, epochs=epochs, validation_data=test, clip=clip, logdir=str(directory)
        )
        accuracy = history.history["val_accuracy"][-1]
        print(f"\n{name}: test accuracy {accuracy:.3f} after {epochs} epochs. {verdict(history.findings)}")
    print(
        "\nThe findings again, from the files alone:\n"
        f"  trainrt report {shlex.quote(str(directory))}\n"
        "Look at both runs:\n"
        f"  tensorboard --logdir {shlex.quote(str(logdir))}"
    )
    return 0


def verdict(findings: Sequence[Finding]) -> str:
    """What was found and where, in one sentence.

    >>> verdict([])
    'trainrt found nothing wrong.'
    """
    if not findings:
        return "trainrt found nothing wrong."
    first = findings[0]
    where = shorten(first.where) or "the run"
    return f"trainrt found {' or '.join(first.causes)} at {where}, from step {first.steps[0]} on."


def build():
    """A small convolutional classifier, compiled.

    Returns:
      A keras.Model from [N, 8, 8, 1] to [N, 10] logits.
    """
    import keras

    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="relu", name="conv"),
            keras.layers.Flatten(name="flatten"),
            keras.layers.Dense(64, activation="relu", name="hidden"),
            keras.layers.Dense(10, name="logits"),
        ],
        name="digits",
    )
    model.compile(
        optimizer=keras.optimizers.SGD(0.05, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model
