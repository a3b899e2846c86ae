"""What observing takes of memory: no copy of the weights on the native path, and chunks of bounded size."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf

import trainrt
from trainrt.loop import step
from trainrt.loop.step import Step
from trainrt.update import native

FEATURES, UNITS, ROWS, BATCH = 37, 53, 640, 8


class Unknown(keras.optimizers.Adam):
    """An optimizer that has no fused update."""


def fit(optimizer, **keywords):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(ROWS, FEATURES)).astype("float32"), rng.normal(size=(ROWS, UNITS)).astype("float32")
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(UNITS)])
    model.compile(optimizer, "mse", jit_compile=False)
    return trainrt.fit(model, x, y, batch_size=BATCH, verbose=0, **keywords)


@pytest.fixture
def steps(monkeypatch) -> list[Step]:
    """The steps that run, as they are traced."""
    found: list[Step] = []
    run = Step.run
    monkeypatch.setattr(Step, "run", lambda self, *a, **k: (found.append(self), run(self, *a, **k))[1])
    return found


def as_large_as_a_weight(traced: Step, spec) -> collections.Counter:
    """Type -> how many operations of the step make a tensor of the kernel's size."""
    operations = traced.graph(spec).get_operations()
    sizes = [(op.type, output.shape.num_elements()) for op in operations for output in op.outputs if output.shape.rank]
    return collections.Counter(kind for kind, size in sizes if size == FEATURES * UNITS)


@pytest.mark.skipif(native.load() is None, reason="no C++ compiler here, so no native path")
def test_on_the_native_path_no_tensor_of_a_weight_is_made_that_training_alone_does_not_make(steps):
    spec = (tf.TensorSpec([None, FEATURES]), tf.TensorSpec([None, UNITS]))
    made = []
    for optimizer, keywords in (("adam", {"observe": False}), ("adam", {"clip": 1.0}), (Unknown(), {"clip": 1.0})):
        fit(optimizer, **keywords)
        made.append(as_large_as_a_weight(steps[-1], spec))
    alone, observed, generic = made
    assert observed == alone
    assert alone["MatMul"] == 1, "the gradient"
    assert generic - alone, "what the generic path keeps would be seen"


def test_chunks_are_cut_to_the_bytes_that_may_wait_and_no_step_is_lost(steps, monkeypatch):
    whole = fit("adam").run
    most = 5
    monkeypatch.setattr(step, "CHUNK_BYTES", most * 8 * steps[-1]._row)
    ran = []
    outcome = Step._outcome
    monkeypatch.setattr(Step, "_outcome", lambda self, n, *a: (ran.append(n), outcome(self, n, *a))[1])
    cut = fit("adam").run
    assert max(ran) == most
    assert sum(ran) == len(cut) == ROWS // BATCH
    np.testing.assert_array_equal(cut.scalar("loss"), whole.scalar("loss"))
    np.testing.assert_array_equal(cut["update_norm"], whole["update_norm"])
