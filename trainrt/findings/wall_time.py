"""Time that is lost: to the input, the host, callbacks, launches, traces, and to steps that become slower.

These rules read the documents "timing" and "trace". They speak of time alone, so they come after whatever keeps the
model from learning, and only of losses that somebody would notice: seconds, not shares of nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trainrt.findings.finding import Finding
from trainrt.findings.rules import about, rule
from trainrt.findings.series import percentile, scalar
from trainrt.record.run import Run
from trainrt.record.vocabulary import Document  # noqa: F401 - for the examples

NOTICED_S = 2.0
"""Seconds of a training that are worth a word when they are a large share of it."""
LARGE = 0.3
"""A large share of the training's time."""
HELD_UP_S, HELD_UP = 5.0, 0.5
"""Seconds between the steps, and their share: a training of many short epochs has some without a fault."""
RETRACED, RETRACED_S, RETRACED_SHARE = 5, 0.5, 0.05
"""Traces of one function, at as many different steps, that cost so many seconds and such a share of the time."""
SLOWER, SLOWER_S = 1.5, 5.0
"""Growth of the median step time from the first fifth to the last, and the seconds that it must have cost."""
WAITING = ("Prefetch", "Root")
"""Stages of a pipeline whose own time is the wait for a stage below, which works in another thread."""
SHORT_KERNEL_S, LAUNCH_IDLE = 20e-6, 0.3
"""A launch costs some 5 to 10 us of the host: kernels whose median is so short, on a card idle for such a share."""


@rule
def input_bound(run: Run) -> Iterator[Finding]:
    """Steps that wait for their batches.

    Means:   the compiled loop asked for a batch and it was not there; the waits are a large share of the time.
    Matters: a faster device or a smaller model would change nothing: the data are the limit.
    Try:     what the pipeline lacks: `prefetch`, parallel `map`, `cache`, batching before mapping; a generator in
             Python shares one lock with the training.
    Source:  https://www.tensorflow.org/guide/data_performance; two timestamps a step in the loop, see `timing`.

    >>> waits = {"seconds": {"input": 8.0, "step": 2.0}, "wall_s": 10.0, "input_known": True, "pipeline": ["Map"]}
    >>> [f.causes for f in input_bound(Run.synthetic(documents=[Document("timing", 9, waits)]))]
    [('input_bound',)]
    >>> list(input_bound(Run.synthetic()))
    []
    """
    timing = run.document("timing")
    seconds, training = _training(timing)
    waited = seconds.get("input", 0.0)
    if not timing.get("input_known") or waited < NOTICED_S or waited < LARGE * training:
        return
    stages = dict(run.document("trace").get("data") or {})
    working = (name for name in stages if name.rpartition("::")[2] not in WAITING)
    slowest = max(working, key=lambda name: stages[name], default="")
    told = (
        f" The stage that takes most by itself is {slowest.rpartition('::')[2]}, {_ms(stages[slowest])} a step."
        if slowest
        else ""
    )
    yield about(
        run,
        "input_bound",
        "warning",
        0.9,
        ("input_bound",),
        f"The steps waited {waited:.1f} s for their batches, {waited / training:.0%} of the training's "
        f"{training:.1f} s.{told}",
        {"seconds": seconds, "pipeline": timing.get("pipeline", []), "stages": stages},
        _faster_input(str(timing.get("data", "")), list(timing.get("pipeline", ()))),
    )


def _faster_input(kind: str, stages: Sequence[str]) -> tuple[str, ...]:
    """What to change, from the stages of a `tf.data.Dataset`, the last one first."""
    if kind and kind not in ("tf.data", "arrays"):
        return (
            f"{kind} gives batches from Python. A keras.utils.PyDataset takes workers=4, use_multiprocessing=True; "
            "faster is a tf.data.Dataset of files or arrays.",
            "Wrap it: tf.data.Dataset.from_generator(...).prefetch(tf.data.AUTOTUNE) prepares a batch ahead.",
        )
    advice = []
    if not stages or stages[0] != "Prefetch":
        advice.append("End the dataset with .prefetch(tf.data.AUTOTUNE): batches are made while the step runs.")
    if "Map" in stages:
        advice.append("Map in parallel: .map(function, num_parallel_calls=tf.data.AUTOTUNE).")
    if "Interleave" in stages:
        advice.append("Read files in parallel: .interleave(..., num_parallel_calls=tf.data.AUTOTUNE).")
    maps = [i for i, stage in enumerate(stages) if stage in ("Map", "ParallelMap")]
    batches = [i for i, stage in enumerate(stages) if stage in ("Batch", "ParallelBatch")]
    if maps and batches and max(maps) > min(batches):
        advice.append("Batch before you map, where the function can take a whole batch: one call instead of many.")
    if "Cache" not in stages:
        advice.append("If what the maps make fits in memory, .cache() behind them: only the first epoch pays.")
    return (*advice, "Move work out of Python (tf.py_function, numpy_function): it holds one lock for all threads.")


