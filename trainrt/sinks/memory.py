"""Keeps the record in memory: what `history.run` reads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from trainrt.record.run import Run
from trainrt.record.vocabulary import Document, Epoch, Record, Roster


class Memory:
    """A sink whose `run()` is the run so far."""

    def __init__(self, path: str | os.PathLike | None = None):
        self._path = path
        self._roster: Roster | None = None
        self._environment: Mapping[str, Any] = {}
        self._records: list[Record] = []
        self._epochs: list[Epoch] = []
        self._documents: list[Document] = []
        self._findings: Sequence[Mapping[str, Any]] = ()
        self._end: Mapping[str, Any] | None = None

    def open(self, roster: Roster, environment: Mapping[str, Any]) -> None:
        self._roster, self._environment = roster, environment

    def write(self, item: Record | Epoch | Document) -> None:
        if isinstance(item, Epoch):
            self._epochs.append(item)
        elif isinstance(item, Document):
            self._documents.append(item)
        else:
            self._records.append(item)

    def close(self, findings: Sequence[Mapping[str, Any]], end: Mapping[str, Any]) -> None:
        self._findings, self._end = findings, end

    def run(self) -> Run | None:
        """The run as recorded so far; None before it was opened."""
        if self._roster is None:
            return None
        return Run.from_records(
            self._roster,
            list(self._records),
            environment=self._environment,
            epochs=list(self._epochs),
            findings=list(self._findings),
            end=self._end,
            path=self._path,
            documents=list(self._documents),
        )
