"""Each rule fires on what it is about, says the right reason, and is silent on healthy runs."""

import dataclasses
import doctest
import inspect
import io
import json
import re
import types

import numpy as np
import pytest

from trainrt import findings
from trainrt.findings import Finding, diagnose, fold, rule
from trainrt.findings.dead_update import dead_update
from trainrt.findings.learning_rate import learning_rate
from trainrt.findings.nonfinite import nonfinite
from trainrt.findings.render import render
from trainrt.findings.series import percentile
from trainrt.record.run import Run
from trainrt.record.vocabulary import Epoch, Parameter, Record, Roster

STEPS = 100
NAN = float("nan")


def network(dtype="float32"):
    """Two dense layers, kernels and biases, in the order of a Keras model."""
    return [
        Parameter("first/kernel", "first", (20, 10), dtype),
        Parameter("first/bias", "first", (10,), dtype),
        Parameter("last/kernel", "last", (10, 5), dtype),
        Parameter("last/bias", "last", (5,), dtype),
    ]


def run_of(steps=STEPS, parameters=None, **values):
    return Run.synthetic(steps, network() if parameters is None else parameters, **values)


def per_weight(**values):
    """[T, 4]: a value for each weight of `network`, by layer_variable; the rest is `other`."""
    other = values.pop("other")
    names = [each.path.replace("/", "_") for each in network()]
    assert set(values) <= set(names)
    return np.broadcast_to([values.get(name, other) for name in names], (STEPS, len(names)))


def falling(noise=0.02, floor=0.1, seed=0):
    rng = np.random.default_rng(seed)
    return np.geomspace(2.3, floor, STEPS) * np.exp(noise * rng.standard_normal(STEPS))


def flat(noise=0.02, level=2.3, seed=0):
    return level * np.exp(noise * np.random.default_rng(seed).standard_normal(STEPS))