@rule
def slow_callback(run: Run) -> Iterator[Finding]:
    """A callback that takes a large share of the time.

    Means:   the training stood still while a callback ran.
    Matters: callbacks run between steps: what they take, the device idles.
    Try:     do it every hundredth batch or at the epoch's end; hand slow work to a thread.
    Source:  the time around Keras's calls; the name is what the training thread was seen in, some 20 times a second.

    >>> told = {"seconds": {"callbacks": 6.0, "step": 4.0}, "callbacks": {"Plot.on_train_batch_end": 1.0}}
    >>> [f.causes for f in slow_callback(Run.synthetic(documents=[Document("timing", 9, told)]))]
    [('slow_callback',)]
    >>> list(slow_callback(Run.synthetic()))
    []
    """
    timing = run.document("timing")
    seconds, training = _training(timing)
    spent = seconds.get("callbacks", 0.0)
    if spent < NOTICED_S or spent < LARGE * training:
        return
    seen = dict(timing.get("callbacks") or {})
    names = [name for name, share in seen.items() if share >= 0.2][:3]
    which = f", most of them in {', '.join(names)}" if names else ""
    per_batch = any("batch" in name for name in names)
    yield about(
        run,
        "slow_callback",
        "warning",
        0.9,
        ("slow_callback",),
        f"Callbacks took {spent:.1f} s, {spent / training:.0%} of the training's {training:.1f} s{which}.",
        {"seconds": seconds, "seen": seen},
        (
            "Do it every hundredth batch: if batch % 100 == 0." if per_batch else "Do it every few epochs.",
            "Keep work of the step in the step: a metric is computed with it, at a fraction of the cost.",
        ),
    )


@rule
def host_bound(run: Run) -> Iterator[Finding]:
    """Steps held up by Python.

    Means:   a large share of the time went by between the steps in Python, or the step itself runs eagerly.
    Matters: the device waits for the interpreter.
    Try:     leave run_eagerly out; a logdir on a local disk where writing holds up.
    Source:  the clock around the calls; TensorFlow's advice on eager execution.

    >>> told = {"seconds": {"host": 7.0, "step": 3.0}}
    >>> [f.causes for f in host_bound(Run.synthetic(documents=[Document("timing", 9, told)]))]
    [('host_bound',)]
    >>> list(host_bound(Run.synthetic()))
    []
    """
    seconds, training = _training(run.document("timing"))
    host, writing = seconds.get("host", 0.0), seconds.get("writing", 0.0)
    eager = bool((run.environment.get("compile") or {}).get("run_eagerly"))
    evidence = {"seconds": seconds, "run_eagerly": eager}
    if eager and seconds.get("step", 0.0) >= NOTICED_S:
        yield about(
            run,
            "host_bound",
            "info",
            0.9,
            ("host_bound",),
            f"The step runs eagerly: Python calls its ops one by one, {_ms(_step_s(run))} a step.",
            evidence,
            ("For speed, leave out run_eagerly=True of model.compile.",),
        )
    elif host + writing >= HELD_UP_S and host + writing >= HELD_UP * training:
        slow_disk = writing > host
        part = "handing over the record" if slow_disk else "Python between the steps"
        yield about(
            run,
            "host_bound",
            "warning",
            0.7,
            ("host_bound",),
            f"Of the training's {training:.1f} s, {host + writing:.1f} s went by outside of the steps, most in {part}.",
            evidence,
            (
                "Put logdir on a local disk, or observe=10."
                if slow_disk
                else "Use fewer, larger epochs: steps_per_epoch and .repeat() save what each epoch's end costs.",
            ),
        )


