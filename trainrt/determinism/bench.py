"""What determinism costs: fast and deterministic, with XLA and without, a fresh process each, beside each other.

A process is in one mode for good, so each mode has processes of its own; they take turns, so that a machine that gets
busy, or a card that gets hot, meets all of them. Beside the times stand the clocks and the power of the card: a
throttled card is not a slow mode.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import trainrt
from trainrt.determinism.prove import CHILD, ScriptFailed, fresh, launch
from trainrt.record.bits import compare_bits
from trainrt.record.run import Run

MODES = ("fast+xla", "fast", "deterministic", "deterministic+xla")
"""XLA is in Keras's fast mode on a GPU and not in its deterministic one, so the two questions are asked apart."""

SAMPLE_S = 0.1
"""Between two looks at the card."""


@dataclasses.dataclass
class Outcome:
    """All processes of one workload in one mode.

    Attributes:
      workload, mode: Which.
      step_s: Seconds a step, of each repetition of each process.
      ratios: Of each round, the median step of this mode over that of `fast`.
      rows_per_s: Rows a second, of the median step; None: unknown rows.
      compile_s: Seconds of the first step, tracing and compiling included, of each process.
      host_bytes: Peak memory of the process, of each.
      device_bytes: Peak memory on the first GPU, of each; empty without one.
      gpu: Of the first GPU, while steps ran: `utilisation` in percent, `clock_mhz`, `power_w`, `throttled` (share of
        samples); medians, empty without one.
      distinct: How many different results the processes gave.
      divergence: Where two of them part first; None: nowhere.
      failed: Why there are no figures; None: there are.
      machine: What it ran on.
    """

    workload: str
    mode: str
    step_s: list[float] = dataclasses.field(default_factory=list)
    ratios: list[float] = dataclasses.field(default_factory=list)
    rows_per_s: float | None = None
    compile_s: list[float] = dataclasses.field(default_factory=list)
    host_bytes: list[int] = dataclasses.field(default_factory=list)
    device_bytes: list[int] = dataclasses.field(default_factory=list)
    gpu: dict[str, float] = dataclasses.field(default_factory=dict)
    distinct: int = 0
    divergence: str | None = None
    failed: str | None = None
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)


