"""Findings for a terminal: with colour or without, wide or narrow, whatever the names of layers contain."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from trainrt.findings.finding import Finding, shorten

COLOURS = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan"}
NOTHING = "No findings: trainrt saw nothing wrong."


def render(findings: Sequence[Finding], file: TextIO | None = None, width: int | None = None) -> None:
    """Prints findings, ranked as they come: severity, rule, cause, since when, where, message, consequences, advice.

    Args:
      findings: What `diagnose` returned.
      file: Where to; None is standard output. Colour is used where it is a terminal.
      width: Columns; None is the terminal's, 80 where there is none.
    """
    # Rich takes 60 ms to import, and fit() prints only at its end.
    from rich.console import Console, Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    file = sys.stdout if file is None else file
    console = Console(file=file, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False)

    def text(words: str, style: str = "") -> Text:
        return Text(printable(words, getattr(file, "encoding", None)), style=style, overflow="fold")

    if not findings:
        console.print(text(NOTHING, "green"))
        return
    for finding in findings:
        first, last = finding.steps
        title = text(finding.severity.upper(), COLOURS[finding.severity])
        title.append_text(text(f"  {finding.rule}", "bold"))
        if finding.causes:
            title.append_text(text(f": {finding.causes[0]}"))
        title.append_text(text(f"  (steps {first} to {last})" if last > first else f"  (step {first})", "dim"))
        rows = [("where", shorten(finding.where))] if finding.where else []
        rows += [("try", line) for line in finding.advice]
        for consequence in finding.evidence.get("consequences", ()):
            rows.append(("so", f"{consequence['rule']}: {consequence['message']}"))
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(ratio=1, overflow="fold")
        previous = None
        for label, words in rows:
            table.add_row(text("" if label == previous else label, "dim"), text(words))
            previous = label
        body = Group(text(finding.message), *([table] if rows else []))
        console.print(title)
        console.print(Padding(body, (0, 0, 1, 2)))


def printable(words: str, encoding: str | None = None) -> str:
    """The words with nothing in them that could steer a terminal or that its encoding lacks.

    >>> printable("a\\x1b[31m\\tb", "ascii"), printable("größe", "ascii")
    ('a\\\\x1b[31m b', 'gr\\\\xf6\\\\xdfe')
    """
    words = " ".join(str(words).split())
    words = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in words)
    try:
        return words.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")
    except LookupError:
        return words.encode("ascii", "backslashreplace").decode()
