"""Who ended a training early: `model.stop_training` is an attribute that anybody may set, and keeps no name."""

from __future__ import annotations

import types
from collections.abc import Iterable

import keras


def stoppers(callbacks: Iterable[keras.callbacks.Callback]) -> list[str]:
    """The classes of the callbacks whose code sets `stop_training`, but for those that know that they did not."""
    known = dict.fromkeys(type(c).__name__ for c in callbacks if _stops(c) and getattr(c, "stopped_epoch", True))
    return list(known)


def _stops(callback: keras.callbacks.Callback) -> bool:
    own = [member for kind in type(callback).__mro__ for member in vars(kind).values()]
    return any(_names(getattr(member, "__code__", None)) for member in (*own, *vars(callback).values()))


def _names(code: types.CodeType | None) -> bool:
    """Whether code, or a function inside it, says `stop_training`."""
    if code is None:
        return False
    inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return "stop_training" in (*code.co_names, *code.co_consts) or any(map(_names, inner))
