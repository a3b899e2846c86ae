"""The GPU kernels' library: it builds, loads without a GPU, registers, and is not trusted before its trial."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainrt import doctor, doors
from trainrt.update import cuda, fused, native, native_ops, parity

needs_ops = pytest.mark.skipif(native.load() is None, reason=str(native.status().reason))

LOADS = """
from trainrt.update import cuda
from trainrt.update import native, native_ops
library = cuda.build()
import tensorflow as tf
assert not tf.config.list_physical_devices("GPU")
print(cuda.load())
print(*cuda.status().registered)
print(native_ops.measure([[3.0, -4.0]]).numpy().tolist())
"""


@needs_ops
@pytest.mark.slow
@pytest.mark.skipif(cuda._unable() is not None, reason=str(cuda._unable()))
@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="there is a GPU: it builds for that one alone")
def test_the_library_builds_for_every_gpu_and_loads_and_registers_without_one(tmp_path):
    """One compilation, for Ampere, Hopper and as PTX, so that CI does it once."""
    (tmp_path / "cache").mkdir(mode=0o700)
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TRAINRT_KERNELS": os.fspath(native.status().path)}
    environment["TRAINRT_CACHE"] = os.fspath(tmp_path / "cache")
    done = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    complaint, registered, moments = done.stdout.strip().splitlines()
    assert complaint == "None"
    assert tuple(registered.split()) == cuda.OPS
    assert moments == "[[2.0, -1.0, 25.0, 4.0, 0.0, 0.0]]"
    (library,) = (tmp_path / "cache").glob("gpu-*.so")
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    assert "libcuda" not in needed, "it would not load without a driver"


def test_without_a_cuda_compiler_one_line_says_so_and_what_helps(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "_nvcc", lambda: None)
    monkeypatch.setenv("TRAINRT_CACHE", os.fspath(tmp_path))
    if not tf.sysconfig.get_build_info().get("is_cuda_build"):
        pytest.skip("this TensorFlow was built without CUDA")
    reason = cuda.status().reason
    assert "No CUDA compiler" in reason
    assert "CUDACXX" in reason
    assert "\n" not in reason
    with pytest.raises(native.BuildError, match="No CUDA compiler"):
        cuda.build()


def test_a_tensorflow_without_cuda_has_no_gpu_kernels(monkeypatch):
    monkeypatch.setattr(tf.sysconfig, "get_build_info", lambda: {"is_cuda_build": False})
    with pytest.raises(native.BuildError, match="built without CUDA"):
        cuda.build()


def test_they_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("TRAINRT_CUDA", "0")
    assert "TRAINRT_CUDA=0" in cuda.load()
    assert "TRAINRT_CUDA=0" in cuda.status().reason


def test_the_doctor_says_where_the_gpu_kernels_stand(monkeypatch):
    monkeypatch.setenv("TRAINRT_CUDA", "0")
    assert "TRAINRT_CUDA=0" in doctor._gpu_kernels().says


def its_weights(dtype="float32"):
    rng = np.random.default_rng(0)
    return [keras.Variable(rng.standard_normal(s).astype("float32"), dtype=dtype, name="w") for s in ((3,), (20, 7))]


def built(kind=keras.optimizers.Adam, **options):
    its = its_weights()
    optimizer = kind(learning_rate=0.01, **options)
    optimizer.build(its)
    return optimizer, its


def on_a_gpu(monkeypatch, load=lambda: None):
    """Weights count as lying on a GPU, though they do not: their device is the host's, where the trial runs too."""
    monkeypatch.setattr(cuda, "on_gpu", lambda variable: True)
    monkeypatch.setattr(cuda, "load", load)
    monkeypatch.setattr(cuda, "_trials", {})


@needs_ops
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", fused.RULES)
def test_every_fused_update_passes_its_trial_on_the_host(kind, dtype):
    if dtype == "bfloat16" and kind is not keras.optimizers.SGD:
        pytest.skip("one is enough")
    optimizer, _ = built(kind)
    assert parity.complaint(optimizer, dtype, "/CPU:0", fused.Fused) is None


@needs_ops
@pytest.mark.parametrize(
    "options", [{"weight_decay": 0.1, "clipnorm": 0.5}, {"global_clipnorm": 1.0}, {"loss_scale_factor": 2.0}]
)
def test_a_trial_has_the_options_of_the_optimizer(options):
    optimizer, _ = built(**options)
    assert parity.complaint(optimizer, "float32", "/CPU:0", fused.Fused) is None
    assert parity.key(optimizer, "float32", "/CPU:0") != parity.key(built()[0], "float32", "/CPU:0")


