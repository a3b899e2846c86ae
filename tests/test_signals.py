"""What asks a training to end lets it save and close its record first, and nothing is lost by it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

import trainrt
from trainrt.endurance.signals import Signals, Terminated

ASKS = {signal.SIGTERM: Terminated, signal.SIGINT: KeyboardInterrupt}
CHILD = Path(__file__).with_name("endurance_child.py")


@pytest.fixture(autouse=True)
def interruptible():
    """A shell starts what runs in its background with SIGINT ignored, and trainrt leaves it at that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def fit(callbacks=(), epochs=3, **keywords):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input([4]), keras.layers.Dropout(0.5), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
    history = trainrt.fit(model, x, x[:, :1], 4, epochs, 0, list(callbacks), **keywords)
    return history, [np.asarray(v).tobytes() for v in [*model.variables, *model.optimizer.variables]]


def asks(number, at, hook="on_train_batch_end"):
    """A callback that gets the process a signal when its hook is called for the `at`-th time."""
    calls = iter(range(1, 1000))

    def called(self, *args, **kwargs):
        if next(calls) == at:
            os.kill(os.getpid(), number)
            for _ in range(100):  # the handler runs between two lines of Python
                pass

    return type("Asks", (keras.callbacks.Callback,), {hook: called})()


@pytest.mark.parametrize("number", ASKS, ids=lambda n: n.name)
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_test_begin", "on_epoch_end"])
def test_a_training_that_was_asked_to_end_goes_on_with_the_same_bits(tmp_path, number, hook):
    x = np.ones((4, 4), "float32")
    place = {"checkpoint": tmp_path / "c", "logdir": tmp_path / "l", "validation_data": (x, x[:, :1])}
    at = 13 if hook == "on_train_batch_end" else 2
    with pytest.raises(ASKS[number]):
        fit([asks(number, at, hook)], **place)
    assert trainrt.Run.open(tmp_path / "l").end["how"] == "interrupted"
    resumed, bits = fit(**place)
    whole, same = fit(validation_data=(x, x[:, :1]))
    assert bits == same
    assert resumed.history == whole.history
    assert resumed.run.steps[:, 0].tolist() == list(range(30))


@pytest.mark.parametrize("number", ASKS, ids=lambda n: n.name)
def test_without_checkpoints_the_step_is_finished_and_the_record_closed_with_the_cause(tmp_path, number):
    with pytest.raises(ASKS[number]):
        fit([asks(number, 5)], logdir=tmp_path)
    run = trainrt.Run.open(tmp_path)
    assert (run.end["how"], run.end["detail"]) == ("interrupted", number.name)
    assert run.steps[-1, 1] == 4
    assert run.problems == []


@pytest.mark.parametrize("where", ["callback", "data"])
def test_an_error_of_the_user_loses_no_record(tmp_path, where):
    def batches():
        for number in range(9):
            if where == "data" and number == 6:
                raise LookupError("the user's")
            x = np.ones((4, 4), "float32")
            yield x, x[:, :1]

    def broken(self, batch, logs=None):
        if where == "callback" and batch == 5:
            raise LookupError("the user's")

    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    callback = type("Broken", (keras.callbacks.Callback,), {"on_train_batch_end": broken})()
    with pytest.raises(Exception, match="the user's"):
        trainrt.fit(model, batches(), shuffle=False, verbose=0, callbacks=[callback], logdir=tmp_path)
    run = trainrt.Run.open(tmp_path)
    assert run.end["how"] == "exception"
    assert "the user's" in run.end["detail"]
    assert run.steps[-1, 1] == 5


def test_handlers_of_the_user_are_left_alone_and_ours_taken_away_again(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("the user's"))
    try:
        fit([asks(signal.SIGTERM, 3)], epochs=1, logdir=tmp_path)
        assert seen == ["the user's"]
    finally:
        signal.signal(signal.SIGTERM, before)
    fit(epochs=1, logdir=tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_where_nothing_is_kept_nothing_is_caught():
    with Signals(enabled=False) as signals:
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signals.came is None


LONG_STEP = """
import sys, threading, time, keras, numpy as np, tensorflow as tf, trainrt

def wait():
    if threading.current_thread() is not threading.main_thread():  # which waits for TensorFlow
        print("in a step", flush=True)
        time.sleep(100)
    return np.float32(0)

class Waits(keras.layers.Layer):
    def call(self, x):
        return x + tf.ensure_shape(tf.numpy_function(wait, [], tf.float32), [])

model = keras.Sequential([keras.layers.Input([2]), Waits(), keras.layers.Dense(1)])
model.compile("sgd", "mse")
trainrt.fit(model, np.ones((8, 2)), np.ones((8, 1)), verbose=0, logdir=sys.argv[1])
"""


def test_a_second_ctrl_c_ends_the_process_at_once_in_the_middle_of_a_step_too(tmp_path):
    command = [sys.executable, "-c", LONG_STEP, str(tmp_path)]
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=surroundings, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "in a step\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (-signal.SIGINT, 128 + signal.SIGINT)
    finally:
        process.kill()
        process.communicate()


FORKS = """
import os, signal
from trainrt.endurance.signals import Impatience

signal.signal(signal.SIGINT, lambda *_: None)
watching = Impatience()
watching.watch()
os.kill(os.getpid(), signal.SIGINT)
if not (child := os.fork()):
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(0)
os.waitpid(child, 0)
watching.end()
print("ended")
"""


def test_what_reaches_a_forked_child_is_no_second_one():
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", FORKS], env=surroundings, capture_output=True, text=True, timeout=100)
    assert done.stdout == "ended\n", done.stderr


def started(tmp_path, *more):
    command = [sys.executable, str(CHILD), "arrays", str(tmp_path / "c"), str(tmp_path / "l"), str(tmp_path / "r")]
    surroundings = {**os.environ, "PYTHONPATH": str(Path(trainrt.__file__).parent.parent)}
    return subprocess.Popen([*command, *more], env=surroundings, stderr=subprocess.DEVNULL)


def until_saved(process, tmp_path, seconds=120):
    until = time.monotonic() + seconds
    while not list((tmp_path / "c").glob("*.index")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_the_exit_status_is_the_conventional_one(tmp_path, number, status):
    process = started(tmp_path, "7", "0.05")
    until_saved(process, tmp_path)
    process.send_signal(number)
    assert process.wait(60) == status
    assert trainrt.Run.open(tmp_path / "l").end["detail"] == number.name
