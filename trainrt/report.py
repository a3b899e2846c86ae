"""A run in a few lines, and what is wrong with it: what `trainrt report` prints."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainrt.findings import Finding
    from trainrt.record.run import Run


def print_report(path: Path, run: Run, findings: list[Finding]) -> None:
    from trainrt.findings.render import render

    lines = summary(run)
    width = max((len(label) for label, _ in lines), default=0)
    say(str(path))
    for label, words in lines:
        say(words, f"  {label:{width}}  ")
    print()
    if findings or len(run.steps):
        render(findings)
    else:
        print("No step was recorded, so there is nothing to judge but what was asked for: no rule faults that.")


def summary(run: Run) -> list[tuple[str, str]]:
    """A run in a few labelled lines: what trained, how far it came, how it ended, what could not be read."""
    from trainrt.device import words as device_words

    environment = run.environment or {}
    lines: list[tuple[str, str]] = []
    parameters = run.roster.parameters
    size = sum(parameter.size for parameter in parameters)
    model = environment.get("model")
    name = f"{model.get('name') if isinstance(model, dict) else model}, " if model else ""
    lines.append(("model", f"{name}{len(parameters)} trainable weights, {size:,} elements"))
    optimizer = environment.get("optimizer")
    if optimizer:
        lines.append(("optimizer", _optimizer(optimizer)))
    clip = (environment.get("fit") or {}).get("clip")
    if clip:
        lines.append(("clip", str(clip)))
    if len(run.steps):
        lines.append(("steps", f"{run.steps[0, 0]} to {run.steps[-1, 1]}, in {len(run.steps)} windows"))
    else:
        lines.append(("steps", "none were recorded"))
    if "loss" in run.roster.scalars and len(run.steps):
        loss = run.scalar("loss")
        lines.append(("loss", f"{loss[0]:.4g} -> {loss[-1]:.4g}"))
    if run.epochs:
        last = run.epochs[-1]
        logs = ", ".join(f"{name} {value:.4g}" for name, value in last.logs.items() if isinstance(value, (int, float)))
        lines.append(("epochs", f"{len(run.epochs)}; the last: {logs}"))
    lines.extend(device_words.lines(run))
    mode = environment.get("determinism")
    if isinstance(mode, dict) and mode.get("enforced"):
        proof = environment.get("certificate") or {}
        lines.append(
            ("bits", f"deterministic, fingerprint {mode.get('fingerprint')}; {proof.get('result', 'not proven')}")
        )
    lines.append(("ended", _ending(run.end)))
    lines.extend(("problem", str(problem)) for problem in run.problems)
    return lines


def _optimizer(optimizer: Any) -> str:
    if not isinstance(optimizer, dict):
        return str(optimizer)
    config = optimizer.get("config") or {}
    unused = () if config.get("use_ema") else ("ema_momentum",)
    shown = [
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in config.items()
        if key not in ("name", *unused) and isinstance(value, (int, float, str)) and value is not False
    ]
    return f"{optimizer.get('class') or optimizer.get('name', '?')}({', '.join(shown)})"


def _ending(end: Mapping[str, Any] | None) -> str:
    if end is None:
        return "not yet, or it was killed: the record has no end"
    return f"{end.get('how', '?')}{': ' if end.get('detail') else ''}{end.get('detail') or ''}"


def as_json(path: Path, run: Run, findings: list[Finding]) -> dict[str, Any]:
    return {
        "path": str(path),
        "summary": dict(summary(run)),
        "steps": [int(run.steps[0, 0]), int(run.steps[-1, 1])] if len(run.steps) else None,
        "windows": len(run.steps),
        "problems": [str(problem) for problem in run.problems],
        "findings": [finding.to_dict() for finding in findings],
    }


def say(words: str, label: str = "") -> None:
    from trainrt.findings.render import printable

    print(label + printable(words, sys.stdout.encoding))
