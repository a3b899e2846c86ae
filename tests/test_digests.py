"""The step digests the very bits that NumPy would, changes nothing by it, and tells where two runs part."""

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import trainrt
from trainrt.determinism import Digests
from trainrt.determinism.digests import LAST_DOUBLING, as_doubles, as_text, tensor_digest
from trainrt.record.bits import STAGES, compare_bits, digests_of, first_difference
from trainrt.record.digest import digest

DTYPES = [
    *(np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8, np.uint8),
    *(np.uint16, np.uint32, np.uint64, np.bool_, np.complex64, np.complex128),
]
SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 3001)]
WAYS = {
    "eager": tensor_digest,
    "graph": tf.function(tensor_digest, reduce_retracing=True),
    "xla": tf.function(tensor_digest, jit_compile=True),
}


def arrays(dtype):
    rng = np.random.default_rng(0)
    return [(rng.standard_normal(shape) * 100).astype(dtype) for shape in SHAPES]


@pytest.mark.filterwarnings("ignore:.*invalid value encountered in cast")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_the_device_digests_what_numpy_does(dtype):
    for array in arrays(dtype):
        want = digest(array)
        for way, function in WAYS.items():
            assert int(np.uint64(function(tf.constant(array)).numpy())) == want, (way, array.shape)


def test_a_shape_that_is_known_at_run_time_only_makes_no_difference():
    function = tf.function(tensor_digest, input_signature=[tf.TensorSpec([None, None], tf.float16)])
    for shape in [(0, 3), (1, 1), (5, 7), (4, 4)]:
        array = np.random.default_rng(1).standard_normal(shape).astype(np.float16)
        assert int(np.uint64(function(array).numpy())) == digest(array)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_no_tensor_of_int32_is_reduced_or_moved(dtype):
    """TensorFlow's kernels for these live in host memory: a GPU would copy the whole tensor there."""
    for shape in ([3, 5], [None, 5]):
        spec = tf.TensorSpec(shape, dtype)
        nodes = tf.function(tensor_digest).get_concrete_function(spec).graph.as_graph_def().node
        moved = [n for n in nodes if n.op in ("Sum", "AddV2", "Mul", "Pad", "Reshape", "Pack", "StridedSlice", "Range")]
        assert {"Sum", "Mul", "Reshape"} <= {n.op for n in moved}
        types = {n.op: tf.as_dtype(n.attr["T" if "T" in n.attr else "Tidx"].type) for n in moved if n.op != "Pack"}
        assert tf.int32 not in types.values(), types


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 32 * 37 - 1))
def test_any_one_bit_is_seen(bit):
    array = np.random.default_rng(2).standard_normal(37).astype(np.float32)
    other = array.copy()
    other.view(np.uint32)[bit // 32] ^= np.uint32(1 << bit % 32)
    assert tensor_digest(tf.constant(array)).numpy() != tensor_digest(tf.constant(other)).numpy()


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=9))
@settings(max_examples=30, deadline=None)
def test_a_digest_rides_in_doubles_exactly(values):
    doubles = as_doubles([tf.constant(np.uint64(v).astype(np.int64)) for v in values])
    assert as_text(doubles.numpy()) == "".join(f"{v:016x}" for v in values)


# ------------------------------------------------------------------------------------------------- what a fit records


def layers_of_all_kinds():
    return [
        keras.layers.Conv2D(4, 3, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Flatten(),
        keras.layers.Dropout(0.3),
        keras.layers.Dense(10),
    ]


def train(data, layers=layers_of_all_kinds, optimizer="adam", **arguments):
    keras.backend.clear_session()
    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers()])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, run_eagerly=arguments.pop("run_eagerly", False))
    x, y = data
    history = trainrt.fit(model, x, y, batch_size=16, epochs=2, verbose=0, **arguments)
    state = [v.numpy().tobytes() for v in (*model.variables, *model.optimizer.variables)]
    return model, state, history.run


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_digesting_changes_no_bit_of_the_training(optimizer, digits):
    _, want, _ = train(digits, optimizer=optimizer)
    for digests in (1, Digests(3, ("gradient", "variable"))):
        _, state, _ = train(digits, optimizer=optimizer, digests=digests)
        assert state == want, digests


@pytest.mark.parametrize("arguments", [{}, {"observe": 2}, {"observe": False}, {"run_eagerly": True}], ids=str)
def test_every_stage_of_every_nth_step_is_digested(arguments, digits):
    model, _, run = train(digits, digests=3, **arguments)
    found = digests_of(run)
    inside = {step: row for (step, of), row in found.items() if of == 0}
    assert sorted(inside) == [0, 3, 6]
    for row in inside.values():
        assert {stage for stage, _ in row} == set(STAGES)
        assert {name for stage, name in row if stage == "gradient"} == {w.path for w in model.trainable_weights}
    last = found[7, 1]
    for stage, variables in (("variable", model.weights), ("slot", model.optimizer.variables)):
        for variable in variables:
            assert last[stage, variable.path] == f"{digest(variable.numpy()):016x}"


def test_the_first_batch_and_weights_are_digested_as_they_are(digits):
    x, y = digits
    _, _, run = train(digits, digests=1, shuffle=False)
    first = digests_of(run)[0, 0]
    assert first["batch", "x"] == f"{digest(x[:16]):016x}"
    assert first["batch", "y"] == f"{digest(y[:16]):016x}"