def bench(
    workloads: Sequence[str] = (),
    script: str | None = None,
    arguments: Sequence[str] = (),
    *,
    modes: Sequence[str] = MODES,
    rounds: int = 3,
    repeats: int = 3,
    steps: int = 50,
    logdir: str | Path = "trainrt-bench",
    tell: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """Prices the modes on workloads of the zoo, or on the first `fit` of a script.

    Args:
      rounds: Processes of each mode.
      repeats: Timed repetitions in each process, after the first step.
      steps: Steps of a repetition.
      logdir: Where the records go.
      tell: Is told what runs now.

    Raises:
      ValueError: Nothing to measure was asked for.
      FileNotFoundError: There is no such script.
    """
    for name, value in (("rounds", rounds), ("repeats", repeats), ("steps", steps)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}.")
    if script is not None and not Path(script).is_file():
        raise FileNotFoundError(f"{script} is no file. Give a training script, a Python file.")
    results: list[Outcome] = []
    modes = list(modes)
    for workload in [Path(script).stem] if script else workloads:
        outcomes = {mode: Outcome(workload, mode) for mode in modes}
        records: dict[str, list[Path]] = {mode: [] for mode in modes}
        for number in range(rounds):
            medians = {}
            for mode in modes[number % len(modes) :] + modes[: number % len(modes)]:
                outcome = outcomes[mode]
                if outcome.failed:
                    continue
                tell(f"{workload}, {mode}, process {number + 1} of {rounds}")
                place = fresh(Path(logdir) / workload, f"{mode}-")
                options = ["--logdir", str(place), "--mode", mode, "--steps", str(steps), "--repeats", str(repeats)]
                what = [str(script), *arguments] if script else ["--workload", workload]
                try:
                    said = json.loads(launch([*CHILD, "time", *options, *what]).strip().splitlines()[-1])
                except (ScriptFailed, ValueError, IndexError) as error:
                    outcome.failed = _in_a_line(str(error))
                    continue
                medians[mode] = _take(outcome, said)
                records[mode] += Run.find(place)
            for mode, median in medians.items():
                if "fast" in medians:
                    outcomes[mode].ratios.append(median / medians["fast"])
        for mode, outcome in outcomes.items():
            _reproducible(outcome, [Run.open(path) for path in records[mode]])
        results += outcomes.values()
    return results


def _take(outcome: Outcome, said: Mapping[str, Any]) -> float:
    outcome.step_s += said["step_s"]
    outcome.compile_s.append(said["compile_s"])
    outcome.host_bytes.append(said["host_bytes"])
    if said["device_bytes"] is not None:
        outcome.device_bytes.append(said["device_bytes"])
    outcome.gpu = said["gpu"] or outcome.gpu
    median = statistics.median(outcome.step_s)
    outcome.rows_per_s = said["batch"] / median if said["batch"] else None
    return statistics.median(said["step_s"])


def _reproducible(outcome: Outcome, runs: list[Run]) -> None:
    """Compares the processes' bits: the digests of all variables after the first, second, fourth, ... step."""
    outcome.machine = _machine(runs[0]) if runs else {}
    groups: list[Run] = []
    for run in runs:
        verdicts = [compare_bits(first, run) for first in groups]
        if not any(verdict.identical for verdict in verdicts):
            groups.append(run)
            if verdicts and outcome.divergence is None:
                outcome.divergence = str(verdicts[0].difference or "the weights at the end")
    outcome.distinct = len(groups)


def _in_a_line(words: str) -> str:
    """The name and the first line of an error of Python's, where there is one; else the last line."""
    lines = [line for line in words.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return (errors or lines or ["failed"])[-1][:300]


# ------------------------------------------------------------------------------------------------------- the child


def child(options: argparse.Namespace) -> None:
    """Times one mode in this process and prints what it measured as one line of JSON."""
    from trainrt.determinism import modes
    from trainrt.determinism import script as scripts
    from trainrt.determinism.zoo import ZOO

    deterministic, xla = options.mode.startswith("deterministic"), options.mode.endswith("+xla")
    import keras

    fit = trainrt.fit  # the real one: a script's calls of it are taken over
    if deterministic:
        modes.enable(0)
    else:
        keras.utils.set_random_seed(0)
    if options.workload:
        workload = ZOO[options.workload]
        model, x, y = workload.make(options.steps)
        print(
            json.dumps(_timed(fit, model, {"x": x, "y": y, "batch_size": workload.batch}, options, deterministic, xla))
        )
        return

    said: list[dict[str, Any]] = []

    def taken(model: Any, *args: Any, **kwargs: Any) -> None:
        given = {k: v for k, v in scripts.named(args, kwargs).items() if k not in _OVERRIDDEN}
        said.append(_timed(fit, model, given, options, deterministic, xla))
        raise scripts.Enough

    scripts.run(options.script, options.arguments, taken)
    print(json.dumps(said[0]))


_OVERRIDDEN = frozenset(
    (
        *("epochs", "verbose", "validation_data", "validation_split", "callbacks"),
        *("logdir", "observe", "digests", "deterministic", "seed", "checkpoint", "trace", "experiment"),
    )
)


def _timed(
    fit: Callable[..., Any],
    model: Any,
    arguments: dict[str, Any],
    options: argparse.Namespace,
    deterministic: bool,
    xla: bool,
) -> dict[str, Any]:
    import keras

    from trainrt import doors
    from trainrt.determinism import modes, script

    mode: Any = (modes.XLA if xla else True) if deterministic else False
    if not deterministic:
        doors.set_jit(model, xla)
    common = {**arguments, "verbose": 0, "observe": False, "deterministic": mode}
    script.limit(1)
    begun = time.perf_counter()
    fit(model, **common, epochs=1)
    compile_s = time.perf_counter() - begun
    script.limit(options.steps, epochs=options.repeats + 1)
    ends: list[float] = []
    clock = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: ends.append(time.perf_counter()))
    with Card() as card:
        # The first epoch warms up; what a call of `fit` costs once is in none of the others.
        history = fit(model, **common, epochs=options.repeats + 1, callbacks=[clock])
    steps = min(int(history.params.get("steps") or options.steps), options.steps)
    step_s = [(b - a) / max(steps, 1) for a, b in itertools.pairwise(ends)]
    script.limit(options.steps)
    fit(model, **common, epochs=1, logdir=options.logdir, digests=True)
    return {
        "step_s": step_s,
        "compile_s": compile_s,
        "batch": arguments.get("batch_size"),
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "device_bytes": _device_peak(),
        "gpu": card.summary(),
    }


def _device_peak() -> int | None:
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        return None
    return int(tf.config.experimental.get_memory_info("GPU:0")["peak"])


class Card:
    """Looks at the first NVIDIA card while the context lasts; does nothing where there is none."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float, float, bool]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Card:
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            self._thread = threading.Thread(target=self._look, name="trainrt-card", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _look(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            card = pynvml.nvmlDeviceGetHandleByIndex(0)
            idle = pynvml.nvmlClocksThrottleReasonGpuIdle | pynvml.nvmlClocksThrottleReasonApplicationsClocksSetting
            while not self._stop.wait(SAMPLE_S):
                reasons = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(card)
                self._samples.append(
                    (
                        float(pynvml.nvmlDeviceGetUtilizationRates(card).gpu),
                        float(pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_SM)),
                        pynvml.nvmlDeviceGetPowerUsage(card) / 1e3,
                        bool(reasons & ~idle),
                    )
                )
        except Exception:  # no driver, no permission: the figures stand without
            return

    def summary(self) -> dict[str, float]:
        if not self._samples:
            return {}
        utilisation, clock, power, throttled = zip(*self._samples, strict=True)
        return {
            "utilisation": statistics.median(utilisation),
            "clock_mhz": statistics.median(clock),
            "power_w": statistics.median(power),
            "throttled": sum(throttled) / len(throttled),
        }


# ------------------------------------------------------------------------------------------------------ what is shown


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each workload and mode."""
    heads = (
        "workload",
        "mode",
        "step ms",
        "spread",
        "/ fast",
        "rows/s",
        "first s",
        "host MB",
        "GPU MB",
        "card",
        "bits",
    )
    rows = [heads, *(_row(outcome) for outcome in outcomes)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    return "\n".join("  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _row(o: Outcome) -> tuple[str, ...]:
    if o.failed or not o.step_s:
        return (o.workload, o.mode, "-", "", "", "", "", "", "", "", o.failed or "no figures")
    ms = [1e3 * s for s in o.step_s]
    card = ""
    if o.gpu:
        hot = f", {o.gpu['throttled']:.0%} throttled" if o.gpu["throttled"] else ""
        card = f"{o.gpu['utilisation']:.0f}%, {o.gpu['clock_mhz']:.0f} MHz, {o.gpu['power_w']:.0f} W{hot}"
    processes = len(o.compile_s)
    bits = f"{o.distinct} of {processes} distinct" if o.distinct > 1 else f"the same in {processes}"
    return (
        o.workload,
        o.mode,
        f"{statistics.median(ms):.3f}",
        f"{min(ms):.3f}-{max(ms):.3f}",
        f"{statistics.median(o.ratios):.2f}" if o.ratios else "",
        f"{o.rows_per_s:,.0f}" if o.rows_per_s else "",
        f"{statistics.median(o.compile_s):.1f}",
        f"{max(o.host_bytes) / 2**20:.0f}",
        f"{max(o.device_bytes) / 2**20:.0f}" if o.device_bytes else "",
        card,
        bits if processes > 1 else "not repeated",
    )


def plot(outcomes: Sequence[Outcome]) -> str:
    """An SVG: a bar for the median step of each mode, with its spread, the workloads below each other."""
    shown = [o for o in outcomes if o.step_s]
    bar, gap, left, width = 18, 14, 250, 420
    parts, y, last = [], 30, ""
    for o in shown:
        if o.workload != last:
            y, last = y + gap, o.workload
        peers = [p for p in shown if p.workload == o.workload]
        scale = width / max(max(p.step_s) for p in peers)
        low, mid, high = (scale * f(o.step_s) for f in (min, statistics.median, max))
        middle = y + bar / 2 - 2
        colour = "#2b6cb0" if o.mode.startswith("deterministic") else "#a0aec0"
        parts.append(
            f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">{o.workload} {o.mode}</text>'
            f'<rect x="{left}" y="{y}" width="{mid:.1f}" height="{bar - 4}" fill="{colour}"/>'
            f'<path d="M{left + low:.1f} {middle}H{left + high:.1f}" stroke="#1a202c"/>'
            f'<text x="{left + high + 6:.1f}" y="{y + 11}">{1e3 * statistics.median(o.step_s):.2f} ms</text>'
        )
        y += bar
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 90}" height="{y + 20}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="12" y="20" font-weight="bold">Milliseconds a step: median, smallest to largest</text>'
        f"{''.join(parts)}</svg>"
    )


def as_json(outcomes: Sequence[Outcome], machine: Mapping[str, Any]) -> str:
    return json.dumps({"machine": dict(machine), "outcomes": [dataclasses.asdict(o) for o in outcomes]}, indent=1)


def machine(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What the figures hold for, from the passports of the runs."""
    return next((outcome.machine for outcome in outcomes if outcome.machine), {})


def _machine(run: Run) -> dict[str, Any]:
    names = ("versions", "processor", "cores", "devices", "platform")
    known = {name: run.environment.get(name) for name in names}
    versions = known["versions"] or {}
    return {**known, "versions": {name: versions.get(name) for name in ("tensorflow", "keras", "numpy")}}
