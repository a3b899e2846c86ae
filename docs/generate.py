"""Writes `rules.md`, `statistics.md`, `causes.md` and `changes.md` from the docstrings: `python docs/generate.py`.

What a rule or a statistic says of itself is its only description; these pages are it, and a test keeps them current.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import trainrt.record.run  # noqa: F401 - fills the tables
from trainrt import findings
from trainrt.record import statistics

HERE = Path(__file__).parent
NOTE = "<!-- Written by docs/generate.py from the docstrings; edit those. -->\n"


def rules() -> str:
    """A section for each rule, in the order in which they are asked."""
    parts = [f"# Rules\n\n{NOTE}\n`trainrt explain RULE` prints each of these in the terminal.\n"]
    for rule in findings.ALL:
        first, _, rest = findings.explain(rule).partition("\n")
        parts.append(f"\n## {rule.__name__}\n\n{first}\n\n{_as_markdown(rest)}")
    return "".join(parts)


def statistics_page() -> str:
    """A row for each quantity of a tensor, and for each statistic of a weight."""
    parts = [
        f"# Statistics\n\n{NOTE}\n`run[name]` is an array [windows, weights]; NaN: not measured, or undefined. What it "
        "is made from are the moments, joint sums and scalars of the record (`trainrt.record.vocabulary`).\n"
    ]
    parts.append(
        "\n## Quantities of a tensor\n\nNamed `<subject>_<quantity>`: `gradient_norm`, `update_rms`, and so on "
    )
    parts.append("for each slot of the optimizer.\n\n| quantity | unit | made from | meaning |\n|---|---|---|---|\n")
    parts += [_row(name, each) for name, each in statistics.QUANTITIES.items()]
    parts.append("\n## Statistics of a weight\n\n| statistic | unit | made from | meaning |\n|---|---|---|---|\n")
    own = {n: s for n, s in statistics.STATISTICS.items() if s.function.__module__.startswith("trainrt")}
    parts += [_row(name, each) for name, each in own.items()]
    return "".join(parts)


def causes() -> str:
    """The vocabulary of root causes, and the rules that may name each."""
    rows = []
    for cause in sorted(findings.CAUSES):
        named = [rule.__name__ for rule in findings.naming(cause, findings.ALL)]
        rows.append(f"| `{cause}` | {', '.join(f'[{n}](rules.md#{n})' for n in named) or '-'} |\n")
    return (
        f"# Causes\n\n{NOTE}\nWhat a finding may name as the root of it all.\n\n| cause | rules |\n|---|---|\n"
        + "".join(rows)
    )


def changes() -> str:
    """What `trainrt.explain` tries, read from the source: importing it would load TensorFlow."""
    tree = ast.parse((HERE.parent / "trainrt" / "experiment" / "changes.py").read_text())
    (listed,) = [n for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "CHANGES"]
    rows = []
    for call in listed.value.elts:  # type: ignore[attr-defined]
        name, named = call.args[0].value, [c.value for c in call.args[1].elts]
        rows.append(f"| {name} | {', '.join(f'`{cause}`' for cause in named)} |\n")
    head = f"# Changes\n\n{NOTE}\nWhat `trainrt.explain(model, x, y)` tries, and what speaks for it if it helps.\n"
    return f"{head}\n| change | speaks for |\n|---|---|\n{''.join(rows)}"


PAGES = {"rules.md": rules, "statistics.md": statistics_page, "causes.md": causes, "changes.md": changes}


def _row(name: str, statistic) -> str:
    text = statistic.doc.partition("\n>>>")[0]
    words = " ".join(text.split()).replace("|", "\\|")
    return f"| `{name}` | {statistic.unit} | {', '.join(statistic.needs)} | {words} |\n"


def _as_markdown(text: str) -> str:
    """`Means:   words` over several lines as paragraphs, doctests as code."""
    blocks: list[str] = []
    lines = text.strip("\n").splitlines()
    code = False
    for line in lines:
        if line.lstrip().startswith((">>>", "...")) and not code:
            blocks.append("\n```python\n")
            code = True
        if code:
            blocks.append(f"{line.strip() if not line.startswith(' ') else line}\n")
            continue
        match = re.match(r"(Means|Matters|Try|Source):\s*(.*)", line)
        if match:
            blocks.append(f"\n**{match[1]}.** {match[2]}\n")
        else:
            blocks.append(f"{line.strip()}\n")
    return "".join(blocks).strip("\n") + ("\n```\n" if code else "\n")


def write(directory: Path = HERE) -> list[Path]:
    """Writes every page; returns those that were not current."""
    changed = []
    for name, make in PAGES.items():
        path = directory / name
        text = make()
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            changed.append(path)
    return changed


if __name__ == "__main__":
    for each in write():
        print(f"wrote {each.name}")
