"""A comparison on one screen."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from trainrt.comparison.difference import Difference
from trainrt.comparison.ranking import Comparison
from trainrt.findings.finding import shorten
from trainrt.findings.render import console_for, printable

SHOWN = 4
"""Explanations that are told in full."""

DEPARTURES = 4

IN_FULL, LISTED = 3, 20
"""Of many runs compared with one, so many are told in full, and so many in two lines."""


def text(comparison: Comparison, width: int = 100) -> str:
    """The comparison without colour, as `str` has it."""
    import io

    file = io.StringIO()
    render(comparison, file, width)
    return file.getvalue().rstrip("\n")


def render(comparison: Comparison, file: TextIO | None = None, width: int | None = None) -> None:
    """Prints a comparison: what each run came to, what likely explains it, where BAD leaves GOOD's band.

    Args:
      comparison: What `compare` returned.
      file: Where to; None is standard output. Colour is used where it is a terminal.
      width: Columns; None is the terminal's, 80 where there is none.
    """
    say = _speaker(file, width)
    say("GOOD  ", comparison.good)
    say("BAD   ", comparison.bad)
    for row in comparison.outcome:
        values = (" -> ".join(f"{v:.4g}" for v in row[side]) for side in ("good", "bad"))
        say("      ", "{}: {} in GOOD, {} in BAD".format(row["name"], *values))
    say()
    likely = comparison.likely
    if likely:
        say("", "What most likely explains it", "bold")
        for index, each in enumerate(likely[:SHOWN], 1):
            _explanation(say, index, each)
    else:
        say("", comparison.verdict, "bold")
    rest = [*likely[SHOWN:], *(d for d in comparison.differences if d not in likely)]
    if rest:
        say("also  ", "; ".join(f"{d.name} {_short(d.good)} -> {_short(d.bad)}" for d in rest[:8])
            + (f"; and {len(rest) - 8} more" if len(rest) > 8 else ""))  # fmt: skip
    say()
    say("start ", str(comparison.start))
    if comparison.departures:
        say("band  ", f"BAD leaves the band in which GOOD moves, first at {comparison.departures[0]}.")
        for each in _spread(comparison)[1:DEPARTURES]:
            say("      ", f"then {each}.")
    else:
        say("band  ", "BAD stays in the band in which GOOD moves.")
    for side, findings in (("BAD", comparison.only_bad), ("GOOD", comparison.only_good)):
        for finding in findings:
            say(f"only {side}  ", f"{finding.rule}: {shorten(finding.causes)}. {finding.message}")


def render_all(comparisons: Sequence[Comparison], file: TextIO | None = None, width: int | None = None) -> None:
    """Prints what became of several runs beside the same good one: each in two lines, and then the first ones in full.

    Args:
      comparisons: What `compare` returned for the same GOOD; at least one. Of one, all is said at once.
      file, width: As for `render`.
    """
    if len(comparisons) > 1:
        say = _speaker(file, width)
        say("GOOD  ", comparisons[0].good)
        for number, each in enumerate(comparisons[:LISTED], 1):
            label = f"{number:4}  "
            say(label, each.bad, "bold")
            sure = f" ({each.cause.likelihood:.0%} likely)" if each.cause else ""
            say(" " * len(label), "; ".join([each.verdict.rstrip(".") + sure, *_came_to(each)]))
        if len(comparisons) > LISTED:
            say("      ", f"and {len(comparisons) - LISTED} more.")
        say()
    for index, each in enumerate(comparisons[:IN_FULL]):
        if index:
            say()
        render(each, file, width)
    if len(comparisons) > IN_FULL:
        say()
        say("", f"The first {IN_FULL} in full; of another one: trainrt compare GOOD BAD.")


def _came_to(comparison: Comparison) -> Iterator[str]:
    for row in comparison.outcome[:1]:
        yield f"{row['name']} {row['bad'][-1]:.4g}, in GOOD {row['good'][-1]:.4g}"
    if not comparison.start.common:
        yield "no recorded steps in common"
    elif comparison.start.until is not None:
        yield f"parts from GOOD in step {comparison.start.until}"


def _speaker(file: TextIO | None, width: int | None) -> Callable[..., None]:
    """say(label, words, style): prints words in lines that fit beside a label; say() prints an empty line."""
    from rich.text import Text

    file = sys.stdout if file is None else file
    console = console_for(file, width)

    def say(label: str = "", words: str = "", style: str = "") -> None:
        words = printable(words, getattr(file, "encoding", None))
        room = max(console.width - len(label), 20)
        for line in Text(words, style).wrap(console, room, overflow="fold"):
            line.rstrip()
            console.print(Text.assemble((label, "dim"), line), soft_wrap=True)
            label = " " * len(label)

    return say


def _explanation(say, index: int, each: Difference) -> None:
    say(f" {index}. ", f"{each.name}: {each.good} -> {each.bad}  ({each.likelihood:.0%} likely)", "bold")
    for words in (each.message, *each.support):
        if words:
            say("    ", words)
    for advice in each.advice:
        say("    try  ", advice)


def _spread(comparison: Comparison) -> list:
    """The first departure of each statistic: a screen has no room for every layer."""
    seen: dict[str, object] = {}
    for each in comparison.departures:
        seen.setdefault(each.statistic, each)
    return list(seen.values())


def _short(words: str) -> str:
    return words if len(words) <= 40 else f"{words[:37]}..."
