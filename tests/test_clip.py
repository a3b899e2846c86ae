"""Clips against what TensorFlow and Keras clip to."""

import numpy as np
import pytest
import tensorflow as tf

from trainrt import clip
from trainrt.update.moments import measure

RNG = np.random.default_rng(0)
GRADIENTS = [RNG.normal(size=shape).astype("float32") * scale for shape, scale in (((3, 4), 1), ((5,), 10), ((), 0.1))]


def scaled(rule, gradients):
    scale = rule(measure([tf.constant(g) for g in gradients])).numpy()
    return [g * s for g, s in zip(gradients, scale, strict=True)]


@pytest.mark.parametrize("threshold", [0.01, 1.0, 5.0, 1e3])
def test_global_norm_is_that_of_tensorflow(threshold):
    want, _ = tf.clip_by_global_norm(GRADIENTS, threshold)
    for got, expected in zip(scaled(clip.GlobalNorm(threshold), GRADIENTS), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("threshold", [0.01, 1.0, 5.0, 1e3])
def test_weight_norm_is_that_of_tensorflow(threshold):
    for got, gradient in zip(scaled(clip.WeightNorm(threshold), GRADIENTS), GRADIENTS, strict=True):
        np.testing.assert_allclose(got, tf.clip_by_norm(gradient, threshold), rtol=1e-6)


def test_largest_magnitude_bounds_each_element_and_keeps_the_direction():
    for got, gradient in zip(scaled(clip.LargestMagnitude(0.5), GRADIENTS), GRADIENTS, strict=True):
        assert np.abs(got).max() <= 0.5 + 1e-6
        np.testing.assert_allclose(got * np.abs(gradient).max(), gradient * np.abs(got).max(), rtol=1e-5)


def test_a_norm_that_is_zero_is_left_alone():
    for rule in (clip.GlobalNorm(1.0), clip.WeightNorm(1.0), clip.LargestMagnitude(1.0)):
        assert scaled(rule, [np.zeros(3, "float32")])[0].tolist() == [0, 0, 0]


def test_what_is_not_finite_has_no_norm_to_clip_to():
    gradients = [np.array([1, np.inf], "float32"), np.ones(2, "float32")]
    assert np.isnan(scaled(clip.GlobalNorm(1.0), gradients)[1]).all(), "as Keras's global_clipnorm"
    assert not np.isnan(scaled(clip.WeightNorm(1.0), gradients)[1]).any()


def test_a_weight_without_gradient_does_not_count():
    moments = measure([tf.constant(GRADIENTS[0]), None])
    norm = np.linalg.norm(GRADIENTS[0])
    np.testing.assert_allclose(clip.GlobalNorm(norm / 2)(moments), 0.5, rtol=1e-6)


def test_equal_clips_are_equal_so_that_nothing_is_traced_again():
    assert clip.resolve(1.0) == clip.GlobalNorm(1.0)
    assert clip.resolve(1) != clip.resolve(2)
    own = lambda moments: moments[:, 0]  # noqa: E731
    assert clip.resolve(own) is own
