"""Comparing two runs: the true cause comes first, on real data; what is the same is said to be; noise is no cause."""

import dataclasses
import functools
import json
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import trainrt
from trainrt import digits
from trainrt.cli import BAD_INPUT, main
from trainrt.comparison import KINDS, Difference, compare
from trainrt.comparison.behaviour import departures, start
from trainrt.comparison.difference import BACKWARD, FORWARD, UPDATE
from trainrt.comparison.render import render_all, text
from trainrt.findings import CAUSES
from trainrt.record.run import Run
from trainrt.record.vocabulary import Document, Parameter

(X, Y), TEST = digits.load()
SORTED = np.argsort(Y, kind="stable")


def train(logdir, seed=1, optimizer=None, regularizer=None, data=(X, Y), validation=TEST, dropout=0.0, **fit):
    """A run on the digits that is well unless told otherwise."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(48, "relu", kernel_regularizer=regularizer),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.SGD(0.05, momentum=0.9), loss, metrics=["accuracy"])
    arrays = data if isinstance(data, tuple) else (data, None)
    arguments = {"epochs": 2, "verbose": 0, "validation_data": validation, **fit}
    trainrt.fit(model, *arrays, logdir=str(logdir), **arguments)
    return logdir


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return train(tmp_path_factory.mktemp("good"))


def _dataset(order, shuffle):
    rows = tf.data.Dataset.from_tensor_slices((X[order], Y[order]))
    return (rows.shuffle(shuffle, seed=3) if shuffle else rows).batch(32)


STORY = {
    "not shuffled": ("unshuffled_data", {"data": (X[SORTED], Y[SORTED]), "shuffle": False}),
    "normalised differently": ("inputs_unnormalised", {"data": (X * 16, Y), "validation": (TEST[0] * 16, TEST[1])}),
    "training data shifted": ("inputs_unnormalised", {"data": (X * 2 - 1, Y)}),
    "overlap": ("train_val_overlap", {"data": (np.concatenate([X, TEST[0]]), np.concatenate([Y, TEST[1]]))}),
    "learning rate too high": ("lr_too_high", {"optimizer": lambda: keras.optimizers.SGD(0.5, momentum=0.9)}),
    "learning rate too low": ("lr_too_low", {"optimizer": lambda: keras.optimizers.SGD(5e-4, momentum=0.9)}),
    "another optimizer": ("wrong_optimizer", {"optimizer": lambda: keras.optimizers.Adagrad(0.001)}),
    "clip too tight": ("clip_too_tight", {"clip": 1e-3}),
    "the optimizer's own clip": (
        "clip_too_tight",
        {"optimizer": lambda: keras.optimizers.SGD(0.05, momentum=0.9, global_clipnorm=1e-3)},
    ),
    "regulariser too strong": ("over_regularised", {"regularizer": lambda: keras.regularizers.L2(1.0)}),
    "dropout too high": ("dropout_too_high", {"dropout": 0.9}),
    "labels shifted": ("labels_wrong", {"data": (X, np.minimum(Y + 1, 9))}),
}
"""What went wrong -> the cause that must come first, and how it is done."""


def _made(arguments):
    return {k: v() if callable(v) else v for k, v in arguments.items()}


@pytest.fixture(scope="module")
def bads(tmp_path_factory):
    """(what, seed) -> the log directory of a run in which that went wrong; with another seed, an epoch more too."""

    @functools.cache
    def made(what, seed):
        arguments = _made(STORY[what][1])
        return train(tmp_path_factory.mktemp("bad"), seed, **arguments, epochs=2 if seed == 1 else 3)

    return made


@pytest.mark.parametrize("seed", [1, 7], ids=["same-seed", "other-seed"])
@pytest.mark.parametrize("what", STORY)
def test_the_true_cause_comes_first(good, bads, what, seed):
    comparison = compare(good, bads(what, seed))
    cause = STORY[what][0]
    assert comparison.cause is not None, str(comparison)
    assert comparison.cause.causes[0] == cause, str(comparison)
    assert "seed" not in {each.name for each in comparison.likely}


@pytest.mark.parametrize("shuffle", [0, 20], ids=["no-shuffle", "small-buffer"])
def test_a_dataset_that_is_not_mixed_is_the_cause(tmp_path, shuffle):
    good = train(tmp_path / "good", data=_dataset(SORTED, len(Y)), shuffle=False)
    bad = train(tmp_path / "bad", data=_dataset(SORTED, shuffle), shuffle=False)
    comparison = compare(good, bad)
    assert comparison.cause is not None
    assert comparison.cause.causes == ("unshuffled_data",)


def test_overlap_in_good_says_that_good_was_never_as_good(good, bads):
    assert "GOOD was trained on 100% of its validation rows" in compare(bads("overlap", 1), good).cause.message


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_another_seed_stays_in_the_band_and_explains_nothing(good, tmp_path, seed):
    comparison = compare(good, train(tmp_path, seed))
    assert comparison.cause is None
    assert [each.name for each in comparison.differences] == ["seed"]
    assert all(each.columns < 0.2 for each in comparison.departures), str(comparison)


def test_the_same_training_twice_is_said_to_be_the_same(good, tmp_path):
    comparison = compare(good, train(tmp_path))
    assert comparison.start.until is None
    assert comparison.start.weights
    assert comparison.verdict == "The two runs recorded the same training."
    assert not comparison.differences
    assert not comparison.departures


def test_what_the_validation_alone_differs_in_is_the_only_explanation_of_the_same_training(good, tmp_path):
    comparison = compare(good, train(tmp_path, validation=(TEST[0] * 4, TEST[1])))
    assert comparison.start.until is None
    assert comparison.cause.name.startswith("validation.inputs")


@pytest.mark.parametrize(
    ("arguments", "stage"),
    [
        ({"data": (X * 1.5, Y)}, FORWARD),
        ({"optimizer": lambda: keras.optimizers.SGD(0.01, momentum=0.9)}, UPDATE),
        ({"clip": 0.1}, UPDATE),
    ],
)
def test_runs_part_where_what_was_changed_acts(good, tmp_path, arguments, stage):
    began = start(Run.open(good), Run.open(train(tmp_path, **_made(arguments), epochs=1)))
    assert (began.weights, began.until, began.stage) == (True, 0, stage)


def test_digests_prove_what_the_recorded_numbers_only_suggest(tmp_path):
    good = train(tmp_path / "good", digests=1, epochs=1)
    same = train(tmp_path / "same", digests=1, epochs=1)
    data = train(tmp_path / "data", digests=1, epochs=1, data=(X * 1.5, Y))
    penalty = train(tmp_path / "penalty", digests=1, epochs=1, regularizer=keras.regularizers.L2(0.1))
    assert "Bit-identical" in str(compare(good, same).start)
    began = compare(good, data).start
    assert (began.until, began.stage, began.batch) == (0, FORWARD, True)
    began = compare(good, penalty).start
    assert (began.until, began.stage, began.batch) == (0, FORWARD, False)
    assert "loss" in str(began)


def test_a_rate_that_changes_later_is_the_same_before(good, tmp_path):
    def schedule(epoch, rate):
        return rate if epoch < 1 else rate * 20

    bad = train(tmp_path, callbacks=[keras.callbacks.LearningRateScheduler(schedule)])
    comparison = compare(good, bad)
    steps = -(-len(Y) // 32)
    assert comparison.start.until == steps
    assert comparison.start.stage == UPDATE
    assert comparison.cause.name == "optimizer.learning_rate"
    assert comparison.cause.evidence["since"] == steps


# ------------------------------------------------------------------------------------------------- on made-up records


def run(steps=64, seed=0, noise=0.1, **values):
    rng = np.random.default_rng(seed)
    arguments = {"loss": np.geomspace(2.3, 0.3, steps) * np.exp(noise * rng.standard_normal(steps)), **values}
    return Run.synthetic(steps, ["a/kernel", "b/kernel"], **arguments)


def test_gradients_that_differ_under_the_same_loss_part_the_runs_in_the_backward_pass():
    good, bad = run(), run(gradient_norm=np.where(np.arange(64) < 5, 1.0, 2.0))
    for each in (good, bad):
        each.environment["weights_digest"] = "00"
    began = start(good, bad)
    assert (began.until, began.stage) == (5, BACKWARD)


@pytest.mark.parametrize("statistic", ["update_ratio", "gradient_norm"])
@pytest.mark.parametrize("at", [10, 40])
def test_the_first_step_layer_and_statistic_out_of_the_band_are_named(statistic, at):
    usual = {"update_ratio": 1e-3, "gradient_norm": 1.0}[statistic]
    rng = np.random.default_rng(0)
    noisy = usual * np.exp(0.1 * rng.standard_normal((64, 2)))
    fallen = usual * np.exp(0.1 * rng.standard_normal((64, 2)))
    fallen[at:, 1] *= 1e-3
    found = departures([run(**{statistic: noisy})], run(seed=1, **{statistic: fallen}))
    assert (found[0].statistic, found[0].where) == (statistic, "b")
    assert abs(found[0].step - at) <= 3
    assert found[0].bad / found[0].good == pytest.approx(1e-3, rel=0.5)


def test_more_good_runs_widen_the_band():
    good, other, bad = run(gradient_norm=1.0), run(gradient_norm=4.0), run(gradient_norm=3.0)
    assert departures([good], bad)
    assert not departures([good, other], bad)


def test_a_band_is_as_wide_as_good_varies():
    rng = np.random.default_rng(0)
    loud, quiet = (np.exp(s * rng.standard_normal(200)) for s in (1.5, 0.01))
    good = [run(200, loss=2.0 * each) for each in (loud, quiet)]
    bad = run(200, loss=3.5 * np.exp(0.01 * rng.standard_normal(200)))
    assert not departures(good[:1], bad)
    assert departures(good[1:], bad)


def test_findings_of_bad_alone_are_told_and_speak_for_their_cause():
    environment = {"fit": {"clip": "GlobalNorm(0.0001)"}, "seed": 2}
    kernel = [Parameter("net/kernel", "net", (8, 8), "float32")]
    stuck = {"update_ratio": 1e-6, "clip_scale": 1e-4, "loss": np.linspace(2.3, 2.28, 64)}
    bad = Run.synthetic(64, kernel, scalars={"gradient_norm": 1.0}, **stuck)
    bad.environment |= environment
    comparison = compare(run(), bad)
    assert [each.causes[0] for each in comparison.only_bad] == ["clip_too_tight"]
    assert any("in BAD alone" in words for words in comparison.cause.support)


def test_a_clip_that_never_holds_explains_nothing():
    bad = run()
    bad.environment["fit"] = {"clip": "GlobalNorm(1000)"}
    assert compare(run(), bad).cause is None


@pytest.mark.parametrize("empty", ["good", "bad", "both"])
def test_runs_without_steps_are_compared_by_their_passports(empty):
    nothing = Run.synthetic(1)[:0]
    nothing.environment |= {"optimizer": {"class": "SGD", "config": {"learning_rate": 0.1}}}
    other = Run.synthetic(1)[:0] if empty == "both" else run()
    other.environment |= {"optimizer": {"class": "Adam", "config": {"learning_rate": 0.1}}}
    pair = (nothing, other) if empty != "bad" else (other, nothing)
    comparison = compare(*pair)
    assert comparison.cause.name == "optimizer"
    assert "no steps in common" in str(comparison)


def test_a_passport_of_another_making_does_not_stop_the_comparison():
    strange = run()
    strange.environment |= {"optimizer": "sgd", "model": ["x"], "fit": None, "compile": 3, "packages": {"error": "?"}}
    strange.documents = [Document("data", 0, {"train": {"inputs": [1], "targets": [None]}, "overlap": 2})]
    assert str(compare(run(), strange))
    assert str(compare(strange, run()))


def test_nan_losses_and_weights_do_not_stop_the_comparison():
    losses = np.where(np.arange(64) < 20, 2.0, np.nan)
    bad = run(loss=losses, gradient_norm=np.where(np.arange(64) < 20, 1.0, np.nan), update_ratio=np.nan)
    assert json.dumps(compare(run(), bad).to_dict(), allow_nan=False)


def test_unlike_models_share_no_layers_and_are_compared_all_the_same():
    left, right = Run.synthetic(32, ["a/kernel"]), Run.synthetic(32, ["c/kernel"] * 2, loss=3.0)
    left.environment["model"] = {"layers": [{"class": "Dense", "name": "a"}], "trainable_parameters": 100}
    right.environment["model"] = {
        "layers": [{"class": "Conv2D", "name": "c"}, {"class": "Dense"}],
        "trainable_parameters": 100,
    }
    assert compare(left, right).cause.name == "model.layers"


def test_every_difference_names_known_kinds_and_causes(good, bads):
    seen = [each for what in STORY for each in compare(good, bads(what, 7)).differences]
    assert {each.kind for each in seen} <= set(KINDS)
    assert {cause for each in seen for cause in each.causes} <= CAUSES
    assert all(0 <= each.likelihood < 1 for each in seen)


def test_weighing_multiplies_odds():
    for likelihood in (0.1, 0.5, 0.9):
        for odds in (0.1, 1.0, 5.0):
            after = Difference("data", "x", "", "", likelihood).weighed(odds).likelihood
            assert after / (1 - after) == pytest.approx(odds * likelihood / (1 - likelihood))


# ------------------------------------------------------------------------------------------------------------- faces


@pytest.fixture(scope="module")
def bad(bads):
    return bads("clip too tight", 1)


def test_the_command_prints_one_screen(good, bad, capsys):
    assert main(["compare", str(good), str(bad)]) == 0
    out = capsys.readouterr().out
    assert "1. clip: none -> 0.001" in out
    assert len(out.splitlines()) <= 40


def test_several_are_told_in_a_few_lines_and_then_in_full(good, bad, capsys):
    assert main(["compare", *map(str, (good, bad, good, bad, bad))]) == 0
    out = capsys.readouterr().out
    head, _, rest = out.partition("\n\n")
    lines = head.splitlines()
    assert lines[0] == f"GOOD  {compare(good, bad).good}"
    assert [line.split()[0] for line in lines if line[3].isdigit()] == ["1", "2", "3", "4"]
    assert re.search(
        r"clip: none -> 0.001 \(99% likely\); loss of the steps .*; parts from GOOD in step 0", " ".join(head.split())
    )
    assert "The two runs recorded the same training" in head
    assert rest.count("\nBAD  ") == 3
    assert rest.endswith("The first 3 in full; of another one: trainrt compare GOOD BAD.\n")
    assert len(out.splitlines()) <= 120


def test_the_output_for_a_hundred_runs_is_bounded(good, bad, capsys):
    render_all([compare(good, bad)] * 100, width=80)
    out = capsys.readouterr().out
    assert "and 80 more." in out
    assert len(out.splitlines()) < 250


def test_json_is_the_comparison(good, bad, capsys):
    assert main(["compare", "--json", str(good), str(bad)]) == 0
    (told,) = json.loads(capsys.readouterr().out)["comparisons"]
    assert told == json.loads(json.dumps(compare(good, bad).to_dict()))


def test_each_bad_is_compared_with_good(good, bad, capsys):
    assert main(["compare", "--json", str(good), str(good), str(bad), "--good", str(good)]) == 0
    verdicts = [each["verdict"] for each in json.loads(capsys.readouterr().out)["comparisons"]]
    assert verdicts[0] == "The two runs recorded the same training."
    assert verdicts[1].startswith("clip")


def test_html_holds_the_ranked_list_and_opens_on_the_comparison(good, bad, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["compare", str(good), str(bad), "--html", str(page)]) == 0
    held = page.read_text().partition('id="content">')[2].partition("</script>")[0]
    content = json.loads(held)
    assert content["versus"] == [str(bad)]
    told = content["compared"][f"{good}\n{bad}"]
    assert told["ranked"][0]["name"] == "clip"
    assert told["departures"]


@pytest.mark.parametrize("which", [0, 1])
def test_a_directory_without_a_run_is_refused_in_one_line(good, tmp_path, capsys, which):
    paths = [str(good), str(tmp_path / "none")]
    assert main(["compare", *(paths if which else reversed(paths))]) == BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "none" in captured.err


def test_comparing_does_not_load_tensorflow(good, bad):
    code = f"import sys, trainrt; trainrt.compare({str(good)!r}, {str(bad)!r}); print('tensorflow' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_the_text_of_a_comparison_steers_no_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as notebooks have it
    bad = run()
    bad.environment |= {"fit": {"clip": "\x1b[31mred"}}
    assert "\x1b" not in text(compare(run(), bad))


def test_comparisons_are_values():
    comparison = compare(run(), run())
    with pytest.raises(dataclasses.FrozenInstanceError):
        comparison.good = "x"
