"""Who listens to batches is called at each; a call takes about as long as it should."""

import keras
import pytest

from trainrt.loop.pace import Pace, listens_to_batches

callbacks = keras.callbacks


def _listens(*given) -> bool:
    return listens_to_batches(callbacks.CallbackList(list(given), add_history=True, add_progbar=True))


class OnBatchEnd(callbacks.Callback):
    def on_batch_end(self, batch, logs=None):
        pass


class OnTrainBatchBegin(callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        pass


class OnEpochEnd(callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        pass


@pytest.mark.parametrize(
    "callback",
    [
        OnBatchEnd(),
        OnTrainBatchBegin(),
        callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: None),
        callbacks.TerminateOnNaN(),
        callbacks.ModelCheckpoint("a.keras", save_freq=3),
    ],
)
def test_a_batch_hook_is_heard(callback):
    assert _listens(callback)


@pytest.mark.parametrize(
    "callback",
    [
        OnEpochEnd(),
        callbacks.EarlyStopping(),
        callbacks.ReduceLROnPlateau(),
        callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: None),
        callbacks.ModelCheckpoint("a.keras"),
        callbacks.CSVLogger("a.csv"),
    ],
)
def test_epoch_hooks_and_the_progress_bar_leave_the_loop_in_the_graph(callback):
    assert not _listens(callback)


@pytest.mark.parametrize("step_s", [1e-5, 1e-3, 0.03, 2.0])
def test_calls_come_to_last_about_as_long_as_they_should(step_s):
    pace = Pace()
    for _ in range(20):
        pace.took(pace.steps, pace.steps * step_s)
    assert abs(pace.steps - max(1, Pace.CALL_S / step_s)) <= 1


def test_workers_that_settle_after_each_call_make_longer_ones():
    pace = Pace(together=True)
    for _ in range(20):
        pace.took(pace.steps, pace.steps * 0.03)
    assert abs(pace.steps * 0.03 - Pace.TOGETHER_S) <= 0.03


def test_a_slow_call_shortens_the_next():
    pace = Pace()
    for _ in range(10):
        pace.took(pace.steps, pace.steps * 1e-4)
    pace.took(pace.steps, pace.steps * 1e-2)
    assert pace.steps * 1e-2 <= Pace.CALL_S
