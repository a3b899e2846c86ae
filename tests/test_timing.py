"""Where the time of a training went is told truly: by a clock that the test sets, and on real runs."""

import json
import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import trainrt
from trainrt.device import timing
from trainrt.device.retracing import Retracing
from trainrt.device.timing import Timing
from trainrt.loop import step
from trainrt.loop.step import Step
from trainrt.record.bits import digests_of
from trainrt.update import native, native_ops


def model_of(**compiled):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(4)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), **compiled)
    return model


def data(rows=256):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 16)).astype("float32")
    return x, x[:, :4].argmax(axis=1)


def told(history):
    content = history.run.document("timing")
    json.dumps(content, allow_nan=False)
    return content


def test_parts_add_up_to_the_wall_time_and_nothing_counts_twice():
    clock = Timing()
    with clock.of("callbacks"):
        time.sleep(0.02)
        with clock.of("writing"):
            time.sleep(0.03)
    content = clock.told()
    assert sum(content["seconds"].values()) == pytest.approx(content["wall_s"], rel=1e-6)
    assert content["seconds"]["writing"] >= 0.03
    assert 0.02 <= content["seconds"]["callbacks"] < content["wall_s"] - 0.03 + 1e-3


def test_steps_and_waits_are_those_of_the_clock_in_the_loop():
    clock = Timing()
    first = clock.call(0, 1, 0.0, 5.0, np.array([[1.0, 5.0]]))
    assert first.tolist() == [[5.0, 1.0, 0.0]]
    # Three steps: the second batch is late by 2, the third was there before the step before it was done.
    times = clock.call(1, 3, 6.0, 16.0, np.array([[6.5, 8.0], [10.0, 13.0], [12.0, 15.0]]))
    np.testing.assert_allclose(times, [[2.0, 0.5, 1.0], [5.0, 2.0, 0.0], [2.0, 0.0, 0.0]])
    assert clock.seconds["first_call"] == 5.0
    assert clock.seconds["input"] == pytest.approx(2.5)
    assert clock.seconds["step"] == pytest.approx(7.5)
    gathered = Timing().call(4, 2, 20.0, 22.0, np.array([[0.0, 21.0], [0.0, 22.0]]))
    assert np.isnan(gathered[:, 1]).all(), "what the loop gathers by itself is not waited for"
    unknown = clock.call(6, 4, 30.0, 32.0, None)
    np.testing.assert_allclose(unknown[:, 0], 0.5)


@pytest.mark.parametrize("own", [False, True])
def test_short_steps_are_clocked_in_one_call_of_many_and_the_waits_of_the_others_estimated(monkeypatch, own):
    monkeypatch.setattr(timing, "SPARED_AFTER_S", 0.0)
    clock, now, clocked = Timing(), 0.0, []
    clock.clock_s = 2e-6
    short = clock.clock_s / timing.CLOCK_SHARE / 2
    for number in range(4 * timing.ONE_IN):
        ends = now + short * np.arange(1, 9)
        rows = np.stack([ends - 0.75 * short, ends], axis=1)  # a quarter of each step is a wait
        clocked.append(clock.clocks)
        # A step that notes its times by itself goes on to say when it was done.
        spared = np.stack([np.zeros(8), ends], axis=1) if own else None
        times = clock.call(8 * number, 8, now, ends[-1], rows if clocked[-1] else spared)
        np.testing.assert_allclose(times[:, :2], [[short, 0.25 * short]] * 8, rtol=1e-6)
        now = ends[-1]
    assert clocked[:2] == [True, True]
    assert sum(clocked[8:]) == 3
    parts = clock.seconds
    assert parts["first_call"] == pytest.approx(16 * short), "the first call of each loop compiles it"
    assert parts["input"] == pytest.approx(0.25 * (now - 16 * short))
    assert clock.told()["input_known"]


def test_steps_that_take_longer_are_clocked_each(monkeypatch):
    monkeypatch.setattr(timing, "SPARED_AFTER_S", 0.0)
    clock = Timing()
    clock.clock_s = 2e-6
    long = clock.clock_s / timing.CLOCK_SHARE * 1.5
    for number in range(50):
        assert clock.clocks
        clock.call(number, 1, number * long, (number + 1) * long, np.array([[number * long, (number + 1) * long]]))


