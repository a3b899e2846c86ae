"""What is known of the device and of where the time went, in a few labelled lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainrt.run import Run

_DONE = ("forward", "backward", "clip", "update", "statistics")


def lines(run: Run) -> list[tuple[str, str]]:
    """(label, words) for each thing that the run recorded about its time and its device."""
    return [("trace", words) for words in trace_lines(run.document("trace"))]


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
        said[0] += f". Untraced, many a call, a step took {duration(trace['untraced_step_s'])}"
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