HEALTHY = {
    "adam at 1e-3": {"update_ratio": 5e-3, "loss": falling()},
    "sgd at 0.1, large early steps": {"update_ratio": np.geomspace(0.3, 1e-3, STEPS), "loss": falling(0.3)},
    "schedule decays to a thousandth": {
        "update_ratio": np.geomspace(1e-2, 1e-6, STEPS),
        "learning_rate": np.geomspace(1e-1, 1e-5, STEPS),
        "loss": falling(),
    },
    "cosine ends at zero": {
        "update_ratio": 5e-3 * (1 + np.cos(np.linspace(0, np.pi, STEPS))) / 2 + 1e-12,
        "learning_rate": 1e-3 * (1 + np.cos(np.linspace(0, np.pi, STEPS))) / 2,
        "loss": falling(),
    },
    "warm-up from zero": {
        "update_ratio": np.minimum(np.arange(STEPS) / 10, 1) * 3e-3,
        "learning_rate": np.minimum(np.arange(STEPS) / 10, 1) * 1e-3,
        "loss": falling(),
    },
    "late phase, loss at its floor": {"update_ratio": 3e-4, "loss": flat(0.2, 0.05)},
    "labels are noise, loss at its floor": {"update_ratio": 2e-3, "loss": flat(0.1)},
    "clip now and then": {
        "update_ratio": 3e-3,
        "clip_scale": np.where(np.arange(STEPS) % 7, 1.0, 0.3),
        "loss": falling(),
    },
    "a tight clip under Adam changes nothing": {"update_ratio": 3e-3, "clip_scale": 1e-3, "loss": falling()},
    "negative loss": {"update_ratio": 3e-3, "loss": 1.0 - 5 * np.linspace(0, 1, STEPS)},
    "small steps that were enough": {"update_ratio": 5e-5, "loss": falling()},
    "schedule decays at the floor of the loss": {"update_ratio": np.geomspace(1e-2, 1e-6, STEPS), "loss": flat(0.1)},
    "table of which a batch moves few rows": {
        "parameters": [Parameter("embedding/embeddings", "embedding", (1000, 16), "float32")],
        "update_ratio": 5e-5,
        "gradient_zero_share": 0.995,
        "update_zero_share": 0.995,
        "loss": flat(0.1),
    },
    "memorised": {
        "loss": np.r_[np.geomspace(2, 1e-6, STEPS - 10), np.zeros(10)],
        "gradient_zero_share": (np.arange(STEPS) >= STEPS - 10).astype(float),
        "update_zero_share": (np.arange(STEPS) >= STEPS - 10).astype(float),
    },
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_are_silent(name):
    assert [str(finding) for finding in diagnose(run_of(**HEALTHY[name]))] == []


@pytest.mark.parametrize("each", findings.ALL, ids=lambda each: each.__name__)
def test_every_rule_is_a_document_with_a_doctest_that_fires_and_one_that_does_not(each):
    text = inspect.getdoc(each)
    positions = [text.index(f"\n{heading}") for heading in ("Means:", "Matters:", "Try:", "Source:", ">>>")]
    assert positions == sorted(positions)
    examples = doctest.DocTestParser().get_examples(text)
    silent = [example for example in examples if example.want == "[]\n"]
    fires = [example for example in examples if example.want not in ("", "[]\n")]
    assert silent
    assert fires
    assert all(each.__name__ in example.source for example in silent + fires)


def test_every_module_of_a_rule_is_found():
    assert {each.__name__ for each in findings.ALL} >= {"dead_update", "nonfinite", "learning_rate"}


@pytest.mark.parametrize("each", findings.ALL, ids=lambda each: each.__name__)
def test_rules_say_nothing_about_a_run_without_steps_or_weights(each):
    assert list(each(Run(Roster((), ("gradient", "update", "weight"), ())))) == []
    assert list(each(Run(Roster(tuple(network()), ("gradient", "update", "weight"), ("loss",))))) == []
    assert list(each(run_of()[:1])) == []


# --------------------------------------------------------------------------------------------------------- dead_update


def dead(**values):
    found = list(dead_update(run_of(**values)))
    for finding in found:
        json.dumps(finding.to_dict(), allow_nan=False)
    return found


def causes(found):
    return [(finding.causes[0], finding.where) for finding in found]


def test_weight_that_the_loss_does_not_reach_is_cut_from_the_graph():
    found = dead(gradient_norm=per_weight(first_kernel=NAN, first_bias=NAN, other=1.0))
    assert causes(found) == [("graph_cut", ("first/kernel", "first/bias"))]
    assert found[0].steps == (0, STEPS - 1)


def test_nothing_is_said_where_no_gradient_was_measured_at_all():
    assert dead(gradient_norm=NAN) == []


def test_zero_gradient_of_some_weights_means_dead_units_since_the_step_they_died():
    share = np.array(per_weight(first_kernel=1.0, first_bias=1.0, other=0.0))
    share[:40] = 0.0
    found = dead(gradient_zero_share=share, update_zero_share=share, loss=flat())
    assert causes(found) == [("dying_relu", ("first/kernel", "first/bias"))]
    assert found[0].steps == (40, STEPS - 1)


def test_zero_gradient_of_the_first_kernel_alone_means_that_the_inputs_are_zero():
    share = per_weight(first_kernel=1.0, other=0.0)
    found = dead(gradient_zero_share=share, update_zero_share=share, loss=flat())
    assert causes(found) == [("inputs_constant", ("first/kernel",))]


def test_zero_gradient_before_a_kernel_of_zeros_means_a_bad_start():
    share = per_weight(first_kernel=1.0, first_bias=1.0, other=0.0)
    weight = per_weight(last_kernel=0.0, other=1.0)
    update = np.where(weight == 0, 1e-3, 1e-3 * weight) * (1 - share)
    found = dead(gradient_zero_share=share, update_norm=update, weight_norm=weight, loss=flat())
    assert causes(found) == [("bad_init", ("first/kernel", "first/bias"))]


def test_zero_gradient_of_every_weight_means_that_the_loss_does_not_depend_on_the_model():
    found = dead(gradient_zero_share=1.0, update_zero_share=1.0, loss=flat())
    assert [(finding.causes[0], len(finding.where)) for finding in found] == [("wrong_output_activation", 4)]
    found = dead(gradient_zero_share=1.0, update_zero_share=1.0, loss=0.0)
    assert [finding.causes[0] for finding in found] == ["sample_weights_zero"]


def test_skipped_steps_are_told_from_other_deaths():
    found = dead(gradient_nonfinite_share=0.5, update_zero_share=1.0)
    assert [finding.evidence["reason"] for finding in found] == ["nonfinite"]


def test_learning_rate_of_zero_is_named_and_whether_a_schedule_brought_it_there():
    found = dead(update_zero_share=1.0, learning_rate=0.0)
    assert [finding.causes[0] for finding in found] == ["lr_too_low"]
    late = (np.arange(STEPS) >= 30).astype(float)
    found = dead(update_zero_share=late, learning_rate=1e-3 * (1 - late))
    assert [(finding.causes[0], finding.steps[0]) for finding in found] == [("lr_schedule", 30)]


def test_schedule_may_rest_in_its_last_steps():
    late = (np.arange(STEPS) >= STEPS - 4).astype(float)
    assert dead(update_zero_share=late, learning_rate=1e-3 * (1 - late)) == []


def test_clip_that_rounds_updates_away_is_one_finding_with_a_threshold_from_the_norms():
    norms = np.random.default_rng(0).lognormal(0, 0.5, STEPS)
    found = dead(rounded_share=1.0, clip_scale=1e-9, scalars={"gradient_norm": norms})
    assert [(finding.causes[0], len(finding.where)) for finding in found] == [("clip_too_tight", 4)]
    threshold = float(re.search(r"clip=([0-9.e+-]+)\)", found[0].advice[0])[1])
    assert threshold == pytest.approx(np.percentile(norms, 90), rel=0.1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_updates_lost_in_a_short_dtype_are_rounding(dtype):
    found = dead(parameters=network(dtype), rounded_share=1.0)
    assert [finding.causes[0] for finding in found] == ["update_rounding"]
    assert dtype in found[0].message


def test_updates_lost_in_float32_are_a_low_rate_or_where_others_move_a_vanishing_gradient():
    assert [finding.causes[0] for finding in dead(rounded_share=1.0, learning_rate=1e-12)] == ["lr_too_low"]
    found = dead(rounded_share=per_weight(first_kernel=1.0, first_bias=1.0, other=0.0))
    assert causes(found) == [("vanishing_gradient", ("first/kernel", "first/bias"))]


def test_table_of_which_few_rows_move_each_step_is_alive():
    share = per_weight(first_kernel=0.999, other=0.0)
    assert dead(gradient_zero_share=share, update_zero_share=share) == []
    found = dead(gradient_zero_share=per_weight(other=0.0), update_zero_share=share)
    assert [finding.where for finding in found] == [("first/kernel",)]


def test_two_still_steps_are_no_death_and_three_are():
    for still, expected in ((2, 0), (3, 1)):
        share = (np.arange(20) >= 20 - still).astype(float)
        assert (
            len(dead(steps=20, gradient_zero_share=share, update_zero_share=share, loss=np.full(20, 2.0))) == expected
        )


def test_weights_rest_between_the_steps_of_an_accumulated_gradient():
    rests = (np.arange(60) % 8 != 0).astype(float)
    config = {"optimizer": {"name": "adam", "config": {"gradient_accumulation_steps": 8}}}
    assert rests[-3:].all()
    assert dead(steps=60, update_zero_share=rests, environment=config) == []
    assert len(dead(steps=60, update_zero_share=rests)) == 1


def test_verdict_does_not_depend_on_how_steps_were_merged_into_windows():
    run = run_of(rounded_share=per_weight(first_kernel=1.0, other=0.0), loss=falling())
    records = [Record.concatenate(run._chunks)[i : i + 10].merge() for i in range(0, STEPS, 10)]
    merged = Run.from_records(run.roster, records)
    assert len(merged) == 10
    left, right = diagnose(run), diagnose(merged)
    assert [(f.rule, f.causes, f.where, f.steps) for f in left] == [(f.rule, f.causes, f.where, f.steps) for f in right]
    assert left


# ----------------------------------------------------------------------------------------------------------- nonfinite


def from_step(step, value=1.0):
    return np.where(np.arange(STEPS) >= step, value, 0.0)


def test_nan_in_the_very_first_loss_is_looked_for_in_the_data():
    found = list(nonfinite(run_of(loss=NAN, gradient_nonfinite_share=1.0, weight_nonfinite_share=1.0)))
    assert [(f.causes[0], f.where, f.steps[0], f.severity) for f in found] == [("nan_in_data", (), 0, "error")]
    assert "loss" in found[0].message


def test_gradient_next_to_the_loss_comes_first_among_those_of_one_step():
    share = per_weight(first_kernel=1.0, first_bias=1.0, other=0.0) * from_step(50)[:, None]
    found = list(nonfinite(run_of(gradient_nonfinite_share=share, weight_nonfinite_share=share)))
    assert [(f.where, f.steps[0], f.evidence["subject"]) for f in found] == [(("first/bias",), 50, "gradient")]
    assert "From step 50 on first/kernel, first/bias held NaN" in found[0].message


@pytest.mark.parametrize("subject", ["gradient", "velocity", "update", "weight"])
def test_subject_that_was_first_is_named(subject):
    order = ["gradient", "velocity", "update", "weight"]
    broken = {f"{later}_nonfinite_share": from_step(50) for later in order[order.index(subject) :]}
    found = list(nonfinite(run_of(slots=("velocity",), **broken)))
    assert [(f.evidence["subject"], f.steps[0]) for f in found] == [(subject, 50)]


def test_norms_that_grew_before_name_the_learning_rate():
    norm = np.where(np.arange(STEPS) > 45, 1e5, 1.0)
    loss = np.where(np.arange(STEPS) >= 50, NAN, flat())
    found = list(nonfinite(run_of(loss=loss, weight_nonfinite_share=from_step(50), scalars={"gradient_norm": norm})))
    assert [f.causes[0] for f in found] == ["lr_too_high"]
    assert "gradient norm grew 1e+05-fold" in found[0].message


def test_one_bad_batch_is_looked_for_in_the_data_unless_all_data_were_seen_before():
    loss = np.where(np.arange(STEPS) == 50, NAN, flat())
    broken = {"loss": loss, "gradient_nonfinite_share": from_step(50) - from_step(51)}
    found = list(nonfinite(run_of(**broken)))
    assert [(f.causes[0], f.severity, f.steps[0]) for f in found] == [("nan_in_data", "warning", 50)]
    found = list(nonfinite(run_of(**broken, epochs=[Epoch(0, 30, {})])))
    assert [f.causes[0] for f in found] == ["unstable_loss"]


def test_loss_scale_may_overflow_now_and_then_but_not_for_ever():
    scalars = {"loss_scale": 1024.0}
    rare = from_step(50) - from_step(51)
    assert list(nonfinite(run_of(gradient_nonfinite_share=rare, scalars=scalars))) == []
    assert len(list(nonfinite(run_of(gradient_nonfinite_share=rare)))) == 1
    assert len(list(nonfinite(run_of(gradient_nonfinite_share=from_step(50), scalars=scalars)))) == 1


# ------------------------------------------------------------------------------------------------------- learning_rate


def rate(**values):
    found = list(learning_rate(run_of(**values)))
    for finding in found:
        json.dumps(finding.to_dict(), allow_nan=False)
    return found


def test_strangling_clip_is_named_with_a_threshold_from_the_norms():
    norms = np.random.default_rng(0).lognormal(0, 0.5, STEPS)
    stuck = {"update_ratio": 5e-6, "clip_scale": 1e-4, "loss": flat(), "scalars": {"gradient_norm": norms}}
    found = rate(**stuck, environment={"fit": {"clip": "GlobalNorm(0.0001)"}})
    assert [(f.causes[0], f.severity, f.where) for f in found] == [
        ("clip_too_tight", "error", ("first/kernel", "last/kernel"))
    ]
    assert found[0].evidence["update_ratio_without_clip"] == pytest.approx(5e-2)
    threshold = float(re.search(r"clip=([0-9.e+-]+)\)", found[0].advice[0])[1])
    assert threshold == pytest.approx(np.percentile(norms, 90), rel=0.1)
    assert "instead of GlobalNorm(0.0001)" in found[0].advice[0]


def test_clip_that_holds_in_some_steps_only_is_not_what_makes_all_small():
    scale = np.where(np.arange(STEPS) % 5 < 3, 1e-3, 1.0)
    assert [f.causes[0] for f in rate(update_ratio=1e-6, clip_scale=scale, loss=flat())] == ["lr_too_low"]


def test_small_steps_with_a_loss_that_stays_are_too_low_and_the_advice_scales_them_up():
    found = rate(update_ratio=1e-6, learning_rate=1e-6, loss=flat())
    assert [(f.causes[0], f.severity) for f in found] == [("lr_too_low", "warning")]
    assert "learning_rate = 0.001" in found[0].advice[0]


def test_schedule_that_decays_at_once_is_named():
    rates = np.r_[np.full(5, 1e-1), np.full(STEPS - 5, 1e-6)]
    assert [f.causes[0] for f in rate(update_ratio=rates / 10, learning_rate=rates, loss=flat())] == ["lr_schedule"]


def test_large_steps_without_progress_or_with_divergence_are_too_high():
    for loss in (flat(), falling()[::-1], np.r_[2.3, np.full(9, 50.0), flat()[10:]]):
        found = rate(update_ratio=np.geomspace(2, 1e-2, STEPS), loss=loss)
        assert [f.causes[0] for f in found] == ["lr_too_high"]


def test_loss_far_over_its_start_is_too_high_whatever_the_ratio():
    assert [f.causes[0] for f in rate(update_ratio=1e-2, loss=np.geomspace(2, 200, STEPS))] == ["lr_too_high"]


def test_biases_and_weights_that_begin_at_zero_have_no_ratio():
    weight = np.broadcast_to(np.linspace(0, 1, STEPS)[:, None], (STEPS, 4))
    assert rate(weight_norm=weight, update_norm=0.5, loss=flat()) == []
    ratio = per_weight(first_bias=10.0, last_bias=10.0, other=1e-3)
    assert rate(update_ratio=ratio, loss=flat()) == []


def test_verdict_on_the_rate_is_free_of_scale():
    for unit in (1e-8, 1.0, 1e8):
        values = {"weight_norm": unit, "gradient_norm": 1 / unit, "learning_rate": unit}
        assert [f.causes[0] for f in rate(update_ratio=1e-6, loss=unit * flat(), **values)] == ["lr_too_low"]
        assert rate(update_ratio=1e-3, loss=unit * falling(), **values) == []


def test_vanishing_gradient_comes_before_a_low_rate():
    gradient = per_weight(first_kernel=1e-6, first_bias=1e-6, other=1.0)
    found = rate(update_ratio=1e-6, gradient_norm=gradient, loss=flat())
    assert [f.causes[:2] for f in found] == [("vanishing_gradient", "lr_too_low")]


def test_late_phase_that_hardly_moves_is_worth_no_more_than_an_info():
    assert [f.severity for f in rate(update_ratio=1e-6, loss=flat(0.6, 0.02))] == ["info"]


# ----------------------------------------------------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def digits():
    from trainrt import digits

    (x, y), _ = digits.load()
    return x.reshape(len(x), -1), y


def train(digits, optimizer, model=None, loss=None, epochs=3, **options):
    import keras

    import trainrt

    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(32, activation="relu", name="hidden"), keras.layers.Dense(10, name="logits")]
    model = model or keras.Sequential([keras.Input((64,)), *layers], name="net")
    model.compile(optimizer, loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return trainrt.fit(model, *digits, epochs=epochs, verbose=0, **options).findings


def healthy_optimizers():
    from keras import optimizers

    cosine = optimizers.schedules.CosineDecay(3e-3, 45 * 3)
    return {
        "adam": optimizers.Adam(1e-3),
        "sgd": optimizers.SGD(0.1),
        "momentum": optimizers.SGD(0.05, momentum=0.9, nesterov=True),
        "cosine to zero": optimizers.AdamW(cosine),
        "accumulation": optimizers.Adam(1e-3, gradient_accumulation_steps=4),
    }


@pytest.mark.parametrize("name", ["adam", "sgd", "momentum", "cosine to zero", "accumulation"])
def test_real_healthy_runs_are_silent(digits, name):
    epochs = 12 if name == "accumulation" else 3  # for as many updates
    assert [str(f) for f in train(digits, healthy_optimizers()[name], epochs=epochs)] == []
    assert [str(f) for f in train(digits, healthy_optimizers()[name], epochs=epochs, clip=1.0, observe=3)] == []


@pytest.mark.parametrize(
    ("cause", "rate", "clip"), [("lr_too_high", 10.0, None), ("lr_too_low", 1e-6, None), ("clip_too_tight", 0.1, 1e-4)]
)
def test_real_run_with_a_fault_names_it_first(digits, cause, rate, clip):
    from keras import optimizers

    found = train(digits, optimizers.SGD(rate), clip=clip)
    assert [f.causes[0] for f in found] == [cause]
    assert found[0].steps[0] == 0


def test_real_nan_in_one_sample_names_the_first_kernel_and_the_step_in_which_it_came(digits):
    from keras import optimizers

    x, y = digits[0].copy(), digits[1]
    x[32 * 20 + 5, 3] = np.nan
    found = train((x, y), optimizers.SGD(0.1), epochs=1, shuffle=False)
    assert [(f.rule, f.causes[0]) for f in found] == [("bad_numbers", "nan_in_data")]
    (first,) = (c for c in found[0].evidence["consequences"] if c["rule"] == "nonfinite")
    assert first["where"] == ["net/first/kernel"] or "step 20" in first["message"]


def test_real_branch_behind_a_stopped_gradient_is_cut(digits):
    import keras

    inputs = keras.Input((64,))
    cut = keras.ops.stop_gradient(keras.layers.Dense(4, name="cut")(inputs))
    used = keras.layers.Dense(16, activation="relu", name="used")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(10, name="logits")(keras.layers.Concatenate()([used, cut])))
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        found = train(digits, keras.optimizers.Adam(1e-3), model, epochs=4)
    assert [(f.causes[0], f.where) for f in found] == [("graph_cut", ("cut/kernel", "cut/bias"))]


# ------------------------------------------------------------------------------------------------- ranking and folding


def finding(name="r", severity="error", confidence=0.9, causes=("lr_too_high",), where=(), steps=(0, 9), **more):
    return Finding(name, severity, confidence, causes, where, steps, f"message of {name}", **more)


def test_finding_survives_json_and_says_itself_in_one_line():
    left = finding(where=("a/kernel",), evidence={"x": [1.0, 2.0], "n": 3}, advice=("try",))
    assert Finding.from_dict(json.loads(json.dumps(left.to_dict()))) == left
    assert Finding.from_dict({**left.to_dict(), "of_a_newer_version": 1}) == left
    assert "\n" not in str(left)
    assert all(part in str(left) for part in ("error", "lr_too_high", "a/kernel", "message of r"))
    json.dumps(finding(evidence={"n": NAN, "a": np.array([np.inf])}).to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "wrong", [{"severity": "fatal"}, {"confidence": 1.1}, {"causes": ("gremlins",)}, {"causes": ()}]
)
def test_finding_outside_the_vocabulary_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        finding(**wrong)


def test_ranked_by_severity_then_confidence_then_step():
    made = [
        finding("d", "info", 1.0, ("train_val_overlap",)),
        finding("c", "warning", 0.9, ("class_imbalance",)),
        finding("b", "error", 0.5, ("overfitting",)),
        finding("a", "error", 0.8, ("graph_cut",), steps=(5, 9)),
        finding("e", "error", 0.8, ("label_leakage",), steps=(2, 9)),
    ]

    @rule
    def tells(run):
        yield from made

    assert [f.rule for f in diagnose(run_of(), [tells])] == ["e", "a", "b", "c", "d"]


def test_findings_of_one_cause_become_one_that_lists_where_and_keeps_the_rest_as_consequences():
    run = run_of(rounded_share=0.999, clip_scale=1e-9, update_ratio=1e-12, loss=flat())
    assert {f.causes[0] for f in (*dead_update(run), *learning_rate(run))} == {"clip_too_tight"}
    (one,) = diagnose(run)
    assert set(one.where) == {each.path for each in network()}
    assert [c["rule"] for c in one.evidence["consequences"]] == ["learning_rate"]


def test_what_begins_after_the_first_nan_is_its_consequence_and_what_began_before_is_not():
    nan = finding("nonfinite", causes=("unstable_loss",), steps=(50, 99), where=("a",))
    after, before = (
        finding("dead_update", steps=(60, 99), causes=("graph_cut",)),
        finding("dead_update", steps=(0, 99), causes=("frozen_layers",)),
    )
    folded = fold([after, nan, before])
    assert {f.causes[0] for f in folded} == {"unstable_loss", "frozen_layers"}
    head = next(f for f in folded if f.rule == "nonfinite")
    assert (head.where, head.causes) == (("a",), ("unstable_loss",))
    assert [c["message"] for c in head.evidence["consequences"]] == [after.message]


def test_units_that_die_after_steps_that_were_too_large_are_a_consequence():
    high, died = (
        finding(steps=(0, 99), where=("a",)),
        finding("dead", causes=("dying_relu",), steps=(5, 99), where=("b",)),
    )
    (one,) = fold([died, high])
    assert (one.causes, one.where, one.evidence["consequences"][0]["where"]) == (("lr_too_high",), ("a",), ["b"])
    surer, unlikely = dataclasses.replace(died, confidence=0.99), dataclasses.replace(high, confidence=0.5)
    assert [f.causes[0] for f in fold([surer, high])] == ["lr_too_high"]
    assert [f.causes[0] for f in fold([surer, unlikely])] == ["dying_relu", "lr_too_high"]


def test_a_weight_at_rest_is_a_consequence_of_a_cause_that_explains_any_of_its_reasons():
    rest = finding("dead_update", causes=("wrong_output_activation", "dying_relu"), confidence=0.6)
    (one,) = fold([rest, finding("output", causes=("missing_softmax",), confidence=0.96)])
    assert (one.rule, [c["rule"] for c in one.evidence["consequences"]]) == ("output", ["dead_update"])
    assert len(fold([rest, finding("data", causes=("train_val_overlap",))])) == 2


def test_rule_that_raises_becomes_an_info_and_the_others_go_on():
    @rule
    def broken(run):
        yield finding()
        raise ZeroDivisionError("of all things")

    last, *_ = reversed(diagnose(run_of(rounded_share=1.0, learning_rate=1e-12), [broken, dead_update]))
    assert (last.rule, last.severity) == ("broken", "info")
    assert "ZeroDivisionError: of all things" in last.message
    assert "dead_update" in [f.rule for f in diagnose(run_of(rounded_share=1.0), [broken, dead_update])]


def test_diagnose_is_pure():
    run = run_of(rounded_share=1.0, loss=flat())
    assert [f.to_dict() for f in diagnose(run)] == [f.to_dict() for f in diagnose(run)]


def test_percentile_equals_numpy_on_repeated_values():
    rng = np.random.default_rng(0)
    values, weights = rng.standard_normal(50), rng.integers(1, 5, 50)
    for q in (0, 10, 50, 90, 100):
        twin = np.percentile(np.repeat(values, weights), q, method="inverted_cdf")
        assert percentile(values, q, weights) == twin
    assert np.isnan(percentile(np.array([NAN]), 50))


# ----------------------------------------------------------------------------------------------------------- rendering


ODD = "[bold]x[/]/[/red]\x1b[31m\u202e\ud800/größe 层:smile:"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("width", [1, 8, 40, 200, None])
def test_rendering_never_fails_on_odd_names_or_narrow_terminals(encoding, width):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    odd = finding(
        where=(ODD,) * 9,
        advice=(ODD, "x" * 300),
        evidence={"consequences": [{"rule": "r", "where": [], "message": ODD}]},
    )
    render([odd, finding("s", "info", causes=())], file, width)
    file.flush()
    text = raw.getvalue().decode(encoding)
    assert "\x1b" not in text
    if width is None or width >= 40:
        assert "[bold]x[/]" in text
        assert max(map(len, text.splitlines())) <= (width or 80)


def test_rendering_shows_everything_of_a_finding():
    file = io.StringIO()
    render([finding("a_rule", where=("p/kernel",), steps=(3, 7), advice=("do this", "or that"))], file, 100)
    for part in (
        "ERROR",
        "a_rule",
        "lr_too_high",
        "p/kernel",
        "steps 3 to 7",
        "message of a_rule",
        "do this",
        "or that",
    ):
        assert part in file.getvalue()


def test_a_notebook_is_printed_to_as_a_stream_in_colour(monkeypatch):
    """Where rich shows elements, which a notebook puts a line's space between."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    shown = finding("rule", where=("a/kernel",), advice=("Lower it.",))
    render([shown], stream, width=80)
    assert "\x1b[1;31mERROR" in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 5
    printed = []
    shown._repr_pretty_(types.SimpleNamespace(text=printed.append), False)
    assert printed == [str(shown)]


def test_rendering_says_when_there_is_nothing():
    file = io.StringIO()
    render([], file)
    assert "No findings" in file.getvalue()
