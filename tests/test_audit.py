"""The data passport tells what was trained on, whatever way it came, and changes nothing of the training."""

import contextlib
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import trainrt
from trainrt.loop import batches
from trainrt.passport import audit, survey
from trainrt.passport.tap import Tap

ROWS, BATCH = 479, 2  # 240 batches: more than are all looked at


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(ROWS, 4)).astype("float32"), rng.integers(0, 3, ROWS)


def trained(*arguments, epochs=1, **keywords):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = trainrt.fit(model, *arguments, epochs=epochs, verbose=0, **keywords)
    return history, [np.asarray(w) for w in model.get_weights()]


@pytest.fixture
def piped(monkeypatch):
    """Arrays go through Keras's pipeline, as those of large batches do."""
    monkeypatch.setattr(batches, "TOTAL_BYTES", 0)


def told_of_arrays(**keywords):
    return trained(*data(), batch_size=BATCH, **keywords)


def test_arrays_in_keras_pipeline_are_told_of_like_arrays_that_stay_on_the_device(monkeypatch):
    keywords = {"epochs": 3, "validation_data": data()}
    (resident, weights), calls = told_of_arrays(**keywords), []
    monkeypatch.setattr(batches, "TOTAL_BYTES", 0)
    monkeypatch.setattr(survey.Survey, "see", lambda self, *a, **k: calls.append(len(a)))
    history, others = told_of_arrays(validation_data=None, epochs=3)
    a, b = resident.run.data["train"], history.run.data["train"]
    assert not calls, "Python was called for a batch"
    for key in ("source", "batches", "rows", "batch_size", "seen", "duplicates", "order", "passes", "inputs"):
        assert a[key] == b[key], key
    assert a["targets"][0]["labels"]["counts"] == b["targets"][0]["labels"]["counts"]
    for left, right in zip(weights, others, strict=True):
        np.testing.assert_array_equal(left, right)


def test_the_order_is_told_without_another_order_being_drawn(piped):
    history, weights = told_of_arrays(epochs=4)
    unwatched, others = told_of_arrays(epochs=4, observe=False)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    stock = model.fit(*data(), batch_size=BATCH, epochs=4, verbose=0)
    assert history.history == unwatched.history == stock.history
    for left, right, third in zip(weights, others, model.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)
        np.testing.assert_array_equal(left, third)
    assert history.run.data["train"]["passes"] == [0, 1, 3]
    assert history.run.data["train"]["order"]["batches"] == -(-ROWS // BATCH)


def test_rows_that_are_not_shuffled_are_in_the_same_order_each_pass(piped):
    told = told_of_arrays(epochs=2, shuffle=False)[0].run.data["train"]
    assert told["order"]["inputs_repeat"]
    assert told["shuffle"] is False


def test_arrays_of_float64_are_told_of_as_they_are_fed(piped):
    x, y = data()
    told = trained(x.astype("float64"), y, batch_size=BATCH)[0].run.data["train"]["inputs"][0]
    assert (told["dtype"], told["max"]) == ("float32", float(x.max()))


@pytest.mark.parametrize("known", [True, False])
def test_of_a_long_pipeline_some_batches_are_looked_at_and_all_are_counted(known):
    x, y = data()
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    assert ROWS // BATCH > audit.FEW
    if not known:
        dataset = dataset.filter(lambda *_: True)
    with contextlib.nullcontext() if known else pytest.warns(UserWarning, match="ran out of data"):
        told = trained(dataset, shuffle=False)[0].run.data["train"]
    shown = [n for n in range(-(-ROWS // BATCH)) if survey.scheduled(n)]
    kept = np.concatenate([x[n * BATCH : (n + 1) * BATCH] for n in shown])
    assert told["batches"] == -(-ROWS // BATCH)
    assert told["rows"] == ROWS if known else abs(told["rows"] - ROWS) < BATCH
    assert told["seen"]["rows"] == len(kept)
    assert (told["inputs"][0]["min"], told["inputs"][0]["max"]) == (kept.min(), kept.max())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_nan_in_a_batch_that_is_not_looked_at_is_found(dtype):
    x, y = data()
    number = next(n for n in range(survey.FIRST, 200) if not survey.scheduled(n))
    x[number * BATCH, 1] = np.nan
    dataset = tf.data.Dataset.from_tensor_slices((x.astype(dtype), y)).batch(BATCH)
    history, _ = trained(dataset, shuffle=False)
    assert history.run.data["train"]["inputs"][0]["nan_share"] == pytest.approx(1 / x.size, rel=0.01)
    assert "nan_in_data" in [cause for finding in history.findings for cause in finding.causes]


def piped_data(batches: int) -> tf.data.Dataset:
    x, y = data()
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).repeat().take(batches)


def test_a_training_that_ends_within_a_pass_leaves_no_thread_and_says_nothing(capfd):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 70

    history, _ = trained(piped_data(400), shuffle=False, callbacks=[Stop()])
    assert history.run.data["train"]["seen"]["batches"] >= survey.FIRST
    assert [t.name for t in threading.enumerate() if t.name == "trainrt-tap"] == []
    assert "ancel" not in "".join(capfd.readouterr())


def test_a_pipeline_that_fails_fails_as_it_does_in_keras_and_leaves_no_thread():
    x, y = data()

    def rows():
        yield from zip(x[:300], y[:300], strict=True)
        raise ValueError("the disk is gone")

    spec = (tf.TensorSpec(x.shape[1:], x.dtype), tf.TensorSpec(y.shape[1:], y.dtype))
    with pytest.raises(tf.errors.OpError, match="the disk is gone"):
        trained(tf.data.Dataset.from_generator(rows, output_signature=spec).batch(BATCH), shuffle=False)
    assert [t.name for t in threading.enumerate() if t.name == "trainrt-tap"] == []


def test_batches_of_no_fixed_size_and_of_half_precision_are_shown_whole():
    seen = []
    sizes = [3, 1, 5]
    rows = [np.full([n, 2], n, np.float16) for n in sizes]
    source = tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=tf.TensorSpec([None, 2], tf.float16))
    tap = Tap(source, [0], lambda number: number != 1, lambda number, array: seen.append((number, array)))
    assert [len(batch) for batch in tap.dataset] == sizes
    tap.settle()
    assert [number for number, _ in seen] == [0, 2]
    for number, array in seen:
        np.testing.assert_array_equal(array, rows[number])
    tap.close()
    tap.settle()


def test_what_shows_batches_may_fail_and_the_pipeline_goes_on():
    def fails(number, array):
        raise ValueError("no such batch")

    tap = Tap(tf.data.Dataset.range(50).batch(1), [0], lambda number: number >= 0, fails)
    assert len(list(tap.dataset)) == 50
    tap.settle()
    assert tap.failure == "ValueError: no such batch"
    tap.close()


def test_batches_that_have_gone_by_count_for_their_own_pass():
    x, y = data()
    source = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).filter(lambda *_: True)
    watched = audit.Audit(source, shuffle=False).train
    batches = len(list(watched.watch(source)))
    watched.passed(batches)
    next(iter(watched.watch(source)))
    assert watched.summary()["batches"] == batches
    assert watched.surveys[1].batches < batches
    watched.close()
