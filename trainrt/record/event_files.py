"""The event files of a directory: which one a run begins with, and which ones go on with it after a death."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from trainrt.record import events, reading
from trainrt.record.vocabulary import Roster

PATTERN = f"events.out.tfevents.*{events.SUFFIX}"


def within(directory: Path, deep: bool = False) -> list[Path]:
    """The event files in a directory, or also below it, the oldest first."""
    return sorted(directory.rglob(PATTERN) if deep else directory.glob(PATTERN), key=_age)


def begin(files: Sequence[Path]) -> int:
    """Which of the event files of a directory, in their order, the newest run begins with."""
    at = len(files) - 1
    for i in range(len(files) - 1, -1, -1):
        opening = _opening(files[i])
        if opening is not None:
            at = i
            if resumed(opening) is None:
                break
    return at


def continuation(path: Path) -> Path | None:
    """The event file beside this one with which its run goes on; None: there is none yet."""
    try:
        files = within(path.parent)
    except OSError:
        return None
    later = files[files.index(path) + 1 :] if path in files else []
    for file in later:
        opening = _opening(file)
        if opening is not None:
            return file if resumed(opening) is not None else None
    return None


def _opening(file: Path) -> reading.Opening | None:
    """The first of our events in a file; None: it is not there yet, or cannot be read."""
    try:
        item = next(iter(reading.Reader(file).read()), None)
    except (OSError, ValueError):
        return None
    return item if isinstance(item, reading.Opening) else None


def resumed(opening: reading.Opening) -> int | None:
    """The step from which a run goes on; None: it begins there."""
    at = opening.environment.get("resumed")
    step = at.get("step") if isinstance(at, dict) else None
    return step if type(step) is int else None


def same_weights(a: Roster, b: Roster) -> bool:
    """Whether two rosters have the same axes; a model made again in one process has other numbers in its names."""

    def axes(roster: Roster) -> tuple:
        weights = [(re.sub(r"_\d+(?=/|$)", "", p.path), p.shape, p.dtype) for p in roster.parameters]
        return weights, roster.subjects, roster.scalars

    return axes(a) == axes(b)


def _age(file: Path) -> tuple[float, float, str]:
    """Sorts event files by the seconds in their name, then by when they were written."""
    seconds = file.name.split(".")[3]
    try:
        written = file.stat().st_mtime
    except OSError:
        written = -math.inf
    return (float(seconds) if seconds.isdecimal() else -math.inf, written, str(file))
