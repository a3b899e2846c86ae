"""Preflight knows every op of the installed TensorFlow that determinism concerns, and finds it in a step."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import config

import trainrt
from trainrt.determinism import preflight
from trainrt.determinism.hazards import CLEAN, FAMILIES, HAZARDS, HOST, RAISES, VARIES
from trainrt.determinism.saved import specs_of

REGISTRY = {name for name in dir(tf.raw_ops) if name[0].isupper()}


def test_every_op_of_the_table_is_in_tensorflow():
    assert not {*HAZARDS, *CLEAN} - REGISTRY


def test_every_op_of_tensorflow_in_a_family_is_in_the_table():
    unknown = {name for name in REGISTRY if FAMILIES.search(name)} - {*HAZARDS, *CLEAN}
    assert not unknown, f"this TensorFlow has ops that nobody has classified: {sorted(unknown)}"


def test_the_families_cover_the_table_and_no_op_is_both():
    assert all(FAMILIES.search(name) for name in (*HAZARDS, *CLEAN))
    assert not HAZARDS.keys() & CLEAN


def issues(layers, inputs, target, optimizer="adam", loss="mse", **spec):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input(inputs, dtype=spec.get("dtype", "float32")), *layers])
    model.compile(optimizer, loss)
    x = tf.TensorSpec((4, *inputs), spec.get("dtype", "float32"))
    return preflight.check(model, (x, tf.TensorSpec((4, *target))))


def test_a_clean_model_has_none():
    layers = [keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization(), keras.layers.UpSampling2D()]
    assert issues([*layers, keras.layers.Flatten(), keras.layers.Dense(1)], (8, 8, 1), (1,)) == []


def test_an_op_that_would_raise_is_named_with_the_layer_that_made_it():
    layers = [
        *(keras.layers.Conv2D(4, 3), keras.layers.Resizing(12, 12, interpolation="nearest", name="resized")),
        *(keras.layers.Conv2D(4, 3), keras.layers.Flatten(), keras.layers.Dense(1)),
    ]
    (found,) = issues(layers, (8, 8, 1), (1,))
    assert (found.op, found.effect, found.where) == ("ResizeNearestNeighborGrad", RAISES, "GPU")
    assert found.layer.endswith("resized")
    assert "UpSampling2D" in str(found)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rmsprop", "adadelta"])
def test_an_embedding_that_goes_through_the_host_is_told_with_its_bytes(optimizer):
    layers = [keras.layers.Embedding(50, 8, name="words"), keras.layers.Flatten(), keras.layers.Dense(1)]
    found = issues(layers, (5,), (1,), optimizer, dtype="int32")
    assert {issue.effect for issue in found} == {HOST}
    tables = [issue for issue in found if issue.op.startswith("ResourceScatter")]
    assert any(issue.layer.endswith("words/embeddings") for issue in tables)
    assert all(issue.bytes == 2 * 50 * 8 * 4 * issue.count for issue in tables)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "lion", "nadam", "adamax"])
def test_an_embedding_with_dense_updates_is_clean(optimizer):
    layers = [keras.layers.Embedding(50, 8), keras.layers.Flatten(), keras.layers.Dense(1)]
    assert issues(layers, (5,), (1,), optimizer, dtype="int32") == []


def test_max_pooling_matters_under_xla_alone():
    layers = [keras.layers.Conv2D(4, 3), keras.layers.MaxPooling2D(name="pool"), keras.layers.Flatten()]
    (found,) = issues([*layers, keras.layers.Dense(1)], (8, 8, 1), (1,))
    assert (found.where, found.layer.rpartition("/")[2]) == ("XLA", "pool")
    assert not preflight.applies(found, gpu=True, xla=False)
    assert preflight.applies(found, gpu=True, xla=True)
    assert not preflight.applies(found, gpu=False, xla=True)


class Counting(keras.layers.Layer):
    def __init__(self, weighted, **options):
        super().__init__(**options)
        self.weighted = weighted

    def call(self, x):
        flat = tf.stop_gradient(tf.reshape(x, [-1]))
        ids, weights = tf.cast(flat > 0, tf.int32), flat if self.weighted else None
        return x + tf.cast(tf.math.bincount(ids, weights=weights, minlength=2, maxlength=2)[0], x.dtype)


def test_counting_with_float_weights_varies_on_the_cpu_too_and_counting_alone_does_not():
    layers = [keras.layers.Dense(3), Counting(True, name="count"), keras.layers.Dense(1)]
    effects = {(issue.effect, issue.where) for issue in issues(layers, (4,), (1,))}
    assert (VARIES, "CPU") in effects
    layers = [keras.layers.Dense(3), Counting(False, name="count"), keras.layers.Dense(1)]
    assert {issue.where for issue in issues(layers, (4,), (1,))} <= {"GPU"}


class Looping(keras.layers.Layer):
    """Hides an op in the body of a loop."""

    def call(self, x):
        body = lambda i, y: (i + 1, tf.tensor_scatter_nd_add(y, [[0, 0]], [1.0]))  # noqa: E731
        return tf.while_loop(lambda i, y: i < 2, body, (0, x), maximum_iterations=2)[1]


def test_ops_inside_of_loops_are_found():
    found = issues([keras.layers.Dense(3), Looping(name="looping"), keras.layers.Dense(1)], (4,), (1,))
    inside = [issue for issue in found if issue.op == "TensorScatterAdd"]
    assert inside
    assert inside[0].layer.endswith("looping")


class Runs:
    """A deterministic fit, and the process in the fast mode again after it."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        config.disable_op_determinism()

    def fit(self, layers, inputs, **arguments):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input(inputs), *layers])
        model.compile("adam", "mse")
        x = np.ones((8, *inputs), "float32")
        return trainrt.fit(model, x, np.ones((8, 1), "float32"), verbose=0, deterministic=True, seed=1, **arguments)


def test_fit_refuses_on_a_gpu_before_the_first_step_and_records_the_issues_elsewhere(monkeypatch):
    def layers():
        resizing = keras.layers.Resizing(6, 6, "nearest")
        return [keras.layers.Conv2D(2, 1), resizing, keras.layers.Flatten(), keras.layers.Dense(1)]

    with Runs() as runs:
        run = runs.fit(layers(), (4, 4, 1)).run
        (issue,) = run.document("preflight")["issues"]
        assert issue["op"] == "ResizeNearestNeighborGrad"
        listed = tf.config.list_physical_devices
        gpu = listed("CPU")[0]
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [gpu] if kind == "GPU" else listed())
        with pytest.raises(RuntimeError, match="UpSampling2D"):
            runs.fit(layers(), (4, 4, 1))


def test_fit_warns_of_what_stays_non_deterministic():
    with Runs() as runs, pytest.warns(UserWarning, match="will not be reproducible"):
        runs.fit([keras.layers.Dense(3), Counting(True), keras.layers.Dense(1)], (4,))


@pytest.mark.filterwarnings("ignore:.*Skipping variable loading")
def test_a_model_that_was_saved_compiled_is_checked_and_anything_else_refused_with_the_remedy(tmp_path):
    path = tmp_path / "model.keras"
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Conv2D(2, 1), keras.layers.Resizing(9, 9, "nearest")]
    )
    model.save(path)
    with pytest.raises(ValueError, match="Compile it before it is saved, or check the training script"):
        specs_of(path)
    model.compile("adam", "mse")
    model.save(path)
    loaded, spec = specs_of(path)
    assert {issue.op for issue in preflight.check(loaded, spec)} == {"ResizeNearestNeighborGrad"}
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"Keras cannot load .*model\.keras: .* Give a training script"):
        specs_of(path)
