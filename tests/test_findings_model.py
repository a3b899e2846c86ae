"""What the looks into a model found: each fault in a real run, and silence about its fix."""

import keras
import numpy as np
import pytest

import trainrt
from trainrt.findings import activations, diagnose, model
from trainrt.findings.examples import learning, stuck
from trainrt.findings.looks import example, layer, looks, value
from trainrt.findings.rules import collect
from trainrt.record.vocabulary import Document

RULES = [*collect(activations), *collect(model)]
LAYERS = keras.layers
OPS = keras.ops


def _flipped(y, p):
    return OPS.mean(OPS.sum(y * OPS.log(p + 1e-6), axis=-1))


def _straight(y, p):
    return -_flipped(y, p)


def _sharp(y, p):
    return OPS.mean(OPS.sum(-y * OPS.log(p) - (1.0 - y) * OPS.log(1.0 - p), axis=-1))


def _hidden(*layers, out="softmax"):
    return lambda: [LAYERS.Flatten(), *[make() for make in layers], LAYERS.Dense(10, out)]


def _dense(**keywords):
    return lambda: LAYERS.Dense(16, **{"activation": "relu", **keywords})


def _over_the_batch():
    return [LAYERS.Flatten(), LAYERS.Dense(10), LAYERS.Lambda(lambda x: OPS.softmax(x, axis=0), name="over_rows")]


def _of_zeros():
    zeros = {"kernel_initializer": "zeros"}
    return [LAYERS.Flatten(), LAYERS.Dense(16, "elu", **zeros), LAYERS.Dense(10, "softmax", **zeros)]


def _normalised(momentum):
    norm = lambda: LAYERS.BatchNormalization(momentum=momentum)  # noqa: E731
    return _hidden(lambda: LAYERS.Rescaling(40.0, offset=30.0), norm, _dense(), norm)


CE = "categorical_crossentropy"
FAULTS = {
    # fault: (rule, first cause), faulty (layers, loss, learning rate), fixed
    "sign": (("loss_upside_down", "flipped_sign"), (_hidden(_dense()), _flipped, 3e-3), (_hidden(), _straight, 3e-2)),
    "sharp": (("fragile_loss", "unstable_loss"), (_hidden(out=None), _sharp, 3e-3), (_hidden(), CE, 3e-2)),
    "rows": (
        ("softmax_over_rows", "wrong_softmax_axis"),
        (_over_the_batch, CE, 3e-3),
        (_hidden(), CE, 3e-2),
    ),
    "zeros": (
        ("equal_units", "bad_init"),
        (_of_zeros, CE, 3e-3),
        (_hidden(_dense(activation="elu")), CE, 1e-2),
    ),
    "dead": (
        ("dead_units", "dying_relu"),
        (_hidden(_dense(bias_initializer=keras.initializers.Constant(-100.0))), CE, 3e-3),
        (_hidden(_dense()), CE, 1e-2),
    ),
    "flat": (
        ("saturated_units", "saturated_activation"),
        (_hidden(_dense(activation="tanh", bias_initializer=keras.initializers.Constant(30.0))), CE, 3e-3),
        (_hidden(_dense(activation="tanh")), CE, 1e-2),
    ),
    "jump": (("overshoot", "lr_too_high"), (_hidden(_dense()), CE, 3.0), (_hidden(_dense()), CE, 1e-2)),
    "statistics": (
        ("stale_statistics", "batchnorm_statistics"),
        (_normalised(0.9999), CE, 1e-2),
        (_normalised(0.8), CE, 1e-2),
    ),
}


def _run(layers, loss, rate):
    (x, y), _ = trainrt.digits.load()
    x, y = x[:512], np.eye(10, dtype="float32")[y[:512]]
    keras.utils.set_random_seed(5)
    network = keras.Sequential([keras.Input((8, 8, 1)), *layers()])
    network.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    return trainrt.fit(network, x, y, epochs=10, batch_size=32, verbose=0).run


@pytest.fixture(autouse=True)
def _whatever_it_costs(monkeypatch):
    from trainrt.looks import probe

    monkeypatch.setattr(probe.Prober, "_affordable", lambda self, when: True)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_real_fault_is_seen_and_its_fix_is_met_with_silence(fault):
    (rule, cause), faulty, fixed = FAULTS[fault]
    found = {finding.rule: finding for finding in diagnose(_run(*faulty), RULES)}
    assert found[rule].causes[0] == cause
    assert found[rule].severity == "error"
    assert diagnose(_run(*fixed), RULES) == []