@rule
def launch_bound(run: Run) -> Iterator[Finding]:
    """A GPU that waits for its next kernel.

    Means:   in the trace the GPU was idle between kernels so short that launching them takes longer.
    Matters: a larger model or batch would cost nothing; a faster GPU would gain nothing.
    Try:     XLA, which fuses kernels; larger batches.
    Source:  the trace's kernels; a launch costs 5 to 10 us of the host (NVIDIA, CUDA Graphs).

    >>> seen = {"steps_seen": 9, "share": {"idle": 0.7, "input": 0.0}, "kernels": {"a_step": 900.0, "median_s": 4e-6}}
    >>> [f.causes for f in launch_bound(Run.synthetic(documents=[Document("trace", 9, seen)]))]
    [('launch_bound',)]
    >>> list(launch_bound(Run.synthetic()))
    []
    """
    trace = run.document("trace")
    kernels, share = trace.get("kernels"), trace.get("share") or {}
    idle = share.get("idle")
    if not kernels or idle is None or idle < LAUNCH_IDLE or kernels["median_s"] > SHORT_KERNEL_S:
        return
    if share.get("input", 0.0) > idle / 2:
        return
    yield about(
        run,
        "launch_bound",
        "warning",
        0.7,
        ("launch_bound",),
        f"In the traced steps the GPU was idle for {idle:.0%}: {kernels['a_step']:.0f} kernels a step, half of them "
        f"shorter than {kernels['median_s'] * 1e6:.0f} us, about what launching one takes.",
        {"share": dict(share), "kernels": dict(kernels)},
        (
            "Compile with XLA, which fuses kernels: model.compile(..., jit_compile=True).",
            "Use a larger batch: the same kernels, more work in each.",
        ),
    )


@rule
def retracing(run: Run) -> Iterator[Finding]:
    """A function that TensorFlow traces again and again.

    Means:   one of its arguments keeps coming with another shape or Python value, and each one is a new graph.
    Matters: a trace costs what hundreds of steps cost, and the graphs stay in memory.
    Try:     an input_signature with None in the shape that changes; tensors in place of Python numbers; padding.
    Source:  https://www.tensorflow.org/guide/function#controlling_retracing; a note at each trace, see `retracing`.

    >>> note = {"name": "score", "where": "a.py:3", "traces": 9, "seconds": 4.0, "steps": [1, 2, 3, 4, 5, 6, 7, 8, 9],
    ...         "arguments": {"rows": ["TensorSpec(shape=(1,))", "TensorSpec(shape=(2,))"]}}
    >>> [f.causes for f in retracing(Run.synthetic(documents=[Document("timing", 9, {"retraced": [note]})]))]
    [('retracing',)]
    >>> list(retracing(Run.synthetic()))
    []
    """
    timing = run.document("timing")
    for note in timing.get("retraced") or ():
        steps = sorted(set(note["steps"]))
        dear = note["seconds"] >= max(RETRACED_S, RETRACED_SHARE * timing.get("wall_s", 0.0))
        if note["traces"] < RETRACED or len(steps) < RETRACED - 1 or not dear:
            continue
        arguments = dict(note["arguments"])
        changing = "; ".join(f"`{name}`: {', '.join(seen[:3])}" for name, seen in list(arguments.items())[:2])
        why = f"What changes is {changing}." if changing else "Its arguments do not change: it is made anew each time."
        shapes = any("TensorSpec" in value for seen in arguments.values() for value in seen)
        names = ", ".join(f"`{name}`" for name in arguments)
        advice = []
        if shapes:
            advice.append(
                f"Give {names} one shape: pad it, or @tf.function(input_signature=[tf.TensorSpec([None, ...])])."
            )
        if any("Literal" in value for seen in arguments.values() for value in seen):
            advice.append(f"Pass {names} as a tensor: a Python number is a new graph for each value.")
        if not arguments:
            advice.append("Make the tf.function once, outside of the loop or callback that calls it.")
        yield about(
            run,
            "retracing",
            "warning",
            0.95,
            ("retracing",),
            f"`{note['name']}` ({note['where']}) was traced {note['traces']} times, {note['seconds']:.1f} s in all. "
            f"{why}",
            {"function": dict(note)},
            (*advice, "@tf.function(reduce_retracing=True) lets TensorFlow find the common shape."),
            steps=(steps[0], max(steps[0], min(steps[-1], int(run.steps[-1, 1])))),
        )


