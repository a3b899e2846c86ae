"""Runs a user's training script with its calls of `fit` taken over: what `check`, `prove` and `bench` stand on."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras

import trainrt
from trainrt import doors


class Enough(BaseException):
    """Ends the script: what was wanted of it has been seen. No `except Exception` of the script's stops it."""


def run(script: str | Path, arguments: Sequence[str], fit: Callable[..., Any]) -> int:
    """Runs a script as `python script arguments` would, every `model.fit` and `trainrt.fit` in it being `fit`.

    Args:
      fit: Called as `fit(model, *arguments, **keywords)`, the arguments being those of `trainrt.fit`.

    Returns:
      How often it was called.

    Raises:
      FileNotFoundError: There is no such script.
    """
    path = Path(script)
    if not path.is_file():
        raise FileNotFoundError(f"A training script is a Python file. Received: {str(script)!r}, which does not exist.")
    calls = 0

    def taken(model: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return fit(model, *args, **kwargs)

    owner = doors.fit_owner()
    kept = owner.__dict__["fit"], trainrt.fit, sys.argv, list(sys.path)
    owner.fit, trainrt.fit = taken, taken
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        runpy.run_path(str(path), run_name="__main__")
    except Enough:
        pass
    except SystemExit as ended:
        if ended.code not in (None, 0):
            raise
    finally:
        owner.fit, trainrt.fit, sys.argv = kept[:3]
        sys.path[:] = kept[3]
    return calls


def limit(steps: int | None, epochs: int = 1) -> None:
    """No fit of this process runs more than so many epochs of so many steps; None: no limit."""
    if steps:
        keras.config.set_max_epochs(epochs)
        keras.config.set_max_steps_per_epoch(steps)


def named(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The positional arguments of a call of `fit` by their names."""
    return {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}


_POSITIONAL = (
    *("x", "y", "batch_size", "epochs", "verbose", "callbacks", "validation_split", "validation_data", "shuffle"),
    *("class_weight", "sample_weight", "initial_epoch", "steps_per_epoch", "validation_steps"),
    *("validation_batch_size", "validation_freq"),
)
