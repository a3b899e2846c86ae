"""The folds of `kernels/`, against float64 numpy."""

import os
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import trainrt
from trainrt.record.vocabulary import DEVICE_MOMENTS, JOINT, SLOTS_EVERY, Moments
from trainrt.update import adaptive, cuda, moments, native, native_ops

pytestmark = pytest.mark.skipif(native.load() is None, reason=str(native.status().reason))

DTYPES = ("float32", "float64", "bfloat16", "float16")
SIZES = (0, 1, 2, 15, 16, 17, 31, 32, 33, 511, 512, 513, 1000, 16383, 16384, 16385, 70001)
ABSOLUTE = {"sum"}
"""Columns whose terms cancel: their error is relative to the sum of magnitudes."""


def check(row, tensor):
    """One row of moments against its twin: sums to 1e-6, counts and the maximum exactly."""
    values = tensor.numpy().astype(np.float64).reshape(-1)
    twin = Moments.of(values).array[: len(DEVICE_MOMENTS)]
    finite = values[np.isfinite(values)]
    for name, got, want in zip(DEVICE_MOMENTS, row, twin, strict=True):
        if name in ("sum", "sumsq"):
            size = np.abs(finite).sum() if name in ABSOLUTE else want
            assert abs(got - want) <= 1e-6 * size, (name, got, want)
        else:
            assert got == want, (name, got, want)


def tensor_of(values, dtype):
    if dtype == "float64":
        return tf.constant(values, tf.float64)
    with np.errstate(over="ignore"):
        narrow = np.asarray(values, np.float32)
    return tf.constant(narrow) if dtype == "float32" else tf.cast(tf.constant(narrow), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_are_those_of_float64_at_every_size(dtype):
    rng = np.random.default_rng(0)
    tensors = [tensor_of(rng.standard_normal(size) * 3 + 1, dtype) for size in SIZES]
    rows = native_ops.measure(tensors).numpy()
    for row, tensor in zip(rows, tensors, strict=True):
        check(row, tensor)


def test_a_row_is_its_parts_one_behind_the_other_and_when_it_was_there():
    parts = [tf.constant([[1.5, -2.0]], tf.float64), *(tensor_of(3.25, dtype) for dtype in DTYPES), tf.zeros([0, 4])]
    np.testing.assert_array_equal(native_ops.row(parts), [1.5, -2.0, 3.25, 3.25, 3.25, 3.25])
    before = time.time()
    *row, last = native_ops.row(parts[:2], timed=True).numpy()
    assert row == [1.5, -2.0, 3.25]
    now = float(native_ops.now(tf.constant(True)))
    assert before - 1e-3 <= last <= now <= time.time() + 1e-3
    traced = tf.function(native_ops.row).get_concrete_function(parts, timed=True)
    assert traced.structured_outputs.shape == [7]


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 3000),
    exponent=st.integers(-45, 38),
    spread=st.integers(0, 30),
    zeros=st.sampled_from([0.0, 0.3, 1.0]),
    bad=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_moments_hold_over_the_whole_range_of_the_dtype(size, exponent, spread, zeros, bad, dtype, seed):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(size) * 10.0 ** (exponent - rng.integers(0, spread + 1, size))
    values[rng.random(size) < zeros] = 0
    for what in (np.inf, -np.inf, np.nan)[:bad]:
        values[rng.integers(size)] = what
    tensor = tensor_of(values, dtype)
    check(native_ops.measure([tensor]).numpy()[0], tensor)


def test_moments_hold_where_tensorflow_flushes_subnormals():
    rng = np.random.default_rng(0)
    tensor = tf.constant((rng.standard_normal(5000) * 1e-41).astype("float32"))
    check(tf.function(native_ops.measure)([tensor]).numpy()[0], tensor)


def test_a_tensor_of_one_value_is_summed_as_well_as_any():
    for value in (0.1, 1 / 3, 1e-7, 12345.678):
        tensor = tf.fill([100_000], tf.constant(value, tf.float32))
        check(native_ops.measure([tensor]).numpy()[0], tensor)


