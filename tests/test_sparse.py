"""Weights with sparse gradients beside a fused update: Keras's bits, duplicates and all, and the statistics' twin."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainrt.record.vocabulary import DEVICE_MOMENTS, JOINT, Moments
from trainrt.update import fused, native, native_ops

pytestmark = pytest.mark.skipif(native.load() is None, reason=str(native.status().reason))

OPTIONS = {
    "SGD": ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}),
    "Adam": ({}, {"amsgrad": True}),
    "RMSprop": ({}, {"momentum": 0.9}, {"centered": True, "momentum": 0.5}),
}
MAKERS = [
    pytest.param(kind, options, id="-".join([kind.__name__, *options]))
    for kind in fused.RULES
    for options in OPTIONS.get(kind.__name__, ({},))
]
WORDS, WIDTH, ROWS = 40, 5, 30
STEPS = 300


def weights(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = {"words": (WORDS, WIDTH), "kernel": (WIDTH, 33), "positions": (7, 3), "bias": (33,)}
    return [keras.Variable(rng.standard_normal(s) * 0.1, dtype=dtype, name=name) for name, s in shapes.items()]


def gradients(rng, t, dtype="float32"):
    """Of `weights`, the first and the third sparse: few indices, so that many come twice; tiny to large, many zeros."""

    def draw(*shape):
        values = rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 1, shape)
        if t % 5 == 1:
            values = rng.standard_normal(shape) * 10.0 ** rng.uniform(-30, 15 if dtype != "float16" else 1)
        return tf.cast(np.where(rng.random(shape) < 0.2 * (t % 3), 0, values), dtype)

    def rows(count, width):
        return tf.IndexedSlices(
            draw(ROWS, width), tf.constant(rng.integers(count, size=ROWS)), tf.constant([count, width], tf.int64)
        )

    return [rows(WORDS, WIDTH), draw(WIDTH, 33), rows(7, 3), draw(33)]


def same(a, b):
    a, b = a.value.numpy(), b.value.numpy()
    return ((a.view(f"u{a.dtype.itemsize}") == b.view(f"u{a.dtype.itemsize}")) | (np.isnan(a) & np.isnan(b))).all()


def compare(make, steps, scales=False, dtype="float32"):
    """Keras and the fused pass side by side."""
    theirs, ours = weights(dtype), weights(dtype)
    reference, optimizer = make(), make()
    reference.build(theirs)
    optimizer.build(ours)
    update = fused.plan(optimizer, ours, gradients(np.random.default_rng(0), 0, dtype))
    assert isinstance(update, fused.Fused), update

    def times(g, s):
        rows = isinstance(g, tf.IndexedSlices)
        return tf.IndexedSlices(g.values * s, g.indices, g.dense_shape) if rows else g * s

    keras_step = tf.function(lambda gs: reference.apply(gs, theirs))
    step = tf.function(lambda gs, scale: update.apply(gs, tf.stack(scale) if scales else None) and None)
    rng = np.random.default_rng(1)
    for t in range(steps):
        gs = gradients(rng, t, dtype)
        scale = [tf.cast(tf.cast(x, tf.float32), dtype) for x in rng.uniform(0.1, 1, 4)]
        # Outside of the graph, where Grappler could merge the scale with the optimizer's own factors.
        keras_step([times(g, s) for g, s in zip(gs, scale, strict=True)] if scales else gs)
        step(gs, [tf.cast(s, tf.float32) for s in scale])
        if t < 10 or t % 20 == 0 or t == steps - 1:
            for a, b in zip([*theirs, *reference.variables], [*ours, *optimizer.variables], strict=True):
                assert same(a, b), (t, b.path)
    assert all(np.isfinite(w.value.numpy()).mean() > 0.5 for w in ours), "this test compares NaN with NaN"


@pytest.mark.parametrize(("kind", "options"), MAKERS)
def test_sparse_gradients_beside_a_fused_update_end_in_keras_s_bits(kind, options):
    compare(lambda: kind(learning_rate=0.01, **options), STEPS)


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_rows_of_every_dtype_are_added_up_as_tensorflow_does(dtype, scales):
    compare(lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1), 40, scales, dtype)


def test_rows_are_measured_as_the_dense_tensor_that_they_stand_for():
    rng = np.random.default_rng(3)
    values = tf.constant(rng.standard_normal((3000, 70)), tf.float32)  # rows that end within blocks, and within chunks
    for indices, height in ((rng.integers(900, size=3000), 900), (rng.integers(-2, 40, size=3000), 6000)):
        dense = tf.math.unsorted_segment_sum(values, indices, height)
        got = native_ops.measure([native_ops.Rows(values, tf.constant(indices, tf.int64), height), values])
        np.testing.assert_array_equal(got, native_ops.measure([dense, values]))
    nothing = native_ops.Rows(values[:0], tf.zeros([0], tf.int64), 5)
    np.testing.assert_array_equal(native_ops.measure([nothing]), [[350, 0, 0, 0, 350, 0]])


def test_no_rows_at_all_are_a_gradient_of_zeros():
    ours, dense = weights()[:1], weights()[:1]
    both = [keras.optimizers.Adam(0.1), keras.optimizers.Adam(0.1)]
    rng = np.random.default_rng(0)
    for optimizer, its in zip(both, (ours, dense), strict=True):
        optimizer.build(its)
    for count in (ROWS, 0):
        rows = tf.IndexedSlices(
            tf.constant(rng.standard_normal((count, WIDTH)), tf.float32),
            tf.constant(rng.integers(WORDS, size=count)),
            tf.constant([WORDS, WIDTH], tf.int64),
        )
        fused.plan(both[0], ours).apply([rows])
        both[1].apply([rows], dense)
    assert same(ours[0], dense[0])


def test_an_index_outside_of_the_weight_is_an_error_and_changes_nothing():
    its = weights()[:1]
    optimizer = keras.optimizers.Adam(0.1)
    optimizer.build(its)
    before = its[0].numpy()
    rows = tf.IndexedSlices(tf.ones([1, WIDTH]), tf.constant([WORDS]), tf.constant([WORDS, WIDTH], tf.int64))
    with pytest.raises(tf.errors.InvalidArgumentError, match="out of its 40 rows"):
        fused.plan(optimizer, its).apply([rows])
    np.testing.assert_array_equal(its[0].numpy(), before)


@pytest.mark.parametrize("extra", [{"weight_decay": 0.1}, {"clipnorm": 0.5}, {"clipvalue": 0.01}], ids="-".join)
@pytest.mark.parametrize("kind", [keras.optimizers.SGD, keras.optimizers.Adam, keras.optimizers.Adagrad])
def test_what_surrounds_a_sparse_update_is_keras_s(kind, extra):
    compare(lambda: kind(learning_rate=0.05, **extra), 10)


def test_a_scale_multiplies_the_rows():
    for kind in (keras.optimizers.Adam, keras.optimizers.Adamax):  # which do not multiply the gradient themselves
        compare(lambda kind=kind: kind(0.05), 10, scales=True)


@pytest.mark.parametrize("extra", [{"global_clipnorm": 1.0}, {"loss_scale_factor": 2.0}], ids="-".join)
def test_what_meets_all_gradients_takes_the_generic_path(extra):
    its = weights()
    optimizer = keras.optimizers.Adam(**extra)
    optimizer.build(its)
    reason = fused.plan(optimizer, its, gradients(np.random.default_rng(0), 0))
    assert "has a sparse gradient" in reason
    assert next(iter(extra)) in reason


@pytest.mark.parametrize("kind", [k.values[0] for k in MAKERS if not k.values[1]])
def test_sparse_gradients_are_observed_as_the_dense_ones_they_stand_for(kind):
    its = weights()
    optimizer = kind(learning_rate=0.01)
    optimizer.build(its)
    update = fused.plan(optimizer, its)
    step = tf.function(lambda gs: tuple(update.apply(gs)[1:3]))
    rng = np.random.default_rng(2)
    for t in (0, 2, 3):
        gs = gradients(rng, t)
        before = [w.value.numpy() for w in its]
        cube, joint = (x.numpy() for x in step(gs))
        for i, weight in enumerate(its):
            gradient = tf.convert_to_tensor(gs[i]).numpy()
            after = weight.value.numpy()
            slots = [getattr(optimizer, name)[i].value.numpy() for name in update.rule.slots.values()]
            for row, subject in zip(cube[i], (gradient, after - before[i], after, *slots), strict=True):
                twin = Moments.of(subject.astype(np.float64)).array
                for name, got, want in zip(DEVICE_MOMENTS, row, twin, strict=False):
                    size = np.abs(subject.astype(np.float64)).sum() if name == "sum" else want
                    assert abs(got - want) <= (1e-6 * size if "sum" in name else 0), (t, i, name, got, want)
            product = gradient.astype(np.float64) * (after - before[i])
            got = joint[i, JOINT.index("gradient_update")]
            assert abs(got - product.sum()) <= 1e-6 * np.abs(product).sum()
            assert joint[i, JOINT.index("steps")] == 1


def test_nothing_is_made_dense_that_keras_does_not_make_dense():
    its = weights()
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(its)
    update = fused.plan(optimizer, its)
    step = tf.function(lambda gs: update.apply(gs, observe=False))
    graph = step.get_concrete_function(gradients(np.random.default_rng(0), 0)).graph
    kinds = [op.type for op in graph.get_operations()]
    assert "UnsortedSegmentSum" not in kinds
    assert kinds.count("ResourceScatterSub") == 2
    assert kinds.count("TrainrtUpdate") == 1


def test_weights_that_are_all_sparse_are_updated_too():
    def end(fuse):
        its = weights()[:1]
        optimizer = keras.optimizers.Adam(0.1)
        optimizer.build(its)
        update = fused.plan(optimizer, its)
        step = tf.function(lambda gs: (update.apply(gs) if fuse else optimizer.apply(gs, its)) and None)
        for t in range(3):
            step(gradients(np.random.default_rng(t), t)[:1])
        return its[0].value.numpy(), int(optimizer.iterations)

    (ours, steps), (theirs, _) = end(True), end(False)
    assert steps == 3
    assert ours.tobytes() == theirs.tobytes()
