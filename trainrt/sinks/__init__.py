"""Where a record goes. A sink is any object with `open`, `write` and `close`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from trainrt.record.vocabulary import Document, Epoch, Record, Roster


class Sink(Protocol):
    """Takes the record of a run as it comes. All calls come from one thread, in order.

    A sink that raises is left out from then on, with one warning; the training goes on.
    """

    def open(self, roster: Roster, environment: Mapping[str, Any]) -> None:
        """Called once, before the first record."""

    def write(self, item: Record | Epoch | Document) -> None:
        """Called with windows of steps every second or so, after each epoch, and with documents as they come."""

    def close(self, findings: Sequence[Mapping[str, Any]], end: Mapping[str, Any]) -> None:
        """Called once: the findings as dicts, and how the run ended ("how", "detail", "step", "wall_time")."""