def test_tensors_of_several_dtypes_are_measured_in_one_op():
    rng = np.random.default_rng(0)
    tensors = [tensor_of(rng.standard_normal(100 + i), dtype) for i, dtype in enumerate(DTYPES)]
    graph = tf.function(native_ops.measure).get_concrete_function(tensors).graph
    assert [op.type for op in graph.get_operations()].count("TrainrtMeasure") == 1
    for row, tensor in zip(native_ops.measure(tensors).numpy(), tensors, strict=True):
        check(row, tensor)


def observe(before, after, gradients, **arguments):
    """What the kernels saw of an update: [P, 6] moments of it, and the joint sums of `moments.measure_update`."""
    cube, joint = native_ops.observe(before, after, gradients, **arguments)
    return cube[:, 1].numpy(), joint.numpy()[:, [JOINT.index("gradient_update"), JOINT.index("rounded")]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-30])
def test_an_update_is_the_rounded_difference(dtype, scale):
    rng = np.random.default_rng(0)
    before = [tensor_of(rng.standard_normal(size) * scale, dtype) for size in SIZES]
    steps = [rng.standard_normal(size) * rng.choice([0, 1e-3, 1e-12], size) * scale for size in SIZES]
    after = [b + tensor_of(step, dtype) for b, step in zip(before, steps, strict=True)]
    gradients = [tensor_of(rng.standard_normal(size) * rng.choice([0, 1], size), dtype) for size in SIZES]
    update, joint = observe(before, after, gradients)
    for i, (a, b, g) in enumerate(zip(after, before, gradients, strict=True)):
        difference = a - b
        check(update[i], difference)
        g64, u64 = (x.numpy().astype(np.float64) for x in (g, difference))
        if SIZES[i] == 0:
            continue
        assert abs(joint[i, 0] - (g64 * u64).sum()) <= 1e-6 * np.abs(g64 * u64).sum()
        assert joint[i, 1] == ((g64 != 0) & (u64 == 0)).sum()


def test_a_missing_gradient_is_not_measured_and_its_update_is():
    before, after = tf.zeros([700]), tf.ones([700])
    update, joint = observe([before], [after], [None])
    check(update[0], after - before)
    assert np.isnan(joint).all()


def test_a_gradient_that_is_nan_makes_the_inner_product_nan():
    gradient = tf.constant([1.0] * 511 + [np.nan])
    _, joint = observe([tf.zeros([512])], [tf.ones([512])], [gradient])
    assert np.isnan(joint[0, 0])
    assert joint[0, 1] == 0


def test_a_gradient_of_another_dtype_than_its_weight_is_measured():
    rng = np.random.default_rng(0)
    before, step = (tf.constant(rng.standard_normal(3000).astype("float32")) for _ in range(2))
    gradient = tf.cast(tf.constant(rng.standard_normal(3000)), tf.bfloat16)
    _, joint = observe([before], [before + step], [gradient])
    product = gradient.numpy().astype(np.float64) * (before + step - before).numpy().astype(np.float64)
    assert abs(joint[0, 0] - product.sum()) <= 1e-6 * np.abs(product).sum()


def shared(gradients, momentums, seconds, division, kernels, every=1, iterations=0):
    """What gradients share with slots: the columns from `slot_steps` on, [P, ...], by the kernels or without them.

    division: inside, outside and floor; the rate is 2 and the correction 3.
    """
    known = [
        next((t for t in triple if t is not None), tf.zeros([0]))
        for triple in zip(gradients, momentums, seconds, strict=True)
    ]
    first, second = ([-1 if t is None else k for t in row] for k, row in enumerate((momentums, seconds)))
    rows = tf.constant([[*division, 2.0, 3.0, 0.0]] * len(known), tf.float64)
    if kernels:
        arguments = {"table": rows, "momentum": first, "second": second, "every": every}
        count = tf.constant(iterations, tf.int64)
        joint = native_ops.observe(known, known, gradients, [momentums, seconds], iterations=count, **arguments)[1]
        return joint.numpy()[:, JOINT.index("slot_steps") :]
    table = adaptive.Table({"momentum": momentums, "second": seconds}, rows, first, second)
    measured = moments.measure_adaptive(gradients, momentums, seconds, rows[:, :3])
    columns = table.columns(
        measured, [moments.measure(row) for row in (momentums, seconds)], moments.measure(gradients)
    )
    return np.stack([columns[name] for name in JOINT[JOINT.index("slot_steps") :]], axis=1)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inside", "outside"), [(0.0, 1e-3), (1e-3, 0.0)])
