"""Reading a tensor adds no reader to what grappler regroups."""

import numpy as np
import pytest
import tensorflow as tf

from trainrt.update import taps


def readers(tensor) -> int:
    return len(tensor.consumers())


@pytest.mark.parametrize("op", [tf.multiply, tf.add, tf.subtract, lambda a, b: tf.add_n([a, b, a])])
def test_a_tap_reads_the_inputs_and_not_the_result(op):
    @tf.function
    def step(a, b):
        made = op(a, b)
        tap = taps.tap(made)
        assert tap is not made
        assert readers(made) == 0
        return made * 3.0, tap

    made, tap = step(tf.constant([1.5, -2.0]), tf.constant([0.3, 7.0]))
    np.testing.assert_allclose(made, tap * 3.0)


def test_chains_are_made_again_down_to_what_is_not_regrouped():
    @tf.function
    def step(a, b):
        source = tf.sin(a)
        made = tf.reshape((source * b) * b, [2, 1])
        inner = made.op.inputs[0]
        tap = taps.tap(made)
        assert readers(inner) == 1
        return made, tap

    made, tap = step(tf.constant([1.5, -2.0]), tf.constant([0.3, 7.0]))
    np.testing.assert_array_equal(made, tap)


def test_the_copy_survives_grappler_beside_the_original():
    @tf.function
    def step(a, b):
        made = a * b
        return tf.sin(made), taps.tap(made) + 0.0

    graph = step.get_concrete_function(tf.TensorSpec([2]), tf.TensorSpec([2])).graph
    marked = [op for op in graph.get_operations() if "_trainrt_tap" in op.node_def.attr]
    assert [op.type for op in marked] == ["Mul"]


def test_eager_tensors_and_other_ops_come_back_as_they_are():
    eager = tf.constant(1.0) * 2.0
    assert taps.tap(eager) is eager
    assert taps.tap(None) is None

    @tf.function
    def step(a):
        made = tf.sin(a)
        assert taps.tap(made) is made
        return made

    step(tf.constant(1.0))


def test_products_and_calls_count_as_regrouped():
    inner = tf.function(lambda a: a * a)

    @tf.function
    def step(a):
        assert taps.is_regrouped(a * a)
        assert taps.is_regrouped(tf.reshape(a * a, [1]))
        assert taps.is_regrouped(inner(a))
        assert not taps.is_regrouped(tf.sin(a))
        return a

    step(tf.constant(1.0))
    assert not taps.is_regrouped(tf.constant(1.0))
    assert not taps.is_regrouped(None)
