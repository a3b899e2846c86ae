"""What costs a real training its time is named, with what to change; a healthy training is met with silence."""

import json
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import trainrt
from trainrt.findings import Finding, diagnose, findings_of_time
from trainrt.findings.wall_time import stragglers
from trainrt.record.run import Run
from trainrt.record.vocabulary import Document

STEPS = 160


def model_of(**compiled):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(10)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), **compiled)
    return model


def digits():
    (x, y), _ = trainrt.digits.load()
    return x.reshape(len(x), -1), y


def of_time(history):
    found = findings_of_time(history.findings)
    for finding in found:
        json.dumps(finding.to_dict(), allow_nan=False)
    return [finding.rule for finding in found]


def test_a_healthy_training_is_met_with_silence():
    x, y = digits()
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(2000).batch(32).cache().prefetch(tf.data.AUTOTUNE)
    assert of_time(trainrt.fit(model_of(), x, y, epochs=3, verbose=0)) == []
    assert of_time(trainrt.fit(model_of(), dataset, shuffle=False, epochs=3, verbose=0)) == []
    assert of_time(trainrt.fit(model_of(), x, y, epochs=2, verbose=0, trace=(20, 30))) == []


def test_an_input_pipeline_that_is_too_slow_is_named_with_what_it_lacks():
    x, y = digits()

    def slow(*row):
        time.sleep(0.02)  # so much that a busy machine, whose steps are slow, waits too
        return row

    def load(a, b):
        a, b = tf.numpy_function(slow, (a, b), (tf.float32, tf.int64))
        return tf.ensure_shape(a, [8, 64]), tf.ensure_shape(b, [8])

    x, y = x.astype("float32"), y.astype("int64")
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).repeat().batch(8).map(load)
    history = trainrt.fit(model_of(), dataset, shuffle=False, steps_per_epoch=STEPS, verbose=0, trace=(100, 110))
    found = {finding.rule: finding for finding in findings_of_time(history.findings)}
    finding = found["input_bound"]
    json.dumps(finding.to_dict(), allow_nan=False)
    advice = " ".join(finding.advice)
    assert "prefetch" in advice
    assert "num_parallel_calls" in advice
    assert "Map" in finding.message, "the trace names the stage"


def test_the_stage_that_is_named_works_and_does_not_wait():
    waits = {"seconds": {"input": 8.0, "step": 2.0}, "wall_s": 10.0, "input_known": True, "pipeline": ["Map"]}
    of_stages = {"Iterator::Root::Prefetch": 0.0164, "Iterator::Root": 0.02, "Iterator::Root::Prefetch::Map": 0.0163}
    run = Run.synthetic(documents=[Document("timing", 9, waits), Document("trace", 9, {"data": of_stages})])
    (finding,) = [finding for finding in diagnose(run) if finding.rule == "input_bound"]
    assert "by itself is Map, 16.3 ms a step" in finding.message


def test_a_slow_callback_is_named():
    class Plotting(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            time.sleep(0.04)

    history = trainrt.fit(model_of(), *digits(), epochs=2, verbose=0, callbacks=[Plotting()])
    found = {finding.rule: finding for finding in findings_of_time(history.findings)}
    finding = found["slow_callback"]
    assert "Plotting.on_train_batch_end" in finding.message


def test_a_step_that_is_traced_again_each_time_is_named_with_its_argument():
    class Padding(keras.Sequential):
        def call(self, inputs, training=None):
            return super().call(self.cut(inputs), training=training)

        @tf.function
        def cut(self, rows):
            for _ in range(100):
                rows = rows + 0.0
            return rows

    keras.utils.set_random_seed(0)
    model = Padding([keras.Input((64,)), keras.layers.Dense(10)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=True)
    x, y = digits()

    def batches():
        for size in range(2, 32):
            yield x[:size], y[:size]

    history = trainrt.fit(model, batches(), epochs=1, steps_per_epoch=30, shuffle=False, verbose=0)
    found = [finding for finding in history.findings if finding.rule == "retracing"]
    assert len(found) == 1
    assert "cut" in found[0].message
    assert "`rows`" in found[0].message
    assert "input_signature" in found[0].advice[0]


def test_findings_of_time_come_after_those_of_a_model_that_does_not_learn():
    seconds = {"seconds": {"input": 90.0, "step": 1.0}, "input_known": True}
    run = Run.synthetic(steps=64, update_ratio=1e-12, documents=[Document("timing", 63, seconds)])
    found = diagnose(run)
    assert "input_bound" in [finding.rule for finding in found]
    warnings = [finding for finding in found if finding.severity == "warning"]
    of_time = [bool(findings_of_time([finding])) for finding in warnings]
    assert of_time == sorted(of_time)


@pytest.mark.parametrize("late", [True, False])
def test_stragglers_that_waited_for_data_are_told_from_others(late):
    worst = [{"step": 5, "s": 3.0, "usual_s": 0.01, "input_s": 2.9 if late else 0.0}]
    told = {"seconds": {"step": 5.0}, "stragglers": {"count": 1, "excess_s": 3.0, "worst": worst}}
    (finding,) = stragglers(Run.synthetic(documents=[Document("timing", 9, told)]))
    assert isinstance(finding, Finding)
    assert ("input_bound" in finding.causes) == late
    assert np.isclose(finding.evidence["stragglers"]["excess_s"], 3.0)