def test_what_gradients_share_with_slots_is_that_of_float64_at_every_size(inside, outside, dtype, kernels):
    rng = np.random.default_rng(0)
    draws = [(rng.standard_normal(n), rng.standard_normal(n), np.square(rng.standard_normal(n)) * 1e-4) for n in SIZES]
    tensors = [[tensor_of(x, dtype) for x in draw] for draw in draws]
    floor = outside**2 if outside else inside
    rows = shared(*map(list, zip(*tensors, strict=True)), (inside, outside, floor), kernels)
    for row, draw in zip(rows, tensors, strict=True):
        g, m, v = (t.numpy().astype(np.float64).ravel() for t in draw)
        if not g.size:
            continue
        divisor = np.sqrt(v + inside) + outside
        assert row[0] == 1
        assert abs(row[1] - (g * m).sum()) <= 1e-6 * np.abs(g * m).sum()
        want = [np.linalg.norm(g) * np.linalg.norm(m), 3 * np.square(g / divisor).sum()]
        np.testing.assert_allclose(row[2:4], want, rtol=1e-6)
        assert row[4] == (v < floor).sum()
        np.testing.assert_allclose(row[5:], [(2 / divisor).sum(), (2 / divisor).max(), (2 / divisor).min()], rtol=1e-6)