@needs_ops
def test_what_looks_on_passes_its_trial_on_the_host():
    assert parity.statistics_complaint("/CPU:0") is None


class Wrong(fused.Fused):
    """A fused pass with an error: in one bit of one weight, in a slot, in a statistic; or that raises."""

    error = ""

    def apply(self, *arguments, **options):
        seen = super().apply(*arguments, **options)
        if self.error == "raises":
            raise RuntimeError("an illegal memory access was encountered")
        if self.error in ("weight", "slot"):
            wrong = self.variables[-1] if self.error == "weight" else self.optimizer._velocities[-1]
            raw = doors.raw(wrong)
            flat = tf.reshape(raw, [-1])
            bits = tf.bitcast(flat, tf.int32) + tf.one_hot(11, tf.size(flat), 1, 0)
            raw.assign(tf.reshape(tf.bitcast(bits, tf.float32), raw.shape))
        if self.error == "statistic":
            seen = seen._replace(cube=seen.cube * (1 + 1e-5))
        if self.error == "joint":
            seen = seen._replace(joint=seen.joint * (1 + 1e-5))
        return seen


@needs_ops
@pytest.mark.parametrize("error", ["weight", "slot", "statistic", "joint", "raises"])
def test_a_kernel_that_errs_on_a_gpu_is_said_once_and_not_used(monkeypatch, error):
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(Wrong, "error", error)
    monkeypatch.setattr(fused, "Fused", Wrong)
    optimizer, its = built()
    with pytest.warns(RuntimeWarning, match=r"GPU kernels failed their trial \(Adam"):
        reason = fused.plan(optimizer, its)
    assert "failed its trial" in reason
    assert fused.plan(optimizer, its) == reason  # a second warning would be an error


@needs_ops
def test_a_kernel_that_passes_its_trial_is_used(monkeypatch):
    on_a_gpu(monkeypatch)
    optimizer, its = built()
    found = []
    step = tf.function(lambda: found.extend([parity.refusal(its), fused.plan(optimizer, its)]))
    step()  # the trial is inside a trace, as in a step
    assert found[0] is None
    assert isinstance(found[1], fused.Fused)


@needs_ops
def test_statistics_that_err_on_a_gpu_are_not_used(monkeypatch):
    on_a_gpu(monkeypatch)
    measure = native_ops.measure_and_clip
    calls = []

    def wrong(tensors, clip, threshold):
        calls.append(None)
        return tuple(x * (1 + 1e-4 * (len(calls) == 2)) for x in measure(tensors, clip, threshold))

    monkeypatch.setattr(native_ops, "measure_and_clip", wrong)
    with pytest.warns(RuntimeWarning, match=r"failed their trial \(statistics"):
        assert "moments are not those of the host" in parity.refusal(its_weights())


@needs_ops
def test_without_kernels_for_the_gpu_the_generic_path_is_taken_and_says_why(monkeypatch):
    on_a_gpu(monkeypatch, load=lambda: "No CUDA compiler was found.")
    optimizer, its = built()
    assert fused.plan(optimizer, its) == "No CUDA compiler was found."
    assert parity.refusal(its) == "No CUDA compiler was found."


def test_weights_on_the_host_need_no_gpu_kernels(monkeypatch):
    monkeypatch.setattr(cuda, "load", lambda: pytest.fail("it was asked for"))
    assert cuda.refusal(its_weights()) is None


def test_weights_on_both_sides_are_refused(monkeypatch):
    its = its_weights()
    monkeypatch.setattr(cuda, "on_gpu", lambda variable: variable is its[0])
    assert "some are not" in cuda.refusal(its)


def test_a_step_that_xla_compiles_is_observed_in_its_own_ops():
    """The same training on the host, with XLA and without: no op of ours is in the cluster, and the record agrees."""
    import trainrt

    rng = np.random.default_rng(0)
    x, runs = rng.standard_normal((64, 8)).astype("float32"), []
    for xla in (False, True):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
        model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=xla)
        runs.append(trainrt.fit(model, x, x[:, :1], batch_size=16, epochs=2, shuffle=False, verbose=0, clip=0.5).run)
    plain, compiled = runs
    assert "the native kernels are not used here" in str(compiled.environment["updates"])
    for subject in ("gradient", "update", "weight", "momentum", "velocity"):
        np.testing.assert_allclose(compiled.moments(subject).rms, plain.moments(subject).rms, rtol=1e-4)
    np.testing.assert_allclose(compiled.scalar("loss"), plain.scalar("loss"), rtol=1e-4)