def test_a_loop_without_a_clock_trains_the_same_bits(monkeypatch):
    seen, runs = [], []
    run = Step.run
    monkeypatch.setattr(Step, "run", lambda self, *given: (seen.append(given[-1]), run(self, *given))[1])
    for after in (1e9, 0.0):
        monkeypatch.setattr(timing, "SPARED_AFTER_S", after)
        monkeypatch.setattr(Step, "clock_s", 1.0)  # every step is short
        dataset = tf.data.Dataset.from_tensor_slices(data(640)).batch(8)
        model = model_of()
        history = trainrt.fit(model, dataset, verbose=0, epochs=12, shuffle=False)
        runs.append((model.get_weights(), history.run.scalar("loss")))
        assert told(history)["input_known"]
        assert not np.isnan(history.run.scalar("input_wait_s")).any()
    assert set(seen) == {True, False}
    for one, other in zip(*(weights for weights, _ in runs), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(runs[0][1], runs[1][1])


def test_straggling_steps_are_told_with_their_numbers():
    clock = Timing()
    done = np.cumsum(np.full(200, 0.01))
    for i in (120, 150):
        done[i:] += 0.5 * (i - 100) / 10
    clock.call(0, 1, 0.0, 0.0, None)
    for start in range(0, 200, 50):
        begun = done[start - 1] if start else 0.0
        rows = np.stack([np.zeros(50), done[start : start + 50]], axis=1)
        clock.call(1 + start, 50, begun, done[start + 49], rows)
    stragglers = clock.told()["stragglers"]
    assert stragglers["count"] == 2
    assert [worst["step"] for worst in stragglers["worst"]] == [151, 121]
    assert stragglers["excess_s"] == pytest.approx(3.5, rel=1e-6)


@pytest.mark.parametrize("way", ["arrays", "dataset", "eager", "every third"])
def test_a_real_run_tells_its_steps(way):
    x, y = data()
    keywords = {"observe": 3} if way == "every third" else {}
    arrays = (tf.data.Dataset.from_tensor_slices((x, y)).batch(8),) if way == "dataset" else (x, y)
    keywords |= {"shuffle": False} if way == "dataset" else {"batch_size": 8}
    history = trainrt.fit(model_of(run_eagerly=way == "eager"), *arrays, verbose=0, epochs=2, **keywords)
    content = told(history)
    assert content["steps"] == 64
    assert content["input_known"] == (way in ("dataset", "eager"))
    assert content["pipeline"] == (["Batch", "TensorSlice"] if way == "dataset" else [])
    step_s, wait_s = history.run.scalar("step_s"), history.run.scalar("input_wait_s")
    assert (step_s > 0).all()
    assert np.isnan(wait_s).all() or (wait_s <= step_s).all()
    assert np.isnan(wait_s).all() == (way not in ("dataset", "eager"))
    assert sum(content["seconds"].values()) == pytest.approx(content["wall_s"], rel=1e-6)


@pytest.mark.parametrize("way", ["arrays", "dataset"])
@pytest.mark.parametrize(
    "asked",
    [{}, {"observe": 3}, {"digests": 1}, {"digests": 4, "observe": 2}, {"on_nonfinite": "skip"}, {"trace": (10, 12)}],
    ids=str,
)
def test_the_record_is_the_same_whether_a_step_notes_its_times_or_the_loop_or_nobody(way, asked, monkeypatch):
    x, y = data()
    seen = []
    for clock, own in ((True, True), (True, False), (False, False)):
        keras.backend.clear_session()  # so that names are alike
        monkeypatch.setattr(step, "CLOCK", clock)
        monkeypatch.setattr(native_ops, "rows_here", lambda own=own: own and native.load() is not None)
        arrays = (tf.data.Dataset.from_tensor_slices((x, y)).batch(8),) if way == "dataset" else (x, y)
        keywords = {"shuffle": False} if way == "dataset" else {"batch_size": 8}
        history = trainrt.fit(model_of(), *arrays, verbose=0, epochs=2, **keywords, **asked)
        run = history.run
        names = [name for name in run.roster.scalars if name not in ("step_s", "input_wait_s", "between_s")]
        values = [run[name] for name in ("gradient_rms", "update_ratio")] + [run.scalar(name) for name in names]
        seen.append((values, digests_of(run)))
        if clock:
            assert (run.scalar("step_s") > 0).all()
            assert np.isnan(run.scalar("input_wait_s")).all() == (way == "arrays")
    for values, digests in seen[1:]:
        assert digests == seen[0][1]
        assert digests or "digests" not in asked
        for one, other in zip(values, seen[0][0], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.skipif(native.load() is None, reason=str(native.status().reason))
def test_every_step_of_gathered_batches_has_a_time_of_its_own():
    x, y = data()
    history = trainrt.fit(model_of(), x, y, batch_size=8, verbose=0, epochs=4)
    step_s = history.run.scalar("step_s")
    assert len(step_s) == 128
    assert len(np.unique(step_s)) > 64


def test_waiting_for_a_slow_input_counts_as_input():
    x, y = data(64)
    delay = 0.01

    def slow(*row):
        time.sleep(delay)
        return row

    def load(a, b):
        a, b = tf.numpy_function(slow, (a, b), (tf.float32, tf.int64))
        return tf.ensure_shape(a, [8, 16]), tf.ensure_shape(b, [8])

    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8, drop_remainder=True).map(load)
    history = trainrt.fit(model_of(), dataset, epochs=3, verbose=0, shuffle=False)
    content = told(history)
    assert content["seconds"]["input"] > 0.6 * delay * (24 - 1)
    assert content["pipeline"] == ["Map", "Batch", "TensorSlice"]


class Slow(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        time.sleep(0.03)


class Quick(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        pass


def test_callbacks_count_as_callbacks_and_the_slow_one_is_named():
    content = told(trainrt.fit(model_of(), *data(256), batch_size=8, verbose=0, callbacks=[Quick(), Slow()]))
    assert content["seconds"]["callbacks"] > 32 * 0.03
    assert max(content["callbacks"], key=content["callbacks"].get) == "Slow.on_train_batch_end"


def test_validation_counts_as_validation_and_compiling_as_the_first_call():
    x, y = data(64)
    content = told(trainrt.fit(model_of(), x, y, validation_data=(x, y), verbose=0))
    assert content["seconds"]["validation"] > 0
    assert content["seconds"]["first_call"] > 0


def test_nothing_is_timed_or_watched_when_nothing_is_observed():
    before = threading.active_count()
    names = []

    class Threads(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            names.extend(thread.name for thread in threading.enumerate())

    history = trainrt.fit(model_of(), *data(64), verbose=0, observe=False, callbacks=[Threads()])
    assert history.run.document("timing") == {}
    assert history.run.document("telemetry") == {}
    assert "trainrt-telemetry" not in names
    assert threading.active_count() <= before


def test_kinds_of_data_are_told():
    assert timing.kind(np.zeros(3)) == "arrays"
    assert timing.kind(tf.data.Dataset.range(3)) == "tf.data"
    assert timing.kind(x for x in ()) == "generator"


# ----------------------------------------------------------------------------------------------------------- retracing


def test_a_function_that_is_traced_again_is_told_with_its_argument():
    @tf.function
    def score(rows, factor):
        return tf.reduce_sum(rows) * factor

    notes = Retracing(lambda: 7)
    with notes.watch():
        for size in (1, 2, 3):
            score(tf.zeros([size, 4]), 1.0)
    (note,) = notes.told()
    assert note["name"].endswith("score")
    assert note["traces"] == 3
    assert note["steps"] == [7, 7, 7]
    assert set(note["arguments"]) == {"rows"}
    assert "(2, 4)" in note["arguments"]["rows"][1]
    score(tf.zeros([9, 4]), 1.0)
    assert notes.told()[0]["traces"] == 3, "nothing is noted outside of the context"


def test_a_healthy_run_traces_nothing_again():
    x, y = data(100)  # the last batch is smaller
    history = trainrt.fit(model_of(), x, y, batch_size=8, epochs=3, validation_data=(x, y), verbose=0)
    assert [note for note in told(history)["retraced"] if note["traces"] > 3] == []