@pytest.mark.parametrize("kernels", [False, True])
def test_what_gradients_share_with_slots_is_nan_where_a_part_is_missing(kernels):
    some = tf.ones([700])
    given = ([None, some, some, None], [some, None, some, None], [some, some, None, None])
    rows = shared(*given, (0.0, 1.0, 4.0), kernels)
    want = [[1, 0, 0, 0, 1, 1, 1, 1], [1, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(~np.isnan(rows), np.array(want, bool))
    np.testing.assert_array_equal(rows[:, 0], [1, 1, 1, 0])
    np.testing.assert_allclose(rows[1, 3:], [3 * 175, 700, 2 * 350, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("kernels", [False, True])
def test_slots_that_are_zero_huge_or_not_finite_are_folded_as_they_are(kernels):
    division = (0.0, 1e-7, 1e-14)
    for g, v in ((0.0, 0.0), (1e-25, 0.0), (1e15, 1e30), (1e-30, 1.0)):
        row = shared([tf.fill([512], g)], [None], [tf.fill([512], v)], division, kernels)[0]
        divisor = np.sqrt(np.float64(np.float32(v))) + 1e-7
        each = 2 / divisor
        np.testing.assert_allclose(
            row[3:], [3 * 512 * (np.float32(g) / divisor) ** 2, 512 if v == 0 else 0, 512 * each, each, each], rtol=1e-6
        )
    bad = tf.constant([1.0] * 511 + [np.nan])
    row = shared([bad], [bad], [bad], division, kernels)[0]
    assert np.isnan(row[[1, 3, 5]]).all()


@pytest.mark.parametrize("every", [1, 3])
def test_the_kernels_hold_slots_against_gradients_in_the_first_steps_and_in_every_eighth(every):
    some = [tf.ones([5])]
    for begin in (0, 1, 2):  # a run may go on from any count of steps
        counts = range(begin, begin + 50 * every, every)
        rows = [shared(some, some, some, (0.0, 1.0, 0.0), True, every, n)[0] for n in counts]
        seen = [row[0] for row in rows]
        for row in rows:
            assert np.isnan(row[1:]).all() == (row[0] == 0)
        if begin < every:
            assert all(seen[:SLOTS_EVERY])
        gaps = np.diff(np.flatnonzero(seen))
        assert gaps.max() == SLOTS_EVERY
        assert set(gaps) == {1, SLOTS_EVERY}


def test_a_gradient_measured_for_a_clip_has_the_bits_of_one_folded_with_the_step():
    def run(clip):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((23,)), keras.layers.Dense(37, "tanh"), keras.layers.Dense(300)])
        model.compile("adam", "mse")
        x = np.random.default_rng(0).normal(size=(8, 23)).astype("float32")
        return trainrt.fit(model, x, x[:, :1] * np.ones((1, 300)), epochs=3, clip=clip, verbose=0).run

    folded, measured = (run(clip).moments("gradient").array for clip in (None, 1e9))
    assert folded.shape == (3, 4, folded.shape[-1])
    np.testing.assert_array_equal(folded, measured)


def test_weights_of_different_sizes_are_refused():
    with pytest.raises(tf.errors.InvalidArgumentError, match="3 elements before and 4 after"):
        native_ops.observe([tf.zeros([3])], [tf.zeros([4])], [None])


THREADS = """
import sys
import numpy as np, tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
from trainrt.update import native, native_ops
rng = np.random.default_rng(0)
parts = (300_001, 0), (99, -30), (200_000, 9)
x = [tf.constant((rng.standard_normal(n) * 10.0 ** k).astype("float32")) for n, k in parts]
rows = native_ops.measure(x)
update, joint = native_ops.observe(x, [a * 1.001 for a in x], x)
import keras
from trainrt.update import fused
weights = [keras.Variable(a) for a in x]
adam = keras.optimizers.Adam(0.1)
adam.build(weights)
seen = tf.function(fused.plan(adam, weights).apply)(x)
tensors = [rows, update, joint, seen.cube, seen.joint, *(w.value for w in weights)]
print(b"".join(t.numpy().tobytes() for t in tensors).hex()[-200000:])
"""


def test_the_bits_do_not_depend_on_the_number_of_threads():
    runs = [
        subprocess.run(
            [sys.executable, "-c", THREADS, str(threads)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        ).stdout
        for threads in (1, 2, 5)
    ]
    assert runs[0]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.slow
@pytest.mark.skipif(cuda._nvcc() is None, reason="no CUDA compiler")
def test_the_program_that_checks_a_gpu_compiles_for_ampere_and_hopper_and_says_that_there_is_none(tmp_path):
    """The launches themselves are compiled by test_cuda.py, for all that; here what is around them."""
    nvcc, compiler = cuda._nvcc().path, native._compiler().path

    def build(tool, *arguments):
        done = subprocess.run([tool, "-std=c++17", *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    source = [str(native.sources() / unit) for unit in ("check.cu", "device.cu.cc", "cpu.cc", "blocks.cc")]
    targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90)]
    build(nvcc, "-O1", *cuda._ARITHMETIC[1:], *targets, "-x", "cu", "-c", source[0])
    build(nvcc, "-O3", *cuda._ARITHMETIC[1:], *_here(), "-x", "cu", "-c", source[1])
    build(compiler, "-O1", "-fno-math-errno", "-ffp-contract=off", "-w", "-c", *source[2:])
    build(nvcc, "check.o", "device.cu.o", "cpu.o", "blocks.o", "-o", "check")
    done = subprocess.run([str(tmp_path / "check")], capture_output=True, text=True)
    if tf.config.list_physical_devices("GPU"):
        assert done.returncode == 0, done.stdout
        assert "of the copy" in done.stdout
    else:
        assert (done.returncode, done.stdout) == (2, "no GPU here\n")


def _here():
    """What to compile launches for that may run here: without a GPU the quickest will do."""
    found = cuda.architectures()
    return found[:1] if found == cuda._ANY else found
