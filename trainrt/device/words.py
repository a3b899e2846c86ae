"""What is known of the device and of where the time went, in a few labelled lines for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainrt.record.run import Run

_DONE = ("forward", "backward", "clip", "update", "statistics")


def lines(run: Run) -> list[tuple[str, str]]:
    """(label, words) for each thing that the run recorded about its time and its device."""
    timing, telemetry = run.document("timing"), [d.content for d in run.documents if d.kind == "telemetry"]
    said = [("time", words) for words in time_lines(timing)]
    said += [("device", words) for words in device_lines(telemetry)]
    return [*said, *(("trace", words) for words in trace_lines(run.document("trace")))]


def time_lines(timing: Mapping[str, Any]) -> list[str]:
    """Where the time went; nothing for an empty document.

    >>> time_lines({"wall_s": 4.0, "seconds": {"step": 3.0, "input": 1.0}, "per_second": 25.0})
    ['4 s, of which steps 3 s, waiting for input 1 s; 25 steps a second']
    """
    if not timing:
        return []
    seconds = sorted(timing["seconds"].items(), key=lambda part: -part[1])
    parts = [
        f"{_PARTS.get(name, name)} {duration(s)}" for name, s in seconds if s >= 0.005 * timing["wall_s"] and s > 0
    ]
    rate = timing.get("per_second")
    said = f"{duration(timing['wall_s'])}, of which {', '.join(parts)}" + (
        f"; {rate:.3g} steps a second" if rate else ""
    )
    straggling = timing.get("stragglers") or {}
    if not straggling.get("count"):
        return [said]
    worst = straggling["worst"][0]
    return [
        said,
        f"{straggling['count']} straggling steps, {duration(straggling['excess_s'])} in all; the worst, "
        f"step {worst['step']}, "
        f"took {duration(worst['s'])}, the usual is {duration(worst['usual_s'])}",
    ]


def device_lines(telemetry: Sequence[Mapping[str, Any]]) -> list[str]:
    """The process and each GPU over the run, from the documents "telemetry"."""
    values: dict[str, list[float]] = {}
    for content in telemetry:
        for name, samples in content.get("samples", {}).items():
            values.setdefault(name, []).extend(v for v in samples if v is not None)
    said = []
    if values.get("rss_bytes"):
        cores = sum(values["cpu_cores"]) / len(values["cpu_cores"])
        said.append(
            f"the process kept {cores:.1f} cores busy and held up to {max(values['rss_bytes']) / 2**30:.2f} GiB"
        )
    cards: list[Mapping[str, Any]] = next(
        (content["cards"] for content in reversed(telemetry) if content.get("cards")), []
    )
    for i, card in enumerate(cards):
        known = {name: values[f"gpu{i}/{name}"] for name in _CARD if values.get(f"gpu{i}/{name}")}
        words = [form(samples) for name, form in _CARD.items() if (samples := known.get(name))]
        said.append(f"GPU {i} {card.get('name') or ''}: {', '.join(words) or 'told nothing'}")
    return said + [note for content in telemetry for note in content.get("notes", ())]


_PARTS = {
    "first_call": "tracing and compiling",
    "step": "steps",
    "input": "waiting for input",
    "writing": "handing over the record",
    "probe": "looks into the model",
    "trace": "tracing the device",
    "host": "Python",
}
_CARD: dict[str, Callable[[list[float]], str]] = {
    "utilisation": lambda v: f"busy {sum(v) / len(v):.0%}",
    "memory_bytes": lambda v: f"up to {max(v) / 2**30:.1f} GiB used",
    "tf_peak_bytes": lambda v: f"{max(v) / 2**30:.1f} GiB by TensorFlow",
    "power_w": lambda v: f"{sum(v) / len(v):.0f} W",
    "temperature_c": lambda v: f"up to {max(v):.0f} C",
}


def trace_lines(trace: Mapping[str, Any]) -> list[str]:
    """What a trace says; nothing for an empty document.

    >>> trace_lines({"steps": [3, 4], "steps_seen": 0, "notes": ["The trace holds no marked step."]})
    ['steps 3 to 4: The trace holds no marked step.']
    """
    if not trace:
        return []
    where = f"steps {trace['steps'][0]} to {trace['steps'][1]}"
    notes = " ".join(trace.get("notes", ()))
    if not trace.get("steps_seen"):
        return [f"{where}: {notes}"]
    share, phase_s, step_s = trace["share"], trace["phase_s"], trace["step_s"]["median"]
    said = [
        f"{where}, one a call: {duration(step_s)} a step, of which waiting for input {share['input']:.0%}, "
        f"computing {share['compute']:.0%}, host alone {share['host']:.0%}"
        + ("" if share["idle"] is None else f"; the GPU idle {share['idle']:.0%}")
    ]
    if trace.get("untraced_step_s"):
        said[0] += f". Untraced, many a call, a step took at best {duration(trace['untraced_step_s'])}"
    busy = sum(phase_s[name] for name in _DONE)
    if busy:
        parts = ", ".join(f"{name} {duration(phase_s[name])} ({phase_s[name] / busy:.0%})" for name in _DONE)
        said.append(f"phases: {parts}")
    top = [op for op in trace["ops"] if op["phase"] != "input"][:3]
    if top:
        said.append(
            "most time: "
            + ", ".join(
                f"{op['kind']}{' of ' + op['layer'] if op['layer'] else ''} {duration(op['s'])} ({op['share']:.0%})"
                for op in top
            )
        )
    kernels = trace.get("kernels")
    if kernels:
        said.append(
            f"{kernels['a_step']:.0f} kernels a step, half of them shorter than {duration(kernels['median_s'])}"
        )
    utilisation = trace.get("utilisation") or {}
    if utilisation:
        said.append(
            ", ".join(f"{name.replace('_', ' ')} {value:.0%} of the peak" for name, value in utilisation.items())
        )
    if trace.get("file"):
        said.append(f"{trace['file']}, {trace['bytes'] / 1e6:.1f} MB: the Profile tab of TensorBoard shows it")
    return [*said, *([notes] if notes else [])]


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> [duration(s) for s in (3e-6, 0.0124, 2.5, 3700)]
    ['3 us', '12.4 ms', '2.5 s', '1.03 h']
    """
    for unit, size in (("us", 1e-6), ("ms", 1e-3), ("s", 1.0)):
        if seconds < 1000 * size or (unit == "s" and seconds < 3600):
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 3600:.3g} h"
