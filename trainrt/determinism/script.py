"""Runs a user's training script with its calls of `fit` taken over: what `check`, `prove` and `bench` stand on."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras

import trainrt
from trainrt import doors
from trainrt.determinism.prove import ScriptFailed


class Enough(BaseException):
    """Ends the script: what was wanted of it has been seen. No `except Exception` of the script's stops it."""


def run(script: str | Path, arguments: Sequence[str], fit: Callable[..., Any]) -> None:
    """Runs a script as `python script arguments` would, every `model.fit` and `trainrt.fit` in it being `fit`.

    Args:
      fit: Called as `fit(model, *arguments, **keywords)`, the arguments being those of `trainrt.fit`.

    Raises:
      ScriptFailed: It failed, it exited with an error, or it never called `fit`.
    """
    path = Path(script)
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
            raise ScriptFailed(f"{script} ended itself: {ended!r}") from ended
    except Exception as error:
        raise ScriptFailed(f"{script} failed:\n{_as_its_own(error, path)}") from error
    finally:
        owner.fit, trainrt.fit, sys.argv = kept[:3]
        sys.path[:] = kept[3]
    if not calls:
        raise ScriptFailed(
            f"{script} called neither model.fit nor trainrt.fit, and nothing else is looked at: neither train_on_batch "
            "nor a loop of its own. Train by one of them, with the loop's step as the model's train_step."
        )


def _as_its_own(error: Exception, script: Path) -> str:
    """The error as the script alone would have shown it: its lines, those of files beside it, and the last place."""
    frames = list(traceback.extract_tb(error.__traceback__))
    own = [frame for frame in frames if _is_beside(frame.filename, script)]
    shown = own + frames[-1:] if own and own[-1] is not frames[-1] else own
    return "".join([*traceback.format_list(shown), *traceback.format_exception_only(error)]).rstrip()


def _is_beside(file: str, script: Path) -> bool:
    """Whether a file of code lies in the script's folder or below, and is not of a package that is installed there."""
    path = Path(file).resolve()
    return path.is_file() and path.is_relative_to(script.parent.resolve()) and "site-packages" not in path.parts


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