def test_one_unit_under_a_categorical_loss_is_deaf_and_under_a_binary_one_is_not():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(128, 4)).astype("float32")
    y = (x[:, :1] > 0).astype("float32")
    for loss, want in ((CE, ["deaf_loss"]), ("binary_crossentropy", [])):
        keras.utils.set_random_seed(0)
        network = keras.Sequential([keras.Input((4,)), LAYERS.Dense(1, "sigmoid")])
        network.compile(keras.optimizers.Adam(0.1), loss, metrics=["accuracy"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)  # Keras says so too
            run = trainrt.fit(network, x, y, epochs=8, verbose=0).run
        assert [finding.rule for finding in diagnose(run, RULES)] == want


def test_a_small_loss_is_not_a_deaf_one():
    reference = {"constant": 1e-8, "perfect": 0.0, "opposite": 4e-8, "exact": 0.0}
    assert not list(model.deaf_loss(stuck(documents=[example(0, reference=reference)])))


def test_a_huge_first_loss_does_not_make_a_loss_deaf():
    look = example(0, loss={"total": 1e12, "data": 1e12, "regularization": 0.0, "inference": None})
    assert not list(model.deaf_loss(stuck(documents=[look])))


def test_targets_of_one_value_are_not_the_fault_of_the_loss():
    same = {"constant": 0.0, "perfect": 0.0, "opposite": 0.0, "exact": 0.0}
    targets = Document("model", 0, {"targets": [{"distinct": 1}]})
    assert not list(model.deaf_loss(stuck(documents=[targets, example(0, reference=same)])))


def test_units_that_died_of_a_jump_name_the_rate_and_others_do_not():
    jump = {"steps": 1, "predicted": -1.0, "actual": 50.0, "before": 2.3, "after": 52.3}
    alive, dead = [layer("a", zero_units=0.1), layer("b")], [layer("a", zero_units=1.0), layer("b")]
    causes = {}
    for name, first in {
        "jumped": example(0, layers=alive, advance=jump),
        "crept": example(0, layers=alive),
        "born": example(0, layers=dead),
    }.items():
        (found,) = activations.dead_units(stuck(documents=[first, example(199, layers=dead)]))
        causes[name] = found.causes[:2]
        assert found.where == ("a",)
        assert found.steps == (0, 199)
    assert causes == {
        "jumped": ("lr_too_high", "dying_relu"),
        "crept": ("dying_relu", "lr_too_high"),
        "born": ("dying_relu", "bad_init"),
    }


def test_the_output_layer_may_be_zero_and_half_of_a_layer_may_be_dead():
    for layers in ([layer("a", zero_units=0.6), layer("b")], [layer("a"), layer("b", zero_units=1.0)]):
        assert not list(activations.dead_units(stuck(documents=[example(199, layers=layers)])))


def test_several_steps_at_once_say_nothing_about_a_single_one():
    jump = {"steps": 8, "predicted": -1.0, "actual": 50.0, "before": 2.3, "after": 52.3}
    assert not list(activations.overshoot(stuck(documents=[example(0, advance=jump)])))


def test_a_late_jump_among_good_steps_is_noise():
    jump = {"steps": 1, "predicted": -0.01, "actual": 0.2, "before": 2.3, "after": 2.5}
    documents = [example(0), example(20), example(100, advance=jump)]
    assert not list(activations.overshoot(stuck(documents=documents)))


@pytest.mark.parametrize("each", RULES, ids=lambda rule: rule.__name__)
def test_runs_that_were_not_looked_into_and_skipped_looks_are_met_with_silence(each):
    skipped = Document("probe", 5, {"step": 5, "when": "end", "skipped": "too dear"})
    for run in (stuck(), learning(), stuck(documents=[skipped])):
        assert not looks(run)
        assert not list(each(run))


@pytest.mark.parametrize("each", RULES, ids=lambda rule: rule.__name__)
def test_a_look_of_which_every_part_failed_is_met_with_silence(each):
    nothing = dict.fromkeys(("loss", "reference", "accuracy", "inference", "gradient", "advance", "outputs"))
    assert not list(each(stuck(documents=[example(0, **nothing), example(199, **nothing)])))


def test_numbers_that_json_does_not_know_are_read_back():
    assert value({"a": "-inf"}, "a") == -np.inf
    assert np.isnan(value({"a": "nan"}, "a"))
    assert np.isnan(value({"a": None}, "a"))
