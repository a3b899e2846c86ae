"""Settings of an optimizer are judged by what they did in the steps, not by their size alone."""

import numpy as np

from trainrt.findings.examples import learning, stuck
from trainrt.findings.optimizer import consuming_decay, drowning_epsilon, heavy_momentum

SMALL = {"slots": ["velocity"], "velocity_rms": 1e-18}
DECAY = {"class": "SGD", "config": {"learning_rate": 0.1, "weight_decay": 2.0}}
MOMENTUM = {"class": "SGD", "config": {"learning_rate": 0.3, "momentum": 0.999}}


def causes(rule, run):
    return [finding.causes[0] for finding in rule(run)]


def test_epsilon_is_judged_by_the_elements_that_it_outweighs():
    assert causes(drowning_epsilon, stuck(**SMALL, epsilon_share=0.9)) == ["epsilon_dominates"]
    # A mean of squares is one number for a kernel whose elements differ by orders of magnitude.
    assert causes(drowning_epsilon, stuck(**SMALL, epsilon_share=0.1)) == []
    assert causes(drowning_epsilon, learning(**SMALL, epsilon_share=0.9)) == []


def test_elements_without_a_gradient_do_not_count_as_outweighed():
    idle = stuck(**SMALL, epsilon_share=0.8, gradient_zero_share=0.8)
    assert causes(drowning_epsilon, idle) == []
    assert causes(drowning_epsilon, stuck(**SMALL, epsilon_share=0.95, gradient_zero_share=0.8)) != []


def test_decay_is_blamed_for_kernels_that_it_took_and_for_no_others():
    shrinking = {"optimizer": DECAY, "learning_rate": 0.1, "weight_norm": np.geomspace(1, 1e-4, 200)}
    assert causes(consuming_decay, stuck(**shrinking, decay_ratio=0.9)) == ["weight_decay_too_high"]
    assert causes(consuming_decay, stuck(**shrinking, decay_ratio=0.01)) == []
    assert causes(consuming_decay, stuck(optimizer=DECAY, learning_rate=0.1, decay_ratio=0.9)) == []


def test_momentum_along_steady_gradients_is_no_fault():
    slot = {"optimizer": MOMENTUM, "slots": ["momentum"], "momentum_norm": 1.0}
    assert causes(heavy_momentum, stuck(**slot, gradient_momentum_cosine=-0.05)) == ["momentum_too_high"]
    # SGD's slot is the next displacement: -1 is straight downhill.
    assert causes(heavy_momentum, stuck(**slot, gradient_momentum_cosine=-0.95)) == []
