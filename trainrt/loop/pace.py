"""How many steps to run in one call: as many as fit a moment, unless somebody listens to each of them."""

from __future__ import annotations

import keras

_HOOKS = ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end")


def listens_to_batches(callbacks: keras.callbacks.CallbackList) -> bool:
    """Whether a callback of the user's has to be called at every batch.

    Keras's progress bar only displays, and a checkpoint that is saved once an epoch does nothing in between: for these
    a call now and then is enough.
    """
    return any(_listens(callback) for callback in callbacks.callbacks)


def _listens(callback: keras.callbacks.Callback) -> bool:
    kind = type(callback)
    if kind is keras.callbacks.ProgbarLogger:
        return False
    if kind in (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore) and callback.save_freq == "epoch":
        return False
    return any(
        name in vars(callback) or getattr(kind, name, None) is not getattr(keras.callbacks.Callback, name)
        for name in _HOOKS
    )


class Pace:
    """How many steps to run in one call, so that a call takes about `CALL_S`.

    Long enough to pay the overhead of the call, short enough for Ctrl-C, the progress bar and `stop_training`.

    Args:
      together: Whether workers settle after each call what comes next. They wait for each other there, some 10 to 30 ms
        for two on one machine, and their calls take about `TOGETHER_S`.
    """

    CALL_S, TOGETHER_S = 0.1, 0.5
    GROWTH = 8

    def __init__(self, together: bool = False):
        self._call_s = self.TOGETHER_S if together else self.CALL_S
        self._calls = 0
        self.steps = 1

    def took(self, steps: int, seconds: float) -> None:
        self._calls += 1
        if self._calls == 1 or not steps:  # the first call also compiles
            return
        fitting = int(self._call_s * steps / max(seconds, 1e-9))
        self.steps = max(1, min(fitting, self.steps * self.GROWTH))
