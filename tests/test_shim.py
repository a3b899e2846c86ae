"""The GPU's code on the host: the launches thread by thread, and the ops that make them inside TensorFlow.

`kernels/shim_launch.cc` runs every launch on fibers. A program compares them with the CPU kernels; and `bind_gpu.cc`
over it is a library of CPU kernels with the label "shim", which must do what the ordinary ones do."""

import concurrent.futures
import contextlib
import subprocess

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainrt.update import fused, native, native_ops, parity

pytestmark = [
    pytest.mark.skipif(native.load() is None, reason=str(native.status().reason)),
    pytest.mark.skipif(native._compiler() is None, reason="no C++ compiler"),
]

OPS = ("TrainrtMeasure", "TrainrtObserve", "TrainrtUpdate")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A directory with `check` and `shim.so`; what both need is compiled once, side by side."""
    place = tmp_path_factory.mktemp("shim")
    flags = ("-std=c++17", "-O1", "-fno-math-errno", "-ffp-contract=off", "-fPIC", "-w")

    def run(*arguments):
        done = subprocess.run([native._compiler().path, *arguments], cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def unit(name):
        more = [*tf.sysconfig.get_compile_flags(), "-DTRAINRT_SHIM"] if name == "bind_gpu.cc" else []
        run(*more, *flags, "-fvisibility=hidden", "-c", str(native.sources() / name), "-o", f"{name}.o")

    units = ("shim_launch.cc", "bind_gpu.cc", "check_shim.cc", "cpu.cc", "blocks.cc")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(unit, units))
    run("-o", "check", *(f"{name}.o" for name in units if name != "bind_gpu.cc"))
    run("-shared", "-o", "shim.so", "shim_launch.cc.o", "bind_gpu.cc.o", *tf.sysconfig.get_link_flags())
    return place


@pytest.fixture(scope="module")
def shim(built):
    """A context in which our ops of the graph that is being traced have the shim's kernels."""
    tf.load_library(str(built / "shim.so"))
    return lambda: tf.compat.v1.get_default_graph()._kernel_label_map(dict.fromkeys(OPS, "shim"))


def test_launches_agree_with_the_cpu_kernels(built):
    """Launch geometry, reduction trees and barriers, of all rules, of what looks on, and of clips."""
    done = subprocess.run([str(built / "check")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


SHAPES = [(), (3,), (33,), (7, 5), (0,), (257, 129)]


def trained(make, context, dtype="float32", steps=10, scale=None, missing=None):
    """Weights, slots and what was seen, of a few steps by the kernels that the context asks for."""
    rng = np.random.default_rng(0)
    weights = [keras.Variable(rng.standard_normal(s).astype("float32"), dtype=dtype, name="w") for s in SHAPES]
    optimizer = make()
    optimizer.build(weights)
    update = fused.plan(optimizer, weights)
    assert isinstance(update, fused.Fused), update

    @tf.function
    def step(gradients):
        with context():
            given = [None if i == missing else g for i, g in enumerate(gradients)]
            return tuple(x for x in update.apply(given, scale)[1:] if x is not None)

    seen = []
    for _ in range(steps):
        values = [rng.standard_normal(s) * 10.0 ** rng.integers(-3, 1) for s in SHAPES]
        seen.append([x.numpy() for x in step([tf.cast(tf.constant(v), dtype) for v in values])])
    kinds = {op.get_attr("_kernel") for op in step.get_concrete_function(
        [tf.TensorSpec(s, dtype) for s in SHAPES]).graph.get_operations() if op.type == "TrainrtUpdate"
        and context is not contextlib.nullcontext}  # fmt: skip
    assert kinds == (set() if context is contextlib.nullcontext else {b"shim"})
    return [v.value.numpy() for v in [*weights, *optimizer.variables]], seen


def agree(make, shim, **options):
    (ours, seen), (theirs, expected) = (trained(make, c, **options) for c in (shim, contextlib.nullcontext))
    for a, b in zip(ours, theirs, strict=True):
        assert a.tobytes() == b.tobytes()
    for one, other in zip(seen, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


IEEE = [kind for kind in fused.RULES if kind not in fused.ROOTS]
"""Those that take no reciprocal root, which each kind of processor estimates in its own way."""


@pytest.mark.parametrize("kind", IEEE)
def test_the_gpu_s_op_updates_as_the_cpu_s(kind, shim):
    agree(lambda: kind(learning_rate=0.01), shim)


@pytest.mark.parametrize(
    "options", [{"amsgrad": True}, {"weight_decay": 0.1, "clipnorm": 0.5}, {"global_clipnorm": 1.0}, {"clipvalue": 0.1}]
)
def test_the_gpu_s_op_has_the_options_of_the_optimizer(options, shim):
    agree(lambda: keras.optimizers.Adam(0.01, **options), shim)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_the_gpu_s_op_knows_every_dtype(dtype, shim):
    agree(lambda: keras.optimizers.Adam(0.01, beta_2=0.9, epsilon=1e-3), shim, dtype=dtype)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_the_gpu_s_op_scales_and_leaves_out(shim):
    agree(lambda: keras.optimizers.AdamW(0.01), shim, scale=tf.constant(np.linspace(0.1, 1, len(SHAPES))), missing=3)


def test_the_gpu_s_ops_look_on_as_the_cpu_s(shim):
    rng = np.random.default_rng(0)
    draws = [[tf.constant(np.abs(rng.standard_normal(s)) + 0.1, tf.float32) for s in SHAPES] for _ in range(4)]

    @tf.function
    def look(context):
        before, gradients, momentum, second = draws
        with context():
            after = [b * 0.9 for b in before]
            given = [None, *gradients[1:]]
            measured, scale = native_ops.measure_and_clip(gradients, "global_norm", 0.5)
            table = tf.constant([[0.0, 1e-3, 1e-6, 0.01, 0.5, 0.1]] * len(SHAPES), tf.float64)
            count = len(SHAPES)
            roles = {"momentum": [-1, *[0] * (count - 1)], "second": [1] * count}
            return (
                measured,
                scale,
                *native_ops.observe(
                    before, after, given, [[None, *momentum[1:]], second], scale=scale, table=table, **roles
                ),
            )

    for a, b in zip(look(shim), look(contextlib.nullcontext), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=2e-6, atol=1e-9)


def test_the_gpu_s_op_passes_the_trial_that_it_would_have_to_pass_on_a_gpu(shim):
    class Shimmed(fused.Fused):
        def apply(self, *arguments, **options):
            with shim():
                return super().apply(*arguments, **options)

    for kind in (keras.optimizers.SGD, keras.optimizers.Adam):
        optimizer = kind(learning_rate=0.01)
        optimizer.build([keras.Variable(np.zeros(3, "float32"))])
        assert parity.complaint(optimizer, "float32", "/CPU:0", Shimmed) is None