def test_variables_are_digested_by_default_at_places_that_depend_on_no_clock(digits):
    _, _, run = train(digits, digests=True)
    assert sorted(digests_of(run)) == [(step - 1, 1) for step in (1, 2, 4, 8)]
    plan, step, places = Digests(), 0, []
    while step < 5 * LAST_DOUBLING:
        step += plan.left(step)
        places.append(step)
    assert places == [*(2**i for i in range(11)), *(LAST_DOUBLING * i for i in range(2, 6))]
    assert all(plan.left(step) + step in places for step in range(1, 5 * LAST_DOUBLING))


def test_nothing_is_digested_unless_asked_for(digits):
    assert not digests_of(train(digits)[2])


# ------------------------------------------------------------------------------------------------- where two runs part


class Poisoned(keras.layers.Layer):
    """Changes one element in one step: of its output, or of the gradient that goes through it, or nothing."""

    def __init__(self, what):
        super().__init__(name="poisoned")
        self.what = what
        self.calls = self.add_weight(shape=(), dtype="int64", initializer="zeros", trainable=False)

    def call(self, x):
        self.calls.assign_add(1)
        factor = tf.where(tf.equal(self.calls.value, 5), tf.constant(1 + 2**-22), tf.constant(1.0))
        forward, backward = (factor if self.what == way else tf.constant(1.0) for way in ("forward", "backward"))

        @tf.custom_gradient
        def poisoned(x):
            return x * forward, lambda g: g * backward

        return poisoned(x)


def with_poison(what):
    return lambda: [
        *(keras.layers.Conv2D(4, 3, name="before"), keras.layers.Flatten()),
        *(Poisoned(what), keras.layers.Dense(10, name="after")),
    ]


@pytest.mark.parametrize(
    ("what", "stage", "name"), [("forward", "layer output", "poisoned"), ("backward", "gradient", "before")]
)
def test_one_bit_in_one_step_is_located(what, stage, name, digits):
    _, _, healthy = train(digits, with_poison("nothing"), digests=1)
    _, _, faulty = train(digits, with_poison(what), digests=1)
    found = first_difference(healthy, faulty)
    assert (found.step, found.stage) == (4, stage)
    assert name in found.names[0]
    assert found.exact
    assert name in str(found)


class Wrong(keras.losses.Loss):
    """Another bit in one step."""

    def __init__(self, optimizer):
        super().__init__()
        self.optimizer = optimizer

    def call(self, y, predicted):
        each = keras.losses.sparse_categorical_crossentropy(y, predicted, from_logits=True)
        wrong = tf.equal(self.optimizer.iterations.value, 4)
        return each * tf.where(wrong, tf.constant(1 + 2**-20), tf.constant(1.0))


class Spoilt(keras.optimizers.SGD):
    """Changes its momentum, and with it the weight, in one step."""

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, learning_rate)
        slot = self.momentums[self._get_variable_index(variable)]
        slot.assign(slot * tf.where(tf.equal(self.iterations.value, 4), tf.constant(1 + 2**-20), tf.constant(1.0)))


class Draws(keras.callbacks.Callback):
    """Takes a number out of a layer's generator between two steps."""

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == 4:
            self.model.layers[-2].seed_generator.next()


@pytest.mark.parametrize(
    ("stage", "changed"),
    [("loss", {"loss": Wrong}), ("slot", {"optimizer": Spoilt}), ("random state", {"callback": Draws}), (None, {})],
    ids=["loss", "slot", "random state", "nothing"],
)
def test_one_bit_outside_of_the_layers_is_located(stage, changed, digits):
    def trained(optimizer=keras.optimizers.SGD, loss=None, callback=keras.callbacks.Callback):
        """Of the names in a process each model has its own: sequential, sequential_1."""
        keras.utils.set_random_seed(7)
        model = keras.Sequential([keras.Input((8, 8, 1)), *layers_of_all_kinds()])
        made = optimizer(0.1, momentum=0.9)
        usual = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(made, loss(made) if loss else usual)
        given = {"batch_size": 16, "epochs": 2, "verbose": 0, "digests": 1, "callbacks": [callback()]}
        return trainrt.fit(model, *digits, **given).run

    verdict = compare_bits(trained(), trained(**changed))
    if stage is None:
        assert verdict.identical is True
        assert verdict.digests > 8 * 29
    else:
        assert (verdict.difference.step, verdict.difference.stage) == (4, stage)
        assert verdict.difference.exact


def test_equal_runs_are_identical_and_other_data_differ_in_the_batch(digits, tmp_path):
    x, y = digits
    left = train(digits, digests=1, logdir=tmp_path / "a")[2]
    right = train(digits, digests=1, logdir=tmp_path / "b")[2]
    verdict = compare_bits(trainrt.Run.open(tmp_path / "a"), trainrt.Run.open(tmp_path / "b"))
    assert verdict.identical is True
    assert verdict.conditions == {}
    assert verdict.steps == 8
    assert compare_bits(left, right).identical is True
    other = x.copy()
    other[20] = np.nextafter(other[20], 2)
    found = first_difference(left, train((other, y), digests=1)[2])
    assert (found.stage, found.names) == ("batch", ("x",))


def test_without_digests_the_moments_tell_and_equality_is_no_proof(digits):
    left, same = train(digits)[2], train(digits)[2]
    verdict = compare_bits(left, same)
    assert verdict.difference is None
    assert verdict.identical is None
    x, y = digits
    found = first_difference(left, train((x * np.float32(1 + 2**-20), y))[2])
    assert (found.step, found.by) == (0, "moments")


def test_other_weights_at_the_start_are_told_before_anything_else(digits):
    def seeded():
        keras.utils.set_random_seed(8)
        return layers_of_all_kinds()

    assert first_difference(train(digits)[2], train(digits, seeded)[2]).stage == "weights at the start"