@rule
def slow_down(run: Run) -> Iterator[Finding]:
    """Steps that take longer and longer.

    Means:   the median step of the last fifth took much longer than that of the first.
    Matters: something grows: a list, a graph, memory that is paged, a card that gets hot.
    Try:     see which phase grew: trace="auto" traces again when steps slow down.
    Source:  the step times of the record; where there are two traces, their phases.

    >>> times = [0.01] * 100 + [0.2] * 100
    >>> [f.causes for f in slow_down(Run.synthetic(steps=200, scalars={"step_s": times}))]
    [('slow_down',)]
    >>> list(slow_down(Run.synthetic(steps=200, scalars={"step_s": 0.01})))
    []
    """
    step_s = scalar(run, "step_s")
    width = (run.steps[:, 1] - run.steps[:, 0] + 1).astype(float)
    if np.isnan(step_s).all() or width.sum() < 100:
        return
    at = np.cumsum(width) / width.sum()
    early, late = (at > 0.02) & (at <= 0.2), at > 0.8
    if not (early.any() and late.any()):
        return
    before, after = percentile(step_s[early], 50, width[early]), percentile(step_s[late], 50, width[late])
    cost = float(((step_s - before) * width)[at > 0.2].sum())
    if not (after > SLOWER * before and cost > SLOWER_S):
        return
    grown = _grown([dict(d.content) for d in run.documents if d.kind == "trace"])
    phase = f" By the traces it is the {grown[0]} that grew, from {_ms(grown[1])} to {_ms(grown[2])}." if grown else ""
    yield about(
        run,
        "slow_down",
        "warning",
        0.7,
        ("slow_down",),
        f"A step took {_ms(before)} at first and {_ms(after)} at the end: {cost:.0f} s more in all.{phase}",
        {"before_s": before, "after_s": after, "cost_s": cost, "phase": grown[0] if grown else None},
        (
            "Look for what grows with the steps: lists in callbacks, metrics that keep all predictions, open files.",
            'Trace both: trainrt.fit(..., trace="auto").',
        ),
        steps=(int(run.steps[np.argmax(late), 0]), int(run.steps[-1, 1])),
    )


def _grown(traces: Sequence[Mapping[str, Any]]) -> tuple[str, float, float] | None:
    """The phase that gained most time from the first trace to the last: its name and both times."""
    seen = [trace["phase_s"] for trace in traces if trace.get("steps_seen")]
    if len(seen) < 2:
        return None
    name = max(seen[-1], key=lambda phase: seen[-1][phase] - seen[0].get(phase, 0.0))
    before, after = seen[0].get(name, 0.0), seen[-1][name]
    return (name, before, after) if after > SLOWER * before else None


@rule
def stragglers(run: Run) -> Iterator[Finding]:
    """Single steps that take many times the usual.

    Means:   now and then a step takes far longer than its neighbours.
    Matters: their sum is a noticeable part of the training; with several workers all wait for the slowest.
    Try:     compare their numbers with what happens then: saving, evaluation, a garbage collection, another process.
    Source:  the clock in the compiled loop; 4 times the running median and 20 ms more.

    >>> told = {"seconds": {"step": 20.0}, "stragglers": {"count": 9, "excess_s": 9.0,
    ...         "worst": [{"step": 70, "s": 1.0, "usual_s": 0.01, "input_s": 0.99}]}}
    >>> [f.causes for f in stragglers(Run.synthetic(steps=100, documents=[Document("timing", 99, told)]))]
    [('stragglers', 'input_bound')]
    >>> list(stragglers(Run.synthetic()))
    []
    """
    timing = run.document("timing")
    told = timing.get("stragglers") or {}
    _, training = _training(timing)
    if not told.get("worst") or told["excess_s"] < max(NOTICED_S, LARGE * training):
        return
    worst = told["worst"]
    waited = [w for w in worst if w["input_s"] is not None and w["input_s"] > 0.7 * w["s"]]
    late = len(waited) > len(worst) / 2
    numbers = ", ".join(str(step) for step in sorted(w["step"] for w in worst[:6]))
    yield about(
        run,
        "stragglers",
        "warning",
        0.6,
        ("stragglers", "input_bound") if late else ("stragglers",),
        f"{told['count']} steps took many times the usual {_ms(worst[0]['usual_s'])}, {told['excess_s']:.1f} s in all; "
        f"the worst: {numbers}." + (" Most of them waited for their batch." if late else ""),
        {"stragglers": dict(told)},
        (
            "Those steps waited for data: look at shuffle buffers that fill, shards that open, slow storage."
            if late
            else "See what else runs at those steps: a callback that saves, other processes on the machine.",
        ),
    )


def _training(timing: Mapping[str, Any]) -> tuple[dict[str, float], float]:
    """Seconds by part, and those of the training itself: without compiling, validation, looks and traces."""
    seconds = dict(timing.get("seconds") or {})
    own = ("input", "step", "callbacks", "writing", "host")
    return seconds, max(sum(seconds.get(name, 0.0) for name in own), 1e-9)


def _step_s(run: Run) -> float:
    return percentile(scalar(run, "step_s"), 50)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
