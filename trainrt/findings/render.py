"""Findings for a terminal: with colour or without, wide or narrow, whatever the names of layers contain."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from trainrt.findings.finding import Finding, shorten

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan"}
NOTHING = "No findings: trainrt saw nothing wrong."


def render(findings: Sequence[Finding], file: TextIO | None = None, width: int | None = None) -> None:
    """Prints findings, ranked as they come: severity, rule, cause, since when, where, message, consequences, advice.

    Args:
      findings: What `diagnose` returned.
      file: Where to; None is standard output. Colour is used where it is a terminal.
      width: Columns; None is the terminal's, 80 where there is none.
    """
    from rich.text import Text

    file = sys.stdout if file is None else file
    console = console_for(file, width)

    def text(words: str, style: str = "") -> Text:
        return Text(printable(words, getattr(file, "encoding", None)), style)

    def say(label: str, words: str) -> None:
        room = max(console.width - len(label), 1)
        for line in text(words).wrap(console, room, overflow="fold"):
            line.rstrip()
            console.print(Text.assemble((label, "dim"), line), soft_wrap=True)
            label = " " * len(label)

    if not findings:
        console.print(text(NOTHING, "green"), soft_wrap=True)
        return
    for finding in findings:
        first, last = finding.steps
        title = Text.assemble(
            text(finding.severity.upper(), COLOURS[finding.severity]), "  ", text(finding.rule, "bold"),
            *((": ", text(finding.causes[0])) if finding.causes else ()),
            (f"  (steps {first} to {last})" if last > first else f"  (step {first})", "dim"),
        )  # fmt: skip
        for line in title.wrap(console, console.width, overflow="fold"):
            line.rstrip()
            console.print(line, soft_wrap=True)
        say("  ", finding.message)
        if finding.where:
            say("  where  ", shorten(finding.where))
        for i, advice in enumerate(finding.advice):
            say("         " if i else "  try    ", advice)
        for consequence in finding.evidence.get("consequences", ()):
            say("  hence  ", f"{consequence['rule']}: {first_sentence(consequence['message'])}")
        console.print()


def console_for(file: TextIO, width: int | None = None) -> Console:
    """Where text is printed to. A notebook's output is a stream that shows colours: rich would make each line of it an
    element of its own, with a line's space between them, and notebooks ask it for colours in a string, too."""
    from rich.console import Console  # takes 60 ms to import, and fit() prints only at its end

    notebook = type(file).__module__.startswith("ipykernel.")
    terminal = True if notebook else False if isinstance(file, io.StringIO) else None  # None: rich finds out
    return Console(
        file=file, width=width, highlight=False, markup=False, emoji=False,
        force_jupyter=False, force_terminal=terminal, color_system="standard" if notebook else "auto",
    )  # fmt: skip


def first_sentence(words: str) -> str:
    """What a consequence is, without its reasons: they are the finding's.

    >>> first_sentence("The loss is 2.5 in the end. It began at 0.1 e.g. here.")
    'The loss is 2.5 in the end.'
    """
    end = words.find(". ")
    return words if end < 0 else words[: end + 1]


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
