"""A run in the words and numbers of the page's head: its verdict, its findings, its passport, what it recorded."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from trainrt.device import words as device_words
from trainrt.findings import diagnose
from trainrt.plugin import device, tables
from trainrt.record.run import Run
from trainrt.record.vocabulary import Document  # noqa: F401 - for the examples

PATIENCE = 20
"""A run that is still written to is judged again after so many times what judging took: at most 5 % of a core."""

WAIT_S = 0.3
"""How long an answer waits for the rules."""

LARGE = 200_000
DELAY_S = 1.5
"""The first picture of a run of more cells (windows x weights) than `LARGE` comes before the rules begin to read it."""


class Judge:
    """The findings of a run: those it was closed with, or what the rules say of it so far.

    Attributes:
      rounds: How often the rules have judged; a page that sees it change asks again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._seen = -1
        self._findings: list[dict[str, Any]] = []
        self._again = 0.0
        self.rounds = 0

    def findings(self, run: Run, whole: bool = False) -> list[dict[str, Any]]:
        """Findings as dicts, perhaps of some windows ago; `whole` waits until the rules have read all of it."""
        if run.end is not None or not len(run):
            return run.recorded_findings
        later = not whole and not self.rounds and len(run) * len(run.roster.parameters) > LARGE
        with self._lock:
            idle = self._thread is None or not self._thread.is_alive()
            if idle and len(run) != self._seen and time.monotonic() >= self._again:
                # Of a slice: the run itself may grow while the rules read it.
                arguments = (run[:], DELAY_S if later else 0.0)
                self._thread = threading.Thread(target=self._judge, args=arguments, daemon=True)
                self._thread.start()
            thread = self._thread
        if thread is not None and not later:
            thread.join(None if whole else WAIT_S)
        return self._findings

    @property
    def busy(self) -> bool:
        """Whether the first verdict is still to come."""
        return not self.rounds and self._thread is not None and self._thread.is_alive()

    def _judge(self, run: Run, delay_s: float) -> None:
        time.sleep(delay_s)
        begun = time.monotonic()
        self._findings = [finding.to_dict() for finding in diagnose(run)]
        self._seen = len(run)
        self._again = time.monotonic() + PATIENCE * (time.monotonic() - begun)
        self.rounds += 1


def verdict(run: Run, findings: list[dict[str, Any]], busy: bool = False) -> dict[str, str]:
    """Health at a glance: `level` is "good", "info", "warning", "error" or "none", `title` a sentence.

    >>> verdict(Run.synthetic(steps=4), [])["title"]
    'No rule found a fault so far'
    >>> verdict(Run.synthetic(steps=0, end={"how": "exception", "detail": "ValueError: no"}), [])["title"]
    'It ended before its first step'
    """
    if busy:
        return {"level": "none", "title": "The rules are reading this run"}
    level = next((level for level in ("error", "warning", "info") if any(_level(f) == level for f in findings)), "good")
    if level in ("good", "info") and not len(run):
        why = run.environment.get("unobserved")
        waits = "It ended before its first step" if run.end else "No steps recorded yet"
        return {"level": "none", "title": f"Not observed: {why}" if why else waits}
    if level in ("good", "info"):
        return {"level": level, "title": "No rule found a fault" if run.end else "No rule found a fault so far"}
    first = next(f for f in findings if _level(f) == level)
    causes = first.get("causes") or [first.get("rule", "")]
    return {"level": level, "title": f"Likely cause: {plain(str(causes[0]))}"}


def _level(finding: Mapping[str, Any]) -> str:
    return str(finding.get("severity", "info"))


_WORDS = {"lr": "learning rate", "nan": "NaN", "relu": "ReLU", "batchnorm": "batch norm", "init": "initialisation"}


def plain(cause: str) -> str:
    """An id of the vocabulary of causes as words.

    >>> plain("lr_too_high"), plain("nan_in_data")
    ('learning rate too high', 'NaN in data')
    """
    return " ".join(_WORDS.get(word, word) for word in cause.split("_"))


def summary(
    name: str, run: Run, findings: list[dict[str, Any]], traced: bool = False, busy: bool = False
) -> dict[str, Any]:
    """Everything about a run but its curves, JSON-able. `busy`: the rules have not come to a verdict yet."""
    windows = len(run)
    rows = {group: [_row(p) for p in tables.grouped(run, group).roster.parameters] for group in tables.GROUPS}
    if len(rows["blocks"]) in (len(rows["layers"]), 1):
        del rows["blocks"]
    loss = run.scalar("loss").tolist() if windows and "loss" in run.roster.scalars else []
    return {
        "name": name,
        "verdict": verdict(run, findings, busy),
        "findings": [_finding(f) for f in findings],
        "windows": windows,
        "steps": [int(run.steps[0, 0]), int(run.steps[-1, 1])] if windows else None,
        "seconds": float(run.wall_time[-1] - run.environment["start"]) if windows and _started(run) else None,
        "last_time": float(run.wall_time[-1]) if windows else None,
        "loss": [loss[0], loss[-1]] if loss else None,
        "rows": rows,
        "elements": sum(p.size for p in run.roster.parameters),
        "statistics": [{"name": n, "kind": tables.kind(n)} for n in run.statistics],
        "slots": list(run.roster.slots),
        "scalars": list(run.roster.scalars),
        "telemetry": [device.PREFIX + name for name in device.samples(run)[1]] if windows else [],
        "epochs": [{"epoch": e.epoch, "step": e.step, "logs": e.logs} for e in run.epochs[-1:]],
        "epoch_count": len(run.epochs),
        "end": run.end,
        "environment": run.environment,
        "data": run.data,
        "device": _device(run),
        "problems": run.problems,
        "traced": traced,
    }


def _started(run: Run) -> bool:
    return isinstance(run.environment.get("start"), (int, float))


def _device(run: Run) -> list[tuple[str, str]]:
    """Where the time went and how the device did, in words; of a record from elsewhere, which may hold anything, none.

    >>> _device(Run.synthetic(documents=[Document("timing", 9, {"wall_s": "long"})]))
    []
    """
    try:
        return device_words.lines(run)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return []


def _row(parameter) -> dict[str, Any]:
    return {"path": parameter.path, "shape": list(parameter.shape), "dtype": parameter.dtype, "size": parameter.size}


def _finding(finding: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a finding that the page shows, each of the type it expects, whatever lies in the file."""

    def strings(value) -> list[str]:
        return [str(item) for item in value] if isinstance(value, list | tuple) else []

    given = finding.get("steps")
    steps = [s for s in given if isinstance(s, int)] if isinstance(given, list | tuple) else []
    evidence = finding.get("evidence")
    followed = evidence.get("consequences") if isinstance(evidence, Mapping) else None
    consequences: list[Any] = followed if isinstance(followed, list) else []
    return {
        "rule": str(finding.get("rule", "")),
        "severity": _level(finding) if _level(finding) in ("error", "warning") else "info",
        "confidence": finding.get("confidence") if isinstance(finding.get("confidence"), int | float) else None,
        "causes": [plain(cause) for cause in strings(finding.get("causes"))],
        "where": strings(finding.get("where")),
        "steps": steps if len(steps) == 2 else None,
        "message": str(finding.get("message", "")),
        "advice": strings(finding.get("advice")),
        "consequences": [
            {"rule": str(c.get("rule", "")), "message": str(c.get("message", ""))}
            for c in consequences
            if isinstance(c, Mapping)
        ],
    }
